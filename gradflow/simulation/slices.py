"""Moves an ensemble from saved time to saved time, many of them in one compiled call."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num, UInt32

from gradflow.backend.compiled import LONG, compiled
from gradflow.backend.devices import Devices, along_last
from gradflow.backend.products import in_groups, paths_together
from gradflow.backend.types import Weights
from gradflow.dynamics.base import (
    HANDOVER,
    AbstractDynamics,
    End,
    State,
    block_length,
    initial_state,
)
from gradflow.network import widths_of
from gradflow.observables import Observable, observe
from gradflow.problem import Problem
from gradflow.random.streams import Normals, Source
from gradflow.results.recording import AbstractRecord, Saved
from gradflow.simulation.progress import Report
from gradflow.simulation.schedule import Schedule

SLICE_SECONDS = 0.25
"""Work of a slice, the compiled call between two looks at the keyboard and the progress bar."""

GROWTH = 64
"""Factor by which a slice may do more than the one before it."""

FIRST_STEPS = 16
"""Steps of an adaptive dynamics in the first slices."""

MOST_ROWS = 256
"""Most saved times of a slice."""

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
        self._save_positions = plan.save_positions
        self._gridded = plan.save_positions.dtype.kind == "i"
        self._report = report
        self._sizer: SliceSizer | None = None
        self._steps = [SliceSizer(FIRST_STEPS), SliceSizer(FIRST_STEPS)]  # of the two stints
        self._record = record
        self._shapes = shapes

    def run(self, weights: Weights, paths: slice, key: Any, normals: Normals | None) -> None:
        """Record some paths; `weights` may have more, which the devices take to equal parts."""
        problem, dynamics = self._moving[:2]
        save_positions, record = self._save_positions, self._record
        size, width = weights[0].shape[-1], paths.stop - paths.start
        devices = Devices.sharing(size)
        block = block_length(self._shapes, size)
        state = initial_state(dynamics, problem, weights, self._shapes, block)
        layout = state_layout(state)
        key, numbers = jax.device_put((key, paths.start + np.arange(size, dtype=np.uint32)))
        source = Source(key, devices.placed(numbers, along_last(1)), normals)
        stints = self._stints(source, block, devices, layout)
        sizer = self._sizer = self._sizer or SliceSizer(block if self._gridded else 1)
        stint, taken = 0, np.zeros(size, np.int32)
        state = devices.placed(state, layout)
        rows = _Rows(size)
        position, times = save_positions.dtype.type(0), 0
        while times < save_positions.size:
            ends, count = self._following(position, times, sizer.amount)
            steps = self._steps[stint]
            limits = ends, np.asarray(count), np.asarray(steps.amount)
            began = time.monotonic()
            state, some, saved = jax.block_until_ready(
                _run_slice((stints[stint], *limits), (state, rows.ahead))
            )
            rows.take(some, np.asarray(saved))
            done = rows.complete
            position = ends[max(done, 1) if self._gridded else done]
            seconds = time.monotonic() - began
            amount = int(position - ends[0]) if self._gridded else done
            if amount:
                sizer.learn(amount, seconds)
            reached = position
            if state.progress is not None:
                progress = jax.tree.map(lambda x: np.asarray(x)[:width], state.progress)
                record.ends(paths, progress.time, progress.end)
                before, taken = taken, np.array(state.progress.steps)  # its memory is given away
                steps.learn(int(np.max(taken - before)), seconds)
                if len(stints) > 1:
                    stint = _next_stint(stint, taken, np.asarray(state.progress.end))
                going = progress.time[progress.end == End.NONE]
                reached = max(position, going.min(initial=save_positions[-1]))
            record.write(rows.held, done, paths, times)
            rows.drop(done)
            times += done
            if self._report is not None:
                share = paths.start + reached / save_positions[-1] * width
                rate = sizer.message(width) if self._gridded else f"t = {reached:.3g}"
                self._report(float(share / record.total), 1.0, rate)
        record.paths = paths.stop
        if state.progress is not None and record.end is None:
            lost = np.flatnonzero(np.asarray(state.progress.end)[:width] == End.DIVERGED)
            if lost.size:
                record.end = dynamics.why_ended(problem, state, int(lost[0]), save_positions[-1])

    def _stints(
        self, source: Source, block: int, devices: Devices, layout: Any
    ) -> list["Ensemble"]:
        """The ensemble up to `HANDOVER` steps of a path, and from there on, if that differs."""
        problem, dynamics, observables, keep_weights = self._moving
        successor = dynamics.successor

        def stint(moves: AbstractDynamics, *steps: int) -> Ensemble:
            return Ensemble(
                moves, problem, source, observables, keep_weights, block, devices, layout, *steps
            )

        if successor is None:
            return [stint(dynamics)]
        return [stint(dynamics, 0, HANDOVER), stint(successor, HANDOVER)]

    def _following(self, position: Any, times: int, amount: int) -> tuple[np.ndarray, int]:
        """Where a slice starts and the ends it goes to, and how many of them are saved.

        Either all are, or there is a single one between two saved times.
        """
        save_positions = self._save_positions
        last = times + amount + (save_positions[times] == 0)  # the start takes no work
        if self._gridded:
            last = int(np.searchsorted(save_positions, position + amount, side="right"))
        ends = save_positions[times : min(last, times + MOST_ROWS)]
        count = ends.size
        padded = np.full(MOST_ROWS + 1, position)
        padded[1 : count + 1] = ends
        if count == 0:
            padded[1] = position + amount
        return padded, count


def state_layout(state: State) -> Any:
    """How the state of an ensemble is divided: by paths."""
    return jax.tree.map(lambda leaf: along_last(leaf.ndim), state)


def _next_stint(
    stint: int, taken: Int[np.ndarray, " paths"], end: Int[np.ndarray, " paths"]
) -> int:
    """Whose paths move next: those before their handover, those after it, or the others in turn."""
    going = end == End.NONE
    after = going & (taken >= HANDOVER)
    if not np.any(after):
        return 0
    return 1 if np.all(after == going) else 1 - stint


class Ensemble(eqx.Module):
    """An ensemble on its way: all that does not change.

    Of an adaptive dynamics it moves the paths that have taken `first_step` steps but not yet
    `last_step` of them.
    """

    dynamics: AbstractDynamics
    problem: Problem
    source: Source
    observables: tuple[Observable, ...]
    keep_weights: bool = eqx.field(static=True)
    block: int = eqx.field(static=True)
    devices: Devices = eqx.field(static=True)
    layout: Any
    first_step: int = eqx.field(static=True, default=0)
    last_step: int | None = eqx.field(static=True, default=None)

    def on_one_device(self, paths: UInt32[Array, " paths"]) -> "Ensemble":
        """The part of the ensemble that one device has."""
        return eqx.tree_at(lambda ensemble: ensemble.source.paths, self, paths)

    def allowed(self, taken: Int[Array, " paths"], steps: Int[Array, ""]) -> Int[Array, " paths"]:
        """How many of some steps each path may take, from how many it has taken."""
        left = steps
        if self.last_step is not None:
            left = jnp.clip(self.last_step - taken, 0, steps)
        return jnp.where(taken >= self.first_step, left, 0).astype(taken.dtype)

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


@partial(compiled, options=LONG, donate="all-except-first")
def _run_slice(
    fixed: tuple[Ensemble, Any, Any, Any], moved: tuple[State, Any]
) -> tuple[State, Saved, Array]:
    """Go to `count` ends and save as many of them as there is memory for; to one end for 0.

    Every device goes by itself with its part of the paths, from the end up to which it is `ahead`
    already. An adaptive dynamics gets as far as `steps` steps take it.

    **Returns:** the state, what was saved, and how many ends the device of every path has saved.
    """
    ensemble, ends, count, steps = fixed
    state, ahead = moved

    def go(state: State, ahead: Array, paths: Array) -> tuple[State, Saved, Array]:
        return _go(ensemble.on_one_device(paths), ends, count, steps, state, ahead)

    def layouts(shapes: Any) -> Any:
        return ensemble.layout, *jax.tree.map(lambda leaf: along_last(leaf.ndim), shapes[1:])

    run = ensemble.devices.each(go, (ensemble.layout, along_last(1), along_last(1)), layouts)
    return run(state, ahead, ensemble.source.paths)


def _go(
    ensemble: Ensemble,
    ends: Num[Array, " ends"],
    count: Int[Array, ""],
    steps: Int[Array, ""],
    state: State,
    ahead: Int[Array, " paths"],
) -> tuple[State, Saved, Array]:
    """The part of one device in a slice."""
    if state.progress is not None:
        allowed = ensemble.allowed(state.progress.steps, steps)
        state = eqx.tree_at(lambda s: s.progress.allowed, state, allowed)
    saved = jax.jit(lambda weights: ensemble.saved(weights))  # traced once
    row = jax.eval_shape(saved, state.weights)
    row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    most = int(np.clip(ROW_BYTES // max(row_bytes, 1), 1, MOST_ROWS))
    rows = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), row)

    last = jnp.clip(count, 1, most)

    def unfinished(carry: tuple[Array, Array, State, Saved]) -> Array:
        i, arrives, _, _ = carry
        return arrives & (i < last)

    def go(carry: tuple[Array, Array, State, Saved]) -> tuple[Array, Array, State, Saved]:
        i, _, state, rows = carry
        state = ensemble.advance(state, ends[i], ends[i + 1])
        arrives = jnp.array(True)
        if state.progress is not None:
            arrives = ~jnp.any(state.progress.on_the_way(ends[i + 1]))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), row)
        now = jax.lax.cond(arrives & (i < count), saved, lambda _: nothing, state.weights)
        rows = jax.tree.map(lambda all_, one: all_.at[i].set(one), rows, now)
        return i + arrives.astype(i.dtype), arrives, state, rows

    i, _, state, rows = jax.lax.while_loop(unfinished, go, (ahead[0], jnp.array(True), state, rows))
    return state, rows, jnp.full_like(ahead, jnp.where(count > 0, i, 0))


class _Rows:
    """What has been saved of a window of times that some devices have gone through further.

    - `ahead`: how many of these times the device of every path has saved, `(R,)`.
    - `held`: the rows of them, filled where they are.
    """

    def __init__(self, paths: int):
        self.ahead = np.zeros(paths, np.int32)
        self.held: Any = None

    @property
    def complete(self) -> int:
        """How many times all devices have saved."""
        return int(self.ahead.min())

    def take(self, rows: Saved, saved: np.ndarray) -> None:
        """Add what a slice has saved: of every path the times from `ahead` up to `saved`."""
        if np.any(self.ahead):
            row = np.arange(rows.alive.shape[0])[:, None]
            new = (self.ahead <= row) & (row < saved)

            def joined(held: Any, more: Any) -> np.ndarray:
                where = new.reshape(new.shape[0], *[1] * (more.ndim - 2), new.shape[1])
                return np.where(where, np.asarray(more), np.asarray(held))

            rows = jax.tree.map(joined, self.held, rows)
        self.held, self.ahead = rows, saved

    def drop(self, count: int) -> None:
        """Forget the first times of the window."""
        self.ahead = self.ahead - np.int32(count)
        if np.any(self.ahead):
            self.held = jax.tree.map(lambda x: np.roll(np.asarray(x), -count, axis=0), self.held)


class SliceSizer:
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
