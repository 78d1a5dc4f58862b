"""Sharpness along the runs of a study, with that of the flattest minimum."""

from collections.abc import Sequence

import numpy as np

from gradflow.plot.bounds import BOUNDED
from gradflow.plot.drawing import Drawing
from gradflow.plot.reading import RunView
from gradflow.plot.time_series import draw_time_series

TITLE = "Sharpness and its lower bound"

WIDE = 8.0
"""Ratio of the largest to the smallest value above which the axis is logarithmic."""


MOST_RUNS = 8
"""Runs that one panel holds; with more only slow flows are drawn."""

_TALLER = 0.6
"""Inches that the one panel is taller than those of a time series."""


def draw_sharpness(views: Sequence[RunView]) -> Drawing | None:
    """Draws the sharpness of every run that recorded it, with its lower bound at the minima.

    Of more than `MOST_RUNS` only the slow flows of finite step, where there are any. The time axis
    is logarithmic where some run was saved so.

    **Returns:** None if no run recorded a sharpness.
    """
    for observable in BOUNDED:
        shown = _shown(views, observable)
        if shown:
            drawing = draw_time_series(
                shown,
                [observable],
                title=TITLE,
                x_scale="log" if any(_is_logarithmic(view) for view in shown) else "linear",
                y_scale="log" if _is_wide(shown, observable) else "linear",
            )
            drawing.figure.set_figheight(drawing.figure.get_figheight() + _TALLER)
            return drawing
    return None


def _shown(views: Sequence[RunView], observable: str) -> list[RunView]:
    runs = [view for view in views if observable in view.dataset]
    slow = [view for view in runs if _is_finite_step(view)]
    return slow if len(runs) > MOST_RUNS and slow else runs


def _is_finite_step(view: RunView) -> bool:
    dynamics = view.run.trajectory.dynamics
    return dynamics.is_slow and dynamics.theory_options()["discrete"]


def _is_wide(views: Sequence[RunView], observable: str) -> bool:
    values = np.concatenate([view.dataset[observable].values.ravel() for view in views])
    values = values[values > 0]
    return bool(values.size) and bool(values.max() > WIDE * values.min())


def _is_logarithmic(view: RunView) -> bool:
    """Returns whether the later gaps between saved times are much wider than the first ones."""
    gaps = np.diff(view.dataset["time"].values)
    return gaps.size > 1 and bool(gaps[-1] > WIDE * gaps[0])
