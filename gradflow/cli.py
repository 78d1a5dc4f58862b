"""The command line: `gradflow study`, `gradflow run`, `gradflow list`."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradflow.study.build import PreparedRun, prepare
from gradflow.study.experiments import find, titles
from gradflow.study.load import Study, load_study
from gradflow.study.output import OutputError, ResultFolder, check_free
from gradflow.study.progress import Bars, Lines
from gradflow.study.quantities import QUANTITIES
from gradflow.study.record import status, write_claims, write_spec
from gradflow.study.results import StudyResult
from gradflow.study.runner import run_study

HOLDS, CLAIM_FAILS, BAD_INPUT, BROKEN, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses."""

_PIPE_WIDTH = 120
_WIDE = 100
_MARKS = {"holds": ("✓", "green"), "fails": ("✗", "red"), "undecided": ("?", "yellow")}
_WIDEST = max(map(len, QUANTITIES))
_QUANTITIES = "\n".join(f"  {name:<{_WIDEST}}  {q.meaning}" for name, q in QUANTITIES.items())

STUDY_HELP = f"""Run studies: integrate, draw the figures, check the claims.

SPEC is a TOML file or the name of a shipped experiment (see: gradflow list). Every study leaves one
folder, results/NAME/ unless --out says otherwise:

\b
  report.html   the whole study on one self-contained page
  claims.json   every claim with its measured value, error and verdict
  figures/      PNG and SVG
  runs/         one NetCDF file a run (xarray.open_dataset reads it)
  spec.toml     the spec as given; spec.json has every setting as run
  status.json   complete, interrupted or failed

A folder that holds a result is refused, never added to: give --overwrite or another --out. Ctrl-C
ends the runs and keeps what they have, with the status "interrupted".

Exit status: 0 every claim holds; 1 some claim fails or is undecided; 2 bad input; 3 a run broke;
130 interrupted.

A spec to start from (save it as mine.toml, then: gradflow study mine.toml):

\b
  name = "mine"
  [data]
  source = "whitened"             # or moments, file, sklearn
  target = [[1.0]]
  [network]
  init = "weights"                # or gaussian, orthogonal, balanced, unbalanced
  weights = [[[2.0]], [[0.1]]]    # first layer first
  [[run]]
  name = "decay"
  dynamics = {{ kind = "GradientFlow" }}
  regularizers = [ {{ kind = "WeightDecay", rate = 0.01 }} ]
  t1 = 100.0
  observables = ["loss", "imbalance"]
  [[figure]]
  kind = "time_series"
  observables = ["loss", "imbalance"]
  [[claim]]
  sentence = "Weight decay removes the imbalance at twice its rate."
  run = "decay"
  quantity = "rate"
  window = [10.0, 100.0]
  expected = 0.02                 # or "predicted"
  tolerance = 1e-6                # or standard_errors = 3, at_most, at_least

A claim is about one of these quantities:

\b
{_QUANTITIES}
"""

app = typer.Typer(
    help="The training dynamics of deep linear networks: gradient flow, its SDEs and SGD.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Specs = Annotated[
    list[str] | None,
    typer.Argument(metavar="SPEC", help="Files or shipped names (default: two_phases)."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Result folder; with several SPECs, the folder of their folders."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a former result.")]
Short = Annotated[
    bool, typer.Option("--short", help="Run the quick variant: the overrides of [short].")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Use this seed in place of the spec's.")]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Runs carried out at once (default: cores, at most 2).")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


@dataclass(frozen=True)
class Options:
    """How studies are carried out, the same for all of a call."""

    out: Path | None
    overwrite: bool
    short: bool
    seed: int | None
    jobs: int
    quiet: bool
    evaluate: bool


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"gradflow {version('gradflow')}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command(help=STUDY_HELP)
def study(
    specs: Specs = None,
    out: Out = None,
    overwrite: Overwrite = False,
    short: Short = False,
    seed: Seed = None,
    jobs: Jobs = None,
    quiet: Quiet = False,
) -> None:
    """Run studies; `STUDY_HELP` is what users read."""
    _carry_out(specs, Options(out, overwrite, short, seed, _cores(jobs), quiet, evaluate=True))


@app.command()
def run(
    specs: Specs = None,
    out: Out = None,
    overwrite: Overwrite = False,
    short: Short = False,
    seed: Seed = None,
    jobs: Jobs = None,
    quiet: Quiet = False,
) -> None:
    """Integrate the runs of studies and write their NetCDF files: no claims, no figures."""
    _carry_out(specs, Options(out, overwrite, short, seed, _cores(jobs), quiet, evaluate=False))


@app.command("list")
def list_experiments() -> None:
    """List the shipped experiments."""
    found = titles()
    for name, title in found.items():
        typer.echo(f"{name:<{max(map(len, found))}}  {title}".rstrip())


def main() -> None:
    """Entry point of the `gradflow` program."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a check mark
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(BROKEN)


def _cores(jobs: int | None) -> int:
    return jobs or min(2, os.cpu_count() or 1)


def _carry_out(specs: list[str] | None, options: Options) -> None:
    """Check everything that can be checked, then carry out one study after the other."""
    studies, wrong = _load_all(specs or ["two_phases"], options)
    folders = [_folder(study, options, len(studies)) for study, _ in studies]
    for number, folder in enumerate(folders):
        try:
            check_free(folder, overwrite=options.overwrite)
        except ValueError as error:
            wrong.append(str(error))
        if folder in folders[:number]:
            wrong.append(f"{folder}: two of the SPECs are to write here; rename one of them")
    if wrong:
        typer.echo("\n".join(wrong), err=True)
        raise typer.Exit(BAD_INPUT)
    codes = []
    for (study, prepared), folder in zip(studies, folders, strict=True):
        codes.append(_carry_out_one(study, prepared, folder, options))
        if codes[-1] == INTERRUPTED:
            break
    raise typer.Exit(max(codes))


def _load_all(
    specs: list[str], options: Options
) -> tuple[list[tuple[Study, tuple[PreparedRun, ...]]], list[str]]:
    studies, wrong = [], []
    for spec in specs:
        try:
            study = load_study(find(spec), short=options.short, seed=options.seed)
            studies.append((study, prepare(study)))
        except ValueError as error:
            wrong.append(str(error))
    return studies, wrong


def _folder(study: Study, options: Options, count: int) -> Path:
    if options.out is not None and count == 1:
        return options.out
    return (options.out or Path("results")) / study.spec.name


def _carry_out_one(
    study: Study, prepared: tuple[PreparedRun, ...], out: Path, options: Options
) -> int:
    """Run one study into its folder; return its exit status."""
    console = _console(options.quiet)
    try:
        folder = ResultFolder(out, overwrite=options.overwrite)
    except OutputError as error:
        typer.echo(str(error), err=True)
        return BAD_INPUT
    wrong = ""
    try:
        write_spec(folder, study)
        result = _integrate(study, prepared, folder, options, console)
        if options.evaluate and result.runs and result.status != "interrupted":
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
        typer.echo(f'run "{name}" broke: {reason}', err=True)
    if wrong:
        typer.echo(wrong, err=True)
    _summarize(replace(result, out=final), console)
    if result.status == "interrupted":
        return INTERRUPTED
    if result.errors:
        return BROKEN
    if wrong:
        return BAD_INPUT
    return HOLDS if result.holds else CLAIM_FAILS


def _integrate(
    study: Study,
    prepared: tuple[PreparedRun, ...],
    folder: ResultFolder,
    options: Options,
    console: Console,
) -> StudyResult:
    title = study.spec.title or study.spec.name
    count = f"{len(prepared)} run{'s' * (len(prepared) != 1)}"
    console.print(f"{title}: {count}", style="bold", markup=False, highlight=False)
    settings = {"jobs": options.jobs, "evaluate": options.evaluate}
    if options.quiet or not console.is_terminal:
        lines = Lines(console, study.spec.run)
        return run_study(study, prepared, folder.path, reporter=lines, **settings)
    with Bars(console, study.spec.run) as bars:
        return run_study(study, prepared, folder.path, reporter=bars, **settings)


def _evaluate(result: StudyResult, folder: ResultFolder) -> str:
    """Write verdicts, figures and page; return what could not be drawn, if anything."""
    # Drawing takes a second to import, which `gradflow list` need not wait for.
    from gradflow.report.draw import FigureError, draw_figures
    from gradflow.report.page import write_page

    write_claims(folder, result)
    wrong = ""
    try:
        figures = draw_figures(result)
    except FigureError as error:
        figures, wrong = error.figures, str(error)
    write_page(result, figures)
    return wrong


def _console(quiet: bool) -> Console:
    is_terminal = sys.stdout.isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(quiet=quiet, width=width)


def _summarize(result: StudyResult, console: Console) -> None:
    """End with the table of claims and where the results are."""
    if result.status == "interrupted":
        ended = sum(not run.trajectory.interrupted for run in result.runs.values())
        total = len(result.spec.run)
        console.print(f"Interrupted: {ended} of {total} runs reached their end.", highlight=False)
    if result.claims:
        console.print(_table(result, with_rules=console.width >= _WIDE))
        held = sum(claim.verdict == "holds" for claim in result.claims)
        console.print(f"{held} of {len(result.claims)} claims hold.", highlight=False)
    page = result.out / "report.html"
    where = f"Report: {page}" if page.is_file() else f"Results: {result.out}"
    console.print(where, markup=False, highlight=False, soft_wrap=True)


def _table(result: StudyResult, with_rules: bool) -> Table:
    """The claims; on a narrow terminal the rule stands below the sentence."""
    from gradflow.report.formatting import number, with_error

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
        measured = with_error(claim.measured, claim.measured_error)
        cells = [Text(f"{mark} {claim.verdict}", style=style), sentence, measured, expected]
        table.add_row(*cells, *([claim.rule] if with_rules else []))
    return table
