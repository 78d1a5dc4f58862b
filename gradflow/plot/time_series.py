"""Time series: observables against flow time, with bands, loss floors and the two phases."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradflow.plot.bounds import sharpness_bounds
from gradflow.plot.drawing import (
    Drawing,
    cross_marker,
    divergence_note,
    end_marker,
    legend_below,
    legend_height,
    mark_divergence,
    run_handle,
    sentence,
)
from gradflow.plot.formatting import number
from gradflow.plot.reading import (
    RunView,
    Series,
    on_common_clock,
    series,
    time_label,
)
from gradflow.plot.style import MUTED, Scale, axis_label, log_axis, new_figure, shaded

_FLOORS = {"excess_loss": "loss_floor"}
"""Observables that have a predicted plateau, and the observable that holds it."""

_OFF_MINIMA = ("excess_loss", "gradient_norm")
"""Observables that are nothing but rounding on the minima, where a slow flow lies."""

_BOUND = {"lw": 1.1, "linestyle": (0.0, (5.0, 3.0))}
_OPTIMIZATION = "#eeeeea"
_PANEL = 2.15


def draw_time_series(
    views: Sequence[RunView],
    observables: Sequence[str],
    *,
    title: str = "",
    caption: str = "",
    component: Sequence[int] | None = None,
    relative: bool = False,
    x_scale: Scale = "linear",
    y_scale: Scale | Sequence[Scale] = "linear",
    decades: float = 12.0,
    mark_phases: bool = True,
) -> Drawing:
    """Draws observables against flow time, one panel for each.

    Lines are replica means and bands hold 10 to 90 % of the replicas; colours are regularizer
    groups and strokes are dynamics. A thin line of the same colour is the loss floor, where the
    excess loss has one, and a dashed one the least sharpness of all minima. The optimization phase
    is shaded, its end marked on every line. Slow flows are not in panels of observables that are 0
    on the minima. Runs with different momenta are drawn in effective time.

    **Arguments:**

    - `views`: the runs, which recorded every one of the `observables`.
    - `title`, `caption`: texts above and below; the caption has a default.
    - `component`: the indices of one entry of an observable that is not a number.
    - `relative`: divide by the value at the start.
    - `x_scale`, `y_scale`: of the axes; `y_scale` may be one for each observable.
    - `decades`: how many of them a logarithmic axis shows below its largest value.
    - `mark_phases`: shade the optimization phase and mark its end.

    **Raises:** `ValueError` for an observable that a run lacks, or that is not a number.
    """
    views = on_common_clock(views)
    shown = [_shown(views, name) for name in observables]
    scales = [y_scale] if isinstance(y_scale, str) else list(y_scale)
    if len(scales) not in (1, len(observables)):
        raise ValueError(
            f"y_scale: {len(scales)} scales for {len(observables)} observables; "
            "give one, or one for each"
        )
    scales = scales * (len(observables) if len(scales) == 1 else 1)
    data = [
        [series(view, name, component, relative) for view in there]
        for name, there in zip(observables, shown, strict=True)
    ]
    floors = [{} if relative else _floors(views, _FLOORS.get(name)) for name in observables]
    bounds = [{} if relative else sharpness_bounds(views, name) for name in observables]
    lines = [run_handle(view) for view in views]
    marks = _mark_handles(views, any(floors), any(bounds), mark_phases)
    rows = len(observables)
    figure = new_figure(_PANEL * rows + 0.65 + legend_height(lines, marks), title)
    panels: list[Axes] = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])

    notes: list[str] = []
    start, stop = _time_limits(data, x_scale)
    for axes, there, panel, floor, bound, scale in zip(
        panels, shown, data, floors, bounds, scales, strict=True
    ):
        limits = _value_limits(there, panel, floor, bound, scale, decades)
        notes += _hidden_values(there, panel, scale, limits)
        _draw_panel(axes, there, panel, floor, scale, limits)
        _draw_bounds(axes, there, bound)
        axes.set_ylabel(axis_label(panel[0].long_name, panel[0].units, 28))
        if mark_phases:
            _mark_ends(axes, there, panel, limits)
    for axes in panels:
        axes.set_xlim(start, stop)
        if x_scale == "log":
            log_axis(axes, "x")
    panels[-1].set_xlabel(time_label(views[0].dataset))
    figure.align_ylabels(panels)
    if mark_phases:
        _shade_phases(panels, views, x_scale)
    legend_below(figure, lines, marks)
    names = " and ".join(panel[0].long_name for panel in data)
    has_start = any(s.time[0] == 0 for panel in data for s in panel)
    text = sentence(
        caption or f"{names[0].upper()}{names[1:]} against {_clock(views)}.",
        *_explanations(views, any(floors), any(bounds)),
        _slow_note(views, observables),
        "The start t = 0 is not on the log time axis." if x_scale == "log" and has_start else "",
        *notes,
        divergence_note(views),
    )
    return Drawing(figure, text)


def _shown(views: Sequence[RunView], observable: str) -> list[RunView]:
    """Returns the runs of a panel: slow flows only where they say something."""
    moving = [view for view in views if not view.is_slow]
    return moving if observable in _OFF_MINIMA and moving else list(views)


def _floors(views: Sequence[RunView], observable: str | None) -> dict[str, Series]:
    """Returns the loss floors of the runs that recorded one, by run name."""
    if observable is None:
        return {}
    found = {v.name: series(v, observable) for v in views if observable in v.dataset}
    return {name: floor for name, floor in found.items() if np.any(floor.mean > 0)}


def _time_limits(data: Sequence[Sequence[Series]], scale: str) -> tuple[float, float]:
    times = np.concatenate([s.time for panel in data for s in panel])
    if scale == "log":
        positive = times[times > 0]
        return float(positive.min()), float(times.max())
    return float(times.min()), float(times.max())


def _value_limits(
    views: Sequence[RunView],
    panel: Sequence[Series],
    floors: dict[str, Series],
    bounds: dict[str, float],
    scale: str,
    decades: float,
) -> tuple[float, float]:
    """Returns the limits of a panel, set by the runs that did not diverge altogether.

    A loss that converges exponentially would take a log axis down to rounding errors, so the axis
    shows a given number of decades below the largest value, or, where some runs have a floor,
    what lies well above or a little below their floors.
    """
    kept = [s for view, s in zip(views, panel, strict=True) if not view.diverged.all()] or panel
    means = np.concatenate([s.mean for s in [*kept, *floors.values()]])
    bands = np.concatenate([s.percentile(q) for s in kept for q in (10.0, 90.0)])
    values = np.concatenate([means, bands, list(bounds.values())])
    values = values[np.isfinite(values)]
    if scale == "linear":
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        return low - margin, high + margin
    positive = values[values > 0]
    if positive.size == 0:
        return 0.1, 1.0
    high = float(positive.max())
    plateau = [s.mean for s in floors.values()]
    shown = np.concatenate(plateau) if plateau else np.concatenate([means, list(bounds.values())])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    low = float(shown.min()) if shown.size else high
    low /= 30.0 if plateau else 1.0
    low = max(low, float(positive.min()), high * 10.0**-decades)
    margin = max((high / low) ** 0.06, 1.1)
    return low / margin, high * margin


def _hidden_values(
    views: Sequence[RunView],
    panel: Sequence[Series],
    scale: str,
    limits: tuple[float, float],
) -> list[str]:
    """Says in words what a log axis, or a missing number, keeps out of sight."""
    notes = []
    for view, curve in zip(views, panel, strict=True):
        mean, name = curve.mean, f"{view.label}, {curve.long_name}"
        if scale == "log":
            hidden = int(np.sum(mean <= 0))
            if hidden:
                notes.append(
                    f"{name}: {hidden} of {mean.size} means are zero or negative and not on the "
                    "log axis."
                )
            if np.any((mean > 0) & (mean < limits[0])):
                notes.append(f"{name}: values below {number(limits[0], 2)} leave the panel.")
        missing = int(np.sum(~np.isfinite(mean)))
        if missing and not view.diverged.all():
            notes.append(f"{name}: {missing} of {mean.size} means are not finite and not drawn.")
    return notes


def _draw_panel(
    axes: Axes,
    views: Sequence[RunView],
    panel: Sequence[Series],
    floors: dict[str, Series],
    scale: str,
    limits: tuple[float, float],
) -> None:
    for view, curve in zip(views, panel, strict=True):
        mean = curve.mean
        if len(curve.values) > 1:
            low, high = curve.percentile(10.0), curve.percentile(90.0)
            if scale == "log":
                low, high = np.maximum(low, limits[0] / 10), np.maximum(high, limits[0] / 10)
            axes.fill_between(
                curve.time, low, high, color=view.colour, alpha=0.16, lw=0, zorder=2.0
            )
        axes.plot(
            curve.time,
            np.where(mean > 0, mean, np.nan) if scale == "log" else mean,
            color=view.stroke,
            linestyle=view.style.dashes,
            linewidth=view.style.width,
            zorder=view.style.order,
        )
        if view.diverged.all():
            mark_divergence(axes, view, curve.time, np.clip(curve.mean, *limits))
        if view.name in floors:
            floor = floors[view.name]
            axes.plot(floor.time, floor.mean, color=shaded(view.colour, -0.35), lw=0.8, zorder=4.6)
    axes.set_ylim(*limits)
    if scale == "log":
        log_axis(axes, "y")


def _draw_bounds(axes: Axes, views: Sequence[RunView], bounds: dict[str, float]) -> None:
    """Draws every bound once: in the colour of its runs, or grey if they have several."""
    for bound in dict.fromkeys(bounds.values()):
        colours = {view.colour for view in views if bounds.get(view.name) == bound}
        colour = shaded(colours.pop(), -0.2) if len(colours) == 1 else MUTED
        axes.axhline(bound, color=colour, zorder=4.8, **_BOUND)


def _mark_ends(
    axes: Axes,
    views: Sequence[RunView],
    panel: Sequence[Series],
    limits: tuple[float, float],
) -> None:
    """Marks the end of the optimization phase on every line."""
    for view, curve in zip(views, panel, strict=True):
        end = view.optimization_end
        finite = np.isfinite(curve.mean)
        if not math.isfinite(end) or not finite.any():
            continue
        height = float(np.interp(end, curve.time[finite], curve.mean[finite]))
        if limits[0] <= height <= limits[1]:
            axes.plot(end, height, zorder=7, **end_marker(view.stroke))


def _shade_phases(panels: Sequence[Axes], views: Sequence[RunView], scale: str) -> None:
    """Shades the optimization phase and names both phases above the top panel."""
    ends = [v.optimization_end for v in views if math.isfinite(v.optimization_end)]
    left, right = panels[0].get_xlim()
    ends = [end for end in ends if left < end < right]
    if not ends:
        return
    first, last = min(ends), max(ends)
    for axes in panels:
        axes.axvspan(left, first, color=_OPTIMIZATION, lw=0, zorder=0)
        if last > first:
            axes.axvspan(first, last, color=_OPTIMIZATION, alpha=0.5, lw=0, zorder=0)
    to_axes = np.log if scale == "log" else np.asarray
    ticks = to_axes(np.array([left, first, last, right]))
    _, a, b, _ = (ticks - ticks[0]) / (ticks[-1] - ticks[0])
    for width, at, words, side in (
        (a, a - 0.01, "optimization", "right"),
        (1 - b, b + 0.01, "regularization", "left"),
    ):
        if width > 0.2:
            panels[0].text(
                at,
                1.04,
                words,
                transform=panels[0].transAxes,
                ha=side,
                va="bottom",
                color=MUTED,
                fontstyle="italic",
            )


def _mark_handles(
    views: Sequence[RunView], floors: bool, bounds: bool, phases: bool
) -> list[Artist]:
    handles: list[Artist] = []
    if any(view.replicas > 1 for view in views):
        handles.append(
            Patch(color=MUTED, alpha=0.25, lw=0, label="10 to 90\u00a0% of the replicas")
        )
    if floors:
        handles.append(Line2D([], [], color=MUTED, lw=0.8, label="predicted loss floor"))
    if bounds:
        handles.append(Line2D([], [], color=MUTED, label="flattest minimum", **_BOUND))
    if phases and any(math.isfinite(view.optimization_end) for view in views):
        handles.append(Line2D([], [], label="end of the optimization phase", **end_marker()))
    if any(view.diverged.all() for view in views):
        handles.append(Line2D([], [], label="diverged", **cross_marker()))
    return handles


def _explanations(views: Sequence[RunView], floors: bool, bounds: bool) -> list[str]:
    """Says what there is to see beside the lines."""
    said = []
    if _is_effective(views):
        said.append(
            "Momenta differ, so the times of all runs are effective: those of steps of size "
            "h / (1 \u2212 momentum)."
        )
    if any(view.replicas > 1 for view in views):
        said.append("Lines are replica means.")
    if floors:
        said.append(
            "Thin lines are the plateau that theory predicts for the excess loss in the "
            "regularization phase."
        )
    if bounds:
        said.append(
            "Dashed lines are the sharpness of the flattest minimum. No minimum lies below; "
            "networks on their way to one, and those that noise keeps beside it, may."
        )
    return said


def _clock(views: Sequence[RunView]) -> str:
    return "effective time" if _is_effective(views) else "flow time"


def _is_effective(views: Sequence[RunView]) -> bool:
    return any(view.pace != 1.0 for view in views)


def _slow_note(views: Sequence[RunView], observables: Sequence[str]) -> str:
    """Says what slow flows leave out."""
    if all(view.is_slow for view in views) or not any(view.is_slow for view in views):
        return ""
    note = "Slow flows start at the minimum that training without noise reaches"
    lacking = any(len(_shown(views, name)) < len(views) for name in observables)
    return f"{note}{', so they have no excess loss' if lacking else ''}."
