"""Networks: shapes, products of layers and refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import reference
from hypothesis import given
from reference import as_numpy, assert_close, scale
from strategies import networks

import gradflow as gf
from gradflow.network import end_to_end, left_products, right_products


def test_shape_of_a_network():
    net = gf.DeepLinear([np.ones((3, 2)), np.ones((3, 3)), np.ones((1, 3))])
    assert net.depth == 3
    assert net.widths == (2, 3, 3, 1)
    assert net.num_parameters == 6 + 9 + 3
    assert all(w.dtype == jnp.float64 for w in net.weights)


def test_integers_and_nested_lists_become_floating_point_layers():
    net = gf.DeepLinear([[[1, 2], [3, 4]], [[5, 6]]])
    assert net.widths == (2, 2, 1)
    assert np.array_equal(net.end_to_end, [[23.0, 34.0]])
    assert net.end_to_end.dtype == jnp.float64


def test_evaluation_acts_on_the_last_axis():
    net = gf.DeepLinear([[[1.0, 2.0]], [[3.0], [4.0]]])
    x = np.arange(12.0).reshape(3, 2, 2)
    expected = np.einsum("oi,abi->abo", [[3.0, 6.0], [4.0, 8.0]], x)
    np.testing.assert_allclose(net(jnp.asarray(x)), expected)
    np.testing.assert_allclose(net(jnp.array([1.0, 1.0])), [9.0, 12.0])


@given(networks())
def test_products_of_layers(net):
    layers = as_numpy(net.weights)
    depth = net.depth
    lefts, rights = left_products(net.weights), right_products(net.weights)
    size = scale(layers, [reference.end_to_end(layers)]) ** depth
    assert_close(lefts, [reference.above(layers, i) for i in range(1, depth + 1)], size)
    assert_close(rights, [reference.below(layers, i) for i in range(1, depth + 1)], size)
    factored = [a @ w @ b for a, w, b in zip(lefts, net.weights, rights, strict=True)]
    assert_close(factored, [reference.end_to_end(layers)] * depth, size)
    assert_close([end_to_end(net.weights)], [reference.end_to_end(layers)], size)
    assert np.array_equal(net.end_to_end, end_to_end(net.weights))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "weights: a network needs at least one layer; got an empty list."),
        ([np.ones(3)], "weights: W_1 must be a matrix (d_1, d_0); got shape (3,)."),
        (
            [np.ones((2, 2)), np.ones((2, 2, 1))],
            "weights: W_2 must be a matrix (d_2, d_1); got shape (2, 2, 1).",
        ),
        (
            [np.ones((0, 2))],
            "weights: W_1 has shape (0, 2); every width must be at least 1.",
        ),
        (
            [np.ones((3, 2)), np.ones((1, 2))],
            "weights: W_2 of shape (1, 2) cannot follow W_1 of shape (3, 2); W_2 needs 3 columns "
            "(first layer first).",
        ),
        (
            [np.ones((2, 2)), np.array([[1.0, np.nan]])],
            "weights: W_2 has entries that are not finite.",
        ),
        ([np.array([[np.inf]])], "weights: W_1 has entries that are not finite."),
        (
            [[[1.0]], [[1.0], [2.0, 3.0]]],
            "weights: W_2 must be a matrix (d_2, d_1) of real numbers with rows of equal length; "
            "got [[1.0], [2.0, 3.0]].",
        ),
        ([[["a"]]], "weights: W_1 must be a matrix (d_1, d_0) of real numbers"),
    ],
)
def test_refused_layers(weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gf.DeepLinear(weights)


def test_refused_input():
    net = gf.DeepLinear([np.ones((1, 2))])
    with pytest.raises(ValueError, match=re.escape("must have length d_0 = 2; got shape (3,)")):
        net(jnp.ones(3))


@pytest.mark.parametrize(
    "layer", [np.array([[1.0 + 0j]]), jnp.array([[1.0j]]), [[1j]], pd.DataFrame([[1j]])]
)
def test_complex_layers_are_refused_by_name(layer):
    with pytest.raises(
        TypeError, match=re.escape("weights: W_2 must be a matrix (d_2, d_1) of re")
    ):
        gf.DeepLinear([[[1.0]], layer])
    with pytest.raises(TypeError, match=r"W_1 .* complex"):
        jax.jit(lambda w: gf.DeepLinear([w]).end_to_end)(jnp.array([[1.0j]]))


def test_complex_numbers_are_refused_everywhere():
    net, target = gf.DeepLinear([[[1.0]], [[1.0]]]), np.array([[1.0 + 0j]])
    for make, name in (
        (lambda: gf.GradientDescent(np.array(0.1j)), "GradientDescent.step_size"),
        (lambda: gf.WeightDecay(0.1j), "WeightDecay.rate"),
        (lambda: gf.LabelNoise(np.complex128(0.1)), "LabelNoise.std"),
        (lambda: gf.GradientDescent(0.1, velocity=[target, target]), "velocity"),
        (lambda: gf.init.balanced(target, (1, 1, 1)), "init.target"),
        (lambda: gf.network_at(net, target, [[[0.0]]]), "p must"),
        (lambda: gf.network_at(net, [[1.0]], [target]), "g must"),
        (lambda: jax.jit(lambda t: gf.Regression.whitened(t).syx)(target), "data.target"),
    ):
        with pytest.raises(TypeError, match=name):
            make()
    with pytest.raises(ValueError, match=r"data\.target: needs real numbers, got complex128"):
        gf.Regression.whitened(target)
