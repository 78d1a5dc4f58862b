"""One input, one output, depth 2 with weight decay: modified Bessel functions."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.special import gamma

from gradflow.backend.types import Scalar, Weights
from gradflow.closed_forms.base import (
    AbstractClosedForm,
    copied,
    mean_decay,
    why_not_quadratic,
)
from gradflow.closed_forms.bessel import bessel_ratios, log_first_kind_growth, reflected_ratio
from gradflow.closed_forms.channel import Turn, invariants, rotate, why_not_channel
from gradflow.problem import Problem

TERMS = 24
PIECES = 8
FAINT = 1e-17
"""Bessel argument below which the coupling is exact to first order in it."""


class DecayingChannel(AbstractClosedForm):
    r"""Widths $(1, k, 1)$ with weight decay $\lambda > 0$, from any start.

    $\sqrt{W_1^2} e^{\lambda t}$ rotates as in `Channel`, with modified Bessel functions of orders
    $|b|/(2\lambda) \pm \tfrac12$ and argument $s_0 e^{-2 \lambda t}$ in place of exponentials
    (docs/theory.md section 4).
    """

    name: ClassVar[str] = "decaying channel"
    continues: ClassVar[bool] = False

    def why_not(self, problem: Problem, weights: Weights) -> str | None:
        """Needs widths (1, k, 1) and weight decay."""
        reason = why_not_channel(weights) or why_not_quadratic(problem)
        if reason is None and float(problem.weight_decay) == 0.0:
            reason = "weight decay is 0"
        return reason

    def prepare(self, problem: Problem, weights: Weights) -> Any:
        """The weights."""
        return copied(weights)

    def evaluate(self, problem: Problem, prepared: Any, t: Scalar) -> Weights:
        """Rotate the start by the angle at time `t`, and shrink it."""
        w1, w2 = prepared[0][:, 0], prepared[1][0]
        sxx, b = problem.input_moment[0, 0], problem.data.syx[0, 0]
        rate = problem.weight_decay
        w1, w2 = rotate(w1, w2, decaying_turn(*invariants(w1, w2), sxx, b, rate, t))
        return w1[:, None], w2[None]


def decaying_turn(
    alpha: Scalar, beta: Scalar, p0: Scalar, sxx: Scalar, b: Scalar, rate: Scalar, t: Scalar
) -> Turn:
    r"""The turn by $\theta(t)$ of $\dot\theta = b - \tfrac{s}{4} e^{-2\lambda t}(\alpha
    e^{2\theta} - \beta e^{-2\theta})$, $\theta(0) = 0$, that shrinks by $\lambda t$, $\lambda > 0$.

    $e^{2\theta} = N/D$ with the linear system $\dot N = b N + \tfrac{s}{2} \beta e^{-2\lambda t}
    D$, $\dot D = \tfrac{s}{2} \alpha e^{-2\lambda t} N - b D$, whose propagator is positive for
    $b \ge 0$. Short times by its power series, faint coupling to first order, otherwise by Bessel
    functions. The growth $\theta - \lambda t$ of $w_1 + w_2$ stays bounded where $\theta$ does not,
    so it is found without forming $\theta$.
    """
    turned = b < 0.0
    alpha, beta = jnp.where(turned, beta, alpha), jnp.where(turned, alpha, beta)
    b, p0 = jnp.abs(b), jnp.where(turned, -p0, p0)
    up, down = 0.5 * sxx * beta, 0.5 * sxx * alpha
    coupling = jnp.sqrt(up) * jnp.sqrt(down)
    short = (jnp.hypot(b, coupling) * t <= 8.0) & (2.0 * rate * t <= 1.0)
    faint = coupling <= 2.0 * rate * FAINT
    by_series = _short_growth(up, down, b - sxx * p0, sxx * p0, b, rate, jnp.where(short, t, 0.0))
    by_order = _faint_growth(up, down, b, rate, t)
    by_bessel = _bessel_growth(
        jnp.where(faint | short, 1.0, up),
        jnp.where(faint | short, 1.0, down),
        jnp.where(faint | short, 1.0, coupling),
        jnp.where(faint | short, 0.0, sxx * p0),
        b,
        rate,
        t,
    )
    ratio, growth = (
        jnp.where(short, one, jnp.where(faint, two, three))
        for one, two, three in zip(
            (by_series, by_series - 2.0 * rate * t), by_order, by_bessel, strict=True
        )
    )
    theta, plus = 0.5 * ratio, 0.5 * growth
    minus = -theta - rate * t
    return Turn(
        jnp.where(turned, -theta, theta),
        jnp.where(turned, minus, plus),
        jnp.where(turned, plus, minus),
    )


def _short_growth(
    up: Scalar, down: Scalar, force: Scalar, pull: Scalar, b: Scalar, rate: Scalar, t: Scalar
) -> Scalar:
    r"""$\log N/D$ by power series of $N$, $D$ and $N - D$ in pieces of the time.

    `force` is $b - s p_0$, `pull` is $s p_0$.
    """
    dt = t / PIECES
    k = np.arange(TERMS)
    lag = k[:, None] - k
    weight = np.where(lag >= 0, 1.0 / gamma(np.maximum(lag, 0) + 1.0), 0.0)
    decay = weight * (-2.0 * rate * dt) ** np.maximum(lag, 0)  # products of series are rows of it

    def piece(i: Array, state: tuple[Scalar, Scalar, Scalar]) -> tuple[Scalar, Scalar, Scalar]:
        fading = decay * jnp.exp(-2.0 * rate * dt * i)
        # What drives N - D: 2 (b - s p_0 e^{-2 rate t}).
        constant = 2.0 * (force - pull * jnp.expm1(-2.0 * rate * dt * i))
        drive = jnp.where(lag == 0, constant, -2.0 * pull * fading)

        def term(k: Array, series: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            n, d, gap = series
            row, step = fading[k], dt / (k + 1.0)
            slopes = (
                b * n[k] + up * jnp.sum(row * d[:TERMS]),
                down * jnp.sum(row * n[:TERMS]) - b * d[k],
                b * gap[k] + jnp.sum(drive[k] * d[:TERMS] - down * row * gap[:TERMS]),
            )
            n, d, gap = (
                one.at[k + 1].set(step * slope) for one, slope in zip(series, slopes, strict=True)
            )
            return n, d, gap

        n, d, gap = (jnp.zeros(TERMS + 1).at[0].set(value) for value in state)
        n, d, gap = jax.lax.fori_loop(0, TERMS, term, (n, d, gap))
        return jnp.sum(n), jnp.sum(d), jnp.sum(gap)

    start = (jnp.ones_like(t), jnp.ones_like(t), jnp.zeros_like(t))
    n, d, gap = jax.lax.fori_loop(0, PIECES, piece, start)
    near = jnp.abs(gap) < 0.5 * d
    change = jnp.where(near, gap / d, 0.0)
    return jnp.where(near, jnp.log1p(change), jnp.log(n) - jnp.log(d))


def _faint_growth(
    up: Scalar, down: Scalar, b: Scalar, rate: Scalar, t: Scalar
) -> tuple[Scalar, Scalar]:
    r"""$\log N/D$ and $\log N/D - 2 \lambda t$ where $s \alpha, s \beta$ may be large but their
    product is negligible.

    With $N e^{-bt} = 1 + F$, $D e^{bt} = 1 + \delta G$ and $x_+ = \max(2 (b - \lambda) t, 0)$:

    $$\log N/D = 2 \min(b, \lambda) t + \log(1 + F) - \log(e^{-x_+} + \delta G e^{-x_+}).$$
    """
    feed = up * t * mean_decay(2.0 * (b + rate) * t)
    share = up / (2.0 * (b + rate))
    # G = int e^{2(b - rate) u} (1 + share (1 - e^{-2(b + rate) u})) du.
    x = 2.0 * (b - rate) * t
    rising = jnp.maximum(x, 0.0)
    # The integral divided by e^{rising}, so that nothing overflows.
    first = t * mean_decay(jnp.abs(x))
    second = t * mean_decay(4.0 * rate * t) * jnp.exp(-rising)
    integral = first + share * jnp.maximum(first - second, 0.0)
    # D e^{bt} grows as e^{rising} at most: without that factor 2bt never has to cancel.
    change = jnp.expm1(-rising) + down * integral
    near = jnp.abs(change) < 0.5
    log_d = jnp.where(
        near,
        jnp.log1p(jnp.where(near, change, 0.0)),
        jnp.logaddexp(-rising, jnp.log(down) + jnp.log(integral)),
    )
    rest = jnp.log1p(feed) - log_d
    return 2.0 * jnp.minimum(b, rate) * t + rest, jnp.minimum(x, 0.0) + rest


def _bessel_growth(
    up: Scalar, down: Scalar, coupling: Scalar, pull: Scalar, b: Scalar, rate: Scalar, t: Scalar
) -> tuple[Scalar, Scalar]:
    r"""$\log N/D$ and $\log N/D - 2 \lambda t$ by Bessel functions until the coupling is faint."""
    mu, s0 = b / (2.0 * rate), coupling / (2.0 * rate)
    last = jnp.maximum(jnp.log(s0 / FAINT), 0.0)  # from here on the coupling is faint
    x = jnp.minimum(2.0 * rate * t, last)
    s1 = s0 * jnp.exp(-x)
    (i0, k0, _), (i1, k1, gap1) = bessel_ratios(mu, s0), bessel_ratios(mu, s1)
    # With I of a negative order, which is nearly K at small argument, the difference would cancel.
    j0, j1 = reflected_ratio(mu, s0), reflected_ratio(mu, s1)
    growth = log_first_kind_growth(mu, s0, x)
    past = jnp.exp(-x - 2.0 * growth) * (1.0 + i1 * k1) / (1.0 + i0 * k0)
    start = jnp.sqrt(down) / jnp.sqrt(up)  # n / d at the start, n = N sqrt(down), d = D sqrt(up)
    n = start * (1.0 + past * k0 * i1) + (i0 - past * i1)
    d = start * (j0 * k1 - past * k0 * j1) + (i0 * k1 + past)
    gap = start * (gap1 + past * k0 * (1.0 + i1)) + i0 * gap1 - past * (1.0 + i1)
    # p e^{2 rate t} as sinh of the total angle: accurate where p is small against |u|.
    sinh0, sinh1 = pull / coupling, 0.5 * (gap / n) * ((n + d) / d)
    balanced = jnp.abs(sinh0) > 1.0
    early = jnp.where(
        balanced,
        jnp.log(n) - jnp.log(d) - jnp.log(start),
        jnp.arcsinh(sinh1) - jnp.arcsinh(sinh0),
    )
    left = jnp.maximum(t - last / (2.0 * rate), 0.0)
    faint = coupling * jnp.exp(-x)
    late, late_growth = (
        jnp.where(left > 0.0, value, 0.0)
        for value in _faint_growth(faint * d / n, faint * n / d, b, rate, left)
    )
    return early + late, (early - x) + late_growth
