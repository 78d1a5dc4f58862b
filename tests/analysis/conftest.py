"""Trajectories with values of our own choosing, so that the right answer is known exactly."""

import numpy as np
import pytest
import xarray as xr

import gradflow as gf

NET = gf.DeepLinear([np.array([[2.0]]), np.array([[0.1]])])
DATA = gf.Regression.whitened(target=[[1.0]])
PROBLEM = gf.Problem(DATA, [gf.LabelNoise(0.5)])
SGD = gf.GradientDescent(0.01)


def build(time, variables, regularizers=None, dynamics=SGD, diverged=None, dims=()):
    """A trajectory of SGD with label noise (or of what is given) that recorded `variables`.

    Values are `(replica, time, ...)` or `(time, ...)`; replicas marked as diverged become NaN.
    """
    time = np.asarray(time, dtype=float)
    values = {name: np.asarray(v) for name, v in variables.items()}
    ensemble = next(iter(values.values())).ndim - len(dims) == 2
    lead = ("replica", "time") if ensemble else ("time",)
    count = next(iter(values.values())).shape[0]
    lost = np.zeros(count if ensemble else (), bool) if diverged is None else np.asarray(diverged)
    for name, v in values.items():
        if lost.any():
            values[name] = np.where(lost.reshape(-1, *[1] * (v.ndim - 1)), np.nan, v)
    data = {
        name: ((*lead, *dims), v, {"units": "weight^2", "long_name": name})
        for name, v in values.items()
    }
    data["diverged_at"] = (lead[:-1], np.where(lost, time[-1], np.nan))
    coords = {"time": ("time", time)}
    if "layer" in dims:
        coords["layer"] = ("layer", np.arange(1, next(iter(values.values())).shape[-1] + 1))
    problem = PROBLEM if regularizers is None else gf.Problem(DATA, regularizers)
    return gf.Trajectory(xr.Dataset(data, coords), problem, dynamics, [NET])


@pytest.fixture
def make_run():
    """The function that builds a trajectory."""
    return build
