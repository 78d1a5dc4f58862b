"""What all [[figure]] tables share.

A kind of figure is a model, registered in `FIGURES`: its keys are its fields, `draw` draws it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from gradflow.kinds import Kinds, snake_case
from gradflow.plot.drawing import Drawing
from gradflow.study.spec.checked import Checked, Jobs, unknown_runs, unrecorded
from gradflow.study.spec.errors import Fault
from gradflow.study.spec.locate import Path
from gradflow.study.spec.run_tables import RunSpec
from gradflow.study.spec.tables import NAME, Finite, Name

FIGURES: Kinds[type[FigureTable]] = Kinds("figures", snake_case)
"""The kinds of figures by name."""

Interval = Annotated[list[Finite], Field(min_length=2, max_length=2)]
Scale = Literal["linear", "log"]


class FigureTable(Checked):
    """What every figure has."""

    kind: str = Field(description="the name of a kind of figure")
    name: Name | None = Field(default=None, description=NAME)
    title: str = Field(default="", description="text above the figure")
    caption: str = Field(default="", description="text below the figure")

    @abstractmethod
    def draw(self, result: Any) -> Drawing:
        """Draws the figure of what a study found, a `StudyResult`.

        **Raises:** `ValueError` with the reason where it cannot be drawn.
        """


class RunsFigure(FigureTable):
    """A figure of runs."""

    runs: list[Name] = Field(
        default_factory=list, description="a list of run names (default: all runs)"
    )

    @property
    def options(self) -> dict[str, Any]:
        """Its keys, as a function takes them that draws runs."""
        return {
            key: getattr(self, key)
            for key in type(self).model_fields
            if key not in ("kind", "name", "runs")
        }

    def drawn(self, jobs: Jobs) -> list[RunSpec]:
        """The runs that it shows."""
        return jobs.named(self.runs or jobs.runs)

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Runs that there are not."""
        yield from super().faults(jobs, at)
        yield from unknown_runs(self.runs, jobs, (*at, "runs"))

    def observable_faults(
        self, observables: Sequence[str], jobs: Jobs, at: Path
    ) -> Iterator[Fault]:
        """Observables of its list that a run does not record."""
        for i, observable in enumerate(observables):
            yield from unrecorded(observable, self.drawn(jobs), (*at, "observables", i))
