"""Carrying out a study: every run, what is read off it, and the verdicts on the claims."""

from __future__ import annotations

import json
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gradflow.analysis.convergence.orders import orders as measure_orders
from gradflow.analysis.phases import phases
from gradflow.analysis.prediction.along import rate_along
from gradflow.analysis.prediction.predict import predict
from gradflow.analysis.rates import decay_rate
from gradflow.analysis.unmeasured import in_spec
from gradflow.dynamics.slow_flow import SlowFlow
from gradflow.results.trajectory import Trajectory
from gradflow.simulation.divergence import DivergedWarning
from gradflow.simulation.simulate import InterruptedWarning, simulate
from gradflow.study.claims.claims import judge_all
from gradflow.study.results import OrdersResult, RunResult, StudyResult
from gradflow.study.run.build import Prepared, PreparedOrders, PreparedRun
from gradflow.study.run.progress import Job, Reporter, Silent, divergence
from gradflow.study.run.record import orders_record
from gradflow.study.spec.load import Study
from gradflow.study.spec.spec import StudySpec

RUNS = "runs"
"""The folder of the NetCDF files inside a result folder."""

ORDERS = "orders"
"""The folder of the tables of distances inside a result folder."""

FIRST_STEP = 1e-6
"""Share of its length that a run without a step size makes in order to be compiled."""

_PATIENCE_S = 0.1


def run_study(
    study: Study,
    prepared: Prepared,
    out: Path,
    *,
    reporter: Reporter | None = None,
    evaluate: bool = True,
) -> StudyResult:
    """Carry out the runs of a study and its [[orders]] tables, and judge its claims.

    Each trajectory is written to `out/runs/NAME.nc` and each table of distances to
    `out/orders/NAME.csv`, its fitted orders to `out/orders/NAME.json`, as soon as it is there.
    Ctrl-C ends the jobs at their next report of progress; what they have is kept and the result is
    "interrupted". A job that breaks does not stop the others; it is listed in `errors` and the
    result is "failed".

    **Arguments:**

    - `study`, `prepared`: what `load_study` and `prepare` returned.
    - `out`: an existing folder.
    - `reporter`: is told how the runs get on.
    - `evaluate`: whether to measure phases, rates and claims, or to integrate only.
    """
    start = time.perf_counter()
    execution = _Execution(study.spec, out, reporter or Silent(), evaluate)
    execution.carry_out(prepared)
    runs, orders = execution.results, execution.orders
    is_interrupted = execution.stop.is_set()
    claims = judge_all(study.spec.claim, runs, orders) if evaluate and not is_interrupted else ()
    return StudyResult(
        spec=study.spec,
        runs=runs,
        claims=claims,
        out=out,
        wall_time_s=time.perf_counter() - start,
        status="interrupted" if is_interrupted else "failed" if execution.errors else "complete",
        errors=execution.errors,
        orders=orders,
    )


class _Execution:
    """The jobs of one study on their way."""

    def __init__(self, spec: StudySpec, out: Path, reporter: Reporter, evaluate: bool) -> None:
        self.eps = spec.eps
        self.predicted = {
            name
            for claim in spec.claim
            if claim.expected == "predicted" or claim.quantity == "predicted_ratio"
            for name in claim.run_names
        }
        self.timed = {
            name for claim in spec.claim if claim.quantity == "speed_up" for name in claim.run_names
        }
        self.out = out
        self.reporter = reporter
        self.evaluate = evaluate
        self.stop = threading.Event()
        self.results: dict[str, RunResult] = {}
        self.orders: dict[str, OrdersResult] = {}
        self.errors: dict[str, str] = {}
        self.warnings: dict[int, list[str]] = {}  # by thread

    def carry_out(self, prepared: Prepared) -> None:
        """Carry out all jobs, or until Ctrl-C.

        They run in one thread beside the main one, which is left to hear Ctrl-C. Not in two: XLA's
        CPU client (jaxlib 0.10.2) can wait for ever when two threads execute programs at once.
        """
        with ThreadPoolExecutor(1) as pool, _warnings_go_to(self._keep_warning):
            pending: set[Future[None]] = {pool.submit(self._one, job) for job in prepared.runs}
            pending |= {pool.submit(self._one, job) for job in prepared.orders}
            while pending:
                try:
                    pending = wait(pending, timeout=_PATIENCE_S).not_done
                except KeyboardInterrupt:
                    for future in pending:
                        future.cancel()
                    if not self.stop.is_set():
                        self.reporter.stopping()
                    self.stop.set()

    def _one(self, prepared: PreparedRun | PreparedOrders) -> None:
        if self.stop.is_set():
            return
        name, start = prepared.spec.name, time.perf_counter()
        self.warnings[threading.get_ident()] = []
        self.reporter.started(prepared.spec)
        try:
            if isinstance(prepared, PreparedRun):
                result = self.results[name] = self._run(prepared)
            else:
                result = self.orders[name] = self._measure(prepared)
        except KeyboardInterrupt:  # nothing was recorded yet
            return
        except Exception as error:
            self.errors[name] = _reason(error)
            return
        self.reporter.finished(result, time.perf_counter() - start)

    def _run(self, prepared: PreparedRun) -> RunResult:
        if prepared.spec.name in self.timed:
            _compile(prepared)
        trajectory = self._simulate(prepared)
        trajectory.save(self.out / RUNS / f"{prepared.spec.name}.nc")
        return self._result(prepared, trajectory)

    def _measure(self, prepared: PreparedOrders) -> OrdersResult:
        spec = prepared.spec
        measured = measure_orders(
            prepared.problem,
            prepared.network,
            prepared.first,
            prepared.second,
            spec.step_sizes,
            t1=spec.t1,
            observables=spec.observables,
            kind=spec.distance,
            replicas=spec.replicas,
            key=prepared.key,
            progress=self._progress_of(spec),
        )
        folder = self.out / ORDERS
        folder.mkdir(exist_ok=True)
        measured.point_table().to_csv(folder / f"{spec.name}.csv", index=False)
        notes = tuple(self.warnings[threading.get_ident()])
        result = OrdersResult(spec.name, spec.title, spec, measured, notes)
        text = json.dumps(orders_record(result), indent=2, allow_nan=False)
        (folder / f"{spec.name}.json").write_text(f"{text}\n", "utf-8")
        return result

    def _progress_of(self, job: Job) -> Callable[[float, float, str], None]:
        def progress(done: float, total: float, message: str) -> None:
            if self.stop.is_set():
                raise KeyboardInterrupt
            self.reporter.advanced(job, done, total, message)

        return progress

    def _simulate(self, prepared: PreparedRun) -> Trajectory:
        run = prepared.spec
        return simulate(
            prepared.problem,
            prepared.network,
            prepared.dynamics,
            t1=run.t1,
            steps=run.steps,
            replicas=run.replicas,
            key=prepared.key,
            normals=prepared.normals,
            save=run.save.times or run.save.points or 2,
            spacing=run.save.spacing,
            observables=run.observables,
            store_weights=run.store_weights,
            progress=self._progress_of(run),
        )

    def _result(self, prepared: PreparedRun, trajectory: Trajectory) -> RunResult:
        run = prepared.spec
        notes = list(self.warnings[threading.get_ident()])
        result = RunResult(run.name, run.title, run.group, run, trajectory)
        if diverged := divergence(result):
            notes.append(diverged)
        if not self.evaluate or trajectory.interrupted:
            return replace(result, notes=tuple(notes))
        measured = rate = None
        if isinstance(prepared.dynamics, SlowFlow):
            if "imbalance" in trajectory:
                whole = float(trajectory.time[0]), float(trajectory.time[-1])
                rate = _attempt(lambda: decay_rate(trajectory, window=whole), "rate", notes)
        else:
            lean = _without_weights(trajectory)
            measured = _attempt(lambda: phases(lean, eps=self.eps), "phases", notes)
            rate = measured.regularization_rate if measured else None
        predicted = None
        if run.regularizers or run.name in self.predicted:
            predicted = _attempt(
                lambda: predict(
                    prepared.problem, prepared.network, prepared.dynamics, eps=self.eps
                ),
                "prediction",
                notes,
            )
        along = None
        if rate and predicted and not rate.constant and predicted.slow:
            law, fitted = predicted, rate
            along = _attempt(lambda: rate_along(law, fitted, trajectory.time), "slow flow", notes)
        return replace(
            result,
            phases=measured,
            rate=rate,
            prediction=predicted,
            along=along,
            notes=tuple(notes),
        )

    def _keep_warning(self, message: str) -> None:
        self.warnings.setdefault(threading.get_ident(), []).append(message)


def _without_weights(trajectory: Trajectory) -> Trajectory:
    """What the spec says to record: what it leaves out may take longer to compute than the run."""
    dataset = trajectory.to_xarray()
    layers = [f"W{i}" for i in range(1, trajectory.start[0].depth + 1)]
    return Trajectory(
        dataset.drop_vars(layers, errors="ignore"),
        trajectory.problem,
        trajectory.dynamics,
        trajectory.start,
    )


def _compile(prepared: PreparedRun) -> None:
    """Make the first step of a run, so that its wall time is without compilation."""
    run, dynamics = prepared.spec, prepared.dynamics
    has_steps = dynamics.step_size is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself gives them
        simulate(
            prepared.problem,
            prepared.network,
            dynamics,
            t1=None if has_steps else FIRST_STEP * float(run.t1 or 1.0),
            steps=1 if has_steps else None,
            replicas=run.replicas,
            key=prepared.key,
            normals=prepared.normals,
            save=2,
            observables=run.observables,
            store_weights=run.store_weights,
            progress=False,
        )


_T = TypeVar("_T")


def _attempt(compute: Callable[[], _T], what: str, notes: list[str]) -> _T | None:
    """The value, or None and a note where the run does not have it."""
    try:
        return compute()
    except ValueError as error:
        notes.append(f"{what}: {in_spec(error)}")
        return None


@contextmanager
def _warnings_go_to(keep: Callable[[str], None]) -> Iterator[None]:
    """Hand over warnings that would be printed; those that are errors stay errors."""
    with warnings.catch_warnings():

        def show(message: Warning | str, *_: Any) -> None:
            keep(str(message))

        warnings.showwarning = show
        warnings.simplefilter("ignore", InterruptedWarning)  # the status of the study says it
        warnings.simplefilter("ignore", DivergedWarning)  # a note of the run says it
        yield


def _reason(error: Exception) -> str:
    """The message of a user error; the traceback of anything else."""
    if isinstance(error, ValueError | TypeError) and str(error):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
