"""The figure of observables along runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Discriminator, Field, Tag

from gradflow.plot.drawing import Drawing
from gradflow.plot.time_series import draw_time_series
from gradflow.study.figures.views import run_views
from gradflow.study.results import StudyResult
from gradflow.study.spec.checked import Jobs, Shapes, unfit_entry
from gradflow.study.spec.errors import Fault
from gradflow.study.spec.figure_tables import FIGURES, RunsFigure, Scale
from gradflow.study.spec.locate import Path
from gradflow.study.spec.tables import Positive


@FIGURES.register
class TimeSeries(RunsFigure):
    """Observables against flow time, one panel an observable."""

    observables: list[str] = Field(min_length=1, description="a list of recorded observables")
    component: list[int] | None = Field(
        default=None, description="indices of one entry of an observable that is not a number"
    )
    x_scale: Scale = Field(default="linear", description="'linear' or 'log'")
    y_scale: Annotated[
        Annotated[Scale, Tag("=scale")] | Annotated[list[Scale], Tag("=list")],
        Discriminator(lambda value: "=list" if isinstance(value, list) else "=scale"),
    ] = Field(
        default="linear", description="'linear' or 'log', or a list of one for each observable"
    )
    decades: Positive = Field(
        default=12.0, description="decades a log axis shows below its largest value, a number > 0"
    )
    relative: bool = Field(
        default=False, description="true (divide by the value at the start) or false"
    )
    mark_phases: bool = Field(
        default=True, description="true (mark the end of the optimization phase) or false"
    )

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Also scales that are not one for each observable, and what is not recorded."""
        yield from super().faults(jobs, at)
        count, scales = len(self.observables), self.y_scale
        if isinstance(scales, list) and len(scales) != count:
            message = f"got {len(scales)} scales for {count} observables"
            yield Fault((*at, "y_scale"), message)
        yield from self.observable_faults(self.observables, jobs, at)

    def shape_faults(self, shapes: Shapes, at: Path) -> Iterator[Fault]:
        """Observables that are no number and of which no entry is chosen."""
        for observable in self.observables:
            for name in self.runs or shapes:
                if shape := shapes.get(name, {}).get(observable, ()):
                    yield from unfit_entry(observable, self.component, shape, (*at, "component"))

    def draw(self, result: StudyResult) -> Drawing:
        """Draws one panel an observable."""
        return draw_time_series(run_views(result, self.runs), **self.options)
