"""Keys that several quantities have, and quantities that are about another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from gradflow.study.spec.checked import Jobs, Shapes, unfit_entry
from gradflow.study.spec.claim_tables import CLAIMS, RunsClaim
from gradflow.study.spec.errors import Fault, not_one_of, shown
from gradflow.study.spec.locate import Path
from gradflow.study.spec.tables import NonNegative, Section


class OfObservable(RunsClaim):
    """A claim about an observable."""

    observable: str = Field(description="an observable the run records")

    def entry_faults(
        self, key: str, entry: list[int] | None, shapes: Shapes, at: Path
    ) -> Iterator[Fault]:
        """Indices at a key that do not choose one number of the observable."""
        for name in self.names:
            if self.observable in shapes.get(name, {}):
                shape = shapes[name][self.observable]
                yield from unfit_entry(self.observable, entry, shape, (*at, key))


class WithObservable(RunsClaim):
    """A claim that may name an observable."""

    observable: str | None = Field(default=None, description="an observable the run records")


class OfComponent(OfObservable):
    """A claim about an observable or one entry of it."""

    component: list[int] | None = Field(
        default=None, description="indices of one entry of the observable"
    )

    def shape_faults(self, shapes: Shapes, at: Path) -> Iterator[Fault]:
        """Indices that do not choose one number."""
        if self.component is not None or not self.takes_arrays:
            yield from self.entry_faults("component", self.component, shapes, at)


class WithWindow(RunsClaim):
    """A claim that may be about a part of the time."""

    window: list[NonNegative] | None = Field(
        default=None, min_length=2, max_length=2, description="[start, stop] in flow time"
    )

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Also a window that ends before it starts."""
        yield from super().faults(jobs, at)
        if self.window is not None and self.window[1] <= self.window[0]:
            message = f"got {shown(self.window)}; allowed: [start, stop], start < stop"
            yield Fault((*at, "window"), message)


class WithTheory(RunsClaim):
    """A claim that may choose the theory that predicts."""

    theory: Literal["leading_order", "finite_step"] | None = Field(
        default=None,
        description="the prediction of which theory: 'leading_order' or 'finite_step' (default: "
        "of the run's own dynamics)",
    )

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Also a theory that is not asked."""
        yield from super().faults(jobs, at)
        if self.theory is not None and not self.needs_prediction:
            yield Fault((*at, "theory"), 'has a meaning only beside expected = "predicted"')


class OfQuantity(WithObservable):
    """A claim about another quantity, to which it hands its keys."""

    of: str = Field(description="the quantity an exponent or ratio is about")

    @classmethod
    def fitting(cls) -> list[str]:
        """The quantities that it can be about."""
        return measurable(cls)

    def inner(self, run: str) -> RunsClaim:
        """The claim about that quantity in one run."""
        return claim_about(self.of, run, self)

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Also what is wrong with the runs or keys of that quantity."""
        yield from super().faults(jobs, at)
        if self.of not in self.fitting():
            yield Fault((*at, "of"), not_one_of(self.of, self.fitting()))
            return
        if self.observable is None and "observable" in own_keys(CLAIMS[self.of], required=True):
            yield Fault(at, f"{self.of} needs an observable")
            return
        for key in unused_keys(self.of, self):
            yield Fault((*at, key), f"{self.of} does not use {key}; leave it out")
        for run in jobs.named(self.names):
            objections = self.inner(run.name).objections(run)
            yield from (Fault(self.at_runs(at), text) for text in objections)

    def shape_faults(self, shapes: Shapes, at: Path) -> Iterator[Fault]:
        """What that quantity objects to."""
        for name in self.names:
            yield from self.inner(name).shape_faults(shapes, at)


def own_keys(claim: type[Section], *, required: bool = False) -> set[str]:
    """The keys that a quantity has beside those of all claims about runs, or those it requires."""
    fields = claim.model_fields
    own = set(fields) - set(RunsClaim.model_fields)
    return {key for key in own if fields[key].is_required()} if required else own


def unused_keys(quantity: str, table: Section) -> list[str]:
    """The keys given in a table that other quantities take from it but this one does not."""
    known = set().union(*(own_keys(CLAIMS[name]) for name in measurable(type(table))))
    unused = known & set(type(table).model_fields) - own_keys(CLAIMS[quantity])
    return sorted(key for key in unused if getattr(table, key) not in (None, False))


def measurable(table: type[Section]) -> list[str]:
    """The quantities of one run whose required keys another table has."""
    return [
        name
        for name, claim in CLAIMS.items()
        if issubclass(claim, RunsClaim)
        and not issubclass(claim, OfQuantity)
        and claim.count == (1, 1)
        and own_keys(claim, required=True) <= set(table.model_fields)
    ]


def claim_about(quantity: str, run: str, table: Section) -> RunsClaim:
    """The claim about a quantity of one run that takes its own keys from another table."""
    model = CLAIMS[quantity]
    keys = {key: getattr(table, key, None) for key in own_keys(model)}
    given = {key: value for key, value in keys.items() if value is not None}
    claim = model.model_validate({"sentence": quantity, "quantity": quantity, "run": run, **given})
    assert isinstance(claim, RunsClaim)
    return claim
