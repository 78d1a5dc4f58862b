"""The matrix-free forms of the slow drift, forced on small problems, against enumerated noise."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import slow_reference as oracle
from compiled import compiled
from reference import as_numpy, assert_close
from slow_cases import LABELS, OTHERS, as_weights, case

import gradflow as gf
from gradflow.regularizers import GradientNoise
from gradflow.theory.slow_drift import slow_drift


@pytest.fixture
def drift(monkeypatch):
    """The slow drift without any decomposition of a kernel, as a vector."""
    monkeypatch.setattr("gradflow.geometry.kernel.LARGEST_DENSE_KERNEL", 0)

    @compiled
    def forced(*arguments, **options):
        return slow_drift(*arguments, **options)

    def velocity(problem, layers, h, beta=0.0, **options):
        numbers = (jnp.asarray(h), jnp.asarray(beta))
        return reference.flatten(as_numpy(forced(problem, as_weights(layers), *numbers, **options)))

    return velocity


def close(actual, expected, size=0.0, tolerance=1e-9):
    assert_close([actual], [expected], max(np.abs(expected).max(), size), tolerance)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("name", LABELS)
def test_label_noise(name, drift):
    c = case(name)
    for part, beta in ((0.1, 0.0), (1.9, 0.0), (1.0, 0.9)):
        h = part * (1 + beta) / oracle.top_curvature(c.layers, c.s)
        expected = oracle.noise_drift(c.layers, c.s, c.noise, h, beta) / h
        close(drift(c.problem, c.layers, h, beta), expected, size=1e-4)


# BiCGStab divides zero by zero once it is exact, as for a single unknown, which is never large.
@pytest.mark.few_cases(1)
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "scalar batches"])
def test_noise_that_depends_on_the_fluctuation(name, drift):
    c = case(name)
    for part, beta in ((0.05, 0.0), (0.9, 0.0), (0.3, 0.5), (0.9, 0.9)):
        h = part * (1 - beta) / oracle.top_curvature(c.layers, c.s)
        got = drift(c.problem, c.layers, h, beta)
        try:
            expected = oracle.noise_drift(c.layers, c.s, c.noise, h, beta) / h
        except oracle.UnstableError:
            assert np.all(np.isnan(got))
            continue
        close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2-3-2", "batches", "2-2-2-2"])
def test_classical_limit(name, drift):
    c = case(name)
    columns = oracle.pulled(c.layers, np.sqrt(c.noise.chance)[:, None, None] * c.noise.e)
    for h, beta in ((0.2, 0.0), (0.03, 0.9)):
        expected = oracle.classical_drift(c.layers, c.s, columns, h, beta) / h
        close(drift(c.problem, c.layers, h, beta, finite_step=False), expected)


@pytest.mark.slow
def test_balanced_layers_of_whitened_data(drift):
    """K is diagonal, and what the fluctuation feeds spans two dimensions: exact soon."""
    rng = np.random.default_rng(0)
    u, v, q = (np.linalg.qr(rng.normal(size=(4, 4)))[0] for _ in range(3))
    root = np.diag([1.2, 1.0, 0.8, 0.7])
    layers = [q @ root @ v, u @ root @ q.T]
    data = gf.Regression.whitened(layers[1] @ layers[0], residual=0.3)
    problem = gf.Problem(data, [gf.Minibatch(16)])
    assert oracle.top_curvature(layers, np.eye(4)) == pytest.approx(2 * 1.2**2)
    noise = oracle.population_noise(np.eye(4), layers[1] @ layers[0], 0.3, 16, True, 0.0, 0.0)
    h = 0.2 / oracle.top_curvature(layers, np.eye(4))
    expected = oracle.noise_drift(layers, np.eye(4), noise, h, 0.0) / h
    close(drift(problem, layers, h), expected)


@pytest.mark.slow
@pytest.mark.parametrize("silent", [gf.InputNoise(0.0), gf.LabelNoise(0.0)])
def test_noise_of_no_strength_does_not_drift(silent, drift):
    c = case("2-3-2")
    problem = gf.Problem(c.problem.data, [silent])
    top = oracle.top_curvature(c.layers, c.s)
    assert not np.any(drift(problem, c.layers, 0.5 / top))
    if isinstance(silent, gf.InputNoise):
        assert np.all(np.isnan(drift(problem, c.layers, 2.5 / top)))


def test_noise_inside_a_large_network_is_refused(monkeypatch):
    monkeypatch.setattr("gradflow.theory.normal_response.LARGEST_DECOMPOSED", 3)
    c = case("2-3-2")
    problem = gf.Problem(c.problem.data, [GradientNoise(0.1)])
    with pytest.raises(ValueError, match="2 outputs and 2 inputs it has 4 rows"):
        slow_drift(problem, as_weights(c.layers), 0.1)


@pytest.mark.slow
def test_unstable_in_mean_square(drift):
    """The equation has a solution there, but it is no covariance; mostly far below h mu = 2."""
    c = case("batches")
    unstable = 0
    for part in (0.9, 1.2, 1.5, 1.8):
        h = part / oracle.top_curvature(c.layers, c.s)
        got = drift(c.problem, c.layers, h)
        try:
            close(got, oracle.noise_drift(c.layers, c.s, c.noise, h, 0.0) / h)
        except oracle.UnstableError:
            assert np.all(np.isnan(got))
            unstable += 1
    assert unstable >= 1


@pytest.mark.slow
def test_label_noise_at_width_64_descends_its_potential():
    """Along the drift -P_T grad U the potential falls by its square; determinants by NumPy."""
    width, h, std, n = 64, 0.2, 0.1, 4
    rng = np.random.default_rng(0)
    layers = [
        size * np.linalg.qr(rng.normal(size=(width, width)))[0]
        + 0.1 * rng.normal(size=(width, width)) / np.sqrt(width)
        for size in (1.3, 1.0, 0.8)
    ]
    data = gf.Regression.whitened(reference.end_to_end(layers), n=n)
    problem = gf.Problem(data, [gf.LabelNoise(std)])
    drift = as_numpy(slow_drift(problem, as_weights(layers), jnp.asarray(h)))

    def potential(shift):
        moved = [w + shift * v for w, v in zip(layers, drift, strict=True)]
        kernel = sum(
            np.kron(a @ a.T, b.T @ b)
            for a, b in ((reference.above(moved, i), reference.below(moved, i)) for i in (1, 2, 3))
        )
        sign, logarithm = np.linalg.slogdet(np.eye(width**2) - h / 2 * kernel)
        assert sign > 0
        return -(std**2) / (2 * n) * logarithm

    square = sum(np.sum(v * v) for v in drift)
    step = 1e-3 / np.sqrt(square)
    slope = (potential(step) - potential(-step)) / (2 * step)
    assert slope == pytest.approx(-square, rel=1e-5)
