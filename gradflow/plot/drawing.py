"""What every figure kind hands back, and the parts that several kinds share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradflow.plot.formatting import number
from gradflow.plot.reading import RunView, diverged_text
from gradflow.plot.style import INK, MUTED

_LEGEND_LETTERS = 74
"""Letters of the longest labels of two columns that fit side by side."""


@dataclass(frozen=True)
class Drawing:
    """A figure and the sentence below it."""

    figure: Figure
    caption: str


def run_handle(view: RunView) -> Line2D:
    """Returns the legend entry of a run."""
    return Line2D(
        [],
        [],
        color=view.stroke,
        linestyle=view.style.dashes,
        linewidth=view.style.width,
        label=view.legend_label,
    )


def end_marker(colour: str = MUTED, size: float = 6.5) -> dict[str, Any]:
    """Returns the look of the mark "end of the optimization phase": a white disc with an edge."""
    return {
        "marker": "o",
        "markersize": size,
        "markerfacecolor": "white",
        "markeredgecolor": colour,
        "markeredgewidth": 1.5,
        "linestyle": "none",
    }


def cross_marker(colour: str = MUTED) -> dict[str, Any]:
    """Returns the look of the mark "here the run diverged"."""
    return {"marker": "X", "markersize": 8.0, "color": colour, "linestyle": "none"}


def mark_divergence(axes: Axes, view: RunView, time: np.ndarray, values: np.ndarray) -> None:
    """Puts a cross at the last finite value of a run of which no replica survived."""
    finite = np.flatnonzero(np.isfinite(values))
    if finite.size:
        at = finite[-1]
        axes.plot(time[at], values[at], clip_on=False, zorder=8, **cross_marker(view.stroke))


def legend_below(figure: Figure, left: Sequence[Artist], right: Sequence[Artist]) -> None:
    """Puts the legend below the axes, outside of them: runs at the left, marks at the right.

    Where the two do not fit side by side the marks stand below the runs.
    """
    columns = _legend_columns(left, right)
    rows = max(map(len, columns))
    blank = Line2D([], [], linestyle="none", label=" ")
    padded = [[*side, *[blank] * (rows - len(side))] for side in columns]
    figure.legend(
        handles=[handle for column in padded for handle in column],
        loc="outside lower left",
        ncols=len(columns),
        labelcolor=INK,
        columnspacing=2.0,
        handletextpad=0.7,
        borderaxespad=0.3,
    )


def legend_height(left: Sequence[Artist], right: Sequence[Artist]) -> float:
    """Returns the height in inches that the legend takes."""
    return 0.12 + 0.185 * max(map(len, _legend_columns(left, right)))


def _legend_columns(left: Sequence[Artist], right: Sequence[Artist]) -> list[list[Artist]]:
    widest = [max((len(str(a.get_label())) for a in side), default=0) for side in (left, right)]
    if sum(widest) > _LEGEND_LETTERS:
        return [[*left, *right]]
    return [list(side) for side in (left, right) if side] or [[]]


def sentence(*parts: str) -> str:
    """Joins sentences, leaving out empty ones."""
    return " ".join(part.strip() for part in parts if part.strip())


def divergence_note(views: Sequence[RunView]) -> str:
    """Says which runs lost replicas, and what was done about it."""
    parts = []
    for view in views:
        count = int(view.diverged.sum())
        if count and view.replicas == 1:
            when = float(np.nanmin(view.dataset["diverged_at"].values))
            parts.append(f"{view.label} diverged at t = {number(when, 3)}.")
        elif count == view.replicas and count:
            parts.append(f"{view.label}: all {count} replicas diverged.")
        elif count:
            text = diverged_text(count, view.replicas)
            parts.append(f"{view.label}: {text} and are left out of means and bands.")
    return " ".join(parts)
