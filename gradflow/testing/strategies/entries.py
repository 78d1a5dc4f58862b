"""Numbers and matrices that are short to read and shrink to 0, 1 and the identity."""

import math

import numpy as np
from hypothesis import strategies as st
from jaxtyping import Float

from gradflow.testing.strategies.building import Draw, composite

SIMPLE = (0.0, 1.0, 0.5, -1.0, 2.0, -0.5, -2.0)
"""What an entry shrinks to, simplest first."""

MOST = 2.0
"""The largest entry."""


def entries(*, positive: bool = False) -> st.SearchStrategy[float]:
    """Numbers between -2 and 2: simple ones, tenths and hundredths.

    A failing entry shrinks to the first of 0, 1, 0.5, -1, 2, ... that still fails, then to few
    tenths, then to few hundredths.

    **Arguments:**

    - `positive`: only numbers above 0.
    """
    simple = [x for x in SIMPLE if x > 0 or not positive]
    first = 1 if positive else -round(10 * MOST)
    tenths = st.integers(first, round(10 * MOST)).map(lambda k: k / 10)
    first = 1 if positive else -round(100 * MOST)
    hundredths = st.integers(first, round(100 * MOST)).map(lambda k: k / 100)
    return st.one_of(st.sampled_from(simple), tenths, hundredths)


def matrices(
    rows: int, columns: int, elements: st.SearchStrategy[float] | None = None
) -> st.SearchStrategy[np.ndarray]:
    """Matrices `(rows, columns)` of `entries()`, or of other elements; they shrink to zero."""
    each = entries() if elements is None else elements
    flat = st.tuples(*[each] * (rows * columns))
    return flat.map(lambda drawn: np.array(drawn).reshape(rows, columns))


@composite
def orthogonal(draw: Draw, d: int) -> Float[np.ndarray, "{d} {d}"]:
    r"""Orthogonal matrices of both determinants, $(I + A)^{-1} (I - A)$ times signs.

    With $A$ skew (Cayley) and signs on the columns; they shrink to the identity.
    """
    a = np.zeros((d, d))
    a[np.triu_indices(d, 1)] = draw(st.tuples(*[entries()] * (d * (d - 1) // 2)))
    skew = a - a.T
    signs = draw(st.tuples(*[st.sampled_from([1.0, -1.0])] * d))
    return np.linalg.solve(np.eye(d) + skew, np.eye(d) - skew) * np.array(signs)


@composite
def invertible(draw: Draw, d: int) -> Float[np.ndarray, "{d} {d}"]:
    """Well-conditioned invertible matrices: unit triangular factors around a diagonal.

    They shrink to the identity.
    """
    a = draw(matrices(d, d)) / 2
    diagonal = draw(st.tuples(*[st.sampled_from([1.0, -1.0, 0.5, 2.0])] * d))
    return (np.eye(d) + np.tril(a, -1)) @ np.diag(diagonal) @ (np.eye(d) + np.triu(a, 1))


def singular_values(count: int, conditioning: float) -> st.SearchStrategy[np.ndarray]:
    """Descending numbers between 1/`conditioning` and 1 that shrink to 1."""
    smallest = 1.0 / conditioning
    decades = range(math.ceil(math.log10(conditioning)) + 1)
    round_ones = [float(f"{digit}e-{k + 1}") for k in decades for digit in (10, 5, 8, 3, 2)]
    choices = [s for s in dict.fromkeys(round_ones) if s > smallest]
    each = st.sampled_from([*choices, smallest])
    return st.tuples(*[each] * count).map(lambda s: np.sort(np.array(s))[::-1])


@composite
def conditioned(
    draw: Draw, rows: int, columns: int, conditioning: float
) -> Float[np.ndarray, "{rows} {columns}"]:
    r"""Matrices $U \Sigma V^\top$ of full rank, largest singular value 1, bounded condition number.

    They shrink to ones on the diagonal.
    """
    rank = min(rows, columns)
    left, right = draw(orthogonal(rows)), draw(orthogonal(columns))
    values = draw(singular_values(rank, conditioning))
    return (left[:, :rank] * values) @ right[:, :rank].T


def checked_conditioning(conditioning: float | None) -> float | None:
    """A condition number as a float.

    **Raises:** `ValueError` if it is below 1.
    """
    if conditioning is None:
        return None
    number = float(conditioning)
    if not 1.0 <= number < np.inf:
        raise ValueError(
            f"conditioning must be a finite condition number >= 1 (1: all singular values equal); "
            f"got {conditioning!r}."
        )
    return number
