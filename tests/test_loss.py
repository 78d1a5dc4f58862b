"""Loss and gradients against plain NumPy, complex steps and automatic differentiation."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled, evaluate, per_sample_gradients
from hypothesis import given, strategies as st
from reference import as_numpy, assert_close, scale
from strategies import cases, matrices, networks, samples

import gradflow as gf
from gradflow.loss import on_inputs, pull_back, push_forward


def moments(data):
    return as_numpy((data.sxx, data.syx, data.syy))


@pytest.mark.slow
@given(cases())
def test_loss_and_gradient_against_complex_steps(case):
    net, data = case
    layers, (sxx, syx, syy) = as_numpy(net.weights), moments(data)
    e = evaluate(net, data)
    slope = reference.complex_step_gradient(lambda w: reference.loss(w, sxx, syx, syy), layers)
    size = scale(layers, slope, [sxx, syx, syy])
    assert_close([e.loss], [reference.loss(layers, sxx, syx, syy)], size)
    assert_close(e.gradient, slope, size)


@given(cases(kind=samples))
def test_loss_is_half_the_mean_squared_error(case):
    net, data = case
    errors = np.asarray(data.x) @ reference.end_to_end(as_numpy(net.weights)).T - np.asarray(data.y)
    expected = np.sum(errors**2) / (2 * len(errors))
    size = scale(net.weights, [errors], [data.x, data.y])
    assert_close([evaluate(net, data).loss], [expected], size)


@pytest.mark.slow
@given(cases())
def test_loss_is_never_below_the_irreducible_loss(case):
    net, data = case
    size = scale(net.weights, [data.syy, data.sxx])
    assert float(evaluate(net, data).loss) >= float(data.irreducible_loss) - 1e-12 * size


@compiled
def differentiated(net, data):
    return jax.grad(lambda w: gf.loss(gf.DeepLinear(w), data))(net.weights)


@pytest.mark.slow
@given(cases())
def test_gradient_against_automatic_differentiation(case):
    net, data = case
    expected = differentiated(net, data)
    assert_close(evaluate(net, data).gradient, expected, scale(net.weights, expected, [data.syx]))


@given(cases())
def test_end_to_end_gradient_is_the_slope_in_the_end_to_end_matrix(case):
    net, data = case
    sxx, syx, syy = moments(data)
    p = reference.end_to_end(as_numpy(net.weights))
    (slope,) = reference.complex_step_gradient(lambda w: reference.loss(w, sxx, syx, syy), [p])
    assert_close([evaluate(net, data).m], [slope], scale([p, slope, sxx, syx]))


@given(cases(kind=samples))
def test_gradient_of_every_sample(case):
    net, data = case
    layers, x, y = as_numpy(net.weights), np.asarray(data.x), np.asarray(data.y)
    expected = [
        reference.gradient(layers, np.outer(row, row), np.outer(target, row))
        for row, target in zip(x, y, strict=True)
    ]
    stacked = [np.stack(g) for g in zip(*expected, strict=True)]
    assert_close(per_sample_gradients(net, data), stacked, scale(layers, stacked, [x, y]))


@given(st.data())
def test_pull_back_is_the_adjoint_of_push_forward(given_):
    """<M, dP> = sum_i <g_i, V_i>, both against the formulas with A_i and B_i."""
    net = given_.draw(networks())
    layers = as_numpy(net.weights)
    m = given_.draw(matrices(net.widths[-1], net.widths[0]))
    tangent = [given_.draw(matrices(*w.shape)) for w in layers]
    back = pull_back(net.weights, jnp.asarray(m))
    ahead = push_forward(net.weights, tuple(jnp.asarray(v) for v in tangent))
    expected = sum(
        reference.above(layers, i) @ v @ reference.below(layers, i)
        for i, v in enumerate(tangent, start=1)
    )
    size = scale(layers, back, [expected])
    assert_close(back, reference.pull_back(layers, m), size)
    assert_close([ahead], [expected], size)
    adjoint = sum(np.sum(g * v) for g, v in zip(as_numpy(back), tangent, strict=True))
    assert_close([adjoint], [np.sum(m * np.asarray(ahead))], size)


NET = gf.DeepLinear([np.ones((1, 2))])


@pytest.mark.parametrize(
    "function", [gf.loss, gf.gradient, gf.end_to_end_gradient, gf.per_sample_gradients]
)
@pytest.mark.parametrize("target", [[[1.0]], [[1.0, 2.0], [3.0, 4.0]]])
def test_network_and_data_must_fit(function, target):
    data = gf.Regression.whitened(target)
    message = (
        f"net: widths (2, 1) do not fit the data with {data.d_in} inputs and {data.d_out} targets; "
        f"the first width must be {data.d_in} and the last {data.d_out}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        function(NET, data)


def test_a_population_has_no_samples():
    with pytest.raises(ValueError, match=r"population data have no samples.*from_samples"):
        gf.per_sample_gradients(NET, gf.Regression.whitened([[1.0, 2.0]]))


def test_white_inputs_are_recognised():
    """Exactly the identity, by whatever way the data were built, and nothing near it."""
    target = np.array([[1.0, 0.5]])
    x = np.random.default_rng(0).normal(size=(20, 2))
    white = [
        gf.Regression.whitened(target),
        gf.Regression.from_moments(np.eye(2), target),
        gf.Regression.from_samples(x, x @ target.T, whiten=True),
    ]
    assert all(data.is_white for data in white)
    near = np.eye(2)
    near[0, 1] = near[1, 0] = 1e-12
    for data in (
        gf.Regression.from_moments(near, target),
        gf.Regression.from_moments(2.0 * np.eye(2), target),
        gf.Regression.from_samples(x, x @ target.T),
    ):
        assert not data.is_white


@pytest.mark.parametrize("covariance", [np.eye(2), np.array([[1.0, 0.3], [0.3, 2.0]])])
@pytest.mark.parametrize("std", [0.0, 0.5])
def test_derivatives_with_respect_to_the_moments(covariance, std):
    r"""Of $\langle C, P (S + \sigma^2 I) - Y\rangle$: $P^\top C$ by $S$, $-C$ by $Y$."""
    rng = np.random.default_rng(1)
    net = gf.DeepLinear([rng.normal(size=(3, 2)), rng.normal(size=(2, 3))])
    data = gf.Regression.from_moments(covariance, rng.normal(size=(2, 2)))
    c = rng.normal(size=(2, 2))

    def value(moments):
        moved = eqx.tree_at(lambda d: (d.sxx, d.syx), data, moments)
        return jnp.sum(c * (on_inputs(net.end_to_end, moved, std**2) - moved.syx))

    p = reference.end_to_end(as_numpy(net.weights))
    expected = np.sum(c * (p @ (covariance + std**2 * np.eye(2)) - np.asarray(data.syx)))
    np.testing.assert_allclose(value((data.sxx, data.syx)), expected, rtol=1e-13)
    by_sxx, by_syx = jax.grad(value)((data.sxx, data.syx))
    np.testing.assert_allclose(by_sxx, p.T @ c, rtol=1e-13)
    np.testing.assert_allclose(by_syx, -c, rtol=1e-13)


def test_what_the_message_about_a_problem_advises():
    """1/2 mean |2 x - y|^2 by hand, and 1/2 rate |w|^2 more with the regularizer."""
    data = gf.Regression.from_samples([[1.0], [2.0]], [1.0, 3.0])
    net, problem = gf.DeepLinear([[[2.0]]]), gf.Problem(data, [gf.WeightDecay(0.5)])
    assert float(gf.loss(net, problem.data)) == pytest.approx(0.5)
    assert float(problem.averaged_loss(net.weights)) == pytest.approx(0.5 + 0.25 * 4.0)
