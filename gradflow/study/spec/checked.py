"""Tables that are checked beside the rest of their spec, and the checks that several make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from gradflow.observables import BUILT_IN, DEFAULT
from gradflow.study.spec.errors import Fault, not_one_of
from gradflow.study.spec.locate import Path
from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.run_tables import RunSpec
from gradflow.study.spec.tables import Section

Shapes: TypeAlias = Mapping[str, Mapping[str, tuple[int, ...]]]
"""The shape of every observable at one time of one path, by run and observable."""


@dataclass(frozen=True)
class Jobs:
    """The runs and the [[orders]] tables of a study by name."""

    runs: Mapping[str, RunSpec]
    orders: Mapping[str, OrdersSpec]

    def named(self, names: Iterable[str]) -> list[RunSpec]:
        """The runs of some names, as far as there are such."""
        return [self.runs[name] for name in names if name in self.runs]


class Checked(Section):
    """A table that is about runs or [[orders]] tables of its study."""

    about: ClassVar[Literal["run", "orders"]] = "run"
    """Which of them; without these there is nothing to do with it."""

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """What is wrong with the table, at `at`, beside what it is about."""
        yield from ()

    def shape_faults(self, shapes: Shapes, at: Path) -> Iterator[Fault]:
        """What is wrong with it beside the shapes of what the runs record."""
        yield from ()


def unknown_runs(names: Iterable[str], jobs: Jobs, at: Path) -> Iterator[Fault]:
    """The names in a list that no run has."""
    for i, name in enumerate(names):
        if name not in jobs.runs:
            yield Fault((*at, i), not_one_of(name, jobs.runs, what="runs"))


def unrecorded(observable: str, runs: Iterable[RunSpec], at: Path) -> Iterator[Fault]:
    """Runs that do not record an observable; or that there is no such observable."""
    if observable not in BUILT_IN:
        yield Fault(at, not_one_of(observable, BUILT_IN))
        return
    for run in runs:
        recorded = run.observables or DEFAULT
        if observable not in recorded:
            has = f'run "{run.name}" records'
            yield Fault(at, not_one_of(observable, recorded, what=has))


def unfit_entry(
    observable: str, entry: list[int] | None, shape: tuple[int, ...], at: Path
) -> Iterator[Fault]:
    """Indices, at the key `at`, that do not choose one number of an observable."""
    chosen = entry or []
    fits = len(chosen) == len(shape) and all(
        -size <= index < size for index, size in zip(chosen, shape, strict=True)
    )
    if fits:
        return
    given = "is missing" if entry is None else f"got {entry}"
    kind = f"has shape {[*shape]}; give the indices of one entry" if shape else "is a number"
    yield Fault(at, f"{given}; {observable} {kind}")
