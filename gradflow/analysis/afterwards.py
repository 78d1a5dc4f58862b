"""Observables that a run did not record, from the weights that it stored."""

from weakref import WeakKeyDictionary

import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array

from gradflow.analysis.unmeasured import Unmeasured
from gradflow.backend.compiled import compiled
from gradflow.backend.products import in_groups
from gradflow.backend.types import Weights
from gradflow.dynamics.base import AbstractDynamics
from gradflow.observables import BUILT_IN, Observable, observe
from gradflow.problem import Problem
from gradflow.results.trajectory import Trajectory
from gradflow.simulation.to_dataset import axes_of, coordinates_of

AT_ONCE = 2**22
"""Numbers of weights that are looked at together."""

_computed: WeakKeyDictionary[Trajectory, dict[str, xr.DataArray]] = WeakKeyDictionary()
"""What was computed lately: a run is asked for its loss floor more than once."""


def recorded_array(trajectory: Trajectory, name: str) -> xr.DataArray:
    """An observable as it was recorded; else, if it is a built-in one, of the stored weights.

    **Raises:** `TypeError` if it is no `Trajectory`; `Unmeasured` if it was not recorded and cannot
    be computed; `ValueError` if theory does not have it for this dynamics.
    """
    Trajectory.check("trajectory", trajectory)
    dataset = trajectory.to_xarray()
    if name in dataset.data_vars:
        return dataset[name]
    if name not in BUILT_IN or "W1" not in dataset:
        names = sorted(str(variable) for variable in dataset.data_vars)
        instead = ", or store_weights=True to compute it afterwards" if name in BUILT_IN else ""
        raise Unmeasured(
            f"observable {name!r} was not recorded (recorded: {', '.join(names)})",
            python=f"add {name!r} to observables= of simulate{instead}",
            spec=f'add "{name}" to the observables of the run',
        )
    found = _computed.setdefault(trajectory, {})
    if name not in found:
        found[name] = _of_weights(trajectory, BUILT_IN[name])
    return found[name]


def _of_weights(trajectory: Trajectory, observable: Observable) -> xr.DataArray:
    """An observable of every stored network; of a replica that has diverged they are NaN."""
    layers = trajectory.weights
    lead = layers[0].shape[:-2]
    flat = tuple(jnp.moveaxis(jnp.asarray(w.reshape(-1, *w.shape[-2:])), 0, -1) for w in layers)
    together = max(AT_ONCE // sum(w[..., 0].size for w in layers), 1)
    values = np.asarray(
        _observed(observable, flat, trajectory.problem, trajectory.dynamics, together)
    )
    values = np.moveaxis(values, -1, 0)
    own = axes_of(observable, values.ndim - 1, len(layers))
    dims = ("time",) if trajectory.replicas is None else ("replica", "time")
    return xr.DataArray(
        values.reshape(*lead, *values.shape[1:]),
        dims=(*dims, *own),
        coords=coordinates_of(own, len(layers)),
        attrs={"long_name": observable.long_name, "units": observable.units},
    )


@compiled
def _observed(
    observable: Observable,
    weights: Weights,
    problem: Problem,
    dynamics: AbstractDynamics,
    together: int,
) -> Array:
    """The values of all paths, path axis last, some paths at a time."""

    def of_group(some: Weights) -> Array:
        return observe([observable], some, problem, dynamics)[observable.name]

    return in_groups(of_group, weights, together)
