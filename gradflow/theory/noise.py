"""The covariance of the gradient noise."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar, Weights
from gradflow.problem import Problem
from gradflow.regularizers.base import AbstractGradientNoise, AbstractLayerNoise
from gradflow.regularizers.diffusion import data_sources, end_to_end_covariance


def check_outside(problem: Problem, what: str, instead: str) -> None:
    """Raise a `ValueError` for noise inside the network, for which `what` has no closed form."""
    inside = [type(r).__name__ for r in problem.regularizers if isinstance(r, AbstractLayerNoise)]
    if inside:
        raise ValueError(
            f"{what} covers noise on the data and the gradient, not {', '.join(inside)}, which "
            f"acts inside the network; {instead}."
        )


def gradient_noise_variances(problem: Problem, depth: int) -> list[Scalar]:
    """The variance of `GradientNoise` on every entry of the gradient of each layer."""
    noises = [r for r in problem.regularizers if isinstance(r, AbstractGradientNoise)]
    start = jnp.zeros((), problem.data.sxx.dtype)
    layers = range(1, depth + 1)
    return [sum((r.level(i, depth) ** 2 for r in noises), start=start) for i in layers]


def noise_columns(problem: Problem, weights: Weights) -> Float[Array, "normals d_out d_in"]:
    r"""The columns $Z_c$ of the diffusion factor: the data noise on $M$ is $\sum_c \zeta_c Z_c$.

    **Raises:** `ValueError` for noise inside the network, which has no closed factor.
    """
    shapes = [r.normal_shape(problem.data) for r in data_sources(problem.regularizers)]
    sizes = [int(np.prod(s)) for s in shapes]
    total = sum(sizes)

    def apply(flat: Float[Array, " normals"]) -> Float[Array, "d_out d_in"]:
        pieces = jnp.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
        normals = tuple(p.reshape(s) for p, s in zip(pieces, shapes, strict=True))
        return problem.end_to_end_increment(weights, normals)

    if total == 0:
        return apply(jnp.zeros((0,), problem.data.sxx.dtype))[None]
    return jax.vmap(apply)(jnp.eye(total, dtype=problem.data.sxx.dtype))


def noise_covariance(problem: Problem, weights: Weights) -> Float[Array, "outputs outputs"]:
    r"""$C = \mathrm{Cov}[\mathrm{vec}\, \tilde M]$ of one step, `(d_N d_0, d_N d_0)`.

    Row-major vec. Label noise on a full batch of $n$ samples has
    $C = \tfrac{s^2}{n} I \otimes S_{xx}$. Noise on the gradient does not enter through $M$ and is
    not part of it.

    **Raises:** `ValueError` for noise inside the network, which does not enter through $M$.
    """
    instead = (
        "the covariance of its gradient is that of Problem.centred_gradient, estimated over draws"
    )
    check_outside(problem, "noise_covariance", instead)
    return end_to_end_covariance(problem.regularizers, problem.noise_moments(weights))
