"""Which times a run saves."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf
import gradflow.simulation.schedule as schedules
from gradflow.simulation.schedule import Schedule, schedule

DESCENT = gf.GradientDescent(0.1)
SDE = gf.StochasticFlow(0.1, substeps=4)
FLOW = gf.GradientFlow()


def plan(dynamics: gf.AbstractDynamics, **options: Any) -> Schedule:
    chosen = {"t1": None, "steps": None, "save": 101, "spacing": "lin"} | options
    return schedule(dynamics, **chosen)


def test_linear_steps_of_a_gridded_dynamics():
    made = plan(DESCENT, steps=10, save=6)
    assert made.step is not None and made.step.tolist() == [0, 2, 4, 6, 8, 10]
    assert made.save_positions.tolist() == [0, 2, 4, 6, 8, 10]
    np.testing.assert_allclose(made.time, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-15)


def test_marks_of_the_stochastic_flow_count_integration_steps():
    made = plan(SDE, t1=1.0, save=3)
    assert made.step is not None and made.step.tolist() == [0, 5, 10]
    assert made.save_positions.tolist() == [0, 20, 40]
    np.testing.assert_allclose(made.time, [0.0, 0.5, 1.0], rtol=1e-15)


def test_flow_time_is_rounded_to_whole_steps():
    assert plan(gf.GradientDescent(0.3), t1=1.0, save=2).save_positions.tolist() == [0, 3]
    assert plan(gf.GradientDescent(0.3), t1=1.1, save=2).save_positions.tolist() == [0, 4]


def test_more_points_than_steps_saves_every_step():
    assert plan(DESCENT, steps=4, save=101).save_positions.tolist() == [0, 1, 2, 3, 4]
    assert plan(DESCENT, steps=4, save=101, spacing="log").save_positions.tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("count", [2, 3, 5, 50])
def test_log_spacing_starts_with_zero_and_one_step_and_reaches_the_end(count: int):
    save_positions = plan(DESCENT, steps=10_000, save=count, spacing="log").save_positions
    assert save_positions[0] == 0
    assert save_positions[-1] == 10_000
    if count > 2:
        assert save_positions[1] == 1
        ratios = save_positions[2:] / save_positions[1:-1]
        assert ratios[-1] == pytest.approx(10_000 ** (1 / (count - 2)), rel=0.02)


@pytest.mark.parametrize("count", [2, 3, 5, 50])
def test_log_spacing_of_a_flow_covers_four_decades(count: int):
    made = plan(FLOW, t1=20.0, save=count, spacing="log")
    assert made.step is None
    assert made.time.size == count
    assert made.time[0] == 0.0
    assert made.time[-1] == 20.0
    if count > 2:
        assert made.time[1] == pytest.approx(2e-3)
        np.testing.assert_allclose(np.diff(np.log(made.time[1:]), 2), 0.0, atol=1e-12)


def test_linear_spacing_of_a_flow():
    made = plan(FLOW, t1=2.0, save=5)
    np.testing.assert_array_equal(made.time, [0.0, 0.5, 1.0, 1.5, 2.0])
    np.testing.assert_array_equal(made.save_positions, made.time)


def test_explicit_times():
    times = [0.25, 1.0, 1.5]
    np.testing.assert_array_equal(plan(FLOW, t1=2.0, save=times).time, times)
    made = plan(DESCENT, t1=2.0, save=times)
    assert made.save_positions.tolist() == [
        2,
        10,
        15,
    ]  # 2.5 steps are rounded to the even neighbour
    assert plan(DESCENT, steps=20, save=[0.0, 2.0]).save_positions.tolist() == [0, 20]


def test_times_that_are_the_same_step_are_saved_once_and_said():
    with pytest.warns(UserWarning, match="only 2 of the 3 times are different steps"):
        saved = plan(gf.GradientDescent(0.1), steps=10, save=[0.1, 0.12, 0.5])
    np.testing.assert_array_equal(saved.step, [1, 5])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_times_in_another_precision_end_at_the_end(kind: Any):
    """Rounded to 32 bits 0.3 is beyond 0.3, and 0.7 before 0.7."""
    for end in (0.3, 0.7):
        times = np.array([0.1, 0.2, end], kind)
        made = plan(FLOW, t1=end, save=times).time
        np.testing.assert_array_equal(made[:2], times[:2].astype(float))
        assert made[-1] == end
        assert plan(DESCENT, t1=end, save=times).save_positions.tolist() == [1, 2, round(10 * end)]
    beyond = np.array([0.1, 0.3 * (1.0 + 4.0 * np.finfo(kind).eps + 1e-8)], kind)
    with pytest.raises(ValueError, match=r"last time 0\.3\d* lies beyond the end .* t = 0\.3"):
        plan(FLOW, t1=0.3, save=beyond)


@pytest.mark.parametrize(
    "dynamics",
    [DESCENT, gf.GradientDescent(lambda k: 0.1 + 0.0 * k), FLOW],
    ids=["h", "h_k", "flow"],
)
def test_the_start_is_saved_only_if_it_is_asked_for(dynamics: gf.AbstractDynamics):
    assert plan(dynamics, t1=0.2, save=[0.1, 0.2]).time[0] == pytest.approx(0.1)
    assert plan(dynamics, t1=0.2, save=[0, 0.2]).time[0] == 0.0
    assert plan(dynamics, t1=0.2, save=np.array([0.0])).time.tolist() == [0.0]
    assert plan(dynamics, t1=0.2, save=2).time[0] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t1": True}, "t1 must be a number; got True"),
        ({"steps": True}, "steps must be a number; got True"),
        ({"t1": 1.0, "save": True}, "save must be a number of points or a list of flow times; got"),
        ({"t1": 1.0, "save": [True]}, "save must be a number of points or a list"),
        ({"t1": 1.0, "save": np.array(["all"])}, "save must be a number of points or a list"),
    ],
)
def test_refuses_what_is_no_number(options: dict, message: str):
    for dynamics in (DESCENT, FLOW):
        with pytest.raises(TypeError, match=message):
            plan(dynamics, **options)


def test_the_end_may_be_saved_when_it_is_not_a_whole_number_of_steps():
    for h, t1, last in ((0.3, 1.0, 3), (0.3, 1.1, 4)):
        made = plan(gf.GradientDescent(h), t1=t1, save=[0.5, t1])
        assert made.save_positions.tolist() == [2, last]


def decaying(step: Any) -> Any:
    """Step sizes 0.1, 0.1 / 2, 0.1 / 3, ...: flow time grows like their logarithm."""
    return 0.1 / (1.0 + step)


HARMONIC = np.append(0.0, np.cumsum(0.1 / np.arange(1, 30_001)))
DECAYING = gf.GradientDescent(decaying)


def nearest(times: Any) -> list[int]:
    return [int(np.argmin(np.abs(HARMONIC - t))) for t in times]


def test_flow_time_of_a_step_size_schedule_is_the_sum_of_the_steps():
    made = plan(DECAYING, steps=10_000, save=[0.0, 0.3, 0.55, 0.9])
    assert made.step is not None and made.step.tolist() == nearest([0.0, 0.3, 0.55, 0.9])
    np.testing.assert_array_equal(made.save_positions, made.step)
    np.testing.assert_allclose(made.time, HARMONIC[made.step], rtol=1e-13)


def test_a_length_in_flow_time_ends_at_the_nearest_step():
    made = plan(DECAYING, t1=1.0, save=2)
    assert made.step is not None and made.step.tolist() == [0, *nearest([1.0])]
    assert made.time[-1] == pytest.approx(1.0, abs=1e-5)
    made = plan(DECAYING, t1=0.13, save=[0.13])  # between the steps at 0.1 and 0.15
    assert made.save_positions.tolist() == [2]
    assert plan(DECAYING, t1=0.12, save=[0.12]).save_positions.tolist() == [1]


def test_points_of_a_step_size_schedule_are_evenly_spaced_in_flow_time():
    made = plan(DECAYING, steps=20_000, save=5)
    end = HARMONIC[20_000]
    assert made.save_positions.tolist() == nearest(np.linspace(0.0, end, 5))
    made = plan(DECAYING, steps=20_000, save=5, spacing="log")
    assert made.save_positions.tolist() == nearest([0.0, *np.geomspace(0.1, end, 4)])
    assert plan(DECAYING, steps=4, save=5).save_positions.tolist() == [0, 1, 2, 3, 4]


def test_a_constant_schedule_is_a_step_size():
    constant = gf.GradientDescent(lambda step: 0.1)
    for options in ({"steps": 40, "save": 5}, {"t1": 3.04, "save": 7}, {"t1": 2.0, "save": [1.0]}):
        a, b = plan(constant, **options), plan(DESCENT, **options)
        np.testing.assert_array_equal(a.save_positions, b.save_positions)
        np.testing.assert_allclose(a.time, b.time, rtol=1e-13)


def test_steps_of_a_second_order_flow_are_those_of_the_descent():
    made = plan(gf.dynamics.HeavyBallFlow(0.1, 0.5), steps=20, save=5)
    assert made.step is None
    np.testing.assert_allclose(made.save_positions, [0.0, 0.5, 1.0, 1.5, 2.0], rtol=1e-14)


def test_a_schedule_must_not_fall_below_zero_during_the_run():
    for step_sizes, first in (
        (lambda k: 0.1 * jnp.where(k < 100, 1.0, -1.0), -0.1),
        (lambda k: 0.1 * jnp.where(k < 100, 1.0, jnp.nan), "nan"),
        (lambda k: 0.1 * jnp.where(k < 100, 1.0, jnp.inf), "inf"),
    ):
        falling = gf.GradientDescent(step_sizes)
        assert plan(falling, steps=100, save=2).save_positions.tolist() == [0, 100]
        message = rf"the schedule gives {first} at step 100; it must be a finite number >= 0"
        for options in ({"steps": 101}, {"t1": 10.5}):
            with pytest.raises(ValueError, match=message):
                plan(falling, **options)


WARM_UP = gf.GradientDescent(
    optax.warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=4, decay_steps=12)
)
"""Step sizes 0, 1/40, ..., 3/40, then half a cosine from 1/10 at step 4 to 0 at step 12 and on."""
RISE_AND_FALL = np.append(
    0.1 * np.arange(4) / 4, 0.05 * (1.0 + np.cos(np.pi * np.minimum(np.arange(12), 8) / 8))
)


def test_a_schedule_may_start_and_end_at_zero():
    times = np.append(0.0, np.cumsum(RISE_AND_FALL))
    made = plan(WARM_UP, steps=16, save=101)
    # Steps 0 and 1 are at time 0; step 12 arrives where the steps of size 0 keep the rest.
    assert made.save_positions.tolist() == [0, *range(2, 12), 16]
    np.testing.assert_allclose(made.time, times[made.save_positions], rtol=1e-14)
    assert np.all(np.diff(made.time) > 0.0)
    assert plan(WARM_UP, steps=16, save=[0.0, times[5], times[-1]]).save_positions.tolist() == [
        0,
        5,
        16,
    ]
    assert plan(WARM_UP, t1=float(times[-1]) - 1e-3, save=2).save_positions.tolist() == [0, 12]
    log = plan(WARM_UP, steps=16, save=4, spacing="log")
    wanted = np.geomspace(times[2], times[-1], 3)
    inner = int(np.argmin(np.abs(times - wanted[1])))
    assert log.save_positions.tolist() == [0, 2, inner, 16]


def test_a_pause_is_saved_once():
    paused = gf.GradientDescent(lambda k: jnp.where((k >= 2) & (k < 6), 0.0, 0.1))
    assert plan(paused, steps=9, save=101).save_positions.tolist() == [0, 1, 2, 7, 8, 9]
    assert plan(paused, steps=9, save=[0.2, 0.3]).save_positions.tolist() == [2, 7]
    assert plan(paused, steps=9, save=[0.22, 0.28]).save_positions.tolist() == [2, 7]
    assert plan(paused, t1=0.22, save=2).save_positions.tolist() == [0, 2]


def test_a_schedule_that_stays_at_zero_ends_no_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedules, "MOST_STANDING", 10_000)
    vanishing = gf.GradientDescent(optax.linear_schedule(0.1, 0.0, 100))  # -2e-18 from 100 on
    end = 0.1 * 101 / 2
    with pytest.raises(ValueError, match=rf"t1=6: .* only reached t = {end:g} after \d\d,?\d+ st"):
        plan(vanishing, t1=6.0)
    assert plan(vanishing, steps=30_000, save=2).save_positions.tolist() == [0, 30_000]
    still = gf.GradientDescent(lambda k: 0.0 * k)
    with pytest.raises(ValueError, match="schedule is 0 at all 5 steps of the run"):
        plan(still, steps=5)
    with pytest.raises(ValueError, match="only reached t = 0"):
        plan(still, t1=1.0)


def test_a_step_of_size_zero_does_nothing():
    problem, net = gf.Problem(gf.Regression.whitened([[1.0]])), gf.DeepLinear([[[2.0]], [[0.1]]])
    run = gf.simulate(problem, net, WARM_UP, steps=16, save=101)
    w, path = np.array([2.0, 0.1]), []
    for h in (*RISE_AND_FALL, 0.0):
        path.append(w)
        w = w - h * (w[0] * w[1] - 1.0) * w[::-1]
    assert run.step is not None
    for i, layer in enumerate(run.weights):
        np.testing.assert_allclose(layer[:, 0, 0], np.array(path)[run.step, i], rtol=1e-13)
    again = gf.repeat(run)
    assert np.array_equal(again.step, run.step) and np.array_equal(again["loss"], run["loss"])


def test_a_schedule_that_does_not_get_there_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedules, "MOST_SCHEDULED", 10_000)
    slow = gf.GradientDescent(optax.exponential_decay(0.1, 10, 0.999))
    reached = 0.1 * (1 - 0.999**1000) / (1 - 0.999**0.1)
    with pytest.raises(
        ValueError, match=rf"t1=1e\+06: .* reached t = {reached:g} after 10000 steps"
    ):
        plan(slow, t1=1e6)
    with pytest.raises(ValueError, match="at most 10000 steps can follow a step-size schedule"):
        plan(slow, steps=10_001)


@pytest.mark.parametrize(
    ("dynamics", "options", "message"),
    [
        (DESCENT, {}, "t1 and steps: give the length of the run by one of them; got neither"),
        (DESCENT, {"t1": 1.0, "steps": 3}, "got both"),
        (DESCENT, {"t1": -1.0}, "t1 must be a finite flow time > 0; got -1.0"),
        (DESCENT, {"t1": float("nan")}, "t1 must be a finite flow time > 0; got nan"),
        (DESCENT, {"t1": 0.04}, "t1=0.04 is less than half of one step of size 0.1"),
        (DECAYING, {"t1": 0.04}, "t1=0.04 is less than half of one step of size 0.1"),
        (DECAYING, {"steps": 0}, "steps must be an integer >= 1; got 0"),
        (DECAYING, {"t1": 0.3, "save": [0.5]}, "last time 0.5 lies beyond the end .* t = 0.3"),
        (DESCENT, {"steps": 0}, "steps must be an integer >= 1; got 0"),
        (DESCENT, {"steps": 2**31}, "steps=2147483648: at most 2147483647 steps"),
        (SDE, {"steps": 2**30}, "at most 536870911 steps"),
        (gf.GradientDescent(0.1, path_substeps=4), {"steps": 2**30}, "at most 536870911 steps"),
        (FLOW, {"steps": 3}, "steps=3: GradientFlow has no step size; give .* t1"),
        (FLOW, {"t1": 1.0, "save": 1}, r"save=1: at least 2 points \(start and end\)"),
        (FLOW, {"t1": 1.0, "save": []}, "save: explicit times must be a non-empty list"),
        (FLOW, {"t1": 1.0, "save": [0.5, 0.5]}, "strictly increasing"),
        (FLOW, {"t1": 1.0, "save": [-0.5, 0.5]}, "must be >= 0"),
        (FLOW, {"t1": 1.0, "save": [0.5, 1.5]}, "last time 1.5 lies beyond the end .* t = 1"),
        (DESCENT, {"t1": 1.0, "save": [0.5, 1.5]}, "last time 1.5 lies beyond the end .* t = 1"),
        (FLOW, {"t1": 1.0, "save": [0.5, float("inf")]}, "finite flow times"),
    ],
)
def test_refuses_what_makes_no_sense(dynamics: gf.AbstractDynamics, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        plan(dynamics, **options)
