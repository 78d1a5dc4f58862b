"""The averaged face: the exact expected loss of every combination of regularizers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.data import Regression
from gradflow.loss import moment_loss, pull_back
from gradflow.network import end_to_end
from gradflow.regularizers.base import (
    AbstractDataNoise,
    AbstractLayerNoise,
    AbstractPenalty,
    AbstractRegularizer,
)
from gradflow.types import Scalar, Weights


def input_variance(regularizers: Sequence[AbstractRegularizer]) -> Scalar:
    r"""The total variance $\sigma^2$ of the noise on each input coordinate."""
    return sum(
        (r.input_variance() for r in regularizers if isinstance(r, AbstractDataNoise)),
        start=jnp.zeros(()),
    )


def input_moment(
    data: Regression, regularizers: Sequence[AbstractRegularizer]
) -> Float[Array, "d_in d_in"]:
    r"""The second moment of the perturbed inputs, $S_0 = S_{xx} + \sigma^2 I$."""
    return data.sxx + input_variance(regularizers) * jnp.eye(data.d_in, dtype=data.sxx.dtype)


def output_moment(
    weights: Weights,
    s0: Float[Array, "d_in d_in"],
    layer_noise: Sequence[AbstractLayerNoise],
) -> Float[Array, "d_out d_out"]:
    r"""The second moment of the output, pushed through the layers (theory section 5).

    $$C_l = W_l S_{l-1} W_l^\top + \mathrm{diag}(V_l\, \mathrm{diag}\, S_{l-1}), \qquad
      S_l = C_l + \alpha_l\, \mathrm{diag}\, C_l,$$

    with $V_l$ the entry-wise variance of the weights and $\alpha_l$ that of the factors on the
    activations. Exact for independent noises in any combination.
    """
    depth = len(weights)
    s = s0
    for layer, w in enumerate(weights, start=1):
        variance = jnp.zeros_like(w)
        spread = jnp.ones((), w.dtype)
        for noise in layer_noise:
            variance = noise.weight_variance(layer, depth, w, variance)
            spread = spread * (1.0 + noise.activation_variance(layer, depth))
        c = w @ s @ w.T + jnp.diag(variance @ jnp.diag(s))
        s = c + (spread - 1.0) * jnp.diag(jnp.diag(c))
    return s


def averaged_loss(
    weights: Weights, data: Regression, regularizers: Sequence[AbstractRegularizer]
) -> Scalar:
    r"""The exact expected loss of all regularizers together.

    $$\bar L(W) = \tfrac12 \mathrm{tr}\, S_N - \langle P, Y\rangle
      + \tfrac12 \mathrm{tr}\, S_{yy}$$

    plus the penalties; the constant variance of noisy labels is left out.
    """
    s0 = input_moment(data, regularizers)
    layer_noise = [r for r in regularizers if isinstance(r, AbstractLayerNoise)]
    p = end_to_end(weights)
    if layer_noise:
        second = jnp.trace(output_moment(weights, s0, layer_noise))
        value = 0.5 * second - jnp.sum(p * data.syx) + 0.5 * jnp.trace(data.syy)
    else:
        value = moment_loss(p, s0, data.syx, data.syy)
    for r in regularizers:
        if isinstance(r, AbstractPenalty):
            value = value + r.penalty(weights)
    return value


def averaged_gradient(
    weights: Weights, data: Regression, regularizers: Sequence[AbstractRegularizer]
) -> Weights:
    r"""The gradient of `averaged_loss`: $A_i^\top (P S_0 - Y) B_i^\top$ plus penalties.

    Closed form for noise on the data, automatic differentiation of the recursion for noise inside
    the network.
    """
    if any(isinstance(r, AbstractLayerNoise) for r in regularizers):
        return jax.grad(averaged_loss)(weights, data, regularizers)
    s0 = input_moment(data, regularizers)
    g = pull_back(weights, end_to_end(weights) @ s0 - data.syx)
    return add_penalties(g, weights, regularizers)


def add_penalties(
    gradient: Weights, weights: Weights, regularizers: Sequence[AbstractRegularizer]
) -> Weights:
    """The gradient plus the gradients of all penalties."""
    for r in regularizers:
        if isinstance(r, AbstractPenalty):
            extra = r.penalty_gradient(weights)
            gradient = tuple(g + e for g, e in zip(gradient, extra, strict=True))
    return gradient
