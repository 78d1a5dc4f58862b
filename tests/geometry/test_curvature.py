"""Curvature against the Hessian that NumPy gets by complex steps of the gradient."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import evaluate, sharpness
from hypothesis import assume, given
from reference import as_numpy, assert_close, scale
from strategies import cases, whitened

import gradflow as gf
from gradflow.geometry import end_to_end_kernel
from gradflow.geometry.curvature import LARGEST_DENSE_HESSIAN, smallest_positive


def hessian(net, data):
    return reference.hessian(as_numpy(net.weights), np.asarray(data.sxx), np.asarray(data.syx))


def blocks(net):
    """Where every layer's entries lie among all parameters."""
    ends = np.cumsum([w.size for w in net.weights])
    return [slice(end - w.size, end) for w, end in zip(net.weights, ends, strict=True)]


def at_a_minimum(net, data):
    """Population data of the same inputs whose minima include the network."""
    p = reference.end_to_end(as_numpy(net.weights))
    return gf.Regression.from_moments(data.sxx, p @ np.asarray(data.sxx))


@given(cases())
def test_traces_and_sharpness(case):
    net, data = case
    full = hessian(net, data)
    traces = [np.trace(full[b, b]) for b in blocks(net)]
    size = scale(net.weights, [full])
    assert_close(evaluate(net, data).block_traces, traces, size)
    assert_close([gf.hessian_trace(net, data)], [np.trace(full)], size)
    assert_close([sharpness(net, data)], [np.linalg.eigvalsh((full + full.T) / 2)[-1]], size)


@given(cases())
def test_spectrum_at_a_minimum(case):
    net, data = case
    minimum = at_a_minimum(net, data)
    full = np.linalg.eigvalsh(hessian(net, minimum))
    spectrum = np.asarray(gf.minima_spectrum(net, minimum.sxx))
    short, long = sorted([spectrum[::-1], full[::-1]], key=len)
    padded = np.concatenate([short, np.zeros(len(long) - len(short))])
    assert_close([np.sort(padded)], [np.sort(long)], scale(net.weights, [full]), 1e-11)
    assert np.all(np.diff(spectrum) >= 0)


@given(cases())
def test_kernel(case):
    net, data = case
    layers = as_numpy(net.weights)
    left, singular, _ = np.linalg.svd(np.asarray(data.sxx))
    root = (left * np.sqrt(singular)) @ left.T
    kernel = np.asarray(end_to_end_kernel(net, data.sxx))
    expected = np.zeros_like(kernel)
    for i in range(1, net.depth + 1):
        a, b = reference.above(layers, i), reference.below(layers, i)
        jacobian = np.stack(
            [
                (a @ unit @ b @ root).ravel()
                for unit in np.eye(layers[i - 1].size).reshape(-1, *layers[i - 1].shape)
            ],
            axis=1,
        )
        expected = expected + jacobian @ jacobian.T
    # The square root of a singular matrix has an error of the root of the rounding error.
    assert_close([kernel], [expected], scale(layers, [expected, data.sxx]), 1e-7)


@given(cases(kind=whitened, min_depth=2))
def test_minima_are_valleys_along_changes_of_hidden_basis(case):
    """(X W_1, -W_2 X) lies in the kernel of a Hessian that has no negative eigenvalue."""
    net, data = case
    full = hessian(net, at_a_minimum(net, data))
    x = np.arange(1.0, 1.0 + net.widths[1] ** 2).reshape(net.widths[1], -1) / 4
    layers = as_numpy(net.weights)
    tangent = [x @ layers[0], -layers[1] @ x, *[np.zeros_like(w) for w in layers[2:]]]
    size = scale(layers, tangent, [full])
    assert_close([full @ reference.flatten(tangent)], [np.zeros(len(full))], size)
    assert np.linalg.eigvalsh(full)[0] >= -1e-11 * size


@given(cases(kind=whitened))
def test_sharpness_of_minima_has_a_lower_bound(case):
    """At least N s_1^{2 - 2/N} with s_1 the largest singular value of the target."""
    net, data = case
    minimum = at_a_minimum(net, data)
    top = np.linalg.norm(np.asarray(minimum.best_map), 2)
    assume(top > 1e-3)
    bound = net.depth * top ** (2.0 - 2.0 / net.depth)
    assert float(sharpness(net, minimum)) >= bound * (1 - 1e-10)


def test_sharpness_of_two_scalar_layers():
    w1, w2, sxx, b = 1.5, -0.4, 1.3, 0.7
    net = gf.DeepLinear([[[w1]], [[w2]]])
    data = gf.Regression.from_moments([[sxx]], [[b]])
    u = w1**2 - w2**2
    expected = (
        sxx * (w1**2 + w2**2) + np.sqrt(sxx**2 * u**2 + 4 * (2 * sxx * w1 * w2 - b) ** 2)
    ) / 2
    np.testing.assert_allclose(float(gf.sharpness(net, data)), expected, rtol=1e-13)
    np.testing.assert_allclose(float(gf.hessian_trace(net, data)), sxx * (w1**2 + w2**2))


def test_sharpness_refuses_a_hessian_that_does_not_fit():
    width = 1 + int(np.sqrt(LARGEST_DENSE_HESSIAN))
    net = gf.DeepLinear([np.eye(width)])
    message = f"the dense Hessian of {width**2} parameters is too large (limit 2000)"
    with pytest.raises(ValueError, match=re.escape(message)):
        gf.sharpness(net, gf.Regression.whitened(np.eye(width)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 2.0], 0.5),
        ([1e-17, 3e-16, 2.0], 2.0),
        ([1e-12, 1.0], 1e-12),
        ([0.0, 0.0], 0.0),
        ([-1e-18, 4.0], 4.0),
    ],
)
def test_smallest_positive_eigenvalue(values, expected):
    assert float(smallest_positive(jnp.array(values))) == expected
