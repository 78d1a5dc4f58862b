"""Carrying out a study: every run, what is read off it, and the verdicts on the claims."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TypeVar

from gradflow.study.claims.claims import judge_all
from gradflow.study.results import OrdersResult, RunResult, StudyResult
from gradflow.study.run.build import Prepared, PreparedOrders, PreparedRun
from gradflow.study.run.crew import Crew, OneThread
from gradflow.study.run.jobs import Done, Plan, reason
from gradflow.study.run.progress import Job, Reporter, Silent
from gradflow.study.spec.load import Study

_T = TypeVar("_T")

_PATIENCE_S = 0.1

_LOST = (
    "the process that carried it out was ended from outside although nothing else was carried out "
    "then; most often for want of memory: try --workers 1, or fewer replicas"
)

_NEVER_BEGUN = "no process could be started to carry it out; try --workers 1"


def run_study(
    study: Study,
    prepared: Prepared,
    out: Path,
    *,
    reporter: Reporter | None = None,
    evaluate: bool = True,
    crew: Crew | None = None,
) -> StudyResult:
    """Carry out the runs of a study and its [[orders]] tables, and judge its claims.

    Each trajectory is written to `out/runs/NAME.nc` and each table of distances to
    `out/orders/NAME.csv`, its fitted orders to `out/orders/NAME.json`, as soon as it is there.
    Ctrl-C ends the jobs at their next report of progress; what they have is kept and the result is
    "interrupted". A job that breaks does not stop the others; it is listed in `errors` and the
    result is "failed". What a job finds does not depend on how many are carried out at once.

    **Arguments:**

    - `study`, `prepared`: what `load_study` and `prepare` returned.
    - `out`: an existing folder.
    - `reporter`: is told how the runs get on.
    - `evaluate`: whether to measure phases, rates and claims, or to integrate only.
    - `crew`: who carries out the jobs; a thread of this process unless given. Runs whose wall time
      is measured are carried out alone.
    """
    start = time.perf_counter()
    with nullcontext(crew) if crew else closing(OneThread()) as workforce:
        workforce.reporter = reporter or Silent()
        execution = _Execution(Plan(study, out, evaluate), workforce)
        execution.carry_out([*prepared.runs, *prepared.orders])
    spec, results = study.spec, execution.results
    runs = {
        name: found for name, found in _ordered(results, spec.run) if isinstance(found, RunResult)
    }
    orders = {
        name: found
        for name, found in _ordered(results, spec.orders)
        if isinstance(found, OrdersResult)
    }
    judged = evaluate and not execution.stopped
    return StudyResult(
        spec=spec,
        runs=runs,
        claims=judge_all(spec.claim, runs, orders) if judged else (),
        out=out,
        wall_time_s=time.perf_counter() - start,
        status="interrupted" if execution.stopped else "failed" if execution.errors else "complete",
        errors=dict(_ordered(execution.errors, [*spec.run, *spec.orders])),
        orders=orders,
    )


class _Execution:
    """The jobs of one study on their way."""

    def __init__(self, plan: Plan, crew: Crew) -> None:
        self.plan = plan
        self.crew = crew
        self.stopped = False
        self.results: dict[str, RunResult | OrdersResult] = {}
        self.errors: dict[str, str] = {}

    def carry_out(self, jobs: list[PreparedRun | PreparedOrders]) -> None:
        """Carry out all jobs, or until Ctrl-C.

        Those whose wall time is measured come last, one at a time; and so do those that were on
        their way when a process was killed, since one of them may need more memory than there is.
        """
        timed = self.plan.timed
        together = [job for job in jobs if job.spec.name not in timed]
        alone = [job for job in jobs if job.spec.name in timed]
        while together:
            lost = self._at_once(together)
            if lost and not self.crew.begun:
                self.errors |= {job.spec.name: _NEVER_BEGUN for job in [*lost, *alone]}
                return
            alone = [*(job for job in lost if job.spec.name in self.crew.begun), *alone]
            together = [job for job in lost if job.spec.name not in self.crew.begun]
        for job in alone:
            self.errors |= {job.spec.name: _LOST for job in self._at_once([job])}

    def _at_once(
        self, jobs: list[PreparedRun | PreparedOrders]
    ) -> list[PreparedRun | PreparedOrders]:
        """Carry out jobs, as many at once as the crew can; return those lost with a process."""
        lost: list[PreparedRun | PreparedOrders] = []
        if self.stopped:
            return lost
        self.crew.begun.clear()
        pending = {self.crew.submit(self.plan, job): job for job in jobs}
        while pending:
            try:
                for future in wait(pending, _PATIENCE_S, FIRST_COMPLETED).done:
                    try:
                        self._keep(pending[future].spec.name, future.result())
                    except CancelledError:
                        pass
                    except BrokenProcessPool:
                        lost.append(pending[future])
                    except Exception as error:  # what cannot be sent to a process, or back
                        self.errors[pending[future].spec.name] = reason(error)
                    del pending[future]
            except KeyboardInterrupt:
                self.crew.stop()
                for future in pending:
                    future.cancel()
                if not self.stopped:
                    self.crew.reporter.stopping()
                self.stopped = True
        if lost and not self.stopped:
            self.crew.renew()
        return lost

    def _keep(self, name: str, done: Done) -> None:
        if done.error:
            self.errors[name] = done.error
        if done.result is not None:
            self.results[name] = done.result
            self.crew.reporter.finished(done.result, done.seconds)


def _ordered(found: Mapping[str, _T], tables: Iterable[Job]) -> Iterator[tuple[str, _T]]:
    """What was found of each table of the spec, in its order."""
    return ((table.name, found[table.name]) for table in tables if table.name in found)
