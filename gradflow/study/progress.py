"""What the terminal shows while runs are integrated."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from gradflow.study.results import RunResult
from gradflow.study.spec import RunSpec

_STOPPING = "Ctrl-C: stopping, and keeping what was done ..."


@runtime_checkable
class Reporter(Protocol):
    """Is told how the runs of a study get on, from the threads that carry them out."""

    def started(self, run: RunSpec) -> None:
        """A run begins."""

    def advanced(self, run: RunSpec, done: float, total: float, message: str) -> None:
        """A run has come from 0 to `done` of `total`."""

    def finished(self, result: RunResult, seconds: float) -> None:
        """A run is over, at its end or interrupted."""

    def stopping(self) -> None:
        """Ctrl-C: runs end at their next report of progress."""


class Silent:
    """Reports nothing."""

    def started(self, run: RunSpec) -> None:
        """Nothing."""

    def advanced(self, run: RunSpec, done: float, total: float, message: str) -> None:
        """Nothing."""

    def finished(self, result: RunResult, seconds: float) -> None:
        """Nothing."""

    def stopping(self) -> None:
        """Nothing."""


class Lines:
    """One plain line for each finished run: for logs and pipes."""

    def __init__(self, console: Console, runs: Iterable[RunSpec]) -> None:
        self.console = console
        self.total = len(list(runs))
        self.done = 0
        self._lock = threading.Lock()

    def started(self, run: RunSpec) -> None:
        """Nothing."""

    def advanced(self, run: RunSpec, done: float, total: float, message: str) -> None:
        """Nothing."""

    def finished(self, result: RunResult, seconds: float) -> None:
        """Print the line."""
        with self._lock:
            self.done += 1
            text = f"[{self.done}/{self.total}] {result.name}: {outcome(result)} ({seconds:.1f} s)"
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stopping(self) -> None:
        """Say so."""
        self.console.print(_STOPPING)


class Bars:
    """A progress bar for each run; use as a context manager."""

    def __init__(self, console: Console, runs: Iterable[RunSpec]) -> None:
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
            run.name: self._progress.add_task(run.title, start=False, total=None, message="waiting")
            for run in runs
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

    def started(self, run: RunSpec) -> None:
        """Start the clock of the run's bar."""
        self._progress.start_task(self._tasks[run.name])
        self._progress.update(self._tasks[run.name], message="compiling")

    def advanced(self, run: RunSpec, done: float, total: float, message: str) -> None:
        """Move the run's bar."""
        task = self._tasks[run.name]
        self._progress.update(task, completed=done, total=total, message=message)

    def finished(self, result: RunResult, seconds: float) -> None:
        """Fill the run's bar and say how it ended."""
        task = self._tasks[result.name]
        text = f"{outcome(result)} ({seconds:.1f} s)"
        self._progress.update(task, message=text)
        if not result.trajectory.interrupted:
            self._progress.update(task, completed=1.0, total=1.0)
        self._progress.stop_task(task)

    def stopping(self) -> None:
        """Say so, above the bars."""
        self._progress.console.print(_STOPPING)


def outcome(result: RunResult) -> str:
    """How a run ended: `done`, `interrupted at t = 3.2`, `3 of 256 replicas diverged`."""
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
