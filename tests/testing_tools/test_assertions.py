"""The assertions of gradflow.testing: right things pass, errors of one in a thousand do not."""

import itertools
import math

import jax
import numpy as np
import pytest
import reference
import training
from reference import as_numpy
from scipy.linalg import expm

import gradflow as gf
import gradflow.testing as gt

NET = gf.DeepLinear([[[0.5, -1.0], [1.0, 0.2], [0.3, 0.4]], [[1.0, 0.5, -0.7], [0.2, 1.0, 0.6]]])
DATA = gf.Regression.from_moments([[1.5, 0.2], [0.2, 0.7]], [[1.0, 0.3], [-0.2, 0.5]])
PROBLEM = gf.Problem(DATA)
WHITE = gf.Regression.whitened([[1.0, 0.3], [-0.2, 0.5]], residual=0.25)
SAMPLES = gf.Regression.from_samples(
    [[1.0, 0.3], [-0.5, 1.2], [0.7, -0.8]], [[0.5, -0.2], [1.5, 0.4], [-1.0, 0.9]]
)
PLANTED = 1e-3


def data_for(name):
    return {"reversal": WHITE, "sample_permutation": SAMPLES}.get(name, DATA)


def moments(data):
    return np.asarray(data.sxx), np.asarray(data.syx)


def own_gradient(net, data):
    return reference.gradient(as_numpy(net.weights), *moments(data))


def own_loss(net, data):
    return reference.loss(as_numpy(net.weights), *moments(data), np.asarray(data.syy))


def own_flow(change=lambda gradient: gradient):
    """Gradient flow by SciPy with a changed gradient, as a function of (weights, t)."""

    def flow(weights, t):
        layers = as_numpy(weights)

        def field(_, vector):
            w = training.unflatten(vector, layers)
            return -reference.flatten(change(reference.gradient(w, *moments(DATA))))

        solution = training.solve_ivp(
            field, (0.0, t), reference.flatten(layers), method="DOP853", rtol=1e-11, atol=1e-12
        )
        return training.unflatten(solution.y[:, -1], layers)

    return flow


def faster_first_layer(gradient):
    return [(1 + PLANTED) * gradient[0], *gradient[1:]]


# Conservation


@pytest.mark.slow
def test_gradient_flow_conserves_balancedness():
    gt.assert_conserves(gf.GradientFlow(), None, PROBLEM, NET, t1=3.0)


def test_a_flow_of_ones_own_conserves_balancedness():
    gt.assert_conserves(own_flow(), None, None, NET, t1=2.0, points=3)


def test_one_layer_that_learns_a_thousandth_faster_is_found():
    with pytest.raises(AssertionError) as caught:
        gt.assert_conserves(own_flow(faster_first_layer), None, PROBLEM, NET, t1=2.0, points=3)
    text = str(caught.value)
    assert "G_1 = W_2^T W_2 - W_1 W_1^T, entry [" in text and "is not conserved" in text
    assert "network of widths (2, 3, 2)" in text and "[ 1. ,  0.2]" in text
    assert "Sxx = [[1.5, 0.2]" in text and "allowed" in text


@pytest.mark.slow
def test_weight_decay_makes_balancedness_decay_at_twice_its_rate():
    problem = gf.Problem(DATA, [gf.WeightDecay(0.3)])
    flow = gf.GradientFlow()
    gt.assert_conserves(flow, None, problem, NET, t1=2.0, decay=0.6)
    with pytest.raises(AssertionError, match=r"does not decay as exp\(-0.6006 t\)"):
        gt.assert_conserves(flow, None, problem, NET, t1=2.0, decay=0.6 * (1 + PLANTED))


@pytest.mark.slow
def test_a_quantity_of_ones_own_and_the_size_of_what_is_allowed():
    def trace(net):
        return [np.trace(g) for g in gf.balancedness(net)]

    gt.assert_conserves(gf.GradientFlow(), trace, PROBLEM, NET, t1=1.0)
    with pytest.raises(AssertionError, match="imbalance is not conserved"):
        gt.assert_conserves(gf.GradientDescent(0.05), gf.imbalance, PROBLEM, NET, t1=1.0)
    gt.assert_conserves(gf.GradientDescent(0.05), gf.imbalance, PROBLEM, NET, t1=1.0, rtol=0.1)


def test_nan_is_not_conserved():
    with pytest.raises(AssertionError, match="observed nan"):
        gt.assert_conserves(gf.GradientFlow(), lambda net: math.nan, PROBLEM, NET, t1=1.0)


def test_a_diverging_run_is_shown():
    with pytest.raises(AssertionError, match=r"diverged before t = 100(.|\n)*network of widths"):
        gt.assert_conserves(gf.GradientDescent(5.0), None, PROBLEM, NET, t1=100.0)


def test_a_dynamics_needs_a_problem_and_a_function_gives_layers():
    with pytest.raises(TypeError, match=r"GradientFlow runs on a gradflow\.Problem"):
        gt.assert_conserves(gf.GradientFlow(), None, None, NET, t1=1.0)
    with pytest.raises(TypeError, match="must give the layers"):
        gt.assert_conserves(lambda weights, t: 3.0, None, None, NET, t1=1.0)


# Equivariance


@pytest.mark.parametrize("name", gt.TRANSFORMATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_follow_and_a_thousandth_in_one_layer_does_not(name, seed):
    data = data_for(name)
    gt.assert_equivariant(own_loss, name, NET, data, seed=seed)
    gt.assert_equivariant(own_gradient, name, NET, data, seed=seed)
    original = as_numpy(NET.weights)

    def planted(net, data):
        """Right at the network, off by a thousandth in the last layer everywhere else."""
        gradient = own_gradient(net, data)
        same = net.widths == NET.widths and np.array_equal(net.weights[0], original[0])
        same = same and np.array_equal(data.syx, data_for(name).syx)
        return gradient if same else [*gradient[:-1], (1 + PLANTED) * gradient[-1]]

    if name == "sample_permutation":
        return  # moments do not move at all, so there is nowhere else
    if name == "identity_layer":
        seed = next(s for s in range(9) if np.random.default_rng(s).integers(0, 3) < 2)
    with pytest.raises(AssertionError, match=f"does not follow {name}: g_"):
        gt.assert_equivariant(planted, name, NET, data, seed=seed)


def test_a_sum_over_samples_that_forgets_one_is_found():
    def forgetful(net, data):
        return own_gradient(net, gf.Regression.from_samples(data.x[:-1], data.y[:-1]))

    with pytest.raises(AssertionError, match="sample_permutation"):
        gt.assert_equivariant(forgetful, "sample_permutation", NET, SAMPLES)


def test_a_penalty_that_is_no_function_of_the_product_is_found():
    def penalised(net, data):
        return own_loss(net, data) + PLANTED * np.sum(np.abs(net.weights[0]))

    with pytest.raises(AssertionError) as caught:
        gt.assert_equivariant(penalised, "hidden_rotations", NET, DATA)
    text = str(caught.value)
    assert "the loss is off" in text and "changed network of widths (2, 3, 2)" in text


@pytest.mark.parametrize("name", ["rotations", "homogeneity"])
def test_training_follows(name):
    gt.assert_equivariant(gf.GradientFlow(), name, NET, PROBLEM, t1=1.0)
    gt.assert_equivariant(gf.GradientDescent(0.05), name, NET, PROBLEM, t1=1.0)


def test_a_flow_of_ones_own_follows_rotations_only_without_a_planted_error():
    def trained(change):
        def end(net, data):
            weights = as_numpy(net.weights)
            for _ in range(10):
                gradient = change(reference.gradient(weights, *moments(data)))
                weights = [w - 0.05 * g for w, g in zip(weights, gradient, strict=True)]
            return weights

        return end

    def dented(gradient):
        first = gradient[0].copy()
        first[0, 0] *= 1 + PLANTED
        return [first, *gradient[1:]]

    def whole(gradient):
        return gradient

    gt.assert_equivariant(trained(whole), "hidden_rotations", NET, DATA, returns="weights")
    with pytest.raises(AssertionError, match=r"W_\d\[\d, \d\] is off"):
        gt.assert_equivariant(trained(dented), "hidden_rotations", NET, DATA, returns="weights")


def test_random_paths_follow_only_what_leaves_the_data_alone():
    problem = gf.Problem(DATA, [gf.LabelNoise(0.3)])
    descent, key = gf.GradientDescent(0.05), jax.random.key(0)
    gt.assert_equivariant(descent, "hidden_rotations", NET, problem, t1=1.0, key=key)
    with pytest.raises(ValueError, match="assert_matches_in_distribution"):
        gt.assert_equivariant(descent, "input_rotation", NET, problem, t1=1.0, key=key)


def test_what_training_does_not_follow_is_refused():
    with pytest.raises(ValueError, match="training does not follow 'hidden_changes'"):
        gt.assert_equivariant(gf.GradientFlow(), "hidden_changes", NET, PROBLEM, t1=1.0)
    with pytest.raises(ValueError, match="give t1="):
        gt.assert_equivariant(gf.GradientFlow(), "rotations", NET, PROBLEM)
    with pytest.raises(ValueError, match="'mirror' is not known; choose from hidden_rotations"):
        gt.assert_equivariant(own_loss, "mirror", NET, DATA)
    with pytest.raises(ValueError, match="whitened=True"):
        gt.assert_equivariant(own_loss, "reversal", NET, DATA)
    with pytest.raises(ValueError, match="population=False"):
        gt.assert_equivariant(own_loss, "sample_permutation", NET, DATA)
    with pytest.raises(TypeError, match="the function gave layers"):
        gt.assert_equivariant(own_gradient, "rotations", NET, DATA, returns="loss")


def test_a_change_of_basis_of_ones_own():
    swap = gt.change_of_basis("swap", [np.eye(2), np.eye(3)[[1, 0, 2]], np.eye(2)])
    assert swap.clock == 1.0
    gt.assert_equivariant(own_gradient, swap, NET, DATA)


def test_layers_of_the_wrong_number_are_named():
    def missing(net, data):
        return own_gradient(net, data)[: 2 if net.widths == NET.widths else 1]

    with pytest.raises(AssertionError, match="gives layers of shapes"):
        gt.assert_equivariant(missing, "zero_padding", NET, DATA)


# Order

STEPS = (0.2, 0.1, 0.05)


def linear(h, method):
    """One layer: W' = (T - W) S, stepped by hand to t = 2."""
    sxx, syx = moments(DATA)
    best = syx @ np.linalg.inv(sxx)
    start = as_numpy(NET.weights)[0][:2]
    return [best + (start - best) @ method(h, sxx, round(2.0 / h))]


def euler(h, sxx, count):
    return np.linalg.matrix_power(np.eye(2) - h * sxx, count)


def midpoint(h, sxx, count):
    return np.linalg.matrix_power(np.eye(2) - h * sxx + h * h / 2 * sxx @ sxx, count)


def exact(h, sxx, count):
    return expm(-h * count * sxx)


ONE_LAYER = gf.DeepLinear([as_numpy(NET.weights)[0][:2]])


@pytest.mark.parametrize(("method", "order"), [(euler, 1), (midpoint, 2)])
def test_the_order_of_known_methods(method, order):
    def first(h):
        return linear(h, method)

    def second(h):
        return linear(h, exact)

    arguments = (None, ONE_LAYER, STEPS)
    slopes = gt.assert_order(first, second, order, *arguments, t1=2.0)
    assert len(slopes) == 2 and abs(slopes[-1] - order) < 0.2
    gt.assert_order(first, second, order - 0.5, *arguments, t1=2.0, at_least=True)
    for wrong in (order - 0.5, order + 0.5):
        with pytest.raises(AssertionError, match="between the two smallest step sizes"):
            gt.assert_order(first, second, wrong, *arguments, t1=2.0)


def test_a_planted_error_of_a_thousandth_spoils_the_order():
    def spoilt(h):
        return linear(h, lambda h, sxx, count: (1 + PLANTED) * midpoint(h, sxx, count))

    with pytest.raises(AssertionError) as caught:
        gt.assert_order(
            spoilt, lambda h: linear(h, exact), 2, None, ONE_LAYER, (0.02, 0.01), t1=2.0
        )
    text = str(caught.value)
    assert "distance   local slope" in text and "0.02" in text and "network of widths" in text


def test_descent_approaches_the_flow_with_order_one():
    flow = gf.GradientFlow(rtol=1e-11, atol=1e-12)
    gt.assert_order(gf.GradientDescent, flow, 1, PROBLEM, NET, STEPS, t1=1.0)
    gt.assert_order(
        gf.GradientDescent, flow, 1, PROBLEM, NET, STEPS, t1=1.0, observable=gf.imbalance
    )


def test_no_order_is_seen_in_rounding():
    def same(h):
        return linear(h, exact)

    gt.assert_order(same, same, 2, None, ONE_LAYER, STEPS, t1=2.0, at_least=True)
    with pytest.raises(AssertionError, match="no order can be seen"):
        gt.assert_order(same, same, 2, None, ONE_LAYER, STEPS, t1=2.0)


def test_step_sizes_must_divide_the_time():
    with pytest.raises(ValueError, match=r"is not a multiple of h = 0\.3"):
        gt.assert_order(gf.GradientDescent, gf.GradientFlow(), 1, PROBLEM, NET, [0.3, 0.5], t1=1.0)
    with pytest.raises(ValueError, match="two or more different numbers"):
        gt.assert_order(gf.GradientDescent, gf.GradientFlow(), 1, PROBLEM, NET, [0.1], t1=1.0)


# Distributions


def normals(seed, replicas=400):
    mixing = np.array([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, -0.3, 2.0]])
    return np.random.default_rng(seed).normal(size=(replicas, 3)) @ mixing.T


@pytest.mark.slow
def test_false_alarms_come_at_most_at_the_stated_rate():
    """300 pairs at 5 percent: 15 expected at most, 27 is 3.2 standard deviations above."""
    alarms = 0
    for k in range(300):
        try:
            gt.assert_matches_in_distribution(
                normals(2 * k, 100), normals(2 * k + 1, 100), false_alarm=0.05
            )
        except AssertionError:
            alarms += 1
    assert alarms <= 27


def test_the_stated_power_is_true():
    """A shift of the stated size is found in 90 of 100 pairs; 82 is 2.7 deviations below."""
    found = 0
    for k in range(100):
        a, b = normals(2 * k), normals(2 * k + 1)
        shift = gt.assert_matches_in_distribution(a, b, false_alarm=1e-6).detectable["component[2]"]
        try:
            gt.assert_matches_in_distribution(a, b + np.array([0.0, 0.0, shift]), false_alarm=1e-6)
        except AssertionError:
            found += 1
    assert found >= 82


CHANGES = {
    "mean": lambda a: a + np.array([0.0, 0.7, 0.0]),
    "variance": lambda a: a * [1.0, 1.0, 1.5],
    "covariance": lambda a: a * [-1.0, 1.0, 1.0],
    "fraction": lambda a: np.where(a > 0, 1.0, -1.0) * np.std(a, axis=0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_kind_of_difference_is_found(name):
    with pytest.raises(AssertionError, match=f"{name} of component") as caught:
        gt.assert_matches_in_distribution(normals(0), CHANGES[name](normals(1)))
    text = str(caught.value)
    assert (
        "400 replicas" in text and "false alarms: 0.001" in text and "power: a difference" in text
    )


@pytest.mark.slow
def test_sgd_matches_itself_and_not_five_times_the_noise():
    def product(net):
        return net.end_to_end

    small, large = (gf.Problem(DATA, [gf.LabelNoise(s)]) for s in (0.1, 0.5))
    options = {"net": NET, "t1": 1.0, "observable": product, "replicas": 64}
    descent = gf.GradientDescent(0.05)
    match = gt.assert_matches_in_distribution(descent, descent, problem=small, **options)
    assert match.tests == 4 + 4 + 10 and set(match.detectable) == {
        f"observed[{i}, {j}]" for i, j in itertools.product(range(2), range(2))
    }
    run = gf.simulate(
        large, NET, descent, t1=1.0, replicas=64, key=jax.random.key(5), observables=[], save=2
    )
    other = np.einsum("...ij,...jk->...ik", run.weights[1][:, -1], run.weights[0][:, -1])
    mine = gf.simulate(
        small, NET, descent, t1=1.0, replicas=64, key=jax.random.key(6), observables=[], save=2
    )
    with pytest.raises(AssertionError, match=r"variance of W_\d\[\d, \d\]"):
        gt.assert_matches_in_distribution(mine, run)
    with pytest.raises(ValueError, match="components; compare samples of the same quantity"):
        gt.assert_matches_in_distribution(mine, other)


def test_constants_match_only_themselves():
    a = np.ones((30, 1))
    gt.assert_matches_in_distribution(a, a)
    with pytest.raises(AssertionError, match="mean of component"):
        gt.assert_matches_in_distribution(a, a * (1 + PLANTED))


@pytest.mark.slow
def test_samples_that_cannot_be_compared():
    with pytest.raises(ValueError, match="20 or more"):
        gt.assert_matches_in_distribution(normals(0, 10), normals(1))
    with pytest.raises(ValueError, match="give net= and t1="):
        gt.assert_matches_in_distribution(gf.GradientDescent(0.1), normals(1), problem=PROBLEM)
    with pytest.raises(ValueError, match="not finite"):
        gt.assert_matches_in_distribution(np.full((30, 1), np.nan), normals(1))
    options = {"steps": 2, "save": 2, "replicas": 32, "key": jax.random.key(0)}
    paired = gf.simulate(
        gf.Problem(WHITE, [gf.LabelNoise(0.1)]),
        NET,
        gf.GradientDescent(0.1),
        normals=gf.Normals(antithetic=True),
        **options,
    )
    with pytest.raises(ValueError, match=r"second: .* antithetic pairs, .* run\[name\]\[::2\]"):
        gt.assert_matches_in_distribution(normals(1), paired)
    with pytest.raises(ValueError, match="false_alarm"):
        gt.assert_matches_in_distribution(normals(0), normals(1), false_alarm=1.0)
