"""Symmetries of loss, gradient, imbalance and training, on random networks and data."""

import jax
import numpy as np
import pytest
from compiled import evaluate, per_sample_gradients
from hypothesis import given, settings, strategies as st
from reference import as_numpy, assert_close, scale
from strategies import cases, samples, whitened

import gradflow as gf
import gradflow.testing as gt


def loss(net, data):
    return evaluate(net, data).loss


def gradient(net, data):
    return evaluate(net, data).gradient


def imbalance(net, data):
    return evaluate(net, data).imbalance


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotations", "hidden_changes", "input_scaling", "homogeneity"])
@given(case=cases(), seed=gt.seeds())
def test_loss_and_gradient_follow(name, case, seed):
    """Orthogonal and general changes of basis, x -> a x with W_1 -> W_1/a, y -> k^N y."""
    gt.assert_equivariant(loss, name, *case, seed=seed)
    gt.assert_equivariant(gradient, name, *case, seed=seed)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("name", ["zero_padding", "identity_layer"])
@given(given_=st.data(), seed=st.integers(0, 3))
def test_loss_and_gradient_follow_more_units_and_layers(name, given_, seed):
    shape = given_.draw(st.sampled_from([(1, 1), (3, 1, 2), (2, 3, 2, 1)]))
    net = given_.draw(gt.networks(widths=shape))
    data = given_.draw(samples(shape[0], shape[-1], rows=2))
    gt.assert_equivariant(loss, name, net, data, seed=seed)
    gt.assert_equivariant(gradient, name, net, data, seed=seed)


@pytest.mark.slow
@given(cases(kind=whitened), gt.seeds())
def test_loss_and_gradient_follow_reversal_on_whitened_data(case, seed):
    gt.assert_equivariant(loss, "reversal", *case, seed=seed)
    gt.assert_equivariant(gradient, "reversal", *case, seed=seed)


@given(cases(kind=whitened))
def test_reversal_turns_balancedness_around(case):
    net, _ = case
    mirrored = gf.DeepLinear([w.T for w in reversed(net.weights)])
    expected = [-np.asarray(g) for g in reversed(gf.balancedness(net))]
    assert_close(gf.balancedness(mirrored), expected, scale(net.weights))


@given(cases(), gt.seeds())
def test_imbalance_is_invariant_under_rotations(case, seed):
    gt.assert_equivariant(imbalance, "rotations", *case, seed=seed)


@given(cases(), gt.seeds())
def test_balancedness_turns_with_the_hidden_layers(case, seed):
    net, data = case
    turns = [np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0] for d in net.widths]
    moved = gf.DeepLinear(gt.change_of_basis("turns", turns).layers(as_numpy(net.weights)))
    before = evaluate(net, data).balancedness
    expected = [q @ np.asarray(g) @ q.T for g, q in zip(before, turns[1:-1], strict=True)]
    assert_close(evaluate(moved, data).balancedness, expected, scale(net.weights))


@pytest.mark.slow
@given(st.data())
def test_order_of_samples_does_not_matter(given_):
    net, data = given_.draw(cases(kind=samples))
    seed = given_.draw(gt.seeds())
    gt.assert_equivariant(loss, "sample_permutation", net, data, seed=seed)
    gt.assert_equivariant(gradient, "sample_permutation", net, data, seed=seed)
    order = np.array(given_.draw(st.permutations(range(data.x.shape[0]))))
    shuffled = gf.Regression.from_samples(data.x[order], data.y[order])
    each, moved = per_sample_gradients(net, data), per_sample_gradients(net, shuffled)
    assert_close(moved, [g[order] for g in each], scale(net.weights, *each, [data.x, data.y]))


@pytest.mark.slow
@given(cases(kind=samples))
def test_gradient_is_the_mean_of_the_gradients_of_the_samples(case):
    net, data = case
    each = per_sample_gradients(net, data)
    mean = [np.mean(np.asarray(g), axis=0) for g in each]
    assert_close(evaluate(net, data).gradient, mean, scale(net.weights, mean, [data.x, data.y]))


WALKS = ("rotations", "homogeneity", "reversal")


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKS)
@settings(max_examples=5)
@given(given_=st.data(), seed=gt.seeds())
def test_training_follows(name, given_, seed):
    """Flow and descent commute with every transformation that keeps the metric of the weights."""
    drawn = gt.problems(widths=(2, 2, 2), whitened=name == "reversal", population=True)
    problem, net = given_.draw(drawn)
    h = given_.draw(gt.step_sizes(problem, net, fraction=0.2))
    gt.assert_equivariant(gf.GradientFlow(), name, net, problem, seed=seed, t1=1.0)
    gt.assert_equivariant(gf.GradientDescent(h), name, net, problem, seed=seed, t1=20 * h)


@pytest.mark.slow
@settings(max_examples=5)
@given(gt.problems(widths=(2, 2, 2), population=True), gt.seeds())
def test_paths_of_label_noise_turn_with_the_hidden_layer(case, seed):
    problem, net = gf.Problem(case[0].data, [gf.LabelNoise(0.2)]), case[1]
    h, key = 0.5 * gt.stability_limit(*case), jax.random.key(seed)
    descent = gf.GradientDescent(h)
    gt.assert_equivariant(descent, "hidden_rotations", net, problem, seed=seed, t1=20 * h, key=key)
