"""Draws every figure of a study and writes it as PNG and SVG."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradflow.plot.bounds import BOUNDED
from gradflow.plot.conservation import draw_conservation
from gradflow.plot.drawing import Drawing, divergence_note, sentence
from gradflow.plot.phase_portrait import draw_phase_portrait
from gradflow.plot.rates import draw_rates
from gradflow.plot.scaling import draw_scaling
from gradflow.plot.sharpness import TITLE as SHARPNESS_TITLE, draw_sharpness
from gradflow.plot.style import drawing_style, save_figure
from gradflow.plot.theory_ratios import TITLE as RATIOS_TITLE, draw_theory_ratios
from gradflow.plot.time_series import draw_time_series
from gradflow.report.scaling_points import scaling_points
from gradflow.report.study_orders import draw_study_orders
from gradflow.report.views import missing_runs, run_views
from gradflow.study.results import StudyResult
from gradflow.study.spec.spec import FigureBase, Scaling, TimeSeries


def _of_runs(draw: Callable[..., Drawing]) -> Callable[[StudyResult, Any], Drawing]:
    """Lets a figure of runs be asked for by its table of the spec: its keys are the arguments."""

    def drawn(result: StudyResult, spec: FigureBase) -> Drawing:
        options = spec.model_dump(exclude={"kind", "name", "runs"})
        return draw(run_views(result, spec.runs), **options)

    return drawn


def _scaling(result: StudyResult, spec: Scaling) -> Drawing:
    views = run_views(result, spec.runs)
    points, notes = scaling_points(result, views, spec)
    pointless = [view for view in views if view.name not in {p.view.name for p in points}]
    return draw_scaling(
        points,
        spec.quantity,
        spec.parameter,
        title=spec.title,
        caption=spec.caption,
        observable=spec.observable,
        slope=spec.slope,
        notes=[*notes, divergence_note(pointless)],
    )


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


KINDS: Mapping[str, Callable[[StudyResult, Any], Drawing]] = {
    "phase_portrait": _of_runs(draw_phase_portrait),
    "time_series": _of_runs(draw_time_series),
    "rates": _of_runs(draw_rates),
    "scaling": _scaling,
    "conservation": _of_runs(draw_conservation),
    "orders": draw_study_orders,
}
"""Every figure kind of a spec and the function that draws it."""

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
            if spec.kind != "orders" and not run_views(result, spec.runs):
                raise ValueError("runs: none of them finished, so there is nothing to draw")
            with drawing_style():
                drawing = KINDS[spec.kind](result, spec)
                png, svg = save_figure(drawing.figure, result.out / "figures" / name)
        except ValueError as error:
            wrong.append(f"figure[{index}] ({spec.kind}, {name!r}): {error}")
            continue
        missing = [] if spec.kind == "orders" else missing_runs(result, spec.runs)
        lost = f"Not shown, because they did not finish: {', '.join(missing)}." if missing else ""
        caption = sentence(drawing.caption, lost)
        done.append(FigureFile(name, spec.title, caption, png, svg))
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


def _free_name(kind: str, taken: set[str]) -> str:
    """Returns the kind, or kind_2, kind_3, ... when that is taken."""
    name, number = kind, 2
    while name in taken:
        name, number = f"{kind}_{number}", number + 1
    return name
