"""Quantities of [[orders]] tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from scipy.special import ndtri

from gradflow.analysis.convergence.results import OrderRow
from gradflow.study.results import OrdersResult
from gradflow.study.spec.checked import Jobs
from gradflow.study.spec.claim_tables import CLAIMS, Measurement, OrdersClaim
from gradflow.study.spec.errors import Fault
from gradflow.study.spec.locate import Path


@CLAIMS.register
class Order(OrdersClaim):
    """Measured order of the distance between two dynamics, of an observable of an [[orders]]
    table.
    """

    def measure(self, found: Sequence[OrdersResult]) -> Measurement:
        """The order of an observable (of an array: its smallest) or of the pair."""
        rows = _rows(self, found[0])
        row = _smallest(rows)
        if row is None:
            why = "; ".join(f"{row.observable}: {row.status}, {row.reason}" for row in rows)
            raise ValueError(f"no order is resolved: {why}")
        error = (row.high - row.low) / (2 * float(ndtri(0.5 + row.confidence / 2)))
        interval = f"{100 * row.confidence:g}% in [{row.low:.3g}, {row.high:.3g}]"
        return Measurement(row.order, error, detail=f"{row.observable}: {interval}")


@CLAIMS.register
class OrderStatus(OrdersClaim):
    """Whether an [[orders]] table resolves the order of an observable."""

    words: ClassVar[tuple[str, ...]] = (
        "resolved",
        "not resolved",
        "not asymptotic",
        "below resolution",
    )

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Also an observable that is not named though there are several."""
        yield from super().faults(jobs, at)
        table = jobs.orders.get(self.orders)
        if self.observable is None and table is not None and len(table.observables) > 1:
            yield Fault(at, "needs an observable: the [[orders]] table has several")

    def measure(self, found: Sequence[OrdersResult]) -> Measurement:
        """The status of an observable (of an array: where its order is smallest) or of the pair."""
        rows = _rows(self, found[0])
        row = _smallest(rows) or rows[0]
        return Measurement(row.order, word=row.status, detail=f"{row.observable}: {row.reason}")


def _rows(claim: OrdersClaim, result: OrdersResult) -> list[OrderRow]:
    """The rows of the claim's observable; without one, of the pair."""
    rows = list(result.orders.rows)
    if claim.observable is None:
        return rows if result.orders.overall is None else [result.orders.overall]
    return [row for row in rows if row.observable.partition("[")[0] == claim.observable]


def _smallest(rows: Sequence[OrderRow]) -> OrderRow | None:
    """The row of the smallest order that is resolved."""
    return min((row for row in rows if row.resolved), key=lambda row: row.order, default=None)
