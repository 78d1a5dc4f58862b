r"""The diffusion face: low-rank factors of the covariance of the stochastic gradient.

Noise on the data enters through the end-to-end gradient alone, $g_i = A_i^\top \tilde M B_i^\top$,
so its factor acts on `(d_N, d_0)` matrices, whatever the depth. The contributions of the batch,
the labels and the inputs are uncorrelated (law of total covariance) and add up.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.data import Regression
from gradflow.regularizers.base import (
    AbstractBatch,
    AbstractDataNoise,
    AbstractLayerNoise,
    AbstractRegularizer,
    NoiseMoments,
)
from gradflow.types import EndToEnd


def normal_shapes(
    data: Regression, regularizers: Sequence[AbstractRegularizer]
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the standard normals that `end_to_end_increment` takes, one a noise."""
    return tuple(r.normal_shape(data) for r in _sources(regularizers))


def end_to_end_increment(
    regularizers: Sequence[AbstractRegularizer],
    moments: NoiseMoments,
    normals: tuple[Array, ...],
) -> EndToEnd:
    r"""Gaussian noise on $M$ with the covariance of the sampled end-to-end gradient.

    **Raises:** `ValueError` for noise that does not enter through the end-to-end gradient.
    """
    total = jnp.zeros_like(moments.m)
    for source, normal in zip(_sources(regularizers), normals, strict=True):
        total = total + source.increment(moments, normal)
    return total


def end_to_end_covariance(
    regularizers: Sequence[AbstractRegularizer], moments: NoiseMoments
) -> Float[Array, "outputs outputs"]:
    r"""Covariance of the sampled end-to-end gradient, `(d_N d_0, d_N d_0)`, row-major vec.

    **Raises:** `ValueError` for noise that does not enter through the end-to-end gradient.
    """
    size = moments.m.size
    total = jnp.zeros((size, size), moments.m.dtype)
    for source in _sources(regularizers):
        total = total + source.covariance(moments)
    return total


def _sources(
    regularizers: Sequence[AbstractRegularizer],
) -> list[AbstractBatch | AbstractDataNoise]:
    inside = [type(r).__name__ for r in regularizers if isinstance(r, AbstractLayerNoise)]
    if inside:
        raise ValueError(
            f"regularizers: {', '.join(inside)} acts inside the network and has no end-to-end "
            "diffusion factor; use GradientDescent, which samples it exactly."
        )
    return [r for r in regularizers if isinstance(r, AbstractBatch | AbstractDataNoise)]
