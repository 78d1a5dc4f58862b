"""The one way in: integrate a dynamics on a problem and watch it."""

import functools
import json
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import PRNGKeyArray

from gradflow.backend.devices import Devices
from gradflow.backend.memory import check_room, paths_at_once
from gradflow.backend.tracing import is_traced
from gradflow.checks import is_count
from gradflow.dynamics.base import AbstractDynamics
from gradflow.dynamics.normals import check_normals, check_pairs
from gradflow.network import DeepLinear, widths_of
from gradflow.observables import BUILT_IN, Observable, ObservableSpec, resolve
from gradflow.problem import Problem
from gradflow.random.streams import Normals
from gradflow.results.ensemble_statistics import QUANTILES, EnsembleStatistics
from gradflow.results.recording import AbstractRecord, PathRecord, StatisticsRecord
from gradflow.results.serialize import describe
from gradflow.results.trajectory import Trajectory
from gradflow.simulation.divergence import DivergedWarning, divergence
from gradflow.simulation.progress import ProgressBar, Report, automatic
from gradflow.simulation.rounding import RoundingWarning, rounded
from gradflow.simulation.schedule import Save, Spacing, schedule
from gradflow.simulation.slices import Runner
from gradflow.simulation.starts import check_norms, check_penalties, stacked, starts_of
from gradflow.simulation.to_dataset import labelled

_Result = TypeVar("_Result", Trajectory, EnsembleStatistics)

STORED_BY_DEFAULT = 64 * 2**20
"""Bytes of weights up to which they are stored without being asked for."""


UNBOUNDED = ("loss_floor",)
"""Built-in observables that are infinite where there is nothing stationary to be measured."""


class InterruptedWarning(UserWarning):
    """A run was stopped before its end; what was done is kept."""


class IncompleteWarning(UserWarning):
    """Paths had to be given up before the end of a run; what was done is kept."""


@overload
def simulate(
    problem: Problem,
    net: DeepLinear | Sequence[DeepLinear],
    dynamics: AbstractDynamics,
    *,
    t1: float | None = None,
    steps: int | None = None,
    replicas: int | None = None,
    key: PRNGKeyArray | None = None,
    normals: Normals | None = None,
    save: Save = 101,
    spacing: Spacing = "lin",
    observables: ObservableSpec | None = None,
    store_weights: bool | None = None,
    keep: Literal["paths"] = "paths",
    quantiles: Sequence[float] = QUANTILES,
    chunk: int | None = None,
    progress: bool | Report | None = None,
) -> Trajectory: ...


@overload
def simulate(
    problem: Problem,
    net: DeepLinear | Sequence[DeepLinear],
    dynamics: AbstractDynamics,
    *,
    t1: float | None = None,
    steps: int | None = None,
    replicas: int | None = None,
    key: PRNGKeyArray | None = None,
    normals: Normals | None = None,
    save: Save = 101,
    spacing: Spacing = "lin",
    observables: ObservableSpec | None = None,
    store_weights: bool | None = None,
    keep: Literal["statistics"],
    quantiles: Sequence[float] = QUANTILES,
    chunk: int | None = None,
    progress: bool | Report | None = None,
) -> EnsembleStatistics: ...


def simulate(
    problem: Problem,
    net: DeepLinear | Sequence[DeepLinear],
    dynamics: AbstractDynamics,
    *,
    t1: float | None = None,
    steps: int | None = None,
    replicas: int | None = None,
    key: PRNGKeyArray | None = None,
    normals: Normals | None = None,
    save: Save = 101,
    spacing: Spacing = "lin",
    observables: ObservableSpec | None = None,
    store_weights: bool | None = None,
    keep: Literal["paths", "statistics"] = "paths",
    quantiles: Sequence[float] = QUANTILES,
    chunk: int | None = None,
    progress: bool | Report | None = None,
) -> Trajectory | EnsembleStatistics:
    """Run a dynamics on a problem from a network.

    Replicas run inside one compiled program, spread over all devices; observables are evaluated on
    the way, so memory does not grow with the number of steps. Random numbers are addressed by seed,
    step and replica, so replica 7 of 10 is replica 7 of 1000. The same call gives the same bits,
    whatever the speed of the machine. When a run is saved changes no bit of dynamics that take
    steps; an adaptive flow steps to the saved times, which changes its steps, within its tolerances
    (`SlowFlow` with noise along the manifold not: its cells do not know of them). How many replicas
    a device holds at once (`replicas`, `chunk`, the number of devices) changes the compiled
    program: results agree to rounding.

    **Arguments:**

    - `problem`: data and regularizers.
    - `net`: the start; or a sequence of networks of equal widths, which then are the replicas.
    - `dynamics`: how the weights move.
    - `t1`: length in flow time; or `steps`: length in steps of size h.
    - `replicas`: number of paths, independent of each other (but for antithetic normals); None for
        one path without a replica axis.
    - `key`: `jax.random.key(seed)`; needed if the run is random.
    - `normals`: what stands for the standard normals, such as `Normals(antithetic=True)`; standard
        errors then are those of pairs.
    - `save`: number of saved points, of which the start is the first; or increasing flow times,
        which then are all that is saved (the start only if 0 is among them). On a grid times are
        rounded to the nearest step; a last one that is `t1` up to the rounding of its data type is
        `t1`. `spacing`: "lin" or "log".
    - `observables`: names (see `gradflow.observables.BUILT_IN`), or a mapping from names to
        functions of (network, problem).
    - `store_weights`: keep the weights at every saved time; default: if below 64 MB.
    - `keep`: "paths", or "statistics": of the observables, over replicas, at every saved time; then
        memory does not grow with the number of replicas. `quantiles`: which of them are taken.
    - `chunk`: most replicas to hold in memory at once; default: as many as fit into half of the
        memory at hand and, on a processor, into its caches (see `backend.memory`). Antithetic
        pairs stay together.
    - `progress`: None shows a bar on long runs at a terminal, True always, False never; or a
        function of (done, total, message).

    **Returns:** a `Trajectory`, or `EnsembleStatistics`. Replicas that diverge are NaN from then on
    and flagged in `diverged`, with a `DivergedWarning`; statistics leave them out and count them.
    Paths of an adaptive flow that cannot go on (a step limit, a step size that collapses) are NaN
    from then on and flagged in `incomplete`, with an `IncompleteWarning` that says what to do.
    Where weights are so large that their rounding moves the loss by more than it is, a
    `RoundingWarning` says so, as long as weights are stored. After Ctrl-C what was done is returned
    with `interrupted=True`.

    **Raises:** `ValueError` or `TypeError` for bad input, before anything is computed;
    `MemoryError` if there is no room for what is saved of all paths.
    """
    _check_untraced(dynamics, (problem, net, key))
    starts, total = starts_of(problem, net, replicas)
    replica_axis = replicas is not None or not isinstance(net, DeepLinear)
    if not isinstance(dynamics, AbstractDynamics):
        raise TypeError(
            f"dynamics must be a dynamics such as GradientDescent(0.1); got {dynamics!r}."
        )
    chosen = resolve(observables)
    plan = schedule(dynamics, t1, steps, save, spacing)
    random = dynamics.is_random(problem)
    if random and key is None:
        raise ValueError("key: this run is random; pass key=jax.random.key(seed).")
    if chunk is not None and not is_count(chunk):
        raise ValueError(f"chunk must be an integer >= 1 or None; got {chunk!r}.")
    _check_keep(keep, quantiles, store_weights)
    key_data = _key_data(key)
    first_weights = stacked(starts, 0, len(starts))
    check_norms(first_weights)
    check_penalties(problem, first_weights)
    dynamics.check(problem, first_weights)
    layers = starts[0]
    check_normals(normals, dynamics, problem, widths_of(layers))
    check_pairs(normals, total if replica_axis else None)
    paired = normals is not None and normals.antithetic
    stored = sum(w.nbytes for w in layers) * total * plan.save_positions.size
    storing = stored <= STORED_BY_DEFAULT if store_weights is None else store_weights
    shapes = dynamics.noise_shapes(problem, widths_of(layers))
    held = (*layers, *jax.tree.leaves(shapes))
    check_room((*held, *_rows_of_a_step(problem)), jax.local_devices())
    size = min(total, _fitting(held, total, dynamics.most_paths) if chunk is None else chunk)
    size += size % 2 if paired else 0  # statistics need both replicas of a pair at once

    report = _reporter(progress, type(dynamics).__name__)
    began = time.monotonic()
    interrupted = False
    record: AbstractRecord = PathRecord(total, plan.save_positions.size)
    if keep == "statistics":
        record = StatisticsRecord(total, plan.save_positions.size, antithetic=paired)
    storing = storing and keep == "paths"
    runner = Runner(problem, dynamics, chosen, storing, plan, report, record, shapes)
    width = Devices.sharing(size).padded(size)
    try:
        for first in range(0, total, size):
            # All chunks are filled up to one size: they run the same program.
            paths = slice(first, min(first + size, total))
            runner.run(stacked(starts, first, width), paths, key_data, normals)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if isinstance(report, ProgressBar):
            report.close()
    if record.times == 0:
        raise KeyboardInterrupt
    dataset = labelled(record, plan, chosen, len(layers), replica_axis, quantiles, dynamics)
    if not record.lost:
        _warn_of_overflow(dataset, chosen)
    if storing and isinstance(record, PathRecord):
        ends = [w[:, -1] for w in record.finished().weights]
        if text := rounded(problem, ends):
            what = f"{type(dynamics).__name__}: at t = {dataset['time'].values[-1]:g} {text}."
            warnings.warn(what, RoundingWarning, stacklevel=2)
    done = record.paths
    if record.end is not None:
        lost = record.lost - len(record.incomplete)
        warnings.warn(
            f"{type(dynamics).__name__}: {lost} of {done} paths ended before t = "
            f"{plan.time[-1]:g}; one of them at {record.end}.",
            RuntimeWarning,
            stacklevel=2,
        )
    elif record.lost > len(record.incomplete):
        text = divergence(problem, starts, dynamics, plan, record)
        warnings.warn(text, DivergedWarning, stacklevel=2)
    if record.incomplete:
        reached, why = min(record.incomplete.values())
        warnings.warn(
            f"{type(dynamics).__name__}: {len(record.incomplete)} of {done} paths are incomplete, "
            f"and NaN after that; the first of them was given up at t = {reached:.6g} of "
            f"{plan.time[-1]:g}, where {why.sentence}.",
            IncompleteWarning,
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
        "depth": len(layers),
        "widths": json.dumps(widths_of(layers)),
        "dynamics_kind": type(dynamics).__name__,
        "settings": json.dumps(
            {
                "dynamics": describe(dynamics),
                "regularizers": [describe(r) for r in problem.regularizers],
            }
        ),
        "key": json.dumps(None if key is None else [int(k) for k in key_data]),
        "normals": json.dumps(vars(normals or Normals())),
        "save": json.dumps([float(t) for t in plan.time]),
        "store_weights": int(storing),
        "chunk": size,
        "replicas": json.dumps(total if replica_axis else None),
        "observables": json.dumps([o.name for o in chosen]),
        "status": "interrupted" if interrupted else "complete",
        "wall_time_s": time.monotonic() - began,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "devices": Devices.sharing(size).count,
        "dtype": str(layers[0].dtype),
        "versions": _versions(),
    }
    result = Trajectory if keep == "paths" else EnsembleStatistics
    return result(dataset, problem, dynamics, [DeepLinear(w) for w in starts])


def repeat(trajectory: _Result) -> _Result:
    """Run a trajectory again from what it holds, with the same result.

    To the last bit on the same versions, processor and number of devices; elsewhere to rounding,
    which training at the edge of stability amplifies. An interrupted run is run to its end, with
    all the replicas that were asked for.

    **Raises:** `ValueError` if it recorded observables of the user's own, which are not stored.
    """
    if not isinstance(trajectory, EnsembleStatistics):
        Trajectory.check("trajectory", trajectory)
    names = json.loads(trajectory.attrs["observables"])
    unknown = [n for n in names if n not in BUILT_IN]  # built-in names cannot be taken by others
    if unknown:
        raise ValueError(
            f"observables: {', '.join(unknown)} were functions given to simulate and are not "
            "stored; call simulate with them again."
        )
    times = json.loads(trajectory.attrs["save"])
    single = len(trajectory.start) == 1
    length: dict[str, Any] = {"t1": times[-1]}
    scheduled = trajectory.dynamics.update_rule.schedule is not None
    if scheduled and trajectory.step is not None and not trajectory.interrupted:
        length = {"steps": int(trajectory.step[-1])}  # steps of size 0 may stand at the end
    kept: dict[str, Any] = {"store_weights": bool(trajectory.attrs["store_weights"])}
    if isinstance(trajectory, EnsembleStatistics):
        probabilities = trajectory.to_xarray()["quantile"].values.tolist()
        kept = {"keep": "statistics", "quantiles": probabilities}
    again = simulate(
        trajectory.problem,
        trajectory.start[0] if single else trajectory.start,
        trajectory.dynamics,
        **length,
        replicas=json.loads(trajectory.attrs["replicas"]),
        key=trajectory.key,
        normals=trajectory.normals,
        save=times,
        observables=names,
        chunk=int(trajectory.attrs["chunk"]),
        **kept,
    )
    assert isinstance(again, type(trajectory)), "what was kept is kept again"
    return again


def _check_untraced(dynamics: Any, rest: Any) -> None:
    """Raise a `TypeError` inside transformations of JAX, where a run cannot be watched."""
    if not is_traced(dynamics, rest, jnp.zeros(())):
        return
    kind = type(dynamics).__name__
    instead = f"use {kind}(...).solve(problem, net, times)"
    if not hasattr(dynamics, "solve"):
        instead = f"{kind} runs outside of them only; GradientFlow and GradientDescent have .solve"
    raise TypeError(
        f"simulate watches a run from outside and cannot be part of jit, vmap or grad: {instead}."
    )


@functools.cache
def _versions() -> str:
    return json.dumps({p: version(p) for p in ("gradflow", "jax", "diffrax", "equinox", "numpy")})


def _rows_of_a_step(problem: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The rows of the sample that a step gathers, if it takes a batch of them."""
    rule, data = problem.minibatch, problem.data
    if rule is None or data.x is None:
        return ()
    return (jax.ShapeDtypeStruct((rule.size(), data.d_in + data.d_out), data.x.dtype),)


def _warn_of_overflow(dataset: xr.Dataset, chosen: Sequence[Observable]) -> None:
    """Warn of built-in observables that no float can hold, of paths that have not diverged."""
    finite = [o.name for o in chosen if BUILT_IN.get(o.name) is o and o.name not in UNBOUNDED]
    watched = {f"{name}{of}" for name in finite for of in ("", "_mean", "_minimum", "_maximum")}
    for name, variable in dataset.data_vars.items():
        if name not in watched or variable.dtype.kind != "f":
            continue
        others = tuple(i for i, dim in enumerate(variable.dims) if dim != "time")
        infinite = np.isinf(variable.values).any(axis=others)
        if infinite.any():
            time = dataset["time"].values[int(np.argmax(infinite))]
            warnings.warn(
                f"{name} is infinite at t = {time:g}: it is beyond "
                f"{np.finfo(variable.dtype).max:.2g}, the largest number there is, and no path has "
                "diverged; rescale the data and the network.",
                RuntimeWarning,
                stacklevel=3,
            )


def _fitting(arrays: Sequence[Any], total: int, most_paths: int | None) -> int:
    """How many paths, of such arrays each, are held at once, in chunks of about equal size."""
    held = sum(x.size * x.dtype.itemsize for x in arrays)
    most = min(paths_at_once(held, jax.local_devices()), most_paths or total)
    return -(-total // -(-total // most))


def _check_keep(keep: str, quantiles: Sequence[float], store_weights: bool | None) -> None:
    if keep not in ("paths", "statistics"):
        raise ValueError(f"keep must be 'paths' or 'statistics'; got {keep!r}.")
    if keep == "statistics" and store_weights:
        raise ValueError(
            "store_weights=True keeps the weights of every path, which keep='statistics' does "
            "not; leave one of them out, or make an observable of what you need of the weights."
        )
    wrong = [p for p in quantiles if not 0.0 <= p <= 1.0]
    if wrong:
        raise ValueError(f"quantiles must lie between 0 and 1; got {wrong[0]!r}.")


def _key_data(key: PRNGKeyArray | None) -> Any:
    if key is None:
        return np.zeros((2,), np.uint32)
    if not isinstance(key, jax.Array):
        raise TypeError(f"key must be a random key such as jax.random.key(0); got {key!r}.")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(key) if typed else key
    if data.shape != (2,):
        raise ValueError(
            "key must be a single threefry key such as jax.random.key(0); got key data of shape "
            f"{data.shape}."
        )
    return data


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
