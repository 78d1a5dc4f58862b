"""The explicit Runge-Kutta method of Dormand and Prince of order 8, unrolled."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from scipy.integrate import DOP853

STAGES = DOP853.n_stages
MANY = 1000
"""Size of the state from which on its layers are kept apart: putting them together costs more."""

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

    The stages are written out, which makes a step of a small equation a few microseconds faster and
    spares large ones the products with the zeros of the tableau. Between the ends of steps the
    solution is interpolated by cubics, which are far less accurate than the steps.

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
        h = terms.contr(t0, t1)
        start, restore = _flattened(y0)

        @jax.jit  # traced once, not once a stage
        def field(t: Any, state: Any) -> Any:
            return _flattened(terms.vf(t, restore(state), args))[0]

        slopes: list[Any] = []

        def moved(weights: np.ndarray) -> Any:
            """The start moved along the slopes so far with the given weights."""
            return jax.tree.map(
                lambda y, *k: y + h * _combined(weights, k), start, *slopes[: weights.size]
            )

        for row, c in zip(DOP853.A, DOP853.C, strict=True):
            slopes.append(field(t0 + c * (t1 - t0), moved(row[: len(slopes)]) if slopes else start))
        end = moved(DOP853.B)

        def error(*k: Array) -> Array:
            fifth, third = (_combined(e[:STAGES], k) for e in (DOP853.E5, DOP853.E3))
            length = jnp.sqrt(fifth**2 + TOGETHER * third**2)
            return h * fifth**2 / jnp.where(length == 0.0, 1.0, length)

        y1 = restore(end)
        ends = {"k0": slopes[0], "k1": field(t1, end)}  # costs nothing unless it is asked for
        dense = {"y0": y0, "y1": y1}
        dense |= {name: restore(jax.tree.map(lambda k: h * k, k)) for name, k in ends.items()}
        error_estimate = restore(jax.tree.map(error, *slopes))
        return y1, error_estimate, dense, None, diffrax.RESULTS.successful


def _flattened(state: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A small state as one vector, in which sums cost one loop; and the way back."""
    if sum(leaf.size for leaf in jax.tree.leaves(state)) < MANY:
        return ravel_pytree(state)
    return state, lambda state: state


def _combined(weights: np.ndarray, slopes: Sequence[Array]) -> Array:
    """The sum of the slopes with their weights; most weights are zero."""
    terms = [float(w) * k for w, k in zip(weights, slopes, strict=True) if w != 0.0]
    return sum(terms[1:], start=terms[0])
