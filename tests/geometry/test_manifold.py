"""The minima manifold against singular value decompositions, SciPy and closed forms."""

import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import as_numpy
from scipy import optimize

import gradflow as gf
from gradflow.geometry import manifold
from gradflow.geometry.base import output_loss

tangent, retract = eqx.filter_jit(manifold.tangent), eqx.filter_jit(manifold.retract)

# Widths, and the rank of S where it is singular.
SHAPES = [((2, 3, 2), 2), ((3, 2), 2), ((1, 1, 1), 1), ((3, 1, 2), 3), ((4, 3, 5, 2), 2)]


def random_layers(widths, rng, size=0.8):
    return [size * rng.normal(size=(b, a)) for a, b in itertools.pairwise(widths)]


def data_with_minimum(layers, rank, rng):
    """Population data whose minima include the layers; S has the given rank."""
    x = rng.normal(size=(rank, layers[0].shape[1]))
    s = x.T @ x / rank
    return gf.Regression.from_moments(s, reference.end_to_end(layers) @ s)


def root_of(s):
    values, vectors = np.linalg.eigh(np.asarray(s))
    return (vectors * np.sqrt(np.where(values > 1e-12 * values[-1], values, 0.0))) @ vectors.T


def weighted_jacobian(layers, root):
    """Jt of the formulas, (d_N d_0, parameters)."""
    return (reference.jacobian(layers) @ np.kron(np.eye(layers[-1].shape[0]), root)).T


def unflatten(flat, layers):
    ends = np.cumsum([w.size for w in layers])[:-1]
    return [v.reshape(w.shape) for v, w in zip(np.split(flat, ends), layers, strict=True)]


def misfit(layers, s, target):
    return ((reference.end_to_end(layers) - target) @ root_of(s)).ravel()


@pytest.mark.few_cases(3)
@pytest.mark.parametrize(("widths", "rank"), SHAPES)
def test_tangent_is_the_projection_on_the_kernel(widths, rank):
    rng = np.random.default_rng(0)
    layers, velocity = random_layers(widths, rng), random_layers(widths, rng)
    data = data_with_minimum(layers, rank, rng)
    j = weighted_jacobian(layers, root_of(data.sxx))
    expected = reference.flatten(velocity)
    expected = expected - np.linalg.pinv(j, rcond=1e-7) @ (j @ expected)
    got = tangent(gf.DeepLinear(layers).weights, gf.DeepLinear(velocity).weights, output_loss(data))
    np.testing.assert_allclose(reference.flatten(as_numpy(got)), expected, atol=1e-12)


@pytest.mark.few_cases(2)
@pytest.mark.parametrize(("widths", "rank"), SHAPES)
def test_retraction_follows_gauss_newton_steps_to_rounding(widths, rank):
    rng = np.random.default_rng(1)
    layers = random_layers(widths, rng)
    data = data_with_minimum(layers, rank, rng)
    target = np.asarray(data.best_map)
    start = [w + 0.05 * rng.normal(size=w.shape) for w in layers]
    at = reference.flatten(start)
    for _ in range(8):
        here = unflatten(at, layers)
        j = weighted_jacobian(here, root_of(data.sxx))
        at = at - np.linalg.pinv(j, rcond=1e-7) @ misfit(here, data.sxx, target)
    loss = output_loss(data)
    got = retract(gf.DeepLinear(start).weights, loss)
    np.testing.assert_allclose(reference.flatten(as_numpy(got)), at, atol=1e-11)
    scale = np.linalg.norm(root_of(data.sxx)) * np.prod([np.linalg.norm(w) for w in got])
    assert np.linalg.norm(misfit(as_numpy(got), data.sxx, target)) <= 4e-16 * scale
    assert bool(manifold.is_on_manifold(got, loss))
    assert not bool(manifold.is_on_manifold(gf.DeepLinear(start).weights, loss))


def test_residual_is_relative_to_the_size_of_its_terms():
    data = gf.Regression.from_moments([[4.0]], [[8.0]])  # S^{1/2} = 2, T = 2
    weights = gf.DeepLinear([[[3.0]], [[1.0]]]).weights
    expected = 2.0 * (3.0 - 2.0) / (2.0 * 2.0 + 2.0 * 3.0)
    got = manifold.manifold_residual(weights, output_loss(data))
    np.testing.assert_allclose(float(got), expected, rtol=1e-15)
    # For the target 0 a layer may vanish, and a residual that vanishes with it counts as small.
    zero = gf.Regression.from_moments([[4.0]], [[0.0]])
    weights = gf.DeepLinear([[[3.0]], [[1e-20]]]).weights
    got = manifold.manifold_residual(weights, output_loss(zero))
    np.testing.assert_allclose(float(got), 3e-20 / 4.5, rtol=1e-14)


def test_noise_on_the_inputs_moves_the_manifold():
    """Ridge: the minima have P = Y (S + sigma^2 I)^{-1}."""
    rng = np.random.default_rng(2)
    s, y = np.diag([1.0, 0.3]), np.array([[0.5, -0.7]])
    problem = gf.Problem(gf.Regression.from_moments(s, y), [gf.InputNoise(0.6)])
    net = gf.DeepLinear(random_layers((2, 2, 1), rng))
    p = manifold.nearest_minimum(net, problem).end_to_end
    np.testing.assert_allclose(p, y @ np.linalg.inv(s + 0.36 * np.eye(2)), atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "rank"), [((4, 3, 5, 2), 2), ((3, 1, 2), 3), ((3, 4, 4), 2)])
def test_large_problems_get_the_same_tangents_and_retractions(widths, rank, monkeypatch):
    """The iterative pseudo-inverse against the decomposed one, rank-deficient K included."""
    rng = np.random.default_rng(3)
    layers = random_layers(widths, rng)
    loss = output_loss(data_with_minimum(layers, rank, rng))
    weights = gf.DeepLinear(layers).weights
    velocity = gf.DeepLinear(random_layers(widths, rng)).weights
    start = tuple(w + 0.05 * v for w, v in zip(weights, velocity, strict=True))
    expected = tangent(weights, velocity, loss), retract(start, loss)
    monkeypatch.setattr("gradflow.geometry.kernel.LARGEST_DENSE_KERNEL", 0)
    got = (
        jax.jit(lambda: manifold.tangent(weights, velocity, loss))(),
        jax.jit(lambda: manifold.retract(start, loss))(),
    )
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(
            reference.flatten(as_numpy(a)), reference.flatten(as_numpy(b)), atol=1e-11
        )


# Ranks and singular points


def layers_of_idle_units(widths, rng):
    """Layers with random zero channels: every pattern of ranks of the products occurs."""
    bases = [np.linalg.qr(rng.normal(size=(d, d)))[0] * rng.uniform(0.7, 1.4, d) for d in widths]
    layers = []
    for i, (below, above) in enumerate(itertools.pairwise(widths), start=1):
        channels = np.zeros((above, below))
        for k in range(min(above, below)):
            channels[k, rng.integers(below) if below <= above else k] = rng.random() < 0.6
        # At most one channel into and out of a unit, so that the layers split into strands.
        channels *= np.cumsum(channels, axis=0) <= 1
        layers.append(bases[i] @ channels @ np.linalg.inv(bases[i - 1]))
    return layers


def rank_of_nearby_minima(layers, rng):
    """The largest rank of dP at minima that SciPy finds around the layers."""
    target = reference.end_to_end(layers)
    largest = 0
    for _ in range(6):
        start = reference.flatten(layers)
        start = start + 0.03 * rng.normal(size=start.size)
        found = optimize.least_squares(
            lambda w: (reference.end_to_end(unflatten(w, layers)) - target).ravel(),
            start,
            jac=lambda w: reference.jacobian(unflatten(w, layers)).T,
            method="trf",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
        )
        assert np.abs(found.fun).max() < 1e-9
        values = np.linalg.svd(reference.jacobian(unflatten(found.x, layers)), compute_uv=False)
        largest = max(largest, int(np.sum(values > 1e-6)))
    return largest


ranks = eqx.filter_jit(
    lambda weights, loss: (
        manifold.jacobian_rank(weights, loss),
        jnp.any(manifold.singular_points(weights, loss)),
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(2, 2, 2), (3, 2, 3), (2, 3, 1), (2, 2, 2, 2), (1, 1, 1, 1)])
def test_singular_points_are_those_with_minima_of_larger_rank_nearby(widths):
    seen = set()
    for seed in range(25):
        rng = np.random.default_rng(seed)
        layers = layers_of_idle_units(widths, rng)
        data = gf.Regression.whitened(reference.end_to_end(layers))
        rank, singular = ranks(gf.DeepLinear(layers).weights, output_loss(data))
        expected = int(np.linalg.matrix_rank(reference.jacobian(layers), tol=1e-8))
        assert int(rank) == expected
        assert bool(singular) == (rank_of_nearby_minima(layers, rng) > expected)
        seen.add(bool(singular))
    assert seen == {False, True}


def test_reasons_name_the_layers():
    whitened = gf.Regression.whitened
    zero = gf.DeepLinear([np.zeros((1, 1)), np.zeros((1, 1))]).weights
    reason = manifold.why_singular(zero, output_loss(whitened([[0.0]])))
    assert reason is not None
    assert "target has rank 0" in reason
    assert "W_1 takes the rank from 1 to 0" in reason
    narrow = gf.DeepLinear([np.ones((1, 2)), np.ones((2, 1))]).weights
    reason = manifold.why_singular(narrow, output_loss(whitened(np.eye(2))))
    assert reason is not None
    assert "hidden width d_1 = 1 is below the rank 2" in reason
    thin = gf.DeepLinear([[[1.0]], [[1.0, 0.0], [0.0, 1e-9]] @ np.array([[0.0], [0.0]])]).weights
    assert manifold.why_singular(thin, output_loss(whitened([[0.0], [0.0]]))) is None
    # Curvatures 1 + 1, 1 + 1e-16, 1e-16 + 1, 1e-16 + 1e-16: three of four can be told from zero.
    faint = gf.DeepLinear([np.diag([1.0, 1e-8]), np.diag([1.0, 1e-8])]).weights
    reason = manifold.why_singular(faint, output_loss(whitened(np.diag([1.0, 1e-16]))))
    assert reason is not None


# Distance


@pytest.mark.parametrize(
    ("a", "b", "target"), [(2.0, 1.5, 1.0), (0.3, 1.4, 1.0), (-1.0, 0.4, -2.0), (3.0, 0.1, 0.5)]
)
def test_distance_to_a_hyperbola(a, b, target):
    """Stationary points of (x - a)^2 + (T/x - b)^2 are the roots of a quartic."""
    roots = np.roots([1.0, -a, 0.0, b * target, -(target**2)])
    x = roots[np.abs(roots.imag) < 1e-9].real
    expected = np.sqrt(np.min((x - a) ** 2 + (target / x - b) ** 2))
    net, data = gf.DeepLinear([[[a]], [[b]]]), gf.Regression.whitened([[target]])
    np.testing.assert_allclose(gf_distance(net, data), expected, rtol=1e-10)


def gf_distance(net, data):
    return float(manifold.distance_to_manifold(net, data))


def test_distance_at_depth_one_leaves_out_inputs_that_never_occur():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2, 3))
    data = gf.Regression.from_samples(x, x @ rng.normal(size=(3, 2)))
    w = rng.normal(size=(2, 3))
    occurring = np.linalg.pinv(x) @ x
    expected = np.linalg.norm((w - np.asarray(data.best_map)) @ occurring)
    np.testing.assert_allclose(gf_distance(gf.DeepLinear([w]), data), expected, rtol=1e-12)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("widths", "rank"), [((2, 3, 2), 2), ((3, 1, 2), 3), ((2, 2, 2, 1), 1)])
def test_distance_of_matrices(widths, rank):
    """Against SciPy from many starts: the misfit enters with a penalty of growing strength."""
    rng = np.random.default_rng(5)
    layers = random_layers(widths, rng)
    data = data_with_minimum(layers, rank, rng)
    root, target = root_of(data.sxx), np.asarray(data.best_map)
    start = [w + 0.4 * rng.normal(size=w.shape) for w in layers]
    flat, found = reference.flatten(start), []

    def penalised(w, strength):
        off = misfit(unflatten(w, layers), data.sxx, target)
        return np.concatenate([w - flat, strength * off])

    def derivative(w, strength):
        return np.concatenate(
            [np.eye(w.size), strength * weighted_jacobian(unflatten(w, layers), root)]
        )

    for _ in range(6):
        w = flat + 0.3 * rng.normal(size=flat.size)
        for strength in (1.0, 30.0, 1e3, 3e4, 1e6):
            tight = {"xtol": 1e-13, "ftol": 1e-13, "gtol": 1e-15, "args": (strength,)}
            w = optimize.least_squares(penalised, w, jac=derivative, **tight).x
        found.append(np.linalg.norm(w - flat))
    np.testing.assert_allclose(gf_distance(gf.DeepLinear(start), data), min(found), rtol=1e-7)


def test_distance_on_the_manifold_is_rounding():
    rng = np.random.default_rng(6)
    layers = random_layers((2, 3, 2), rng)
    data = data_with_minimum(layers, 2, rng)
    assert gf_distance(gf.DeepLinear(layers), data) < 1e-14


@pytest.mark.parametrize(
    ("layers", "target", "message"),
    [
        ([np.zeros((1, 1)), np.zeros((1, 1))], [[1.0]], "near a saddle such as W = 0"),
        ([np.ones((1, 2)), np.ones((2, 1))], np.eye(2), "hidden width d_1 = 1 is below"),
        ([np.ones((2, 2))], [[1.0]], "widths (2, 2) do not fit the data with 1 inputs"),
    ],
)
def test_no_nearest_minimum(layers, target, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        manifold.nearest_minimum(gf.DeepLinear(layers), gf.Regression.whitened(target))
