"""Local coordinates (P, G): round trips, gradient flow, and what cannot be attained."""

import itertools
import re

import numpy as np
import pytest
import reference
from reference import as_numpy, assert_close, scale
from scipy import integrate, optimize

import gradflow as gf
from gradflow.geometry import coordinates


def random_layers(widths, rng, size=0.8):
    return [size * rng.normal(size=(b, a)) for a, b in itertools.pairwise(widths)]


def unflatten(flat, layers):
    ends = np.cumsum([w.size for w in layers])[:-1]
    return [v.reshape(w.shape) for v, w in zip(np.split(flat, ends), layers, strict=True)]


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("widths", [(2, 3, 2), (3, 2), (1, 3, 2, 2), (3, 1, 2)])
def test_round_trip(widths):
    rng = np.random.default_rng(0)
    near = random_layers(widths, rng)
    there = [w + 0.1 * rng.normal(size=w.shape) for w in near]
    p, g = coordinates.local_coordinates(gf.DeepLinear(there))
    assert_close([p], [reference.end_to_end(there)], scale(there))
    assert_close(g, reference.balancedness(there), scale(there))
    found = as_numpy(coordinates.network_at(gf.DeepLinear(near), p, g).weights)
    assert_close([reference.end_to_end(found)], [reference.end_to_end(there)], 1.0, 1e-13)
    assert_close(reference.balancedness(found), reference.balancedness(there), 1.0, 1e-13)
    # The step has least norm, so it is no longer than the way there but for second order.
    moved, way = (
        np.linalg.norm(reference.flatten(w) - reference.flatten(near)) for w in (found, there)
    )
    assert moved <= 1.1 * way


def test_the_network_found_is_nearly_the_nearest():
    """To second order in the distance, against SciPy with a strong penalty."""
    rng = np.random.default_rng(1)
    near = random_layers((2, 3, 2), rng)
    flat = reference.flatten(near)
    there = [w + 0.02 * rng.normal(size=w.shape) for w in near]
    goal = np.concatenate(
        [reference.end_to_end(there).ravel(), *[g.ravel() for g in reference.balancedness(there)]]
    )

    def penalised(w):
        layers = unflatten(w, near)
        at = [reference.end_to_end(layers), *reference.balancedness(layers)]
        return np.concatenate([w - flat, 1e4 * (np.concatenate([v.ravel() for v in at]) - goal)])

    nearest = optimize.least_squares(penalised, flat, xtol=1e-13, ftol=1e-13, gtol=1e-15).x
    p, g = coordinates.local_coordinates(gf.DeepLinear(there))
    found = coordinates.network_at(gf.DeepLinear(near), p, g)
    apart = np.linalg.norm(reference.flatten(as_numpy(found.weights)) - nearest)
    distance = np.linalg.norm(nearest - flat)
    assert apart <= distance**2
    assert distance > 0.01


@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (3, 1, 2)])
def test_gradient_flow_moves_the_end_to_end_matrix_alone(widths):
    """With one hidden unit a layer the coordinates determine the network: SciPy's flow is met."""
    rng = np.random.default_rng(2)
    layers = random_layers(widths, rng, 1.0)
    s, y = np.eye(widths[0]), rng.normal(size=(widths[-1], widths[0]))
    solution = integrate.solve_ivp(
        lambda t, w: -reference.flatten(reference.gradient(unflatten(w, layers), s, y)),
        (0.0, 0.3),
        reference.flatten(layers),
        method="DOP853",
        rtol=1e-12,
        atol=1e-14,
    )
    later = unflatten(solution.y[:, -1], layers)
    start = gf.DeepLinear(layers)
    _, g = coordinates.local_coordinates(start)
    found = coordinates.network_at(start, reference.end_to_end(later), g)
    assert_close(as_numpy(found.weights), later, 1.0, 1e-10)
    assert np.linalg.norm(solution.y[:, -1] - reference.flatten(layers)) > 0.1


def coordinates_of(flat, layers):
    """P and all G_i as one vector; complex weights are not conjugated."""
    at = unflatten(flat, layers)
    pieces = [reference.end_to_end(at), *reference.balancedness(at)]
    return np.concatenate([v.ravel() for v in pieces])


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("widths", "limit"), [((2, 4, 3), 300), ((2, 2, 3, 1), 0)])
def test_steps_are_those_of_gauss_newton(widths, limit, monkeypatch):
    """NumPy's pseudo-inverse; beyond the limit the steps are solved for iteratively."""
    monkeypatch.setattr(coordinates, "LARGEST_DENSE_JACOBIAN", limit)
    rng = np.random.default_rng(3)
    near = random_layers(widths, rng)
    there = [w + 0.05 * rng.normal(size=w.shape) for w in near]
    goal, at = coordinates_of(reference.flatten(there), near), reference.flatten(near)
    for _ in range(8):
        units = np.eye(at.size) * 1e-30j
        j = np.stack([coordinates_of(at + e, near).imag / 1e-30 for e in units], axis=1)
        at = at - np.linalg.pinv(j, rcond=1e-9) @ (coordinates_of(at, near) - goal)
    p, g = coordinates.local_coordinates(gf.DeepLinear(there))
    found = coordinates.network_at(gf.DeepLinear(near), p, g)
    np.testing.assert_allclose(reference.flatten(as_numpy(found.weights)), at, atol=1e-11)


@pytest.mark.parametrize(
    ("widths", "p", "g", "message"),
    [
        # W_2^T W_2 and W_1 W_1^T have rank one each: their difference is no identity of size 3.
        ((1, 3, 1), [[1.0]], [np.eye(3)], "no network of these widths has these coordinates"),
        ((2, 1, 2), np.eye(2), [[[0.0]]], "no network of these widths has these coordinates"),
        ((2, 1, 2), [[1.0]], [[[0.0]]], "p must be a (2, 2) matrix of finite numbers; got shape"),
        ((1, 1), [[1.0]], [[[0.0]]], "g must have one matrix for each of the 0 hidden layers"),
        ((1, 1, 1), [[1.0]], [[[np.nan]]], "G_1 must be a (1, 1) matrix of finite numbers"),
        ((1, 2, 1), [[1.0]], [[[1.0, 0.5], [0.0, 1.0]]], "G_1 must be symmetric"),
    ],
)
def test_coordinates_that_cannot_be_attained(widths, p, g, message):
    near = gf.DeepLinear(random_layers(widths, np.random.default_rng(4)))
    with pytest.raises(ValueError, match=re.escape(message)):
        coordinates.network_at(near, p, g)
