"""Rates against theory: measured over predicted, against step size times sharpness."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gradflow.analysis.comparison.against_theory import Measured, TheoryRow, theory_rows
from gradflow.plot.drawing import Drawing, divergence_note, legend_below, legend_height, sentence
from gradflow.plot.formatting import number
from gradflow.plot.reading import RunView
from gradflow.plot.style import INK, MUTED, axis_label, log_axis, new_figure, shaded

TITLE = "Rates against theory"

FEWEST = 3
"""Different values of h lambda that a group needs: fewer show no trend."""

_SIZE, _WIDER = 6.0, 4.0
"""Diameter of the marks of the last group, and by how much those of each earlier one are wider, so
that they show around it where both lie on the same point."""

_WIDE = 8.0
"""Ratio of the largest to the smallest value above which an axis is logarithmic."""


@dataclass(frozen=True)
class _Theory:
    """How the points of one theory look."""

    name: str
    marker: str
    is_filled: bool
    dashes: tuple[float, tuple[float, ...]]


_LEADING = _Theory("leading order, h \u2192 0", "D", False, (0.0, (1.2, 1.6)))
_FINITE = _Theory("finite step", "o", True, (0.0, ()))


@dataclass(frozen=True)
class _Point:
    """Measured over predicted with its standard error (NaN if unknown), at h lambda."""

    h_lambda: float
    ratio: float
    error: float


def draw_theory_ratios(views: Sequence[RunView]) -> Drawing | None:
    r"""Draws measured over predicted imbalance rates of SGD against $h \lambda_{\max}$.

    Both theories are drawn, that of small steps and that of the finite step, with one standard
    error. Where every run of a group has its slow flows they are the prediction, over the same
    flow times; else it is the rate at the start of the phase.

    **Returns:** None unless some group has runs of SGD, with a measured and a predicted rate, at
    `FEWEST` or more different $h \lambda_{\max}$.
    """
    groups: dict[str, list[TheoryRow]] = {}
    for row in theory_rows([view.run for view in views]):
        if row.measured is not None and math.isfinite(row.h_lambda):
            groups.setdefault(row.label, []).append(row)
    chosen = {name: rows for name, rows in groups.items() if _is_trend(rows)}
    if not chosen:
        return None
    view_of = {view.name: view for view in views}
    colour_of = {
        name: shaded(view_of[rows[0].run.name].colour, -0.1) for name, rows in chosen.items()
    }
    colours = [Line2D([], [], color=c, lw=2.8, label=name) for name, c in colour_of.items()]
    marks = [_handle(_FINITE), _handle(_LEADING)]
    figure = new_figure(3.1 + legend_height(colours, marks), TITLE)
    axes = figure.add_subplot()
    drawn = [
        point
        for above, (name, rows) in zip(range(len(chosen))[::-1], chosen.items(), strict=True)
        for theory in (_LEADING, _FINITE)
        for point in _draw_line(axes, rows, theory, colour_of[name], _SIZE + _WIDER * above)
    ]
    _set_axes(axes, drawn)
    axes.set_xlabel(axis_label("step size times sharpness where the phase starts, h \u03bb", "1"))
    axes.set_ylabel(axis_label("imbalance rate,\nmeasured over predicted", "1"))
    legend_below(figure, colours, marks)
    shown = [view_of[row.run.name] for rows in chosen.values() for row in rows]
    return Drawing(figure, _caption(chosen, shown))


def _is_trend(rows: Sequence[TheoryRow]) -> bool:
    return any(
        len({round(p.h_lambda, 9) for p in _points(rows, theory)}) >= FEWEST
        for theory in (_LEADING, _FINITE)
    )


def _follows(rows: Sequence[TheoryRow], theory: _Theory) -> bool:
    """Returns whether every run has the slow flow of a theory."""
    return all((r.slow_flow if theory is _FINITE else r.classical_flow) is not None for r in rows)


def _points(rows: Sequence[TheoryRow], theory: _Theory) -> list[_Point]:
    """Returns the points of a theory in the order of h lambda."""
    points = []
    follows = _follows(rows, theory)
    for row in rows:
        if theory is _FINITE:
            compared = row.slow_flow if follows else row.finite_step
        else:
            compared = row.classical_flow if follows else row.leading_order
        if row.measured is not None and compared is not None and compared.number.value != 0.0:
            points.append(_ratio(row.h_lambda, row.measured, compared.number))
    return sorted(points, key=lambda point: point.h_lambda)


def _ratio(h_lambda: float, measured: Measured, predicted: Measured) -> _Point:
    ratio = measured.value / predicted.value
    error = math.hypot(measured.error, ratio * predicted.error) / abs(predicted.value)
    return _Point(h_lambda, ratio, error)


def _draw_line(
    axes: Axes, rows: Sequence[TheoryRow], theory: _Theory, colour: str, size: float
) -> list[_Point]:
    """Draws the points of a group for one theory, with marks of a size, and returns them."""
    points = _points(rows, theory)
    x, y, error = (
        np.array([getattr(p, k) for p in points]) for k in ("h_lambda", "ratio", "error")
    )
    axes.plot(x, y, color=colour, lw=1.0, linestyle=theory.dashes, zorder=2.5)
    axes.errorbar(x, y, np.nan_to_num(error), fmt="none", ecolor=colour, elinewidth=1.4, zorder=3)
    axes.plot(
        x,
        y,
        linestyle="none",
        marker=theory.marker,
        markersize=size,
        markerfacecolor=colour if theory.is_filled else "white",
        markeredgecolor="white" if theory.is_filled else colour,
        markeredgewidth=0.8 if theory.is_filled else 1.4,
        zorder=4 if theory.is_filled else 3.5,
    )
    return points


def _handle(theory: _Theory) -> Artist:
    return Line2D(
        [],
        [],
        color=MUTED,
        lw=1.0,
        linestyle=theory.dashes,
        marker=theory.marker,
        markersize=_SIZE,
        markerfacecolor=MUTED if theory.is_filled else "white",
        markeredgecolor="white" if theory.is_filled else MUTED,
        label=f"over the prediction of {theory.name}",
    )


def _set_axes(axes: Axes, points: Sequence[_Point]) -> None:
    x, y = np.array([p.h_lambda for p in points]), np.array([p.ratio for p in points])
    error = np.nan_to_num(np.array([p.error for p in points]))
    low, high = min(1.0, float((y - error).min())), max(1.0, float((y + error).max()))
    if low > 0.0 and high > _WIDE * low:
        axes.set_ylim(low / 1.2, high * 1.2)
        log_axis(axes, "y")
    else:
        # points that agree to a per mille must not look scattered
        half = max(0.56 * (high - low), 0.05)
        axes.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: number(float(f"{value:.6g}")))
    if x.max() > _WIDE * 4 * x.min():
        axes.set_xlim(x.min() / 1.3, x.max() * 1.3)
        log_axis(axes, "x")
    else:
        axes.set_xlim(0.0, 1.08 * x.max())
    axes.axhline(1.0, color=INK, lw=0.9, zorder=2)


def _caption(groups: dict[str, list[TheoryRow]], views: Sequence[RunView]) -> str:
    notes = []
    for name, rows in groups.items():
        of = f"{name}: " if len(groups) > 1 else ""
        kinds = [t.name for t in (_FINITE, _LEADING) if _follows(rows, t)]
        if len(kinds) == 2:
            notes.append(f"{of}the predictions are slow flows over the same flow times.")
            continue
        if kinds:
            notes.append(f"{of}the prediction of {kinds[0]} is a slow flow over the same times.")
        changing = [row.run.label for row in rows if row.changes]
        if changing:
            notes.append(
                f"{of}other predictions are rates at the start of the phase, and the rate changes "
                f"along {', '.join(changing)}."
            )
    return sentence(
        "Measured over predicted decay rate of the imbalance of SGD, with one standard error; on "
        "the line at 1 theory is right.",
        *(f"{note[0].upper()}{note[1:]}" for note in notes),
        divergence_note(views),
    )
