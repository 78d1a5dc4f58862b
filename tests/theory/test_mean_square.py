"""Stability in mean square against enumerated batches and closed forms, mostly on fitted data."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import slow_reference as oracle
from compiled import compiled
from scipy.optimize import brentq
from slow_cases import as_weights

import gradflow as gf
from gradflow.theory import largest_step_size, stationary_covariance
from gradflow.theory.slow_drift import slow_drift

largest = compiled(largest_step_size)
covariance = compiled(stationary_covariance)


def limit(problem, layers, discrete=True, beta=None, **options):
    """What gradflow says is the largest stable step size."""
    momentum = None if beta is None else jnp.asarray(beta)
    return float(largest(problem, as_weights(layers), discrete, momentum, **options))


def is_stable(problem, layers, h, beta=None):
    """Whether gradflow has a stationary covariance."""
    momentum = None if beta is None else jnp.asarray(beta)
    x = np.asarray(covariance(problem, as_weights(layers), jnp.asarray(h), True, momentum))
    assert np.isfinite(x).all() or np.isnan(x).all()
    return bool(np.isfinite(x).all())


def step_matrices(layers, x, size, replacement):
    """The Hessians of all batches at a minimum that fits every row, on the range of their mean."""
    jacobian = reference.jacobian(layers)
    one = np.eye(layers[-1].shape[0])
    rows = [list(b) for b in reference.batches(len(x), size, replacement)]
    each = [jacobian @ np.kron(one, x[b].T @ x[b] / size) @ jacobian.T for b in rows]
    values, vectors = np.linalg.eigh(np.mean(each, axis=0))
    basis = vectors[:, values > 1e-10 * values[-1]]
    return [basis.T @ m @ basis for m in each]


def radius(matrices, h, beta):
    """Of the map of second moments of weights and velocity, averaged over all batches."""
    one = np.eye(len(matrices[0]))
    steps = [np.block([[one - h * m, beta * one], [-h * m, beta * one]]) for m in matrices]
    return np.abs(np.linalg.eigvals(np.mean([np.kron(s, s) for s in steps], axis=0))).max()


def enumerated_limit(matrices, beta):
    edge = 2 * (1 + beta) / np.linalg.eigvalsh(np.mean(matrices, axis=0))[-1]
    low, high = 1e-3 * edge, edge
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if radius(matrices, middle, beta) < 1.0 else (low, middle)
    return low


def fitted(widths, n, size, replacement=False, singular=False):
    """A network that fits all rows exactly, and the Hessians of all batches."""
    layers = oracle.network(widths)
    x = np.random.default_rng(1).normal(size=(n, widths[0]))
    if singular:
        x = np.outer(x[:, 0], np.linspace(1.0, 0.5, widths[0]))
    data = gf.Regression.from_samples(x, x @ reference.end_to_end(layers).T)
    problem = gf.Problem(data, [gf.Minibatch(size, replacement)])
    return problem, layers, step_matrices(layers, x, size, replacement)


FITTED = {
    "2-3-2": lambda: fitted((2, 3, 2), 4, 2),
    "2-2-1, replacement": lambda: fitted((2, 2, 1), 4, 2, replacement=True),
    "1-2-2-3": lambda: fitted((1, 2, 2, 3), 3, 1),
    "2-3-2, singular": lambda: fitted((2, 3, 2), 4, 1, singular=True),
}


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("beta", [0.0, 0.6])
@pytest.mark.parametrize("name", FITTED)
def test_the_map_decides_where_all_data_are_fitted(name, beta):
    problem, layers, matrices = FITTED[name]()
    expected = enumerated_limit(matrices, beta)
    edge = 2 * (1 + beta) / np.linalg.eigvalsh(np.mean(matrices, axis=0))[-1]
    assert expected < 0.9 * edge
    assert limit(problem, layers, beta=beta) == pytest.approx(expected, rel=1e-8)
    for part in (1e-3, 0.9, 0.999):
        assert is_stable(problem, layers, part * expected, beta)
    for part in (1.001, 1.1):
        assert not is_stable(problem, layers, part * expected, beta)


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_second_moments_grow_beyond_it_and_shrink_below(beta):
    """The recursion of the second moments themselves, all batches enumerated, step after step."""
    problem, layers, matrices = FITTED["2-3-2"]()
    found, one = limit(problem, layers, beta=beta), np.eye(len(matrices[0]))
    for part, grows in ((0.97, False), (1.03, True)):
        h = part * found
        steps = [np.block([[one - h * m, beta * one], [-h * m, beta * one]]) for m in matrices]
        spread, sizes = np.eye(2 * len(one)), []
        for _ in range(3000):
            spread = sum(s @ spread @ s.T for s in steps) / len(steps)
            sizes.append(np.trace(spread))
            spread = spread / sizes[-1]
        assert (np.mean(np.log(sizes[1000:])) > 0.0) == grows


def scalar(x, size=1, replacement=True, a=2.0):
    """Rows y = T x and a balanced network with |w|^2 = a, T = a / 2."""
    rows = np.asarray(x)[:, None]
    data = gf.Regression.from_samples(rows, 0.5 * a * rows)
    return gf.Problem(data, [gf.Minibatch(size, replacement)]), [
        np.full((1, 1), (a / 2) ** 0.5)
    ] * 2


def test_a_scalar_network_in_closed_form():
    """h_c = 2 S / (a Q), Q = E x^4, with batches of one row; also where rounding leaves residuals.

    With y = 1.2 x the residuals of the weights sqrt(1.2) are zero up to rounding.
    """
    problem, layers = scalar([0.5, 1.0, 1.5, 2.0])
    assert limit(problem, layers) == pytest.approx(2 * 1.875 / (2 * 5.53125), rel=1e-12)
    assert is_stable(problem, layers, 0.33) and not is_stable(problem, layers, 0.44)
    x = np.array([0.3, 0.8, 1.1, 1.9])
    problem, layers = scalar(x, replacement=False, a=2.4)
    expected = 2 * np.mean(x**2) / (2.4 * np.mean(x**4))
    assert expected == pytest.approx(0.31011, abs=5e-6)
    assert limit(problem, layers) == pytest.approx(expected, rel=1e-12)
    for part in (1e-6, 0.1, 0.999):
        assert is_stable(problem, layers, part * expected)
    for part in (1.001, 1.4):
        assert not is_stable(problem, layers, part * expected)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("second", [0.0, 1e-12, 1e-6, 1e-4, 0.1])
def test_an_output_that_is_fitted_counts_like_the_others(second):
    """Residuals 0.1 in output 1; output 2 has the larger weights, so that it is the unstable one.

    One layer: every output is a network of its own, with h_c = 2 S / Q each.
    """
    x = np.array([0.5, 1.0, 1.5, 2.0])
    e = np.array([1.0, -1.0, 1.0, -1.0])
    e = e - x * (e @ x) / (x @ x)
    layers = [np.array([[1.0], [0.0]]), np.array([[0.5, 0.0], [0.0, 1.5]])]
    layers[0] = np.array([[0.5], [1.5]])
    y = np.stack([0.25 * x + 0.1 * e, 2.25 * x + second * e], axis=1)
    problem = gf.Problem(gf.Regression.from_samples(x[:, None], y), [gf.Minibatch(1, True)])
    kernel = 2.5 * np.eye(2) + np.diag([0.25, 2.25])  # |W_1|^2 and W_2 W_2^T
    expected = 2 * np.mean(x**2) / (kernel[1, 1] * np.mean(x**4))
    assert limit(problem, layers) == pytest.approx(expected, rel=1e-9)
    assert is_stable(problem, layers, 0.999 * expected)
    assert not is_stable(problem, layers, 1.001 * expected)
    assert not is_stable(problem, layers, 1.4 * expected)


A, S = 2.0, 1.3


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("size", [1, 4])
def test_online_batches_of_a_gaussian_population(size, beta):
    """E m^2 = S^2 (1 + 2 / b); momentum from the 3 x 3 map of (e^2, e v, v^2)."""
    problem = gf.Problem(gf.Regression.from_moments([[S]], [[S]], [[S]]), [gf.Minibatch(size)])
    mean, square = A * S, A**2 * S**2 * (1 + 2 / size)

    def growth(h):
        # e+ = e + v+, v+ = beta v - h j e
        v = [beta**2, -2 * h * beta * mean, h**2 * square]  # v^2, e v, e^2
        cross = [beta**2, beta - 2 * h * beta * mean, h**2 * square - h * mean]
        e = [beta**2, 2 * beta * (1 - h * mean), 1 - 2 * h * mean + h**2 * square]
        return np.abs(np.linalg.eigvals([v, cross, e])).max()

    expected = brentq(lambda h: growth(h) - 1.0, 1e-4, 2 * (1 + beta) / mean)
    if beta == 0.0:
        assert expected == pytest.approx(2 / (A * S * (1 + 2 / size)), rel=1e-9)
    layers = [np.ones((1, 1))] * 2
    assert limit(problem, layers, beta=beta) == pytest.approx(expected, rel=1e-9)


def test_noise_on_inputs():
    """m = mean of (x + sigma xi)^2 over n rows: variance (4 sigma^2 S + 2 sigma^4) / n."""
    n, sigma = 3, 0.7
    data = gf.Regression.from_moments([[S]], [[S + sigma**2]], [[(S + sigma**2) ** 2 / S]], n=n)
    problem = gf.Problem(data, [gf.InputNoise(sigma)])
    mean = S + sigma**2
    square = mean**2 + (4 * sigma**2 * S + 2 * sigma**4) / n
    found = limit(problem, [np.ones((1, 1))] * 2)
    assert found == pytest.approx(2 * mean / (A * square), rel=1e-9)


def test_limits_of_training_and_its_approximations():
    """With V = Var m: the SDE, that of order 2, and SVAG, from D(mu, mu) = h (a^2 V)."""
    problem, layers = scalar([0.1, 0.1, 0.1, 2.0])
    x = np.array([0.1, 0.1, 0.1, 2.0])
    s, v = np.mean(x**2), np.mean(x**4) - np.mean(x**2) ** 2
    assert limit(problem, layers, False) == pytest.approx(2 * s / (A * v), rel=1e-9)
    second = 2 * s / (A * (v - s**2))
    assert limit(problem, layers, False, order=2) == pytest.approx(second, rel=1e-9)
    third = 2 * s / (A * (v + s**2 / 3))
    assert limit(problem, layers, True, amplification=3) == pytest.approx(third, rel=1e-9)


def test_noise_that_does_not_grow_has_the_edge_of_stability():
    layers = oracle.network((2, 3, 2))
    sxx = np.array([[1.3, 0.4], [0.4, 0.8]])
    data = gf.Regression.from_moments(sxx, reference.end_to_end(layers) @ sxx, n=3)
    problem, top = gf.Problem(data, [gf.LabelNoise(0.3)]), oracle.top_curvature(layers, sxx)
    assert limit(problem, layers) == pytest.approx(2 / top, rel=1e-10)
    assert limit(problem, layers, beta=0.9) == pytest.approx(3.8 / top, rel=1e-10)
    assert limit(problem, layers, False) == np.inf


@pytest.mark.slow
def test_many_outputs_and_inputs_take_several_stretches():
    """12 entries, Gaussian rows: the largest eigenvalue of the dense pencil by NumPy."""
    problem, layers, _ = fitted((4, 3), 9, 2)
    x = np.asarray(problem.data.x)
    matrices = step_matrices(layers, x, 2, False)
    size = len(matrices[0])
    mean, one = np.mean(matrices, axis=0), np.eye(size)
    sums = np.kron(mean, one) + np.kron(one, mean)
    squares = np.mean([np.kron(m, m) for m in matrices], axis=0)
    expected = 1 / np.linalg.eigvals(np.linalg.solve(sums, squares)).real.max()
    assert limit(problem, layers) == pytest.approx(expected, rel=1e-9)
    assert is_stable(problem, layers, 0.999 * expected)
    assert not is_stable(problem, layers, 1.001 * expected)


def test_without_a_decomposition_of_the_kernel(monkeypatch):
    """The Krylov method of large kernels, forced on a small one, and on data that are fitted."""
    monkeypatch.setattr("gradflow.geometry.kernel.LARGEST_DENSE_KERNEL", 0)

    @compiled
    def forced(problem, weights, h):
        return slow_drift(problem, weights, h)

    problem, layers, matrices = FITTED["2-3-2"]()
    expected = enumerated_limit(matrices, 0.0)
    for part in (1e-3, 0.9, 0.99, 1.01, 1.1, 1.5):
        drift = forced(problem, as_weights(layers), jnp.asarray(part * expected))
        flat = reference.flatten([np.asarray(v) for v in drift])
        assert np.isfinite(flat).all() == (part < 1.0)
