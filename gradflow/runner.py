"""Moves an ensemble from saved time to saved time, many of them in one compiled call."""

import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num, UInt32

from gradflow.devices import Devices, along_last
from gradflow.dynamics.base import AbstractDynamics, State, begun, block_length
from gradflow.dynamics.slow_flow import SlowFlow
from gradflow.network import widths_of
from gradflow.observables import Observable, observe
from gradflow.problem import Problem
from gradflow.products import in_groups, paths_together
from gradflow.progress import Report
from gradflow.record import AbstractRecord, Saved
from gradflow.schedule import Schedule
from gradflow.streams import Normals, Source
from gradflow.types import Weights

SLICE_SECONDS = 0.25
"""Work of a slice, the compiled call between two looks at the keyboard and the progress bar."""

GROWTH = 64
"""Factor by which a slice may do more than the one before it."""

MOST_ROWS = 256
"""Most saved times of a slice."""

COMPILER = {"xla_cpu_prefer_vector_width": 512}
"""A loop over random numbers has words of 32 and of 64 bits, and as many lanes as fit of the wider:
with XLA's 256 bits half of each vector of narrow ones is empty. Processors without such vectors
take two."""

ROW_BYTES = 2**21
"""Memory for the saved times of a slice; a single one is saved whatever it takes."""


class Runner:
    """Takes the replicas of a run through it, chunk after chunk."""

    def __init__(
        self,
        problem: Problem,
        dynamics: AbstractDynamics,
        observables: Sequence[Observable],
        keep_weights: bool,
        plan: Schedule,
        report: Report | None,
        record: AbstractRecord,
        shapes: Any,
    ):
        self._moving = problem, dynamics, tuple(observables), keep_weights
        self._marks = plan.marks
        self._gridded = plan.marks.dtype.kind == "i"
        self._report = report
        self._pace: _Pace | None = None
        self._record = record
        self._shapes = shapes

    def run(self, weights: Weights, paths: slice, key: Any, normals: Normals | None) -> None:
        """Record some paths; `weights` may have more, which the devices take to equal parts."""
        problem, dynamics, observables, keep_weights = self._moving
        marks, record = self._marks, self._record
        size = weights[0].shape[-1]
        devices = Devices.sharing(size)
        block = block_length(self._shapes, size)
        state = begun(dynamics, problem, weights, self._shapes, block)
        layout = state_layout(state)
        key, numbers = jax.device_put((key, paths.start + np.arange(size, dtype=np.uint32)))
        source = Source(key, devices.placed(numbers, along_last(1)), normals)
        moving = _Moving(
            dynamics, problem, source, observables, keep_weights, block, devices, layout
        )
        pace = self._pace = self._pace or _Pace(block if self._gridded else 1)
        state = devices.placed(state, layout)
        position, times = marks.dtype.type(0), 0
        while times < marks.size:
            ends, count = self._following(position, times, pace.amount)
            began = time.monotonic()
            state, rows = jax.block_until_ready(
                _run_slice((moving, ends, np.asarray(count)), state)
            )
            count = min(count, rows.alive.shape[0])
            reached = ends[max(count, 1)]
            amount = int(reached - position) if self._gridded else count
            pace.learn(amount, time.monotonic() - began)
            record.write(rows, count, paths, times)
            position, times = reached, times + count
            if self._report is not None:
                width = paths.stop - paths.start
                done = paths.start + (position / marks[-1] if position else 1.0) * width
                rate = pace.message(width) if self._gridded else f"t = {position:.3g}"
                self._report(float(done / record.total), 1.0, rate)
        record.paths = paths.stop
        alive = np.isfinite(state.weights[0][0, 0])[: paths.stop - paths.start]
        lost = np.flatnonzero(~alive)
        if isinstance(dynamics, SlowFlow) and lost.size and record.end is None:
            record.end = dynamics.why_ended(problem, state, int(lost[0]), marks[-1])

    def _following(self, position: Any, times: int, amount: int) -> tuple[np.ndarray, int]:
        """Where a slice starts and the ends it goes to, and how many of them are saved.

        Either all are, or there is a single one between two saved times.
        """
        marks = self._marks
        last = times + amount + (marks[times] == 0)  # the start takes no work
        if self._gridded:
            last = int(np.searchsorted(marks, position + amount, side="right"))
        ends = marks[times : min(last, times + MOST_ROWS)]
        count = ends.size
        padded = np.full(MOST_ROWS + 1, position)
        padded[1 : count + 1] = ends
        if count == 0:
            padded[1] = position + amount
        return padded, count


def state_layout(state: State) -> Any:
    """How the state of an ensemble is divided: by paths."""
    return jax.tree.map(lambda leaf: along_last(leaf.ndim), state)


class _Moving(eqx.Module):
    """An ensemble on its way: all that does not change."""

    dynamics: AbstractDynamics
    problem: Problem
    source: Source
    observables: tuple[Observable, ...]
    keep_weights: bool = eqx.field(static=True)
    block: int = eqx.field(static=True)
    devices: Devices = eqx.field(static=True)
    layout: Any

    def on_one_device(self, paths: UInt32[Array, " paths"]) -> "_Moving":
        """The part of the ensemble that one device has."""
        return eqx.tree_at(lambda moving: moving.source.paths, self, paths)

    def advance(self, state: State, start: Array, stop: Array) -> State:
        """The state at `stop`; the one given where that is no later, or no path is left."""

        def unfinished(carry: tuple[Array, State]) -> Array:
            position, state = carry
            return (position < stop) & jnp.any(jnp.isfinite(state.weights[0][0, 0]))

        def go(carry: tuple[Array, State]) -> tuple[Array, State]:
            position, state = carry
            return stop, self.dynamics.advance(
                self.problem, state, position, stop, self.source, self.block
            )

        return jax.lax.while_loop(unfinished, go, (start, state))[1]

    def saved(self, weights: Weights) -> Saved:
        """What is saved of an ensemble at one time."""

        def of_group(group: Weights) -> dict[str, Any]:
            return observe(self.observables, group, self.problem, self.dynamics)

        alive = jnp.isfinite(weights[0][0, 0])
        observed = in_groups(of_group, weights, paths_together(widths_of(weights), alive.size))
        return Saved(observed, weights if self.keep_weights else (), alive)


@eqx.filter_jit(  # pyright: ignore[reportCallIssue]
    donate="all-except-first", compiler_options=COMPILER
)
def _run_slice(fixed: tuple[_Moving, Any, Any], state: State) -> tuple[State, Saved]:
    """Go to `count` ends and save as many of them as there is memory for; to one end for 0.

    Every device goes by itself with its part of the paths.
    """
    moving, ends, count = fixed

    def go(state: State, paths: Array) -> tuple[State, Saved]:
        return _go(moving.on_one_device(paths), ends, count, state)

    def layouts(shapes: tuple[State, Saved]) -> tuple[State, Saved]:
        return moving.layout, jax.tree.map(lambda leaf: along_last(leaf.ndim), shapes[1])

    run = moving.devices.each(go, (moving.layout, along_last(1)), layouts)
    return run(state, moving.source.paths)


def _go(
    moving: _Moving, ends: Num[Array, " ends"], count: Int[Array, ""], state: State
) -> tuple[State, Saved]:
    """The part of one device in a slice."""
    saved = jax.jit(lambda weights: moving.saved(weights))  # traced once
    row = jax.eval_shape(saved, state.weights)
    row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    most = int(np.clip(ROW_BYTES // max(row_bytes, 1), 1, MOST_ROWS))
    rows = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), row)

    def go(i: Array, carry: tuple[State, Saved]) -> tuple[State, Saved]:
        state, rows = carry
        state = moving.advance(state, ends[i], ends[i + 1])
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), row)
        now = jax.lax.cond(i < count, saved, lambda _: nothing, state.weights)
        return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), rows, now)

    return jax.lax.fori_loop(0, jnp.clip(count, 1, most), go, (state, rows))


class _Pace:
    """How much a slice does: steps of the grid, or saved times."""

    def __init__(self, amount: int):
        self.amount = amount
        self._rate = 0.0
        self._slices = 0

    def learn(self, amount: int, seconds: float) -> None:
        """Adapt after a slice; a slow first one was compilation and says nothing."""
        self._slices += 1
        if self._slices == 1 and seconds > SLICE_SECONDS:
            return
        self._rate = amount / max(seconds, 1e-6)
        wanted = int(self._rate * SLICE_SECONDS) + 1
        self.amount = min(max(wanted, self.amount // 2 + 1), GROWTH * self.amount)

    def message(self, paths: int) -> str:
        """The rate in words."""
        return f"{self._rate * paths:.2g} steps/s" if self._rate else "compiling"
