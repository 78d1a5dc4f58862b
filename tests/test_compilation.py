"""A sweep over numbers compiles nothing: step sizes, rates, tolerances, seeds, lengths, save times.

Compilation is what makes a first run slow, so nothing but shapes and choices may cause it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from specs import HEAD

import gradflow as gf
from gradflow.study.run.build import prepare
from gradflow.study.run.runner import run_study
from gradflow.study.spec.load import load_study

# Shapes of random numbers are found by an abstract evaluation, so tracing alone is no sign.
COMPILING = tuple(
    f"/jax/core/compile/{what}_duration" for what in ("jaxpr_to_mlir_module", "backend_compile")
)
EVENTS: list[str] = []


def _record(event: str, duration: float, **details: Any) -> None:
    if event in COMPILING:
        EVENTS.append(event)


jax.monitoring.register_event_duration_secs_listener(_record)

NET = gf.DeepLinear([[[0.5, 0.2], [0.1, 0.4]], [[0.2, 0.6]]])


def run(dynamics: gf.AbstractDynamics, rate: float, seed: int, **options: Any) -> gf.Trajectory:
    data = gf.Regression.from_moments([[1.0, 0.0], [0.0, 2.0]], [[1.0 + rate, 0.5]], n=3 + seed)
    regularizers = [
        gf.LabelNoise(0.1 + rate),
        gf.InputNoise(0.2 * rate),
        gf.WeightDecay(rate),
        gf.Minibatch(2),
    ]
    net = gf.DeepLinear([(1.0 + rate) * w for w in NET.weights])
    chosen = {"replicas": 3, "key": jax.random.key(seed), "progress": False} | options
    observables = ["loss", "excess_loss", "loss_floor", "imbalance_drift", "sharpness"]
    if isinstance(dynamics, gf.GradientDescent) and dynamics.momentum is not None:
        observables.remove("imbalance_drift")
    problem = gf.Problem(data, regularizers)
    return gf.simulate(problem, net, dynamics, observables=observables, **chosen)


def test_compiling_is_noticed():
    before = len(EVENTS)
    jax.jit(lambda x: x + 12345)(1.0)
    assert EVENTS[before:] == list(COMPILING)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda v: gf.GradientFlow(rtol=1e-6 * v, atol=1e-8 * v),
        lambda v: gf.GradientDescent(0.01 * v),
        lambda v: gf.GradientDescent(0.01 * v, momentum=0.3 * v),
        lambda v: gf.StochasticFlow(0.01 * v, substeps=2),
    ],
    ids=["GradientFlow", "GradientDescent", "with momentum", "StochasticFlow"],
)
def test_numbers_do_not_compile_anything(make: Callable[[float], gf.AbstractDynamics]):
    first = run(make(1.0), 0.1, 0, t1=0.5, save=3)
    EVENTS.clear()
    second = run(make(2.5), 0.3, 1, t1=0.8, save=6)
    third = run(make(0.7), 0.2, 2, t1=0.4, save=[0.1, 0.3, 0.4])
    if not isinstance(first.dynamics, gf.GradientFlow):
        run(make(1.1), 0.2, 3, steps=40, save=5, spacing="log")
    assert EVENTS == []
    assert first["loss"][0, 1] != second["loss"][0, 1] != third["loss"][0, 1]


def small(rate: float, seed: int, *regularizers: gf.AbstractRegularizer) -> tuple[Any, Any]:
    """A problem of three weights and its start, where every number follows `rate` and `seed`."""
    data = gf.Regression.from_moments([[1.0 + rate]], [[2.0 - rate]], n=2 + seed)
    net = gf.DeepLinear([[[0.5 + rate], [0.1]], [[1.2, 0.3 * rate]]])
    return gf.Problem(data, regularizers), net


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "noise"),
    [
        (lambda v: gf.SlowFlow(0.01 * v, rtol=1e-6 * v, atol=1e-8 * v), gf.LabelNoise),
        (lambda v: gf.ModifiedFlow(0.01 * v, rtol=1e-6 * v), gf.WeightDecay),
        (lambda v: gf.HeavyBallFlow(0.01 * v, momentum=0.3 * v), gf.WeightDecay),
        (lambda v: gf.SVAG(0.01 * v, amplification=2), gf.GradientNoise),
        (lambda v: gf.GradientDescent(0.01 * v), gf.DropConnect),
    ],
    ids=["SlowFlow", "ModifiedFlow", "HeavyBallFlow", "SVAG", "noise inside the network"],
)
def test_numbers_of_the_other_dynamics_do_not_compile_anything(
    make: Callable[[float], gf.AbstractDynamics], noise: Callable[[float], Any]
):
    def end(number: float, seed: int, save: Any) -> float:
        problem, net = small(0.1 * number, seed, noise(0.2 * number))
        key, t1 = jax.random.key(seed), 0.3 + 0.1 * number
        dynamics = make(number)
        options = {"observables": ["imbalance"], "progress": False}
        run = gf.simulate(problem, net, dynamics, t1=t1, key=key, save=save, **options)
        return float(run["imbalance"][-1])

    first = end(1.0, 0, 3)
    EVENTS.clear()
    second = end(2.5, 1, 6)
    assert EVENTS == []
    assert first != second


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [lambda v: gf.GradientDescent(0.01 * v), lambda v: gf.StochasticFlow(0.01 * v)],
    ids=["GradientDescent", "StochasticFlow"],
)
def test_numbers_of_a_prediction_do_not_compile_anything(
    make: Callable[[float], gf.AbstractDynamics],
):
    def rate(number: float) -> float:
        noise = gf.LabelNoise(0.2 * number), gf.WeightDecay(0.1 * number)
        problem, net = small(0.1 * number, int(number), *noise)
        return gf.predict(problem, net, make(number), eps=0.05 * number).imbalance_rate

    first = rate(1.0)
    EVENTS.clear()
    second = rate(2.5)
    assert EVENTS == []
    assert first != second


STUDY = """
[[run]]
name = "sgd"
dynamics = {{ kind = "GradientDescent", step_size = {step} }}
regularizers = [{{ kind = "LabelNoise", std = {std} }}]
replicas = 3
steps = {steps}
save = {{ points = {points} }}
observables = ["excess_loss", "loss_floor", "imbalance"]
"""


@pytest.mark.slow
def test_numbers_of_a_study_do_not_compile_anything(tmp_path: Path):
    """Phases, rates, predictions and claims included."""

    def carry_out(name: str, seed: int, **numbers: float) -> float:
        folder = tmp_path / name
        folder.mkdir()
        spec = folder / "spec.toml"
        spec.write_text(HEAD.replace("2.0", f"{1.9 + seed}") + STUDY.format(**numbers))
        study = load_study(spec, seed=seed)
        result = run_study(study, prepare(study), folder)
        assert result.status == "complete" and result.runs["sgd"].prediction is not None
        return float(result.runs["sgd"].trajectory["excess_loss"][0, -1])

    first = carry_out("first", 0, step=0.05, std=0.5, steps=40, points=5)
    EVENTS.clear()
    second = carry_out("second", 1, step=0.02, std=0.7, steps=55, points=9)
    assert EVENTS == []
    assert first != second
