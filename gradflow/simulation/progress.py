"""Progress of long runs."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report: TypeAlias = Callable[[float, float, str], None]
"""Called with what is done, the total, and a message such as the rate; at least twice a second."""

PATIENCE = 2.0
"""Seconds before a bar appears: short runs stay silent."""


class ProgressBar:
    """A bar on standard error with rate and time left; appears only if a run takes a while."""

    def __init__(self, label: str, patience: float = PATIENCE):
        self._label = label
        self._patience = patience
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def __call__(self, done: float, total: float, message: str) -> None:
        """Show `done` of `total`."""
        if self._bar is None:
            if time.monotonic() - self._started < self._patience or done >= total:
                return
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[message]}"),
                TextColumn("time left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=total, message=message)
        self._bar.update(self._task, completed=done, message=message)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def automatic(label: str) -> ProgressBar | None:
    """A progress bar if somebody is watching: standard error is a terminal."""
    return ProgressBar(label) if sys.stderr.isatty() else None


_is_announced: ContextVar[bool] = ContextVar("is_announced", default=False)


@contextmanager
def announced(label: str, patience: float = PATIENCE) -> Iterator[None]:
    """Show what is going on and for how long, where there is no telling how much is left.

    As with `automatic` nothing is shown unless standard error is a terminal and `patience` seconds
    have gone by; nor within something else that is announced.
    """
    if _is_announced.get() or not sys.stderr.isatty():
        yield
        return
    line = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    line.add_task(label)
    timer = threading.Timer(patience, line.start)  # JAX compiles for seconds without a word
    timer.daemon = True
    token = _is_announced.set(True)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        line.stop()
        _is_announced.reset(token)
