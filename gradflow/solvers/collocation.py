"""Coefficients of collocation at the Gauss points."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float

GRID = 2.0**52
"""Coefficients are multiples of 1 / (2 `GRID`), so that sums of a few are exact."""


@dataclasses.dataclass(frozen=True)
class Collocation:
    r"""The Runge-Kutta method of collocation at the $s$ Gauss points of the unit interval.

    - `a`, `b`, `c`: its Butcher tableau. The conditions
        $b_i a_{ij} + b_j a_{ji} = b_i b_j$, under which quadratic invariants are kept, hold
        *exactly* between these floating-point numbers and not only up to rounding, which would
        make the invariants drift in proportion to the number of steps.
    - `difference`: weights of the divided difference of the slopes at $0, c_1, ..., c_s, 1$,
        scaled to weight 1 at 1.
    - `defect`: weights of the slope at 1 less the polynomial through the others, for the slopes
        at $c_1, ..., c_s, 1$.
    - `error`: the scale of the error estimate, $s! / (2s+1)!$, with which it is the error of a step
        of $\dot y = \lambda y$ at $h \lambda = 1$.
    - `inverse_powers`: takes slopes at $c_1, ..., c_s, 1$ to the coefficients, lowest first, of
        the polynomial in $\xi = t - 1$ through them.
    """

    a: Float[np.ndarray, "s s"]
    b: Float[np.ndarray, " s"]
    c: Float[np.ndarray, " s"]
    difference: Float[np.ndarray, " s+2"]
    defect: Float[np.ndarray, " s+1"]
    error: float
    inverse_powers: Float[np.ndarray, "s+1 s+1"]


@functools.cache
def gauss(stages: int) -> Collocation:
    """Collocation at 1, 2 or 3 Gauss points, of order 2, 4 or 6.

    **Source:** Hairer, Lubich, Wanner, "Geometric Numerical Integration", II.1.3 and IV.2.1; that
    the rounding of the coefficients matters: Hairer, McLachlan, Razakarivony, BIT 48 (2008) 231.
    """
    # a_ij = b_j / 2 + w_ij / b_i with w antisymmetric, in terms of two numbers on the grid.
    if stages == 1:
        a = np.array([[0.5]])
        b = np.array([1.0])
    elif stages == 2:
        r = _on_grid(math.sqrt(3.0) / 6.0)
        a = np.array([[0.25, 0.25 - r], [0.25 + r, 0.25]])
        b = np.array([0.5, 0.5])
    else:
        q, r = _on_grid(1.0 / 18.0), _on_grid(math.sqrt(15.0) / 120.0)
        halves = np.array([2.5 * q, 4.0 * q, 2.5 * q])
        turns = np.array([[0.0, -8.0, -4.0], [5.0, 0.0, -5.0], [4.0, 8.0, 0.0]])
        a = halves + turns * r
        b = 2.0 * halves
    c = np.sum(a, axis=1)
    error = math.factorial(stages) / math.factorial(2 * stages + 1)
    difference = _difference_weights(np.array([0.0, *c, 1.0]))
    defect = _difference_weights(np.array([*c, 1.0]))
    return Collocation(a, b, c, difference, defect, error, _inverse_powers(c))


def _on_grid(x: float) -> float:
    return round(x * GRID) / GRID


def _difference_weights(nodes: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    gaps = nodes[:, None] - nodes + np.eye(nodes.size)
    weights = 1.0 / np.prod(gaps, axis=1)
    return weights / weights[-1]


def _inverse_powers(c: Float[np.ndarray, " s"]) -> Float[np.ndarray, "s+1 s+1"]:
    return np.linalg.inv(np.vander(np.array([*c, 1.0]) - 1.0, increasing=True))
