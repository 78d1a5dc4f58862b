"""One job of a study: a run or an [[orders]] table, carried out and read."""

from __future__ import annotations

import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from gradflow.analysis.convergence.orders import orders as measure_orders
from gradflow.analysis.phases import phases
from gradflow.analysis.prediction.along import rate_along
from gradflow.analysis.prediction.predict import predict
from gradflow.analysis.rates import decay_rate
from gradflow.analysis.unmeasured import in_spec
from gradflow.backend.whole_file import write_whole
from gradflow.results.trajectory import Trajectory
from gradflow.simulation.divergence import DivergedWarning
from gradflow.simulation.simulate import InterruptedWarning, simulate
from gradflow.study.results import OrdersResult, RunResult
from gradflow.study.run.build import PreparedOrders, PreparedRun
from gradflow.study.run.progress import divergence
from gradflow.study.run.record import orders_record
from gradflow.study.spec.claim_tables import RunsClaim
from gradflow.study.spec.load import Study

RUNS = "runs"
"""The folder of the NetCDF files inside a result folder."""

ORDERS = "orders"
"""The folder of the tables of distances inside a result folder."""

FIRST_STEP = 1e-6
"""Share of its length that a run without a step size makes in order to be compiled."""


@dataclass(frozen=True)
class Plan:
    """What the jobs of a study have in common.

    Attributes:
        study: what `load_study` returned.
        out: the folder that files go to.
        evaluate: whether to measure phases and rates and to predict, or to integrate only.
    """

    study: Study
    out: Path
    evaluate: bool

    @property
    def eps(self) -> float:
        """The share of the excess loss at which the optimization phase ends."""
        return self.study.spec.eps

    @cached_property
    def predicted(self) -> frozenset[str]:
        """Names of the runs that some claim compares with theory."""
        return frozenset(
            name
            for claim in self.study.spec.claim
            if claim.needs_prediction
            for name in claim.names
        )

    @cached_property
    def timed(self) -> frozenset[str]:
        """Names of the runs whose wall time some claim is about."""
        return frozenset(
            name
            for claim in self.study.spec.claim
            if isinstance(claim, RunsClaim) and claim.of_wall_time
            for name in claim.names
        )


@dataclass(frozen=True)
class Done:
    """How a job ended.

    Attributes:
        result: what it found; None if it broke, or was interrupted before anything was recorded.
        error: why it broke; empty if it did not.
        seconds: how long it took.
    """

    result: RunResult | OrdersResult | None
    error: str
    seconds: float


@runtime_checkable
class Listener(Protocol):
    """Is told how a job gets on, and says whether it is to go on."""

    @property
    def stopping(self) -> bool:
        """Whether the job is to end at its next report of progress, keeping what it has."""
        ...

    def started(self, name: str) -> None:
        """A job begins."""

    def advanced(self, name: str, done: float, total: float, message: str) -> None:
        """A job has come from 0 to `done` of `total`."""


def carry_out(plan: Plan, prepared: PreparedRun | PreparedOrders, listener: Listener) -> Done:
    """Carry out one job.

    A trajectory is written to `out/runs/NAME.nc`, a table of distances to `out/orders/NAME.csv` and
    its fitted orders to `out/orders/NAME.json`, as soon as they are there.
    """
    start = time.perf_counter()
    if listener.stopping:
        return Done(None, "", 0.0)
    listener.started(prepared.spec.name)
    result, error = None, ""
    with _kept_warnings() as notes:
        job = _Job(plan, listener, notes)
        try:
            result = (
                job.run(prepared) if isinstance(prepared, PreparedRun) else job.measure(prepared)
            )
        except KeyboardInterrupt:  # nothing was recorded yet
            pass
        except Exception as broken:
            error = reason(broken)
    return Done(result, error, time.perf_counter() - start)


@dataclass(frozen=True)
class _Job:
    """A job on its way."""

    plan: Plan
    listener: Listener
    warnings: list[str]

    def run(self, prepared: PreparedRun) -> RunResult:
        if prepared.spec.name in self.plan.timed:
            _compile(prepared)
        trajectory = self._simulate(prepared)
        folder = self.plan.out / RUNS
        folder.mkdir(parents=True, exist_ok=True)
        trajectory.save(folder / f"{prepared.spec.name}.nc")
        return self._result(prepared, trajectory)

    def measure(self, prepared: PreparedOrders) -> OrdersResult:
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
            progress=self._progress_of(spec.name),
        )
        folder = self.plan.out / ORDERS
        write_whole(folder / f"{spec.name}.csv", measured.point_table().to_csv(index=False))
        notes = tuple(self.warnings)
        result = OrdersResult(spec.name, spec.title, spec, measured, notes)
        text = json.dumps(orders_record(result), indent=2, allow_nan=False)
        write_whole(folder / f"{spec.name}.json", f"{text}\n")
        return result

    def _progress_of(self, name: str) -> Callable[[float, float, str], None]:
        def progress(done: float, total: float, message: str) -> None:
            if self.listener.stopping:
                raise KeyboardInterrupt
            self.listener.advanced(name, done, total, message)

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
            progress=self._progress_of(run.name),
        )

    def _result(self, prepared: PreparedRun, trajectory: Trajectory) -> RunResult:
        run = prepared.spec
        notes = list(self.warnings)
        result = RunResult(run.name, run.title, run.group, trajectory, spec=run)
        if diverged := divergence(result):
            notes.append(diverged)
        if not self.plan.evaluate or trajectory.interrupted:
            return replace(result, notes=tuple(notes))
        measured = rate = None
        if prepared.dynamics.is_slow:
            if "imbalance" in trajectory:
                whole = float(trajectory.time[0]), float(trajectory.time[-1])
                rate = _attempt(lambda: decay_rate(trajectory, window=whole), "rate", notes)
        else:
            lean = _without_weights(trajectory)
            measured = _attempt(lambda: phases(lean, eps=self.plan.eps), "phases", notes)
            rate = measured.regularization_rate if measured else None
        predicted = None
        if run.regularizers or run.name in self.plan.predicted:
            predicted = _attempt(
                lambda: predict(
                    prepared.problem,
                    prepared.network,
                    prepared.dynamics,
                    eps=self.plan.eps,
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
def _kept_warnings() -> Iterator[list[str]]:
    """Keep warnings that would be printed; those that are errors stay errors."""
    kept: list[str] = []
    with warnings.catch_warnings():

        def show(message: Warning | str, *_: Any) -> None:
            kept.append(str(message))

        warnings.showwarning = show
        warnings.simplefilter("ignore", InterruptedWarning)  # the status of the study says it
        warnings.simplefilter("ignore", DivergedWarning)  # a note of the run says it
        yield kept


def reason(error: Exception) -> str:
    """The message of a user error; the traceback of anything else."""
    if isinstance(error, ValueError | TypeError) and str(error):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
