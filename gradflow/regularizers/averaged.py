"""The averaged face: the exact expected loss of every combination of regularizers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.compiled import compiled
from gradflow.backend.products import product
from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.data import Regression
from gradflow.loss import moment_loss, on_inputs, pull_back, second_moment
from gradflow.network import end_to_end
from gradflow.regularizers.base import (
    AbstractActivationNoise,
    AbstractDataNoise,
    AbstractLayerNoise,
    AbstractPenalty,
    AbstractRegularizer,
    AbstractWeightNoise,
)


def input_variance(regularizers: Sequence[AbstractRegularizer]) -> Scalar:
    r"""The total variance $\sigma^2$ of the noise on each input coordinate."""
    return sum(
        (r.input_variance() for r in regularizers if isinstance(r, AbstractDataNoise)),
        start=jnp.zeros(()),
    )


@compiled
def input_moment(
    data: Regression, regularizers: Sequence[AbstractRegularizer]
) -> Float[Array, "d_in d_in"]:
    r"""The second moment of the perturbed inputs, $S_0 = S_{xx} + \sigma^2 I$."""
    return second_moment(data, input_variance(regularizers))


def layer_noises(
    regularizers: Sequence[AbstractRegularizer], depth: int
) -> list[AbstractLayerNoise]:
    """The noises inside a network of the given depth, in the order in which they act.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    noises = [r for r in regularizers if isinstance(r, AbstractLayerNoise)]
    for noise in noises:
        noise.check(depth)
    shifts = [r for r in noises if isinstance(r, AbstractWeightNoise) and r.is_shift]
    return shifts + [r for r in noises if not (isinstance(r, AbstractWeightNoise) and r.is_shift)]


def output_moment(
    weights: Weights,
    s0: Float[Array, "d_in d_in"],
    noises: Sequence[AbstractLayerNoise],
) -> Float[Array, "d_out d_out"]:
    r"""The second moment of the output, pushed through the layers (docs/theory.md section 5).

    $$C_l = W_l S_{l-1} W_l^\top + \mathrm{diag}(V_l\, \mathrm{diag}\, S_{l-1}), \qquad
      S_l = C_l + \alpha_l\, \mathrm{diag}\, C_l,$$

    with $V_l$ the entry-wise variance of the weights and $\alpha_l$ that of the factors on the
    activations. Exact for independent noises in any combination.
    """
    depth = len(weights)
    on_weights = [r for r in noises if isinstance(r, AbstractWeightNoise)]
    on_activations = [r for r in noises if isinstance(r, AbstractActivationNoise)]
    s = s0
    for layer, w in enumerate(weights, start=1):
        c = w @ s @ w.T
        if on_weights:
            variance = jnp.zeros_like(w)
            for noise in on_weights:
                variance = noise.weight_variance(layer, depth, w, variance)
            c = c + jnp.diag(variance @ jnp.diag(s))
        spread = jnp.ones((), w.dtype)
        for noise in on_activations:
            spread = spread * (1.0 + noise.activation_variance(layer, depth))
        s = c + (spread - 1.0) * jnp.diag(jnp.diag(c)) if on_activations else c
    return s


def moment_gradient(
    weights: Weights,
    s0: Float[Array, "d_in d_in"],
    syx: EndToEnd,
    noises: Sequence[AbstractLayerNoise],
) -> Weights:
    r"""The gradient of $\tfrac12 \mathrm{tr}\, S_N - \langle P, Y\rangle$, linear in $(S_0, Y)$.

    Closed form without noise inside the network, automatic differentiation of the recursion with
    it.
    """
    if not noises:
        return pull_back(weights, product(end_to_end(weights), s0) - syx)

    def expected(w: Weights) -> Scalar:
        return 0.5 * jnp.trace(output_moment(w, s0, noises)) - jnp.sum(end_to_end(w) * syx)

    return jax.grad(expected)(weights)


def end_to_end_mean(
    p: EndToEnd, data: Regression, regularizers: Sequence[AbstractRegularizer]
) -> EndToEnd:
    r"""The mean gradient $P S_0 - Y$ with respect to $P$ under noise on the data."""
    return on_inputs(p, data, input_variance(regularizers)) - data.syx


def averaged_loss(
    weights: Weights, data: Regression, regularizers: Sequence[AbstractRegularizer]
) -> Scalar:
    r"""The exact expected loss of all regularizers together.

    $$\bar L(W) = \tfrac12 \mathrm{tr}\, S_N - \langle P, Y\rangle
      + \tfrac12 \mathrm{tr}\, S_{yy}$$

    plus the penalties; the constant variance of noisy labels is left out.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    s0 = input_moment(data, regularizers)
    noises = layer_noises(regularizers, len(weights))
    p = end_to_end(weights)
    if noises:
        second = jnp.trace(output_moment(weights, s0, noises))
        value = 0.5 * second - jnp.sum(p * data.syx) + 0.5 * jnp.trace(data.syy)
    else:
        value = moment_loss(p, s0, data.syx, data.syy)
    for r in regularizers:
        if isinstance(r, AbstractPenalty):
            value = value + r.penalty(weights)
    return value


def averaged_gradient(
    weights: Weights,
    data: Regression,
    regularizers: Sequence[AbstractRegularizer],
    penalties: bool = True,
) -> Weights:
    r"""The gradient of `averaged_loss`: $A_i^\top (P S_0 - Y) B_i^\top$ for noise on the data.

    `penalties=False` leaves the penalties out.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    noises = layer_noises(regularizers, len(weights))
    if noises:
        g = moment_gradient(weights, input_moment(data, regularizers), data.syx, noises)
    else:
        g = pull_back(weights, end_to_end_mean(end_to_end(weights), data, regularizers))
    return add_penalties(g, weights, regularizers) if penalties else g


def total_penalty(weights: Weights, regularizers: Sequence[AbstractRegularizer]) -> Scalar:
    """The sum of all penalties."""
    return sum(
        (r.penalty(weights) for r in regularizers if isinstance(r, AbstractPenalty)),
        start=jnp.zeros(()),
    )


def add_penalties(
    gradient: Weights, weights: Weights, regularizers: Sequence[AbstractRegularizer]
) -> Weights:
    """The gradient plus the gradients of all penalties."""
    for r in regularizers:
        if isinstance(r, AbstractPenalty):
            extra = r.penalty_gradient(weights)
            gradient = tuple(g + e for g, e in zip(gradient, extra, strict=True))
    return gradient
