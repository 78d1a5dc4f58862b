"""The figure of one program: a panel a table, a bar a contestant."""

import math
from collections.abc import Sequence
from pathlib import Path

from results import Table

from gradflow.plot.style import OKABE_ITO, drawing_style, log_axis, new_figure, save_figure


def draw_ratios(tables: Sequence[Table], stem: Path) -> None:
    """Every contestant's time over the reference's, a bar from the least to the most."""
    lines = sum(len(t.timings) + 1.6 for t in tables)
    with drawing_style():
        figure = new_figure(0.9 + 0.22 * lines, "", width=7.5)
        heights = [len(t.timings) + 1.0 for t in tables]
        panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, table in zip(panels, tables, strict=True):
            rows = table.rows()
            for place, row in enumerate(rows):
                colour = OKABE_ITO[0 if row["contestant"].startswith("gradflow") else 1]
                axes.plot([row["ratio_least"], row["ratio_most"]], [place] * 2, color=colour, lw=3)
                axes.plot(row["ratio"], place, "o", color=colour, ms=4)
            axes.axvline(1.0, color="#b9b9b9", lw=0.8, zorder=0)
            axes.set_yticks(range(len(rows)), [row["contestant"] for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            low = min(row["ratio_least"] for row in rows)
            high = max(row["ratio_most"] for row in rows)
            axes.set_xlim(low / 1.3, max(high, low * math.e) * 1.3)
            log_axis(axes, "x")
            axes.set_title(table.title, loc="left")
            axes.set_xlabel(f"time over that of {table.reference}")
    save_figure(figure, stem)
