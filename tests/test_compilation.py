"""A sweep over numbers compiles nothing: step sizes, rates, tolerances, seeds, lengths, save times.

Compilation is what makes a first run slow, so nothing but shapes and choices may cause it.
"""

from collections.abc import Callable
from typing import Any

import jax
import pytest

import gradflow as gf

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
