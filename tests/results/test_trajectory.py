"""What a run leaves, in memory and on disk."""

import json
from pathlib import Path
from typing import Any

import diffrax
import h5py
import jax
import numpy as np
import pytest
import xarray as xr

import gradflow as gf
from gradflow.backend.types import Scalar, Weights
from gradflow.regularizers import AbstractPenalty

KEY = jax.random.key(9)
NET = gf.DeepLinear([[[0.5, 0.2], [0.1, -0.4], [0.3, 0.3]], [[0.2, 0.6, -0.1]]])
NAMES = ["loss", "squared_norms", "balancedness_trace", "end_to_end"]


def samples() -> gf.Regression:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 2)), rng.normal(size=6)
    return gf.Regression.from_samples(x, y, name="six rows", input_names=["a", "b"])


def noisy_run(**options: Any) -> gf.Trajectory:
    problem = gf.Problem(
        samples(), [gf.LabelNoise(0.1), gf.Minibatch(2, replacement=True), gf.WeightDecay(1 / 3)]
    )
    chosen = {"steps": 40, "replicas": 3, "key": KEY, "save": 5, "observables": NAMES} | options
    return gf.simulate(problem, NET, gf.GradientDescent(0.1, 0.3), **chosen)


def flow_run(**options: Any) -> gf.Trajectory:
    dynamics = gf.GradientFlow(rtol=1e-7, atol=1e-9, solver=diffrax.Tsit5())
    return gf.simulate(gf.Problem(samples()), NET, dynamics, **{"t1": 2.0, "save": 5} | options)


def sde_run(**options: Any) -> gf.Trajectory:
    problem = gf.Problem(gf.Regression.whitened([[1.0, 2.0]], n=4), [gf.InputNoise(0.2)])
    nets = [NET, gf.DeepLinear([2.0 * w for w in NET.weights])]
    dynamics = gf.StochasticFlow(0.05, substeps=3)
    return gf.simulate(problem, nets, dynamics, **{"t1": 1.0, "save": 4, "key": KEY} | options)


RUNS = [noisy_run, flow_run, sde_run]
every_kind = pytest.mark.parametrize("make", RUNS, ids=lambda f: f.__name__)


def assert_identical(first: gf.Trajectory, second: gf.Trajectory) -> None:
    """All arrays, coordinates and attributes but the wall time."""
    one, other = first.to_xarray().copy(), second.to_xarray().copy()
    one.attrs = {k: v for k, v in one.attrs.items() if k != "wall_time_s"}
    other.attrs = {k: v for k, v in other.attrs.items() if k != "wall_time_s"}
    xr.testing.assert_identical(one, other)
    for name in one.variables:
        assert one[name].dtype == other[name].dtype


# In memory


@pytest.mark.slow
def test_dimensions_coordinates_and_units():
    run = noisy_run()
    data = run.to_xarray()
    assert dict(data.sizes) == {
        "replica": 3,
        "time": 5,
        "layer": 2,
        "pair": 1,
        "width_0": 2,
        "width_1": 3,
        "width_2": 1,
    }
    assert data["loss"].dims == ("replica", "time")
    assert data["squared_norms"].dims == ("replica", "time", "layer")
    assert data["balancedness_trace"].dims == ("replica", "time", "pair")
    assert data["end_to_end"].dims == ("replica", "time", "width_2", "width_0")
    assert data["W1"].dims == ("replica", "time", "width_1", "width_0")
    assert data["W2"].dims == ("replica", "time", "width_2", "width_1")
    assert data["diverged_at"].dims == ("replica",)
    assert data["time"].attrs == {"units": "flow time", "long_name": "flow time t"}
    assert data["step"].attrs["long_name"] == "steps"
    assert data["layer"].values.tolist() == [1, 2]
    assert data["replica"].values.tolist() == [0, 1, 2]
    for name in data.data_vars:
        assert data[name].attrs["long_name"]
        assert data[name].attrs["units"]
    np.testing.assert_allclose(data["time"], [0.0, 1.0, 2.0, 3.0, 4.0], rtol=1e-14)
    assert data["step"].values.tolist() == [0, 10, 20, 30, 40]


@pytest.mark.slow
def test_reading_it():
    run = noisy_run()
    assert run.replicas == 3
    assert run.diverged.tolist() == [False] * 3
    assert not run.interrupted
    assert run.step is not None and run.step.tolist() == [0, 10, 20, 30, 40]
    np.testing.assert_array_equal(run.time, run.to_xarray()["time"])
    np.testing.assert_array_equal(run["loss"], run.to_xarray()["loss"])
    assert [w.shape for w in run.weights] == [(3, 5, 3, 2), (3, 5, 1, 3)]
    net = run.network(-1, replica=1)
    np.testing.assert_array_equal(net.weights[0], run["W1"][1, -1])
    product = run["W2"][1, -1] @ run["W1"][1, -1]
    np.testing.assert_allclose(run["end_to_end"][1, -1], product, rtol=1e-12)
    assert "loss" in run
    assert "sharpness" not in run
    assert repr(run) == (
        "Trajectory(GradientDescent, 5 times to t = 4, 3 replicas; loss, squared_norms, "
        "balancedness_trace, end_to_end, diverged_at)"
    )


@pytest.mark.slow
def test_a_single_path_has_no_replica_axis():
    run = flow_run()
    assert run.replicas is None
    assert run.step is None
    assert run["loss"].shape == (5,)
    assert run.diverged.shape == ()
    assert [w.shape for w in run.weights] == [(5, 3, 2), (5, 1, 3)]
    np.testing.assert_array_equal(run.network(2).weights[1], run["W2"][2])
    assert "replica" not in run.to_xarray().dims


def test_reading_what_is_not_there():
    run = noisy_run(store_weights=False, observables=["loss"])
    with pytest.raises(KeyError, match=r"'sharpness' was not recorded; .* has loss, diverged_at"):
        run["sharpness"]
    with pytest.raises(ValueError, match=r"weights were not stored .* store_weights=True"):
        _ = run.weights
    with pytest.raises(ValueError, match=r"has 3 replicas; choose one, e.g. network"):
        run.network(-1)


def test_a_trajectory_tells_how_it_was_made():
    attrs = noisy_run().attrs
    assert attrs["depth"] == 2
    assert json.loads(attrs["widths"]) == [2, 3, 1]
    settings = json.loads(attrs["settings"])
    given = {"kind": "GradientDescent", "step_size": 0.1, "momentum": 0.3}
    assert given.items() <= settings["dynamics"].items()
    assert settings["regularizers"] == [
        {"kind": "LabelNoise", "std": 0.1},
        {"kind": "Minibatch", "batch_size": 2, "replacement": True, "reshuffled": False},
        {"kind": "WeightDecay", "rate": 1 / 3},
    ]
    assert json.loads(attrs["key"]) == [0, 9]
    assert json.loads(attrs["observables"]) == NAMES
    assert attrs["status"] == "complete"
    assert attrs["dtype"] == "float64"
    assert 0.0 < attrs["wall_time_s"] < 600.0
    versions = json.loads(attrs["versions"])
    assert versions["jax"] == jax.__version__
    assert versions["diffrax"] == diffrax.__version__
    assert set(versions) == {"gradflow", "jax", "diffrax", "equinox", "numpy"}
    assert json.loads(flow_run().attrs["key"]) is None


# Repeating


@pytest.mark.few_cases(2)
@every_kind
def test_repeating_gives_the_same_bits(make: Any):
    run = make()
    assert_identical(run, gf.repeat(run))


def test_repeating_a_run_in_chunks_and_with_uneven_times():
    run = noisy_run(chunk=2, save=[0.1, 0.7, 1.3], store_weights=False)
    assert_identical(run, gf.repeat(run))


# On disk


@pytest.mark.few_cases(2)
@every_kind
def test_a_file_brings_back_every_bit(make: Any, tmp_path: Path):
    run = make()
    path = run.save(tmp_path / "new folder" / "run.nc")
    loaded = gf.Trajectory.load(path)
    xr.testing.assert_identical(run.to_xarray(), loaded.to_xarray())
    assert_identical(run, loaded)
    assert jax.tree.all(jax.tree.map(np.array_equal, run.problem, loaded.problem))
    assert jax.tree.structure(run.problem) == jax.tree.structure(loaded.problem)
    assert jax.tree.structure(run.dynamics) == jax.tree.structure(loaded.dynamics)
    assert loaded.problem.data.input_names == run.problem.data.input_names
    assert len(loaded.start) == len(run.start)
    for net, original in zip(loaded.start, run.start, strict=True):
        for w, v in zip(net.weights, original.weights, strict=True):
            np.testing.assert_array_equal(w, v)
    if run.key is not None:
        assert loaded.key is not None
        np.testing.assert_array_equal(*map(jax.random.key_data, (run.key, loaded.key)))
    assert_identical(run, gf.repeat(loaded))


def test_a_file_brings_back_divergence_and_interruption(tmp_path: Path):
    problem = gf.Problem(gf.Regression.whitened([[1.0]]))
    nets = [gf.DeepLinear([[[w]], [[w]]]) for w in (1.0, 20.0)]
    with pytest.warns(gf.DivergedWarning):
        run = gf.simulate(problem, nets, gf.GradientDescent(0.1), steps=20, save=3)
    assert run.diverged.tolist() == [False, True]
    loaded = gf.Trajectory.load(run.save(tmp_path / "run.nc"))
    assert loaded.diverged.tolist() == [False, True]
    assert_identical(run, loaded)


def test_a_file_of_one_layer(tmp_path: Path):
    """Nothing is balanced at depth 1: arrays of length zero survive."""
    problem = gf.Problem(gf.Regression.whitened([[1.0, 2.0]]))
    net = gf.DeepLinear([[[0.5, 0.5]]])
    run = gf.simulate(problem, net, gf.GradientDescent(0.1), steps=3, save=2, observables=NAMES)
    assert run["balancedness_trace"].shape == (2, 0)
    assert_identical(run, gf.Trajectory.load(run.save(tmp_path / "run.nc")))


def test_a_file_can_be_read_without_gradflow(tmp_path: Path):
    run = noisy_run()
    path = run.save(tmp_path / "run.nc")
    with xr.open_dataset(path, engine="h5netcdf") as data:
        np.testing.assert_array_equal(data["loss"], run["loss"])
        np.testing.assert_array_equal(data["data_x"], run.problem.data.x)
    with h5py.File(path) as raw:
        np.testing.assert_array_equal(raw["W1"], run["W1"])


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, path = noisy_run(), tmp_path / "run.nc"

    def fail(self: xr.Dataset, target: str, **options: Any) -> None:
        Path(target).write_bytes(b"half of")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(xr.Dataset, "to_netcdf", fail)
        with pytest.raises(KeyboardInterrupt):
            run.save(path)
    assert list(tmp_path.iterdir()) == []
    run.save(path)
    before = path.read_bytes()
    other = flow_run()
    with monkeypatch.context() as patched:
        patched.setattr(xr.Dataset, "to_netcdf", fail)
        with pytest.raises(KeyboardInterrupt):
            other.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    other.save(path)
    assert_identical(other, gf.Trajectory.load(path))
    assert path.stat().st_mode & 0o777 == 0o644


def test_loading_what_is_not_a_trajectory(tmp_path: Path):
    missing = tmp_path / "missing.nc"
    with pytest.raises(FileNotFoundError, match=r"path: there is no file .*missing.nc"):
        gf.Trajectory.load(missing)
    text = tmp_path / "text.nc"
    text.write_text("not NetCDF")
    with pytest.raises(ValueError, match=r"text.nc is not a readable NetCDF file"):
        gf.Trajectory.load(text)
    other = tmp_path / "other.nc"
    xr.Dataset({"a": ("t", [1.0])}).to_netcdf(other, engine="h5netcdf")
    with pytest.raises(ValueError, match=r"other.nc is not a gradflow trajectory of format 1"):
        gf.Trajectory.load(other)
    cut = tmp_path / "cut.nc"
    whole = noisy_run().save(tmp_path / "whole.nc").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.nc is not a readable NetCDF file"):
        gf.Trajectory.load(cut)


class Homemade(AbstractPenalty):
    """A regularizer that does not ship with gradflow."""

    @property
    def is_stochastic(self) -> bool:
        return False

    def penalty(self, weights: Weights) -> Scalar:
        return 0.0 * weights[0].sum()

    def penalty_gradient(self, weights: Weights) -> Weights:
        return tuple(0.0 * w for w in weights)


@pytest.mark.parametrize(
    ("regularizers", "dynamics", "name"),
    [
        ([Homemade()], gf.GradientDescent(0.1), "Homemade"),
        ([], gf.GradientFlow(solver=diffrax.Tsit5(scan_kind="lax")), "GradientFlow"),
    ],
    ids=["regularizer", "solver options"],
)
def test_saving_what_a_file_could_not_bring_back(
    regularizers: list, dynamics: gf.AbstractDynamics, name: str, tmp_path: Path
):
    run = gf.simulate(gf.Problem(samples(), regularizers), NET, dynamics, t1=0.2, save=2)
    with pytest.raises(ValueError, match=rf"{name}: a file holds only .*to_xarray\(\).to_netcdf"):
        run.save(tmp_path / "run.nc")
    assert list(tmp_path.iterdir()) == []
    run.to_xarray().to_netcdf(tmp_path / "run.nc", engine="h5netcdf")


def test_iterating_gives_the_names_that_it_takes():
    problem, net = gf.Problem(gf.Regression.whitened([[1.0]])), gf.DeepLinear([[[2.0]], [[0.1]]])
    run = gf.simulate(problem, net, gf.GradientDescent(0.1), steps=2, save=2)
    names = list(run)
    assert {"loss", "imbalance", "W1", "W2"} <= set(names) and all(name in run for name in names)
    assert all(run[name].shape[0] == 2 for name in ("loss", "imbalance"))


def test_what_is_no_run_is_named():
    with pytest.raises(TypeError, match=r"^trajectory must be a Trajectory.*got 'x\.nc'"):
        gf.Trajectory.check("trajectory", "x.nc")
    with pytest.raises(TypeError, match=r"^trajectory must be .*got 'x\.nc'"):
        gf.repeat.__wrapped__("x.nc")


def test_a_mistyped_folder_is_not_made(tmp_path: Path):
    run = flow_run()
    assert run.save(tmp_path / "new" / "run.nc").is_file()
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/nope to make deep in"):
        run.save(tmp_path / "nope" / "deep" / "run.nc")
    assert not (tmp_path / "nope").exists()
