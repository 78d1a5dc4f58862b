"""Statistics without paths against statistics of the paths."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import xarray as xr

import gradflow as gf
from gradflow.backend import memory
from gradflow.results.ensemble_statistics import EnsembleStatistics

NET = gf.DeepLinear([[[0.5, 0.2], [0.1, -0.4], [0.3, 0.3]], [[0.2, 0.6, -0.1]]])
NAMES = ["loss", "squared_norms", "end_to_end"]
QUANTILES = [0.1, 0.5, 0.9]


def run(net: Any = NET, dynamics: Any = None, **options: Any) -> Any:
    problem = gf.Problem(gf.Regression.whitened([[1.0, 2.0]]), [gf.LabelNoise(0.5)])
    chosen = {"steps": 60, "save": 4, "replicas": 101, "key": jax.random.key(2)} | options
    dynamics = gf.GradientDescent(0.1) if dynamics is None else dynamics
    return gf.simulate(problem, net, dynamics, observables=NAMES, **chosen)


def statistics(**options: Any) -> EnsembleStatistics:
    return run(keep="statistics", quantiles=QUANTILES, **options)


@pytest.fixture(scope="module")
def paths() -> gf.Trajectory:
    return run()


@pytest.fixture(scope="module")
def found() -> EnsembleStatistics:
    return statistics()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 101, 40, 1])
def test_statistics_are_those_of_the_paths(chunk: int | None, paths: gf.Trajectory):
    found = statistics(chunk=chunk)
    assert found.replicas == 101
    for name in NAMES:
        values = paths[name]
        for get, expected in (
            (found.mean, values.mean(axis=0)),
            (found.variance, values.var(axis=0, ddof=1)),
            (found.standard_error, values.std(axis=0, ddof=1) / np.sqrt(101)),
            (found.minimum, values.min(axis=0)),
            (found.maximum, values.max(axis=0)),
            (found.quantiles, np.moveaxis(np.quantile(values, QUANTILES, axis=0), 0, 1)),
        ):
            np.testing.assert_allclose(get(name), expected, rtol=1e-10, atol=1e-14)
    last = np.column_stack([paths["loss"][:, -1], paths["squared_norms"][:, -1]])
    expected = np.cov(last.T)
    np.testing.assert_allclose(found.covariance("loss", "loss")[-1], expected[0, 0], rtol=1e-10)
    both = found.covariance("squared_norms[1]", "loss")
    np.testing.assert_allclose(both[-1], expected[2, 0], rtol=1e-10)


def test_the_data_set_is_labelled(found: EnsembleStatistics):
    data = found.to_xarray()
    assert data["loss_mean"].dims == ("time",)
    assert data["squared_norms_variance"].dims == ("time", "layer")
    assert data["end_to_end_quantiles"].dims == ("time", "quantile", "width_2", "width_0")
    assert data["covariance"].dims == ("time", "entry", "other_entry")
    assert data["entry"].values.tolist() == ["loss", "squared_norms[0]", "squared_norms[1]"]
    assert data["quantile"].values.tolist() == QUANTILES
    assert data["layer"].values.tolist() == [1, 2]
    assert data["loss_variance"].attrs == {"long_name": "variance of loss L", "units": "(loss)^2"}
    assert data["step"].values.tolist() == [0, 20, 40, 60]
    assert found.observables == tuple(NAMES)
    assert repr(found) == (
        "EnsembleStatistics(GradientDescent, 4 times to t = 6, 101 replicas; "
        "loss, squared_norms, end_to_end)"
    )


def test_what_is_not_there(found: EnsembleStatistics):
    with pytest.raises(KeyError, match="'sharpness' was not recorded; there are loss, squared"):
        found.mean("sharpness")
    with pytest.raises(KeyError, match=r"'end_to_end' has no covariance here; .* \['loss'"):
        found.covariance("loss", "end_to_end")


def test_diverged_paths_are_counted_and_left_out():
    nets = [gf.DeepLinear([s * w for w in NET.weights]) for s in (1.0, 30.0, 1.1, 1.2)]
    with pytest.warns(gf.DivergedWarning) as said:
        found = statistics(net=nets, replicas=None, chunk=3)
        paths = run(net=nets, replicas=None)
    first, second = (str(w.message) for w in said)
    assert first == second  # the start is that of the path that was lost
    assert "1 of 4 diverged" in repr(found)
    assert found.diverged.tolist() == [0, 1, 1, 1]
    assert found.count.tolist() == [4, 3, 3, 3]
    assert found.replicas == 4
    kept = paths["loss"][[0, 2, 3]]
    np.testing.assert_allclose(found.mean("loss")[1:], kept.mean(axis=0)[1:], rtol=1e-10)
    np.testing.assert_allclose(found.mean("loss")[0], paths["loss"][:, 0].mean(), rtol=1e-12)


@pytest.mark.slow
def test_flows_from_many_starts():
    nets = [gf.DeepLinear([s * w for w in NET.weights]) for s in (1.0, 1.1, 1.2)]
    options = {"net": nets, "dynamics": gf.GradientFlow(), "steps": None, "t1": 2.0}
    found = statistics(**options, replicas=None)
    expected = run(**options, replicas=None)["loss"].mean(axis=0)
    np.testing.assert_allclose(found.mean("loss"), expected, rtol=1e-10)
    assert found.step is None


@pytest.mark.slow
def test_a_file_brings_everything_back(found: EnsembleStatistics, tmp_path: Path):
    path = found.save(tmp_path / "run.nc")
    loaded = EnsembleStatistics.load(path)
    xr.testing.assert_identical(found.to_xarray(), loaded.to_xarray())
    again = gf.repeat(loaded)
    for name in ("loss_mean", "covariance", "end_to_end_quantiles", "count"):
        np.testing.assert_array_equal(again.to_xarray()[name], found.to_xarray()[name])
    with pytest.raises(ValueError, match="not a gradflow trajectory of format 1"):
        gf.Trajectory.load(path)
    with pytest.raises(ValueError, match="not a gradflow ensemble of statistics of format 1"):
        EnsembleStatistics.load(run(replicas=2).save(tmp_path / "paths.nc"))


@pytest.mark.slow
def test_an_interrupted_run_counts_what_was_done():
    def stop(done: float, total: float, message: str) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="of 101 replicas; what was done is returned"):
        part = statistics(chunk=40, progress=stop)
    assert part.interrupted
    assert 40 <= part.replicas < 101


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "statistics", "store_weights": True}, "store_weights=True keeps the weights"),
        ({"keep": "statistics", "quantiles": [0.5, 1.5]}, "quantiles must lie .* got 1.5"),
    ],
)
def test_refuses_what_makes_no_sense(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_paths_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gradflow.results.recording.host_memory", lambda: 10_000)
    with pytest.raises(MemoryError, match=r'replicas=101: .* at 4 times .* keep="statistics"'):
        run()
    assert statistics().replicas == 101
    assert memory.host_memory() > 10_000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_paths():
    """The data of 10 times as many paths, 300 MB, are never held."""
    program = """
        import resource, sys, jax, gradflow as gf
        problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)])
        net = gf.DeepLinear([[[2.0]], [[0.1]]])
        def peak(replicas):
            run = gf.simulate(problem, net, gf.GradientDescent(0.05), steps=40, save=41,
                              replicas=replicas, key=jax.random.key(0), keep="statistics",
                              observables=["loss", "imbalance"], chunk=20_000)
            assert run.replicas == replicas
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        first = peak(40_000)
        print(peak(400_000) - first)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50.0
