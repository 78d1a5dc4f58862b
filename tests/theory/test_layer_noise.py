"""Noise inside the network against the listing of every draw, at first order in its variance.

The covariance of the stochastic gradient is exact for every level of the noise: two values of a
mask and three Gauss-Hermite nodes of a normal average it, as the gradient is at most quadratic in
each random number. Its derivative at level zero, by Richardson extrapolation, is what is predicted.
"""

import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled
from reference import as_numpy, assert_close, mean_and_covariance, scale
from training import unflatten

import gradflow as gf
from gradflow.random.streams import Stream
from gradflow.regularizers import DropConnect, Dropout, GradientNoise, WeightNoise
from gradflow.theory import noise_covariance
from gradflow.theory.layer_noise import (
    layer_noise_cross,
    layer_noise_normal,
    perturbation_covariance,
    tangential_normal_covariance,
)
from gradflow.theory.slow_noise import has_tangential_noise, tangential_factor

LEVEL = 1e-3


def dropout(share=1.0, **options):
    """Dropout whose factors have `share` times the level for their variance."""
    return lambda v: Dropout(v * share / (1.0 + v * share), **options)


def connect(share=1.0, **options):
    return lambda v: DropConnect(v * share / (1.0 + v * share), **options)


def shaken(share=1.0, **options):
    return lambda v: WeightNoise(np.sqrt(v * share), **options)


def always(r):
    return lambda v: r


RNG = np.random.default_rng(7)
X1, Y1 = np.array([[1.2], [0.4], [-0.7]]), np.array([[-0.7], [0.9], [0.3]])
X2, Y2 = RNG.normal(size=(3, 2)), RNG.normal(size=(3, 2))
LINE, PLANE = (X1, Y1), (X2, Y2)
SHORT = (X1[:2], Y1[:2])
FLAT = (np.outer([1.0, -0.5, 2.0], [0.6, 0.8]), Y1)  # the second moment is singular
S, Y = np.array([[1.3, 0.4], [0.4, 0.8]]), np.array([[0.7, -0.5]])
GAUSS = gf.Regression.from_moments(S, Y, [[1.6]], n=3)
LABELS, INPUTS = always(gf.LabelNoise(0.5)), always(gf.InputNoise(0.4))
ONE_ROW, TWO_ROWS = always(gf.Minibatch(1)), always(gf.Minibatch(2))
ONLINE = always(gf.Minibatch(1))

CASES = {
    "dropout": (LINE, (1, 3, 1), [dropout()]),
    "dropout, rectangular": (PLANE, (2, 3, 2), [dropout()]),
    "dropout, depth 3": (SHORT, (1, 2, 2, 1), [dropout()]),
    "dropout, depth 4": (SHORT, (1, 2, 1, 2, 1), [dropout()]),
    "dropout, one layer": (LINE, (1, 2, 2, 1), [dropout(layers=[2], distribution="gaussian")]),
    "two dropouts": (SHORT, (1, 2, 1), [dropout(0.5), dropout(distribution="gaussian")]),
    "dropout, singular": (FLAT, (2, 2, 1), [dropout()]),
    "dropout, batch": (LINE, (1, 2, 2, 1), [dropout(), TWO_ROWS]),
    "dropout, inputs, labels": (SHORT, (1, 2, 1), [dropout(), INPUTS, LABELS]),
    "dropout, batch, inputs": (LINE, (1, 2, 2, 1), [dropout(), ONE_ROW, INPUTS, LABELS]),
    "dropout, population": (GAUSS, (2, 2, 2, 1), [dropout()]),
    "dropout, population, inputs": (GAUSS, (2, 2, 1), [dropout(), INPUTS]),
    "dropout, online": (GAUSS, (2, 2, 2, 1), [dropout(), ONLINE]),
    "dropout, online, inputs": (GAUSS, (2, 2, 1), [dropout(), ONLINE, INPUTS]),
    "weights": (LINE, (1, 2, 1), [shaken()]),
    "weights, depth 3, labels": (SHORT, (1, 2, 2, 1), [shaken(layers=[1, 3]), LABELS]),
    "weights, depth 1, batch": (PLANE, (2, 2), [shaken(), TWO_ROWS]),
    "weights, batch, inputs": (LINE, (1, 2, 1), [shaken(), ONE_ROW, INPUTS]),
    "weights, population": (GAUSS, (2, 2, 1), [shaken(), LABELS]),
    "weights, online": (GAUSS, (2, 2, 1), [shaken(), ONLINE]),
    "anticorrelated": (LINE, (1, 2, 1), [shaken(anticorrelated=True), ONE_ROW]),
    "DropConnect": (PLANE, (2, 2, 2), [connect()]),
    "DropConnect, depth 3, batch": (LINE, (1, 2, 2, 1), [connect(), ONE_ROW]),
    "DropConnect, labels": (GAUSS, (2, 2, 1), [connect(layers=[2]), LABELS]),
    "DropConnect, noise, dropout": (
        LINE,
        (1, 2, 1),
        [connect(), shaken(0.7, layers=[1]), dropout(0.5), ONE_ROW],
    ),
}


def make(name, level):
    data, widths, kinds = CASES[name]
    data = data if isinstance(data, gf.Regression) else gf.Regression.from_samples(*data)
    problem = gf.Problem(data, [kind(level) for kind in kinds])
    return problem, minimum(problem, widths)


def minimum(problem, widths):
    """Random layers, the last one with the correction of least norm."""
    inverse = np.linalg.pinv(np.asarray(problem.input_moment), rcond=1e-10)
    goal = np.asarray(problem.data.syx) @ inverse
    rng = np.random.default_rng(len(widths))
    layers = [rng.normal(size=pair[::-1]) for pair in itertools.pairwise(widths)]
    below = reference.below(layers, len(layers))
    layers[-1] = layers[-1] + (goal - layers[-1] @ below) @ np.linalg.pinv(below)
    np.testing.assert_allclose(reference.end_to_end(layers), goal, atol=1e-12)
    return layers


def every_draw(problem, widths):
    """Every draw and its probability, for normals by Gauss-Hermite nodes."""
    key = jax.random.key_data(jax.random.key(0))
    one = jnp.zeros((1,), jnp.uint32)
    drawn = eqx.filter_eval_shape(
        lambda k, s, p: problem.draw(Stream(k, s, p), widths), key, one, one
    )
    leaves, weights = [], []
    for part, r in itertools.zip_longest(drawn, problem.regularizers):
        for leaf in jax.tree.leaves(part):
            size = int(np.prod(leaf.shape[1:-1]))
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                values = np.array(list(reference.batches(3, r.batch_size, False)))
                chances = np.full(len(values), 1.0 / len(values))
            elif leaf.dtype == jnp.bool_:
                values = np.array(list(itertools.product([False, True], repeat=size)))
                rate = float(r.rate)
                chances = np.prod(np.where(values, 1.0 - rate, rate), axis=1)
            else:
                values, chances = reference.gauss_hermite(size, 3)
            leaves.append(values.reshape(-1, *leaf.shape[1:-1]))
            weights.append(chances)
    index = np.array(list(itertools.product(*[range(len(w)) for w in weights])))
    chance = np.prod([w[index[:, i]] for i, w in enumerate(weights)], axis=0)
    shaped = [values[index[:, i]] for i, values in enumerate(leaves)]
    np.testing.assert_allclose(chance.sum(), 1.0)
    return jax.tree.unflatten(jax.tree.structure(drawn), shaped), chance


@compiled
def gradients(problem, weights, draws):
    """The stochastic gradient of every draw, at the weights that noise stays in."""

    def one(draw):
        shift = problem.weight_shift(weights, draw)
        at = tuple(w + s for w, s in zip(weights, shift, strict=True))
        return jnp.concatenate([g.ravel() for g in problem.sampled_gradient(at, draw)])

    return jax.vmap(one)(draws)


class Predicted(NamedTuple):
    normal: jax.Array
    moved: jax.Array
    crossed: tuple
    tangential: jax.Array


@compiled
def predicted(problem, weights):
    factor = tangential_factor(problem, weights)
    return Predicted(
        layer_noise_normal(problem, weights),
        perturbation_covariance(problem, weights),
        tangential_normal_covariance(problem, weights),
        factor @ factor.T,
    )


compiled_normal = compiled(layer_noise_normal)


@compiled
def many(problem, weights, key):
    """The stochastic gradients of 100000 draws."""
    widths = (weights[0].shape[1], *(w.shape[0] for w in weights))
    steps, paths = jnp.arange(100, dtype=jnp.uint32), jnp.arange(1000, dtype=jnp.uint32)
    draws = problem.draw(Stream(key, steps, paths), widths)

    def one(draw):
        return jnp.concatenate([g.ravel() for g in problem.sampled_gradient(weights, draw)])

    return jax.vmap(jax.vmap(one, in_axes=-1), in_axes=0)(draws).reshape(100_000, -1)


def covariance(problem, layers):
    weights = tuple(map(jnp.asarray, layers))
    widths = (layers[0].shape[1], *(w.shape[0] for w in layers))
    draws, chance = every_draw(problem, widths)
    return mean_and_covariance(np.asarray(gradients(problem, weights, draws)), chance)[1]


def leading(values):
    """The derivative at 0 of a function with values at 0, LEVEL, LEVEL/2 and LEVEL/4."""
    steps = LEVEL / np.array([1.0, 2.0, 4.0])
    first, half, quarter = [(v - values[0]) / s for v, s in zip(values[1:], steps, strict=True)]
    return (first - 6.0 * half + 8.0 * quarter) / 3.0


def noise_of_moved(name, layers, directions):
    """sum_u (C(T + d_u) + C(T - d_u) - 2 C(T)) / 2 of the noise on M from the data."""
    data, _, kinds = CASES[name]
    data = data if isinstance(data, gf.Regression) else gf.Regression.from_samples(*data)
    outside = [k(0.0) for k in kinds]
    kept = [r for r in outside if not isinstance(r, Dropout | DropConnect | WeightNoise)]
    problem, p = gf.Problem(data, kept), reference.end_to_end(layers)
    if not kept:
        return np.zeros((p.size, p.size))
    total = -len(directions) * covariance(problem, [p])
    for d in directions:
        total = total + (covariance(problem, [p + d]) + covariance(problem, [p - d])) / 2
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_against_every_draw(name):
    problem, layers = make(name, 1.0)
    weights = tuple(map(jnp.asarray, layers))
    levels = LEVEL / np.array([np.inf, 1.0, 2.0, 4.0])
    exact = leading([covariance(make(name, v)[0], layers) for v in levels])
    values, vectors = np.linalg.eigh(np.asarray(problem.input_moment))
    root = vectors * np.sqrt(np.clip(values, 0.0, None)) @ vectors.T
    normal = reference.jacobian(layers) @ np.kron(np.eye(problem.data.d_out), root)
    along = np.eye(len(normal)) - normal @ np.linalg.pinv(normal, rcond=1e-7)

    found = [predicted(make(name, v)[0], weights) for v in levels]
    found = jax.tree.map(lambda *values: leading(list(map(np.asarray, values))), *found)
    values, vectors = np.linalg.eigh(found.moved)
    inverse = np.kron(np.eye(problem.data.d_out), np.linalg.pinv(root, rcond=1e-7))
    columns = (inverse @ vectors * np.sqrt(np.clip(values, 0.0, None))).T
    directions = columns.reshape(-1, problem.data.d_out, problem.data.d_in)
    pull = reference.jacobian(layers)
    moved = pull @ noise_of_moved(name, layers, directions) @ pull.T

    size = np.abs(exact).max()
    assert size > 0.01
    expected = normal.T @ (exact - moved) @ normal
    np.testing.assert_allclose(found.normal, expected, atol=1e-6 * scale([normal]) * size)
    np.testing.assert_allclose(found.tangential, along @ exact @ along, atol=1e-6 * size)
    crossed = np.concatenate([np.reshape(c, (len(c), -1)) for c in found.crossed], axis=1)
    np.testing.assert_allclose(
        crossed, normal.T @ exact @ along, atol=1e-6 * scale([normal]) * size
    )
    has = np.abs(along @ exact @ along).max() > 1e-6 * size
    assert has_tangential_noise(problem) == (has or len(layers) == 1)


# Closed forms


WIDE = (3, 4, 3, 2)


def wide(*regularizers, residual=0.3, depth=3):
    """A problem on a Gaussian population, and one of its minima."""
    rng = np.random.default_rng(2)
    root, syx = rng.normal(size=(3, 3)), rng.normal(size=(2, 3))
    sxx = root @ root.T
    syy = syx @ np.linalg.solve(sxx, syx.T) + residual**2 * np.eye(2)
    problem = gf.Problem(gf.Regression.from_moments(sxx, syx, syy, n=4), regularizers)
    widths = WIDE if depth == 3 else (3, 4, 2)
    return problem, minimum(problem, widths)


def frame(problem, layers):
    """Columns J^T e_a, and the projector on the tangent space."""
    values, vectors = np.linalg.eigh(np.asarray(problem.input_moment))
    root = vectors * np.sqrt(values) @ vectors.T
    normal = reference.jacobian(layers) @ np.kron(np.eye(problem.data.d_out), root)
    return normal, np.eye(len(normal)) - normal @ np.linalg.pinv(normal)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, [1, 3]], ids=["all", "two layers"])
def test_noise_on_the_weights_alone_is_the_hessian_times_the_noise(layers):
    """Cov(z) = s^2 H D H with D the noisy layers, nothing of it tangential."""
    problem, w = wide(WeightNoise(0.2, layers=layers))
    data = problem.data
    hessian = reference.hessian(w, np.asarray(data.sxx), np.asarray(data.syx))
    noisy = [v.size * [layers is None or i in layers] for i, v in enumerate(w, start=1)]
    covariance = 0.04 * hessian * np.concatenate(noisy) @ hessian
    normal, _ = frame(problem, w)
    found = predicted(problem, tuple(map(jnp.asarray, w)))
    size = scale([normal]) * np.abs(covariance).max()
    np.testing.assert_allclose(found.normal, normal.T @ covariance @ normal, atol=1e-12 * size)
    assert not np.any(found.tangential)
    assert not has_tangential_noise(problem)


def test_noise_on_the_gradient():
    """Cov(z) = v I: tangential and normal parts are not correlated."""
    problem, layers = wide(GradientNoise(0.2), GradientNoise(0.1))
    normal, along = frame(problem, layers)
    found = predicted(problem, tuple(map(jnp.asarray, layers)))
    np.testing.assert_allclose(found.normal, 0.05 * normal.T @ normal, atol=1e-12)
    np.testing.assert_allclose(found.tangential, 0.05 * along, atol=1e-12)
    assert_close(found.crossed, [np.zeros_like(c) for c in found.crossed], scale([normal]))
    assert not np.any(found.moved)


def test_no_such_noise():
    problem, layers = wide(gf.LabelNoise(0.5), gf.Minibatch(2), gf.WeightDecay(0.1))
    found = predicted(problem, tuple(map(jnp.asarray, layers)))
    for part in jax.tree.leaves(found):
        assert not np.any(part)
    assert not has_tangential_noise(problem)


@pytest.mark.slow
def test_width_one_at_a_minimum_has_no_noise_by_dropping():
    """A dropped unit cuts the network, which then has no gradient; Gaussian factors have T^2."""
    data = gf.Regression.whitened([[1.3]])
    weights = (jnp.array([[2.0]]), jnp.array([[0.65]]))
    size = 4.0 + 0.65**2
    for kind, expected in (("bernoulli", 0.0), ("gaussian", 3 * 1.3**2 * size**2)):
        problem = gf.Problem(data, [Dropout(1e-6, kind)])
        found = layer_noise_normal(problem, weights) / 1e-6
        np.testing.assert_allclose(found, [[expected]], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_drift_of_noise_that_is_tangential_and_normal():
    """Sum over b of the derivative of the pull-back of column b of the response: complex steps."""
    problem, layers = wide(Dropout(0.1), gf.Minibatch(2), gf.LabelNoise(0.4))
    weights = tuple(map(jnp.asarray, layers))
    response = np.random.default_rng(3).normal(size=(6, 6))
    crossed = np.concatenate(
        [np.reshape(c, (6, -1)) for c in predicted(problem, weights).crossed], axis=1
    )
    root = np.asarray(problem.noisy_root)
    expected = 0.0
    for column, along in zip(response.T, crossed, strict=True):
        pull = column.reshape(2, 3) @ root
        moved = [w + 1e-30j * t for w, t in zip(layers, unflatten(along, layers), strict=True)]
        expected = expected + reference.flatten(reference.pull_back(moved, pull)).imag / 1e-30
    found = reference.flatten(as_numpy(compiled(layer_noise_cross)(problem, weights, response)))
    np.testing.assert_allclose(found, expected, atol=1e-12 * scale([expected]))
    assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("function", [layer_noise_normal, perturbation_covariance])
def test_depth_one_has_no_hidden_units(function):
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [Dropout(0.1)])
    with pytest.raises(ValueError, match="depth 1 has none"):
        function(problem, (jnp.ones((1, 1)),))


# Statistics


@pytest.mark.slow
def test_population_is_the_limit_of_samples():
    """Mean over 40 samples of 4000 Gaussian rows each, within 4 standard errors in every entry.

    The standard errors are below 2 % of the largest entry, so 10 % are found with certainty.
    """
    problem, layers = wide(Dropout(0.1), WeightNoise(0.1), gf.Minibatch(2))
    weights = tuple(map(jnp.asarray, layers))
    expected = np.asarray(compiled_normal(problem, weights))
    rng = np.random.default_rng(4)
    root = np.linalg.cholesky(np.asarray(problem.data.sxx))
    p = reference.end_to_end(layers)
    found = []
    for _ in range(40):
        x = rng.normal(size=(4000, 3)) @ root.T
        y = x @ p.T + 0.3 * rng.normal(size=(4000, 2))
        sample = gf.Problem(gf.Regression.from_samples(x, y), problem.regularizers)
        found.append(compiled_normal(sample, weights))
    found = np.array(found)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert error.max() < 0.02 * np.abs(expected).max()
    assert np.all(np.abs(found.mean(axis=0) - expected) < 4.0 * error)


@pytest.mark.slow
@pytest.mark.parametrize(("residual", "part"), [(0.01, "normal"), (2.0, "tangential")])
def test_sampled_gradients_of_everything_at_once(residual, part):
    """100000 draws at small levels: every entry of the covariance within 4.5 standard errors.

    The standard error of the trace is below 1.5 %, so that 10 % are found with certainty. Noise
    inside the network dominates in the part that is compared.
    """
    noises = [Dropout(1e-5, "gaussian"), WeightNoise(2e-3), gf.Minibatch(3), GradientNoise(2e-3)]
    problem, layers = wide(*noises, residual=residual, depth=2)
    weights = tuple(map(jnp.asarray, layers))
    normal, along = frame(problem, layers)
    found = predicted(problem, weights)
    z = many(problem, weights, jax.random.key_data(jax.random.key(5)))
    z = np.asarray(z - z.mean(axis=0))
    if part == "tangential":
        seen, expected = z @ along, np.asarray(found.tangential)
        assert np.trace(4e-6 * along) < 0.1 * np.trace(expected)
    else:
        online = gf.Problem(problem.data, [gf.Minibatch(3)])
        pull = reference.jacobian(layers)
        at_target = np.asarray(noise_covariance(online, weights))
        values, vectors = np.linalg.eigh(np.asarray(found.moved))
        inverse = np.kron(np.eye(2), np.asarray(problem.inverse_root))
        rise = np.zeros((6, 6))
        for d in (inverse @ vectors * np.sqrt(np.clip(values, 0.0, None))).T:
            p = jnp.asarray(reference.end_to_end(layers) + d.reshape(2, 3))
            rise += np.asarray(noise_covariance(online, (p,))) - at_target
        push = normal.T @ pull
        seen = z @ normal
        expected = push @ (at_target + rise) @ push.T + np.asarray(found.normal)
        assert np.trace(push @ at_target @ push.T) < 0.5 * np.trace(expected)
    products = seen[:, :, None] * seen[:, None, :]
    error = products.std(axis=0) / np.sqrt(len(seen))
    miss = np.abs(products.mean(axis=0) - expected)
    assert np.all(miss < 4.5 * error + 1e-12 * np.trace(expected))
    spread = np.sum(seen**2, axis=1).std() / np.sqrt(len(seen))
    assert spread < 0.015 * np.trace(expected)
