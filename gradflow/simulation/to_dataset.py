"""Names, units and axes of what a run has recorded."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import xarray as xr

from gradflow.dynamics.base import AbstractDynamics
from gradflow.dynamics.effective_time import effective_time, momentum_of
from gradflow.observables import Observable
from gradflow.results.recording import AbstractRecord, PathRecord, StatisticsRecord
from gradflow.results.running_statistics import RunningStatistics
from gradflow.simulation.schedule import Schedule


def labelled(
    record: AbstractRecord,
    plan: Schedule,
    observables: Sequence[Observable],
    depth: int,
    replica_axis: bool,
    quantiles: Sequence[float],
    dynamics: AbstractDynamics,
) -> xr.Dataset:
    """The data set of a run: of its paths, with or without a replica axis, or of statistics.

    A run with momentum has the coordinate `effective_time` beside its flow time.
    """
    time = plan.time[: record.times]
    if isinstance(record, StatisticsRecord):
        variables, own = _of_statistics(record.statistics, observables, depth, quantiles)
        if record.incomplete:
            given_up = record.gave_up(time)
            axes, ended, attributes = variables["diverged"]
            variables["diverged"] = (axes, ended - given_up, attributes)
            variables["incomplete"] = (
                ("time",),
                given_up,
                {"long_name": "paths that were given up before", "units": "1"},
            )
    else:
        assert isinstance(record, PathRecord)
        variables, own = _of_paths(record, time, observables, depth, replica_axis)
    coords: dict[str, Any] = {
        "time": ("time", time, {"units": "flow time", "long_name": "flow time t"})
    }
    if plan.step is not None:
        coords["step"] = ("time", plan.step[: record.times], {"units": "1", "long_name": "steps"})
    if momentum_of(dynamics) > 0.0:
        attrs = {"units": "flow time", "long_name": "effective time h k / (1 - momentum)"}
        coords["effective_time"] = ("time", effective_time(dynamics, time), attrs)
    named = {axis for axes, _, _ in variables.values() for axis in axes}
    return xr.Dataset(variables, own | coords | coordinates_of(named, depth))


def axes_of(observable: Observable, count: int, depth: int) -> tuple[str, ...]:
    """The names of the axes of an observable of one path that has so many of them."""
    ends = {"width_in": "width_0", "width_out": f"width_{depth}"}
    if count != len(observable.dims):
        return tuple(f"{observable.name}_{axis}" for axis in range(count))
    return tuple(ends.get(dim, dim) for dim in observable.dims)


def coordinates_of(axes: Collection[str], depth: int) -> dict[str, Any]:
    """The coordinates of the axes of observables: layers count from 1."""
    return {"layer": ("layer", np.arange(1, depth + 1))} if "layer" in axes else {}


def _of_paths(
    record: PathRecord,
    time: np.ndarray,
    observables: Sequence[Observable],
    depth: int,
    replica_axis: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables and coordinates of a trajectory."""
    saved = record.finished()
    alive = saved.alive
    lead = ("replica", "time") if replica_axis else ("time",)

    def trim(stacked: np.ndarray) -> np.ndarray:
        return stacked if replica_axis else stacked[0]

    variables: dict[str, Any] = {}
    for o in observables:
        values = _blank(saved.observed[o.name], alive)
        variables[o.name] = (
            (*lead, *axes_of(o, values.ndim - 2, depth)),
            trim(values),
            {"long_name": o.long_name, "units": o.units},
        )
    for i, layer in enumerate(saved.weights, start=1):
        variables[f"W{i}"] = (
            (*lead, f"width_{i}", f"width_{i - 1}"),
            trim(layer),
            {"long_name": f"weights of layer {i}", "units": "weight"},
        )
    gone = np.where(alive.all(axis=1), np.nan, time[np.argmin(alive, axis=1)])
    if record.incomplete:
        reached = np.full(gone.shape, np.nan)
        for path, (stopped, _) in record.incomplete.items():
            reached[path] = stopped
        gone[np.isfinite(reached)] = np.nan
        variables["incomplete_at"] = (
            ("replica",) if replica_axis else (),
            reached if replica_axis else reached[0],
            {"long_name": "flow time at which the replica was given up", "units": "flow time"},
        )
    variables["diverged_at"] = (
        ("replica",) if replica_axis else (),
        gone if replica_axis else gone[0],
        {"long_name": "first saved time at which the replica had diverged", "units": "flow time"},
    )
    coords = {"replica": ("replica", np.arange(alive.shape[0]))} if replica_axis else {}
    return variables, coords


def _of_statistics(
    statistics: RunningStatistics,
    observables: Sequence[Observable],
    depth: int,
    probabilities: Sequence[float],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables and coordinates of ensemble statistics."""
    moments = statistics.moments[: statistics.seen]
    variables: dict[str, Any] = {}
    quantiles, errors = statistics.quantiles(probabilities)
    over_entries = {
        "mean": ("mean of", np.stack([m.mean for m in moments])),
        "variance": ("variance of", np.stack([m.variance for m in moments])),
        "standard_error": ("standard error of the mean of", statistics.standard_errors),
        "minimum": ("minimum of", np.stack([m.minimum for m in moments])),
        "maximum": ("maximum of", np.stack([m.maximum for m in moments])),
        "quantiles": ("quantiles of", quantiles),
        "quantile_error": ("bound on the error of the quantiles of", errors),
    }
    for what, (words, entries) in over_entries.items():
        lead = ("time", "quantile") if what.startswith("quantile") else ("time",)
        arrays = statistics.of_observables(entries)
        for o in observables:
            units = f"({o.units})^2" if what == "variance" else o.units
            variables[f"{o.name}_{what}"] = (
                (*lead, *axes_of(o, len(statistics.shapes[o.name]), depth)),
                arrays[o.name],
                {"long_name": f"{words} {o.long_name}", "units": units},
            )
    variables["covariance"] = (
        ("time", "entry", "other_entry"),
        np.stack([m.covariance for m in moments]),
        {"long_name": "covariance of entries"},
    )
    variables["count"] = (
        ("time",),
        np.array([m.count for m in moments]),
        {"long_name": "paths that have not diverged", "units": "1"},
    )
    variables["diverged"] = (
        ("time",),
        np.array(statistics.lost[: statistics.seen]),
        {"long_name": "paths that have diverged", "units": "1"},
    )
    coords = {
        "quantile": ("quantile", np.asarray(probabilities, dtype=float), {"units": "1"}),
        "entry": ("entry", np.array(statistics.paired, dtype=object)),
        "other_entry": ("other_entry", np.array(statistics.paired, dtype=object)),
    }
    return variables, coords


def _blank(values: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """NaN wherever a replica has diverged, whatever an observable made of NaN weights."""
    if alive.all() or not np.issubdtype(values.dtype, np.floating):
        return values
    mask = alive.reshape(alive.shape + (1,) * (values.ndim - 2))
    return np.where(mask, values, np.nan)
