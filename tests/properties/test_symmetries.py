"""Symmetries of loss, gradient and imbalance, on random networks and data."""

import numpy as np
from compiled import evaluate, per_sample_gradients
from hypothesis import given, strategies as st
from reference import as_numpy, assert_close, scale
from strategies import (
    ROWS,
    cases,
    invertible,
    networks,
    orthogonal,
    samples,
    whitened,
)

import gradflow as gf


def transformed(net, changes):
    """W_i -> C_i W_i C_{i-1}^{-1}."""
    weights = as_numpy(net.weights)
    return gf.DeepLinear(
        [
            after @ w @ np.linalg.inv(before)
            for w, before, after in zip(weights, changes[:-1], changes[1:], strict=True)
        ]
    )


def rotated(data, inputs, outputs):
    """The data of x -> inputs x, y -> outputs y."""
    if data.x is not None:
        return gf.Regression.from_samples(data.x @ inputs.T, data.y @ outputs.T)
    sxx, syx, syy = as_numpy((data.sxx, data.syx, data.syy))
    return gf.Regression.from_moments(
        inputs @ sxx @ inputs.T, outputs @ syx @ inputs.T, outputs @ syy @ outputs.T
    )


@given(st.data())
def test_gradient_is_equivariant_under_rotations_of_every_layer(given_):
    net, data = given_.draw(cases())
    turns = [given_.draw(orthogonal(d)) for d in net.widths]
    moved = transformed(net, turns)
    before = evaluate(net, data)
    after = evaluate(moved, rotated(data, turns[0], turns[-1]))
    expected = [
        q @ np.asarray(g) @ p.T
        for g, p, q in zip(before.gradient, turns[:-1], turns[1:], strict=True)
    ]
    size = scale(net.weights, expected, [data.sxx, data.syx, data.syy])
    assert_close(after.gradient, expected, size)
    assert_close([after.loss], [before.loss], size)
    conjugated = [
        q @ np.asarray(g) @ q.T for g, q in zip(before.balancedness, turns[1:-1], strict=True)
    ]
    assert_close(after.balancedness, conjugated, size)
    assert_close([after.imbalance], [before.imbalance], size)


@given(st.data())
def test_loss_is_invariant_under_changes_of_hidden_basis(given_):
    net, data = given_.draw(cases(min_depth=2))
    identity = [np.eye(net.widths[0]), np.eye(net.widths[-1])]
    hidden = [given_.draw(invertible(d)) for d in net.widths[1:-1]]
    changes = [identity[0], *hidden, identity[1]]
    moved = transformed(net, changes)
    before, after = evaluate(net, data), evaluate(moved, data)
    expected = [
        np.linalg.inv(s).T @ np.asarray(g) @ r.T
        for g, r, s in zip(before.gradient, changes[:-1], changes[1:], strict=True)
    ]
    size = scale(net.weights, moved.weights, expected, before.gradient, [data.sxx, data.syy])
    assert_close([after.loss], [before.loss], size)
    assert_close(after.gradient, expected, size)


@given(cases(kind=whitened))
def test_reversal_is_a_duality_on_whitened_data(case):
    net, data = case
    reversed_net = gf.DeepLinear([w.T for w in reversed(net.weights)])
    mirrored = gf.Regression.from_moments(
        np.eye(data.d_out), data.syx.T, np.asarray(data.syx.T @ data.syx)
    )
    original = gf.Regression.from_moments(
        np.eye(data.d_in), data.syx, np.asarray(data.syx @ data.syx.T)
    )
    before, after = evaluate(net, original), evaluate(reversed_net, mirrored)
    size = scale(net.weights, before.gradient, [data.syx])
    assert_close([after.loss], [before.loss], size)
    assert_close(after.gradient, [np.asarray(g).T for g in before.gradient[::-1]], size)
    assert_close(after.balancedness, [-np.asarray(g) for g in before.balancedness[::-1]], size)


@given(cases(), st.sampled_from([0.5, 2.0, -3.0, 0.1]))
def test_scaling_inputs_against_the_first_layer_keeps_the_loss(case, a):
    net, data = case
    first, *rest = net.weights
    stretch, one = a * np.eye(data.d_in), np.eye(data.d_out)
    before = evaluate(net, data)
    after = evaluate(gf.DeepLinear([first / a, *rest]), rotated(data, stretch, one))
    expected = [np.asarray(g) * (a if i == 0 else 1.0) for i, g in enumerate(before.gradient)]
    size = scale(net.weights, [first / a], expected, [data.sxx * a**2, data.syy])
    assert_close([after.loss], [before.loss], size)
    assert_close(after.gradient, expected, size)


@given(cases(), st.sampled_from([0.5, 2.0, -3.0]))
def test_loss_is_homogeneous_in_weights_and_targets(case, k):
    net, data = case
    power = k**net.depth
    before = evaluate(net, data)
    after = evaluate(
        gf.DeepLinear([k * w for w in net.weights]),
        rotated(data, np.eye(data.d_in), power * np.eye(data.d_out)),
    )
    expected = [k ** (2 * net.depth - 1) * np.asarray(g) for g in before.gradient]
    assert_close([after.loss], [power**2 * before.loss], scale([expected[0], power**2 * data.syy]))
    assert_close(after.gradient, expected, scale(expected, [power**2 * data.syy]))


@given(st.data())
def test_order_of_samples_does_not_matter(given_):
    net, data = given_.draw(cases(kind=samples))
    order = np.array(given_.draw(st.permutations(range(data.x.shape[0]))))
    shuffled = gf.Regression.from_samples(data.x[order], data.y[order])
    before, after = evaluate(net, data), evaluate(net, shuffled)
    size = scale(net.weights, before.gradient, [data.x, data.y])
    assert_close([after.loss], [before.loss], size)
    assert_close(after.gradient, before.gradient, size)
    each, moved = per_sample_gradients(net, data), per_sample_gradients(net, shuffled)
    assert_close(moved, [g[order] for g in each], size)


@given(cases(kind=samples))
def test_gradient_is_the_mean_of_the_gradients_of_the_samples(case):
    net, data = case
    each = per_sample_gradients(net, data)
    mean = [np.mean(np.asarray(g), axis=0) for g in each]
    assert_close(evaluate(net, data).gradient, mean, scale(net.weights, mean, [data.x, data.y]))


@given(st.data())
def test_hidden_units_without_weights_change_nothing(given_):
    shape = given_.draw(st.sampled_from([(1, 1, 1), (3, 1, 2), (2, 3, 2, 1)]))
    net = given_.draw(networks(shape))
    data = given_.draw(samples(shape[0], shape[-1], rows=ROWS[0]))
    last = net.depth - 1
    margins = [((0, int(i < last)), (0, int(i > 0))) for i in range(net.depth)]
    padded = gf.DeepLinear([np.pad(w, m) for w, m in zip(net.weights, margins, strict=True)])
    before, after = evaluate(net, data), evaluate(padded, data)
    expected = [np.pad(np.asarray(g), m) for g, m in zip(before.gradient, margins, strict=True)]
    size = scale(net.weights, expected, [data.x, data.y])
    assert_close([after.loss], [before.loss], size)
    assert_close(after.gradient, expected, size)
    assert_close([after.imbalance], [before.imbalance], size)


@given(st.data())
def test_an_identity_layer_changes_no_loss(given_):
    shape = given_.draw(st.sampled_from([(1, 1), (3, 1, 2)]))
    net = given_.draw(networks(shape))
    data = given_.draw(samples(shape[0], shape[-1], rows=ROWS[0]))
    place = given_.draw(st.integers(0, net.depth))
    layers = [*net.weights[:place], np.eye(shape[place]), *net.weights[place:]]
    before, after = evaluate(net, data), evaluate(gf.DeepLinear(layers), data)
    size = scale(net.weights, before.gradient, [data.x, data.y])
    assert_close([after.loss], [before.loss], size)
    others = [*after.gradient[:place], *after.gradient[place + 1 :]]
    assert_close(others, before.gradient, size)
