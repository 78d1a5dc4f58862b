"""The covariance of the end-to-end gradient noise."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.problem import Problem
from gradflow.regularizers.diffusion import end_to_end_covariance
from gradflow.types import Weights


def noise_columns(problem: Problem, weights: Weights) -> Float[Array, "normals d_out d_in"]:
    r"""The columns $Z_c$ of the diffusion factor: the noise on $M$ is $\sum_c \zeta_c Z_c$."""
    shapes = problem.normal_shapes()
    sizes = [int(np.prod(s)) for s in shapes]
    total = sum(sizes)
    if total == 0:
        d_out, d_in = problem.data.syx.shape
        return jnp.zeros((1, d_out, d_in), problem.data.sxx.dtype)

    def apply(flat: Float[Array, " normals"]) -> Float[Array, "d_out d_in"]:
        pieces = jnp.split(flat, np.cumsum(sizes)[:-1])
        normals = tuple(p.reshape(s) for p, s in zip(pieces, shapes, strict=True))
        return problem.end_to_end_increment(weights, normals)

    return jax.vmap(apply)(jnp.eye(total, dtype=problem.data.sxx.dtype))


def noise_covariance(problem: Problem, weights: Weights) -> Float[Array, "outputs outputs"]:
    r"""$C = \mathrm{Cov}[\mathrm{vec}\, \tilde M]$ of one step, `(d_N d_0, d_N d_0)`.

    Row-major vec.

    Label noise on a full batch of $n$ samples has $C = \tfrac{s^2}{n} I \otimes S_{xx}$.
    """
    return end_to_end_covariance(problem.regularizers, problem.noise_moments(weights))
