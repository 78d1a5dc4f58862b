r"""The diffusion face: factors of the covariance of the stochastic gradient.

Noise on the data enters through the end-to-end gradient alone, $g_i = A_i^\top \tilde M B_i^\top$,
so its factor is of low rank: it acts on `(d_N, d_0)` matrices, whatever the depth. The
contributions of the batch, the labels and the inputs are uncorrelated (law of total covariance)
and add up. Noise on the gradient does not depend on the weights. Noise inside the network has no
closed factor.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import EndToEnd, Weights
from gradflow.data import Regression
from gradflow.random.streams import Stream
from gradflow.regularizers.base import (
    AbstractEndToEndNoise,
    AbstractGradientNoise,
    AbstractLayerNoise,
    AbstractPenalty,
    AbstractRegularizer,
    NoiseMoments,
    layer_shapes,
)


def has_diffusion_factor(regularizers: Sequence[AbstractRegularizer]) -> bool:
    """Whether the covariance of the stochastic gradient has a closed factor."""
    return not any(isinstance(r, AbstractLayerNoise) for r in regularizers)


def numbered(
    regularizers: Sequence[AbstractRegularizer],
) -> list[tuple[int, AbstractRegularizer]]:
    """The noises with their numbers; penalties do not count."""
    return list(enumerate(r for r in regularizers if not isinstance(r, AbstractPenalty)))


def draw_normals(
    data: Regression,
    regularizers: Sequence[AbstractRegularizer],
    stream: Stream,
    widths: tuple[int, ...],
) -> tuple[tuple[Array, ...], tuple[tuple[Array, ...], ...]]:
    """The normals of a block of draws: those of the data noises and those of the gradient noises.

    Every noise has a substream of its own, with its number among the noises.

    **Raises:** `ValueError` for noise inside the network, which has no closed factor.
    """
    check_factor(regularizers)
    noises = numbered(regularizers)
    return (
        tuple(
            stream.substream(i).normals(r.normal_shape(data))
            for i, r in noises
            if isinstance(r, AbstractEndToEndNoise)
        ),
        tuple(
            gradient_normals(stream.substream(i), widths)
            for i, r in noises
            if isinstance(r, AbstractGradientNoise)
        ),
    )


def normal_shapes(
    data: Regression, regularizers: Sequence[AbstractRegularizer], widths: tuple[int, ...]
) -> tuple[tuple[Any, ...], tuple[tuple[Any, ...], ...]]:
    """The shapes of one draw of `draw_normals`, as `jax.ShapeDtypeStruct`.

    **Raises:** `ValueError` for noise inside the network, which has no closed factor.
    """
    check_factor(regularizers)

    def struct(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, data.sxx.dtype)

    layers = tuple(struct(shape) for shape in layer_shapes(widths))
    return (
        tuple(struct(r.normal_shape(data)) for r in data_sources(regularizers)),
        tuple(layers for r in regularizers if isinstance(r, AbstractGradientNoise)),
    )


def gradient_normals(stream: Stream, widths: tuple[int, ...]) -> tuple[Array, ...]:
    """Standard normals for every entry of every layer, each `(K, d_i, d_{i-1}, R)`."""
    shapes = layer_shapes(widths)
    return tuple(stream.substream(i).normals(shape) for i, shape in enumerate(shapes))


def gradient_increment(
    regularizers: Sequence[AbstractRegularizer], normals: tuple[tuple[Array, ...], ...]
) -> Weights:
    """The noise on the gradient, one array a layer; an empty tuple if there is none."""
    sources = [r for r in regularizers if isinstance(r, AbstractGradientNoise)]
    total: Weights = ()
    for source, layers in zip(sources, normals, strict=True):
        depth = len(layers)
        own = [source.level(i, depth) * z for i, z in enumerate(layers, start=1)]
        total = tuple(a + b for a, b in zip(total, own, strict=True)) if total else tuple(own)
    return total


def end_to_end_increment(
    regularizers: Sequence[AbstractRegularizer],
    moments: NoiseMoments,
    normals: tuple[Array, ...],
) -> EndToEnd:
    """Gaussian noise on $M$ with the covariance of the sampled end-to-end gradient."""
    total = jnp.zeros_like(moments.m)
    for source, normal in zip(data_sources(regularizers), normals, strict=True):
        total = total + source.increment(moments, normal)
    return total


def end_to_end_covariance(
    regularizers: Sequence[AbstractRegularizer], moments: NoiseMoments
) -> Float[Array, "outputs outputs"]:
    r"""Covariance of the sampled end-to-end gradient, `(d_N d_0, d_N d_0)`, row-major vec.

    Noise on the gradient does not enter through $M$ and is not part of it.

    **Raises:** `ValueError` for noise inside the network, which has no closed factor.
    """
    check_factor(regularizers)
    size = moments.m.size
    total = jnp.zeros((size, size), moments.m.dtype)
    for source in data_sources(regularizers):
        total = total + source.covariance(moments)
    return total


def data_sources(
    regularizers: Sequence[AbstractRegularizer],
) -> list[AbstractEndToEndNoise]:
    """The noises that enter through the end-to-end gradient."""
    return [r for r in regularizers if isinstance(r, AbstractEndToEndNoise)]


def check_factor(regularizers: Sequence[AbstractRegularizer]) -> None:
    """Raise a `ValueError` for noise inside the network, which has no closed factor."""
    inside = [type(r).__name__ for r in regularizers if isinstance(r, AbstractLayerNoise)]
    if inside:
        raise ValueError(
            f"regularizers: {', '.join(inside)} acts inside the network and has no end-to-end "
            "diffusion factor; sample its gradient, as GradientDescent does (Problem.draw and "
            "Problem.sampled_gradient, or Problem.centred_gradient for the noise alone)."
        )
