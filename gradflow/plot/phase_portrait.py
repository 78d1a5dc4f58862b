"""Phase portrait: the plane of a scalar network of depth 2, and how every run moves in it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon

from gradflow.plot.drawing import (
    Drawing,
    divergence_note,
    end_marker,
    legend_below,
    legend_height,
    run_handle,
    sentence,
)
from gradflow.plot.reading import RunView, plane, scalar_moments
from gradflow.plot.style import FAINT, INK, MUTED, UNREGULARIZED, WIDTH, new_figure

_LOSS_COLOURS = LinearSegmentedColormap.from_list("loss", ["#ffffff", "#e9e9ee", "#d3d4de"])

Limits = Sequence[float] | None
"""`[low, high]` of an axis, None for what holds every path."""


def draw_phase_portrait(
    views: Sequence[RunView],
    *,
    title: str = "",
    caption: str = "",
    replicas: int = 3,
    xlim: Limits = None,
    ylim: Limits = None,
) -> Drawing:
    r"""Draws the plane $(w_1, w_2)$ of a scalar network of depth 2.

    Shown are the minima $w_1 w_2 = T$, level sets of the loss
    $\frac{1}{2} \sigma_{xx} (w_1 w_2 - T)^2$, the curves $w_1^2 - w_2^2 = \text{const}$ that
    gradient flow follows, the replica mean of every run with a few single replicas, the start,
    the end of each optimization phase, and the balanced point $|w_1| = |w_2| = \sqrt{|T|}$,
    which is the flattest minimum.

    **Arguments:**

    - `views`: the runs, with their weights stored.
    - `title`, `caption`: texts above and below; the caption has a default.
    - `replicas`: how many single replicas are drawn beside the mean.
    - `xlim`, `ylim`: `[low, high]` of either weight; what holds every path unless given.

    **Raises:** ``ValueError`` for networks that are not scalar of depth 2.
    """
    paths = {view.name: plane(view) for view in views}
    sxx, target = scalar_moments(views[0])
    if any(not np.allclose(scalar_moments(view), (sxx, target)) for view in views):
        raise ValueError(
            "runs: they have different data, so they do not share one plane; "
            "draw one phase portrait for each"
        )

    (left, right), (low, high) = _limits(paths, target, xlim, ylim)
    height = WIDTH * 0.88 * min(1.15, (high - low) / (right - left))
    lines, marks = [run_handle(view) for view in views], _mark_handles(views)
    figure = new_figure(height + 0.9 + legend_height(lines, marks), title)
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.set_xlabel("first weight w₁  [weight]")
    axes.set_ylabel("second weight w₂  [weight]")

    _draw_loss(axes, sxx, target)
    _draw_imbalance_lines(axes)
    _draw_runs(axes, views, paths, replicas)
    if not _draw_minima(axes, target, paths):
        marks.append(Line2D([], [], color=INK, lw=1.2, label="minima w₁w₂ = T"))
    _draw_marks(axes, views, paths, target)
    legend_below(figure, lines, marks)
    return Drawing(figure, _caption(views, caption))


def _limits(
    paths: dict[str, tuple[np.ndarray, np.ndarray]], target: float, xlim: Limits, ylim: Limits
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns limits that hold every path and the balanced point nearest to the first start."""
    xs = np.concatenate([np.ravel(first) for first, _ in paths.values()])
    ys = np.concatenate([np.ravel(second) for _, second in paths.values()])
    bounds = []
    corner = _balanced_point(paths, target)
    for values, extra in ((xs, corner[0]), (ys, corner[1])):
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, [0.05, 99.95])
        low, high = min(low, extra), max(high, extra)
        bounds.append([low, high])
    span = max(high - low for low, high in bounds)
    for bound in bounds:
        pad = 0.12 * span + max(0.0, 0.55 * span - (bound[1] - bound[0])) / 2
        bound[0], bound[1] = bound[0] - pad, bound[1] + pad
    x, y = xlim or bounds[0], ylim or bounds[1]
    return (float(x[0]), float(x[1])), (float(y[0]), float(y[1]))


def _balanced_point(
    paths: dict[str, tuple[np.ndarray, np.ndarray]], target: float
) -> tuple[float, float]:
    """Returns the balanced minimum on the branch where the first run ends."""
    first, second = next(iter(paths.values()))
    root = math.sqrt(abs(target))
    end = first.mean(axis=0), second.mean(axis=0)
    finite = np.flatnonzero(np.isfinite(end[0]) & np.isfinite(end[1]))
    last = finite[-1] if finite.size else 0
    sign = 1.0 if target >= 0 else -1.0
    # the two branches are mirror images; the nearer one has the sign of w1 + sign(T) w2
    side = 1.0 if end[0][last] + sign * end[1][last] >= 0 else -1.0
    return side * root, side * sign * root


def _draw_loss(axes: Axes, sxx: float, target: float) -> None:
    x, y = _grid(axes)
    residual = np.abs(x * y - target)
    levels = np.array([0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]) * max(abs(target), 0.25)
    levels = np.append(levels[levels < residual.max()], residual.max() + 1.0)
    loss = 0.5 * sxx * residual**2
    loss_levels = 0.5 * sxx * levels**2
    ranks = np.linspace(0.0, 1.0, max(2, len(loss_levels) - 1))
    axes.contourf(x, y, loss, levels=loss_levels, colors=_LOSS_COLOURS(ranks), zorder=0)
    axes.contour(x, y, loss, levels=loss_levels[1:], colors="white", linewidths=0.8, zorder=0.5)


def _draw_imbalance_lines(axes: Axes) -> None:
    x, y = _grid(axes)
    u = x**2 - y**2
    step = _nice_step((u.max() - u.min()) / 9)
    levels = step * np.arange(math.ceil(u.min() / step), math.floor(u.max() / step) + 1)
    axes.contour(x, y, u, levels=levels, colors=FAINT, linewidths=0.7, linestyles="solid", zorder=1)


def _draw_minima(
    axes: Axes, target: float, paths: dict[str, tuple[np.ndarray, np.ndarray]]
) -> bool:
    """Draws w_1 w_2 = T with its name beside it; says whether there was room for the name."""
    x, y = _grid(axes)
    axes.contour(x, y, x * y - target, levels=[0.0], colors=INK, linewidths=1.2, zorder=2)
    spot = _free_spot(axes, target, paths)
    if spot is None:
        return False
    place, angle = spot
    axes.text(
        *place,
        "minima  w₁w₂ = T",
        rotation=angle,
        rotation_mode="anchor",
        ha="center",
        va="center",
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        zorder=2.1,
    )
    return True


def _free_spot(
    axes: Axes, target: float, paths: dict[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[tuple[float, float], float] | None:
    """Looks along the minima for room for their name: its middle and angle, None without room."""
    if target == 0.0:
        return None
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    span = x1 - x0
    taken = np.concatenate([np.stack([np.ravel(a), np.ravel(b)], 1) for a, b in paths.values()])
    taken = taken[np.isfinite(taken).all(axis=1)]
    taken = np.vstack([taken[:: max(1, len(taken) // 2000)], _balanced_point(paths, target)])
    root, sign = math.sqrt(abs(target)), math.copysign(1.0, target)
    angles = np.linspace(-2.0, 2.0, 161)
    curve = root * np.stack([np.exp(angles), sign * np.exp(-angles)], axis=1)
    curve = np.vstack([curve, -curve])
    obstacles = np.vstack([taken, curve])
    letters = np.linspace(-0.11, 0.11, 7)[:, None] * span  # the text is 0.2 of the width
    best, spot = 0.016, None
    for at in curve:
        along = np.array([at[0], -at[1]]) / np.hypot(*at)
        across = np.array([at[1], at[0]]) / np.hypot(*at)
        flat = np.array([1.0, 0.0])
        candidates = [(at + s * 0.032 * span * across, along) for s in (1.0, -1.0)]
        candidates += [(at + s * 0.14 * span * flat, flat) for s in (1.0, -1.0)]
        for middle, direction in candidates:
            text = middle + letters * direction
            room = min(np.min(text - [x0, y0]), np.min([x1, y1] - text)) / span
            if room < 0.025:
                continue
            gaps = np.hypot(*(text[:, None, :] - obstacles).transpose(2, 0, 1)) / span
            score = min(float(gaps.min()), 0.028) + 0.01 * min(
                float(gaps[:, : len(taken)].min()), 0.3
            )
            score -= 0.002 if direction is flat else 0.0
            if score > best:
                slope = math.degrees(math.atan2(direction[1], direction[0]))
                best, spot = score, ((float(middle[0]), float(middle[1])), (slope + 90) % 180 - 90)
    return spot


def _draw_runs(
    axes: Axes,
    views: Sequence[RunView],
    paths: dict[str, tuple[np.ndarray, np.ndarray]],
    singles: int,
) -> None:
    """Draws every run: the band of its replicas, a few of them, and their mean."""
    shown: set[str] = set()  # one ensemble of each group shows single replicas
    for view in views:
        first, second = paths[view.name]
        if len(first) > 1:
            axes.add_patch(_tube(first, second, view.colour))
        if len(first) > 1 and view.colour not in shown:
            shown.add(view.colour)
            for w1, w2 in zip(first[:singles], second[:singles], strict=True):
                axes.plot(w1, w2, color=view.colour, lw=0.4, alpha=0.5, zorder=2.5)
        rank, ranks = _rank(view, views)
        axes.plot(
            first.mean(axis=0),
            second.mean(axis=0),
            color=view.stroke,
            linestyle=view.style.dashes,
            linewidth=view.style.width * (1.0 + 0.6 * (ranks - 1 - rank)),
            zorder=3.0 + rank + 0.1 * view.style.order,
        )


def _rank(view: RunView, views: Sequence[RunView]) -> tuple[int, int]:
    """Returns the place of a run's group in the stack and the number of groups.

    Different groups often follow the same curve, so the lower ones are drawn broader and stay
    visible; the unregularized reference lies on top.
    """
    colours = list(dict.fromkeys(v.colour for v in views))
    colours.sort(key=lambda colour: colour == UNREGULARIZED)
    return colours.index(view.colour), len(colours)


def _tube(first: np.ndarray, second: np.ndarray, colour: str) -> Polygon:
    """Returns the band that holds 10 to 90\u00a0% of the replicas across the minima.

    The product p = w_1 w_2 is the fast coordinate and u = w_1^2 - w_2^2 the slow one, so the band
    runs between the percentiles of p at the mean of u: with a = sqrt(u^2 + 4 p^2), the weights
    are w_1^2 = (a + u) / 2 and w_2^2 = (a - u) / 2.
    """
    u = (first**2 - second**2).mean(axis=0)
    edges = []
    for q in (10.0, 90.0):
        finite = np.isfinite(u)
        p = np.percentile((first * second)[:, finite], q, axis=0)
        root = np.sqrt(u[finite] ** 2 + 4 * p**2)
        large, small = np.sqrt((root + abs(u[finite])) / 2), np.sqrt((root - abs(u[finite])) / 2)
        w1, w2 = np.where(u[finite] > 0, (large, small), (small, large))
        side = np.sign(first.mean(axis=0)[finite])
        edges.append(np.stack([side * w1, side * np.sign(p) * w2], axis=1))
    outline = np.concatenate([edges[0], edges[1][::-1]])
    return Polygon(outline, closed=True, facecolor=colour, alpha=0.16, linewidth=0, zorder=2.2)


def _draw_marks(
    axes: Axes,
    views: Sequence[RunView],
    paths: dict[str, tuple[np.ndarray, np.ndarray]],
    target: float,
) -> None:
    axes.plot(*_balanced_point(paths, target), zorder=9, **_STAR)
    starts: list[tuple[float, float]] = []
    for view in views:
        first, second = (w.mean(axis=0) for w in paths[view.name])
        start = (float(first[0]), float(second[0]))
        if not any(np.allclose(start, other) for other in starts):
            starts.append(start)
            axes.plot(*start, zorder=9.5, **_START)
        rank, ranks = _rank(view, views)
        end = view.optimization_end
        if math.isfinite(end):
            time = view.dataset["time"].values
            at = np.interp(end, time, first), np.interp(end, time, second)
            look = end_marker(view.stroke, 6.5 + 3.0 * (ranks - 1 - rank))
            axes.plot(*at, zorder=10 + rank, **look)
        finite = np.flatnonzero(np.isfinite(first) & np.isfinite(second))
        if finite.size:
            last = first[finite[-1]], second[finite[-1]]
            axes.plot(*last, zorder=12 + rank, **_last(view.stroke))


_START = {
    "marker": "s",
    "markersize": 6.5,
    "markerfacecolor": INK,
    "markeredgecolor": "white",
    "linestyle": "none",
}
_STAR = {
    "marker": "*",
    "markersize": 17.0,
    "markerfacecolor": "#F0E442",
    "markeredgecolor": INK,
    "markeredgewidth": 0.9,
    "linestyle": "none",
}


def _last(colour: str) -> dict[str, Any]:
    return {
        "marker": "D",
        "markersize": 4.5,
        "markerfacecolor": colour,
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "linestyle": "none",
    }


def _mark_handles(views: Sequence[RunView]) -> list[Line2D]:
    marks: list[tuple[str, dict[str, Any]]] = [("start", _START)]
    if any(math.isfinite(view.optimization_end) for view in views):
        marks.append(("end of the optimization phase", end_marker()))
    marks.append(("end of the run", _last(MUTED)))
    marks.append(("balanced, flattest minimum", {**_STAR, "markersize": 11.0}))
    marks.append(("w₁² \u2212 w₂² = const (gradient flow)", {"color": FAINT, "lw": 0.9}))
    return [Line2D([], [], label=label, **look) for label, look in marks]


def _caption(views: Sequence[RunView], caption: str) -> str:
    ensembles = any(view.replicas > 1 for view in views)
    return sentence(
        caption
        or "The plane of the two weights. Shading shows the loss (white at its minimum, the curve "
        "w₁w₂ = T); grey curves are those that gradient flow follows, since it conserves the "
        "imbalance.",
        "Thick lines are replica means, bands hold 10 to 90\u00a0% of the replicas across the "
        "minima, and thin lines are single replicas."
        if ensembles
        else "",
        divergence_note(views),
    )


def _grid(axes: Axes) -> tuple[np.ndarray, np.ndarray]:
    return tuple(
        np.meshgrid(np.linspace(*axes.get_xlim(), 400), np.linspace(*axes.get_ylim(), 400))
    )  # pyright: ignore[reportReturnType]


def _nice_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return power * min((1.0, 2.0, 5.0, 10.0), key=lambda m: abs(math.log(m * power / raw)))
