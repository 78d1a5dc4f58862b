"""The whole spectrum and its density, against dense decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature_cases import CASES, autodiff_hessian, case, minimum, network, samples

import gradflow as gf
from gradflow.geometry import (
    SpectralDensity,
    hessian_spectrum,
    spectral_density,
)


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("name", CASES)
def test_whole_spectrum(name):
    net, problem = case(name)
    expected = np.linalg.eigvalsh(np.asarray(autodiff_hessian(problem, net.weights)))
    np.testing.assert_allclose(hessian_spectrum(net, problem), expected, atol=1e-12 * len(expected))


def test_whole_spectrum_of_a_large_network_is_refused():
    net = network((45, 45))
    message = r"net: the dense Hessian of 2025 parameters is too large \(limit 2000\); use"
    with pytest.raises(ValueError, match=message):
        hessian_spectrum(net, samples((45, 45), 5))


WIDTHS = (10, 12, 10, 8)  # 320 parameters


def exact_mean(values: np.ndarray, function) -> float:
    return float(np.mean(function(values)))


@pytest.fixture(scope="module")
def large() -> tuple[np.ndarray, SpectralDensity]:
    """The spectrum of a network away from minima and its density from 128 vectors, 40 steps."""
    net, data = network(WIDTHS), samples(WIDTHS, 30)
    problem = gf.Problem(data, [gf.InputNoise(0.3), gf.WeightDecay(0.2)])
    values = np.linalg.eigvalsh(np.asarray(autodiff_hessian(problem, net.weights)))
    return values, spectral_density(net, problem, key=jax.random.key(0), probes=128, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [lambda x: x, lambda x: x**2, lambda x: x**3, lambda x: jnp.exp(-(x**2)), jnp.tanh],
)
def test_means_over_the_spectrum(large, function):
    """Within 4 standard errors of the dense spectrum, and the errors are small."""
    values, density = large
    mean, error = density.mean(function)
    exact = exact_mean(values, function)
    assert abs(float(mean) - exact) < 4 * float(error)
    # 128 vectors on 320 eigenvalues: a relative error of sqrt(2 / (128 320)) = 0.7 % for x^2.
    assert float(error) < 0.03 * max(abs(exact), np.std(np.asarray(function(values))))


def test_ends_of_the_spectrum_are_nodes(large):
    values, density = large
    size = np.abs(values).max()
    np.testing.assert_allclose(np.max(density.nodes, axis=1), values[-1], atol=1e-8 * size)
    np.testing.assert_allclose(float(np.min(density.nodes)), values[0], atol=1e-8 * size)
    np.testing.assert_allclose(float(density.resolution), np.ptp(values) / 40, rtol=1e-6)


def test_density_on_a_grid(large):
    """It integrates to 1 and follows the dense spectrum, smoothed alike."""
    values, density = large
    width = 3 * float(density.resolution)
    points = np.linspace(values[0] - 8 * width, values[-1] + 8 * width, 2001)
    found = np.asarray(density.on_grid(jnp.asarray(points), width))
    np.testing.assert_allclose(np.trapezoid(found, points), 1.0, rtol=1e-8)
    z = (points[:, None] - values) / width
    smoothed = np.mean(np.exp(-(z**2) / 2), axis=1) / (width * np.sqrt(2 * np.pi))
    # The area between the two curves: statistical, 0.01 expected from 128 vectors.
    assert np.trapezoid(np.abs(found - smoothed), points) < 0.03


@pytest.mark.slow
def test_as_many_steps_as_parameters_leave_only_the_vectors():
    """Then each vector's rule is exact: v'f(H)v / n for its signs v, whatever f."""
    net, data = minimum((3, 4, 2), np.diag([1.0, 1.0, 4.0]))  # zeros and equal eigenvalues
    hessian = np.asarray(autodiff_hessian(gf.Problem(data), net.weights))
    values, vectors = np.linalg.eigh(hessian)
    n = len(values)
    key = jax.random.key(3)
    density = spectral_density(net, data, key=key, probes=5, steps=1_000)
    assert density.nodes.shape == (5, n)
    signs = np.asarray(jax.random.rademacher(key, (5, n), jnp.float64))
    for moment in (1, 2, 7):
        expected = ((signs @ vectors) ** 2 @ values**moment) / n
        each = np.sum(np.asarray(density.weights * density.nodes**moment), axis=1)
        np.testing.assert_allclose(each, expected, rtol=1e-10)
    np.testing.assert_allclose(np.sum(density.weights, axis=1), 1.0, rtol=1e-12)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("weight", "level"), [(0.0, 0.0), (1.0, 1.0)])
def test_spectrum_of_one_value(weight, level):
    """Invariant spaces from the first step on: H = 0 and H = I."""
    depth = 3 if weight == 0.0 else 1
    net = gf.DeepLinear([weight * np.eye(6)] * depth)
    density = spectral_density(net, gf.Regression.whitened(np.eye(6)), key=jax.random.key(0))
    np.testing.assert_allclose(density.nodes, level, atol=1e-12)
    mean, error = density.mean(lambda x: x + 1.0)
    np.testing.assert_allclose([float(mean), float(error)], [level + 1.0, 0.0], atol=1e-12)


def test_the_key_decides():
    net, data = network((3, 4, 2)), samples((3, 4, 2), 6)
    one, same, other = (
        spectral_density(net, data, key=jax.random.key(i), probes=3, steps=5) for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.nodes, same.nodes)
    assert not np.array_equal(one.nodes, other.nodes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 1}, "probes must be at least 2, to give a standard error; got 1."),
        ({"steps": 0}, "steps must be at least 1; got 0."),
    ],
)
def test_density_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(network((2, 2)), samples((2, 2), 4), key=jax.random.key(0), **options)
