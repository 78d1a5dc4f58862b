r"""Where the slow flow ends, and how long its imbalance takes to halve.

Both are read off one path of the expected velocity along the minima manifold, followed with
adaptive steps, stretch by stretch, until it stands still.
"""

from functools import partial
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int

from gradflow.backend.compiled import KERNELS, compiled
from gradflow.backend.types import Scalar, Weights
from gradflow.geometry.base import output_loss
from gradflow.geometry.imbalance import imbalance
from gradflow.geometry.manifold import retract
from gradflow.geometry.rotations import without_rotation
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

MOST_STEPS = 32
"""Steps of the integrator in one call, between which the host looks at the keyboard."""

GIVEN_UP = 20_000
"""Steps of the integrator until the end is given up."""

HALVED = 1e-10
"""Relative accuracy with which the imbalance at the half-life is half of that at the start."""

NEVER = -1.0
"""A level that no imbalance falls to."""


class Ending(eqx.Enumeration):
    """How the slow flow ended."""

    still = "the slow flow stands still, up to rotations of the hidden units"
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

    Noise of batches and inputs can turn the hidden units for ever, at constant speed, while the
    function and everything that is measured in it rest: that is an end, too. Noise inside the
    network, to which a rotation is no symmetry, has to stand still altogether.

    Compiled calls are short, so that Ctrl-C answers.

    **Arguments:** as for `slow_drift`, with `weights` on the minima manifold.
    """
    law = jnp.asarray(step_size), None if momentum is None else jnp.asarray(momentum)
    options: dict[str, Any] = {"finite_step": finite_step, "decay": decay}
    path, force, own_time = _begun(problem, weights, *law, **options)
    while path.speed > STILL * force and path.room > NEAREST * own_time and path.steps < GIVEN_UP:
        path = _stretch(problem, path, *law, **options)
    ending = Ending.edge if path.steps < GIVEN_UP else Ending.unfinished
    if path.speed <= STILL * force:
        ending = Ending.still
    return SlowEnd(path.weights, path.time, path.half_life, ending)


class SlowField(eqx.Module):
    """The slow drift off the manifold, and the speed at which it changes anything."""

    problem: Problem
    step_size: Scalar
    momentum: Scalar | None
    finite_step: bool = eqx.field(static=True)
    decay: Literal["coupled", "decoupled"] = eqx.field(static=True)

    def velocity(self, at: Weights) -> Weights:
        """The slow drift at the nearest minimum."""
        options: dict[str, Any] = {"finite_step": self.finite_step, "decay": self.decay}
        on = retract(at, output_loss(self.problem))
        return slow_drift(self.problem, on, self.step_size, self.momentum, **options)

    def speed(self, at: Weights, velocity: Weights) -> Scalar:
        """The norm of a velocity, without what only turns the hidden units."""
        turns = not self.problem.layer_noise
        return _norm(without_rotation(at, velocity) if turns else velocity)


@compiled
def _begun(
    problem: Problem, weights: Weights, step_size: Scalar, momentum: Scalar | None, **options: Any
) -> tuple["_Path", Scalar, Scalar]:
    """The path at its start, the force that drives it, and the time in which that changes it."""
    field = SlowField(problem, step_size, momentum, **options)
    force = driving_force(problem, weights, step_size, momentum, field.finite_step)
    own_time = _norm(weights) / force
    start = imbalance(DeepLinear(weights))
    zero, never = jnp.zeros_like(start), jnp.full_like(start, jnp.inf)
    path = _Path(
        time=zero,
        weights=weights,
        speed=field.speed(weights, field.velocity(weights)),
        length=FIRST * own_time,
        half=jnp.where(start > 0.0, 0.5 * start, NEVER),
        beyond=never,
        under=zero,
        half_life=jnp.where(start > 0.0, never, jnp.nan),
        room=never,
        steps=jnp.zeros((), int),
    )
    return path, force, own_time


@partial(compiled, options=KERNELS)
def _stretch(
    problem: Problem, path: "_Path", step_size: Scalar, momentum: Scalar | None, **options: Any
) -> "_Path":
    """The path one stretch further, or as far as the steps of a call go."""
    field = SlowField(problem, step_size, momentum, **options)

    @jax.jit  # the solver asks for it in many places, and it takes long to trace
    def velocity(t: Any, at: Weights, args: None) -> Weights:
        del t, args
        return field.velocity(at)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
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
    assert solution.ys is not None and solution.ts is not None
    ended = retract(jax.tree.map(lambda y: y[-1], solution.ys), output_loss(problem))
    whole = solution.result == diffrax.RESULTS.successful
    part = solution.result == diffrax.RESULTS.max_steps_reached
    speed = field.speed(ended, velocity(None, ended, None))
    return path.after(
        ended, solution.ts[-1], whole | part, whole, speed, solution.stats["num_steps"]
    )


class _Path(eqx.Module):
    """One path on its way.

    - `time`, `weights`, `speed`: where it is. `length`: flow time to try next.
    - `half`: the level at which its imbalance has halved; `NEVER` once it has.
    - `beyond`, `under`: a later time at which it is lower, and the logarithm of the ratio there.
    - `half_life`: when it was at that level.
    - `room`: the shortest stretch that did not arrive.
    - `steps`: of the integrator so far.
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
    steps: Int[Array, ""]

    def after(
        self,
        ended: Weights,
        lasted: Scalar,
        arrives: Bool[Array, ""],
        whole: Bool[Array, ""],
        speed: Scalar,
        steps: Int[Array, ""],
    ) -> "_Path":
        """The path after a stretch that lasted so long, or did not arrive.

        A part of a stretch (not `whole`) ended with the steps of a call. Stretches that end below
        the level are not taken but bracket the half-life, which secants of the logarithm find: at
        once for an exponential.
        """
        arrives = arrives & jnp.isfinite(speed)
        level = self._over_half(ended)
        below = arrives & (level < -HALVED)
        taken = arrives & ~below
        found = taken & (level <= HALVED)
        time = jnp.where(taken, self.time + lasted, self.time)
        weights = jax.tree.map(lambda a, b: jnp.where(taken, a, b), ended, self.weights)
        beyond = jnp.where(below, self.time + lasted, self.beyond)
        under = jnp.where(below, level, self.under)
        before, over = self._over_half(self.weights), self._over_half(weights)
        secant = lasted * over / jnp.maximum(before - over, 1e-300)
        between = (beyond - time) * over / (over - under)
        closer = jnp.where(taken & (secant < beyond - time), secant, between)
        longer = jnp.where(whole, 2.0, 1.0)
        onward = jnp.where(found, 0.25 * time, self.length * jnp.where(arrives, longer, 0.5))
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
            steps=self.steps + steps,
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
