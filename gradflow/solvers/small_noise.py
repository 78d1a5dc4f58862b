"""A solver for equations whose noise is small."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax

from gradflow.solvers.promotion import promoting


class SmallNoise(diffrax.AbstractItoSolver):
    r"""Two-stage Ito solver with weak error $O(\Delta^2 + \epsilon^4 \Delta)$.

    For $dX = a\,dt + \epsilon\,b\,dB$ with any number of channels that need not commute,

    $$X^+ = X + \tfrac12 [a(X) + a(X + a \Delta + \epsilon b\, \Delta B)] \Delta
      + \tfrac\epsilon2 [b(X) + b(X + a \Delta)] \Delta B.$$

    The mean and covariance of a step agree with those of the equation to $\Delta^2$, up to terms in
    $\epsilon^4$; no derivatives and no more random numbers than the Euler-Maruyama method. With
    noise of size $\epsilon = \sqrt h$ and $\Delta \propto h$ its error is $O(h^2)$, where that of
    the Euler-Maruyama method is $O(h)$.

    The increment may be any random vector that the noise term takes linearly; only its mean and
    covariance enter at this order.

    Source: Milstein & Tretyakov 1997, "Numerical methods in the weak sense for stochastic
    differential equations with small noise".
    """

    term_structure: ClassVar = diffrax.MultiTerm[tuple[diffrax.AbstractTerm, diffrax.AbstractTerm]]
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = (
        diffrax.LocalLinearInterpolation
    )

    def order(self, terms: Any) -> int:
        """2 without noise."""
        return 2

    def strong_order(self, terms: Any) -> float:
        """1/2."""
        return 0.5

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> None:
        """It has no memory."""

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
    ) -> tuple[Any, None, dict[str, Any], None, diffrax.RESULTS]:
        """One step; the terms are (drift, noise)."""
        del solver_state, made_jump
        drift, noise = terms.terms
        dt, db = drift.contr(t0, t1), noise.contr(t0, t1)
        f0 = drift.vf_prod(t0, y0, args, dt)
        g0 = noise.vf_prod(t0, y0, args, db)
        moved = jax.tree.map(lambda y, f: y + f, y0, f0)
        shaken = jax.tree.map(lambda y, g: y + g, moved, g0)
        f1 = drift.vf_prod(t1, shaken, args, dt)
        g1 = noise.vf_prod(t1, moved, args, db)
        y1 = jax.tree.map(lambda y, a, b, c, d: y + 0.5 * (a + b + c + d), y0, f0, f1, g0, g1)
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        """The vector fields at `t0`."""
        return terms.vf(t0, y0, args)
