"""Measures that read stored weights, on weights written by hand."""

import numpy as np
import pytest
from specs import make_run

from gradflow.study.spec.claim_tables import CLAIMS


def measure(quantity, *runs):
    claim = CLAIMS[quantity].model_validate(
        {"sentence": "x", "run": "run", "quantity": quantity, "at_most": 1.0}
    )
    return claim.measure(runs)


def balancedness(layers):
    return layers[1].T @ layers[1] - layers[0] @ layers[0].T


def heavy_ball(beta, steps, seed=0):
    """Layers (2, 2) and (1, 2) moved by heavy ball on 1/2 |W2 W1 - T|^2 with a thrown start."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(size=(2, 2)), rng.normal(size=(1, 2))]
    velocity = [0.1 * rng.normal(size=w.shape) for w in layers]
    target = np.array([[1.0, -0.5]])
    path = [[w.copy() for w in layers]]
    for _ in range(steps):
        m = layers[1] @ layers[0] - target
        gradient = [layers[1].T @ m, m @ layers[0].T]
        velocity = [beta * v - 0.05 * g for v, g in zip(velocity, gradient, strict=True)]
        layers = [w + v for w, v in zip(layers, velocity, strict=True)]
        path.append([w.copy() for w in layers])
    return [np.stack([weights[i] for weights in path]) for i in range(2)]


def descent(momentum, weights):
    dynamics = {"kind": "GradientDescent", "step_size": 0.05, "momentum": momentum}
    time = 0.05 * np.arange(len(weights[0]))
    return make_run(time=time, dynamics=dynamics, weights=weights)


def test_noether_charge_loses_the_momentum_in_every_step():
    weights = heavy_ball(0.8, 30)
    assert measure("noether_decay", descent(0.8, weights)).value < 1e-13
    # the charge of another momentum is missed by the difference of the two, at the first step
    assert measure("noether_decay", descent(0.7, weights)).value == pytest.approx(0.1, rel=1e-10)


def test_noether_charge_needs_one():
    resting = [np.zeros((4, 2, 2)), np.zeros((4, 1, 2))]
    with pytest.raises(ValueError, match="charge is 0 at the start"):
        measure("noether_decay", descent(0.5, resting))
    with pytest.raises(ValueError, match="depth 1"):
        measure("noether_decay", descent(0.5, [np.zeros((4, 1, 2))]))
    flow = make_run(time=np.arange(3.0), weights=[np.zeros((3, 1, 1)), np.zeros((3, 1, 1))])
    with pytest.raises(ValueError, match="GradientDescent only"):
        measure("noether_decay", flow)


def test_diagonal_change_sees_the_diagonal_only():
    rng = np.random.default_rng(1)
    path = [[rng.normal(size=(2, 3)), rng.normal(size=(2, 2))] for _ in range(4)]
    weights = [np.stack([layers[i] for layers in path]) for i in range(2)]
    run = make_run(time=np.arange(4.0), weights=weights)
    changes = np.array([balancedness(layers) - balancedness(path[0]) for layers in path])
    expected = np.abs(np.diagonal(changes, axis1=1, axis2=2)).max()
    assert measure("diagonal_change", run).value == pytest.approx(expected, rel=1e-12)
    # W_1 W_1^T goes from the identity to a matrix with the same diagonal
    tilted = np.stack([np.eye(2), np.sqrt(0.5) * np.array([[1.0, -1.0], [-1.0, 1.0]])])
    turned = make_run(time=np.arange(2.0), weights=[tilted, np.stack([np.eye(2)] * 2)])
    assert measure("diagonal_change", turned).value < 1e-15
    assert measure("balancedness_change", turned).value == pytest.approx(1.0)


def test_path_difference():
    first = [np.zeros((3, 1, 1)), np.ones((3, 1, 1))]
    second = [w.copy() for w in first]
    second[1][2] += 0.25
    runs = [
        make_run(name, time=np.arange(3.0), weights=w)
        for name, w in zip("ab", (first, second), strict=True)
    ]
    assert measure("path_difference", *runs).value == 0.25
    other = make_run("c", time=2 * np.arange(3.0), weights=first)
    with pytest.raises(ValueError, match="different times"):
        measure("path_difference", runs[0], other)
