"""Several steps of a solver as one."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax.numpy as jnp

from gradflow.solvers.promotion import promoting


class SeveralSteps(diffrax.AbstractWrappedSolver):
    """Takes `count` steps of length 1 of another solver in one step of length `count`.

    On an accelerator every operation of a step is a kernel, and what diffrax does between steps is
    more of them; elementwise steps that are written out one after the other become one kernel. The
    end of a step is all that it gives: no error estimate, and straight lines between ends.

    **Arguments:**

    - `solver`: one whose steps are given by where they start and end.
    - `count`: steps to take as one.
    """

    solver: diffrax.AbstractSolver  # pyright: ignore[reportIncompatibleVariableOverride]
    count: int

    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = (
        diffrax.LocalLinearInterpolation
    )

    @property
    def term_structure(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the solver."""
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the solver."""
        return self.solver.term_compatible_contr_kwargs

    def order(self, terms: Any) -> int | None:
        """That of the solver."""
        return self.solver.order(terms)

    def strong_order(self, terms: Any) -> Any:
        """That of the solver."""
        return self.solver.strong_order(terms)

    def error_order(self, terms: Any) -> Any:
        """That of the solver."""
        return self.solver.error_order(terms)

    @promoting
    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> Any:
        """The memory of the solver, before its first step."""
        return self.solver.init(terms, t0, t0 + (t1 - t0) / self.count, y0, args)

    @promoting
    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Any,
        solver_state: Any,
        made_jump: Any,
    ) -> tuple[Any, None, dict[str, Any], Any, diffrax.RESULTS]:
        """`count` steps; the result is that of the first that fails."""
        del t1
        y, result = y0, diffrax.RESULTS.successful
        for i in range(self.count):
            y, _, _, solver_state, now = self.solver.step(
                terms, t0 + i, t0 + i + 1, y, args, solver_state, made_jump
            )
            result = diffrax.RESULTS.where(result == diffrax.RESULTS.successful, now, result)
            made_jump = jnp.zeros((), bool)
        return y, None, {"y0": y0, "y1": y}, solver_state, result

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        """That of the solver."""
        return self.solver.func(terms, t0, y0, args)
