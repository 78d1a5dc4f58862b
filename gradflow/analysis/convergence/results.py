"""What an order measurement returns: rows with verdicts, the points behind them, a table."""

from dataclasses import asdict, dataclass, fields

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from gradflow.analysis.convergence.fit import RESOLVED


@dataclass(frozen=True)
class OrderRow:
    """The order of one observable.

    - `observable`: its name, with the component of an array.
    - `order`, its interval `low` to `high` at the given `confidence`: NaN unless resolved.
    - `status`: "resolved", "not resolved" (noise), "not asymptotic" (no power law, or one that must
      not be read as an order) or "below resolution" (of the integrator).
    - `asymptotic_range`: smallest and largest step size of the fit; None unless resolved.
    - `reason`: one sentence.
    - `replicas_needed`: that would resolve it; None if it is resolved or no number is known.
    """

    observable: str
    order: float
    low: float
    high: float
    confidence: float
    status: str
    asymptotic_range: tuple[float, float] | None
    reason: str
    replicas_needed: int | None

    @property
    def resolved(self) -> bool:
        """Whether an order can be read."""
        return self.status == RESOLVED


@dataclass(frozen=True)
class OrderPoints:
    """The differences of one observable, one entry a step size, from the largest to the smallest.

    - `step_size`: h, flow time.
    - `error`: the difference; signed (first - second) where it is a difference of means or of
      numbers, a size >= 0 where it is a root mean square, a norm or a largest value.
    - `standard_error`: 0 where the difference is exact.
    - `resolution`: size below which it is the error of an integrator or rounding.
    - `replicas`: pairs used; `diverged`: pairs left out because one of the two diverged.
    - `seen`: above noise and resolution; `used`: in the fit.
    - `units`, `long_name` of the observable.
    """

    observable: str
    long_name: str
    units: str
    step_size: Float[np.ndarray, " point"]
    error: Float[np.ndarray, " point"]
    standard_error: Float[np.ndarray, " point"]
    resolution: Float[np.ndarray, " point"]
    replicas: Int[np.ndarray, " point"]
    diverged: Int[np.ndarray, " point"]
    seen: Bool[np.ndarray, " point"]
    used: Bool[np.ndarray, " point"]


@dataclass(frozen=True)
class Orders:
    """The order in h at which two dynamics agree, observable by observable.

    - `rows`: one an observable (component); `points`: the differences behind them, in the same
      order.
    - `overall`: the row that sets the order of the pair, the smallest resolved one; None if no row
      is resolved.
    - `first`, `second`: names of the dynamics; `kind`: "strong" or "weak"; `random`: whether any of
      the two is.
    - `coupling`: the noise that they share, in words.
    - `times`: flow times of the differences; the largest counts.
    - `confidence`: of each interval.
    - `notes`: what else a reader must know.
    - `interrupted`: whether step sizes are missing because the measurement was stopped.
    """

    rows: tuple[OrderRow, ...]
    points: tuple[OrderPoints, ...]
    overall: OrderRow | None
    first: str
    second: str
    kind: str
    random: bool
    coupling: str
    times: tuple[float, ...]
    confidence: float
    notes: tuple[str, ...]
    interrupted: bool

    def order(self, observable: str | None = None) -> float:
        """The order of an observable (of an array: its smallest), or of the pair.

        **Raises:** `KeyError` for an observable that was not measured, `ValueError` saying why if
        no order can be read.
        """
        if observable is None:
            if self.overall is None:
                raise ValueError(f"no order is resolved: {'; '.join(map(_why, self.rows))}")
            return self.overall.order
        rows = [r for r in self.rows if r.observable == observable]
        rows = rows or [r for r in self.rows if r.observable.startswith(f"{observable}[")]
        if not rows:
            names = ", ".join(r.observable for r in self.rows)
            raise KeyError(f"{observable!r} was not measured; these were: {names}")
        found = [r.order for r in rows if r.resolved]
        if not found:
            raise ValueError(f"no order is resolved: {'; '.join(map(_why, rows))}")
        return min(found)

    def table(self) -> pd.DataFrame:
        """The rows as a table, one column a field of `OrderRow`."""
        columns = [f.name for f in fields(OrderRow)]
        return pd.DataFrame([asdict(row) for row in self.rows], columns=columns)

    def point_table(self) -> pd.DataFrame:
        """The points as a table, one row an observable and step size."""
        columns = [f.name for f in fields(OrderPoints)]
        parts = [pd.DataFrame({c: getattr(p, c) for c in columns}) for p in self.points]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def __str__(self) -> str:
        when = ", ".join(f"{t:g}" for t in self.times)
        lines = [
            f"{_sentence(self)} at t = {when}{' (largest)' if len(self.times) > 1 else ''}",
            f"{self.coupling}; intervals of confidence {self.confidence:g}",
            "orders are extrapolated to h -> 0 and may lie beyond the local slopes",
            *self.notes,
            "",
            *_table(self.rows),
            "",
            *_points(self.points),
        ]
        return "\n".join(lines)


def _sentence(orders: Orders) -> str:
    kind = f"{orders.kind} order" if orders.random else "order"
    pair = f"{orders.first} and {orders.second}"
    if orders.overall is None:
        return f"{kind} of {pair}: not resolved"
    row = orders.overall
    number = f"{row.order:.2f} [{row.low:.2f}, {row.high:.2f}]"
    return f"{kind} of {pair}: {number}, the smallest, in {row.observable}"


def _why(row: OrderRow) -> str:
    return f"{row.observable} {row.status} ({row.reason})"


def _table(rows: tuple[OrderRow, ...]) -> list[str]:
    """Aligned plain text, one line an observable."""
    header = ("observable", "order", "low", "high", "h from", "to", "status", "reason")
    cells: list[tuple[str, ...]] = [header]
    for r in rows:
        bounds = ("", "") if r.asymptotic_range is None else r.asymptotic_range
        numbers = [f"{x:.2f}" if r.resolved else "" for x in (r.order, r.low, r.high)]
        ends = [b if isinstance(b, str) else f"{b:.4g}" for b in bounds]
        needed = f"; about {r.replicas_needed} replicas needed" if r.replicas_needed else ""
        cells.append((r.observable, *numbers, *ends, r.status, r.reason + needed))
    return _aligned(cells, range(1, 6))


def _points(points: tuple[OrderPoints, ...]) -> list[str]:
    """Aligned plain text, one line an observable and step size."""
    header = ("observable", "units", "h", "difference", "std. error", "pairs", "diverged", "")
    cells: list[tuple[str, ...]] = [header]
    for p in points:
        for i in range(p.step_size.size):
            said = "in the fit" if p.used[i] else "" if p.seen[i] else "not seen"
            if not np.isfinite(p.error[i]):
                said = "left out: diverged"
            cells.append(
                (
                    p.observable,
                    p.units,
                    f"{p.step_size[i]:.4g}",
                    f"{p.error[i]:+.3e}",
                    f"{p.standard_error[i]:.1e}",
                    str(p.replicas[i]),
                    str(p.diverged[i]),
                    said,
                )
            )
    return _aligned(cells, range(2, 7))


def _aligned(cells: list[tuple[str, ...]], numbers: range) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
