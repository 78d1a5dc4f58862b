"""Descriptions of dynamics and regularizers lead back to the same object, through JSON."""

import functools
import json

import diffrax
import equinox as eqx
import optax
import pytest

import gradflow as gf
from gradflow.results.serialize import (
    check_rebuilds,
    describe,
    rebuild_dynamics,
    rebuild_regularizer,
)

VELOCITY = [[[0.1, 0.2]], [[0.3]]]

DYNAMICS = [
    gf.GradientFlow(1e-6, 1e-9, stiff=True),
    gf.GradientFlow(solver=diffrax.Tsit5()),
    gf.GradientFlow(conservative=True),
    gf.GradientFlow(solver=gf.GaussLegendre()),
    gf.ExactFlow(),
    gf.ModifiedFlow(0.1, order=3),
    gf.PrincipalFlow(0.1),
    gf.HeavyBallFlow(0.1, 0.5, velocity=VELOCITY),
    gf.GradientDescent(0.1, 0.9, nesterov=True, decay="decoupled"),
    gf.GradientDescent(0.1, 0.9, velocity=VELOCITY, path_substeps=4),
    gf.GradientDescent(0.1, optimizer=gf.FromOptax("adam", b1=0.8)),
    gf.GradientDescent(
        gf.FromOptax("exponential_decay", init_value=0.1, transition_steps=5, decay_rate=0.9)
    ),
    gf.SVAG(0.1, amplification=4, path_substeps=8),
    gf.StochasticFlow(0.1, order=2, substeps=3, diffusion="sampled"),
    gf.StochasticFlow(0.1, solver=diffrax.Heun()),
]

REGULARIZERS = [
    gf.WeightDecay(0.1),
    gf.LabelNoise(0.2),
    gf.InputNoise(0.3),
    gf.Minibatch(3, replacement=True),
    gf.Dropout(0.2, layers=[1, 3]),
    gf.Dropout(0.2, distribution="gaussian"),
    gf.DropConnect(0.1, layers=[2]),
    gf.WeightNoise(0.1, anticorrelated=True),
    gf.GradientNoise(0.4),
]


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)
def test_dynamics_come_back(dynamics):
    check_rebuilds(dynamics)
    again = rebuild_dynamics(json.loads(json.dumps(describe(dynamics))))
    assert eqx.tree_equal(again, dynamics)


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=lambda r: type(r).__name__)
def test_regularizers_come_back(regularizer):
    check_rebuilds(regularizer)
    again = rebuild_regularizer(json.loads(json.dumps(describe(regularizer))))
    assert eqx.tree_equal(again, regularizer)


@pytest.mark.parametrize(
    "dynamics",
    [
        gf.GradientDescent(0.1, optimizer=optax.adam),
        gf.GradientDescent(optax.constant_schedule(0.1)),
        gf.GradientFlow(solver=gf.GaussLegendre(order=4)),
    ],
)
def test_what_a_file_cannot_hold_is_refused(dynamics):
    with pytest.raises(ValueError, match="a file holds only dynamics"):
        check_rebuilds(dynamics)


@pytest.mark.parametrize(
    ("dynamics", "fix"),
    [
        (gf.GradientDescent(0.1, optimizer=optax.adam),
         'optimizer cannot be saved; give gf.FromOptax("adam"):'),
        (gf.GradientDescent(0.1, optimizer=functools.partial(optax.adam, b1=0.8)),
         'optimizer cannot be saved; give gf.FromOptax("adam", b1=0.8):'),
        (gf.GradientDescent(optax.constant_schedule(0.1)),
         'step_size cannot be saved; give gf.FromOptax("exponential_decay", ...)'),
    ],
)  # fmt: skip
def test_functions_of_optax_are_refused_with_what_to_write(dynamics, fix):
    with pytest.raises(ValueError) as caught:
        check_rebuilds(dynamics)
    assert str(caught.value).startswith(f"GradientDescent.{fix}")


def test_scheduled_runs_with_an_optimizer_are_saved_and_repeated(tmp_path):
    problem = gf.Problem(gf.Regression.whitened([[1.0]]))
    net = gf.DeepLinear([[[0.5]], [[0.6]]])
    schedule = gf.FromOptax("polynomial_schedule", init_value=0.1, end_value=0.01, power=1.0,
                            transition_steps=20)  # fmt: skip
    dynamics = gf.GradientDescent(schedule, optimizer=gf.FromOptax("sgd", momentum=0.5))
    run = gf.simulate(problem, net, dynamics, steps=30, save=4)
    again = gf.repeat(gf.Trajectory.load(run.save(tmp_path / "run.nc")))
    assert (again["loss"] == run["loss"]).all() and (again.time == run.time).all()
