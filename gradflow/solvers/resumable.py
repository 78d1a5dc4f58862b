"""A step-size controller that goes on where an earlier solve stopped, and knows when to give up."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gradflow.backend.types import Scalar
from gradflow.solvers.base import AbstractWrappingController
from gradflow.solvers.promotion import promoting

SHRINK = 0.1
"""Factor on the length of a step that overflowed."""

SHORTEST = 256.0
"""Length, in units of rounding errors of time, below which a rejected step is not tried again."""


class ResumableController(AbstractWrappingController):
    """Wraps an adaptive controller and remembers the step it would take next.

    A trajectory that is saved by stepping exactly to each saved time is a chain of solves. Without
    a memory every link would start with a cautious first step, and a step cut short by a saved time
    would make the next ones short as well.

    A step into a region where the state overflows is tried again with a tenth of its length, and
    once steps no longer advance time the solve ends with `diffrax.RESULTS.dt_min_reached`; left to
    themselves diffrax's controllers would go on with a step of length NaN until `max_steps`.

    **Arguments:**

    - `controller`: any adaptive diffrax controller.
    - `first_step`: length of the first step, in solver time; 0 lets the controller choose.
    - `origin`: what to add to solver time before rounding errors of it are taken; for a time that
        starts anew at 0 in every link.
    """

    controller: diffrax.AbstractAdaptiveStepSizeController
    first_step: Scalar
    origin: Scalar | float

    def __init__(
        self,
        controller: diffrax.AbstractAdaptiveStepSizeController,
        first_step: Scalar,
        origin: Scalar | float = 0.0,
    ):
        self.controller = controller
        self.first_step = first_step
        self.origin = origin

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
    ) -> tuple[Any, tuple[Any, Array]]:
        """The end of the first step, and the state (inner state, length of the next step)."""

        def begin(dt0: Any) -> tuple[Array, Any]:
            end, inner = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
            return jnp.asarray(end), jax.tree.map(jnp.asarray, inner)

        # To choose a length takes two evaluations of the vector field, to be given one none.
        end, inner = jax.lax.cond(
            self.first_step > 0, lambda: begin(self.first_step), lambda: begin(dt0)
        )
        return end, (inner, end - t0)

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
        controller_state: tuple[Any, Array],
    ) -> tuple[Any, Any, Any, Any, tuple[Any, Array], diffrax.RESULTS]:
        """Adapt as the wrapped controller does; a step cut short does not shrink the next."""
        inner, planned = controller_state
        keep, next_t0, next_t1, made_jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, inner
        )
        overflow = jnp.isnan(next_t1)
        next_t1 = jnp.where(overflow, next_t0 + SHRINK * (t1 - t0), next_t1)
        # Rounding keeps time from advancing, or a rejected step from being shorter; or a NaN.
        rounding = SHORTEST * jnp.finfo(next_t1.dtype).eps * jnp.abs(self.origin + next_t0)
        shorter = (next_t1 < t1) & (next_t1 - next_t0 > rounding)
        moves = (next_t1 > next_t0) & (keep | shorter)
        result = diffrax.RESULTS.where(moves, result, diffrax.RESULTS.dt_min_reached)
        proposed = next_t1 - next_t0
        cut_short = (t1 - t0) < 0.999 * planned
        planned = jnp.where(keep & cut_short, jnp.maximum(proposed, planned), proposed)
        return keep, next_t0, next_t1, made_jump, (inner, planned), result
