"""The figure of rates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gradflow.plot.drawing import Drawing
from gradflow.plot.rates import draw_rates
from gradflow.study.figures.views import run_views
from gradflow.study.results import StudyResult
from gradflow.study.spec.figure_tables import FIGURES, RunsFigure

_RATES = ("optimization_rate", "regularization_rate", "separation")


@FIGURES.register
class Rates(RunsFigure):
    """Measured rates against predicted ones, with error bars."""

    quantities: list[Literal["optimization_rate", "regularization_rate", "separation"]] = Field(
        default_factory=lambda: list(_RATES),
        min_length=1,
        description="a list out of " + ", ".join(_RATES),
    )

    def draw(self, result: StudyResult) -> Drawing:
        """Draws one panel a rate."""
        return draw_rates(run_views(result, self.runs), **self.options)
