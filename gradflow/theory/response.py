r"""How the weights answer to the fluctuation: $\Psi = K^+ X$, contracted on one of its sides.

The slow drift needs a small matrix a layer of it,

$$\langle \Psi, G \rangle_\mathrm{out} = \sum_{ac} \Psi_{ab,cd}\, G_{ac}, \qquad
  \langle \Psi, H \rangle_\mathrm{in} = \sum_{bd} \Psi_{ab,cd}\, H_{bd},$$

so the forms here keep of $\Psi$, `(d_N d_0, d_N d_0)`, what is cheapest.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from gradflow.geometry.kernel import KernelBasis
from gradflow.types import Scalar

LARGEST_BLOCK = 256
"""Size up to which a triangle is inverted at once; its halves save two thirds of the work."""


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


class FactoredResponse(AbstractResponse):
    r"""$\Psi = \psi\, F^\top F$, never multiplied out.

    - `level`: $\psi$. `factor`: $F$, rows `(rows, d_N, d_0)`.
    """

    level: Scalar
    factor: Float[Array, "rows d_out d_in"]

    def over_outputs(self, g: Float[Array, "d_out d_out"]) -> Float[Array, "d_in d_in"]:
        r"""$\psi \sum_m F_m^\top G F_m$, in groups of rows that stay in a cache."""

        def add(total: Array, rows: Array) -> tuple[Array, None]:
            moved = jnp.einsum("ac,mcd->mad", g, rows)
            return total + jnp.einsum("mab,mad->bd", rows, moved), None

        return self.level * jax.lax.scan(add, jnp.zeros(2 * self._shape[1:]), self._groups)[0]

    def over_inputs(self, g: Float[Array, "d_in d_in"]) -> Float[Array, "d_out d_out"]:
        r"""$\psi \sum_m F_m H F_m^\top$, in groups of rows that stay in a cache."""

        def add(total: Array, rows: Array) -> tuple[Array, None]:
            moved = jnp.einsum("mab,bd->mad", rows, g)
            return total + jnp.einsum("mad,mcd->ca", moved, rows), None

        return self.level * jax.lax.scan(add, jnp.zeros(2 * self._shape[:1]), self._groups)[0]

    @property
    def _shape(self) -> tuple[int, int]:
        return self.factor.shape[1], self.factor.shape[2]

    @property
    def _groups(self) -> Float[Array, "groups rows d_out d_in"]:
        d_out, d_in = self._shape
        return self.factor.reshape(d_out, -1, d_out, d_in)


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


def inverse_factor(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    r"""$F = L^{-1}$ where $A = L L^\top$: $A^{-1} = F^\top F$; NaN unless $A$ is positive."""
    return _inverse_triangle(jnp.linalg.cholesky(matrix))


def _inverse_triangle(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a lower triangle, from those of its halves where it is large."""
    n, half = len(lower), len(lower) // 2
    if n <= LARGEST_BLOCK:
        return solve_triangular(lower, jnp.eye(n, dtype=lower.dtype), lower=True)
    top = _inverse_triangle(lower[:half, :half])
    bottom = _inverse_triangle(lower[half:, half:])
    corner = -bottom @ (lower[half:, :half] @ top)
    return jnp.block([[top, jnp.zeros_like(corner).T], [corner, bottom]])
