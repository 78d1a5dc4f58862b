"""What the terminal shows while the jobs of a study are carried out."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, TypeAlias, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from gradflow.study.results import OrdersResult, RunResult
from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.run_tables import RunSpec

_STOPPING = "Ctrl-C: stopping, and keeping what was done ..."


Job: TypeAlias = RunSpec | OrdersSpec
"""A run or an [[orders]] table: something with a name that takes a while."""


@runtime_checkable
class Reporter(Protocol):
    """Is told how the jobs of a study get on, by name: from any thread."""

    def started(self, name: str) -> None:
        """A job begins."""

    def advanced(self, name: str, done: float, total: float, message: str) -> None:
        """A job has come from 0 to `done` of `total`."""

    def finished(self, result: RunResult | OrdersResult, seconds: float) -> None:
        """A job is over, at its end or interrupted."""

    def stopping(self) -> None:
        """Ctrl-C: runs end at their next report of progress."""


class Silent:
    """Reports nothing."""

    def started(self, name: str) -> None:
        """Nothing."""

    def advanced(self, name: str, done: float, total: float, message: str) -> None:
        """Nothing."""

    def finished(self, result: RunResult | OrdersResult, seconds: float) -> None:
        """Nothing."""

    def stopping(self) -> None:
        """Nothing."""


class Lines:
    """One plain line for each finished job: for logs and pipes."""

    def __init__(self, console: Console, jobs: Iterable[Job]) -> None:
        self.console = console
        self.total = len(list(jobs))
        self.done = 0
        self._lock = threading.Lock()

    def started(self, name: str) -> None:
        """Nothing."""

    def advanced(self, name: str, done: float, total: float, message: str) -> None:
        """Nothing."""

    def finished(self, result: RunResult | OrdersResult, seconds: float) -> None:
        """Print the line."""
        with self._lock:
            self.done += 1
            text = f"[{self.done}/{self.total}] {result.name}: {outcome(result)} ({seconds:.1f} s)"
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stopping(self) -> None:
        """Say so."""
        self.console.print(_STOPPING)


class Bars:
    """A progress bar for each job; use as a context manager."""

    def __init__(self, console: Console, jobs: Iterable[Job]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[message]}", style="dim", markup=False),
            console=console,
            refresh_per_second=5,
        )
        self._tasks: dict[str, TaskID] = {
            job.name: self._progress.add_task(job.title, start=False, total=None, message="waiting")
            for job in jobs
        }

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def started(self, name: str) -> None:
        """Start the clock of the job's bar."""
        self._progress.start_task(self._tasks[name])
        self._progress.update(self._tasks[name], message="compiling")

    def advanced(self, name: str, done: float, total: float, message: str) -> None:
        """Move the job's bar."""
        task = self._tasks[name]
        self._progress.update(task, completed=done, total=total, message=message)

    def finished(self, result: RunResult | OrdersResult, seconds: float) -> None:
        """Fill the job's bar and say how it ended."""
        task = self._tasks[result.name]
        text = f"{outcome(result)} ({seconds:.1f} s)"
        self._progress.update(task, message=text)
        if not result.interrupted:
            self._progress.update(task, completed=1.0, total=1.0)
        self._progress.stop_task(task)

    def stopping(self) -> None:
        """Say so, above the bars."""
        self._progress.console.print(_STOPPING)


def outcome(result: RunResult | OrdersResult) -> str:
    """How a job ended: `done`, `interrupted at t = 3.2`, `3 of 256 replicas diverged`."""
    if isinstance(result, OrdersResult):
        return "interrupted" if result.interrupted else "done"
    trajectory = result.trajectory
    parts = []
    if trajectory.interrupted:
        reached = trajectory.time[-1] if len(trajectory.time) else 0.0
        parts.append(f"interrupted at t = {reached:.4g}")
    diverged = divergence(result)
    return ", ".join([*parts, *([diverged] if diverged else [])]) or "done"


def divergence(result: RunResult) -> str:
    """`3 of 256 replicas diverged`, or nothing."""
    trajectory = result.trajectory
    count = int(trajectory.diverged.sum())
    if count == 0:
        return ""
    return (
        "diverged"
        if trajectory.replicas is None
        else f"{count} of {trajectory.replicas} replicas diverged"
    )
