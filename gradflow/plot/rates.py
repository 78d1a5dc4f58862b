"""Rates: what was measured, with its interval, against what theory predicts."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gradflow.plot.drawing import Drawing, divergence_note, legend_below, legend_height, sentence
from gradflow.plot.formatting import number
from gradflow.plot.reading import RunView, diverged_text
from gradflow.plot.style import INK, MUTED, axis_label, log_axis, new_figure, shaded

_TITLES = {
    "optimization_rate": ("optimization rate", "1/flow time"),
    "regularization_rate": ("decay rate of the imbalance", "1/flow time"),
    "separation": ("separation of the phases", "1"),
}
_REASON = 66
"""Characters of a reason that a row holds; half as many beside a prediction."""

_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class _Row:
    """One run: measured value with its bar, the prediction, or why there is none.

    `sampled`: whether the bar is a 95 % interval; else it spans thirds of the window. `mixed`:
    both, a ratio of such and such. `constant`: whether it is one number at all.
    """

    measured: float
    low: float
    high: float
    predicted: float
    reason: str
    constant: bool = True
    sampled: bool = True
    mixed: bool = False


def draw_rates(
    views: Sequence[RunView],
    *,
    title: str = "",
    caption: str = "",
    quantities: Sequence[str] = tuple(_TITLES),
) -> Drawing:
    """Draws measured rates with 95 % intervals against predicted ones, one row for each run.

    A dotted bar spans thirds of the window: of a rate that is not constant, and of one path, which
    has no interval. That of a ratio takes in the interval of a part that has one.

    One panel for each of ``quantities``: ``optimization_rate`` (how fast the excess loss
    decays), ``regularization_rate`` (how fast the imbalance decays afterwards) and ``separation``
    (their ratio). A run without a rate says why.

    **Arguments:**

    - `views`: the runs, with what was measured and predicted of them.
    - `title`, `caption`: texts above and below; the caption has a default.
    """
    table = {quantity: [_row(view, quantity) for view in views] for quantity in quantities}
    marks = _handles(row for rows in table.values() for row in rows)
    lines = sum(_row_label(view).count("\n") + 1.6 for view in views)
    panel = 0.16 * max(lines, 4.0) + 0.75
    figure = new_figure(
        panel * len(quantities) + 0.45 + legend_height(marks[:-1], marks[-1:]), title
    )
    panels = figure.subplots(len(quantities), 1, squeeze=False)[:, 0]
    for axes, quantity in zip(panels, quantities, strict=True):
        _draw_panel(axes, views, table[quantity])
        name, units = _TITLES[quantity]
        axes.set_xlabel(axis_label(name, units))
        axes.set_yticks(range(len(views)), [_row_label(view) for view in views])
        axes.set_ylim(len(views) - 0.4, -0.6)
    figure.align_ylabels(panels)
    legend_below(figure, marks[:-1], marks[-1:])
    return Drawing(figure, _caption(views, table, caption))


def _row_label(view: RunView) -> str:
    count = int(view.diverged.sum())
    lines = textwrap.wrap(view.label, 30) or [view.name]
    return "\n".join([*lines, f"({diverged_text(count, view.replicas)})"] if count else lines)


def _row(view: RunView, quantity: str) -> _Row:
    """Reads one quantity of one run."""
    phases, rate, prediction = view.run.phases, view.run.rate, view.run.prediction
    measured, low, high = math.nan, math.nan, math.nan
    constant, sampled, mixed = True, True, False
    remarks = view.run.notes if phases is None else (phases.reason, phases.note)
    reason = "; ".join(text for text in remarks if text)
    if view.is_slow and quantity != "regularization_rate":
        reason = "a slow flow starts at a minimum"
    if quantity == "regularization_rate":
        if rate is not None:
            measured, low, high = rate.value, rate.low, rate.high
            sampled = math.isfinite(rate.standard_error)
            if not rate.constant:
                low, high, constant = min(rate.local), max(rate.local), False
            elif not sampled and number(low) == number(high):
                low = high = math.nan  # to the digits shown the thirds are the same
        predicted = math.nan if prediction is None else prediction.imbalance_rate
    elif quantity == "optimization_rate":
        if phases is not None:
            measured, constant = phases.optimization_rate, phases.optimization_rate_constant
            low, high = phases.optimization_range(_NORMAL_95)
        predicted = math.nan if prediction is None else prediction.optimization_rate
    else:
        if phases is not None:
            measured, constant = phases.separation, not phases.changing
            low, high = phases.separation_range(_NORMAL_95)
            mixed = not constant and math.isfinite(phases.separation_error)
        predicted = math.nan if prediction is None else prediction.separation
    sampled = sampled and constant
    reason = reason or "not measured"
    return _Row(measured, low, high, predicted, reason, constant, sampled, mixed)


def _draw_panel(axes: Axes, views: Sequence[RunView], rows: Sequence[_Row]) -> None:
    values = np.array([v for r in rows for v in (r.measured, r.low, r.high, r.predicted)])
    values = values[np.isfinite(values)]
    wide = bool(values.size and values.min() > 0 and values.max() > 8 * values.min())
    for y, (view, row) in enumerate(zip(views, rows, strict=True)):
        axes.axhline(y, color="#ececec", lw=0.8, zorder=0)
        if math.isfinite(row.predicted):
            axes.plot(row.predicted, y, zorder=3, **_predicted(INK))
        if math.isfinite(row.measured):
            colour = shaded(view.colour, -0.1)
            if math.isfinite(row.low) and math.isfinite(row.high):
                axes.plot([row.low, row.high], [y, y], zorder=4, **_bar(colour, row.sampled))
            axes.plot(row.measured, y, zorder=5, **_measured(colour))
    if values.size:
        _set_limits(axes, float(values.min()), float(values.max()), wide)
    else:
        axes.set_xticks([])
    for y, row in enumerate(rows):
        if not math.isfinite(row.measured):
            _write_reason(axes, y, row, wide)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _set_limits(axes: Axes, low: float, high: float, wide: bool) -> None:
    if wide:
        axes.set_xlim(low / 1.35, high * 1.35)
        log_axis(axes, "x")
        return
    # rows that agree to a per mille must not look scattered: show at least 20 % of the value
    middle, half = (low + high) / 2, (high - low) / 2
    half = max(1.25 * half, 0.1 * abs(middle), 1e-300)
    axes.set_xlim(middle - half, middle + half)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=2))
    axes.xaxis.set_major_formatter(lambda value, _: number(float(f"{value:.6g}"), 4))


def _write_reason(axes: Axes, y: int, row: _Row, wide: bool) -> None:
    """Writes why a row has no dot, in the half that its prediction leaves free."""
    left, right = axes.get_xlim()
    place = 0.0
    if math.isfinite(row.predicted):
        numbers = np.array([left, row.predicted, right])
        numbers = np.log(numbers) if wide else numbers
        place = float((numbers[1] - numbers[0]) / (numbers[2] - numbers[0]))
    at_left = place > 0.5 or not math.isfinite(row.predicted)
    axes.text(
        0.02 if at_left else 0.98,
        y,
        _short(row),
        transform=axes.get_yaxis_transform(),
        ha="left" if at_left else "right",
        va="center",
        color=MUTED,
        fontstyle="italic",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        zorder=2,
    )


def _short(row: _Row) -> str:
    """Cuts a reason to what its row holds; the caption has it in full."""
    room = _REASON // 2 if math.isfinite(row.predicted) else _REASON
    return textwrap.shorten(row.reason, room, placeholder=" …")


def _measured(colour: str) -> dict[str, Any]:
    return {"marker": "o", "color": colour, "markersize": 6.0, "linestyle": "none"}


def _predicted(colour: str) -> dict[str, Any]:
    return {
        "marker": "|",
        "color": colour,
        "markersize": 15.0,
        "markeredgewidth": 1.6,
        "linestyle": "none",
    }


def _bar(colour: str, sampled: bool) -> dict[str, Any]:
    """The look of a bar: drawn through where it is a 95 % interval."""
    return {"color": colour, "lw": 2.2, "linestyle": "-" if sampled else (0, (1.0, 0.8))}


def _handles(rows: Iterable[_Row]) -> list[Line2D]:
    """The legend: what is measured first, then what is predicted."""
    drawn = [row for row in rows if math.isfinite(row.measured)]
    barred = [row for row in drawn if math.isfinite(row.low) and math.isfinite(row.high)]
    spread = "not constant, or one path: over thirds of the window"
    if any(row.mixed for row in barred):
        spread += "; a ratio: with the 95 % of its parts"
    sampled = "measured, 95 % interval" if any(row.sampled for row in barred) else "measured"
    marks = [Line2D([], [], label=sampled, **{**_measured(MUTED), **_bar(MUTED, True)})]
    if not all(row.sampled for row in barred):
        marks.append(Line2D([], [], label=spread, **{**_measured(MUTED), **_bar(MUTED, False)}))
    marks.append(Line2D([], [], label="predicted", **{**_predicted(INK), "markersize": 10.0}))
    return marks


def _caption(views: Sequence[RunView], table: dict[str, list[_Row]], caption: str) -> str:
    spread = any(
        row.constant and not row.sampled and math.isfinite(row.low)
        for rows in table.values()
        for row in rows
    )
    single = any(
        math.isfinite(row.measured) and row.constant and not math.isfinite(row.low)
        for rows in table.values()
        for row in rows
    )
    unbounded = any(
        math.isfinite(row.measured) and not row.constant and not math.isfinite(row.low)
        for rows in table.values()
        for row in rows
    )
    cut = {
        f"{view.label}: {row.reason}."
        for rows in table.values()
        for view, row in zip(views, rows, strict=True)
        if not math.isfinite(row.measured) and _short(row) != row.reason
    }
    changing = dict.fromkeys(
        view.label
        for rows in table.values()
        for view, row in zip(views, rows, strict=True)
        if not row.constant
    )
    return sentence(
        caption or "Measured rates against the predictions of theory, one row for each run.",
        *sorted(cut),
        f"The rate is not constant along {', '.join(changing)}: there the dotted bar spans thirds "
        "of the window (that of a ratio also the 95 % interval of the rate that is constant), and "
        "the prediction is that at its start."
        if changing
        else "",
        "A dotted bar of one path spans the rates over thirds of the window." if spread else "",
        "A dot without a bar comes from one deterministic path." if single else "",
        "A ratio that is not constant has no bar where its lower rate may be 0."
        if unbounded
        else "",
        divergence_note(views),
    )
