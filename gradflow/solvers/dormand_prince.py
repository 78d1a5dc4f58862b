"""The explicit Runge-Kutta method of Dormand and Prince of order 8, unrolled."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array
from scipy.integrate import DOP853

from gradflow.solvers.promotion import promoting
from gradflow.solvers.stages import Stages

STAGES = DOP853.n_stages
TOGETHER = 0.01
"""Weight of the square of the estimate of order 3 beside that of order 5."""


class DormandPrince853(diffrax.AbstractAdaptiveSolver[None]):
    r"""Dormand and Prince's explicit method of order 8 with 12 stages.

    $$ k_i = f\Big(t_0 + c_i h,\; y_0 + h \sum_{j < i} a_{ij} k_j\Big), \qquad
       y_1 = y_0 + h \sum_i b_i k_i $$

    The error estimate is $e_5^2 / \sqrt{e_5^2 + 0.01\, e_3^2}$ in every component, with the
    embedded estimates $e_5$ and $e_3$; it shrinks with power 8 of the step. The method is stable
    for $h \lambda < 6.39$ on the negative real axis: 0.53 an evaluation, where `diffrax.Dopri8` has
    0.40. It keeps nothing from step to step, so that a solve can be cut into many without loss.

    Between the ends of steps the solution is interpolated by cubics, which are far less accurate
    than the steps.

    **Source:** Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", II.5 and
    II.10; the coefficients are SciPy's.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation
    )

    def order(self, terms: Any) -> int:
        """8."""
        del terms
        return 8

    def error_order(self, terms: Any) -> int:
        """The power of the step with which the error estimate shrinks."""
        del terms
        return 8

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> None:
        """Nothing is carried from step to step."""

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        """The vector field."""
        return terms.vf(t0, y0, args)

    @promoting
    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Any,
        solver_state: None,
        made_jump: Any,
    ) -> tuple[Any, Any, dict[str, Any], None, diffrax.RESULTS]:
        """Evaluate the stages one after the other, and add them up."""
        del solver_state, made_jump
        step = Stages(terms, t0, t1, y0, args, DOP853.A, DOP853.C)
        end = step.moved(DOP853.B)

        def error(fifth: Array, third: Array) -> Array:
            if jnp.iscomplexobj(fifth):
                return error(jnp.abs(fifth), jnp.abs(third)).astype(fifth.dtype)
            length = jnp.sqrt(fifth**2 + TOGETHER * third**2)
            return step.length * fifth**2 / jnp.where(length == 0.0, 1.0, length)

        estimates = (step.combined(e[:STAGES]) for e in (DOP853.E5, DOP853.E3))
        estimate = jax.tree.map(error, *estimates)
        return end, estimate, step.ends(t1, end), None, diffrax.RESULTS.successful
