"""The figure of what a run conserves."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from gradflow.plot.conservation import draw_conservation
from gradflow.plot.drawing import Drawing
from gradflow.study.figures.views import run_views
from gradflow.study.results import StudyResult
from gradflow.study.spec.checked import Jobs
from gradflow.study.spec.errors import Fault
from gradflow.study.spec.figure_tables import FIGURES, RunsFigure, Scale
from gradflow.study.spec.locate import Path


@FIGURES.register
class Conservation(RunsFigure):
    """How far observables move from their start, against flow time."""

    observables: list[str] = Field(
        default_factory=lambda: ["imbalance"],
        min_length=1,
        description="a list of recorded observables",
    )
    x_scale: Scale = Field(default="linear", description="'linear' or 'log'")

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Also observables that are not recorded."""
        yield from super().faults(jobs, at)
        yield from self.observable_faults(self.observables, jobs, at)

    def draw(self, result: StudyResult) -> Drawing:
        """Draws one panel an observable."""
        return draw_conservation(run_views(result, self.runs), **self.options)
