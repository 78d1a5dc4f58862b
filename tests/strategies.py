"""Hypothesis strategies: networks, data, regularizers and symmetries.

Entries are multiples of 1/100, so that a failing example is short to read and shrinks to small
numbers. Widths come from a short list, because every new shape compiles; with
`HYPOTHESIS_PROFILE=explore` every depth 1..4 and every width 1..4 is drawn.
"""

import itertools
import os
import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st

import gradflow as gf

T = TypeVar("T")

EXPLORE = os.environ.get("HYPOTHESIS_PROFILE") == "explore"

WIDTHS = (
    (1, 1),
    (1, 1, 1),
    (2, 2, 2),
    (3, 2),
    (3, 1, 2),
    (2, 3, 2, 1),
    (1, 2, 2, 3, 2),
)
"""The scalar nets, a square one, bottlenecks and bulges: depths 1 to 4."""

ROWS = (2, 4)
"""Sample sizes: fewer rows than the widest input, and more."""


def built(constructor: Callable[..., T], *args: Any, **options: Any) -> T:
    """The constructor's value, leaving the global random state as it was.

    Run-time type checks look at random entries of sequences, and hypothesis refuses strategies that
    use the `random` module.
    """
    state = random.getstate()
    try:
        return constructor(*args, **options)
    finally:
        random.setstate(state)


def widths(min_depth: int = 1, max_depth: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Widths (d_0, ..., d_N) of networks of the given depths."""
    if EXPLORE:
        one = st.integers(1, 4)
        return st.lists(one, min_size=min_depth + 1, max_size=max_depth + 1).map(tuple)
    return st.sampled_from([w for w in WIDTHS if min_depth < len(w) <= max_depth + 1])


def numbers(low: float = -2.0, high: float = 2.0) -> st.SearchStrategy[float]:
    """Multiples of 1/100."""
    return st.integers(round(100 * low), round(100 * high)).map(lambda k: k / 100)


def matrices(rows: int, columns: int) -> st.SearchStrategy[np.ndarray]:
    """Matrices of entries between -2 and 2."""
    size = rows * columns
    flat = st.lists(numbers(), min_size=size, max_size=size)
    return flat.map(lambda entries: np.array(entries).reshape(rows, columns))


def symmetric(d: int) -> st.SearchStrategy[np.ndarray]:
    """Symmetric matrices."""
    return matrices(d, d).map(lambda a: (a + a.T) / 2)


@st.composite
def orthogonal(draw: Any, d: int) -> np.ndarray:
    """Orthogonal matrices of both determinants, by the Cayley transform."""
    a = draw(matrices(d, d))
    skew = a - a.T
    signs = draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=d, max_size=d))
    rotation = np.linalg.solve(np.eye(d) + skew, np.eye(d) - skew)
    return rotation * np.array(signs)


@st.composite
def invertible(draw: Any, d: int) -> np.ndarray:
    """Well-conditioned matrices: unit triangular factors around a diagonal."""
    a = draw(matrices(d, d)) / 2
    scales = st.sampled_from([1.0, -1.0, 0.5, 2.0])
    diagonal = np.diag(draw(st.lists(scales, min_size=d, max_size=d)))
    return (np.eye(d) + np.tril(a, -1)) @ diagonal @ (np.eye(d) + np.triu(a, 1))


@st.composite
def networks(draw: Any, shape: tuple[int, ...] | None = None, **depths: int) -> gf.DeepLinear:
    """Networks of the given widths, or of any."""
    shape = draw(widths(**depths)) if shape is None else shape
    layers = [draw(matrices(above, below)) for below, above in itertools.pairwise(shape)]
    return built(gf.DeepLinear, layers)


@st.composite
def whitened(draw: Any, d_in: int, d_out: int) -> gf.Regression:
    """Populations with inputs of unit covariance, with or without residual noise."""
    target = draw(matrices(d_out, d_in))
    residual = draw(st.sampled_from([None, 0.25]))
    n = draw(st.sampled_from([1, 3]))
    return built(gf.Regression.whitened, target, n=n, residual=residual)


@st.composite
def populations(draw: Any, d_in: int, d_out: int) -> gf.Regression:
    """Populations of any input covariance, also singular ones, and any residual covariance."""
    factor = draw(matrices(d_in, draw(st.integers(1, d_in + 1))))
    noise = draw(matrices(d_out, 2))
    target = draw(matrices(d_out, d_in))
    sxx = factor @ factor.T
    syy = target @ sxx @ target.T + noise @ noise.T
    n = draw(st.sampled_from([1, 3]))
    return built(gf.Regression.from_moments, sxx, target @ sxx, (syy + syy.T) / 2, n=n)


@st.composite
def samples(draw: Any, d_in: int, d_out: int, rows: int | None = None) -> gf.Regression:
    """Finite samples, with fewer rows than inputs (singular covariance) or more."""
    n = draw(st.sampled_from(ROWS)) if rows is None else rows
    x, y = draw(matrices(n, d_in)), draw(matrices(n, d_out))
    return built(gf.Regression.from_samples, x, y)


def data(d_in: int, d_out: int) -> st.SearchStrategy[gf.Regression]:
    """Data of every kind."""
    return st.one_of(whitened(d_in, d_out), populations(d_in, d_out), samples(d_in, d_out))


@st.composite
def cases(draw: Any, kind: Any = data, **depths: int) -> tuple[gf.DeepLinear, gf.Regression]:
    """A network and data that fit each other; `kind` is one of the data strategies above."""
    shape = draw(widths(**depths))
    return draw(networks(shape)), draw(kind(shape[0], shape[-1]))


@st.composite
def regularizers(draw: Any, of: gf.Regression) -> list[gf.AbstractRegularizer]:
    """Every combination of regularizers that the data allow."""
    levels = st.sampled_from([0.5, 0.0, 0.2])
    chosen: list[gf.AbstractRegularizer] = []
    if draw(st.booleans()):
        chosen.append(gf.WeightDecay(draw(levels)))
    if draw(st.booleans()):
        chosen.append(gf.LabelNoise(draw(levels)))
    if draw(st.booleans()):
        chosen.append(gf.InputNoise(draw(levels)))
    batches = [None, gf.Minibatch(1), gf.Minibatch(2)]
    if of.x is not None:
        batches += [gf.Minibatch(2, replacement=True), gf.Minibatch(2, reshuffled=True)]
    batch = draw(st.sampled_from(batches))
    if batch is not None:
        chosen.append(batch)
    return draw(st.permutations(chosen))
