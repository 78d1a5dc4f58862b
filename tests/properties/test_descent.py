"""Runs of (stochastic) gradient descent, step by step from their stored weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import draws, sampled_gradients
from reference import assert_close, balancedness, scale

import gradflow as gf
import gradflow.testing as gt
from gradflow.random.streams import Stream

X = np.array([[1.0, 0.3], [-0.5, 1.2], [0.7, -0.8], [0.2, 0.9]])
Y = np.array([[0.5, -0.2], [1.5, 0.4], [-1.0, 0.9], [0.3, 0.1]])
DATA = gf.Regression.from_samples(X, Y)
WIDTHS = (2, 3, 1, 2)
H = 0.05


def network(widths, seed=0):
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(widths)
    return gf.DeepLinear([0.7 * rng.normal(size=shape[::-1]) for shape in shapes])


def descend(problem, net, steps, replicas=None, momentum=0.0, h=H, seed=3):
    """A run with every step saved."""
    return gf.simulate(
        problem,
        net,
        gf.GradientDescent(h, momentum),
        steps=steps,
        replicas=replicas,
        key=jax.random.key(seed),
        save=steps + 1,
        observables=[],
    )


def layers_at(run, *index):
    return [w[index] for w in run.weights]


NOISES = {
    "labels": [gf.LabelNoise(0.5)],
    "batch": [gf.Minibatch(2)],
    "all": [gf.WeightDecay(0.2), gf.Minibatch(3, replacement=True), gf.InputNoise(0.3)],
    "epochs": [gf.LabelNoise(0.3), gf.Minibatch(2, reshuffled=True), gf.WeightDecay(0.1)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISES)
def test_balance_law_along_paths_of_sgd(name):
    """G_K - (1 - h rate)^{2K} G_0 is the sum of h^2 (g_{i+1}^T g_{i+1} - g_i g_i^T), decayed.

    The gradients are read off the stored weights.
    """
    regularizers = NOISES[name]
    rate = sum(float(r.rate) for r in regularizers if isinstance(r, gf.WeightDecay))
    steps, keep = 40, 1.0 - H * rate
    run = descend(gf.Problem(DATA, regularizers), network(WIDTHS), steps, replicas=3)
    assert not run.diverged.any()
    for path in range(3):
        expected = balancedness(layers_at(run, path, 0))
        for k in range(steps):
            before, after = layers_at(run, path, k), layers_at(run, path, k + 1)
            moves = [keep * w - v for w, v in zip(before, after, strict=True)]  # h g
            expected = [keep**2 * g + c for g, c in zip(expected, balancedness(moves), strict=True)]
        last = layers_at(run, path, steps)
        assert_close(balancedness(last), expected, scale(last, layers_at(run, path, 0)))


@pytest.mark.slow
def test_every_step_is_the_sampled_gradient_of_its_draw():
    """Also when an ensemble is run in chunks: steps and paths address the draws."""
    problem = gf.Problem(DATA, [gf.Minibatch(2), gf.InputNoise(0.3), gf.LabelNoise(0.2)])
    net, key = network(WIDTHS), jax.random.key(3)
    options = {"steps": 4, "replicas": 4, "key": key, "save": 5, "observables": []}
    run = gf.simulate(problem, net, gf.GradientDescent(H), chunk=2, **options)
    drawn = draws(problem, Stream(key, jnp.arange(4), jnp.arange(4)), net.widths)
    for k, path in itertools.product(range(4), (0, 1, 3)):
        before, after = (layers_at(run, path, k + i) for i in range(2))
        draw = jax.tree.map(lambda leaf, k=k, path=path: leaf[None, k, ..., path], drawn)
        weights = tuple(jnp.asarray(w) for w in before)
        (g,) = sampled_gradients(problem, weights, draw)
        expected = reference.flatten(before) - H * np.asarray(g)
        assert_close([reference.flatten(after)], [expected], scale(after))


def test_descent_with_decay_follows_its_recursion():
    """W <- (1 - h rate) W - h g, in NumPy from the start."""
    rate, steps = 0.3, 20
    run = descend(gf.Problem(DATA, [gf.WeightDecay(rate)]), network(WIDTHS), steps)
    layers = [np.asarray(w) for w in network(WIDTHS).weights]
    sxx, syx = X.T @ X / len(X), Y.T @ X / len(X)
    for k in range(steps + 1):
        assert_close(layers_at(run, k), layers, scale(layers))
        g = reference.gradient(layers, sxx, syx)
        layers = [(1.0 - H * rate) * w - H * v for w, v in zip(layers, g, strict=True)]


def test_momentum_follows_its_recursion():
    """v <- beta v - h g, W <- W + v."""
    beta, steps = 0.8, 20
    run = descend(gf.Problem(DATA), network(WIDTHS), steps, momentum=beta)
    layers = [np.asarray(w) for w in network(WIDTHS).weights]
    sxx, syx = X.T @ X / len(X), Y.T @ X / len(X)
    velocity = [np.zeros_like(w) for w in layers]
    for k in range(steps + 1):
        assert_close(layers_at(run, k), layers, scale(layers))
        g = reference.gradient(layers, sxx, syx)
        velocity = [beta * v - H * s for v, s in zip(velocity, g, strict=True)]
        layers = [w + v for w, v in zip(layers, velocity, strict=True)]


def test_one_layer_converges_as_a_power():
    """W* + (W_0 - W*) (I - h S)^k."""
    sxx = np.array([[1.3, 0.4], [0.4, 0.8]])
    best = np.array([[0.7, -1.1], [0.2, 0.5], [1.0, 0.0]])
    net = network((2, 3))
    problem = gf.Problem(gf.Regression.from_moments(sxx, best @ sxx))
    run = descend(problem, net, 30, h=0.3)
    start = np.asarray(net.weights[0])
    for k in range(31):
        power = np.linalg.matrix_power(np.eye(2) - 0.3 * sxx, k)
        assert_close(layers_at(run, k), [best + (start - best) @ power], scale([best, start]))


@pytest.mark.slow
@pytest.mark.parametrize("reshuffled", [False, True])
def test_a_full_batch_without_replacement_is_descent(reshuffled):
    net = network(WIDTHS)
    batch = gf.Minibatch(len(X), reshuffled=reshuffled)
    stochastic = descend(gf.Problem(DATA, [batch]), net, 30, replicas=2)
    plain = descend(gf.Problem(DATA), net, 30)
    for path, k in itertools.product(range(2), range(31)):
        expected = layers_at(plain, k)
        assert_close(layers_at(stochastic, path, k), expected, scale(expected), 1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero_padding", "hidden_rotations"])
def test_paths_of_sgd_follow_changes_of_the_hidden_layer(name):
    """Units without weights stay without, and rotated units stay rotated: no noise sees them."""
    problem = gf.Problem(DATA, [gf.Minibatch(2), gf.LabelNoise(0.3), gf.WeightDecay(0.1)])
    descent, key = gf.GradientDescent(H), jax.random.key(3)
    gt.assert_equivariant(descent, name, network((2, 2, 2)), problem, t1=20 * H, key=key)


def test_imbalance_of_scalar_layers_shrinks_by_its_factor():
    """u <- u (1 - h^2 r^2) for two scalar layers, r = dL/dP."""
    net = gf.DeepLinear([[[1.7]], [[0.4]]])
    sxx, syx = 1.2, 0.5
    problem = gf.Problem(gf.Regression.from_moments([[sxx]], [[syx]]), [gf.LabelNoise(0.4)])
    run = descend(problem, net, 25, replicas=2, h=0.1)
    w1, w2 = (w[:, :, 0, 0] for w in run.weights)
    u = w1**2 - w2**2
    r = (w1[:, :-1] - w1[:, 1:]) / (0.1 * w2[:, :-1])
    np.testing.assert_allclose(u[:, 1:], u[:, :-1] * (1 - 0.01 * r**2), rtol=0, atol=1e-13)
