"""What the commands of `gradflow` do once the command line is understood."""

from __future__ import annotations

import sys
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradflow.analysis.prediction.predict import predict
from gradflow.analysis.prediction.prediction import Prediction
from gradflow.analysis.prediction.rate_law import shown_imbalance
from gradflow.cli.experiments import find
from gradflow.cli.terminal import (
    BAD_INPUT,
    BROKEN,
    CLAIM_FAILS,
    HOLDS,
    INTERRUPTED,
    console_of,
)
from gradflow.geometry.imbalance import squared_norms
from gradflow.plot.formatting import MISSING, arrows, duration, number, with_error
from gradflow.report.draw import FigureError, draw_figures
from gradflow.report.page import write_page
from gradflow.report.tables import summary
from gradflow.simulation.progress import announced
from gradflow.study.results import StudyResult
from gradflow.study.run.build import Prepared, PreparedRun, prepare
from gradflow.study.run.crew import Crew, crew_of, workers_for
from gradflow.study.run.output import OutputError, ResultFolder, check_free
from gradflow.study.run.progress import Bars, Lines
from gradflow.study.run.record import status, write_claims, write_spec
from gradflow.study.run.runner import run_study
from gradflow.study.spec.errors import not_one_of
from gradflow.study.spec.load import Study, load_study
from gradflow.study.spec.part import Part

_WIDE = 100
_MARKS = {"holds": ("✓", "green"), "fails": ("✗", "red"), "undecided": ("?", "yellow")}
_PREDICTED = (
    "Optimization\nends at t",
    "Rate,\nleading order",
    "Rate,\nfinite step",
    "Half-life\nin t",
    "End: D\n(block traces)",
    "h lambda_max at\nthe minimum",
    "Largest h,\nmean square",
)
_REFUSED = "see below"
_ARROWS = "→: not one number, but over the thirds of the window"


@dataclass(frozen=True)
class Options:
    """How studies are carried out, the same for all of a call."""

    out: Path | None
    overwrite: bool
    short: bool
    seed: int | None
    quiet: bool
    workers: int | None
    part: Part

    @property
    def evaluate(self) -> bool:
        """Whether claims are judged and figures drawn."""
        return self.part != "runs"


def carry_out(specs: list[str], options: Options) -> int:
    """Check everything that can be checked, then carry out one study after the other.

    **Returns:** the exit status: the largest of the studies' own.
    """
    studies, wrong = _load_all(specs, options)
    folders = [_folder(study, options, len(studies)) for study in studies]
    for place, folder in enumerate(folders):
        try:
            check_free(folder, overwrite=options.overwrite)
        except ValueError as error:
            wrong.append(str(error))
        if folder in folders[:place]:
            wrong.append(f"{folder}: two of the SPECs are to write here; rename one of them")
    if wrong:
        return _refuse(wrong)
    jobs = max(len(study.spec.run) + len(study.spec.orders) for study in studies)
    with closing(crew_of(min(options.workers or workers_for(jobs), jobs))) as crew:
        prepared, wrong = _prepare_all(studies)
        if wrong:
            return _refuse(wrong)
        codes = []
        for study, built, folder in zip(studies, prepared, folders, strict=True):
            codes.append(_carry_out_one(study, built, folder, options, crew))
            if codes[-1] == INTERRUPTED:
                break
    return max(codes)


def _refuse(wrong: list[str]) -> int:
    typer.echo("\n".join(wrong), err=True)
    return BAD_INPUT


def predict_runs(spec: str, names: list[str], *, short: bool) -> int:
    """Print what theory predicts of the runs of a study, or of those named.

    **Returns:** the exit status.
    """
    try:
        study = load_study(find(spec), short=short, part="runs")
        prepared = prepare(study)
    except ValueError as error:
        typer.echo(str(error), err=True)
        return BAD_INPUT
    runs = {run.spec.name: run for run in prepared.runs}
    unknown = [name for name in names if name not in runs]
    if unknown:
        faults = [f"{spec}: --run: {not_one_of(name, runs, what='runs')}" for name in unknown]
        typer.echo("\n".join(faults), err=True)
        return BAD_INPUT
    chosen = [run for name, run in runs.items() if not names or name in names]
    console = console_of()
    table, notes, refused = Table(box=box.SIMPLE_HEAD, pad_edge=False), [], 0
    table.add_column("Run")
    for title in _PREDICTED:
        table.add_column(title, justify="right")
    for place, run in enumerate(chosen, start=1):
        label, began = f"run {place} of {len(chosen)}: {run.spec.name}", time.monotonic()
        with announced(label, patience=0.0):
            cells, note = _foretold(run, study.spec.eps)
        if not sys.stderr.isatty():
            typer.echo(f"{label} ({duration(time.monotonic() - began)})", err=True)
        refused += cells is None
        table.add_row(run.spec.name, *(cells or [_REFUSED, *[""] * (len(_PREDICTED) - 1)]))
        notes += [f"{run.spec.name}: {note}"] if note else []
    console.print(study.spec.title or study.spec.name, style="bold", markup=False, highlight=False)
    console.print(table)
    for note in notes:
        console.print(note, style="dim", markup=False, highlight=False)
    if refused:
        console.print(
            f"{refused} of {_count(len(chosen), 'run')} without a prediction.", highlight=False
        )
    return CLAIM_FAILS if refused else HOLDS


def _foretold(run: PreparedRun, eps: float) -> tuple[list[str] | None, str]:
    """The cells of one run, None if there is no prediction, and why some of them are empty."""
    try:
        found = predict(run.problem, run.network, run.dynamics, eps=eps)
    except ValueError as error:
        return None, str(error)
    cells = [
        number(found.optimization_end),
        number(found.leading_rate),
        number(found.imbalance_rate),
        number(found.half_life),
        _end_cell(found),
        number(found.sharpness),
        number(found.largest_step_size),
    ]
    texts = (found.start_note, found.reason, found.end_reason)
    reasons = dict.fromkeys(text for text in texts if text)
    return cells, "; ".join(reasons)


def _end_cell(found: Prediction) -> str:
    if found.end_imbalance is None or found.end_block_traces is None:
        return MISSING
    traces = ", ".join(map(number, found.end_block_traces.tolist()))
    norms = () if found.end is None else tuple(squared_norms(found.end).tolist())
    return f"{number(shown_imbalance(found.end_imbalance, norms))}\n({traces})"


def _load_all(specs: list[str], options: Options) -> tuple[list[Study], list[str]]:
    studies, wrong = [], []
    for spec in specs:
        try:
            study = load_study(
                find(spec), short=options.short, seed=options.seed, part=options.part
            )
            studies.append(study)
        except ValueError as error:
            wrong.append(str(error))
    return studies, wrong


def _prepare_all(studies: list[Study]) -> tuple[list[Prepared], list[str]]:
    prepared, wrong = [], []
    for study in studies:
        try:
            prepared.append(prepare(study))
        except ValueError as error:
            wrong.append(str(error))
    return prepared, wrong


def _folder(study: Study, options: Options, count: int) -> Path:
    if options.out is not None and count == 1:
        return options.out
    return (options.out or Path("results")) / study.spec.name


def _carry_out_one(
    study: Study, prepared: Prepared, out: Path, options: Options, crew: Crew
) -> int:
    """Run one study into its folder; return its exit status."""
    console = console_of(quiet=options.quiet)
    try:
        folder = ResultFolder(out, overwrite=options.overwrite)
    except OutputError as error:
        typer.echo(str(error), err=True)
        return BAD_INPUT
    wrong = ""
    try:
        write_spec(folder, study)
        result = _integrate(study, prepared, folder, options, console, crew)
        if options.evaluate and (result.runs or result.orders) and result.status != "interrupted":
            wrong = _evaluate(result, folder)
    except BaseException as error:
        ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        folder.publish({"status": ended, "errors": {"study": repr(error)}})
        raise
    try:
        final = folder.publish(status(result, study))
    except OutputError as error:
        typer.echo(str(error), err=True)
        return BAD_INPUT
    for name, reason in result.errors.items():
        typer.echo(f'"{name}" broke: {reason}', err=True)
    if wrong:
        typer.echo(wrong, err=True)
    _summarize(replace(result, out=final), console, with_orders=options.part == "orders")
    if result.status == "interrupted":
        return INTERRUPTED
    if result.errors:
        return BROKEN
    if wrong:
        return BAD_INPUT
    return HOLDS if result.holds else CLAIM_FAILS


def _integrate(
    study: Study,
    prepared: Prepared,
    folder: ResultFolder,
    options: Options,
    console: Console,
    crew: Crew,
) -> StudyResult:
    title = study.spec.title or study.spec.name
    counts = [_count(len(prepared.runs), "run"), _count(len(prepared.orders), "[[orders]] table")]
    what = " and ".join(count for count in counts if count)
    console.print(f"{title}: {what}", style="bold", markup=False, highlight=False)
    jobs = [*study.spec.run, *study.spec.orders]
    plain = options.quiet or not console.is_terminal
    with nullcontext(Lines(console, jobs)) if plain else Bars(console, jobs) as reporter:
        return run_study(
            study,
            prepared,
            folder.path,
            reporter=reporter,
            evaluate=options.evaluate,
            crew=crew,
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}" if number else ""


def _evaluate(result: StudyResult, folder: ResultFolder) -> str:
    """Write verdicts, figures and page; return what could not be drawn, if anything."""
    write_claims(folder, result)
    wrong = ""
    try:
        figures = draw_figures(result)
    except FigureError as error:
        figures, wrong = error.figures, str(error)
    write_page(result, figures)
    return wrong


def _summarize(result: StudyResult, console: Console, *, with_orders: bool) -> None:
    """End with the table of claims and where the results are."""
    if result.status == "interrupted":
        done = [*result.runs.values(), *result.orders.values()]
        ended = sum(not job.interrupted for job in done)
        total = len(result.spec.run) + len(result.spec.orders)
        what = "runs and tables" if result.spec.orders else "runs"
        text = f"Interrupted: {ended} of {total} {what} reached their end."
        console.print(text, highlight=False)
    for orders in result.orders.values() if with_orders else ():
        console.print(f"{orders.label}", style="bold", markup=False, highlight=False)
        console.print(f"{orders.orders}\n", markup=False, highlight=False)
    if result.claims:
        console.print(_table(result, with_rules=console.width >= _WIDE))
        if any(claim.parts for claim in result.claims):
            console.print(_ARROWS, style="dim", highlight=False)
        console.print(summary(result), highlight=False)
    page = result.out / "report.html"
    where = f"Report: {page}" if page.is_file() else f"Results: {result.out}"
    console.print(where, markup=False, highlight=False, soft_wrap=True)


def _table(result: StudyResult, with_rules: bool) -> Table:
    """The claims; on a narrow terminal the rule stands below the sentence."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Verdict", no_wrap=True)
    table.add_column("Claim", ratio=1)
    table.add_column("Measured", justify="right", no_wrap=True)
    table.add_column("Expected", justify="right", no_wrap=True)
    if with_rules:
        table.add_column("Rule")
    for claim in result.claims:
        mark, style = _MARKS[claim.verdict]
        expected = claim.expected if isinstance(claim.expected, str) else number(claim.expected)
        sentence = Text(claim.sentence)
        if not with_rules:
            sentence.append(f"\n{claim.rule}", style="dim")
        if claim.verdict != "holds" and claim.detail:
            sentence.append(f"\n{claim.detail}", style="dim")
        measured = arrows(claim.parts) or with_error(claim.measured, claim.measured_error)
        cells = [Text(f"{mark} {claim.verdict}", style=style), sentence, measured, expected]
        table.add_row(*cells, *([claim.rule] if with_rules else []))
    return table
