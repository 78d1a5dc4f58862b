r"""Where the slow flow ends, and how long its imbalance takes to halve.

Both are read off one path of the expected velocity along the minima manifold, followed with
adaptive steps, stretch by stretch, until it stands still.
"""

from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int

from gradflow.backend.types import Scalar, Weights
from gradflow.geometry.base import output_loss
from gradflow.geometry.imbalance import imbalance
from gradflow.geometry.manifold import retract
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.theory.normal_response import normal_response
from gradflow.theory.slow_drift import bend, slow_drift
from gradflow.theory.stationary import training_law

STILL = 1e-9
"""Velocity, relative to that of a force which nothing balances, at which the flow has ended."""

RTOL, ATOL = 1e-11, 1e-13
"""Tolerances of a step: those of the path, and of how still it can stand."""

FIRST = 1e-2
"""The first stretch, in units of the time in which the force alone would change the weights."""

NEAREST = 1e-7
"""How close a path comes to an edge that it cannot cross, in the same units."""

SHORTEST = 1e-6
"""The shortest step, as a share of its stretch."""

STRETCHES = 400
"""Stretches of the path until its end is given up; each is up to twice as long as the last."""

MOST_STEPS = 4096
"""Steps of the integrator in one stretch."""

HALVED = 1e-10
"""Relative accuracy with which the imbalance at the half-life is half of that at the start."""

NEVER = -1.0
"""A level that no imbalance falls to."""


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
    - `time`: flow time at which it got there.
    - `half_life`: flow time until the imbalance has halved; infinite if it never does.
    - `ending`: how it ended.
    """

    weights: Weights
    time: Scalar
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

    @jax.jit  # the solver asks for it in many places, and it takes long to trace
    def velocity(at: Weights) -> Weights:
        options: dict[str, Any] = {"finite_step": finite_step, "decay": decay}
        return slow_drift(problem, retract(at, loss), step_size, momentum, **options)

    def field(t: Any, at: Weights, args: None) -> Weights:
        del t, args
        return velocity(at)

    force = driving_force(problem, weights, step_size, momentum, finite_step)
    own_time = _norm(weights) / force

    def goes_on(path: _Path) -> Bool[Array, ""]:
        moves = path.speed > STILL * force
        return moves & (path.room > NEAREST * own_time) & (path.stretches < STRETCHES)

    def stretch(path: _Path) -> _Path:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri8(),
            t0=0.0,
            t1=path.length,
            dt0=0.1 * path.length,
            y0=path.weights,
            stepsize_controller=diffrax.PIDController(
                RTOL, ATOL, dtmin=SHORTEST * path.length, force_dtmin=False
            ),
            max_steps=MOST_STEPS,
            throw=False,
        )
        assert solution.ys is not None
        ended = retract(jax.tree.map(lambda y: y[-1], solution.ys), loss)
        arrives = solution.result == diffrax.RESULTS.successful
        return path.after(ended, arrives, _norm(velocity(ended)))

    start = imbalance(DeepLinear(weights))
    zero, never = jnp.zeros_like(start), jnp.full_like(start, jnp.inf)
    path = jax.lax.while_loop(
        goes_on,
        stretch,
        _Path(
            time=zero,
            weights=weights,
            speed=_norm(velocity(weights)),
            length=FIRST * own_time,
            half=jnp.where(start > 0.0, 0.5 * start, NEVER),
            beyond=never,
            under=zero,
            half_life=jnp.where(start > 0.0, never, jnp.nan),
            room=never,
            stretches=jnp.zeros((), int),
        ),
    )
    ending = Ending.where(path.stretches < STRETCHES, Ending.edge, Ending.unfinished)
    ending = Ending.where(path.speed <= STILL * force, Ending.still, ending)
    return SlowEnd(path.weights, path.time, path.half_life, ending)


class _Path(eqx.Module):
    """One path on its way.

    - `time`, `weights`, `speed`: where it is. `length`: flow time to try next.
    - `half`: the level at which its imbalance has halved; `NEVER` once it has.
    - `beyond`, `under`: a later time at which it is lower, and the logarithm of the ratio there.
    - `half_life`: when it was at that level.
    - `room`: the shortest stretch that did not arrive.
    - `stretches`: tried so far.
    """

    time: Scalar
    weights: Weights
    speed: Scalar
    length: Scalar
    half: Scalar
    beyond: Scalar
    under: Scalar
    half_life: Scalar
    room: Scalar
    stretches: Int[Array, ""]

    def after(self, ended: Weights, arrives: Bool[Array, ""], speed: Scalar) -> "_Path":
        """The path after a stretch that ended there, or did not arrive.

        Stretches that end below the level are not taken but bracket the half-life, which secants of
        the logarithm find: at once for an exponential.
        """
        arrives = arrives & jnp.isfinite(speed)
        level = self._over_half(ended)
        below = arrives & (level < -HALVED)
        taken = arrives & ~below
        found = taken & (level <= HALVED)
        time = jnp.where(taken, self.time + self.length, self.time)
        weights = jax.tree.map(lambda a, b: jnp.where(taken, a, b), ended, self.weights)
        beyond = jnp.where(below, self.time + self.length, self.beyond)
        under = jnp.where(below, level, self.under)
        before, over = self._over_half(self.weights), self._over_half(weights)
        secant = self.length * over / jnp.maximum(before - over, 1e-300)
        between = (beyond - time) * over / (over - under)
        closer = jnp.where(taken & (secant < beyond - time), secant, between)
        onward = jnp.where(found, 0.25 * time, self.length * jnp.where(arrives, 2.0, 0.5))
        return _Path(
            time=time,
            weights=weights,
            speed=jnp.where(taken, speed, self.speed),
            length=jnp.where(arrives & ~found & jnp.isfinite(beyond), closer, onward),
            half=jnp.where(found, NEVER, self.half),
            beyond=jnp.where(found, jnp.inf, beyond),
            under=under,
            half_life=jnp.where(found, time, self.half_life),
            room=jnp.where(arrives, self.room, self.length),
            stretches=self.stretches + 1,
        )

    def _over_half(self, weights: Weights) -> Scalar:
        """The logarithm of the imbalance over the level; infinite without a level."""
        ratio = imbalance(DeepLinear(weights)) / self.half
        return jnp.where(self.half > 0.0, jnp.log(jnp.maximum(ratio, 1e-300)), jnp.inf)


def driving_force(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    momentum: ArrayLike | None,
    finite_step: bool,
) -> Scalar:
    """The size of what drives the slow flow, its part across the manifold included."""
    law = training_law(step_size, finite_step, momentum)
    response, _ = normal_response(problem, weights, law, feedback=False)
    parts = problem.averaged_gradient(weights), bend(weights, response, output_loss(problem))
    return sum(_norm(part) for part in parts) / (1.0 - law.momentum)


def _norm(weights: Weights) -> Scalar:
    return jnp.sqrt(sum(jnp.sum(w * w) for w in weights))
