"""The one way in: integrate a dynamics on a problem and watch it."""

import itertools
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import PRNGKeyArray

from gradflow.describe import describe
from gradflow.dynamics.base import AbstractDynamics, State, block_length
from gradflow.dynamics.slow_flow import SlowFlow
from gradflow.network import DeepLinear, widths_of
from gradflow.observables import BUILT_IN, Observable, ObservableSpec, observe, resolve
from gradflow.problem import Problem
from gradflow.progress import ProgressBar, Report, automatic
from gradflow.schedule import Save, Schedule, Spacing, schedule
from gradflow.trajectory import Trajectory
from gradflow.types import Weights

STORED_BY_DEFAULT = 64 * 2**20
"""Bytes of weights up to which they are stored without being asked for."""

SLICE_SECONDS = 0.25
"""Work between two looks at the keyboard and the progress bar."""


class InterruptedWarning(UserWarning):
    """A run was stopped before its end; what was done is kept."""


def simulate(
    problem: Problem,
    net: DeepLinear | Sequence[DeepLinear],
    dynamics: AbstractDynamics,
    *,
    t1: float | None = None,
    steps: int | None = None,
    replicas: int | None = None,
    key: PRNGKeyArray | None = None,
    save: Save = 101,
    spacing: Spacing = "lin",
    observables: ObservableSpec | None = None,
    store_weights: bool | None = None,
    chunk: int | None = None,
    progress: bool | Report | None = None,
) -> Trajectory:
    """Run a dynamics on a problem from a network.

    Replicas run inside one compiled program; observables are evaluated on the way, so memory does
    not grow with the number of steps. Random numbers are addressed by seed, step and replica, so
    replica 7 of 10 is replica 7 of 1000. When a run is saved changes no bit of it. How many
    replicas are held at once (`replicas`, `chunk`) changes the compiled program, and with it at
    most the rounding of the last digits.

    **Arguments:**

    - `problem`: data and regularizers.
    - `net`: the start; or a sequence of networks of equal widths, which then are the replicas.
    - `dynamics`: how the weights move.
    - `t1`: length in flow time; or `steps`: length in steps of size h.
    - `replicas`: number of independent paths; None for one path without a replica axis.
    - `key`: `jax.random.key(seed)`; needed if the run is random.
    - `save`: number of saved points (the start included), or increasing flow times; on a grid
        times are rounded to the nearest step. `spacing`: "lin" or "log".
    - `observables`: names (see `gradflow.observables.BUILT_IN`), or a mapping from names to
        functions of (network, problem).
    - `store_weights`: keep the weights at every saved time; default: if below 64 MB.
    - `chunk`: most replicas to hold in memory at once; default all.
    - `progress`: None shows a bar on long runs at a terminal, True always, False never; or a
        function of (done, total, message).

    **Returns:** a `Trajectory`. Replicas that diverge are NaN from then on and flagged in
    `diverged`. After Ctrl-C the trajectory so far is returned with `interrupted=True`.

    **Raises:** `ValueError` or `TypeError` for bad input, before anything is computed.
    """
    starts, count = _starts(problem, net, replicas)
    if not isinstance(dynamics, AbstractDynamics):
        raise TypeError(
            f"dynamics must be a dynamics such as GradientDescent(0.1); got {dynamics!r}."
        )
    chosen = resolve(observables)
    plan = schedule(dynamics, t1, steps, save, spacing)
    random = dynamics.is_random(problem)
    if random and key is None:
        raise ValueError("key: this run is random; pass key=jax.random.key(seed).")
    if chunk is not None and not _is_count(chunk):
        raise ValueError(f"chunk must be an integer >= 1 or None; got {chunk!r}.")
    words = _key_words(key)
    weights = _stacked(starts)
    dynamics.check(problem, weights)
    stored = sum(w.size for w in weights) * plan.marks.size * weights[0].dtype.itemsize
    keep = stored <= STORED_BY_DEFAULT if store_weights is None else store_weights

    report = _reporter(progress, type(dynamics).__name__)
    began = time.monotonic()
    total = len(starts)
    size = min(total if chunk is None else chunk, total)
    records: list[_Record] = []
    interrupted = False
    runner = _Runner(problem, dynamics, chosen, keep, words, plan, report, total)
    try:
        for first in range(0, total, size):
            record = _Record(paths=min(size, total - first))
            # The last chunk is filled up with copies: every chunk runs the same program.
            members = np.minimum(np.arange(first, first + size), total - 1)
            try:
                runner.run(tuple(w[..., members] for w in weights), first, record)
            except KeyboardInterrupt:
                interrupted = True
                if record.times and not records:
                    records.append(record)
                break
            records.append(record)
    finally:
        if isinstance(report, ProgressBar):
            report.close()
    if not records:
        raise KeyboardInterrupt
    dataset = _dataset(
        records, plan, chosen, len(weights), replicas is not None or count is not None
    )
    done = sum(r.paths for r in records)
    ended = [r for r in records if r.end is not None]
    if ended:
        lost = sum(int((~r.alive[-1]).sum()) for r in ended)
        warnings.warn(
            f"{type(dynamics).__name__}: {lost} of {done} paths ended before t = "
            f"{plan.time[-1]:g}; one of them at {ended[0].end}.",
            RuntimeWarning,
            stacklevel=2,
        )
    if interrupted:
        warnings.warn(
            f"stopped at t = {dataset['time'].values[-1]:g} of {plan.time[-1]:g} with {done} of "
            f"{total} replicas; what was done is returned.",
            InterruptedWarning,
            stacklevel=2,
        )
    dataset.attrs = {
        "depth": len(weights),
        "widths": json.dumps(widths_of(weights)),
        "dynamics_kind": type(dynamics).__name__,
        "settings": json.dumps(
            {
                "dynamics": describe(dynamics),
                "regularizers": [describe(r) for r in problem.regularizers],
            }
        ),
        "key": json.dumps(None if key is None else [int(k) for k in words]),
        "save": json.dumps([float(t) for t in plan.time]),
        "store_weights": int(keep),
        "chunk": size,
        "observables": json.dumps([o.name for o in chosen]),
        "status": "interrupted" if interrupted else "complete",
        "wall_time_s": time.monotonic() - began,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "dtype": str(weights[0].dtype),
        "versions": json.dumps(
            {p: version(p) for p in ("gradflow", "jax", "diffrax", "equinox", "numpy")}
        ),
    }
    networks = [DeepLinear(layers) for layers in (starts[:1] if count is None else starts[:done])]
    return Trajectory(dataset, problem, dynamics, networks)


def repeat(trajectory: Trajectory) -> Trajectory:
    """Run a trajectory again from what it holds: bit for bit on the same versions and device.

    An interrupted run is run to its end.

    **Raises:** `ValueError` if it recorded observables of the user's own, which are not stored.
    """
    names = json.loads(trajectory.attrs["observables"])
    unknown = [n for n in names if n not in BUILT_IN]  # built-in names cannot be taken by others
    if unknown:
        raise ValueError(
            f"observables: {', '.join(unknown)} were functions given to simulate and are not "
            "stored; call simulate with them again."
        )
    times = json.loads(trajectory.attrs["save"])
    single = len(trajectory.start) == 1
    return simulate(
        trajectory.problem,
        trajectory.start[0] if single else trajectory.start,
        trajectory.dynamics,
        t1=times[-1],
        replicas=trajectory.replicas,
        key=trajectory.key,
        save=times,
        observables=names,
        store_weights=bool(trajectory.attrs["store_weights"]),
        chunk=int(trajectory.attrs["chunk"]),
    )


@dataclass
class _Record:
    """What one chunk of replicas has saved so far; arrays start with the replica axis.

    `end` says when and why a path stopped, if one did and its dynamics can tell.
    """

    paths: int
    times: int = 0
    observed: dict[str, list[np.ndarray]] = field(default_factory=dict)
    weights: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    alive: list[np.ndarray] = field(default_factory=list)
    end: str | None = None


@eqx.filter_jit(donate="all-except-first")
def _advance(fixed: tuple[Any, ...], state: State, block: int) -> State:
    dynamics, problem, start, stop, key, paths = fixed
    return dynamics.advance(problem, state, start, stop, key, paths, block)


@eqx.filter_jit
def _observe(
    observables: tuple[Observable, ...],
    weights: Weights,
    problem: Problem,
    dynamics: AbstractDynamics,
) -> tuple[dict[str, Any], Any]:
    alive = jnp.isfinite(weights[0][0, 0])
    return observe(observables, weights, problem, dynamics), alive


@dataclass
class _Runner:
    """Steps one chunk of replicas from saved time to saved time."""

    problem: Problem
    dynamics: AbstractDynamics
    observables: tuple[Observable, ...]
    keep_weights: bool
    key: Any
    plan: Schedule
    report: Report | None
    total: int

    def run(self, weights: Weights, first_path: int, record: _Record) -> None:
        """Fill `record`; what is in it stays valid whenever the run is interrupted."""
        size = weights[0].shape[-1]
        paths = jnp.arange(first_path, first_path + size, dtype=jnp.uint32)
        shapes = self.dynamics.noise_shapes(self.problem, widths_of(weights))
        block = block_length(shapes, size)
        state = self.dynamics.init(self.problem, weights, block)
        marks = self.plan.marks
        gridded = np.issubdtype(marks.dtype, np.integer)
        share, done_before = record.paths / self.total, first_path / self.total
        pace = _Pace(block)
        self._save(state, record)
        for previous, mark in itertools.pairwise(marks):
            position = previous
            while position < mark:
                following = min(position + pace.steps, mark) if gridded else mark
                began = time.monotonic()
                fixed = (
                    self.dynamics,
                    self.problem,
                    jnp.asarray(position),
                    jnp.asarray(following),
                    self.key,
                    paths,
                )
                state = jax.block_until_ready(_advance(fixed, state, block))
                pace.learn(int(following - position), time.monotonic() - began)
                position = following
                if self.report is not None:
                    fraction = position / marks[-1] * share + done_before
                    rate = pace.message(record.paths) if gridded else f"t = {position:.3g}"
                    self.report(float(fraction), 1.0, rate)
            self._save(state, record)
        lost = np.flatnonzero(~record.alive[-1])
        if isinstance(self.dynamics, SlowFlow) and lost.size:
            record.end = self.dynamics.why_ended(self.problem, state, int(lost[0]), marks[-1])

    def _save(self, state: State, record: _Record) -> None:
        observed, alive = jax.device_get(
            _observe(self.observables, state.weights, self.problem, self.dynamics)
        )

        def own(values: Any) -> np.ndarray:
            """The record's own copy: the array itself is given back to the next step."""
            return np.moveaxis(np.asarray(values), -1, 0)[: record.paths].copy()

        for name, values in observed.items():
            record.observed.setdefault(name, []).append(own(values))
        if self.keep_weights:
            record.weights.append(tuple(own(w) for w in jax.device_get(state.weights)))
        record.alive.append(own(alive))
        record.times = len(record.alive)


class _Pace:
    """How many steps to take between two looks at the keyboard."""

    def __init__(self, block: int):
        self.steps = block
        self._rate = 0.0
        self._calls = 0

    def learn(self, steps: int, seconds: float) -> None:
        """Adapt after a slice; the first one is compilation and says nothing."""
        self._calls += 1
        if self._calls == 1:
            return
        self._rate = steps / max(seconds, 1e-6)
        wanted = int(self._rate * SLICE_SECONDS) + 1
        self.steps = int(np.clip(wanted, self.steps // 2 + 1, 4 * self.steps))

    def message(self, paths: int) -> str:
        """The rate in words."""
        return f"{self._rate * paths:.2g} steps/s" if self._rate else "compiling"


def _starts(
    problem: Problem, net: DeepLinear | Sequence[DeepLinear], replicas: int | None
) -> tuple[list[Weights], int | None]:
    """The initial weights of every path, and how many networks were given (None for one)."""
    if not isinstance(problem, Problem):
        raise TypeError(
            f"problem must be a Problem such as Problem(data, [...]); got {type(problem).__name__}."
        )
    nets = [net] if isinstance(net, DeepLinear) else list(net)
    if not nets or not all(isinstance(n, DeepLinear) for n in nets):
        raise TypeError("net must be a DeepLinear or a non-empty sequence of them.")
    d_in, d_out = problem.data.d_in, problem.data.d_out
    for n in nets:
        if n.widths != nets[0].widths:
            raise ValueError(
                f"net: all networks need equal widths; got {nets[0].widths} and {n.widths}."
            )
    widths = nets[0].widths
    if widths[0] != d_in or widths[-1] != d_out:
        raise ValueError(
            f"net: widths {widths} do not fit the data with {d_in} inputs and {d_out} targets; "
            f"the first width must be {d_in} and the last {d_out}."
        )
    if replicas is not None and not _is_count(replicas):
        raise ValueError(f"replicas must be an integer >= 1 or None; got {replicas!r}.")
    if isinstance(net, DeepLinear):
        return [net.weights] * (1 if replicas is None else int(replicas)), None
    if replicas is not None and replicas != len(nets):
        raise ValueError(
            f"replicas={replicas} but {len(nets)} networks were given; leave replicas out, the "
            "networks are the replicas."
        )
    return [n.weights for n in nets], len(nets)


def _stacked(starts: list[Weights]) -> Weights:
    """The layers of all paths, path axis last; copies of one network are broadcast."""
    if all(layers is starts[0] for layers in starts):
        return tuple(jnp.repeat(w[..., None], len(starts), axis=-1) for w in starts[0])
    return tuple(jnp.stack(layers, axis=-1) for layers in zip(*starts, strict=True))


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def _key_words(key: PRNGKeyArray | None) -> Any:
    if key is None:
        return jnp.zeros((2,), jnp.uint32)
    if not isinstance(key, jax.Array):
        raise TypeError(f"key must be a random key such as jax.random.key(0); got {key!r}.")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(key) if typed else key
    if words.shape != (2,):
        raise ValueError(
            "key must be a single threefry key such as jax.random.key(0); got key data of shape "
            f"{words.shape}."
        )
    return words


def _reporter(progress: bool | Report | None, label: str) -> Report | None:
    if progress is None:
        return automatic(label)
    if isinstance(progress, bool):
        return ProgressBar(label, patience=0.0) if progress else None
    if not callable(progress):
        raise TypeError(
            "progress must be None, True, False or a function of (done, total, message); got "
            f"{progress!r}."
        )
    return progress


def _dataset(
    records: list[_Record],
    plan: Schedule,
    observables: Sequence[Observable],
    depth: int,
    replica_axis: bool,
) -> xr.Dataset:
    """Label what was recorded."""
    times = min(r.times for r in records)
    alive = np.concatenate([np.stack(r.alive[:times], axis=1) for r in records])
    lead = ("replica", "time") if replica_axis else ("time",)
    ends = {"width_in": "width_0", "width_out": f"width_{depth}"}

    def trim(stacked: np.ndarray) -> np.ndarray:
        return stacked if replica_axis else stacked[0]

    coords: dict[str, Any] = {
        "time": ("time", plan.time[:times], {"units": "flow time", "long_name": "flow time t"})
    }
    if plan.step is not None:
        coords["step"] = ("time", plan.step[:times], {"units": "1", "long_name": "steps"})
    variables: dict[str, Any] = {}
    for o in observables:
        values = np.concatenate([np.stack(r.observed[o.name][:times], axis=1) for r in records])
        dims = tuple(ends.get(dim, dim) for dim in o.dims)
        if values.ndim - 2 != len(dims):
            dims = tuple(f"{o.name}_{axis}" for axis in range(values.ndim - 2))
        values = _blank(values, alive)
        variables[o.name] = (
            (*lead, *dims),
            trim(values),
            {"long_name": o.long_name, "units": o.units},
        )
        if "layer" in dims:
            coords["layer"] = ("layer", np.arange(1, values.shape[-1] + 1))
    for i in range(depth if records[0].weights else 0):
        layer = np.concatenate(
            [np.stack([w[i] for w in r.weights[:times]], axis=1) for r in records]
        )
        variables[f"W{i + 1}"] = (
            (*lead, f"width_{i + 1}", f"width_{i}"),
            trim(layer),
            {"long_name": f"weights of layer {i + 1}", "units": "weight"},
        )
    gone = np.where(alive.all(axis=1), np.nan, plan.time[:times][np.argmin(alive, axis=1)])
    variables["diverged_at"] = (
        ("replica",) if replica_axis else (),
        gone if replica_axis else gone[0],
        {"long_name": "first saved time at which the replica had diverged", "units": "flow time"},
    )
    if replica_axis:
        coords["replica"] = ("replica", np.arange(alive.shape[0]))
    return xr.Dataset(variables, coords)


def _blank(values: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """NaN wherever a replica has diverged, whatever an observable made of NaN weights."""
    if alive.all() or not np.issubdtype(values.dtype, np.floating):
        return values
    mask = alive.reshape(alive.shape + (1,) * (values.ndim - 2))
    return np.where(mask, values, np.nan)
