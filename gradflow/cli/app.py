"""The command line: `gradflow study`, `run`, `orders`, `predict`, `kinds` and `list`."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
import typer

from gradflow.cli.experiments import titles

BROKEN = 3
"""Exit status after an unexpected error."""

ALLOCATIONS = 50_000
"""New objects after which Python looks for garbage: imports and traces make millions that stay, and
looking through them after every 700 takes a quarter of the time of importing."""

STUDY_HELP = """Run studies: integrate, draw the figures, check the claims.

SPEC is a TOML file or the name of a shipped experiment (see: gradflow list). Every study leaves one
folder, results/NAME/ unless --out says otherwise:

\b
  report.html   the whole study on one self-contained page
  claims.json   every claim with its measured value, error and verdict
  figures/      PNG and SVG
  runs/         one NetCDF file a run (xarray.open_dataset reads it)
  orders/       for each [[orders]] table a CSV file (distance at every step size) and a JSON file
                (fitted orders with intervals, status and range of the fit)
  spec.toml     the spec as given; spec.json has every setting as run
  status.json   complete, interrupted or failed

A folder that holds a result is refused, never added to: give --overwrite or another --out. Ctrl-C
ends the runs and keeps what they have, with the status "interrupted".

Exit status: 0 every claim holds; 1 some claim fails or is undecided; 2 bad input; 3 a run broke;
130 interrupted. A claim is undecided if its quantity was not measured (an observable is missing or
not a number, a phase not reached, a run diverged), if a rate is not constant over its window, or if
errors are too large to tell; its hint says what to change. Rates that theory misses are counted
beside the claims and do not change the exit status.

Which dynamics, regularizers, observables, figures and quantities there are, and their keys:
gradflow kinds. A wrong key is answered with the allowed ones. A random run takes
normals = { antithetic = true, precision = "single" }: replicas in pairs of opposite noise. Tables
that measure orders of convergence: gradflow orders --help.

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
  dynamics = { kind = "GradientFlow" }
  regularizers = [ { kind = "WeightDecay", rate = 0.01 } ]
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
"""

ORDERS_HELP = """Measure how fast two dynamics approach each other as the step size goes to 0.

SPEC is a TOML file or the name of a shipped experiment (default: discretization). Its [[orders]]
tables are carried out, its runs are not; `gradflow study` carries out both. For every table the
distance at every step size, the fitted order with its confidence interval and the range of the fit
are printed, drawn and written to results/NAME/orders/: the distances to TABLE.csv, the orders to
TABLE.json (what is unknown is null). Where the distance cannot be told from the
Monte-Carlo noise the answer is "not resolved" with the replicas that would resolve it; where the
leading coefficient nearly vanishes it is "not asymptotic". Neither is an order.

\b
  [[orders]]
  name = "sgd_and_sde"
  regularizers = [ { kind = "LabelNoise", std = 0.8 } ]
  first = { kind = "GradientDescent" }          # no step_size: it takes all of step_sizes
  second = { kind = "StochasticFlow", order = 2 }
  step_sizes = [0.1, 0.05, 0.025, 0.0125]
  t1 = 1.0                                      # flow time at which they are compared
  distance = "weak"                             # of means; "strong": of paths
  observables = ["imbalance", "end_to_end"]     # strong: also "weights"
  replicas = 20000
  [[figure]]
  kind = "orders"
  [[claim]]
  sentence = "The SDE of order 2 has weak order 2."
  orders = "sgd_and_sde"
  quantity = "order"
  observable = "imbalance"
  expected = 2.0
  absolute_tolerance = 0.3

Exit status as for `gradflow study`.
"""

PREDICT_HELP = """Say what theory predicts of the runs of a study, without running them.

SPEC is a TOML file or the name of a shipped experiment (see: gradflow list). Nothing is written.
Every run is a line of the table; times and rates are in flow time t = h k of step size h, step k:

\b
  Optimization ends at t  where noise or decay stop the fall of the loss
  Rate, leading order     -d log D/dt of the imbalance D at the minimum reached, for h -> 0
  Rate, finite step       the same, exact in the step size
  Half-life in t          until D has halved along the slow flow
  End: D (block traces)   the imbalance where the slow flow ends, and the traces of the Hessian's
                          diagonal blocks there, which label noise makes equal
  h lambda_max            at the minimum reached; the theory ends at 2, with momentum beta at
                          2 (1 + beta)
  Largest h, mean square  the step size there from which on noise that grows with the fluctuation
                          it makes has training diverge: below the edge for batches and noise on
                          inputs

A dash means that there is no such number, "see below" that there is no prediction at all, because
theory does not cover the run or training diverges; a line below the table says why.

Half-lives and end points are integrated, which takes seconds a run, most of them for compiling.
From Python: print(gf.predict(problem, net, 0.1)), and the network after ten million
steps is gf.predict(problem, net, 0.1).at(steps=10**7).net.

\b
  gradflow predict two_phases
  gradflow predict mine.toml --run sgd --run sde

Exit status: 0 every run has a prediction; 1 some run has none; 2 bad input; 3 an unexpected error.
"""

KINDS_HELP = """Say what a spec can name: dynamics, regularizers, observables, figures, quantities.

Without a NAME, all of them with a sentence on each. With a NAME, the keys of its table with their
types and defaults.

\b
  gradflow kinds
  gradflow kinds LabelNoise rate time_series

Exit status: 0; 2 an unknown NAME.
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
OrdersSpecs = Annotated[
    list[str] | None,
    typer.Argument(metavar="SPEC", help="Files or shipped names (default: discretization)."),
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
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="GRADFLOW_WORKERS",
        help="Runs carried out at once, each in a process (default: a run for each core, up to 8).",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


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
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Run studies; `STUDY_HELP` is what users read."""
    _carry_out(specs, out, overwrite, short, seed, workers, quiet, part="study")


@app.command()
def run(
    specs: Specs = None,
    out: Out = None,
    overwrite: Overwrite = False,
    short: Short = False,
    seed: Seed = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Integrate the runs of studies and write their NetCDF files: no claims, no figures."""
    _carry_out(specs, out, overwrite, short, seed, workers, quiet, part="runs")


@app.command(help=ORDERS_HELP)
def orders(
    specs: OrdersSpecs = None,
    out: Out = None,
    overwrite: Overwrite = False,
    short: Short = False,
    seed: Seed = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Measure the [[orders]] tables of studies; `ORDERS_HELP` is what users read."""
    _carry_out(
        specs or ["discretization"], out, overwrite, short, seed, workers, quiet, part="orders"
    )


@app.command(help=PREDICT_HELP)
def predict(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="File or shipped name (default: two_phases).")
    ] = "two_phases",
    run: Annotated[
        list[str] | None,
        typer.Option("--run", metavar="NAME", help="Only this run; may be repeated."),
    ] = None,
    short: Short = False,
) -> None:
    """Predict the runs of a study; `PREDICT_HELP` is what users read."""
    _keep_compiled_programs()
    from gradflow.cli.commands import predict_runs  # JAX takes seconds to import

    raise typer.Exit(predict_runs(spec, run or [], short=short))


@app.command(help=KINDS_HELP)
def kinds(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="A dynamics, regularizer, observable, ..."),
    ] = None,
) -> None:
    """Print the registries; `KINDS_HELP` is what users read."""
    from gradflow.cli.kinds import print_kinds  # JAX takes seconds to import

    raise typer.Exit(print_kinds(names or []))


@app.command("list")
def list_experiments() -> None:
    """List the shipped experiments."""
    found = titles()
    for name, title in found.items():
        typer.echo(f"{name:<{max(map(len, found))}}  {title}".rstrip())


def main() -> None:
    """Entry point of the `gradflow` program."""
    gc.set_threshold(ALLOCATIONS)
    for wanted in (signal.SIGINT, signal.SIGTERM):
        signal.signal(wanted, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a check mark
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(BROKEN)
    finally:
        gc.freeze()  # at its end Python would look through everything once more


def _carry_out(
    specs: list[str] | None,
    out: Path | None,
    overwrite: bool,
    short: bool,
    seed: int | None,
    workers: int | None,
    quiet: bool,
    part: Literal["study", "runs", "orders"],
) -> None:
    specs = specs or ["two_phases"]
    if not quiet and sys.stderr.isatty():
        typer.echo(f"Checking {', '.join(specs)} ...", err=True)  # takes seconds
    _keep_compiled_programs()
    # JAX takes seconds to import, which --help and list need not wait for.
    from gradflow.cli.commands import Options, carry_out

    options = Options(out, overwrite, short, seed, quiet, workers, part)
    raise typer.Exit(carry_out(specs, options))


def _keep_compiled_programs() -> None:
    """Let JAX keep what it compiles, so that the next run of a study starts sooner.

    diffrax reports failures through a host callback, and programs with one are not kept; as NaN and
    result codes, which gradflow reads, they are. Small programs are kept too: a study has dozens,
    and reading one takes a fifth of the time of compiling it.
    """
    os.environ.setdefault("EQX_ON_ERROR", "nan")
    cache = platformdirs.user_cache_path("gradflow") / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
