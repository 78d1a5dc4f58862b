r"""The slow flow to one flow time, however far: where training is after very many steps."""

from typing import Any, Literal

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from gradflow.backend.types import Scalar, Weights
from gradflow.geometry.base import output_loss
from gradflow.geometry.manifold import retract
from gradflow.problem import Problem
from gradflow.theory.end_point import ATOL, RTOL, STILL, SlowField, driving_force

SHORTEST = 1e-13
"""Shortest step, as a share of the time to go."""

MOST_STEPS = 10_000
"""Steps of the integrator until the path is given up."""


def slow_point(
    problem: Problem,
    weights: Weights,
    time: ArrayLike,
    step_size: ArrayLike,
    momentum: ArrayLike | None = None,
    *,
    finite_step: bool = True,
    decay: Literal["coupled", "decoupled"] = "coupled",
) -> tuple[Weights, Bool[Array, ""]]:
    r"""The weights that $\dot W = \text{slow\_drift}(W)$ reaches from a minimum in a flow time.

    Once the path stands still, up to rotations of the hidden units (`slow_end`), it is not followed
    any further, so that a time costs no more than the way to the stationary point.

    **Arguments:** as for `slow_drift`, with `weights` on the minima manifold, and `time` > 0. May
    be compiled.

    **Returns:** the weights, on the manifold, and whether the path got there: not if it came to
    where training about the minima is not stable, or after `MOST_STEPS`.
    """
    loss = output_loss(problem)
    stop = jnp.asarray(time, loss.s.dtype)

    law = jnp.asarray(step_size), None if momentum is None else jnp.asarray(momentum)
    field = SlowField(problem, *law, finite_step, decay)

    @jax.jit  # the solver asks for it in many places, and it takes long to trace
    def velocity(t: Any, at: Weights, args: None) -> Weights:
        del t, args
        return field.velocity(at)

    force = driving_force(problem, weights, step_size, momentum, finite_step)

    def ended(t: Any, y: Weights, args: None, **kwargs: Any) -> Bool[Array, ""]:
        del args, kwargs
        return field.speed(y, velocity(t, y, None)) <= STILL * force

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Dopri8(),
        t0=0.0,
        t1=stop,
        dt0=None,
        y0=weights,
        stepsize_controller=diffrax.PIDController(RTOL, ATOL, dtmin=SHORTEST * stop),
        event=diffrax.Event(ended),
        max_steps=MOST_STEPS,
        throw=False,
    )
    assert solution.ys is not None
    there = retract(jax.tree.map(lambda y: y[-1], solution.ys), loss)
    result = solution.result
    arrived = (result == diffrax.RESULTS.successful) | (result == diffrax.RESULTS.event_occurred)
    return there, arrived & jnp.isfinite(_norm(there))


def slow_points(
    problem: Problem,
    weights: Weights,
    times: Float[Array, " time"],
    step_size: ArrayLike,
    momentum: ArrayLike | None = None,
    *,
    finite_step: bool = True,
    decay: Literal["coupled", "decoupled"] = "coupled",
) -> tuple[Weights, Bool[Array, " time"]]:
    """`slow_point` at several flow times in a row, ascending and >= 0, each from the one before.

    **Returns:** the weights, `(time, d_i, d_{i-1})`, and which of the times the path got to.
    """

    def on(
        carry: tuple[Weights, Scalar], time: Scalar
    ) -> tuple[tuple[Weights, Scalar], tuple[Weights, Bool[Array, ""]]]:
        at, now = carry
        options: dict[str, Any] = {"finite_step": finite_step, "decay": decay}
        there, arrived = slow_point(problem, at, time - now, step_size, momentum, **options)
        return (there, time), (there, arrived)

    _, points = jax.lax.scan(on, (weights, jnp.zeros_like(times[0])), times)
    return points


def _norm(weights: Weights) -> Scalar:
    return jnp.sqrt(sum(jnp.sum(w * w) for w in weights))
