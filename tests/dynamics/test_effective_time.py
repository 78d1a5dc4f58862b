"""The clock of runs with momentum."""

import functools

import jax
import numpy as np
import optax
import pytest

import gradflow as gf
from gradflow.dynamics.effective_time import differ_in_momentum, momentum_of

PROBLEM = gf.Problem(gf.Regression.whitened([[1.0]]))
NET = gf.DeepLinear([np.array([[2.0]]), np.array([[0.1]])])


@pytest.mark.parametrize(
    ("dynamics", "momentum"),
    [
        (gf.GradientDescent(0.1), 0.0),
        (gf.GradientDescent(0.1, 0.9), 0.9),
        (gf.GradientDescent(0.1, 0.8, nesterov=True), 0.8),
        (gf.GradientDescent(0.1, optimizer=gf.FromOptax("sgd", momentum=0.7)), 0.7),
        (gf.GradientDescent(0.1, optimizer=functools.partial(optax.sgd, momentum=0.6)), 0.6),
        (gf.GradientDescent(0.1, optimizer=gf.FromOptax("sgd")), 0.0),
        (gf.GradientDescent(0.1, optimizer=optax.sgd), 0.0),
        (gf.GradientDescent(0.1, optimizer=gf.FromOptax("adam")), 0.0),
        (gf.HeavyBallFlow(0.1, 0.5), 0.5),
        (gf.SlowFlow(0.1, momentum=0.4), 0.4),
        (gf.SlowFlow(0.1), 0.0),
        (gf.StochasticFlow(0.1), 0.0),
        (gf.GradientFlow(), 0.0),
    ],
)
def test_the_momentum_of_a_dynamics(dynamics, momentum):
    assert momentum_of(dynamics) == pytest.approx(momentum, abs=1e-15)
    assert differ_in_momentum([dynamics, gf.GradientFlow()]) == (momentum > 0.0)


def test_runs_with_momentum_carry_the_coordinate(tmp_path):
    run = gf.simulate(PROBLEM, NET, gf.GradientDescent(0.01, 0.9), steps=20, save=5)
    dataset = run.to_xarray()
    steps = np.array([0, 5, 10, 15, 20])
    np.testing.assert_allclose(dataset["effective_time"], 0.1 * steps, rtol=1e-12)
    np.testing.assert_allclose(dataset["time"], 0.01 * steps, rtol=1e-12)
    assert dataset["effective_time"].dims == ("time",)
    assert dataset["effective_time"].attrs["units"] == "flow time"
    assert "(1 - momentum)" in dataset["effective_time"].attrs["long_name"]
    loaded = gf.Trajectory.load(run.save(tmp_path / "run.nc"))
    np.testing.assert_array_equal(loaded.to_xarray()["effective_time"], dataset["effective_time"])
    np.testing.assert_array_equal(loaded.effective_time, run.effective_time)
    plain = gf.simulate(PROBLEM, NET, gf.GradientDescent(0.01), steps=20, save=5)
    assert "effective_time" not in plain.to_xarray().coords
    np.testing.assert_array_equal(plain.effective_time, plain.time)


@pytest.mark.slow
def test_statistics_and_schedules_carry_it_too():
    problem = gf.Problem(PROBLEM.data, [gf.LabelNoise(0.5)])
    halved = gf.FromOptax("exponential_decay", init_value=0.1, transition_steps=1, decay_rate=0.5)
    run = gf.simulate(
        problem,
        NET,
        gf.GradientDescent(halved, 0.5),
        steps=3,
        save=4,
        replicas=4,
        key=jax.random.key(0),
        keep="statistics",
    )
    expected = 2 * 0.1 * np.array([0.0, 1.0, 1.5, 1.75])
    np.testing.assert_allclose(run.to_xarray()["effective_time"], expected, rtol=1e-12)


def test_the_name_is_taken():
    with pytest.raises(ValueError, match="'effective_time' is taken by the trajectory"):
        gf.simulate(
            PROBLEM,
            NET,
            gf.GradientDescent(0.1),
            steps=2,
            observables={"effective_time": lambda net, problem: 0.0},
        )
