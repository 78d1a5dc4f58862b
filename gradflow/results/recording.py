"""What is kept of an ensemble on its way: its paths, or their statistics."""

import abc
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from gradflow.backend.memory import host_memory
from gradflow.dynamics.base import End
from gradflow.results.running_statistics import RunningStatistics


class Saved(NamedTuple):
    """What is saved: observables by name, the layers if they are stored, and who is alive.

    The arrays of a slice are `(rows, ..., R)`, those of a record `(R, T, ...)`.
    """

    observed: dict[str, Any]
    weights: tuple[Any, ...]
    alive: Any


@dataclass
class AbstractRecord(abc.ABC):
    """What a run has kept so far: of the first `paths` paths at the first `times` saved times.

    `end` says when and why a path stopped, if one did and its dynamics can tell. `incomplete` are
    the paths that had to be given up, by their numbers: at which flow time, and why.
    """

    total: int
    length: int
    paths: int = 0
    times: int = 0
    end: str | None = None
    incomplete: dict[int, tuple[float, End]] = field(default_factory=dict)

    def ends(self, paths: slice, time: np.ndarray, end: np.ndarray) -> None:
        """Note which paths have been given up, of those of a chunk."""
        for i in np.flatnonzero((end != End.NONE) & (end != End.DIVERGED)):
            self.incomplete[paths.start + int(i)] = float(time[i]), End(int(end[i]))

    def gave_up(self, times: np.ndarray) -> np.ndarray:
        """How many paths are incomplete at each of some flow times."""
        reached = np.array([time for time, _ in self.incomplete.values()])
        return np.sum(reached[None] < times[:, None], axis=1)

    @property
    @abc.abstractmethod
    def lost(self) -> int:
        """How many paths have ended by the last time."""

    @property
    @abc.abstractmethod
    def first_lost(self) -> tuple[int, int]:
        """The number of the first saved time at which a path has diverged, and that of the path.

        One has, by the last time.
        """

    @abc.abstractmethod
    def write(self, rows: Saved, count: int, paths: slice, first_time: int) -> None:
        """Keep the first `count` rows of a slice; a run may be interrupted at any moment of it."""


@dataclass
class PathRecord(AbstractRecord):
    """Every path."""

    saved: Saved | None = None

    def write(self, rows: Saved, count: int, paths: slice, first_time: int) -> None:
        """Copy the rows.

        **Raises:** `MemoryError` if there is no room for all paths.
        """

        def empty(values: Array | np.ndarray) -> np.ndarray:
            return np.empty((self.total, self.length, *values.shape[1:-1]), values.dtype)

        def copy(to: np.ndarray, values: Array | np.ndarray) -> None:
            by_path = np.moveaxis(np.asarray(values)[:count], -1, 0)
            to[paths, first_time : first_time + count] = by_path[: paths.stop - paths.start]

        if self.saved is None:
            self._check_room(rows)
            self.saved = jax.tree.map(empty, rows)
        jax.tree.map(copy, self.saved, rows)
        if paths.start == 0:
            self.paths, self.times = paths.stop, first_time + count

    @property
    def lost(self) -> int:
        """How many paths have ended by the last time."""
        return int((~self.finished().alive[:, -1]).sum())

    @property
    def first_lost(self) -> tuple[int, int]:
        """The first saved time at which a path has diverged, and the first such path."""
        alive = self.finished().alive
        time = int(np.argmin(alive.all(axis=0)))
        return time, int(np.argmin(alive[:, time]))

    def finished(self) -> Saved:
        """What is filled of the arrays."""
        return jax.tree.map(lambda values: values[: self.paths, : self.times], self.saved)

    def _check_room(self, rows: Saved) -> None:
        one = sum(math.prod(x.shape[1:-1]) * x.dtype.itemsize for x in jax.tree.leaves(rows))
        needed, free = one * self.total * self.length, host_memory()
        if needed > free:
            raise MemoryError(
                f"replicas={self.total}: what is saved of them at {self.length} times takes "
                f"{needed / 2**30:.3g} GB and {free / 2**30:.3g} GB are free; save fewer times or "
                'observables, or keep="statistics", which needs no memory for paths.'
            )


@dataclass
class StatisticsRecord(AbstractRecord):
    """Statistics over the paths of every chunk so far.

    `antithetic` says that paths come in pairs that are not independent; a chunk has whole ones.
    """

    antithetic: bool = False
    statistics: RunningStatistics = field(default_factory=lambda: RunningStatistics({}, 0))
    first: tuple[int, int] | None = None

    @property
    def lost(self) -> int:
        """How many paths have ended by the last time."""
        return self.statistics.lost[self.times - 1]

    @property
    def first_lost(self) -> tuple[int, int]:
        """The first saved time at which a path has diverged, and the first such path."""
        assert self.first is not None
        return self.first

    def write(self, rows: Saved, count: int, paths: slice, first_time: int) -> None:
        """Count the paths of the rows."""
        if not self.statistics.times:
            shapes = {name: x.shape[1:-1] for name, x in rows.observed.items()}
            self.statistics = RunningStatistics(shapes, self.length, self.antithetic)
        width = paths.stop - paths.start
        observed = {name: np.asarray(x)[..., :width] for name, x in rows.observed.items()}
        alive = np.asarray(rows.alive)[:, :width]
        for i in range(count):
            if not alive[i].all():
                lost = first_time + i, paths.start + int(np.argmin(alive[i]))
                self.first = min(self.first or lost, lost)
            row = {name: np.moveaxis(x[i], -1, 0) for name, x in observed.items()}
            self.statistics.add(first_time + i, row, alive[i])
        if paths.start == 0:
            self.paths, self.times = paths.stop, first_time + count
