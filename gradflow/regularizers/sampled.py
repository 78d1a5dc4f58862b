"""The sampled face: exact stochastic gradients of every combination of regularizers.

Three routes give the same distribution, and the cheapest exact one is taken:

- noise linear in the data on a full batch is Gaussian on $M$: `(d_N, d_0)` normals a step;
- other noise on the data perturbs the rows of the batch, whose end-to-end gradient is pulled back;
- noise inside the network runs the perturbed forward pass and differentiates it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.data import Regression
from gradflow.loss import pull_back
from gradflow.regularizers.averaged import add_penalties, averaged_gradient
from gradflow.regularizers.base import (
    AbstractBatch,
    AbstractDataNoise,
    AbstractLayerNoise,
    AbstractRegularizer,
    NoiseMoments,
)
from gradflow.regularizers.diffusion import end_to_end_increment, normal_shapes
from gradflow.streams import Stream
from gradflow.types import Scalar, Weights


def samples_rows(data: Regression, regularizers: Sequence[AbstractRegularizer]) -> bool:
    """Whether a draw perturbs rows of data (True) or the end-to-end gradient (False)."""
    if any(isinstance(r, AbstractBatch | AbstractLayerNoise) for r in regularizers):
        return True
    linear = all(r.is_linear() for r in regularizers if isinstance(r, AbstractDataNoise))
    return data.x is not None and not linear


def draw_noise(
    data: Regression,
    regularizers: Sequence[AbstractRegularizer],
    stream: Stream,
    widths: tuple[int, ...],
) -> tuple[Any, ...]:
    """The random numbers of a block of steps, one pytree of `(K, ..., R)` arrays a noise.

    Every noise has a substream of its own, numbered by its place among the regularizers.

    **Raises:** `ValueError` if the noise needs rows and the data have none.
    """
    if not samples_rows(data, regularizers):
        shapes = normal_shapes(data, regularizers)
        return tuple(stream.substream(i).normals(s) for i, s in enumerate(shapes))
    batch = _batch_size(data, regularizers)
    draws = []
    for i, r in enumerate(regularizers):
        own = stream.substream(i)
        if isinstance(r, AbstractBatch):
            draws.append(r.draw(own, data))
        elif isinstance(r, AbstractDataNoise):
            draws.append(own.normals(r.draw_shape(batch, data)))
        elif isinstance(r, AbstractLayerNoise):
            draws.append(r.draw(own, batch, widths))
        else:
            draws.append(None)
    return tuple(draws)


def sampled_gradient(
    data: Regression,
    regularizers: Sequence[AbstractRegularizer],
    weights: Weights,
    moments: NoiseMoments,
    draw: tuple[Any, ...],
) -> Weights:
    """The stochastic gradient of one step of one path; its expectation is `averaged_gradient`."""
    if not samples_rows(data, regularizers):
        mean = averaged_gradient(weights, data, regularizers)
        noise = pull_back(weights, end_to_end_increment(regularizers, moments, draw))
        return tuple(g + e for g, e in zip(mean, noise, strict=True))
    x, y = _perturbed_rows(data, regularizers, moments.root, draw)
    if any(isinstance(r, AbstractLayerNoise) for r in regularizers):
        g = jax.grad(_perturbed_loss)(weights, regularizers, draw, x, y)
    else:
        errors = x @ moments.p.T - y
        g = pull_back(weights, errors.T @ x / x.shape[0])
    return add_penalties(g, weights, regularizers)


def _batch_size(data: Regression, regularizers: Sequence[AbstractRegularizer]) -> int:
    for r in regularizers:
        if isinstance(r, AbstractBatch):
            return r.size()
    if data.x is None:
        names = [type(r).__name__ for r in regularizers if isinstance(r, AbstractLayerNoise)]
        raise ValueError(
            f"data: {', '.join(names)} perturbs rows of data, and population moments have none; "
            "add Minibatch(batch_size) for online SGD, or use Regression.from_samples."
        )
    return data.x.shape[0]


def _perturbed_rows(
    data: Regression,
    regularizers: Sequence[AbstractRegularizer],
    root: Float[Array, "d_in d_in"],
    draw: tuple[Any, ...],
) -> tuple[Float[Array, "batch d_in"], Float[Array, "batch d_out"]]:
    pairs = list(zip(regularizers, draw, strict=True))
    rows = [r.rows(d, data, root) for r, d in pairs if isinstance(r, AbstractBatch)]
    if not rows and data.x is not None and data.y is not None:
        rows = [(data.x, data.y)]
    x, y = rows[0]
    for r, d in pairs:
        if isinstance(r, AbstractDataNoise):
            x, y = r.perturb(d, x, y)
    return x, y


def _perturbed_loss(
    weights: Weights,
    regularizers: Sequence[AbstractRegularizer],
    draw: tuple[Any, ...],
    x: Float[Array, "batch d_in"],
    y: Float[Array, "batch d_out"],
) -> Scalar:
    depth = len(weights)
    noises = [
        (r, d) for r, d in zip(regularizers, draw, strict=True) if isinstance(r, AbstractLayerNoise)
    ]
    h = x
    for layer, w in enumerate(weights, start=1):
        for r, d in noises:
            w = r.perturb_weight(d, layer, depth, w)
        h = h @ w.T
        for r, d in noises:
            h = r.perturb_activation(d, layer, depth, h)
    return 0.5 * jnp.sum((h - y) ** 2) / x.shape[0]
