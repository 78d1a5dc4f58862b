"""A small study with every piece a report reads, made without integrating anything.

Scalar network of depth 2 with target 1 from w = (2, 0.1): the paths are chosen, not simulated. A
path first runs along w1^2 - w2^2 = u0 to the minima and then along them, u(t) = u0 exp(-rate t).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import gradflow as gf
from gradflow.analysis.phases import Phases
from gradflow.analysis.prediction.predict import Prediction
from gradflow.analysis.rates import Rate
from gradflow.results.trajectory import Trajectory
from gradflow.study.results import ClaimResult, RunResult, StudyResult
from gradflow.study.spec.spec import StudySpec

SPEC: dict[str, Any] = {
    "name": "small",
    "title": "Two phases",
    "description": "A scalar network of depth 2.",
    "seed": 7,
    "data": {"source": "whitened", "target": [[1.0]]},
    "network": {"init": "weights", "weights": [[[2.0]], [[0.1]]]},
    "run": [
        {
            "name": "flow",
            "label": "Gradient flow",
            "group": "none",
            "dynamics": {"kind": "GradientFlow"},
            "t1": 100.0,
        },
        {
            "name": "sgd",
            "label": "Label noise, SGD",
            "group": "label noise",
            "dynamics": {"kind": "GradientDescent", "step_size": 0.05},
            "regularizers": [{"kind": "LabelNoise", "std": 0.5}],
            "replicas": 16,
            "t1": 100.0,
        },
        {
            "name": "sde",
            "label": "Label noise, SDE",
            "group": "label noise",
            "dynamics": {"kind": "StochasticFlow", "step_size": 0.05},
            "regularizers": [{"kind": "LabelNoise", "std": 0.5}],
            "replicas": 16,
            "t1": 100.0,
        },
        {
            "name": "decay",
            "label": "Weight decay, flow",
            "group": "weight decay",
            "dynamics": {"kind": "GradientFlow"},
            "regularizers": [{"kind": "WeightDecay", "rate": 0.01}],
            "t1": 100.0,
        },
    ],
}

# Runs are made by the first word of their names: sgd_2 is like sgd.
RATES = {"flow": 0.0, "sgd": 0.0125, "sde": 0.0125, "slow": 0.0125, "decay": 0.02}
REGULARIZERS = {
    "flow": [],
    "sgd": [gf.LabelNoise(std=0.5)],
    "sde": [gf.LabelNoise(std=0.5)],
    "slow": [gf.LabelNoise(std=0.5)],
    "decay": [gf.WeightDecay(0.01)],
}


def paths(name: str, replicas: int | None, rng: np.random.Generator) -> xr.Dataset:
    """The two weights and the observables of one run."""
    time = np.concatenate([[0.0], np.geomspace(0.05, 100.0, 40)])
    count, kind = replicas or 1, name.partition("_")[0]
    u = 3.99 * np.exp(-RATES[kind] * time) * np.ones((count, 1))
    p = 1.0 - 0.8 * np.exp(-4.5 * time) + (0.1 if replicas else 0.0) * rng.normal(size=(count, 41))
    root = np.sqrt(u**2 + 4 * p**2)
    w1, w2 = np.sqrt((root + u) / 2), np.sign(p) * np.sqrt((root - u) / 2)
    dims = ("replica", "time") if replicas else ("time",)

    def variable(values: np.ndarray, long_name: str, units: str, *more: str) -> tuple:
        kept = values if replicas else values[0]
        return (*dims, *more), kept, {"long_name": long_name, "units": units}

    variables = {
        "excess_loss": variable(0.5 * (p - 1) ** 2, "excess loss", "loss"),
        "imbalance": variable(np.abs(w1**2 - w2**2), "imbalance D(W)", "weight^2"),
        "squared_norms": variable(
            np.stack([w1**2, w2**2], -1), "squared norms", "weight^2", "layer"
        ),
        "W1": variable(w1[..., None, None], "weights of layer 1", "weight", "width_1", "width_0"),
        "W2": variable(w2[..., None, None], "weights of layer 2", "weight", "width_2", "width_1"),
        "diverged_at": (dims[:-1], np.full(count, np.nan) if replicas else np.float64(np.nan)),
    }
    if name != "flow":
        variables["loss_floor"] = variable(np.full_like(p, 5e-3), "loss floor", "loss")
    dataset = xr.Dataset(variables, {"time": ("time", time, {"units": "flow time"})})
    dataset["time"].attrs["long_name"] = "flow time t"
    dataset.attrs = {
        "depth": 2,
        "widths": "[1, 1, 1]",
        "status": "complete",
        "dtype": "float64",
        "device": "cpu",
        "wall_time_s": 1.5,
        "versions": json.dumps({"gradflow": "0.1.0", "jax": "0.10"}),
    }
    return dataset


def run_result(spec: StudySpec, index: int, dataset: xr.Dataset) -> RunResult:
    """One run with phases, rate and prediction; plain gradient flow has a reason instead."""
    run = spec.run[index]
    net = gf.DeepLinear([np.array([[2.0]]), np.array([[0.1]])])
    kind = run.name.partition("_")[0]
    problem = gf.Problem(gf.Regression.whitened(target=[[1.0]]), REGULARIZERS[kind])
    trajectory = Trajectory(dataset, problem, run.dynamics.made, [net])
    expected, nan = RATES[kind], float("nan")
    window = (2.0, 100.0)
    noisy = run.replicas is not None
    rate = None
    if expected:
        error = 1e-4 if noisy else nan
        rate = Rate(
            value=1.01 * expected,
            standard_error=error,
            low=1.01 * expected - 2 * error,
            high=1.01 * expected + 2 * error,
            confidence=0.95,
            kind="exponential",
            observable="imbalance",
            window=window,
            replicas=run.replicas or 1,
            diverged=0,
            points=20,
            independent=run.replicas or 1,
            per_replica=np.full(run.replicas or 1, expected),
        )
    phases = Phases(
        optimization_end=1.5 if expected else nan,
        standard_error=0.03 if noisy else nan,
        low=1.44,
        high=1.56,
        criterion="excess loss <= (1 + eps) floor",
        eps=0.1,
        floor=5e-3,
        optimization_rate=4.5,
        optimization_rate_error=0.2 if noisy else nan,
        optimization_rate_window=(0.1, 1.0),
        regularization_rate=rate,
        separation=4.5 / expected if expected else nan,
        separation_error=10.0 if noisy else nan,
        replicas=run.replicas or 1,
        diverged=0,
        reason="" if expected else "no regularization phase: the loss floor is 0",
    )
    prediction = Prediction(
        optimization_rate=4.47,
        optimization_end=1.6 if expected else nan,
        loss_floor=5e-3,
        imbalance_rate=expected or nan,
        imbalance_drift=nan,
        leading_rate=0.8 * expected or nan,
        sharpness=0.21 if kind in ("sgd", "sde") else nan,
        separation=4.47 / expected if expected else nan,
        eps=0.1,
        limit=net,
    )
    known = None if kind == "slow" else phases  # a slow flow has but one phase
    return RunResult(run.name, run.title, run.group, trajectory, known, rate, prediction, spec=run)


CLAIMS = (
    ClaimResult(
        "Label noise removes the imbalance", "rate", ("sgd",), 0.01253, 0.00012, 0.0125,
        "within 3 standard errors", "holds", "off by 3e-05",
    ),
    ClaimResult(
        "Gradient flow keeps it", "max_change", ("flow",), 1e-12, None, None,
        "at most 1e-09", "holds",
    ),
    ClaimResult(
        "The SDE is twice as slow", "predicted_ratio", ("sde",), 1.01, 0.2, 0.5,
        "within 10%", "undecided", "too few replicas",
    ),
    ClaimResult(
        "SGD and SDE agree", "agreement", ("sgd", "sde"), 0.02, None, "agree",
        'verdict "agree"', "holds",
    ),
    ClaimResult(
        "Everything fails", "final", ("decay",), float("nan"), None, 1.0, "within 1%", "fails",
        "not measured",
    ),
)  # fmt: skip

MakeStudy = Callable[..., StudyResult]


@pytest.fixture
def make_study(tmp_path: Path) -> MakeStudy:
    """Builds the study with the given figures.

    ``diverged`` maps runs to how many of their replicas diverge at t = 10;
    ``change(name, dataset)`` may spoil a run in any other way.
    """

    def make(
        *figures: dict[str, Any],
        change: Callable[[str, xr.Dataset], xr.Dataset] = lambda _, dataset: dataset,
        diverged: Mapping[str, int] | None = None,
        claims: tuple[ClaimResult, ...] = CLAIMS,
        **fields: Any,
    ) -> StudyResult:
        spec = StudySpec.model_validate(SPEC | fields | {"figure": list(figures)})
        rng = np.random.default_rng(0)
        runs = {}
        for index, run in enumerate(spec.run):
            dataset = paths(run.name, run.replicas, rng)
            diverge(dataset, (diverged or {}).get(run.name, 0))
            runs[run.name] = run_result(spec, index, change(run.name, dataset))
        return StudyResult(spec, runs, claims, tmp_path / "out", 12.3)

    return make


def diverge(dataset: xr.Dataset, count: int) -> None:
    """Lets the first replicas of a run diverge at t = 10; values are NaN from then on."""
    late = np.flatnonzero(dataset["time"].values > 10.0)
    for variable in dataset.data_vars.values():
        if "replica" in dataset.dims:
            if variable.name == "diverged_at":
                variable[:count] = 10.0
            else:
                variable[:count, late] = np.nan
        elif count:
            if variable.name == "diverged_at":
                variable[...] = 10.0
            else:
                variable[late] = np.nan
