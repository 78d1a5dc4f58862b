"""The figure of the plane of two weights."""

from __future__ import annotations

from pydantic import Field

from gradflow.plot.drawing import Drawing
from gradflow.plot.phase_portrait import draw_phase_portrait
from gradflow.study.figures.views import run_views
from gradflow.study.results import StudyResult
from gradflow.study.spec.figure_tables import FIGURES, Interval, RunsFigure


@FIGURES.register
class PhasePortrait(RunsFigure):
    """Paths in the plane of two weights, with the minima manifold and the flow."""

    replicas: int = Field(
        default=3, ge=0, description="single replicas drawn beside the mean, a whole number >= 0"
    )
    xlim: Interval | None = Field(default=None, description="[low, high] for the first weight")
    ylim: Interval | None = Field(default=None, description="[low, high] for the second weight")

    def draw(self, result: StudyResult) -> Drawing:
        """Draws the plane."""
        return draw_phase_portrait(run_views(result, self.runs), **self.options)
