"""A step-size controller for relative accuracy where weights are small, and beside saddles."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gradflow.backend.types import Scalar
from gradflow.solvers.base import AbstractWrappingController, largest
from gradflow.solvers.promotion import promoting

ROUNDING = 64.0
"""Rounding errors of the largest number of the state that the error of a step may always have."""

PLATEAU = 1e-4
"""Share of the state below which the displacement of a step counts as that of a plateau."""

GROWTH = 100.0
"""Error of a step there, in units of `rtol` times the displacement."""


class RelativeErrors(AbstractWrappingController):
    r"""Wraps an adaptive controller and tightens its absolute tolerance where that hides motion.

    An error below `atol` is not nothing where a number is itself below `atol` and grows: a start of
    size $a \ll$ `atol` leaves the saddle at 0 at a time that depends on $\log a$. Two rules, which
    leave every other step as it is:

    - The absolute tolerance is at most `rtol` times the `smallest` size of a row or column of
        weights at the start.
    - While the state hardly moves and its velocity grows, which is how a saddle is left, the error
        is at most `GROWTH * rtol` times the displacement of the step.

    Neither asks for less than `ROUNDING` roundings of the largest number of the state.

    **Arguments:**

    - `controller`: any adaptive diffrax controller with `rtol` and `atol`.
    - `smallest`: $> 0$; infinite for a state of which nothing is known.
    """

    controller: diffrax.AbstractAdaptiveStepSizeController
    smallest: Scalar

    def __init__(self, controller: diffrax.AbstractAdaptiveStepSizeController, smallest: Scalar):
        self.controller = controller
        self.smallest = smallest

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
        """The end of the first step, and the state (inner state, speed of the last step)."""
        end, inner = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        return end, (inner, jnp.asarray(jnp.inf, jnp.result_type(self.smallest)))

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
        """Adapt as the wrapped controller does, to errors in units of the tightened tolerance."""
        inner, before = controller_state
        moved = largest(jax.tree.map(jnp.subtract, y1_candidate, y0))
        speed = moved / (t1 - t0)
        size = jnp.maximum(largest(y0), largest(y1_candidate))
        least = ROUNDING * jnp.finfo(size.dtype).eps * size
        absolute = jnp.minimum(self.atol, jnp.maximum(self.rtol * self.smallest, least))
        escapes = (speed > before) & (moved < PLATEAU * size)
        most = jnp.where(escapes, jnp.maximum(GROWTH * self.rtol * moved, least), jnp.inf)

        def tightened(error: Array, a: Array, b: Array) -> Array:
            relative = self.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))
            asked = jnp.minimum(absolute + relative, most)
            return error * jnp.where(
                asked < self.atol + relative, (self.atol + relative) / asked, 1
            )

        y_error = jax.tree.map(tightened, y_error, y0, y1_candidate)
        keep, next_t0, next_t1, made_jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, inner
        )
        before = jnp.where(keep, speed, before)
        return keep, next_t0, next_t1, made_jump, (inner, before), result
