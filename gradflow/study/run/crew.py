"""Who carries out the jobs of a study: a thread, or processes that work at the same time.

Never several threads: XLA's CPU client (jaxlib 0.10.2) can wait for ever when two threads execute
programs at once, and tracing, half of a short run, holds Python's lock.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock
from typing import Any, Protocol, runtime_checkable

import jax

from gradflow.backend.memory import host_memory
from gradflow.study.run.build import PreparedOrders, PreparedRun
from gradflow.study.run.jobs import Done, Plan, carry_out
from gradflow.study.run.progress import Reporter, Silent

MEMORY_EACH = 2 * 2**30
"""Bytes of memory for each process that `workers_for` plans."""

MOST = 8
"""Processes that are started unless the user says so."""


@runtime_checkable
class Crew(Protocol):
    """Carries out jobs; to be closed at the end."""

    reporter: Reporter
    """Is told how the jobs get on."""
    begun: set[str]
    """Names of the jobs that have begun; whoever submits them empties it."""

    def submit(self, plan: Plan, job: PreparedRun | PreparedOrders) -> Future[Done]:
        """Carry out a job as soon as somebody is free."""
        ...

    def stop(self) -> None:
        """Let every job end at its next report of progress, and begin none any more."""

    def renew(self) -> None:
        """Go on after a process was killed."""

    def close(self) -> None:
        """Send everybody home, once their jobs are done."""


def workers_for(jobs: int) -> int:
    """How many processes are to carry out so many jobs unless the user says so.

    As many as the process may use cores, but no more than there are jobs, than fit into memory at
    2 GiB each, or than 8. On an accelerator one: JAX gives the first process most of its memory.
    """
    if jax.default_backend() != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, jobs, MOST, int(host_memory()) // MEMORY_EACH))


def crew_of(workers: int) -> Crew:
    """A crew of so many: one works in a thread of this process, more in processes of their own."""
    return OneThread() if workers == 1 else Processes(workers)


class OneThread:
    """One thread beside the main one, which is left to hear Ctrl-C."""

    def __init__(self) -> None:
        self.reporter: Reporter = Silent()
        self.begun: set[str] = set()
        self.stopping = False
        self._pool = ThreadPoolExecutor(1)

    def submit(self, plan: Plan, job: PreparedRun | PreparedOrders) -> Future[Done]:
        """Carry out a job when those before it are done."""
        return self._pool.submit(carry_out, plan, job, self)

    def stop(self) -> None:
        """Let the job end at its next report of progress, and begin none any more."""
        self.stopping = True

    def renew(self) -> None:
        """Nothing: whatever kills it kills this process."""

    def started(self, name: str) -> None:
        """A job begins."""
        self.begun.add(name)
        self.reporter.started(name)

    def advanced(self, name: str, done: float, total: float, message: str) -> None:
        """A job gets on."""
        self.reporter.advanced(name, done, total, message)

    def close(self) -> None:
        """End the thread, once its job has."""
        self._pool.shutdown(cancel_futures=True)


class Processes:
    """Processes that carry out jobs at the same time.

    They are started anew ("spawn"): a process forked from one that has used JAX hangs. They end
    with the process that started them, however that ends, and leave Ctrl-C to it. What they report
    comes through one pipe; where one of them is killed the pool ends all others, and every job that
    was not done raises `BrokenProcessPool`.
    """

    def __init__(self, workers: int) -> None:
        self.reporter: Reporter = Silent()
        self.begun: set[str] = set()
        self._workers = workers
        self._context = multiprocessing.get_context("spawn")
        self._stopping = self._context.RawValue("b", 0)  # no lock that one could die with
        self._start()

    def submit(self, plan: Plan, job: PreparedRun | PreparedOrders) -> Future[Done]:
        """Carry out a job as soon as a process is free."""
        return self._pool.submit(_carry_out, plan, job)

    def stop(self) -> None:
        """Let every job end at its next report of progress, and begin none any more."""
        self._stopping.value = 1

    def renew(self) -> None:
        """Start new processes in the place of those that were killed."""
        self.close()
        self._start()

    def _start(self) -> None:
        """Start all processes, which import the package while this one prepares what they do."""
        reports, self._sending = self._context.Pipe(duplex=False)
        self._listening = threading.Thread(target=self._listen, args=(reports,), daemon=True)
        self._listening.start()
        self._pool = ProcessPoolExecutor(
            self._workers,
            mp_context=self._context,
            initializer=_begin,
            initargs=(self._sending, self._context.Lock(), self._stopping, gc.get_threshold()),
        )
        for _ in range(self._workers):
            self._pool.submit(_nothing)

    def close(self) -> None:
        """End all processes, once their jobs have."""
        self._pool.shutdown(cancel_futures=True)
        self._sending.close()  # the last open end, so that the other one reads that it is over
        self._listening.join()

    def _listen(self, reports: Connection) -> None:
        """Pass on what the processes report, until the last of them has ended."""
        with reports:
            while True:
                try:
                    what, *given = reports.recv()
                except (EOFError, OSError):
                    return
                if what == "started":
                    self.begun.add(given[0])
                    self.reporter.started(*given)
                else:
                    self.reporter.advanced(*given)


class _Reports:
    """Tells the process that started this one how a job gets on."""

    def __init__(self, pipe: Connection, lock: Lock, stopping: Any) -> None:
        self._pipe, self._lock, self._stopping = pipe, lock, stopping

    @property
    def stopping(self) -> bool:
        return bool(self._stopping.value)

    def started(self, name: str) -> None:
        self._send("started", name)

    def advanced(self, name: str, done: float, total: float, message: str) -> None:
        self._send("advanced", name, done, total, message)

    def _send(self, *report: Any) -> None:
        with self._lock:
            self._pipe.send(report)


_reports: _Reports | None = None
"""In a process of `Processes`: the way back to the one that started it."""


def _begin(pipe: Connection, lock: Lock, stopping: Any, threshold: tuple[int, int, int]) -> None:
    """Set up a process of `Processes`."""
    global _reports
    _reports = _Reports(pipe, lock, stopping)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(*threshold)
    atexit.register(gc.freeze)  # at its end Python would look through everything once more
    # Two processes may compile the same program at once; one that reads what the other has written
    # by half compiles it, and JAX's warning is of no use to anybody.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _nothing() -> None:
    """What a process does first: to have been started."""


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process of the pool has a parent"
    parent.join()
    os._exit(1)


def _carry_out(plan: Plan, job: PreparedRun | PreparedOrders) -> Done:
    assert _reports is not None, "the pool has set up its process"
    return carry_out(plan, job, _reports)
