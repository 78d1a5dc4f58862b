"""Imbalance and balancedness."""

import jax.numpy as jnp
import numpy as np
from compiled import evaluate
from hypothesis import given
from reference import as_numpy, assert_close, balancedness, scale
from strategies import cases, networks

import gradflow as gf
from gradflow.geometry import squared_norms
from gradflow.geometry.imbalance import gram_differences


@given(cases())
def test_imbalance_and_balancedness(case):
    net, data = case
    layers = as_numpy(net.weights)
    e = evaluate(net, data)
    norms = [np.linalg.norm(w) ** 2 for w in layers]
    size = scale(layers)
    assert_close(e.balancedness, balancedness(layers), size)
    traces = [np.trace(g) for g in e.balancedness]
    assert_close(traces, np.diff(norms), size)
    largest = max(abs(a - b) for a in norms for b in norms)
    assert_close([e.imbalance], [largest], size)
    assert_close([squared_norms(net)], [np.array(norms)], size)


def test_one_layer_is_balanced_with_itself():
    net = gf.DeepLinear([[[1.0, 2.0], [3.0, 4.0]]])
    assert gf.balancedness(net) == []
    assert float(gf.imbalance(net)) == 0.0


def test_imbalance_is_between_the_largest_and_the_smallest_layer():
    net = gf.DeepLinear([[[2.0]], [[-3.0]], [[1.0]]])
    assert float(gf.imbalance(net)) == 9.0 - 1.0
    assert [g.item() for g in gf.balancedness(net)] == [9.0 - 4.0, 1.0 - 9.0]


@given(networks(min_depth=2))
def test_gram_differences_take_any_layers(net):
    changes = tuple(3.0 * w for w in net.weights)
    expected = [9.0 * g for g in balancedness(as_numpy(net.weights))]
    assert_close(gram_differences(changes), expected, scale(changes))
    assert all(jnp.array_equal(g, g.T) for g in gram_differences(changes))
