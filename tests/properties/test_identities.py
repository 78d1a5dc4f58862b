"""What holds exactly for the gradient and for one step of (stochastic) gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled, evaluate
from hypothesis import given, strategies as st
from reference import as_numpy, assert_close, balancedness, scale
from strategies import cases, networks

import gradflow as gf
import gradflow.testing as gt
from gradflow.loss import pull_back
from gradflow.random.streams import Stream

STEPS = st.sampled_from([0.1, 0.01, 0.5])
RATES = st.sampled_from([0.3, 0.0, 2.0])


def moved(weights, gradient, h):
    """One step W - h g."""
    return [w - h * g for w, g in zip(as_numpy(weights), as_numpy(gradient), strict=True)]


def assert_noether(weights, gradient):
    """W_{i+1}^T g_{i+1} = g_i W_i^T."""
    w, g = as_numpy(weights), as_numpy(gradient)
    left = [above.T @ change for above, change in zip(w[1:], g[1:], strict=True)]
    right = [change @ below.T for below, change in zip(w[:-1], g[:-1], strict=True)]
    assert_close(left, right, scale(w, g, left))


def assert_one_step(weights, gradient, h, rate=0.0):
    """G after a step of descent is (1 - h rate)^2 G + h^2 (g_{i+1}^T g_{i+1} - g_i g_i^T).

    `gradient` is that of the data, without the decay of the given rate.
    """
    total = [g + rate * np.asarray(w) for g, w in zip(as_numpy(gradient), weights, strict=True)]
    after = gf.balancedness(gf.DeepLinear(moved(weights, total, h)))
    expected = [
        (1.0 - h * rate) ** 2 * b + h**2 * c
        for b, c in zip(balancedness(as_numpy(weights)), balancedness(gradient), strict=True)
    ]
    assert_close(after, expected, scale(weights, [h * g for g in total]))


@given(cases())
def test_neighbouring_gradients_are_paired(case):
    net, data = case
    assert_noether(net.weights, evaluate(net, data).gradient)


@given(st.data())
def test_pairing_holds_for_every_end_to_end_gradient(given_):
    net = given_.draw(networks(min_depth=2))
    shape = (net.widths[-1], net.widths[0])
    m = given_.draw(gt.matrices(*shape))
    assert_noether(net.weights, pull_back(net.weights, jnp.asarray(m)))


@given(cases())
def test_every_layer_has_the_same_radial_gradient(case):
    net, data = case
    e = evaluate(net, data)
    radial = [np.sum(w * g) for w, g in zip(as_numpy(net.weights), e.gradient, strict=True)]
    common = np.sum(np.asarray(e.m) * np.asarray(net.end_to_end))
    assert_close(radial, [common] * net.depth, scale(net.weights, e.gradient, [common]))


@given(cases(), STEPS)
def test_one_step_of_descent(case, h):
    net, data = case
    assert_one_step(net.weights, as_numpy(evaluate(net, data).gradient), h)


@pytest.mark.slow
@given(cases(), STEPS, RATES)
def test_one_step_of_descent_with_weight_decay(case, h, rate):
    net, data = case
    problem = gf.Problem(data, [gf.WeightDecay(rate)])
    pure = as_numpy(evaluate(net, data).gradient)
    expected = [g + rate * np.asarray(w) for g, w in zip(pure, net.weights, strict=True)]
    total = problem.averaged_gradient(net.weights)
    assert_close(total, expected, scale(net.weights, expected))
    assert_one_step(net.weights, pure, h, rate)


@compiled
def drawn_gradient(problem, net, seed):
    draw = problem.draw(Stream(jax.random.key(seed), jnp.arange(1), jnp.arange(1)), net.widths)
    first = jax.tree.map(lambda leaf: leaf[0, ..., 0], draw)
    return problem.sampled_gradient(net.weights, first)


SAMPLES = {"population": False, "n": 4}
POPULATIONS = {"population": True, "whitened": False}

NOISES = {
    "labels": (SAMPLES, [gf.LabelNoise(0.5)]),
    "inputs": (SAMPLES, [gf.InputNoise(0.5)]),
    "batch": (SAMPLES, [gf.Minibatch(2, replacement=True)]),
    "epochs": (SAMPLES, [gf.Minibatch(1, reshuffled=True), gf.LabelNoise(0.2)]),
    "all": (SAMPLES, [gf.InputNoise(0.3), gf.Minibatch(1), gf.LabelNoise(0.5)]),
    "population": (POPULATIONS, [gf.InputNoise(0.3), gf.LabelNoise(0.5)]),
    "online": (POPULATIONS, [gf.Minibatch(2), gf.LabelNoise(0.5), gf.InputNoise(0.3)]),
}


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("name", NOISES)
@given(given_=st.data(), h=STEPS, rate=RATES, seed=gt.seeds())
def test_one_step_of_sgd_obeys_the_identity_on_every_path(name, given_, h, rate, seed):
    kind, noises = NOISES[name]
    net = given_.draw(networks((3, 1, 2) if name in ("all", "online") else (1, 2, 2, 3, 2)))
    drawn = given_.draw(gt.data(net.widths[0], net.widths[-1], **kind))
    problem = gf.Problem(drawn, [*noises, gf.WeightDecay(rate)])
    total = as_numpy(drawn_gradient(problem, net, jnp.asarray(seed)))
    pure = [g - rate * np.asarray(w) for g, w in zip(total, net.weights, strict=True)]
    assert_noether(net.weights, pure)
    assert_one_step(net.weights, pure, h, rate)


@given(st.data())
def test_averaged_loss_and_gradient_of_every_combination(given_):
    """L(S + sigma^2 I) + rate/2 |W|^2, whatever the order; its gradient by complex steps."""
    net = given_.draw(networks((3, 1, 2)))
    drawn = given_.draw(gt.data(3, 2))
    kinds = ["WeightDecay", "LabelNoise", "InputNoise", "Minibatch"]
    chosen = given_.draw(gt.regularizers(drawn, kinds))
    problem = gf.Problem(drawn, chosen)
    rate = sum(float(r.rate) for r in chosen if isinstance(r, gf.WeightDecay))
    variance = sum(float(r.std) ** 2 for r in chosen if isinstance(r, gf.InputNoise))
    moments = (np.asarray(drawn.sxx) + variance * np.eye(3), *as_numpy((drawn.syx, drawn.syy)))

    def expected(layers):
        return reference.loss(layers, *moments) + rate / 2 * sum(np.sum(w * w) for w in layers)

    layers = as_numpy(net.weights)
    slope = reference.complex_step_gradient(expected, layers)
    size = scale(layers, slope, moments)
    assert_close([problem.averaged_loss(net.weights)], [expected(layers)], size)
    assert_close(problem.averaged_gradient(net.weights), slope, size)
    assert problem.is_stochastic == any(not isinstance(r, gf.WeightDecay) for r in chosen)
