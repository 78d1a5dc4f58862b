r"""How the weights answer to the fluctuation: $\Psi = K^+ X$, contracted on one of its sides.

The slow drift needs a small matrix a layer of it,

$$\langle \Psi, G \rangle_\mathrm{out} = \sum_{ac} \Psi_{ab,cd}\, G_{ac}, \qquad
  \langle \Psi, H \rangle_\mathrm{in} = \sum_{bd} \Psi_{ab,cd}\, H_{bd},$$

so the forms here keep of $\Psi$, `(d_N d_0, d_N d_0)`, what that takes.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar
from gradflow.geometry.kernel import KernelBasis


class AbstractResponse(eqx.Module):
    r"""$\Psi$ in one of its forms."""

    @abc.abstractmethod
    def over_outputs(self, g: Float[Array, "d_out d_out"]) -> Float[Array, "d_in d_in"]:
        r"""$\langle \Psi, G \rangle_\mathrm{out}$ for a symmetric $G$, with the entries $bd$."""

    @abc.abstractmethod
    def over_inputs(self, g: Float[Array, "d_in d_in"]) -> Float[Array, "d_out d_out"]:
        r"""$\langle \Psi, H \rangle_\mathrm{in}$ for a symmetric $H$, with the entries $ca$."""


class UniformResponse(AbstractResponse):
    r"""$\Psi = \psi I$: label noise at small steps.

    - `level`: $\psi$. `outputs`, `inputs`: the identities on both sides.
    """

    level: Scalar
    outputs: Float[Array, "d_out d_out"]
    inputs: Float[Array, "d_in d_in"]

    def over_outputs(self, g: Float[Array, "d_out d_out"]) -> Float[Array, "d_in d_in"]:
        r"""$\psi\, \mathrm{tr}(G)\, I$."""
        return self.level * jnp.trace(g) * self.inputs

    def over_inputs(self, g: Float[Array, "d_in d_in"]) -> Float[Array, "d_out d_out"]:
        r"""$\psi\, \mathrm{tr}(H)\, I$."""
        return self.level * jnp.trace(g) * self.outputs


class MatrixResponse(AbstractResponse):
    r"""$\Psi$ itself, `(d_N, d_0, d_N, d_0)`."""

    blocks: Float[Array, "d_out d_in d_out d_in"]

    def over_outputs(self, g: Float[Array, "d_out d_out"]) -> Float[Array, "d_in d_in"]:
        r"""$\langle \Psi, G \rangle_\mathrm{out}$."""
        return jnp.einsum("abcd,ac->bd", self.blocks, g)

    def over_inputs(self, g: Float[Array, "d_in d_in"]) -> Float[Array, "d_out d_out"]:
        r"""$\langle \Psi, H \rangle_\mathrm{in}$."""
        return jnp.einsum("abcd,bd->ca", self.blocks, g)


class TurnedResponse(AbstractResponse):
    r"""A response known in other coordinates $x = U c V^\top$ of outputs and inputs."""

    basis: KernelBasis
    turned: AbstractResponse

    def over_outputs(self, g: Float[Array, "d_out d_out"]) -> Float[Array, "d_in d_in"]:
        r"""$V \langle \Psi', U^\top G U \rangle_\mathrm{out} V^\top$."""
        u, v = self.basis.outputs, self.basis.inputs
        return v @ self.turned.over_outputs(u.T @ g @ u) @ v.T

    def over_inputs(self, g: Float[Array, "d_in d_in"]) -> Float[Array, "d_out d_out"]:
        r"""$U \langle \Psi', V^\top H V \rangle_\mathrm{in} U^\top$."""
        u, v = self.basis.outputs, self.basis.inputs
        return u @ self.turned.over_inputs(v.T @ g @ v) @ u.T
