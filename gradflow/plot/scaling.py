"""Scaling: a quantity of many runs against one of their parameters, log-log, with its slope."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradflow.plot.drawing import Drawing, divergence_note, legend_below, legend_height, sentence
from gradflow.plot.formatting import with_error
from gradflow.plot.reading import RunView, observable_label
from gradflow.plot.style import MUTED, axis_label, log_axis, new_figure, shaded

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_PARAMETERS = {
    "step_size": ("step size h", "flow time"),
    "momentum": ("momentum β", "1"),
    "LabelNoise.std": ("standard deviation of the label noise", "target"),
    "InputNoise.std": ("standard deviation of the input noise", "input"),
    "WeightDecay.rate": ("weight decay λ", "1/flow time"),
    "Minibatch.batch_size": ("batch size B", "1"),
    "Dropout.rate": ("dropout rate", "1"),
    "DropConnect.rate": ("DropConnect rate", "1"),
    "WeightNoise.std": ("standard deviation of the weight noise", "weight"),
    "GradientNoise.std": ("standard deviation of the gradient noise", "loss/weight"),
    "amplification": ("amplification l", "1"),
}
_QUANTITIES = {
    "rate": ("decay rate", "1/flow time"),
    "drift": ("drift", "1/flow time"),
    "optimization_end": ("end of the optimization phase", "flow time"),
    "optimization_rate": ("optimization rate", "1/flow time"),
    "separation": ("separation of the phases", "1"),
    "final": ("final", ""),
    "change": ("change of", ""),
    "max_change": ("largest change of", ""),
    "change_ratio": ("final over initial", "1"),
    "balancedness_change": ("largest change of G", "weight^2"),
    "balancedness_decay": ("largest deviation of G from its decay", "weight^2"),
    "diagonal_change": ("largest change of diag G", "weight^2"),
    "noether_decay": ("largest residual of the decay of the Noether charge", "1"),
    "gd_identity": ("largest residual of the one-step identity", "weight^2"),
}


@dataclass(frozen=True)
class Point:
    """What was measured on a run.

    - `parameter`: of the run, the horizontal axis.
    - `value`, `error`: the quantity and its standard error, 0 where there is none.
    """

    view: RunView
    parameter: float
    value: float
    error: float = 0.0

    @property
    def has_place(self) -> bool:
        """Returns whether a logarithmic axis has room for it."""
        return math.isfinite(self.value) and self.value != 0.0

    @property
    def size(self) -> float:
        """Returns the height of the point on the logarithmic axis."""
        return abs(self.value)


def draw_scaling(
    points: Sequence[Point],
    quantity: str,
    parameter: str,
    *,
    title: str = "",
    caption: str = "",
    observable: str | None = None,
    slope: float | None = None,
    notes: Sequence[str] = (),
) -> Drawing:
    """Draws |quantity| against a parameter of the runs, both axes logarithmic.

    Each group of runs has its colour and its fitted slope, a least-squares line through the
    logarithms.

    **Arguments:**

    - `points`: what was measured on each run.
    - `quantity`, `parameter`: what they are called, as in claims.
    - `title`, `caption`: texts above and below; the caption has a default, `notes` follow it.
    - `observable`: what the quantity is measured on.
    - `slope`: of a grey reference line through the middle of the points.

    **Raises:** ``ValueError`` when no point has a place on logarithmic axes.
    """
    lost = [p for p in points if not p.has_place]
    notes = [*notes, *(f"{p.view.label} has no point: its value is {p.value:g}." for p in lost)]
    points = [p for p in points if p.has_place]
    if not points:
        raise ValueError(
            f"quantity: {quantity!r} could not be measured on any run of the figure: "
            + " ".join(notes)
        )
    groups = list(dict.fromkeys(_family(p.view) for p in points))
    lines = []
    figure = new_figure(3.6 + 0.185 * len(groups), title)
    axes = figure.add_subplot()
    for number, key in enumerate(groups):
        chosen = [p for p in points if _family(p.view) == key]
        label = chosen[0].view.run.group or chosen[0].view.label
        if sum(colour == key[0] for colour, _ in groups) > 1:
            label = f"{label}, {key[1]}"
        lines.append(_draw_group(axes, chosen, label, _MARKERS[number % len(_MARKERS)]))
    marks = [_draw_reference(axes, points, slope)] if slope is not None else []
    _set_limits(axes, points)
    axes.set_xlabel(axis_label(*_PARAMETERS.get(parameter, (parameter, ""))))
    axes.set_ylabel(_quantity_label(points[0].view, quantity, observable))
    figure.set_figheight(3.3 + legend_height(lines, marks))
    legend_below(figure, lines, marks)
    negative = sum(p.value < 0 for p in points)
    text = sentence(
        caption or "Points are runs with one standard error; lines are least-squares fits.",
        f"Absolute values: {negative} of {len(points)} values are negative." if negative else "",
        *notes,
        divergence_note([p.view for p in points]),
    )
    return Drawing(figure, text)


def _family(view: RunView) -> tuple[str, str]:
    """Returns what the runs of one fitted line share: the group's colour and the dynamics."""
    return view.colour, type(view.run.trajectory.dynamics).__name__


def _draw_group(axes: Axes, points: Sequence[Point], label: str, marker: str) -> Line2D:
    """Draws the points of one group with their fitted line; returns the legend entry."""
    colour = shaded(points[0].view.colour, -0.1)
    x, y = _coordinates(points)
    error = np.array([p.error for p in points])
    # an error bar must not reach zero on a log axis
    below = np.minimum(error, 0.95 * y)
    axes.errorbar(
        x, y, yerr=np.stack([below, error]), fmt="none", ecolor=colour, elinewidth=1.3, zorder=3
    )
    look = {"marker": marker, "color": colour, "markersize": 6.5}
    axes.plot(x, y, linestyle="none", markeredgecolor="white", zorder=4, **look)
    if len(np.unique(x)) < 2:
        return Line2D([], [], linestyle="none", label=label, **look)
    slope, slope_error, level = fit_slope(x, y, error)
    ends = np.array([x.min() / 1.15, x.max() * 1.15])
    axes.plot(ends, np.exp(level) * ends**slope, color=colour, lw=1.2, zorder=2)
    return Line2D([], [], lw=1.2, label=f"{label}, slope {with_error(slope, slope_error)}", **look)


def fit_slope(
    x: Float[np.ndarray, " run"], y: Float[np.ndarray, " run"], error: Float[np.ndarray, " run"]
) -> tuple[float, float, float]:
    r"""Fits $\log y = a + b \log x$ by least squares.

    **Returns:** the slope $b$, its standard error and the level $a$. The error is the larger of
    the scatter about the line (three points or more) and what the errors of the points carry over
    to the slope; NaN when neither is known.
    """
    u, v = np.log(x), np.log(y)
    lever = (u - u.mean()) / np.sum((u - u.mean()) ** 2)
    slope = float(lever @ v)
    level = float(v.mean() - slope * u.mean())
    carried = float(np.sqrt(np.sum((lever * error / y) ** 2)))
    scatter = 0.0
    if len(x) > 2:
        residual = v - level - slope * u
        scatter = float(np.sqrt(np.sum(residual**2) / (len(x) - 2) * np.sum(lever**2)))
    spread = max(carried, scatter)
    return slope, spread if spread > 0 else math.nan, level


def _draw_reference(axes: Axes, points: Sequence[Point], slope: float) -> Line2D:
    """Draws a line of a given slope through the middle of all points."""
    x, y = _coordinates(points)
    level = np.mean(np.log(y)) - slope * np.mean(np.log(x))
    ends = np.array([x.min() / 1.15, x.max() * 1.15])
    look = {"color": MUTED, "lw": 1.2, "linestyle": (0.0, (5.0, 2.0))}
    axes.plot(ends, np.exp(level) * ends**slope, zorder=1.5, **look)
    return Line2D([], [], label=f"slope {slope:g}", **look)


def _set_limits(axes: Axes, points: Sequence[Point]) -> None:
    x, y = _coordinates(points)
    axes.set_xlim(x.min() / 1.3, x.max() * 1.3)
    axes.set_ylim(y.min() / 2.0, y.max() * 2.0)
    log_axis(axes, "x")
    log_axis(axes, "y")


def _coordinates(
    points: Sequence[Point],
) -> tuple[Float[np.ndarray, " run"], Float[np.ndarray, " run"]]:
    return np.array([p.parameter for p in points]), np.array([p.size for p in points])


def _quantity_label(view: RunView, quantity: str, observable: str | None) -> str:
    name, units = _QUANTITIES.get(quantity, (quantity.replace("_", " "), ""))
    if observable is None or quantity in ("optimization_end", "optimization_rate"):
        return axis_label(name, units)
    of_name, of_units = observable_label(view, observable)
    if quantity == "rate":
        return axis_label(f"decay rate of the {of_name}", units)
    if quantity == "drift":
        return axis_label(f"drift of the {of_name}", f"{of_units}/flow time")
    return axis_label(f"{name} {of_name}", units or of_units)
