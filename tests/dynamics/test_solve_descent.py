"""Gradient descent as a pure function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import gradflow as gf
from gradflow.backend.types import Scalar

RNG = np.random.default_rng(1)
SAMPLE = gf.Regression.from_samples(RNG.normal(size=(6, 2)), RNG.normal(size=(6, 1)))
WHITE = gf.Regression.whitened([[1.0, -0.5]])
NET = gf.DeepLinear([[[0.5, 0.2], [0.1, -0.4]], [[0.2, 0.6]]])
KEY = jax.random.key(3)

CASES = {
    "labels and momentum": (
        gf.Problem(WHITE, [gf.LabelNoise(0.3), gf.WeightDecay(0.1)]),
        gf.GradientDescent(0.1, 0.5, nesterov=True),
    ),
    "epochs and a schedule": (
        gf.Problem(SAMPLE, [gf.Minibatch(2, reshuffled=True)]),
        gf.GradientDescent(optax.exponential_decay(0.1, 5, 0.5)),
    ),
    "adam, weights that hold noise": (
        gf.Problem(SAMPLE, [gf.WeightNoise(0.1, anticorrelated=True)]),
        gf.GradientDescent(0.01, optimizer=optax.adam),
    ),
}


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("case", CASES)
def test_is_the_first_replica_of_simulate(case: str):
    """The same random numbers and formulas; the two programs may round the last digit apart."""
    problem, training = CASES[case]
    steps = [0, 3, 6, 15]
    run = gf.simulate(problem, NET, training, steps=15, save=16, key=KEY, observables=["loss"])
    saved = jax.jit(lambda key: training.solve(problem, NET, steps=steps, key=key))(KEY)
    for layer, expected in zip(saved, run.weights, strict=True):
        assert layer.shape == expected[steps].shape
        np.testing.assert_allclose(layer, expected[steps], rtol=1e-13, atol=1e-15)


@pytest.mark.slow
def test_times_are_rounded_to_steps():
    problem, training = CASES["labels and momentum"]
    by_time = training.solve(problem, NET, [0.0, 0.32, 0.32, 0.9], key=KEY)
    by_step = training.solve(problem, NET, steps=[0, 3, 3, 9], key=KEY)
    for a, b in zip(by_time, by_step, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_derivatives_of_every_mode_and_order():
    r"""One layer, one number: $w_k = T + (1 - h)^k (w_0 - T)$."""
    k = 6

    def end(at: Array) -> Scalar:
        start, target, h = at
        problem = gf.Problem(gf.Regression.whitened(target[None, None]))
        net = gf.DeepLinear([start[None, None]])
        return gf.GradientDescent(h).solve(problem, net, steps=[2, k])[0][-1, 0, 0]

    start, target, h = at = np.array([0.3, 1.1, 0.2])
    decay = (1 - h) ** k
    by_step = -k * (1 - h) ** (k - 1)
    slope = [decay, 1 - decay, by_step * (start - target)]
    curvature = np.zeros((3, 3))
    curvature[0, 2] = curvature[2, 0] = by_step
    curvature[1, 2] = curvature[2, 1] = -by_step
    curvature[2, 2] = k * (k - 1) * (1 - h) ** (k - 2) * (start - target)
    modes = (jax.jacfwd, jax.jacrev)
    for outer in modes:
        np.testing.assert_allclose(jax.jit(outer(end))(at), slope, rtol=1e-12)
        for inner in modes:
            second = jax.jit(outer(inner(end)))(at)
            np.testing.assert_allclose(second, curvature, rtol=1e-12, atol=1e-13)


def test_what_diverges_is_nan_from_then_on():
    problem = gf.Problem(gf.Regression.whitened([[1.0]]))
    (layer,) = gf.GradientDescent(30.0).solve(problem, gf.DeepLinear([[[2.0]]]), steps=[0, 1, 40])
    np.testing.assert_array_equal(np.isfinite(layer[:, 0, 0]), [True, True, False])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "times and steps: give one of them; got neither"),
        ({"times": [1.0], "steps": [1]}, "got both"),
        ({"times": [1.0, 0.5]}, "times must be >= 0 and increasing"),
        ({"times": [np.inf]}, "finite"),
        ({"times": []}, "non-empty"),
        ({"steps": np.array([0.5])}, "steps must be whole numbers"),
        ({"steps": [10**400]}, "steps must be a list of numbers"),
        ({"times": [1e300]}, "at most 2147483647 steps"),
    ],
)
def test_what_makes_no_sense(wrong: dict[str, Any], message: str):
    problem = gf.Problem(WHITE)
    with pytest.raises((TypeError, ValueError), match=message):
        gf.GradientDescent(0.1).solve(problem, NET, **wrong)


def test_what_is_not_known_or_missing():
    problem, scheduled = gf.Problem(WHITE), CASES["epochs and a schedule"][1]
    with pytest.raises(TypeError, match=r"give steps=\[...\]"):
        scheduled.solve(problem, NET, [1.0])
    with pytest.raises(TypeError, match=r"give steps=\[...\]"):
        jax.eval_shape(lambda h: gf.GradientDescent(h).solve(problem, NET, [1.0]), 0.1)
    with pytest.raises(TypeError, match="must be known outside jit"):
        jax.eval_shape(lambda t: gf.GradientDescent(0.1).solve(problem, NET, t), jnp.ones(1))
    with pytest.raises(ValueError, match="key: this run is random"):
        gf.GradientDescent(0.1).solve(gf.Problem(WHITE, [gf.LabelNoise(0.1)]), NET, [1.0])
