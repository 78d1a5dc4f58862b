"""Strategies for regression data: whitened and general populations, finite samples."""

import numpy as np
from hypothesis import strategies as st
from jaxtyping import Float

from gradflow.data import Regression
from gradflow.testing.strategies.building import Draw, ValueOrStrategy, as_strategy, composite
from gradflow.testing.strategies.entries import (
    checked_conditioning,
    matrices,
    orthogonal,
    singular_values,
)

ROWS = (2, 4)
"""Sample sizes drawn by default: fewer rows than many an input, and more. Few, as rows compile."""

NAME = "drawn"
"""One name for all: a name is part of the compiled program."""

COUNTS = (1, 3)
"""What `n` of a population is by default."""


def data(
    d_in: int,
    d_out: int,
    population: bool | None = None,
    n: ValueOrStrategy[int] | None = None,
    conditioning: float | None = None,
    *,
    whitened: bool | None = None,
) -> st.SearchStrategy[Regression]:
    r"""Regression data of readable entries; they shrink to the identity covariance and $T = 0$.

    Whitened populations, populations of any moments, and finite samples, each with and without
    residuals that no linear map can explain.

    **Arguments:**

    - `d_in`, `d_out`: numbers of inputs and targets.
    - `population`: True for populations only, False for finite samples only, None for both.
    - `n`: number of samples, or a strategy for it; by default 1 or 3 for a population (whose noise
        is averaged over `n` samples) and 2 or 4 rows of a finite sample.
    - `conditioning`: a bound on the condition number of $\Sigma_{xx}$; by default it may be
        singular.
    - `whitened`: True for $\Sigma_{xx} = I$ only, False for other populations only.

    **Raises:** `ValueError` for wishes that contradict each other.
    """
    for name, value in (("d_in", d_in), ("d_out", d_out)):
        if value < 1:
            raise ValueError(f"{name} must be an integer >= 1; got {value}.")
    if whitened and population is False:
        raise ValueError(
            "whitened=True draws populations; for samples of unit covariance use population=False, "
            "conditioning=1."
        )
    bound = checked_conditioning(conditioning)
    if population is False and bound is not None and isinstance(n, int) and n < d_in:
        raise ValueError(
            f"n={n} samples of {d_in} inputs have a singular covariance, which no conditioning "
            f"bounds; give n >= {d_in}."
        )
    counts = st.sampled_from(COUNTS) if n is None else as_strategy(n)
    if n is None:
        enough = [k for k in ROWS if bound is None or k >= d_in]
        rows = st.sampled_from(enough or [d_in])
    else:
        rows = as_strategy(n)
    kinds: list[st.SearchStrategy[Regression]] = []
    if population is not False and whitened is not False:
        kinds.append(_whitened(d_in, d_out, counts))
    if population is not False and not whitened:
        kinds.append(_moments(d_in, d_out, counts, bound))
    if not population and not whitened:
        kinds.append(_samples(d_in, d_out, rows, bound))
    return st.one_of(kinds)


@composite
def _whitened(draw: Draw, d_in: int, d_out: int, counts: st.SearchStrategy[int]) -> Regression:
    target = draw(matrices(d_out, d_in))
    residual = draw(st.sampled_from([None, 0.25]))
    return Regression.whitened(target, n=draw(counts), residual=residual, name=NAME)


@composite
def _moments(
    draw: Draw,
    d_in: int,
    d_out: int,
    counts: st.SearchStrategy[int],
    conditioning: float | None,
) -> Regression:
    sxx = draw(_covariance(d_in, conditioning))
    target = draw(matrices(d_out, d_in))
    noise = draw(matrices(d_out, 2))
    syy = target @ sxx @ target.T + noise @ noise.T
    syy = (syy + syy.T) / 2
    return Regression.from_moments(sxx, target @ sxx, syy, n=draw(counts), name=NAME)


@composite
def _samples(
    draw: Draw,
    d_in: int,
    d_out: int,
    rows: st.SearchStrategy[int],
    conditioning: float | None,
) -> Regression:
    n = draw(rows)
    if conditioning is None:
        x = draw(matrices(n, d_in))
    elif n < d_in:
        raise ValueError(
            f"n={n} samples of {d_in} inputs were drawn, whose covariance is singular and has no "
            f"conditioning; draw n >= {d_in}."
        )
    else:
        root = np.sqrt(n * draw(singular_values(d_in, conditioning)))
        x = draw(orthogonal(n))[:, :d_in] * root @ draw(orthogonal(d_in)).T
    return Regression.from_samples(x, draw(matrices(n, d_out)), name=NAME)


@composite
def _covariance(draw: Draw, d: int, conditioning: float | None) -> Float[np.ndarray, "{d} {d}"]:
    """Any covariance, also a singular one, or one of bounded condition; shrinks to the identity."""
    if conditioning is None:
        factor = np.eye(d, draw(st.sampled_from([d, d + 1, 1])))
        factor = factor + draw(matrices(*factor.shape))
        return factor @ factor.T
    turn = draw(orthogonal(d))
    covariance = turn * draw(singular_values(d, conditioning)) @ turn.T
    return (covariance + covariance.T) / 2
