"""The stages of an explicit Runge-Kutta step, written out."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float


class Stages:
    r"""The slopes $k_i = f(t_0 + c_i h,\; y_0 + h \sum_{j < i} a_{ij} k_j)$ of one step.

    Written out they make a step of a small equation a few microseconds faster, and spare large ones
    the products with the zeros of the tableau.

    **Arguments:**

    - `terms`, `t0`, `t1`, `y0`, `args`: as diffrax hands them to the step of a solver.
    - `a`, `c`: the tableau, `(s, s)` and `(s,)`.
    """

    def __init__(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Any,
        a: Float[np.ndarray, "s s"],
        c: Float[np.ndarray, " s"],
    ):
        self.length = terms.contr(t0, t1)
        self.start = y0

        @jax.jit  # traced once, not once a stage
        def field(t: Any, state: Any) -> Any:
            return terms.vf(t, state, args)

        self.field = field
        self.slopes: list[Any] = []
        for i in range(len(c)):
            at = self.moved(a[i, :i]) if i else self.start
            self.slopes.append(field(t0 + c[i] * (t1 - t0), at))

    def moved(self, weights: Float[np.ndarray, " _"]) -> Any:
        """The start moved along the slopes with the given weights."""
        return jax.tree.map(lambda y, k: y + self.length * k, self.start, self.combined(weights))

    def scaled(self, slope: Any) -> Any:
        """A slope times the length of the step."""
        return jax.tree.map(lambda k: self.length * k, slope)

    def ends(self, t1: Any, end: Any) -> dict[str, Any]:
        """What an interpolation by cubics needs; compiled only where one is asked for."""
        slopes = {"k0": self.slopes[0], "k1": self.field(t1, end)}
        scaled = {name: self.scaled(slope) for name, slope in slopes.items()}
        return {"y0": self.start, "y1": end} | scaled

    def combined(self, weights: Float[np.ndarray, " _"]) -> Any:
        """The sum of the slopes with the given weights."""
        return jax.tree.map(lambda *k: _sum(weights, k), *self.slopes[: len(weights)])


def _sum(weights: Float[np.ndarray, " _"], slopes: Sequence[Array]) -> Array:
    """Leaves out the weights that are zero, as many are."""
    terms = [float(w) * k for w, k in zip(weights, slopes, strict=True) if w != 0.0]
    return sum(terms[1:], start=terms[0])
