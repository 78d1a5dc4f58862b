"""The order in the step size at which two dynamics agree: differences against h, log-log."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradflow.analysis.convergence.fit import SIGNIFICANT
from gradflow.analysis.convergence.results import OrderPoints, OrderRow, Orders
from gradflow.plot.drawing import Drawing, legend_below, legend_height, sentence
from gradflow.plot.style import (
    FAINT,
    MUTED,
    OKABE_ITO,
    axis_label,
    drawing_style,
    log_axis,
    new_figure,
    shaded,
)

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_PALE = 0.7
"""How much white there is in points that are not in the fit."""

_SLOPES = (1, 2, 3)
_DASHES = {
    1: (0.0, (6.0, 2.0)),
    2: (0.0, (3.0, 2.0)),
    3: (0.0, (1.0, 2.0)),
}


def draw_orders(
    orders: Orders, title: str = "", caption: str = "", labels: Mapping[str, str] | None = None
) -> Drawing:
    """Draws the differences of two dynamics against the step size, both axes logarithmic.

    Filled points are in the fit, with one standard error; pale ones are not. Hollow ones are not
    above noise and resolution, and their bar ends at an upper limit, |difference| + 3 standard
    errors. Lines are the fitted orders over the range of the fit. Grey lines have slopes 1, 2
    and 3.

    **Arguments:**

    - `orders`: the measurement.
    - `title`, `caption`: of the figure; the caption has a default.
    - `labels`: names to show instead of those of the observables.

    **Raises:** ``ValueError`` when no difference has a place on logarithmic axes.
    """
    shown = [p for p in orders.points if _drawable(p).any()]
    if not shown:
        raise ValueError(
            "orders: no difference is finite and unequal to zero, so nothing can be drawn on "
            "logarithmic axes"
        )
    with drawing_style():
        return _draw(orders, shown, title, caption, labels or {})


def _draw(
    orders: Orders,
    shown: list[OrderPoints],
    title: str,
    caption: str,
    labels: Mapping[str, str],
) -> Drawing:
    rows = {row.observable: row for row in orders.rows}
    figure = new_figure(4.0, title)
    axes = figure.add_subplot()
    entries = []
    for i, points in enumerate(shown):
        colour, marker = OKABE_ITO[i % len(OKABE_ITO)], _MARKERS[i % len(_MARKERS)]
        name = labels.get(points.observable, points.observable)
        entries.append(_draw_points(axes, points, rows[points.observable], name, colour, marker))
    _set_limits(axes, shown)
    guides = _draw_guides(axes)
    marks = [*guides]
    if any((p.seen & ~_fitted(p, rows[p.observable])).any() for p in shown):
        look = {"marker": "o", "color": MUTED, "markersize": 6.0}
        look["markerfacecolor"] = shaded(MUTED, _PALE)
        marks.append(Line2D([], [], linestyle="none", label="not in the fit", **look))
    if any((_drawable(p) & ~p.seen).any() for p in shown):
        look = {"marker": "o", "color": MUTED, "markerfacecolor": "white", "markersize": 6.0}
        marks.append(Line2D([], [], linestyle="none", label="not seen, with upper limit", **look))
    axes.set_xlabel(axis_label("step size h", "flow time"))
    axes.set_ylabel(_difference_label(orders, shown))
    figure.set_figheight(3.6 + legend_height(entries, marks))
    legend_below(figure, entries, marks)
    return Drawing(figure, _caption(orders, caption))


def _drawable(points: OrderPoints) -> np.ndarray:
    """Returns which differences have a place on logarithmic axes: a limit above zero will do."""
    return np.isfinite(points.error) & (_limit(points) > 0.0)


def _fitted(points: OrderPoints, row: OrderRow) -> np.ndarray:
    """Returns which differences an order was read from."""
    return points.seen & points.used & row.resolved


def _limit(points: OrderPoints) -> np.ndarray:
    """Returns the upper limit of a difference that is not seen."""
    return np.abs(points.error) + np.maximum(
        SIGNIFICANT * points.standard_error, np.where(points.seen, 0.0, points.resolution)
    )


def _draw_points(
    axes: Axes, points: OrderPoints, row: OrderRow, name: str, colour: str, marker: str
) -> Line2D:
    """Draws the differences of one observable with its order; returns the legend entry."""
    colour = shaded(colour, -0.1)
    h, size = points.step_size, np.abs(points.error)
    seen, faint = points.seen, _drawable(points) & ~points.seen
    # an error bar must not reach zero on a log axis
    below = np.minimum(points.standard_error, 0.95 * size)
    bars = {"fmt": "none", "ecolor": colour, "elinewidth": 1.3}
    axes.errorbar(
        h[seen],
        size[seen],
        yerr=np.stack([below, points.standard_error])[:, seen],
        zorder=3,
        **bars,
    )
    limit = _limit(points)
    # a difference far inside the noise sits at a tenth of its limit
    height = np.maximum(size, 0.1 * limit)
    axes.errorbar(
        h[faint],
        height[faint],
        yerr=[np.zeros(faint.sum()), (limit - height)[faint]],
        capsize=3.0,
        zorder=3,
        **bars,
    )
    look = {"marker": marker, "color": colour, "markersize": 6.0}
    pale = {"linestyle": "none", "markerfacecolor": shaded(colour, _PALE), **look}
    fitted = _fitted(points, row)
    left = seen & ~fitted
    axes.plot(h[fitted], size[fitted], linestyle="none", markeredgecolor="white", zorder=4, **look)
    axes.plot(h[left], size[left], zorder=4, **pale)
    axes.plot(
        h[faint],
        height[faint],
        linestyle="none",
        markerfacecolor="white",
        markeredgewidth=1.3,
        zorder=4,
        **look,
    )
    if not row.resolved or row.asymptotic_range is None:
        return Line2D([], [], label=f"{name}: {row.status}", **pale)
    centre = np.exp(np.mean(np.log(h[fitted]))), np.exp(np.mean(np.log(size[fitted])))
    ends = np.array(row.asymptotic_range)
    axes.plot(ends, centre[1] * (ends / centre[0]) ** row.order, color=colour, lw=1.3, zorder=2)
    label = f"{name}: order {row.order:.2f} [{row.low:.2f}, {row.high:.2f}]"
    return Line2D([], [], lw=1.3, label=label, **look)


def _set_limits(axes: Axes, shown: list[OrderPoints]) -> None:
    h = np.concatenate([p.step_size[_drawable(p)] for p in shown])
    top = np.concatenate([_limit(p)[_drawable(p)] for p in shown])
    bottom = np.concatenate(
        [np.maximum(np.abs(p.error), 0.1 * _limit(p))[_drawable(p)] for p in shown]
    )
    axes.set_xlim(h.min() / 1.3, h.max() * 1.3)
    axes.set_ylim(bottom.min() / 2.5, top.max() * 2.5)
    log_axis(axes, "x")
    log_axis(axes, "y")


def _draw_guides(axes: Axes) -> list[Line2D]:
    """Draws reference slopes through the upper right corner; returns their legend entries."""
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    ends = np.array(axes.get_xlim())
    lines = []
    for slope in _SLOPES:
        look = {"color": FAINT, "lw": 1.1, "linestyle": _DASHES[slope]}
        axes.plot(ends, top * (ends / right) ** slope, zorder=1, **look)
        lines.append(Line2D([], [], label=f"slope {slope}", **look))
    return lines


def _difference_label(orders: Orders, shown: list[OrderPoints]) -> str:
    """Returns the label of the vertical axis; units only if all observables share them."""
    units = {p.units for p in shown}
    names = {p.long_name for p in shown}
    kind = f"{orders.kind} difference".strip() if orders.random else "difference"
    of = f" of the {names.pop()}" if len(names) == 1 else ""
    if len(units) == 1:
        return axis_label(kind + of, units.pop(), 44)
    return axis_label(kind, "units of each observable", 40)


def _caption(orders: Orders, caption: str) -> str:
    when = ", ".join(f"{t:g}" for t in orders.times)
    default = (
        f"{orders.first} against {orders.second} at t = {when}"
        f"{f' ({orders.coupling})' if orders.random else ''}; one standard error; lines span the "
        "range of the fit."
    )
    return sentence(caption or default, *(f"{note.rstrip('.')}." for note in orders.notes))
