"""Agree, differ, or too early to say: the verdict on two means and the table of verdicts."""

from dataclasses import asdict, dataclass, field
from math import ceil

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from gradflow.analysis.comparison.matched_times import EFFECTIVE, FLOW, Clock

AGREE, DIFFER, UNDECIDED = "agree", "differ", "not enough replicas"
MOST_REPLICAS = 10**9
"""A verdict that would need more replicas than this is not promised."""
_SEVERITY = (AGREE, UNDECIDED, DIFFER)


@dataclass(frozen=True)
class ComparisonRow:
    """One observable (or component of one) at one time, in two dynamics.

    - `observable`, `units` of the means, labels `first` and `second`.
    - `time`: flow time, or effective time where momenta differ.
    - `mean_first`, `mean_second`: over replicas that did not diverge.
    - `difference`: second - first, its `standard_error` (Welch; 0 for two deterministic paths)
      and its size in standard errors, `sigmas`.
    - `relative`: difference / scale, the size of the first mean.
    - `verdict`: "agree", "differ" or "not enough replicas".
    - `replicas_needed`: of each random dynamics to decide if the difference stays as it is; None
      if it is decided, or if no number would do.
    """

    observable: str
    units: str
    first: str
    second: str
    time: float
    mean_first: float
    mean_second: float
    difference: float
    standard_error: float
    sigmas: float
    relative: float
    verdict: str
    replicas_needed: int | None


@dataclass(frozen=True)
class Verdict:
    """The verdict on one observable in two dynamics over all times and components."""

    observable: str
    first: str
    second: str
    verdict: str
    reason: str

    def __str__(self) -> str:
        return f"{self.observable}: {self.second} and {self.first} {self.verdict} ({self.reason})"


@dataclass(frozen=True)
class Comparison:
    """Dynamics compared with the first of them.

    - `rows`: one a matched time and component; `verdicts`: one an observable and pair.
    - `tolerance`: relative; `confidence`: of all verdicts together.
    - `replicas`: used, by label (1 for a deterministic dynamics); `diverged`: left out, by label.
    - `momenta`: by label, where they differ; times are then effective, h k / (1 - momentum).
    """

    rows: tuple[ComparisonRow, ...]
    verdicts: tuple[Verdict, ...]
    tolerance: float
    confidence: float
    replicas: dict[str, int]
    diverged: dict[str, int]
    momenta: dict[str, float] = field(default_factory=dict)

    @property
    def clock(self) -> Clock:
        """What the times of the rows are: flow times, or effective times if momenta differ."""
        return EFFECTIVE if self.momenta else FLOW

    @property
    def agree(self) -> bool:
        """Whether every verdict is "agree"."""
        return all(v.verdict == AGREE for v in self.verdicts)

    def to_dataframe(self) -> pd.DataFrame:
        """The rows as a table, one column a field of `ComparisonRow`."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        lines = [
            f"{label}: {count} replicas, {self.diverged[label]} diverged"
            for label, count in self.replicas.items()
        ]
        lines.append(f"tolerance {self.tolerance:.3g}, confidence {self.confidence:.3g}")
        if self.momenta:
            listed = ", ".join(f"{beta:g} ({label})" for label, beta in self.momenta.items())
            lines.append(f"momenta differ, so times are effective, h k / (1 - momentum): {listed}")
        lines += ["", *map(str, self.verdicts)]
        if self.rows:
            lines += ["", *_table(self.rows, self.clock)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Decision:
    """The outcome of an equivalence test."""

    verdict: str
    bound: float
    replicas_needed: int | None


def decide(
    difference: float,
    standard_error: float,
    degrees: float,
    limit: float,
    level: float,
    replicas: int,
) -> Decision:
    r"""Two one-sided tests of $|\Delta| \le c$.

    "agree" if $|\hat\Delta| + q s \le c$ and "differ" if $|\hat\Delta| - q s > c$, with $q$ the
    Student-t quantile of the level; each is wrong with probability at most `level`.

    **Arguments:**

    - `difference`, `standard_error`, `degrees`: $\hat\Delta$, $s$ and the degrees of freedom of
      $s$; with $s = 0$ the difference is exact.
    - `limit`: $c$.
    - `level`: of each one-sided test.
    - `replicas`: that gave $s$.

    **Returns:** the verdict, the upper bound $|\hat\Delta| + q s$ and, where undecided, the number
    of replicas at which $q s$ would shrink to the distance between $|\hat\Delta|$ and $c$.
    """
    size = abs(difference)
    if standard_error == 0.0:
        return Decision(AGREE if size <= limit else DIFFER, size, None)
    reach = float(stdtrit(degrees, 1 - level)) * standard_error
    if size + reach <= limit:
        return Decision(AGREE, size + reach, None)
    if size - reach > limit:
        return Decision(DIFFER, size + reach, None)
    margin = abs(limit - size)
    factor = (reach / margin) ** 2 if margin > 0.0 else np.inf
    needed = replicas * factor
    enough = max(ceil(needed), replicas + 1) if needed <= MOST_REPLICAS else None
    return Decision(UNDECIDED, size + reach, enough)


def overall(observable: str, rows: list[ComparisonRow], tolerance: float) -> Verdict:
    """The verdict over the rows of one observable in one pair: the worst of them."""
    worst = max(rows, key=lambda row: (_SEVERITY.index(row.verdict), abs(row.relative)))
    name = worst.observable.removeprefix(observable)
    where = f"{name + ' ' if name else ''}at t = {worst.time:.6g}"
    if worst.verdict == AGREE:
        reason = (
            f"within {tolerance:.3g} of the scale at all {len({r.time for r in rows})} times; "
            f"largest {worst.relative:+.2%} {where}"
        )
    elif worst.verdict == DIFFER:
        size = "exact" if worst.standard_error == 0.0 else f"{worst.sigmas:+.1f} standard errors"
        reason = f"{worst.relative:+.2%} of the scale {where}, {size}"
    else:
        needed = [r.replicas_needed for r in rows if r.verdict == UNDECIDED]
        hopeless = any(n is None for n in needed)
        most = max((n for n in needed if n is not None), default=0)
        reason = (
            f"a difference sits on the tolerance, {worst.relative:+.2%} {where}; no number of "
            "replicas decides it: change the tolerance"
            if hopeless
            else f"about {most} replicas decide all rows; {worst.relative:+.2%} {where}"
        )
    return Verdict(observable, worst.first, worst.second, worst.verdict, reason)


def _table(rows: tuple[ComparisonRow, ...], clock: Clock) -> list[str]:
    """Aligned plain text: words to the left, numbers to the right."""
    cells = [
        (
            "observable",
            "units",
            "second",
            "first",
            clock,
            "mean second",
            "mean first",
            "difference",
            "std. error",
            "sigmas",
            "relative",
            "verdict",
        )
    ]
    for r in rows:
        needed = "" if r.replicas_needed is None else f" (about {r.replicas_needed} needed)"
        cells.append(
            (
                r.observable,
                r.units,
                r.second,
                r.first,
                f"{r.time:.6g}",
                f"{r.mean_second:.6g}",
                f"{r.mean_first:.6g}",
                f"{r.difference:+.2e}",
                f"{r.standard_error:.1e}",
                "exact" if r.standard_error == 0.0 else f"{r.sigmas:+.1f}",
                f"{r.relative:+.2%}",
                r.verdict + needed,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = range(4, 11)
    return [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
