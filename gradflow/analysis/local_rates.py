"""Whether a rate is one number: the rates of parts of its window beside each other."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from gradflow.analysis.statistics import trapezoid_weights, weighted_line
from gradflow.random.antithetic import IndependentSamples

CHANGED = 1e-3
"""Level of the test that says that a rate changes along its window."""

SLIGHT = 0.02
"""Relative change of a rate along its window that is not worth a word."""

FLAT = 1e-6
"""Change over the window, relative, that integration errors make: of it no rate is asked."""

PARTS = 3
"""Parts of the window: two would not see a rate that rises and falls again."""


@dataclass(frozen=True)
class LocalRates:
    """Rates of the parts of a window in order, and whether they are those of one constant."""

    values: tuple[float, ...]
    constant: bool

    def __str__(self) -> str:
        return " → ".join(f"{value:.4g}" for value in self.values)


def local_rates(
    time: Float[np.ndarray, " time"],
    values: Float[np.ndarray, "row time"],
    scale: float,
    samples: IndependentSamples | None,
) -> LocalRates:
    r"""The slopes of rows over thirds of the time, and whether they differ.

    They do if some two of them, averaged over rows, differ by more than `SLIGHT` of the largest, by
    more than `FLAT` over the window, and by more than $q s$: $s$ is the standard error of the
    difference over independent rows, $q$ the Student-t quantile at level `CHANGED`, shared between
    the pairs. Neighbouring parts share a saved time, so that three times are enough.

    **Arguments:**

    - `time`, `values`: of the window, `(time,)` and `(row, time)`.
    - `scale`: size of the values, to which a change is relative; 1 for logarithms.
    - `samples`: which rows are independent; None for rows without any noise, which differ by size
        alone. A single row with noise cannot tell, and counts as constant.
    """
    slopes = local_slopes(time, values, parts_of(time))
    return compared(slopes, FLAT * scale / float(time[-1] - time[0]), samples)


def parts_of(time: Float[np.ndarray, " time"]) -> int:
    """How many parts a window has: `PARTS`, but halves if there are three times."""
    return min(PARTS, time.size - 1)


def local_slopes(
    time: Float[np.ndarray, " time"], values: Float[np.ndarray, "row time"], parts: int
) -> Float[np.ndarray, "part row"]:
    """The slopes of rows over the parts of a window."""
    cuts = _cuts(time, parts)
    return np.stack([_slope(time, values, *ends) for ends in pairwise(cuts)])


def compared(
    slopes: Float[np.ndarray, "part row"], flat: float, samples: IndependentSamples | None
) -> LocalRates:
    """The means of slopes over rows, and the test of `local_rates` on them.

    **Arguments:**

    - `slopes`: of the parts of a window, which may differ from row to row.
    - `flat`: the change of a slope that integration errors make.
    - `samples`: as in `local_rates`.
    """
    means = slopes.mean(axis=1)
    found = tuple(map(float, means))
    if samples is not None and samples.count < 2:
        return LocalRates(found, True)
    pairs = [(i, j) for j in range(len(means)) for i in range(j)]
    least = max(SLIGHT * float(np.abs(means).max()), flat)
    for i, j in pairs:
        change, noise = slopes[j] - slopes[i], 0.0
        if samples is not None:
            quantile = float(stdtrit(samples.count - 1, 1.0 - CHANGED / (2 * len(pairs))))
            noise = quantile * float(samples.standard_error(change))
        if abs(float(change.mean())) > max(least, noise):
            return LocalRates(found, False)
    return LocalRates(found, True)


def _cuts(time: Float[np.ndarray, " time"], count: int) -> list[int]:
    """Indices at which the parts begin and end, as evenly in time as saved times allow."""
    last = time.size - 1
    inner = np.searchsorted(time, np.linspace(time[0], time[-1], count + 1)[1:-1])
    cuts = [0]
    for part, index in enumerate(inner.tolist(), start=1):
        cuts.append(min(max(index, cuts[-1] + 1), last - (count - part)))
    return [*cuts, last]


def _slope(
    time: Float[np.ndarray, " time"], values: Float[np.ndarray, "row time"], start: int, stop: int
) -> Float[np.ndarray, " row"]:
    part = time[start : stop + 1]
    return weighted_line(part, values[:, start : stop + 1], trapezoid_weights(part))[1]
