r"""Where the slow flow ends, and how long its imbalance takes to halve.

Both are read off one path of the expected velocity along the minima manifold, followed with
adaptive steps until it stands still.
"""

from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, ArrayLike, Bool

from gradflow.geometry.base import output_loss
from gradflow.geometry.imbalance import imbalance
from gradflow.geometry.manifold import retract
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.theory.slow_drift import bend, slow_drift
from gradflow.theory.stationary import fluctuation, training_law
from gradflow.types import Scalar, Weights

STILL = 1e-9
"""Velocity, relative to that of a force which nothing balances, at which the flow has ended."""

RTOL, ATOL = 1e-11, 1e-13
"""Tolerances of a step: those of the path, and of how still it can stand."""

MOST_STEPS = 8192
"""Steps of the integrator until the end is given up."""

NEVER = -1.0
"""A level that no imbalance falls to."""

SHORTEST = 1e-9
"""Shortest step, in units of the time in which the force alone would change the weights."""


class Ending(eqx.Enumeration):
    """How the slow flow ended."""

    still = "the slow flow stands still"
    edge = (
        "the slow flow arrives where training about the minima is not stable: the edge of "
        "stability, or noise that grows with the fluctuation it makes"
    )
    unfinished = (
        "the slow flow has not come to rest in the steps allowed: it moves along directions that "
        "hardly change its velocity"
    )


class SlowEnd(eqx.Module):
    """What one path of the slow flow leads to.

    - `weights`: the last of the path, a stationary point if `ending` is `Ending.still`.
    - `half_life`: flow time until the imbalance has halved; infinite if it never does.
    - `ending`: how it ended.
    """

    weights: Weights
    half_life: Scalar
    ending: Ending


def slow_end(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    momentum: ArrayLike | None = None,
    *,
    finite_step: bool = True,
    decay: Literal["coupled", "decoupled"] = "coupled",
) -> SlowEnd:
    r"""Follow $\dot W = \text{slow\_drift}(W)$ from a minimum to its stationary point.

    Label noise ends where the traces of the Hessian's diagonal blocks are equal (small steps) or
    where the sharpness is least (steps near the edge of stability); weight decay at balanced
    layers. Noise along the manifold is left out: with it the motion has a distribution, no end.

    **Arguments:** as for `slow_drift`, with `weights` on the minima manifold. May be compiled.
    """
    loss = output_loss(problem)
    start = imbalance(DeepLinear(weights))
    half = jnp.where(start > 0.0, 0.5 * start, NEVER)

    def velocity(at: Weights) -> Weights:
        options: dict[str, Any] = {"finite_step": finite_step, "decay": decay}
        return slow_drift(problem, retract(at, loss), step_size, momentum, **options)

    force = _force(problem, weights, step_size, momentum, finite_step)
    enough, shortest = STILL * force, SHORTEST * _norm(weights) / force

    def field(t: Any, at: Weights, args: None) -> Weights:
        del t, args
        return velocity(at)

    def leg(begin: Scalar, at: Weights, half: Scalar) -> tuple[Scalar, Weights, Bool[Array, ""]]:
        """Until the imbalance falls to `half` or the end; when, where, and whether it got stuck."""

        def left(t: Any, y: Weights, args: None, **kwargs: Any) -> Scalar:
            del t, args, kwargs
            to_half = (imbalance(DeepLinear(y)) - half) / jnp.abs(half)
            return jnp.minimum(to_half, _norm(velocity(y)) / enough - 1.0)

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri8(),
            t0=begin,
            t1=jnp.inf,
            dt0=None,
            y0=at,
            stepsize_controller=diffrax.PIDController(RTOL, ATOL, dtmin=shortest),
            event=diffrax.Event(left, optimistix.Bisection(rtol=1e-10, atol=0.0)),
            max_steps=MOST_STEPS,
            throw=False,
        )
        assert solution.ys is not None and solution.ts is not None
        at = jax.tree.map(lambda y: y[-1], solution.ys)
        stuck = solution.result == diffrax.RESULTS.dt_min_reached
        return solution.ts[-1], retract(at, loss), stuck

    def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
        time, _, half, half_life, _ = carry
        return (time == 0.0) | ((half == NEVER) & (time == half_life))

    def follow(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        time, at, half, half_life, _ = carry
        time, at, stuck = leg(time, at, half)
        halved = (half > 0.0) & (imbalance(DeepLinear(at)) <= (1.0 + 1e-6) * half)
        half_life = jnp.where(halved, time, half_life)
        return time, at, jnp.where(halved, NEVER, half), half_life, stuck

    zero = jnp.zeros((), loss.s.dtype)
    carry = (zero, weights, half, zero + jnp.inf, jnp.asarray(False))
    _, at, _, half_life, stuck = jax.lax.while_loop(unfinished, follow, carry)
    ending = Ending.where(_norm(velocity(at)) <= 2.0 * enough, Ending.still, Ending.unfinished)
    ending = Ending.where(stuck, Ending.edge, ending)
    return SlowEnd(at, jnp.where(start > 0.0, half_life, jnp.nan), ending)


def _force(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    momentum: ArrayLike | None,
    finite_step: bool,
) -> Scalar:
    """The size of what drives the slow flow, its part across the manifold included."""
    law = training_law(step_size, finite_step, momentum)
    state = fluctuation(problem, weights, law, feedback=False)
    psi = state.of_kernel(state.inverse_values) @ state.vectors @ state.covariance @ state.vectors.T
    parts = problem.averaged_gradient(weights), bend(weights, output_loss(problem), psi)
    return sum(_norm(part) for part in parts) / (1.0 - law.momentum)


def _norm(weights: Weights) -> Scalar:
    return jnp.sqrt(sum(jnp.sum(w * w) for w in weights))
