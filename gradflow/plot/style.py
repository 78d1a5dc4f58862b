"""How figures look: colours, line styles, fonts, and how a figure becomes a PNG and an SVG file.

Matplotlib reads its settings from one global table, so drawing is done inside
:func:`drawing_style`, which holds a lock while our settings are in force. Figures are plain
:class:`matplotlib.figure.Figure` objects: nothing is registered with pyplot, and any thread may
draw.
"""

import math
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from gradflow.backend.whole_file import write_whole

Scale = Literal["linear", "log"]
"""Of an axis."""

WIDTH = 6.5
"""Width of every figure in inches: the text width of a report page."""

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colour-blind safe colours (Okabe and Ito 2008) without black and yellow."""

FURTHER = ("#882255", "#999933", "#332288", "#117733", "#AA4499", "#661100")
"""Further colours that stay apart from those and each other (after Tol 2021, "muted")."""

INK = "#222222"
MUTED = "#6b6b6b"
FAINT = "#b9b9b9"
UNREGULARIZED = "#4d4d4d"
"""Colour of runs without a regularizer: they are the reference, not a competitor."""

_SETTINGS = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "figure.titlesize": 11.0,
    "figure.dpi": 100.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
    "savefig.facecolor": "white",
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "gradflow",
}

_FONT = "font-family: 'DejaVu Sans'"
_SIMILAR_FONTS = "Verdana, Helvetica, Arial, sans-serif"
"""What a browser without our font shows in its place; Verdana has the same widths."""

_LOCK = threading.RLock()


@contextmanager
def drawing_style() -> Iterator[None]:
    """Puts our settings in force while a figure is drawn or saved; one thread at a time."""
    with _LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)  # pyright: ignore[reportArgumentType,reportCallIssue]
        yield


@dataclass(frozen=True)
class LineStyle:
    """The stroke of one kind of dynamics.

    Descent is a broad light stroke, so that a flow drawn over it in the same colour stays
    visible: agreement looks like a dark line inside a light one.
    """

    dashes: tuple[float, tuple[float, ...]]
    """Offset, and lengths of strokes and gaps in line widths; empty for a solid line."""
    width: float
    shade: float
    """-1 is black, 0 the plain colour, +1 white."""
    order: float


_STYLES = {
    "GradientDescent": LineStyle((0.0, ()), 2.8, 0.25, 3.0),
    "StochasticFlow": LineStyle((0.0, (4.0, 1.8)), 1.5, -0.25, 4.0),
    "SlowFlow": LineStyle((0.0, ()), 1.4, -0.4, 4.6),
    "classical SlowFlow": LineStyle((0.0, (5.0, 1.5, 1.0, 1.5)), 1.4, -0.4, 4.5),
}
_FLOW = LineStyle((0.0, (1.1, 1.5)), 1.9, -0.1, 4.4)


def line_style(dynamics: str) -> LineStyle:
    """Returns the stroke of a dynamics by class name.

    Descent is solid, an SDE dashed, an ODE dotted; a slow flow is thin, dark and solid, and of dots
    and dashes where it is the classical one of small steps.
    """
    return _STYLES.get(dynamics, _FLOW)


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """Gives every regularizer group its colour, in order of appearance.

    Up to six groups take the Okabe-Ito colours, up to twelve the further ones as well; more take
    equally spaced colours of the ``cividis`` map, which is ordered and colour-blind safe. Groups
    called "none", "plain" or "unregularized" (or nothing) are dark grey where there are others.
    """
    names = list(dict.fromkeys(groups))
    plain = [g for g in names if is_unregularized(g)] if len(names) > 1 else []
    others = [g for g in names if g not in plain]
    if len(others) <= len(OKABE_ITO + FURTHER):
        colours = list((OKABE_ITO + FURTHER)[: len(others)])
    else:
        cividis = matplotlib.colormaps["cividis"]
        colours = [to_hex(cividis(x)) for x in np.linspace(0.0, 0.92, len(others))]
    return dict(zip(others, colours, strict=True)) | dict.fromkeys(plain, UNREGULARIZED)


def is_unregularized(group: str) -> bool:
    """Says whether a group name means "no regularizer"."""
    name = group.strip().lower()
    return name in ("", "none", "plain", "unregularized", "no regularizer", "gradient flow")


def shaded(colour: str, shade: float) -> str:
    """Mixes a colour with white (``shade > 0``) or black (``shade < 0``)."""
    other = np.ones(3) if shade > 0 else np.zeros(3)
    return to_hex(tuple((1 - abs(shade)) * np.array(to_rgb(colour)) + abs(shade) * other))


def new_figure(height: float, title: str, width: float = WIDTH) -> Figure:
    """Returns an empty figure of our width with its title at the left."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontweight="bold")
    return figure


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def superscript(exponent: int) -> str:
    """Writes an integer with superscript digits, as in 10⁻³."""
    return str(exponent).translate(_SUPERSCRIPT)


def _log_tick(value: float, wide: bool) -> str:
    if value <= 0:
        return ""
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**exponent
    if -2 < exponent < 2 or (not wide and -4 < exponent < 4):
        return f"{value:.10g}"
    power = f"10{superscript(exponent)}"
    return power if abs(mantissa - 1) < 1e-6 else f"{mantissa:.3g}·{power}"


def log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Makes one axis logarithmic, with ticks written as plain text (10⁻³), not as formulas."""
    if which == "x":
        axes.set_xscale("log")
        axis, limits = axes.xaxis, axes.get_xlim()
    else:
        axes.set_yscale("log")
        axis, limits = axes.yaxis, axes.get_ylim()
    decades = math.log10(max(limits) / min(limits))
    if decades < 1.3:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    elif decades < 2.5:
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    else:
        axis.set_major_locator(LogLocator(numticks=7))
    subs = tuple(range(2, 10)) if decades < 7 else (1.0,)
    axis.set_minor_locator(LogLocator(subs=subs, numticks=40))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _log_tick(value, decades > 5)))
    axis.set_minor_formatter(NullFormatter())


def axis_label(long_name: str, units: str, width: int = 0) -> str:
    """Writes "long name  [units]"; a dimensionless quantity (units "1" or "") has no bracket.

    A label longer than ``width`` characters is broken into lines (0: never).
    """
    units = units.strip().replace("^2", "²").replace("^3", "³").replace("^-1", "⁻¹")
    bracket = "" if units in ("", "1") else f"[{units}]"
    label = f"{long_name}  {bracket}".strip()
    if 0 < width < len(label):
        return "\n".join([*textwrap.wrap(long_name, width), *([bracket] if bracket else [])])
    return label


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Writes ``stem.png`` (200 dpi) and ``stem.svg`` (text as text, byte for byte repeatable).

    The layout is found once, so both files are the same picture. A file appears whole or not at
    all: it is written aside and renamed.
    """
    png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    pixels, drawing = BytesIO(), BytesIO()
    with drawing_style():
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(pixels, format="png", dpi=200, metadata={"Software": None})
        figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    text = drawing.getvalue().decode("utf-8").replace(_FONT, f"{_FONT}, {_SIMILAR_FONTS}")
    write_whole(png, pixels.getvalue())
    write_whole(svg, text)
    return png, svg
