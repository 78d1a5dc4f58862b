"""Several steps a turn of the loop against one a turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.dynamics import base

PROBLEM = gf.Problem(gf.Regression.whitened([[0.8]]), [gf.LabelNoise(0.3), gf.WeightDecay(0.01)])
NET = gf.DeepLinear([[[0.9]], [[-0.4]]])
DYNAMICS = [
    gf.GradientDescent(lambda k: 0.05 / (1.0 + 0.01 * k), momentum=0.5),
    gf.SVAG(0.05, amplification=2),
    gf.StochasticFlow(0.05, substeps=3),
]
STEPS = 45
"""Its number of integration steps is no multiple of 2 or 16 in any of the dynamics."""


def ended(dynamics):
    """The weights after `STEPS` steps, saved between: turns begin anywhere."""
    jax.clear_caches()  # what is compiled does not look at the machine again
    run = gf.simulate(
        PROBLEM, NET, dynamics, steps=STEPS, replicas=3, key=jax.random.key(2), save=4,
        store_weights=True, progress=False,
    )  # fmt: skip
    return [np.asarray(w) for w in run.weights]


@pytest.mark.slow
@pytest.mark.parametrize("dynamics", DYNAMICS, ids=["descent", "svag", "flow"])
def test_a_turn_of_many_steps_takes_the_same_steps(dynamics, monkeypatch):
    two = ended(dynamics)
    monkeypatch.setattr(base, "CPU_STEPS", 1)
    single = ended(dynamics)
    monkeypatch.setattr(base, "on_cpu", lambda: False)
    sixteen = ended(dynamics)
    jax.clear_caches()
    for a, b, c in zip(single, two, sixteen, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(c, a, rtol=1e-12, atol=1e-13)


def test_blocks_on_an_accelerator_hold_whole_turns(monkeypatch):
    monkeypatch.setattr(base, "on_cpu", lambda: False)
    shapes = DYNAMICS[-1].noise_shapes(PROBLEM, (1, 1, 1))  # one number of 8 bytes
    assert base.block_length(shapes, 10**5) == 256
    assert base.block_length(shapes, 10**7) == base.ACCELERATOR_STEPS
    assert base.block_length(shapes, 10**9) == 1


def test_only_scalar_networks_take_several_steps_a_turn(monkeypatch):
    scalar, matrix = ((jnp.zeros((n, 1, 3)), jnp.zeros((1, n, 3))) for n in (1, 2))
    assert base.steps_a_turn(scalar) == base.CPU_STEPS
    assert base.steps_a_turn(matrix) == 1
    monkeypatch.setattr(base, "on_cpu", lambda: False)
    assert base.steps_a_turn(scalar) == base.ACCELERATOR_STEPS
    assert base.steps_a_turn(matrix) == 1
