"""Specs as text and runs with values of our own, for the tests of studies."""

import numpy as np
import xarray as xr

import gradflow as gf
from gradflow.results.trajectory import Trajectory
from gradflow.study.results import RunResult
from gradflow.study.spec.run_tables import RunSpec

HEAD = """\
name = "test"
[data]
source = "whitened"
target = [[1.0]]
[network]
init = "weights"
weights = [[[2.0]], [[0.1]]]
"""

RUN = """\
[[run]]
name = "flow"
dynamics = { kind = "GradientFlow" }
t1 = 1.0
"""


def make_run(
    name: str = "run",
    *,
    time: np.ndarray | None = None,
    replicas: int | None = None,
    dynamics: dict | None = None,
    regularizers: list | None = None,
    diverged: np.ndarray | None = None,
    step: np.ndarray | None = None,
    interrupted: bool = False,
    weights: list[np.ndarray] | None = None,
    problem: gf.Problem | None = None,
    **observables: np.ndarray,
) -> RunResult:
    """A run with given values: observables with leading axes ([replica,] time)."""
    time = np.linspace(0.0, 1.0, 11) if time is None else time
    lead = ("time",) if replicas is None else ("replica", "time")
    variables = {}
    for key, values in observables.items():
        extra = tuple(f"{key}_{axis}" for axis in range(values.ndim - len(lead)))
        variables[key] = ((*lead, *extra), values)
    layers = [np.full((1, 1), 1.0), np.full((1, 1), 1.0)]
    for i, layer in enumerate(weights or ()):
        variables[f"W{i + 1}"] = ((*lead, f"width_{i + 1}", f"width_{i}"), layer)
    gone = np.full((replicas or 1,), np.nan)
    if diverged is not None:
        gone[diverged] = time[-1]
    variables["diverged_at"] = ((), gone[0]) if replicas is None else (("replica",), gone)
    dataset = xr.Dataset(variables, {"time": time})
    if step is not None:
        dataset = dataset.assign_coords(step=("time", step))
    depth = len(weights) if weights else len(layers)
    dataset.attrs = {"status": "interrupted" if interrupted else "complete", "depth": depth}
    if problem is None:
        problem = gf.Problem(gf.Regression.whitened([[1.0]]))
    table = {"name": name, "t1": 1.0, "dynamics": dynamics or {"kind": "GradientFlow"}}
    spec = RunSpec.model_validate({**table, "regularizers": regularizers or []})
    trajectory = Trajectory(dataset, problem, spec.dynamics.made, [gf.DeepLinear(layers)])
    return RunResult(name, spec.title, "", trajectory, spec=spec)
