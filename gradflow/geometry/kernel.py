r"""The kernel of the end-to-end matrix as a sum of Kronecker products that is never formed.

$$K = \sum_i T_i \otimes C_i, \qquad T_i = A_i A_i^\top, \quad
  C_i = S^{1/2} B_i^\top B_i S^{1/2}.$$

A product with it costs $2 N d_N d_0 (d_N + d_0)$ operations where the matrix has $(d_N d_0)^2$
entries.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import EndToEnd, Weights
from gradflow.network import left_products, right_products

LARGEST_DENSE_KERNEL = 256
"""Size $d_N d_0$ up to which $K$ is formed and decomposed; beyond it Krylov methods take over."""


class Kernel(eqx.Module):
    r"""$K = \sum_i T_i \otimes C_i$, acting on `(d_N, d_0)` matrices by $x \mapsto \sum T_i x C_i$.

    - `outputs`: $T_i$, `(N, d_N, d_N)`; `inputs`: $C_i$, `(N, d_0, d_0)`.
    """

    outputs: Float[Array, "depth d_out d_out"]
    inputs: Float[Array, "depth d_in d_in"]

    @property
    def size(self) -> int:
        """$d_N d_0$."""
        return self.outputs.shape[-1] * self.inputs.shape[-1]

    @property
    def is_large(self) -> bool:
        """Whether it is too large to be formed and decomposed: see `LARGEST_DENSE_KERNEL`."""
        return self.size > LARGEST_DENSE_KERNEL

    def matrix(self) -> Float[Array, "outputs outputs"]:
        """The matrix, row-major vec."""
        total = jnp.einsum("nac,nij->aicj", self.outputs, self.inputs)
        return total.reshape(self.size, self.size)

    def __call__(self, x: Float[Array, "*batch d_out d_in"]) -> Float[Array, "*batch d_out d_in"]:
        r"""$\sum_i T_i x C_i$."""
        return jnp.sum(self.outputs @ x[..., None, :, :] @ self.inputs, axis=-3)


class KernelBasis(eqx.Module):
    r"""Coordinates of outputs and inputs in which $K$ is nearly diagonal: $x = U c V^\top$.

    $U$ has the eigenvectors of $\sum_i \mathrm{tr}(C_i)\, T_i$ in its columns, $V$ those of
    $\sum_i \mathrm{tr}(T_i)\, C_i$. $K$ is diagonal in them if all $T_i$ commute and all $C_i$ do,
    as for balanced layers and whitened data; otherwise they make a preconditioner.

    - `outputs`: $U$; `inputs`: $V$; orthogonal.
    - `values`: the diagonal of $K$ in these coordinates, `(d_N, d_0)`.
    """

    outputs: Float[Array, "d_out d_out"]
    inputs: Float[Array, "d_in d_in"]
    values: Float[Array, "d_out d_in"]

    def coordinates(self, x: EndToEnd) -> Float[Array, "d_out d_in"]:
        r"""$c = U^\top x V$."""
        return self.outputs.T @ x @ self.inputs


def kernel_at(weights: Weights, root: Float[Array, "d_in d_in"]) -> Kernel:
    r"""The kernel of the weights, with the root $S^{1/2}$ of the second moment of the inputs."""
    tops = jnp.stack([a @ a.T for a in left_products(weights)])
    halves = [b @ root for b in right_products(weights)]
    return Kernel(tops, jnp.stack([half.T @ half for half in halves]))


def kernel_basis(kernel: Kernel) -> KernelBasis:
    """The coordinates in which a kernel is nearly diagonal."""
    tops, bottoms = kernel.outputs, kernel.inputs
    of_tops, of_bottoms = (jnp.trace(m, axis1=1, axis2=2) for m in (tops, bottoms))
    u = jnp.linalg.eigh(jnp.einsum("n,nab->ab", of_bottoms, tops))[1]
    v = jnp.linalg.eigh(jnp.einsum("n,nij->ij", of_tops, bottoms))[1]
    above = jnp.einsum("oa,nop,pa->na", u, tops, u)
    below = jnp.einsum("is,nij,js->ns", v, bottoms, v)
    return KernelBasis(u, v, jax.nn.relu(above.T @ below))
