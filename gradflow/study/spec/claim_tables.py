"""What all [[claim]] tables share: the check of a claim and what it is about.

A quantity is a model, registered in `CLAIMS`: its keys are its fields, the first sentence of its
docstring is its meaning, `measure` computes it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag

from gradflow.dynamics import GradientDescent
from gradflow.kinds import Kinds, snake_case
from gradflow.study.spec.checked import Checked, Jobs, Shapes, unknown_runs, unrecorded
from gradflow.study.spec.errors import Fault, not_one_of, shown
from gradflow.study.spec.locate import Path
from gradflow.study.spec.run_tables import RunSpec
from gradflow.study.spec.tables import Finite, Name, NonNegative, Positive, name_or

CLAIMS: Kinds[type[Claim]] = Kinds("claim quantities", snake_case)
"""The quantities of claims by name."""


@dataclass(frozen=True)
class Measurement:
    """A measured value.

    Attributes:
        value: the number.
        error: its standard error, None where there is none.
        predicted: what theory says, None where it says nothing.
        word: the value of a quantity that is a word.
        detail: how it was measured, for people.
        parts: what it is in parts of its window, where these differ: then it is not one number.
    """

    value: float
    error: float | None = None
    predicted: float | None = None
    word: str = ""
    detail: str = ""
    parts: tuple[float, ...] = ()


class Claim(Checked):
    """A sentence with a check: a quantity, what is expected of it, and how far off it may be."""

    predicts: ClassVar[bool] = False
    """Whether theory predicts the quantity, so that `expected = "predicted"` is possible."""
    words: ClassVar[tuple[str, ...]] = ()
    """The words that `expected` takes in place of a number."""

    sentence: str = Field(min_length=1, description="the claim in words")
    quantity: str = Field(description="the name of a quantity")
    expected: (
        Annotated[
            Annotated[str, Tag("=name")] | Annotated[Finite, Tag("=number")], name_or("number")
        ]
        | None
    ) = Field(default=None, description="a number, or a word such as 'predicted' or 'agree'")
    tolerance: NonNegative | None = Field(
        default=None, description="the largest |measured - expected| / |expected|, a number >= 0"
    )
    absolute_tolerance: NonNegative | None = Field(
        default=None, description="the largest |measured - expected|, a number >= 0"
    )
    standard_errors: Positive | None = Field(
        default=None,
        description="the largest |measured - expected| in standard errors, a number > 0",
    )
    resolution: Positive | None = Field(
        default=None,
        description="the allowed deviation above which the claim is undecided, a number > 0 "
        "(default: half of |expected|)",
    )
    at_most: Finite | None = Field(default=None, description="a number")
    at_least: Finite | None = Field(default=None, description="a number")
    short: bool = Field(
        default=True, description="true, or false to leave the claim out of the short variant"
    )

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of what the claim is about, in order."""

    @property
    def needs_prediction(self) -> bool:
        """Whether it compares with theory."""
        return self.expected == "predicted"

    @abstractmethod
    def measure(self, found: Sequence[Any]) -> Measurement:
        """The quantity, from the results of what the claim names: `RunResult` or `OrdersResult`.

        **Raises:** `ValueError` with the reason where it cannot be measured.
        """

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """What is wrong with the check."""
        yield from super().faults(jobs, at)
        yield from self._word(at) if self.words else self._number(at)

    def _word(self, at: Path) -> Iterator[Fault]:
        if self.expected not in self.words:
            message = f"{self.quantity} needs expected = {' or '.join(map(shown, self.words))}"
            yield Fault((*at, "expected"), message)
        for key in ("absolute_tolerance", "standard_errors", "resolution", "at_most", "at_least"):
            if getattr(self, key) is not None:
                yield Fault((*at, key), f"{self.quantity} does not use {key}; leave it out")

    def _number(self, at: Path) -> Iterator[Fault]:
        has_bound = self.at_most is not None or self.at_least is not None
        if isinstance(self.expected, str):
            words = ["predicted"] if self.predicts else []
            if self.expected not in words:
                yield Fault((*at, "expected"), not_one_of(self.expected, ["a number", *words]))
        if self.expected is None and not has_bound:
            yield Fault(at, "has no check; give expected (with a tolerance), at_most or at_least")
        if self.expected is not None and has_bound:
            message = "stands beside at_most or at_least; give only one kind of check"
            yield Fault((*at, "expected"), message)
        if self.at_most is not None and self.at_least is not None and self.at_most < self.at_least:
            message = f"got {self.at_most:g} below at_least = {self.at_least:g}"
            yield Fault((*at, "at_most"), message)
        yield from self._margins(at, has_bound)

    def _margins(self, at: Path, has_bound: bool) -> Iterator[Fault]:
        is_zero, errors = self.expected == 0, self.standard_errors
        around = (self.tolerance, self.absolute_tolerance)
        if self.expected is not None and {*around, errors} == {None}:
            message = "needs tolerance, absolute_tolerance or standard_errors beside it"
            yield Fault((*at, "expected"), message)
        if has_bound and set(around) != {None}:
            yield Fault(at, "has a tolerance, which at_most and at_least do not use; leave it out")
        if is_zero and errors is not None and self.resolution is None:
            message = (
                "is 0, so standard_errors alone cannot tell agreement from ignorance; give "
                "resolution, the largest deviation that still counts as a decision"
            )
            yield Fault((*at, "expected"), message)
        if is_zero and self.tolerance is not None:
            yield Fault((*at, "tolerance"), "is relative to expected = 0; give absolute_tolerance")
        if self.resolution is not None and errors is None:
            message = "has a meaning only beside standard_errors; leave it out"
            yield Fault((*at, "resolution"), message)


class RunsClaim(Claim):
    """A claim about runs."""

    count: ClassVar[tuple[int, int | None]] = (1, 1)
    """The smallest and the largest number of runs (None: any)."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Observables that the runs must record where the claim names none."""
    takes_arrays: ClassVar[bool] = False
    """Whether it is one number also of an observable that is an array."""
    of_weights: ClassVar[bool] = False
    """Whether it reads stored weights."""
    every_step_of: ClassVar[Literal["", "GradientDescent", "plain GradientDescent"]] = ""
    """The dynamics of which every step must be saved; plain is without momentum and optimizer."""
    of_wall_time: ClassVar[bool] = False
    """Whether it is about the time that the runs take, which are then carried out alone."""
    pools_runs: ClassVar[bool] = False
    """Whether its standard error needs no replicas, since it is of a fit to several runs."""

    run: Name | None = Field(default=None, description="the name of a run")
    runs: list[Name] | None = Field(default=None, min_length=1, description="a list of run names")

    @property
    def names(self) -> tuple[str, ...]:
        """The runs the claim is about, in order."""
        return (self.run,) if self.run is not None else tuple(self.runs or ())

    def at_runs(self, at: Path) -> Path:
        """Where the claim, which is at `at`, names its runs."""
        return (*at, "run" if self.run is not None else "runs")

    @property
    def observed(self) -> str | None:
        """The observable that it names, if its quantity takes one."""
        return getattr(self, "observable", None)

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """What is wrong with the runs that are named."""
        yield from super().faults(jobs, at)
        if (self.run is None) == (self.runs is None):
            yield Fault(at, "needs either run or runs")
            return
        if self.run is not None and self.run not in jobs.runs:
            yield Fault((*at, "run"), not_one_of(self.run, jobs.runs, what="runs"))
        yield from unknown_runs(self.runs or (), jobs, (*at, "runs"))
        least, most = self.count
        if not least <= len(self.names) <= (most or len(self.names)):
            count = str(least) if least == most else f"at least {least}"
            about = f"{self.quantity} is about {count} run{'s' * (least > 1)}"
            yield Fault(self.at_runs(at), f"got {len(self.names)}; {about}")
        runs = jobs.named(self.names)
        for run in runs:
            yield from (Fault(self.at_runs(at), text) for text in self.objections(run))
            yield from self._replicas(run, at)
        if self.observed is not None:
            yield from unrecorded(self.observed, runs, (*at, "observable"))
        else:
            yield from (f for name in self.reads for f in unrecorded(name, runs, at))

    def shape_faults(self, shapes: Shapes, at: Path) -> Iterator[Fault]:
        """An observable that is no number, where it has to be one."""
        observable = self.observed
        if observable is None or self.takes_arrays:
            return
        for name in self.names:
            if shape := shapes.get(name, {}).get(observable, ()):
                message = f"{observable} has shape {[*shape]}; {self.quantity} needs a number"
                yield Fault((*at, "observable"), message)

    def objections(self, run: RunSpec) -> Iterator[str]:
        """Why a run cannot serve the claim."""
        if self.of_weights and run.store_weights is False:
            yield f'run "{run.name}" has store_weights = false; {self.quantity} reads weights'
        if missed := self._misses_steps(run) if self.every_step_of else "":
            yield f'run "{run.name}" {missed}'

    def _misses_steps(self, run: RunSpec) -> str:
        dynamics = run.dynamics.made
        is_descent = isinstance(dynamics, GradientDescent)
        if is_descent and self.every_step_of == "plain GradientDescent":
            is_descent = dynamics.momentum is None and dynamics.optimizer is None
        if not is_descent:
            return f"is not {self.every_step_of}; {self.quantity} holds only there"
        if run.steps is None or run.save.points != run.steps + 1 or run.save.spacing != "lin":
            needs = f"{self.quantity} needs steps = K and save = {{ points = K + 1 }}"
            return f"does not save every step; {needs}"
        return ""

    def _replicas(self, run: RunSpec, at: Path) -> Iterator[Fault]:
        if self.standard_errors is None or self.pools_runs or run.replicas is None:
            return
        least = 4 if run.is_antithetic else 2
        if run.replicas < least:
            has = f'run "{run.name}" has {run.replicas} replica{"s" * (run.replicas != 1)}'
            need = f"{least} antithetic ones" if run.is_antithetic else f"{least}"
            message = f"{has}; standard errors need at least {need}"
            yield Fault((*at, "standard_errors"), message)


class OrdersClaim(Claim):
    """A claim about an observable of an [[orders]] table."""

    about: ClassVar[Literal["run", "orders"]] = "orders"

    orders: Name = Field(description="the name of an [[orders]] table")
    observable: str | None = Field(default=None, description="an observable of the table")

    @property
    def names(self) -> tuple[str, ...]:
        """The table the claim is about."""
        return (self.orders,)

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """What is wrong with the table that is named."""
        yield from super().faults(jobs, at)
        if self.orders not in jobs.orders:
            yield Fault((*at, "orders"), not_one_of(self.orders, jobs.orders, what="[[orders]]"))
        elif self.observable is not None:
            measured = jobs.orders[self.orders].observables
            if self.observable not in measured:
                yield Fault((*at, "observable"), not_one_of(self.observable, measured))
