"""The strategies of gradflow.testing: what they draw, what they refuse, and how they shrink."""

import itertools

import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, find, given, settings, strategies as st
from reference import as_numpy

import gradflow as gf
import gradflow.testing as gt
from gradflow.testing.strategies.networks import USUAL_SHAPES
from gradflow.testing.strategies.regularizers import KINDS

SEARCH = settings(
    max_examples=300, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def smallest(strategy, condition=lambda value: True):
    return find(strategy, condition, settings=SEARCH)


def layers(net):
    return [w.tolist() for w in as_numpy(net.weights)]


# Shrinking


@pytest.mark.slow
def test_a_network_shrinks_to_one_zero():
    assert layers(smallest(gt.networks())) == [[[0.0]]]


def test_a_network_that_must_do_something_shrinks_to_ones():
    net = smallest(gt.networks(min_depth=2), lambda n: np.any(np.asarray(n.end_to_end)))
    assert layers(net) == [[[1.0]], [[1.0]]]


def test_a_network_that_must_be_unbalanced_shrinks_to_whole_numbers():
    net = smallest(gt.networks(), lambda n: float(gf.imbalance(n)) > 1)
    assert sorted(layers(net)) == [[[0.0]], [[2.0]]]


@pytest.mark.slow
def test_layers_that_must_not_commute_shrink_to_few_ones():
    def condition(net):
        a, b = as_numpy(net.weights)
        return not np.allclose(a @ b, b @ a)

    entries = np.array(layers(smallest(gt.networks(widths=(2, 2, 2)), condition)))
    assert np.count_nonzero(entries) == 2
    assert set(np.abs(entries[entries != 0])) == {1.0}


def test_an_entry_in_a_narrow_range_shrinks_to_few_digits():
    assert smallest(gt.entries(), lambda x: 0.31 < x < 0.39) in (0.32, 0.35)
    assert smallest(gt.entries(), lambda x: x < -0.7) in (-0.8, -1.0)


@pytest.mark.slow
def test_balanced_and_conditioned_networks_shrink_to_the_identity():
    balanced = gt.networks(widths=(2, 2, 2), imbalance=0)
    assert layers(smallest(balanced)) == [np.eye(2).tolist()] * 2
    conditioned = smallest(gt.networks(widths=(2, 3), conditioning=4))
    assert layers(conditioned) == [np.eye(3, 2).tolist()]


@pytest.mark.slow
def test_imbalance_shrinks_to_a_heavy_first_layer():
    assert layers(smallest(gt.networks(imbalance=3.0))) == [[[2.0]], [[1.0]]]


@pytest.mark.slow
def test_data_shrink_to_the_identity_covariance_without_target():
    data = smallest(gt.data(2, 1))
    assert data.is_population and float(data.n) == 1.0
    np.testing.assert_array_equal(data.sxx, np.eye(2))
    assert not np.any(data.syx) and not np.any(data.syy)


def test_a_target_shrinks_to_a_one():
    data = smallest(gt.data(2, 1), lambda d: np.any(np.asarray(d.syx)))
    np.testing.assert_array_equal(data.sxx, np.eye(2))
    assert np.sort(np.asarray(data.syx).ravel()).tolist() == [0.0, 1.0]


@pytest.mark.slow
def test_problems_shrink_to_no_regularizer_and_keep_only_the_guilty_one():
    drawn = gt.problems(widths=(1, 1), regularizers=["WeightDecay", "LabelNoise", "Minibatch"])
    assert smallest(drawn)[0].regularizers == ()
    problem, _ = smallest(drawn, lambda case: case[0].is_stochastic)
    assert len(problem.regularizers) == 1


@pytest.mark.slow
def test_orthogonal_and_invertible_matrices_shrink_to_the_identity():
    np.testing.assert_array_equal(smallest(gt.orthogonal(3)), np.eye(3))
    np.testing.assert_array_equal(smallest(gt.invertible(3)), np.eye(3))
    turned = smallest(gt.orthogonal(2), lambda q: np.linalg.det(q) < 0)
    assert np.count_nonzero(turned - np.diag(np.diag(turned))) == 0


# What is drawn


@given(gt.orthogonal(3), gt.invertible(3), gt.conditioned(3, 2, 5.0))
def test_matrices_are_what_they_are_called(rotation, change, tall):
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.cond(change) < 1e4
    values = np.linalg.svd(tall, compute_uv=False)
    assert values[0] <= 1 + 1e-12 and values[0] / values[-1] <= 5 * (1 + 1e-12)


@given(gt.networks(max_width=2, max_depth=3))
def test_limits_of_width_and_depth(net):
    assert net.depth <= 3 and max(net.widths) <= 2
    assert all(np.all(np.abs(w) <= 2) for w in net.weights)


@given(gt.networks(depth=st.integers(2, 6)))
def test_any_depth_has_shapes(net):
    assert 2 <= net.depth <= 6


@given(gt.shapes(depth=2, every=True, max_width=3))
def test_every_shape(shape):
    assert len(shape) == 3 and all(1 <= d <= 3 for d in shape)


def test_the_usual_shapes_are_all_drawn_and_are_few():
    seen = set()

    @given(gt.shapes())
    @settings(max_examples=200)
    def collect(shape):
        seen.add(shape)

    collect()
    assert seen == set(USUAL_SHAPES)


@given(gt.networks(min_depth=2, imbalance=0))
def test_imbalance_zero_is_balance(net):
    weights = as_numpy(net.weights)
    size = reference.scale(weights)
    for gram in reference.balancedness(weights):
        assert np.max(np.abs(gram)) <= 1e-12 * size


@given(st.sampled_from([0.5, 3.0]), st.data())
def test_imbalance_is_met(wanted, given_):
    net = given_.draw(gt.networks(imbalance=wanted))
    norms = [float(np.sum(w * w)) for w in as_numpy(net.weights)]
    assert max(norms) - min(norms) == pytest.approx(wanted, rel=1e-12)


@given(gt.networks(conditioning=3.0))
def test_conditioning_of_layers_is_bounded(net):
    for w in as_numpy(net.weights):
        assert np.linalg.cond(w) <= 3 * (1 + 1e-12)


@given(gt.data(3, 2, conditioning=4.0))
def test_conditioning_of_data_is_bounded(data):
    assert np.linalg.cond(np.asarray(data.sxx)) <= 4 * (1 + 1e-9)


@given(gt.data(3, 2, population=False, n=5))
def test_samples_have_their_number(data):
    assert data.x.shape == (5, 3) and data.y.shape == (5, 2)


def test_data_of_every_kind_are_drawn():
    seen = set()

    @given(gt.data(2, 1))
    @settings(max_examples=60)
    def collect(data):
        singular = np.linalg.matrix_rank(np.asarray(data.sxx)) < 2
        white = np.array_equal(data.sxx, np.eye(2))
        seen.add((data.is_population, singular, white))

    collect()
    assert {(True, False, True), (True, True, False), (True, False, False)} <= seen
    assert {(False, True, False), (False, False, False)} <= seen


@pytest.mark.slow
def test_every_kind_of_regularizer_is_drawn():
    data = gf.Regression.from_samples([[1.0], [0.5]], [[1.0], [2.0]])
    seen = set()

    @given(gt.regularizers(data))
    @settings(max_examples=60)
    def collect(chosen):
        kinds = [type(r).__name__ for r in chosen]
        assert len(kinds) == len(set(kinds))
        gf.Problem(data, chosen)
        seen.update(kinds)

    collect()
    assert seen == set(KINDS)


@given(gt.problems(regularizers=["WeightDecay", "Dropout"], max_depth=2))
def test_problems_fit_and_hold_only_the_kinds_asked_for(case):
    problem, net = case
    assert (net.widths[0], net.widths[-1]) == (problem.data.d_in, problem.data.d_out)
    allowed = {"WeightDecay"} if net.depth == 1 else {"WeightDecay", "Dropout"}
    assert {type(r).__name__ for r in problem.regularizers} <= allowed


# Step sizes


def descend(net, data, h, steps):
    """Losses of plain descent in NumPy."""
    sxx, syx, syy = as_numpy((data.sxx, data.syx, data.syy))
    weights, losses = as_numpy(net.weights), []
    for _ in range(steps):
        losses.append(reference.loss(weights, sxx, syx, syy))
        slopes = reference.gradient(weights, sxx, syx)
        weights = [w - h * g for w, g in zip(weights, slopes, strict=True)]
    return np.array(losses)


@settings(max_examples=15)
@given(st.data())
def test_the_loss_falls_at_every_step_size_drawn(given_):
    problem, net = given_.draw(gt.problems(widths=(2, 2, 2), population=True))
    h = given_.draw(gt.step_sizes(problem, net))
    top = float(gf.sharpness(net, problem.data))
    assert 0 < h <= 0.5 * min(1.0, 2 / top if top > 0 else 1.0) * (1 + 1e-9)
    losses = descend(net, problem.data, h, 64)
    assert np.all(np.diff(losses) <= 1e-12 * losses[0])
    assert float(f"{h:.0e}") == h


def test_the_limit_is_two_over_the_sharpness_where_that_falls_along_the_path():
    """Depth 1: the Hessian is S everywhere."""
    problem = gf.Problem(gf.Regression.from_moments([[4.0, 0.0], [0.0, 1.0]], [[1.0, 1.0]]))
    net = gf.DeepLinear([[[0.0, 2.0]]])
    assert gt.stability_limit(problem, net) == pytest.approx(0.5, rel=1e-12)
    decayed = gf.Problem(problem.data, [gf.WeightDecay(1.0)])
    assert gt.stability_limit(decayed, net) == pytest.approx(2 / 5, rel=1e-12)


def test_the_limit_sees_sharpness_that_rises_along_the_path():
    """From near zero, two scalar layers end at sharpness 2 |T|."""
    problem = gf.Problem(gf.Regression.whitened([[9.0]]))
    net = gf.DeepLinear([[[0.3]], [[0.3]]])
    assert float(gf.sharpness(net, problem.data)) < 9.1
    assert 0.5 * 2 / 18 <= gt.stability_limit(problem, net) <= 2 / 18 * (1 + 1e-9)


# What is refused


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: gt.networks(depth=0), "depth must be"),
        (lambda: gt.networks(depth=1, imbalance=1.0), "one layer has nothing to differ from"),
        (lambda: gt.networks(imbalance=-1.0), "imbalance must be"),
        (lambda: gt.networks(depth=2, widths=(1, 1, 1)), "give one of the two"),
        (lambda: gt.networks(conditioning=0.5), "conditioning must be"),
        (lambda: gt.shapes(min_depth=3, max_depth=2), "min_depth <= max_depth"),
        (lambda: gt.shapes(max_width=0), "max_width must be"),
        (lambda: gt.data(0, 1), "d_in must be"),
        (lambda: gt.data(2, 1, population=False, whitened=True), "conditioning=1"),
        (lambda: gt.data(3, 1, population=False, n=2, conditioning=2.0), "n >= 3"),
        (lambda: gt.regularizers(gf.Regression.whitened(1.0), ["Decay"]), "'Decay' is not known"),
    ],
)
def test_refusals_say_what_to_do(call, part):
    with pytest.raises(ValueError, match=part):
        call()


def test_a_fraction_is_checked():
    problem, net = gf.Problem(gf.Regression.whitened(1.0)), gf.DeepLinear([[[1.0]]])
    with pytest.raises(ValueError, match="fraction"):
        gt.step_sizes(problem, net, fraction=1.5)


def test_one_name_is_no_list_of_kinds():
    with pytest.raises(TypeError, match=r"\['Dropout'\]"):
        gt.regularizers(gf.Regression.whitened(1.0), "Dropout")


def test_seeds_make_keys():
    assert smallest(gt.seeds()) == 0


def test_shapes_in_order_of_size():
    sizes = [(len(w), max(w)) for w in USUAL_SHAPES]
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(sizes))
