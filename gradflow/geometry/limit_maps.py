r"""Where noise-free training ends: the limit $\Phi$ of gradient flow and $\Phi_h$ of descent.

Both are maps from weights to the minima manifold and the identity on it. Their derivatives there
carry the slow motion of SGD: $D\Phi_h = P_T$, and with eigenvectors $e_a$ of the Hessian $H$

$$D^2 \Phi_h[e_a, e_b] = -\frac{P_T D^3 L[e_a, e_b]}
                               {\lambda_a + \lambda_b - h \lambda_a \lambda_b}, \quad
  D^2 \Phi_h[t, e_b] = -\frac{P_T D^3 L[t, e_b]}{\lambda_b}, \quad
  D^2 \Phi_h[t, t'] = -H^+ D^3 L[t, t']$$

for tangents $t, t'$; $\Phi$ is the case $h = 0$.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int

from gradflow.backend.compiled import KERNELS, compiled
from gradflow.backend.types import Scalar, Weights
from gradflow.checks import as_parameter
from gradflow.data import Regression
from gradflow.geometry.base import OutputLoss
from gradflow.geometry.manifold import (
    is_on_manifold,
    manifold_residual,
    matched_loss,
    retract,
    singular_points,
    target_is_attainable,
    why_singular,
)
from gradflow.loss import pull_back
from gradflow.network import DeepLinear, end_to_end
from gradflow.problem import Problem

SETTLED = 1e-10
r"""Relative residual at which training is left to `retract`, whose error is its square."""

MAX_FLOW_STEPS = 200_000
"""Steps of the integrator until the limit of gradient flow is given up."""

MAX_DESCENT_STEPS = 1_000_000
"""Steps of gradient descent until its limit is given up."""

DIVERGED = 1e12
"""Descent has diverged once |W|^2 exceeds this multiple of 1 + |W(0)|^2."""


class Outcome(eqx.Enumeration):
    """How the search for a limit ended."""

    reached = "the limit is a minimum"
    plateau = (
        "training stops at a plateau: the gradient vanishes where the residual does not. Start "
        "away from the saddle, with hidden widths of at least the rank of the target, and with "
        "imbalance if the target has low rank"
    )
    unfinished = (
        "the residual has not decayed in the number of steps allowed: the smallest nonzero "
        "curvature is tiny, the start lies near a saddle, the limit is a singular point (target of "
        "low rank, layers without imbalance), or descent oscillates beyond the edge of stability"
    )
    diverged = (
        "descent diverges: the step size is beyond the edge of stability; lower it below 2 over "
        "the sharpness"
    )
    singular = "the limit is a singular point of the minima manifold"


def flow_limit(
    weights: Weights,
    loss: OutputLoss,
    rtol: ArrayLike = 1e-12,
    solver: diffrax.AbstractSolver | None = None,
) -> tuple[Weights, Outcome]:
    r"""The limit $\Phi(W)$ of gradient flow $\dot W = -\nabla L(W)$ of one path.

    Integrated until the relative residual is `SETTLED` or 100 `rtol`, whichever is larger; then
    `retract`ed, which differs from the flow by the square of what is left. Every $G_i$ is kept to
    a few times `rtol` by then. May be compiled and mapped over paths.

    **Arguments:**

    - `rtol`: relative tolerance of a step; the absolute one is a hundredth of it.
    - `solver`: a diffrax solver; default `diffrax.Dopri8()`.

    **Returns:** the minimum (or where the search ended) and how it ended.
    """
    rtol = as_parameter(rtol, "rtol")
    enough = jnp.maximum(SETTLED, 100.0 * rtol)

    def field(t: Any, at: Weights, args: None) -> Weights:
        del t, args
        return tuple(-g for g in _gradient(at, loss))

    def ended(t: Any, at: Weights, args: None, **kwargs: Any) -> Bool[Array, ""]:
        del t, args, kwargs
        return _is_settled(at, loss, enough) | _is_stuck(at, loss, 0.1 * rtol)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri8() if solver is None else solver,
        t0=0.0,
        t1=jnp.inf,
        dt0=None,
        y0=weights,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=0.01 * rtol),
        event=diffrax.Event(ended),
        max_steps=MAX_FLOW_STEPS,
        throw=False,
    )
    assert solution.ys is not None
    at = jax.tree.map(lambda w: w[-1], solution.ys)
    settled, stuck = _is_settled(at, loss, enough), _is_stuck(at, loss, 0.1 * rtol)
    return _concluded(at, loss, settled, stuck, jnp.asarray(False))


def descent_limit(
    weights: Weights,
    loss: OutputLoss,
    step_size: ArrayLike,
    momentum: ArrayLike | None = None,
    velocity: Weights | None = None,
    max_steps: int = MAX_DESCENT_STEPS,
) -> tuple[Weights, Outcome]:
    r"""The limit $\Phi_h(W)$ of gradient descent of one path, heavy ball with momentum $\beta$:

    $$V \leftarrow \beta V - h \nabla L(W), \qquad W \leftarrow W + V.$$

    Stepped until residual and velocity are small (`SETTLED`), then `retract`ed. May be compiled
    and mapped over paths.

    **Arguments:**

    - `step_size`: $h > 0$; `momentum`: $\beta$ in $[0, 1)$ or None for plain descent.
    - `velocity`: $V$ at the start, in weight units per step; None for a start from rest. It needs
        a momentum.
    - `max_steps`: steps until the search is given up.

    **Returns:** the minimum (or where the search ended) and how it ended.
    """
    h = as_parameter(step_size, "step_size")
    beta = None if momentum is None else as_parameter(momentum, "momentum")
    limit = DIVERGED * (1.0 + _square(weights))

    def settled(at: Weights, velocity: Weights) -> Bool[Array, ""]:
        slow = jnp.sqrt(_square(velocity)) <= SETTLED * jnp.sqrt(_square(at))
        return _is_settled(at, loss, jnp.asarray(SETTLED)) & slow

    def stuck(at: Weights, velocity: Weights) -> Bool[Array, ""]:
        rest = _square(velocity) <= 1e-30 * _square(at)
        return _is_stuck(at, loss, jnp.asarray(1e-15)) & rest

    def unfinished(carry: tuple[Weights, Weights, Int[Array, ""]]) -> Bool[Array, ""]:
        at, velocity, steps = carry
        done = settled(at, velocity) | stuck(at, velocity)
        return ~done & (_square(at) < limit) & (steps < max_steps)

    def step(
        carry: tuple[Weights, Weights, Int[Array, ""]],
    ) -> tuple[Weights, Weights, Int[Array, ""]]:
        at, velocity, steps = carry
        gradient = _gradient(at, loss)
        if beta is None:
            return tuple(w - h * g for w, g in zip(at, gradient, strict=True)), velocity, steps + 1
        velocity = tuple(beta * v - h * g for v, g in zip(velocity, gradient, strict=True))
        return tuple(w + v for w, v in zip(at, velocity, strict=True)), velocity, steps + 1

    start = jax.tree.map(jnp.zeros_like, weights) if velocity is None else velocity
    carry = (weights, start, jnp.zeros((), int))
    at, left, _ = jax.lax.while_loop(unfinished, step, carry)
    beyond = ~(_square(at) < limit)
    return _concluded(at, loss, settled(at, left), stuck(at, left), beyond)


def flow_projection(net: DeepLinear, data: Regression | Problem) -> DeepLinear:
    r"""The minimum $\Phi(W)$ that gradient flow of the loss reaches from a network.

    It has the $G_i = W_{i+1}^\top W_{i+1} - W_i W_i^\top$ of the start. Penalties and noise inside
    the network do not belong to the loss; noise on the inputs does.

    **Raises:** `ValueError` if the widths differ, the flow ends at a saddle or in too many steps,
    or the minimum is a singular point of the manifold.
    """
    loss = matched_loss(net, data)
    return _checked(net, loss, *_compiled_flow(net.weights, loss), "gradient flow")


def descent_projection(
    net: DeepLinear,
    data: Regression | Problem,
    step_size: ArrayLike,
    momentum: ArrayLike = 0.0,
) -> DeepLinear:
    r"""The minimum $\Phi_h(W)$ that noise-free (heavy-ball) descent from rest reaches.

    **Arguments:**

    - `step_size`: $h > 0$. `momentum`: $\beta$ in $[0, 1)$.

    Penalties and noise inside the network do not belong to the loss; noise on the inputs does.

    **Raises:** `ValueError` for a step size or momentum out of range, if the widths differ, descent
    diverges, stops at a saddle or takes too long, or the minimum is a singular point.
    """
    h, beta = as_parameter(step_size, "step_size"), as_parameter(momentum, "momentum")
    if not 0.0 < float(h) < float("inf"):
        raise ValueError(f"step_size must be a finite number > 0; got {float(h)}.")
    if not 0.0 <= float(beta) < 1.0:
        raise ValueError(f"momentum must lie in [0, 1); got {float(beta)}.")
    loss = matched_loss(net, data)
    found = _compiled_descent(net.weights, loss, h, beta if float(beta) > 0.0 else None)
    kind = f"gradient descent with step_size = {float(h):g}"
    return _checked(net, loss, *found, kind)


_compiled_flow = compiled(flow_limit, options=KERNELS)
_compiled_descent = compiled(descent_limit, options=KERNELS)


def _checked(
    net: DeepLinear, loss: OutputLoss, weights: Weights, outcome: Outcome, kind: str
) -> DeepLinear:
    """The limit as a network, or an error that says why there is none."""
    if bool(outcome == Outcome.reached):
        return DeepLinear(weights)
    reason = Outcome[outcome]
    if bool(outcome == Outcome.singular) or not bool(target_is_attainable(weights, loss)):
        reason = f"{reason}: {why_singular(weights, loss)}"
    raise ValueError(f"net: {kind} from widths {net.widths} has no limit to give; {reason}.")


def _concluded(
    at: Weights,
    loss: OutputLoss,
    settled: Bool[Array, ""],
    stuck: Bool[Array, ""],
    diverged: Bool[Array, ""],
) -> tuple[Weights, Outcome]:
    """What is left of the way by `retract`, and how the search ended."""
    ended = retract(at, loss)
    arrived = settled & is_on_manifold(ended, loss)
    ended = jax.tree.map(lambda a, b: jnp.where(settled, a, b), ended, at)
    outcome = Outcome.where(stuck, Outcome.plateau, Outcome.unfinished)
    outcome = Outcome.where(diverged, Outcome.diverged, outcome)
    smooth = ~jnp.any(singular_points(ended, loss))
    reached = Outcome.where(smooth, Outcome.reached, Outcome.singular)
    return ended, Outcome.where(arrived, reached, outcome)


def _gradient(weights: Weights, loss: OutputLoss) -> Weights:
    return pull_back(weights, end_to_end(weights) @ loss.s - loss.y)


def _is_settled(weights: Weights, loss: OutputLoss, enough: Scalar) -> Bool[Array, ""]:
    return manifold_residual(weights, loss) <= enough


def _is_stuck(weights: Weights, loss: OutputLoss, tolerance: Scalar) -> Bool[Array, ""]:
    """Whether the gradient, or the network itself, has vanished up to a tolerance."""
    size = jnp.sqrt(_square(weights))
    m = jnp.linalg.norm(end_to_end(weights) @ loss.s) + jnp.linalg.norm(loss.y)
    steepness = jnp.sqrt(_square(_gradient(weights, loss)))
    return (size <= tolerance) | (steepness <= tolerance * m * size ** (len(weights) - 1))


def _square(weights: Weights) -> Scalar:
    return sum((jnp.sum(w * w) for w in weights), start=jnp.zeros(()))
