"""One input, one output, depth 2: a hyperbolic rotation by a logistic angle."""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar, Weights
from gradflow.closed_forms.base import (
    AbstractClosedForm,
    copied,
    mean_decay,
    why_decaying,
    why_not_quadratic,
)
from gradflow.network import widths_of
from gradflow.problem import Problem

SMALL_ANGLE = 0.5
"""Below it weights are moved by their change, above it the two light-cone parts are scaled."""


class Turn(NamedTuple):
    r"""A hyperbolic rotation of $(w_1, w_2)$, and a shrinking.

    - `angle`: $\theta$.
    - `plus`, `minus`: the logarithms $\pm\theta - \lambda t$ of the growth of $w_1 \pm w_2$, each
        to its own accuracy, which differences of large $\theta$ and $\lambda t$ would lose.
    """

    angle: Scalar
    plus: Scalar
    minus: Scalar


def why_not_channel(weights: Weights) -> str | None:
    """Why the network is not of depth 2 with one input and one output."""
    widths = widths_of(weights)
    if len(widths) != 3 or widths[0] != 1 or widths[-1] != 1:
        return f"widths are {widths}, not (1, k, 1)"
    return None


class Channel(AbstractClosedForm):
    r"""Widths $(1, k, 1)$ from any start: $W_1 \pm W_2^\top$ grow as $e^{\pm\theta(t)}$.

    $e^{2\theta}$ is a logistic function
    (docs/theory.md section 8). Scalar networks of depth 2 are $k = 1$.
    """

    name: ClassVar[str] = "channel"
    continues: ClassVar[bool] = False

    def why_not(self, problem: Problem, weights: Weights) -> str | None:
        """Needs widths (1, k, 1) and no weight decay."""
        return why_not_channel(weights) or why_not_quadratic(problem) or why_decaying(problem)

    def prepare(self, problem: Problem, weights: Weights) -> Any:
        """The weights."""
        return copied(weights)

    def evaluate(self, problem: Problem, prepared: Any, t: Scalar) -> Weights:
        """Rotate the start by the angle at time `t`."""
        w1, w2 = prepared[0][:, 0], prepared[1][0]
        sxx, b = problem.input_moment[0, 0], problem.data.syx[0, 0]
        theta = rotation_angle(*invariants(w1, w2), sxx, b, t)
        w1, w2 = rotate(w1, w2, Turn(theta, theta, -theta))
        return w1[:, None], w2[None]


def invariants(w1: Float[Array, " k"], w2: Float[Array, " k"]) -> tuple[Scalar, Scalar, Scalar]:
    r"""$\alpha = |w_1 + w_2|^2$, $\beta = |w_1 - w_2|^2$ and $p = w_1 \cdot w_2$."""
    return jnp.sum((w1 + w2) ** 2), jnp.sum((w1 - w2) ** 2), jnp.sum(w1 * w2)


def rotation_angle(
    alpha: Scalar, beta: Scalar, p0: Scalar, sxx: Scalar, b: Scalar, t: Scalar
) -> Scalar:
    r"""The angle $\theta(t)$ of $\dot\theta = b - \tfrac{s}{4}(\alpha e^{2\theta} - \beta
    e^{-2\theta})$, $\theta(0) = 0$.

    With $\Delta = \sqrt{4 b^2 + s^2 \alpha \beta}$ and $b \ge 0$ (else the roles of $\alpha$ and
    $\beta$ change), $e^{2\theta}$ is a quotient of sums of positive terms, so nothing cancels:

    $$e^{2\theta} = \frac{2 \Delta e^{-\Delta t} + (2b + s\beta + \Delta)(1 - e^{-\Delta t})}
      {2 \Delta e^{-\Delta t} + (s \alpha + \Delta - 2b)(1 - e^{-\Delta t})}.$$
    """
    turned = b < 0.0
    alpha, beta = jnp.where(turned, beta, alpha), jnp.where(turned, alpha, beta)
    b, p0 = jnp.abs(b), jnp.where(turned, -p0, p0)
    coupling = sxx * jnp.sqrt(alpha) * jnp.sqrt(beta)
    delta = jnp.hypot(2.0 * b, coupling)
    excess = coupling * (coupling / jnp.where(delta == 0.0, 1.0, delta + 2.0 * b))  # delta - 2b
    rest = 2.0 * jnp.exp(-delta * t)
    gone = t * mean_decay(delta * t)
    below = (sxx * alpha + excess) * gone
    numerator = rest + (2.0 * b + sxx * beta + delta) * gone
    log_denominator = jnp.where(below > 0.0, jnp.log(rest + below), jnp.log(2.0) - delta * t)
    change = 4.0 * (b - sxx * p0) * gone / (rest + below)
    near = jnp.abs(change) < 0.5
    theta = 0.5 * jnp.where(
        near, jnp.log1p(jnp.where(near, change, 0.0)), jnp.log(numerator) - log_denominator
    )
    return jnp.where(turned, -theta, theta)


def rotate(
    w1: Float[Array, " k"], w2: Float[Array, " k"], turn: Turn
) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    r"""Scale $w_1 + w_2$ and $w_1 - w_2$ by $e^{\mathrm{plus}}$ and $e^{\mathrm{minus}}$."""
    small = jnp.abs(turn.angle) < SMALL_ANGLE
    angle = jnp.where(small, turn.angle, 0.0)
    rise, tilt = 2.0 * jnp.sinh(0.5 * angle) ** 2, jnp.sinh(angle)
    shrunk = jnp.exp(0.5 * (turn.plus + turn.minus))
    near = tuple(shrunk * (w + (rise * w + tilt * other)) for w, other in ((w1, w2), (w2, w1)))
    plus, minus = w1 + w2, w1 - w2
    plus = jnp.where(plus == 0.0, 0.0, 0.5 * plus * jnp.exp(turn.plus))
    minus = jnp.where(minus == 0.0, 0.0, 0.5 * minus * jnp.exp(turn.minus))
    return jnp.where(small, near[0], plus + minus), jnp.where(small, near[1], plus - minus)
