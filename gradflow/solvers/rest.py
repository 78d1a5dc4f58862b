"""A step-size controller that ends a solve once the state has come to rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.solvers.base import AbstractWrappingController, largest
from gradflow.solvers.promotion import promoting

PATIENCE = 2000
"""Consecutive still steps after which the state is at rest.

An explicit solver takes steps of about $6 / \\lambda_\\mathrm{max}$ then. Motion away from a saddle
with a rate of $\\lambda_\\mathrm{max} / 1000$ grows by $e^{12}$ in so many of them, and is noticed.
"""

ROUNDING = 256.0
"""Rounding errors of the largest number that a still step may move the state by; those of a step of
`DormandPrince853` at the edge of its stability add up to 60."""

NEGLIGIBLE = 0.1
"""Share of the relative tolerance by which a still state may move until the end of the solve."""

CALM = 1000
"""Quiet steps after which they are kept short: before, to step at the edge is the fastest way."""

QUIET = 30.0
"""Displacement of a quiet step at the most, in relative tolerances of the state."""

LONGER = 2.0
"""Factor by which a step of a quiet state may be longer than the one before."""

INSIDE = 0.25
"""Share of the length of a rejected step that a quiet state may take: a quarter to a half of what
is stable, where what is left of fast modes dies out in a few steps."""


class RestMemory(NamedTuple):
    """What a solve leaves to the next one about rest.

    - `still`: still steps in a row.
    - `quiet`: quiet steps since something moved.
    - `stable`: the longest step that a quiet state is let take; infinite for one that moves.
    """

    still: Int[Array, "..."]
    quiet: Int[Array, "..."]
    stable: Float[Array, "..."]


class RestController(AbstractWrappingController):
    """Wraps an adaptive controller and ends the solve when nothing moves any more.

    At a stable minimum an explicit solver takes steps at the edge of its stability for as long as
    it is let, without going anywhere. A step is *still* if it moves the state by no more than
    rounding, or by so little that at this speed the state would stay within a tenth of its relative
    tolerance until the end of the solve, and if it is not faster than the step before. After
    `PATIENCE` still steps in a row the solve ends with `diffrax.RESULTS.dt_min_reached` and a count
    of still steps that says why: see `is_at_rest`. Drifts along the minima, such as that of weight
    decay, are not still while they go anywhere.

    At the edge of stability itself a state trembles by its tolerance. After `CALM` steps that move
    it by not much more than that (they are *quiet*) a quarter of the length of a step that was
    rejected is the longest that is taken: inside the edge the trembling dies out and leaves what
    really moves.

    **Arguments:**

    - `controller`: any adaptive diffrax controller with an `rtol`.
    - `memory`: what the solve before has left.
    - `is_explicit`: whether the solver has such an edge; the steps of others are not kept short.
    """

    controller: diffrax.AbstractAdaptiveStepSizeController
    memory: RestMemory
    is_explicit: bool = eqx.field(static=True)

    def __init__(
        self,
        controller: diffrax.AbstractAdaptiveStepSizeController,
        memory: RestMemory,
        is_explicit: bool = True,
    ):
        self.controller = controller
        self.memory = memory
        self.is_explicit = is_explicit

    @promoting
    def init(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        dt0: Any,
        args: Any,
        func: Callable[..., Any],
        error_order: Any,
    ) -> tuple[Any, tuple[Any, RestMemory, Array, Array]]:
        """The end of the first step, and the state.

        That is the inner state, what is remembered, the end of the solve, and the speed of the last
        step.
        """
        end, inner = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        end = jnp.minimum(jnp.asarray(end), t0 + self.memory.stable)
        speed = jnp.asarray(jnp.inf, end.dtype)
        return end, (inner, self.memory, jnp.asarray(t1), speed)

    @promoting
    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: Any,
        y1_candidate: Any,
        args: Any,
        y_error: Any,
        error_order: Any,
        controller_state: tuple[Any, RestMemory, Array, Array],
    ) -> tuple[Any, Any, Any, Any, tuple[Any, RestMemory, Array, Array], diffrax.RESULTS]:
        """Adapt as the wrapped controller does, count still steps and keep quiet ones short."""
        inner, (still, calm, stable), end, before = controller_state
        keep, next_t0, next_t1, made_jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, inner
        )
        size, limits = largest(y0), jnp.finfo(jnp.result_type(end))
        moved = largest(jax.tree.map(jnp.subtract, y1_candidate, y0))
        length = t1 - t0
        speed = moved / length
        rounded = moved <= ROUNDING * limits.eps * size + limits.tiny
        slow = speed * (end - t0) <= NEGLIGIBLE * self.rtol * size
        is_still = rounded | (slow & (speed <= before))
        # Rejected steps say nothing of the state, but how long a step may be.
        is_quiet = jnp.where(keep, moved, before * length) <= QUIET * self.rtol * size
        calm = jnp.where(is_quiet, calm + jnp.where(keep, 1, 0), 0)
        quiet = is_quiet & (calm >= CALM)
        still = jnp.where(keep, jnp.where(is_still, still + 1, 0), still)
        stable = jnp.where(quiet, stable, jnp.inf)
        if self.is_explicit:
            stable = jnp.where(quiet & ~keep, jnp.minimum(stable, INSIDE * length), stable)
        if self.is_explicit:
            longest = jnp.minimum(stable, jnp.where(quiet, LONGER * length, jnp.inf))
            next_t1 = jnp.minimum(next_t1, next_t0 + longest)
        before = jnp.where(keep, speed, before)
        rests = is_at_rest(still) & keep & (next_t0 < end)
        result = diffrax.RESULTS.where(rests, diffrax.RESULTS.dt_min_reached, result)
        memory = RestMemory(still, calm, stable)
        return keep, next_t0, next_t1, made_jump, (inner, memory, end, before), result


def is_at_rest(still: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Whether so many still steps end a solve."""
    return still >= PATIENCE
