"""What a study leaves in memory: its runs, its claims and their verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gradflow.analysis.comparison.evaluated import EvaluatedRun
from gradflow.analysis.convergence.orders import Orders
from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.run_tables import RunSpec
from gradflow.study.spec.spec import StudySpec

ClaimVerdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class RunResult(EvaluatedRun):
    """One run of a study.

    Attributes:
        spec: the run as it was carried out.
    """

    spec: RunSpec = field(kw_only=True)


@dataclass(frozen=True)
class OrdersResult:
    """One [[orders]] table and what was measured.

    Attributes:
        name: its name in the spec.
        label: its text for figures and tables.
        spec: the table as it was carried out.
        orders: the measured distances and orders.
        notes: remarks for people.
    """

    name: str
    label: str
    spec: OrdersSpec
    orders: Orders
    notes: tuple[str, ...] = ()

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped before the last step size."""
        return self.orders.interrupted


@dataclass(frozen=True)
class ClaimResult:
    """A claim, what was measured, and whether it holds.

    Attributes:
        sentence: the claim in words.
        quantity: what was measured.
        runs: the names of the runs (or the [[orders]] table) it was measured on.
        measured: the value; NaN where it could not be measured.
        measured_error: its standard error, None where there is none.
        expected: the value it is compared with, None for a bound, a word for an agreement.
        rule: the check in words, such as "within 3 standard errors".
        verdict: "undecided" when the value was not measured or the error is too large to tell;
            it counts as not holding.
        detail: why, for people.
        parts: what it is in thirds of the window, where it is not constant over it; `measured` is
            then but the mean, and has no error.
    """

    sentence: str
    quantity: str
    runs: tuple[str, ...]
    measured: float
    measured_error: float | None
    expected: float | str | None
    rule: str
    verdict: ClaimVerdict
    detail: str = ""
    parts: tuple[float, ...] = ()


@dataclass(frozen=True)
class StudyResult:
    """Everything a study found, for figures and the page.

    Attributes:
        spec: the study as it was run.
        runs: results by run name, in the order of the spec.
        orders: results of the [[orders]] tables by name, in the order of the spec.
        claims: verdicts in the order of the spec.
        out: the folder the study writes to.
        wall_time_s: seconds from start to the last verdict.
        status: "interrupted" when Ctrl-C ended it, "failed" when a job broke.
        errors: why, by the name of the run or [[orders]] table that broke.
    """

    spec: StudySpec
    runs: dict[str, RunResult]
    claims: tuple[ClaimResult, ...]
    out: Path
    wall_time_s: float
    status: Literal["complete", "interrupted", "failed"] = "complete"
    errors: dict[str, str] = field(default_factory=dict)
    orders: dict[str, OrdersResult] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(claim.verdict == "holds" for claim in self.claims)
