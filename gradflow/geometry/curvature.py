"""Curvature of the loss: Hessian traces, sharpness and the spectrum at minima."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from gradflow.data import Regression
from gradflow.loss import moment_loss
from gradflow.network import DeepLinear, end_to_end, left_products, right_products
from gradflow.types import Scalar, Weights

LARGEST_DENSE_HESSIAN = 2_000
"""Parameters up to which `sharpness` forms the Hessian (32 MB in float64)."""


def hessian_block_traces(net: DeepLinear, data: Regression) -> Float[Array, " depth"]:
    r"""Traces of the Hessian's diagonal blocks, `(N,)`.

    $$\tau_i = |A_i|^2\, \mathrm{tr}(B_i S B_i^\top).$$

    Exact at every point of weight space: $P$ is affine in each layer, so the residual does not
    enter.
    """
    lefts, rights = left_products(net.weights), right_products(net.weights)
    return jnp.stack(
        [jnp.sum(a * a) * jnp.sum((b @ data.sxx) * b) for a, b in zip(lefts, rights, strict=True)]
    )


def hessian_trace(net: DeepLinear, data: Regression) -> Scalar:
    r"""The trace of the Hessian of `loss`, $\mathrm{tr} H = \sum_i \tau_i$; exact everywhere."""
    return jnp.sum(hessian_block_traces(net, data))


def sharpness(net: DeepLinear, data: Regression) -> Scalar:
    r"""The largest eigenvalue of the Hessian of `loss`, by a dense eigendecomposition.

    **Raises:** `ValueError` beyond `LARGEST_DENSE_HESSIAN` parameters.
    """
    if net.num_parameters > LARGEST_DENSE_HESSIAN:
        raise ValueError(
            f"net: the dense Hessian of {net.num_parameters} parameters is too large (limit "
            f"{LARGEST_DENSE_HESSIAN}); at a minimum use minima_spectrum(net, sxx).max(), whose "
            "size is d_N d_0."
        )
    return jnp.linalg.eigvalsh(_hessian(net, data))[-1]


@eqx.filter_jit  # operation by operation, the nested derivatives take seconds for every new shape
def _hessian(net: DeepLinear, data: Regression) -> Float[Array, "parameters parameters"]:
    flat, unravel = ravel_pytree(net.weights)

    def at(w: Float[Array, " parameters"]) -> Scalar:
        weights: Weights = unravel(w)
        return moment_loss(end_to_end(weights), data.sxx, data.syx, data.syy)

    return jax.hessian(at)(flat)


def end_to_end_kernel(
    net: DeepLinear, sxx: Float[Array, "d_in d_in"]
) -> Float[Array, "outputs outputs"]:
    r"""$K = \sum_i A_i A_i^\top \otimes S^{1/2} B_i^\top B_i S^{1/2}$, `(d_N d_0, d_N d_0)`.

    On the minima manifold its spectrum is the nonzero spectrum of the Hessian; row-major vec.
    """
    return kernel_of_root(net.weights, _square_root(sxx))


def kernel_of_root(
    weights: Weights, root: Float[Array, "d_in d_in"]
) -> Float[Array, "outputs outputs"]:
    r"""`end_to_end_kernel` with the root $S^{1/2}$ already taken."""
    lefts, rights = left_products(weights), right_products(weights)
    blocks = [
        jnp.kron(a @ a.T, root @ (b.T @ b) @ root) for a, b in zip(lefts, rights, strict=True)
    ]
    return jnp.sum(jnp.stack(blocks), axis=0)


def minima_spectrum(net: DeepLinear, sxx: Float[Array, "d_in d_in"]) -> Float[Array, " outputs"]:
    r"""The nonzero Hessian spectrum at a minimum, ascending: the eigenvalues of $K$.

    The residual of the optimization phase decays no slower than $e^{-\lambda t}$ with the smallest
    of them that is not zero (theory: exit rate of the optimization phase).
    """
    return jnp.linalg.eigvalsh(end_to_end_kernel(net, sxx))


def _square_root(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.sqrt(jnp.clip(values, min=0.0))) @ vectors.T


def smallest_positive(values: Float[Array, " k"]) -> Scalar:
    """The smallest entry above rounding level of the largest; the largest if all are zero."""
    top = jnp.max(values)
    floor = top * values.size * float(np.finfo(values.dtype).eps) * 10.0
    return jnp.min(jnp.where(values > floor, values, top))
