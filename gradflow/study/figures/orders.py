"""The figure of [[orders]] tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from gradflow.analysis.convergence.results import Orders as Measured
from gradflow.plot.drawing import Drawing, sentence
from gradflow.plot.orders import draw_orders
from gradflow.study.results import OrdersResult, StudyResult
from gradflow.study.spec.checked import Jobs
from gradflow.study.spec.errors import Fault, not_one_of
from gradflow.study.spec.figure_tables import FIGURES, FigureTable
from gradflow.study.spec.locate import Path
from gradflow.study.spec.tables import Name


@FIGURES.register
class Orders(FigureTable):
    """Distance between two dynamics against the step size, on logarithmic axes."""

    about: ClassVar[Literal["run", "orders"]] = "orders"

    orders: list[Name] = Field(
        default_factory=list, description="a list of names of [[orders]] tables (default: all)"
    )
    observables: list[str] = Field(
        default_factory=list, description="a list of their observables (default: all)"
    )

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Tables that there are not, and observables that none of them is about."""
        yield from super().faults(jobs, at)
        known = jobs.orders
        if not known:
            yield Fault(at, "draws [[orders]] tables, and the study has none; add one")
        for i, name in enumerate(self.orders):
            if name not in known:
                yield Fault((*at, "orders", i), not_one_of(name, known, what="[[orders]]"))
        tables = [known[name] for name in self.orders or known if name in known]
        measured = {name for orders in tables for name in orders.observables}
        for i, observable in enumerate(self.observables):
            if observable not in measured:
                yield Fault((*at, "observables", i), not_one_of(observable, sorted(measured)))

    def draw(self, result: StudyResult) -> Drawing:
        """Draws |difference| of the dynamics of the tables against the step size, log-log.

        With several tables every line is called after its table; with one, after its observable.

        **Raises:** ``ValueError`` when no table was measured, or nothing can be drawn.
        """
        chosen = [
            table for name, table in result.orders.items() if not self.orders or name in self.orders
        ]
        if not chosen:
            raise ValueError("orders: none of the tables was measured, so there is nothing to draw")
        parts = [_observed(table, self.observables) for table in chosen]
        observables = {row.observable for part in parts for row in part.rows}
        named = [
            _named(part, table.label, with_observable=len(observables) > 1)
            for part, table in zip(parts, chosen, strict=True)
        ]
        if len(chosen) == 1:
            return draw_orders(parts[0], self.title, self.caption)
        kinds = {part.kind if part.random else "" for part in named}
        mixed = "; ".join(f"{table.label}: {table.orders.kind}" for table in chosen)
        mixed = f"Distances: {mixed}." if len(kinds) > 1 else ""
        merged = replace(
            named[0],
            rows=tuple(row for part in named for row in part.rows),
            points=tuple(points for part in named for points in part.points),
            kind=kinds.pop() if len(kinds) == 1 else "",
            random=any(part.random for part in named),
            notes=tuple(dict.fromkeys(note for part in named for note in part.notes)),
        )
        when = ", ".join(f"{t:g}" for t in sorted({max(part.times) for part in named}))
        shared = "; ".join(dict.fromkeys(part.coupling for part in named if part.random))
        caption = sentence(
            self.caption or f"At t = {when}; one standard error; lines span the range of the fit.",
            mixed,
            f"Noise: {shared}." if shared else "",
        )
        return draw_orders(merged, self.title, caption)


def _observed(table: OrdersResult, observables: list[str]) -> Measured:
    """Returns the part of a table that is about some observables (all when there are none)."""
    orders = table.orders
    if not observables:
        return orders
    kept = [
        i for i, row in enumerate(orders.rows) if row.observable.partition("[")[0] in observables
    ]
    return replace(
        orders,
        rows=tuple(orders.rows[i] for i in kept),
        points=tuple(orders.points[i] for i in kept),
    )


def _named(orders: Measured, label: str, *, with_observable: bool) -> Measured:
    """Returns the same measurement with the label of its table in the names of its lines."""

    def name(observable: str) -> str:
        return f"{label}: {observable}" if with_observable else label

    return replace(
        orders,
        rows=tuple(replace(row, observable=name(row.observable)) for row in orders.rows),
        points=tuple(replace(p, observable=name(p.observable)) for p in orders.points),
    )
