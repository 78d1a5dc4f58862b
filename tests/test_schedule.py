"""Which times a run saves."""

from typing import Any

import numpy as np
import pytest

import gradflow as gf
from gradflow.schedule import Schedule, schedule

DESCENT = gf.GradientDescent(0.1)
SDE = gf.StochasticFlow(0.1, substeps=4)
FLOW = gf.GradientFlow()


def plan(dynamics: gf.AbstractDynamics, **options: Any) -> Schedule:
    chosen = {"t1": None, "steps": None, "save": 101, "spacing": "lin"} | options
    return schedule(dynamics, **chosen)


def test_linear_steps_of_a_gridded_dynamics():
    made = plan(DESCENT, steps=10, save=6)
    assert made.step is not None and made.step.tolist() == [0, 2, 4, 6, 8, 10]
    assert made.marks.tolist() == [0, 2, 4, 6, 8, 10]
    np.testing.assert_allclose(made.time, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-15)


def test_marks_of_the_stochastic_flow_count_integration_steps():
    made = plan(SDE, t1=1.0, save=3)
    assert made.step is not None and made.step.tolist() == [0, 5, 10]
    assert made.marks.tolist() == [0, 20, 40]
    np.testing.assert_allclose(made.time, [0.0, 0.5, 1.0], rtol=1e-15)


def test_flow_time_is_rounded_to_whole_steps():
    assert plan(gf.GradientDescent(0.3), t1=1.0, save=2).marks.tolist() == [0, 3]
    assert plan(gf.GradientDescent(0.3), t1=1.1, save=2).marks.tolist() == [0, 4]


def test_more_points_than_steps_saves_every_step():
    assert plan(DESCENT, steps=4, save=101).marks.tolist() == [0, 1, 2, 3, 4]
    assert plan(DESCENT, steps=4, save=101, spacing="log").marks.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [2, 3, 5, 50])
def test_log_spacing_starts_with_zero_and_one_step_and_reaches_the_end(count: int):
    marks = plan(DESCENT, steps=10_000, save=count, spacing="log").marks
    assert marks[0] == 0
    assert marks[-1] == 10_000
    if count > 2:
        assert marks[1] == 1
        ratios = marks[2:] / marks[1:-1]
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
    np.testing.assert_array_equal(made.marks, made.time)


def test_explicit_times():
    times = [0.25, 1.0, 1.5]
    np.testing.assert_array_equal(plan(FLOW, t1=2.0, save=times).time, [0.0, 0.25, 1.0, 1.5])
    made = plan(DESCENT, t1=2.0, save=times)
    assert made.marks.tolist() == [0, 2, 10, 15]  # 2.5 steps are rounded to the even neighbour
    assert plan(DESCENT, steps=20, save=[0.0, 2.0]).marks.tolist() == [0, 20]


def test_the_end_may_be_saved_when_it_is_not_a_whole_number_of_steps():
    for h, t1, last in ((0.3, 1.0, 3), (0.3, 1.1, 4)):
        made = plan(gf.GradientDescent(h), t1=t1, save=[0.5, t1])
        assert made.marks.tolist() == [0, 2, last]


@pytest.mark.parametrize(
    ("dynamics", "options", "message"),
    [
        (DESCENT, {}, "t1 and steps: give the length of the run by one of them; got neither"),
        (DESCENT, {"t1": 1.0, "steps": 3}, "got both"),
        (DESCENT, {"t1": -1.0}, "t1 must be a finite flow time > 0; got -1.0"),
        (DESCENT, {"t1": float("nan")}, "t1 must be a finite flow time > 0; got nan"),
        (DESCENT, {"t1": 0.04}, "t1=0.04 is less than half of one step of size 0.1"),
        (DESCENT, {"steps": 0}, "steps must be an integer >= 1; got 0"),
        (DESCENT, {"steps": True}, "steps must be an integer >= 1; got True"),
        (DESCENT, {"steps": 2**31}, "steps=2147483648: at most 2147483647 steps"),
        (SDE, {"steps": 2**30}, "at most 536870911 steps"),
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
