"""Many noises at once: by Monte Carlo, and in training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import centred_statistics, draws, sampled_gradients
from reference import assert_close, scale

import gradflow as gf
from gradflow.random.streams import Stream
from gradflow.regularizers import DropConnect, Dropout, GradientNoise, WeightNoise

CONNECT, NOISE = DropConnect(0.2), WeightNoise(0.3)
ANTI = WeightNoise(0.4, anticorrelated=True, layers=[1])

MANY = {
    "everything": [
        gf.WeightDecay(0.3),
        Dropout(0.3, "gaussian"),
        CONNECT,
        ANTI,
        gf.LabelNoise(0.5),
        gf.InputNoise(0.3),
        GradientNoise(0.5),
        Dropout(0.2, layers=[1]),
    ],
    "weights and inputs": [gf.InputNoise(0.4), NOISE, GradientNoise(0.2), gf.LabelNoise(0.3)],
    "online": [Dropout(0.3), gf.Minibatch(2), NOISE, gf.LabelNoise(0.5), GradientNoise(0.1)],
}


def network(widths):
    rng = np.random.default_rng(len(widths))
    return gf.DeepLinear([rng.normal(size=pair[::-1]) for pair in itertools.pairwise(widths)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "population"),
    [("everything", True), ("everything", False), ("weights and inputs", True), ("online", True)],
)
def test_many_noises_together_have_the_averaged_gradient_on_average(name, population):
    """100000 draws: within 4.5 standard errors in all 14 entries.

    A false alarm has a chance of 1e-4; a bias of 3% of the noise in any entry would be found.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 2)), rng.normal(size=(4, 1))
    data = gf.Regression.from_samples(x, y)
    if population:
        data = gf.Regression.from_moments(x.T @ x, y.T @ x, y.T @ y, n=2)
    problem, net = gf.Problem(data, MANY[name]), network((2, 3, 2, 1))
    stream = Stream(jax.random.key(1), jnp.arange(100), jnp.arange(1000))
    mean, error = centred_statistics(problem, net.weights, stream, net.widths)
    assert np.abs(mean / error).max() < 4.5
    assert error.min() > 0.0


@pytest.mark.slow
def test_drawn_noise_trains():
    """One step of every replica is the sampled gradient of the draw at its step and path."""
    x, y = np.array([[1.2], [0.4]]), np.array([[-0.7], [0.9]])
    noises = [gf.Minibatch(1), Dropout(0.25), CONNECT, NOISE, GradientNoise(0.2)]
    problem, net = gf.Problem(gf.Regression.from_samples(x, y), noises), network((1, 2, 1))
    key = jax.random.key(5)
    run = gf.simulate(
        problem, net, gf.GradientDescent(0.1), steps=3, replicas=4, key=key, save=4, observables=[]
    )
    drawn = draws(problem, Stream(key, jnp.arange(3), jnp.arange(4)), net.widths)
    for k in range(3):
        draw = jax.tree.map(lambda leaf, k=k: np.moveaxis(leaf[k], -1, 0), drawn)
        before, after = ([w[:, k + i] for w in run.weights] for i in range(2))
        for path in range(4):
            g = jax.tree.map(lambda leaf, p=path: leaf[p : p + 1], draw)
            weights = tuple(jnp.asarray(w[path]) for w in before)
            expected = reference.flatten([w[path] for w in before]) - 0.1 * np.asarray(
                sampled_gradients(problem, weights, g)
            )
            actual = reference.flatten([w[path] for w in after])
            assert_close([actual], [expected[0]], scale([actual]))
