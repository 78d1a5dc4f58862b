"""The figure of a quantity against a parameter of the runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from gradflow.plot.drawing import Drawing, divergence_note
from gradflow.plot.reading import RunView
from gradflow.plot.scaling import Point, draw_scaling
from gradflow.study.figures.views import run_views
from gradflow.study.results import StudyResult
from gradflow.study.spec.checked import Jobs, unrecorded
from gradflow.study.spec.claim_keys import claim_about, measurable, own_keys, unused_keys
from gradflow.study.spec.claim_tables import CLAIMS
from gradflow.study.spec.errors import Fault, not_one_of
from gradflow.study.spec.figure_tables import FIGURES, Interval, RunsFigure
from gradflow.study.spec.locate import Path
from gradflow.study.spec.run_tables import parameters
from gradflow.study.spec.tables import Finite


@FIGURES.register
class Scaling(RunsFigure):
    """A quantity of many runs against one of their parameters, on logarithmic axes."""

    quantity: str = Field(description="a quantity of one run, as in claims")
    parameter: str = Field(
        description="a parameter of the runs, such as 'step_size' or 'LabelNoise.std'"
    )
    observable: str | None = Field(default=None, description="an observable the runs record")
    component: list[int] | None = Field(
        default=None, description="indices of one entry of the observable"
    )
    window: Interval | None = Field(default=None, description="[start, stop] in flow time")
    slope: Finite | None = Field(default=None, description="slope of a line to compare with")

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Also a quantity that there is not, and what the runs do not have."""
        yield from super().faults(jobs, at)
        if self.quantity not in (known := measurable(Scaling)):
            yield Fault((*at, "quantity"), not_one_of(self.quantity, known))
        else:
            yield from self._keys_of_quantity(jobs, at)
        for run in self.drawn(jobs):
            if self.parameter not in (known := parameters(run)):
                has = f'run "{run.name}" has'
                yield Fault((*at, "parameter"), not_one_of(self.parameter, known, what=has))
                return

    def _keys_of_quantity(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        unused = unused_keys(self.quantity, self)
        for key in unused:
            does_not = "takes no" if key == "observable" else "does not use"
            yield Fault((*at, key), f"{self.quantity} {does_not} {key}; leave it out")
        if self.observable is None:
            if "observable" in own_keys(CLAIMS[self.quantity], required=True):
                yield Fault(at, f"{self.quantity} needs an observable")
        elif "observable" not in unused:
            yield from unrecorded(self.observable, self.drawn(jobs), (*at, "observable"))

    def draw(self, result: StudyResult) -> Drawing:
        """Draws one point a run."""
        views = run_views(result, self.runs)
        points, notes = self._points(result, views)
        pointless = [view for view in views if view.name not in {p.view.name for p in points}]
        return draw_scaling(
            points,
            self.quantity,
            self.parameter,
            title=self.title,
            caption=self.caption,
            observable=self.observable,
            slope=self.slope,
            notes=[*notes, divergence_note(pointless)],
        )

    def _points(
        self, result: StudyResult, views: Sequence[RunView]
    ) -> tuple[list[Point], list[str]]:
        """What is measured on every run, as in claims, and why others have no point."""
        points, notes = [], []
        for view in views:
            run = result.runs[view.name]
            known = parameters(run.spec)
            if self.parameter not in known:
                raise ValueError(
                    f"parameter: run {view.name!r} has no {self.parameter!r}; it has "
                    f"{sorted(known)}"
                )
            try:
                measured = claim_about(self.quantity, view.name, self).measure([run])
            except ValueError as error:
                notes.append(f"{view.label} has no point: {error}.")
                continue
            error = 0.0 if measured.error is None else measured.error
            points.append(Point(view, known[self.parameter], measured.value, error))
        return points, notes
