"""Limits of training against closed forms, SciPy and NumPy; their derivatives against theory."""

import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import as_numpy
from scipy import integrate

import gradflow as gf
from gradflow.dynamics.base import over_paths
from gradflow.geometry import limit_maps
from gradflow.geometry.base import output_loss
from gradflow.geometry.limit_maps import Outcome

flow_limit = eqx.filter_jit(limit_maps.flow_limit)
descent_limit = eqx.filter_jit(limit_maps.descent_limit)


def random_layers(widths, rng, size=0.8):
    return [size * rng.normal(size=(b, a)) for a, b in itertools.pairwise(widths)]


def unflatten(flat, layers):
    ends = np.cumsum([w.size for w in layers])[:-1]
    return [v.reshape(w.shape) for v, w in zip(np.split(flat, ends), layers, strict=True)]


def limit_by_scipy(layers, data, time):
    s, y = np.asarray(data.sxx), np.asarray(data.syx)
    solution = integrate.solve_ivp(
        lambda t, w: -reference.flatten(reference.gradient(unflatten(w, layers), s, y)),
        (0.0, time),
        reference.flatten(layers),
        method="DOP853",
        rtol=1e-12,
        atol=1e-14,
    )
    return solution.y[:, -1]


@pytest.mark.few_cases(3)
@pytest.mark.parametrize(
    ("w1", "w2", "target", "sxx"),
    [(2.0, 0.1, 1.0, 1.0), (0.3, -0.2, -1.5, 0.4), (-1.0, -3.0, 0.5, 2.0), (1.0, -0.9, 0.7, 1.0)],
)
def test_limit_of_two_scalar_layers(w1, w2, target, sxx):
    """a^2 = (w1 + w2)^2 goes to 2T + sqrt(4T^2 + u^2) and w = (a +- u/a)/2."""
    u, sign = w1**2 - w2**2, np.sign(w1 + w2)
    a = sign * np.sqrt(2 * target + np.sqrt(4 * target**2 + u**2))
    expected = [(a + u / a) / 2, (a - u / a) / 2]
    net = gf.DeepLinear([[[w1]], [[w2]]])
    data = gf.Regression.from_moments([[sxx]], [[sxx * target]])
    limit, outcome = flow_limit(net.weights, output_loss(data))
    assert bool(outcome == Outcome.reached)
    np.testing.assert_allclose([w.item() for w in limit], expected, rtol=1e-11)


@pytest.mark.slow
def test_limit_of_one_layer():
    """T on the inputs that occur, the start on those that do not."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    data = gf.Regression.from_samples(x, x @ rng.normal(size=(3, 2)))
    occurring = np.linalg.pinv(x) @ x
    expected = np.asarray(data.best_map) @ occurring + w @ (np.eye(3) - occurring)
    net = gf.DeepLinear([w])
    for found in (gf_flow(net, data), limit_maps.descent_projection(net, data, 0.3)):
        np.testing.assert_allclose(found.weights[0], expected, atol=1e-11)


def gf_flow(net, data):
    return limit_maps.flow_projection(net, data)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "rows"), [((2, 3, 2), 5), ((3, 2, 4, 2), 2), ((2, 1, 3), 4)])
def test_limit_of_gradient_flow(widths, rows):
    """Against SciPy, with singular covariance and with a bottleneck just wide enough."""
    rng = np.random.default_rng(1)
    layers = random_layers(widths, rng)
    x = rng.normal(size=(rows, widths[0]))
    teacher = reference.end_to_end(random_layers(widths, rng))
    data = gf.Regression.from_samples(x, x @ teacher.T)
    net = gf.DeepLinear(layers)
    limit = as_numpy(gf_flow(net, data).weights)
    curvatures = np.linalg.eigvalsh(
        reference.hessian(limit, np.asarray(data.sxx), np.asarray(data.syx))
    )
    slowest = np.min(curvatures[curvatures > 1e-8])
    expected = limit_by_scipy(layers, data, 25.0 / slowest)
    np.testing.assert_allclose(reference.flatten(limit), expected, atol=1e-10)
    before, after = reference.balancedness(layers), reference.balancedness(limit)
    reference.assert_close(after, before, reference.scale(layers), 1e-11)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("h", "beta"), [(0.1, None), (0.05, 0.6)])
def test_limit_of_descent(h, beta):
    rng = np.random.default_rng(2)
    layers = random_layers((2, 3, 2), rng)
    data = gf.Regression.whitened([[1.0, 0.3], [-0.2, 0.8]])
    s, y = np.asarray(data.sxx), np.asarray(data.syx)
    at, velocity = layers, [np.zeros_like(w) for w in layers]
    for _ in range(20_000):
        gradient = reference.gradient(at, s, y)
        velocity = [(beta or 0.0) * v - h * g for v, g in zip(velocity, gradient, strict=True)]
        at = [w + v for w, v in zip(at, velocity, strict=True)]
    net = gf.DeepLinear(layers)
    found = limit_maps.descent_projection(net, data, h, beta or 0.0)
    reference.assert_close(as_numpy(found.weights), at, 1.0, 1e-11)


# Derivatives at the manifold. Everything on the right-hand side is NumPy.


class Minimum:
    """A minimum, its Hessian and third derivative, and maps with a step size of its scale."""

    def __init__(self):
        rng = np.random.default_rng(3)
        self.layers = random_layers((2, 2, 2), rng)
        x = rng.normal(size=(4, 2))
        self.s = x.T @ x / 4
        self.y = reference.end_to_end(self.layers) @ self.s
        self.data = gf.Regression.from_moments(self.s, self.y)
        self.flat = reference.flatten(self.layers)
        values, vectors = np.linalg.eigh(self.hessian(self.flat))
        self.values, self.fast = values[-4:], vectors[:, -4:]
        self.slow = vectors[:, :-4]
        assert values[-5] < 1e-12 < self.values[0]
        self.top = values[-1]

    def hessian(self, flat):
        return reference.hessian(unflatten(flat, self.layers), self.s, self.y)

    def third(self, u, v):
        """D^3 L[u, v]: derivative of the Hessian, a polynomial, along u."""
        e = 1e-4
        return (self.hessian(self.flat + e * u) - self.hessian(self.flat - e * u)) @ v / (2 * e)

    def tangent(self, v):
        return self.slow @ (self.slow.T @ v)

    def map_of(self, limit):
        """The limit map on vectors, over paths at once; further arguments are passed on."""
        loss = output_loss(self.data)

        @jax.jit
        def over(points, *settings):
            layers, at = [], 0
            for w in self.layers:
                layers.append(points[at : at + w.size].reshape(*w.shape, -1))
                at += w.size
            found, outcome = over_paths(lambda w: limit(w, loss, *settings))(tuple(layers))
            flat = jnp.concatenate([w.reshape(-1, w.shape[-1]) for w in found])
            return flat, jnp.all(outcome == Outcome.reached)

        def call(points, *settings):
            padded = np.concatenate([points, np.repeat(points[:1], 8 - len(points), axis=0)])
            ended, reached = over(jnp.asarray(padded).T, *settings)
            assert bool(reached)
            return np.asarray(ended).T[: len(points)]

        return call


@pytest.fixture(scope="module")
def minimum():
    return Minimum()


def second_derivative(call, flat, u, v, size=0.02):
    """By polarised central differences, extrapolated to order 4."""
    signs = [(1, 1), (-1, -1), (1, -1), (-1, 1)]
    points = [flat + e * (a * u + b * v) / 2 for e in (size, size / 2) for a, b in signs]
    found = call(np.array(points)).reshape(2, 4, -1)
    differences = found[:, 0] + found[:, 1] - found[:, 2] - found[:, 3]
    coarse, fine = differences[0] / size**2, differences[1] / (size / 2) ** 2
    return fine + (fine - coarse) / 3


@pytest.fixture(scope="module")
def maps(minimum):
    """The limits of gradient flow and of descent with a step size."""
    flow = minimum.map_of(lambda w, loss: limit_maps.flow_limit(w, loss, rtol=1e-13))
    return flow, minimum.map_of(limit_maps.descent_limit)


@pytest.fixture(scope="module", params=[0.0, 0.8, 1.6])
def map_and_step(request, minimum, maps):
    """Gradient flow (0) or descent at the given fraction of the inverse sharpness."""
    h = request.param / minimum.top
    return (maps[0], h) if h == 0.0 else (lambda points: maps[1](points, h), h)


@pytest.mark.slow
def test_first_derivative_is_the_tangent_projector(map_and_step, minimum):
    call, _ = map_and_step
    rng = np.random.default_rng(4)
    v = rng.normal(size=minimum.flat.size)
    e = 1e-3
    points = np.array([minimum.flat + k * e * v for k in (1, -1, 2, -2)])
    a, b, c, d = call(points)
    got = (8 * (a - b) - (c - d)) / (12 * e)
    np.testing.assert_allclose(got, minimum.tangent(v), atol=1e-8)


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5 * (1.0 + np.abs(expected).max()))
    assert np.abs(expected).max() > 0.005  # the identity says something


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), [(3, 3), (0, 3), (1, 2)])
def test_second_derivative_across_the_manifold(map_and_step, minimum, a, b):
    call, h = map_and_step
    u, v = minimum.fast[:, a], minimum.fast[:, b]
    la, lb = minimum.values[a], minimum.values[b]
    expected = -minimum.tangent(minimum.third(u, v)) / (la + lb - h * la * lb)
    # The normal part is of no account for the drift, which is tangent; the formula leaves it out.
    got = second_derivative(call, minimum.flat, u, v)
    close(minimum.tangent(got), expected)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("t", "b"), [(0, 0), (2, 3)])
def test_second_derivative_of_one_tangent(map_and_step, minimum, t, b):
    call, _ = map_and_step
    u, v = minimum.slow[:, t], minimum.fast[:, b]
    expected = -minimum.tangent(minimum.third(u, v)) / minimum.values[b]
    got = second_derivative(call, minimum.flat, u, v)
    close(got, expected)


@pytest.mark.parametrize(("t", "q"), [(0, 0), (1, 3)])
def test_second_derivative_of_two_tangents(map_and_step, minimum, t, q):
    call, _ = map_and_step
    third = minimum.third(minimum.slow[:, t], minimum.slow[:, q])
    expected = -minimum.fast @ (minimum.fast.T @ third / minimum.values)
    got = second_derivative(call, minimum.flat, minimum.slow[:, t], minimum.slow[:, q])
    close(got, expected)


@pytest.mark.slow
def test_second_derivative_of_a_kick_of_the_heavy_ball(minimum):
    """The noise of one step enters the weights and the velocity: (W, V) = (-h e, -h e)."""
    beta, rest = 0.6, minimum.layers

    def limit(weights, loss, h):
        kick = tuple(w - r for w, r in zip(weights, rest, strict=True))
        return limit_maps.descent_limit(weights, loss, h, beta, velocity=kick)

    call = minimum.map_of(limit)
    for scaled, (a, b) in itertools.product((0.8, 2.4), [(3, 3), (0, 3), (1, 2)]):
        h = scaled / minimum.top
        u, v = minimum.fast[:, a], minimum.fast[:, b]
        x, y = 1 + beta - h * minimum.values[a], 1 + beta - h * minimum.values[b]
        c = 1 - beta**2
        s = c / (c * (c - x * y) + beta * (x**2 + y**2) - 2 * beta**2 * x * y)
        expected = -h / (1 - beta) * s * minimum.tangent(minimum.third(u, v))
        got = second_derivative(lambda points, h=h: call(points, h), minimum.flat, u, v)
        close(minimum.tangent(got), expected)


# How a search may end


def outcome_of(limit):
    return next(
        name
        for name in ("reached", "plateau", "unfinished", "diverged", "singular")
        if bool(limit == getattr(Outcome, name))
    )


@pytest.mark.parametrize(
    ("w1", "w2", "target", "by_flow", "by_descent"),
    [
        (1.0, 0.5, 1.0, "reached", "reached"),
        (2.0, 0.5, 0.0, "reached", "reached"),
        (1.0, -1.0, 1.0, "plateau", "plateau"),
        (0.0, 0.0, 1.0, "plateau", "plateau"),
        (0.0, 0.0, 0.0, "singular", "singular"),
        (9.0, 0.1, 1.0, "reached", "diverged"),
    ],
)
def test_outcomes(w1, w2, target, by_flow, by_descent):
    loss = output_loss(gf.Regression.whitened([[target]]))
    weights = gf.DeepLinear([[[w1]], [[w2]]]).weights
    assert outcome_of(flow_limit(weights, loss)[1]) == by_flow
    assert outcome_of(descent_limit(weights, loss, jnp.asarray(0.3))[1]) == by_descent


def test_slow_descent_is_unfinished():
    loss = output_loss(gf.Regression.whitened([[1.0]]))
    weights = gf.DeepLinear([[[1.0]], [[0.5]]]).weights
    assert (
        outcome_of(descent_limit(weights, loss, jnp.asarray(1e-3), max_steps=100)[1])
        == "unfinished"
    )


@pytest.mark.slow
def test_paths_of_an_ensemble_end_each_for_itself():
    loss = output_loss(gf.Regression.whitened([[1.0]]))
    starts = [(1.0, 0.5), (1.0, -1.0), (2.0, 0.1)]
    weights = tuple(jnp.array(w).reshape(1, 1, -1) for w in zip(*starts, strict=True))
    ensemble = eqx.filter_jit(over_paths(lambda w: limit_maps.flow_limit(w, loss)))
    found, outcome = ensemble(weights)
    np.testing.assert_array_equal(outcome == Outcome.reached, [True, False, True])
    for k in (0, 2):
        alone, _ = flow_limit(tuple(w[..., k] for w in weights), loss)
        np.testing.assert_allclose(
            [w[0, 0, k] for w in found], [w.item() for w in alone], rtol=1e-11
        )


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    ("layers", "target", "step_size", "message"),
    [
        ([np.zeros((1, 1))] * 2, [[1.0]], 0.1, "stops at a plateau"),
        (
            [np.zeros((1, 1))] * 2,
            [[0.0]],
            0.1,
            "a singular point of the minima manifold: the target",
        ),
        (
            [np.array([[9.0]]), np.array([[0.1]])],
            [[1.0]],
            0.3,
            "gradient descent with step_size = 0.3",
        ),
        ([np.ones((1, 1))] * 2, [[1.0]], 0.0, "step_size must be a finite number > 0; got 0.0"),
        ([np.ones((1, 2)), np.ones((2, 1))], np.eye(2), 0.1, "hidden width d_1 = 1 is below"),
        ([np.ones((2, 2))], [[1.0]], 0.1, "widths (2, 2) do not fit"),
    ],
)
def test_no_limit(layers, target, step_size, message):
    net, data = gf.DeepLinear(layers), gf.Regression.whitened(target)
    with pytest.raises(ValueError, match=re.escape(message)):
        limit_maps.descent_projection(net, data, step_size)


def test_momentum_lies_below_one():
    net, data = gf.DeepLinear([[[1.0]]]), gf.Regression.whitened([[1.0]])
    with pytest.raises(ValueError, match=re.escape("momentum must lie in [0, 1); got 1.5")):
        limit_maps.descent_projection(net, data, 0.1, 1.5)
