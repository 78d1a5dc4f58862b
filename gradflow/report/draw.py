"""Draws every figure of a study and writes it as PNG and SVG."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gradflow.plot.bounds import BOUNDED
from gradflow.plot.drawing import Drawing, sentence
from gradflow.plot.sharpness import TITLE as SHARPNESS_TITLE, draw_sharpness
from gradflow.plot.style import drawing_style, save_figure
from gradflow.plot.theory_ratios import TITLE as RATIOS_TITLE, draw_theory_ratios
from gradflow.study.figures.time_series import TimeSeries
from gradflow.study.figures.views import missing_runs, run_views
from gradflow.study.results import StudyResult
from gradflow.study.spec.figure_tables import FigureTable, RunsFigure


def _sharpness(result: StudyResult) -> Drawing | None:
    """Draws the sharpness unless a figure of the spec does."""
    asked = {
        name
        for figure in result.spec.figure
        if isinstance(figure, TimeSeries) and not figure.relative
        for name in figure.observables
    }
    return None if asked.intersection(BOUNDED) else draw_sharpness(run_views(result, ()))


def _theory_ratios(result: StudyResult) -> Drawing | None:
    return draw_theory_ratios(run_views(result, ()))


AUTOMATIC: Mapping[str, tuple[str, Callable[[StudyResult], Drawing | None]]] = {
    "theory_ratios": (RATIOS_TITLE, _theory_ratios),
    "sharpness": (SHARPNESS_TITLE, _sharpness),
}
"""Title and function of figures that no spec asks for: drawn where the runs are made for them."""


@dataclass(frozen=True)
class FigureFile:
    """A figure on disk, with its words."""

    name: str
    title: str
    caption: str
    png: Path
    svg: Path


class FigureError(ValueError):
    """Some figures could not be drawn; ``figures`` holds those that could."""

    def __init__(self, message: str, figures: tuple[FigureFile, ...]) -> None:
        super().__init__(message)
        self.figures = figures


def draw_figures(result: StudyResult) -> tuple[FigureFile, ...]:
    """Draws every figure of the spec, and those of `AUTOMATIC`, into ``result.out / "figures"``.

    **Returns:** one entry for each figure, in the order of the spec, automatic ones last. A figure
    without a name is called after its kind.

    **Raises:** ``FigureError`` (a ``ValueError``) after the others were written, naming each
    figure that could not be drawn, why, and what to write instead.
    """
    done: list[FigureFile] = []
    wrong: list[str] = []
    taken = {figure.name for figure in result.spec.figure if figure.name}
    for index, spec in enumerate(result.spec.figure):
        name = spec.name or _free_name(spec.kind, taken)
        taken.add(name)
        try:
            with drawing_style():
                drawing = _drawn(spec, result)
                png, svg = save_figure(drawing.figure, result.out / "figures" / name)
        except ValueError as error:
            wrong.append(f"figure[{index}] ({spec.kind}, {name!r}): {error}")
            continue
        done.append(FigureFile(name, spec.title, drawing.caption, png, svg))
    for kind, (title, draw) in AUTOMATIC.items():
        with drawing_style():
            drawing = draw(result)
            if drawing is None:
                continue
            name = _free_name(kind, taken)
            png, svg = save_figure(drawing.figure, result.out / "figures" / name)
        done.append(FigureFile(name, title, drawing.caption, png, svg))
    if wrong:
        raise FigureError("\n".join(wrong), tuple(done))
    return tuple(done)


def _drawn(figure: FigureTable, result: StudyResult) -> Drawing:
    """Draws a figure; its caption says which of its runs did not finish."""
    if not isinstance(figure, RunsFigure):
        return figure.draw(result)
    if not run_views(result, figure.runs):
        raise ValueError("runs: none of them finished, so there is nothing to draw")
    drawing, missing = figure.draw(result), missing_runs(result, figure.runs)
    lost = f"Not shown, because they did not finish: {', '.join(missing)}." if missing else ""
    return replace(drawing, caption=sentence(drawing.caption, lost))


def _free_name(kind: str, taken: set[str]) -> str:
    """Returns the kind, or kind_2, kind_3, ... when that is taken."""
    name, number = kind, 2
    while name in taken:
        name, number = f"{kind}_{number}", number + 1
    return name
