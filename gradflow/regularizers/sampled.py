r"""The sampled face: exact stochastic gradients of every combination of regularizers.

Weights are perturbed first, by one draw a step that all rows share. At the perturbed weights one of
three routes gives the gradient of the rest, and the cheapest exact one is taken:

- *moments*: noise linear in the data on a full batch is Gaussian on $M$: `(d_N, d_0)` normals;
- *rows*: noise on the rows of the batch; without noise on the activations their end-to-end gradient
  is pulled back, with it the perturbed forward pass is differentiated;
- *pseudo row*: noise on the activations of a population without a batch. With one fresh row $x, y$
  the gradient $\nabla \bar L + n^{-1/2} (g(x, y, \text{noise}) - E[g(x, y, \text{noise}) | x, y])$
  has the mean and the covariance of $n$ samples whose noise is averaged, while $x$ does not
  fluctuate.

The gradient is then taken back through the perturbation of the weights.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.products import product
from gradflow.backend.types import Scalar, Weights
from gradflow.data import Regression
from gradflow.loss import moment_loss, pull_back
from gradflow.random.streams import Stream
from gradflow.regularizers.averaged import (
    add_penalties,
    end_to_end_mean,
    input_moment,
    input_variance,
    layer_noises,
    moment_gradient,
    total_penalty,
)
from gradflow.regularizers.base import (
    AbstractActivationNoise,
    AbstractBatch,
    AbstractDataNoise,
    AbstractGradientNoise,
    AbstractPenalty,
    AbstractRegularizer,
    AbstractWeightNoise,
    NoiseMoments,
    population_rows,
)
from gradflow.regularizers.diffusion import (
    end_to_end_increment,
    gradient_increment,
    gradient_normals,
    has_diffusion_factor,
)

Pairs = list[tuple[AbstractRegularizer, Any]]


def route(
    data: Regression, regularizers: Sequence[AbstractRegularizer]
) -> Literal["moments", "rows", "pseudo row"]:
    """How the gradient at the perturbed weights is sampled."""
    if any(isinstance(r, AbstractBatch) for r in regularizers):
        return "rows"
    activations = any(isinstance(r, AbstractActivationNoise) for r in regularizers)
    if data.x is None:
        return "pseudo row" if activations else "moments"
    linear = all(r.is_linear() for r in regularizers if isinstance(r, AbstractDataNoise))
    return "moments" if linear and not activations else "rows"


def is_gaussian(data: Regression, regularizers: Sequence[AbstractRegularizer]) -> bool:
    """Whether the sampled gradient is the averaged one plus the diffusion factor times normals."""
    return has_diffusion_factor(regularizers) and route(data, regularizers) == "moments"


def draw_noise(
    data: Regression,
    regularizers: Sequence[AbstractRegularizer],
    stream: Stream,
    widths: tuple[int, ...],
) -> tuple[Any, ...]:
    """The random numbers of a block of steps: one pytree of `(K, ..., R)` arrays a regularizer.

    Every noise has a substream of its own, numbered by its place among the regularizers (among the
    noises where the moments are sampled). A pseudo row comes last.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    layer_noises(regularizers, len(widths) - 1)
    way = route(data, regularizers)
    batch = _batch_size(data, regularizers)
    draws: list[Any] = []
    place = 0
    for r in regularizers:
        own = stream.substream(place)
        place += not (way == "moments" and isinstance(r, AbstractPenalty))
        if isinstance(r, AbstractBatch):
            draws.append(r.draw(own, data))
        elif isinstance(r, AbstractDataNoise):
            shape = r.normal_shape(data) if way == "moments" else r.draw_shape(batch, data)
            draws.append(own.normals(shape))
        elif isinstance(r, AbstractWeightNoise):
            draws.append(r.draw(own, widths))
        elif isinstance(r, AbstractActivationNoise):
            draws.append(r.draw(own, batch, widths))
        elif isinstance(r, AbstractGradientNoise):
            draws.append(gradient_normals(own, widths))
        else:
            draws.append(None)
    if way == "pseudo row":
        draws.append(stream.substream(place).normals((1, data.d_in + data.d_out)))
    return tuple(draws)


def sampled_gradient(
    data: Regression,
    regularizers: Sequence[AbstractRegularizer],
    weights: Weights,
    moments_at: Callable[[Weights], NoiseMoments],
    draw: tuple[Any, ...],
    penalties: bool = True,
) -> Weights:
    """The stochastic gradient of one step of one path; its expectation is `averaged_gradient`.

    `penalties=False` leaves the gradients of the penalties out.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    layer_noises(regularizers, len(weights))
    way = route(data, regularizers)
    pairs = list(zip(regularizers, draw[:-1] if way == "pseudo row" else draw, strict=True))
    shaken = _of_weights(pairs)
    at, back = jax.vjp(lambda w: _shaken(w, shaken), weights) if shaken else (weights, None)
    moments = moments_at(at)
    if way == "moments":
        g = _from_moments(data, pairs, at, moments)
    elif way == "rows":
        g = _from_rows(data, pairs, at, moments)
    else:
        g = _from_pseudo_row(data, pairs, at, moments, draw[-1])
    if back is not None:
        (g,) = back(g)
    normals = tuple(d for r, d in pairs if isinstance(r, AbstractGradientNoise))
    if normals:
        extra = gradient_increment(regularizers, normals)
        g = tuple(a + b for a, b in zip(g, extra, strict=True))
    return add_penalties(g, weights, regularizers) if penalties else g


def sampled_loss(
    data: Regression,
    regularizers: Sequence[AbstractRegularizer],
    weights: Weights,
    moments_at: Callable[[Weights], NoiseMoments],
    draw: tuple[Any, ...],
    penalties: bool = True,
) -> Scalar:
    r"""The loss of one step of one path, whose gradient is `sampled_gradient` under the same draw.

    The loss of the rows; on a full batch with noise linear in the data $\bar L + \langle P, N
    \rangle$ with the noise $N$ on $M$, without the constant that the noise of the labels adds.

    **Raises:** `ValueError` where no loss has that gradient: for a population whose noise depends
    on the weights.
    """
    layer_noises(regularizers, len(weights))
    way = route(data, regularizers)
    nonlinear = [r for r in regularizers if isinstance(r, AbstractDataNoise) and not r.is_linear()]
    if way == "pseudo row" or (way == "moments" and nonlinear):
        names = [type(r).__name__ for r in nonlinear or regularizers if r.is_stochastic]
        raise ValueError(
            "GradientDescent.optimizer: it needs the loss of a step, which population data with "
            f"{' and '.join(names)} do not have; give Minibatch or samples, or an optimizer that "
            "takes the gradient alone."
        )
    pairs = list(zip(regularizers, draw, strict=True))
    at = _shaken(weights, _of_weights(pairs))
    if way == "rows":
        value = _noisy_loss(at, pairs, *_rows(data, pairs, moments_at(at)))
    else:
        moments = moments_at(at)
        normals = tuple(d for r, d in pairs if isinstance(r, AbstractDataNoise))
        increment = end_to_end_increment(regularizers, moments, normals)
        value = moment_loss(moments.p, input_moment(data, regularizers), data.syx, data.syy)
        value = value + jnp.sum(moments.p * increment)
    normals = tuple(d for r, d in pairs if isinstance(r, AbstractGradientNoise))
    if normals:
        extra = gradient_increment(regularizers, normals)
        value = value + sum(jnp.sum(w * g) for w, g in zip(weights, extra, strict=True))
    return value + total_penalty(weights, regularizers) if penalties else value


def weight_shift(
    regularizers: Sequence[AbstractRegularizer], weights: Weights, draw: tuple[Any, ...]
) -> Weights:
    """The noise that the dynamics adds to the weights themselves; zeros without any."""
    total = tuple(jnp.zeros_like(w) for w in weights)
    depth = len(weights)
    for r, d in zip(regularizers, draw, strict=False):  # a pseudo row may follow
        if isinstance(r, AbstractWeightNoise) and r.is_shift:
            total = tuple(
                r.perturb_weight(d, i, depth, shift) for i, shift in enumerate(total, start=1)
            )
    return total


def _batch_size(data: Regression, regularizers: Sequence[AbstractRegularizer]) -> int:
    """The rows of a step; one pseudo row for a population."""
    for r in regularizers:
        if isinstance(r, AbstractBatch):
            return r.size()
    return 1 if data.x is None else data.x.shape[0]


def _from_moments(
    data: Regression, pairs: Pairs, weights: Weights, moments: NoiseMoments
) -> Weights:
    regularizers = [r for r, _ in pairs]
    normals = tuple(d for r, d in pairs if isinstance(r, AbstractDataNoise))
    mean = end_to_end_mean(moments.p, data, regularizers)
    return pull_back(weights, mean + end_to_end_increment(regularizers, moments, normals))


def _of_weights(pairs: Pairs) -> list[tuple[AbstractWeightNoise, Any]]:
    """The noises that replace the weights by others, in their order."""
    return [(r, d) for r, d in pairs if isinstance(r, AbstractWeightNoise) and not r.is_shift]


def _shaken(weights: Weights, noises: list[tuple[AbstractWeightNoise, Any]]) -> Weights:
    """The weights under the draws of all noises on them."""
    for r, d in noises:
        weights = tuple(
            r.perturb_weight(d, i, len(weights), w) for i, w in enumerate(weights, start=1)
        )
    return weights


def _rows(
    data: Regression, pairs: Pairs, moments: NoiseMoments
) -> tuple[Float[Array, "batch d_in"], Float[Array, "batch d_out"]]:
    """The rows of a step, with the noise on the data."""
    rows = [r.rows(d, data, moments.root) for r, d in pairs if isinstance(r, AbstractBatch)]
    if not rows and data.x is not None and data.y is not None:
        rows = [(data.x, data.y)]
    return _noisy_rows(pairs, *rows[0])


def _from_rows(data: Regression, pairs: Pairs, weights: Weights, moments: NoiseMoments) -> Weights:
    x, y = _rows(data, pairs, moments)
    if any(isinstance(r, AbstractActivationNoise) for r, _ in pairs):
        return jax.grad(_noisy_loss)(weights, pairs, x, y)
    errors = product(x, moments.p, (1, 1)) - y
    return pull_back(weights, product(errors, x, (0, 0)) / x.shape[0])


def _from_pseudo_row(
    data: Regression,
    pairs: Pairs,
    weights: Weights,
    moments: NoiseMoments,
    normals: Float[Array, "1 channels"],
) -> Weights:
    """The averaged gradient is linear in the moments, so one evaluation gives both of its parts."""
    regularizers = [r for r, _ in pairs]
    share = 1.0 / jnp.sqrt(data.n)
    x, y = population_rows(normals, data, moments.root)
    noise = input_variance(regularizers) * jnp.eye(data.d_in, dtype=x.dtype)
    s0 = input_moment(data, regularizers) - share * (x.T @ x + noise)
    active = [r for r in regularizers if isinstance(r, AbstractActivationNoise)]
    mean = moment_gradient(weights, s0, data.syx - share * (y.T @ x), active)
    one = jax.grad(_noisy_loss)(weights, pairs, *_noisy_rows(pairs, x, y))
    return tuple(m + share * g for m, g in zip(mean, one, strict=True))


def _noisy_rows(
    pairs: Pairs, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"]
) -> tuple[Float[Array, "batch d_in"], Float[Array, "batch d_out"]]:
    for r, d in pairs:
        if isinstance(r, AbstractDataNoise):
            x, y = r.perturb(d, x, y)
    return x, y


def _noisy_loss(
    weights: Weights,
    pairs: Pairs,
    x: Float[Array, "batch d_in"],
    y: Float[Array, "batch d_out"],
) -> Scalar:
    """The loss of the rows with noise on the hidden activations."""
    depth = len(weights)
    h = x
    for layer, w in enumerate(weights, start=1):
        h = h @ w.T
        for r, d in pairs:
            if isinstance(r, AbstractActivationNoise):
                h = r.perturb_activation(d, layer, depth, h)
    return 0.5 * jnp.sum((h - y) ** 2) / x.shape[0]
