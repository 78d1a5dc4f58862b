"""Sharpness along the runs of a study, with that of the flattest minimum."""

from collections.abc import Sequence

import numpy as np

from gradflow.report.bounds import BOUNDED
from gradflow.report.drawing import Drawing
from gradflow.report.reading import RunView, run_views
from gradflow.report.time_series import draw_time_series
from gradflow.study.results import StudyResult
from gradflow.study.spec.spec import TimeSeries
from gradflow.study.spec.tables import DynamicsSpec, SlowFlow

TITLE = "Sharpness and its lower bound"

WIDE = 8.0
"""Ratio of the largest to the smallest value above which the axis is logarithmic."""


MOST_RUNS = 8
"""Runs that one panel holds; with more only slow flows are drawn."""

_TALLER = 0.6
"""Inches that the one panel is taller than those of a time series."""


def draw_sharpness(result: StudyResult) -> Drawing | None:
    """Draws the sharpness of every run that recorded it, with its lower bound at the minima.

    Of more than `MOST_RUNS` only the slow flows of finite step, where there are any.

    **Returns:** None if no run recorded a sharpness, or a figure of the spec shows it.
    """
    asked = {
        name
        for figure in result.spec.figure
        if isinstance(figure, TimeSeries) and not figure.relative
        for name in figure.observables
    }
    if asked.intersection(BOUNDED):
        return None
    for observable in BOUNDED:
        runs = _runs(result, observable)
        if runs:
            drawing = draw_time_series(result, _spec(runs, observable))
            drawing.figure.set_figheight(drawing.figure.get_figheight() + _TALLER)
            return drawing
    return None


def _runs(result: StudyResult, observable: str) -> list[RunView]:
    runs = [view for view in run_views(result, ()) if observable in view.dataset]
    slow = [view for view in runs if _is_finite_step(view.run.spec.dynamics)]
    return slow if len(runs) > MOST_RUNS and slow else runs


def _is_finite_step(dynamics: DynamicsSpec) -> bool:
    return isinstance(dynamics, SlowFlow) and dynamics.finite_step


def _spec(runs: Sequence[RunView], observable: str) -> TimeSeries:
    values = np.concatenate([view.dataset[observable].values.ravel() for view in runs])
    values = values[values > 0]
    is_wide = values.size > 0 and values.max() > WIDE * values.min()
    is_log = any(view.run.spec.save.spacing == "log" for view in runs)
    return TimeSeries(
        kind="time_series",
        title=TITLE,
        observables=[observable],
        runs=[view.name for view in runs],
        x_scale="log" if is_log else "linear",
        y_scale="log" if is_wide else "linear",
    )
