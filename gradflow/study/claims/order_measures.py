"""Measures that read [[orders]] tables."""

from __future__ import annotations

from scipy.special import ndtri

from gradflow.analysis.convergence.results import OrderRow
from gradflow.study.claims.measurement import Measurement
from gradflow.study.results import OrdersResult
from gradflow.study.spec.spec import ClaimSpec


def measure_order(claim: ClaimSpec, result: OrdersResult) -> Measurement:
    """The order of an observable (of an array: its smallest) or of the pair; or its status.

    **Raises:** `ValueError` with the reason where no order can be read.
    """
    rows = _rows(claim, result)
    resolved = [row for row in rows if row.resolved]
    if claim.quantity == "order_status":
        row = min(resolved, key=lambda row: row.order) if resolved else rows[0]
        return Measurement(row.order, word=row.status, detail=f"{row.observable}: {row.reason}")
    if not resolved:
        why = "; ".join(f"{row.observable}: {row.status}, {row.reason}" for row in rows)
        raise ValueError(f"no order is resolved: {why}")
    row = min(resolved, key=lambda row: row.order)
    error = (row.high - row.low) / (2 * float(ndtri(0.5 + row.confidence / 2)))
    interval = f"{100 * row.confidence:g}% in [{row.low:.3g}, {row.high:.3g}]"
    return Measurement(row.order, error, detail=f"{row.observable}: {interval}")


def _rows(claim: ClaimSpec, result: OrdersResult) -> list[OrderRow]:
    """The rows of the claim's observable; without one, of the pair."""
    rows = list(result.orders.rows)
    if claim.observable is None:
        return rows if result.orders.overall is None else [result.orders.overall]
    return [row for row in rows if row.observable.partition("[")[0] == claim.observable]
