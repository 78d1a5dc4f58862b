"""Conservation: how far an observable has moved from its start, down to rounding."""

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradflow.plot.drawing import (
    Drawing,
    cross_marker,
    divergence_note,
    legend_below,
    legend_height,
    mark_divergence,
    run_handle,
    sentence,
)
from gradflow.plot.reading import RunView, drift, observable_label, time_label
from gradflow.plot.style import MUTED, Scale, axis_label, log_axis, new_figure

_PANEL = 2.5


def draw_conservation(
    views: Sequence[RunView],
    observables: Sequence[str] = ("imbalance",),
    *,
    title: str = "",
    caption: str = "",
    x_scale: Scale = "linear",
) -> Drawing:
    r"""Draws $\max |x(t) - x(0)|$ against flow time on a log axis, one panel for each observable.

    The largest value over the entries of the observable and over replicas is shown. A grey line
    is the level of rounding, $\epsilon \max |x(0)|$ with the machine precision $\epsilon$ of the
    run's numbers: what lies there is conserved as well as these numbers can say.

    **Arguments:**

    - `views`: the runs, saved from their start on, which recorded every one of the `observables`.
    - `title`, `caption`: texts above and below; the caption has a default.
    - `x_scale`: of the time axis.

    **Raises:** `ValueError` for an observable that a run lacks, or a run not saved at its start.
    """
    lines = [run_handle(view) for view in views]
    marks: list[Artist] = [
        Line2D(
            [], [], color=MUTED, lw=0.9, ls=(0.0, (1.0, 1.0)), label="machine precision \u00d7 x(0)"
        )
    ]
    if any(view.diverged.all() for view in views):
        marks.append(Line2D([], [], label="diverged", **cross_marker()))
    rows = len(observables)
    figure = new_figure(_PANEL * rows + 0.65 + legend_height(lines, marks), title)
    panels: list[Axes] = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    notes: list[str] = []
    for axes, observable in zip(panels, observables, strict=True):
        notes += _draw_panel(axes, views, observable)
    times = np.concatenate([view.dataset["time"].values for view in views])
    for axes in panels:
        axes.set_xlim(times[times > 0].min() if x_scale == "log" else 0.0, times.max())
        if x_scale == "log":
            log_axis(axes, "x")
    panels[-1].set_xlabel(time_label(views[0].dataset))
    figure.align_ylabels(panels)
    legend_below(figure, lines, marks)
    caption = sentence(
        caption
        or "How far each quantity has moved from its start: the largest change over entries and "
        "replicas.",
        *notes,
        divergence_note(views),
    )
    return Drawing(figure, caption)


def _draw_panel(axes: Axes, views: Sequence[RunView], observable: str) -> list[str]:
    """Draws one observable of every run; returns what has to be said about it."""
    notes, shown, levels, lost = [], [], [], []
    for view in views:
        time, change, level = drift(view, observable)
        levels.append(level)
        visible = np.isfinite(change) & (change > 0)
        if view.diverged.all():
            lost.append((view, time, np.where(visible, change, np.nan)))
        else:
            shown.append(change[visible])
        axes.plot(
            time,
            np.where(visible, change, np.nan),
            color=view.stroke,
            linestyle=view.style.dashes,
            linewidth=view.style.width,
            zorder=view.style.order,
        )
        zeros = int(np.sum(change[1:] == 0.0))
        if zeros == change.size - 1:
            notes.append(f"{view.label} does not move at all (exactly 0) and has no line.")
        elif zeros:
            notes.append(
                f"{view.label}: {zeros} of {change.size - 1} changes are exactly 0 and have no "
                "place on the log axis."
            )
    level = max(levels)
    values = np.concatenate([*shown, [level]])
    low, high = max(float(values.min()), level * 1e-2), float(values.max())
    if any(np.any(s < low) for s in shown):
        notes.append("Values below a hundredth of the rounding level leave the panel.")
    axes.set_ylim(low / 3.0, max(high, 10.0 * low) * 3.0)
    for view, time, change in lost:
        mark_divergence(axes, view, time, np.clip(change, *axes.get_ylim()))
    log_axis(axes, "y")
    axes.axhline(level, color=MUTED, lw=0.9, ls=(0.0, (1.0, 1.0)), zorder=1.5)
    name, units = observable_label(views[0], observable)
    axes.set_ylabel(axis_label(f"change of {name}", units, 34))
    return notes
