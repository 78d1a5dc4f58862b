"""Carrying out a study: every run, what is read off it, and the verdicts on the claims."""

from __future__ import annotations

import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gradflow.analysis.phases import phases
from gradflow.analysis.predict import predict
from gradflow.simulate import InterruptedWarning, simulate
from gradflow.study.build import PreparedRun
from gradflow.study.claims import judge_all
from gradflow.study.load import Study
from gradflow.study.progress import Reporter, Silent, divergence
from gradflow.study.results import RunResult, StudyResult
from gradflow.study.spec import StudySpec
from gradflow.trajectory import Trajectory

RUNS = "runs"
"""The folder of the NetCDF files inside a result folder."""

_PATIENCE_S = 0.1


def run_study(
    study: Study,
    prepared: Sequence[PreparedRun],
    out: Path,
    *,
    reporter: Reporter | None = None,
    evaluate: bool = True,
) -> StudyResult:
    """Integrate the runs of a study one after the other, and judge its claims.

    Each trajectory is written to `out/runs/NAME.nc` as soon as its run is over. Ctrl-C ends the
    runs at their next report of progress; what they have is kept and the result is "interrupted".
    A run that breaks does not stop the others; it is listed in `errors` and the result is "failed".

    **Arguments:**

    - `study`, `prepared`: what `load_study` and `prepare` returned.
    - `out`: an existing folder.
    - `reporter`: is told how the runs get on.
    - `evaluate`: whether to measure phases, rates and claims, or to integrate only.
    """
    start = time.perf_counter()
    execution = _Execution(study.spec, out, reporter or Silent(), evaluate)
    execution.carry_out(prepared)
    results = {run.spec.name: execution.results.get(run.spec.name) for run in prepared}
    runs = {name: result for name, result in results.items() if result is not None}
    is_interrupted = execution.stop.is_set()
    claims = judge_all(study.spec.claim, runs) if evaluate and not is_interrupted else ()
    return StudyResult(
        spec=study.spec,
        runs=runs,
        claims=claims,
        out=out,
        wall_time_s=time.perf_counter() - start,
        status="interrupted" if is_interrupted else "failed" if execution.errors else "complete",
        errors=execution.errors,
    )


class _Execution:
    """The runs of one study on their way."""

    def __init__(self, spec: StudySpec, out: Path, reporter: Reporter, evaluate: bool) -> None:
        self.eps = spec.eps
        self.predicted = {
            name
            for claim in spec.claim
            if claim.expected == "predicted" or claim.quantity == "predicted_ratio"
            for name in claim.run_names
        }
        self.out = out
        self.reporter = reporter
        self.evaluate = evaluate
        self.stop = threading.Event()
        self.results: dict[str, RunResult] = {}
        self.errors: dict[str, str] = {}
        self.warnings: dict[int, list[str]] = {}  # by thread

    def carry_out(self, prepared: Sequence[PreparedRun]) -> None:
        """Carry out all runs, or until Ctrl-C.

        They run in one thread beside the main one, which is left to hear Ctrl-C. Not in two: XLA's
        CPU client (jaxlib 0.10.2) can wait for ever when two threads execute programs at once.
        """
        with ThreadPoolExecutor(1) as pool, _warnings_go_to(self._keep_warning):
            pending: set[Future[None]] = {pool.submit(self._one, run) for run in prepared}
            while pending:
                try:
                    pending = wait(pending, timeout=_PATIENCE_S).not_done
                except KeyboardInterrupt:
                    for future in pending:
                        future.cancel()
                    if not self.stop.is_set():
                        self.reporter.stopping()
                    self.stop.set()

    def _one(self, prepared: PreparedRun) -> None:
        if self.stop.is_set():
            return
        run, start = prepared.spec, time.perf_counter()
        self.warnings[threading.get_ident()] = []
        self.reporter.started(run)
        try:
            trajectory = self._simulate(prepared)
            trajectory.save(self.out / RUNS / f"{run.name}.nc")
            result = self._result(prepared, trajectory)
        except KeyboardInterrupt:  # nothing was recorded yet
            return
        except Exception as error:
            self.errors[run.name] = _reason(error)
            return
        self.results[run.name] = result
        self.reporter.finished(result, time.perf_counter() - start)

    def _simulate(self, prepared: PreparedRun) -> Trajectory:
        run = prepared.spec

        def progress(done: float, total: float, message: str) -> None:
            if self.stop.is_set():
                raise KeyboardInterrupt
            self.reporter.advanced(run, done, total, message)

        return simulate(
            prepared.problem,
            prepared.network,
            prepared.dynamics,
            t1=run.t1,
            steps=run.steps,
            replicas=run.replicas,
            key=prepared.key,
            save=run.save.times or run.save.points or 2,
            spacing=run.save.spacing,
            observables=run.observables,
            store_weights=run.store_weights,
            progress=progress,
        )

    def _result(self, prepared: PreparedRun, trajectory: Trajectory) -> RunResult:
        run = prepared.spec
        notes = list(self.warnings[threading.get_ident()])
        result = RunResult(run.name, run.title, run.group, run, trajectory)
        if diverged := divergence(result):
            notes.append(diverged)
        if not self.evaluate or trajectory.interrupted:
            return replace(result, notes=tuple(notes))
        measured = _attempt(lambda: phases(trajectory, eps=self.eps), "phases", notes)
        predicted = None
        if run.regularizers or run.name in self.predicted:
            predicted = _attempt(
                lambda: predict(
                    prepared.problem, prepared.network, prepared.dynamics, eps=self.eps
                ),
                "prediction",
                notes,
            )
        return replace(
            result,
            phases=measured,
            rate=measured.regularization_rate if measured else None,
            prediction=predicted,
            notes=tuple(notes),
        )

    def _keep_warning(self, message: str) -> None:
        self.warnings.setdefault(threading.get_ident(), []).append(message)


_T = TypeVar("_T")


def _attempt(compute: Callable[[], _T], what: str, notes: list[str]) -> _T | None:
    """The value, or None and a note where the run does not have it."""
    try:
        return compute()
    except ValueError as error:
        notes.append(f"{what}: {error}")
        return None


@contextmanager
def _warnings_go_to(keep: Callable[[str], None]) -> Iterator[None]:
    """Hand over warnings that would be printed; those that are errors stay errors."""
    with warnings.catch_warnings():

        def show(message: Warning | str, *_: Any) -> None:
            keep(str(message))

        warnings.showwarning = show
        warnings.simplefilter("ignore", InterruptedWarning)  # the status of the study says it
        yield


def _reason(error: Exception) -> str:
    """The message of a user error; the traceback of anything else."""
    if isinstance(error, ValueError | TypeError) and str(error):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
