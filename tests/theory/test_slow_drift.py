"""The slow drift against the expansion of the limit of descent about the manifold, in NumPy.

The oracle is `slow_reference`: no formula of the theory enters it except where a test says so.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import slow_reference as oracle
from compiled import compiled
from reference import as_numpy, assert_close
from slow_cases import LABELS, OTHERS, SXX, as_weights, case, sample

import gradflow as gf
from gradflow.regularizers import GradientNoise
from gradflow.theory.slow_drift import slow_drift

drift = compiled(slow_drift)


def velocity(problem, layers, h, beta=0.0, **options):
    """What gradflow says, as a vector."""
    numbers = (jnp.asarray(h), jnp.asarray(beta))  # a Python float would compile anew
    return reference.flatten(as_numpy(drift(problem, as_weights(layers), *numbers, **options)))


def close(actual, expected, size=0.0, tolerance=1e-10):
    """Relative to the larger of the expected vector and `size`."""
    assert_close([actual], [expected], max(np.abs(expected).max(), size), tolerance)


# The drift at finite step size


@pytest.mark.few_cases(12)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", LABELS)
def test_label_noise_at_every_step_size(name, beta):
    c = case(name)
    top = oracle.top_curvature(c.layers, c.s)
    for part in (0.1, 0.8, 1.9):
        h = part / top * (1 + beta)
        expected = oracle.noise_drift(c.layers, c.s, c.noise, h, beta) / h
        close(velocity(c.problem, c.layers, h, beta), expected, size=1e-4)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", OTHERS)
def test_noise_that_depends_on_the_fluctuation(name, beta):
    """Batches differ in their Hessian; where enumeration says unstable in mean square, NaN."""
    c = case(name)
    top = oracle.top_curvature(c.layers, c.s)
    stable = 0
    for part in (0.05, 0.3, 0.9):
        h = part * (1 - beta) / top
        got = velocity(c.problem, c.layers, h, beta)
        try:
            expected = oracle.noise_drift(c.layers, c.s, c.noise, h, beta) / h
        except oracle.UnstableError:
            assert np.all(np.isnan(got))
            continue
        stable += 1
        close(got, expected)
    assert stable >= 2


@pytest.mark.parametrize("name", ["2-3-2", "batches", "2-2-2-2"])
def test_classical_limit(name):
    """finite_step=False: D^3 L contracted with the solution of H X + X H = noise at the minimum."""
    c = case(name)
    columns = oracle.pulled(c.layers, np.sqrt(c.noise.chance)[:, None, None] * c.noise.e)
    for h, beta in ((0.2, 0.0), (0.03, 0.9)):
        expected = oracle.classical_drift(c.layers, c.s, columns, h, beta) / h
        close(velocity(c.problem, c.layers, h, beta, finite_step=False), expected)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("2-3-2", "coupled"),
        ("2-3-2", "decoupled"),
        ("one layer, singular", "coupled"),
        ("batches, inputs, labels", "decoupled"),
    ],
)
def test_weight_decay_adds_its_pull_along_the_manifold(name, decay):
    c, rate = case(name), 0.02
    problem = gf.Problem(c.problem.data, [*c.problem.regularizers, gf.WeightDecay(rate)])
    for beta in (0.0, 0.9):
        h = 0.1 * (1 - beta) / oracle.top_curvature(c.layers, c.s)
        pull = oracle.decay_drift(c.layers, c.s, rate, h, beta, decay == "coupled")
        expected = (pull + oracle.noise_drift(c.layers, c.s, c.noise, h, beta)) / h
        close(velocity(problem, c.layers, h, beta, decay=decay), expected)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_noise_on_the_gradient(beta):
    """Kicks along the manifold move its points off a tangent plane: only the rest is a velocity."""
    c, level = case("1-2-3"), 0.3
    problem = gf.Problem(c.problem.data, [*c.problem.regularizers, GradientNoise(level)])
    h = 1.2 * (1 + beta) / oracle.top_curvature(c.layers, c.s)
    columns = level * np.eye(sum(w.size for w in c.layers))
    total = oracle.kick_drift(c.layers, c.s, columns, h, beta).astype(float)
    total = oracle.tangent_part(c.layers, c.s, total)
    expected = (total + oracle.noise_drift(c.layers, c.s, c.noise, h, beta)) / h
    close(velocity(problem, c.layers, h, beta), expected)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("widths", [(2, 3, 2), (2, 2, 2, 1)])
def test_dropout_moves_along_and_across_the_manifold_at_once(widths, beta):
    """Gaussian factors of tiny variance on every unit of every row, by quadrature."""
    rate = 1e-8
    c = sample(widths, 4)
    problem = gf.Problem(c.problem.data, [gf.Dropout(rate, "gaussian")])
    mean, columns = dropout(c, rate / (1 - rate))
    for part in (0.2, 1.5):
        h = part * (1 + beta) / oracle.top_curvature(c.layers, c.s)
        pull = oracle.limit_expansion(c.layers, c.s, h, beta).linear[: len(mean)]
        total = oracle.kick_drift(c.layers, c.s, columns, h, beta) - h * pull @ np.tile(mean, 2)
        expected = oracle.tangent_part(c.layers, c.s, total.astype(float)) / h
        close(velocity(problem, c.layers, h, beta), expected, tolerance=1e-6)


def dropout(c, variance, nodes=None):
    """Mean gradient and the columns of the noise of a step, all factors of all rows enumerated."""
    x, y = (np.asarray(a) for a in (c.problem.data.x, c.problem.data.y))
    hidden = [w.shape[0] for w in c.layers[:-1]]
    grid, chance = reference.gauss_hermite(sum(hidden), 3) if nodes is None else nodes
    gradients = np.zeros((len(x), len(grid), sum(w.size for w in c.layers)))
    for j, numbers in enumerate(1 + np.sqrt(variance) * grid):
        factors = [np.diag(part) for part in np.split(numbers, np.cumsum(hidden)[:-1])]
        chain = [c.layers[0]]
        for factor, w in zip(factors, c.layers[1:], strict=True):
            chain += [factor, w]
        for k, (row, label) in enumerate(zip(x, y, strict=True)):
            m = np.outer(reference.end_to_end(chain) @ row - label, row)
            gradients[k, j] = reference.flatten(reference.pull_back(chain, m)[::2])
    mean = np.einsum("j,kji->ki", chance, gradients)
    columns = np.sqrt(chance)[:, None] * (gradients - mean[:, None]) / len(x)
    return mean.mean(axis=0), columns.reshape(-1, mean.shape[1])


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("name", ["scalar, depth 4", "2-3-2", "2-3-2, singular", "1-2-3"])
def test_label_noise_descends_a_barrier_at_the_edge_of_stability(name, beta):
    """W' = -P_T grad U, U = -c sum_a log(1 - h mu_a / (2 (1 + beta))).

    c = (s^2 / 2n) (1 + beta) / (1 - beta)^2; the sum is a log-determinant of the kernel, which the
    complex steps differentiate.
    """
    c = case(name)
    root = oracle.factor_of(c.s)
    h = 1.7 * (1 + beta) / oracle.top_curvature(c.layers, c.s)
    scale = float(c.noise.chance[0]) / 2 * (1 + beta) / (1 - beta) ** 2

    def potential(layers):
        kernel = 0.0
        for i in range(1, len(layers) + 1):
            a, half = reference.above(layers, i), reference.below(layers, i) @ root
            kernel = kernel + np.kron(a @ a.T, half.T @ half)
        inside = np.eye(len(kernel)) - h / (2 * (1 + beta)) * kernel
        return -scale * np.log(np.linalg.det(inside))

    slope = reference.flatten(reference.complex_step_gradient(potential, c.layers))
    close(velocity(c.problem, c.layers, h, beta), -oracle.tangent_part(c.layers, c.s, slope))


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("name", ["scalar, depth 3", "2-2-2-2", "replacement, depth 3", "2-1-2"])
def test_velocity_is_tangent_and_keeps_the_end_to_end_matrix(name):
    c = case(name)
    h = 0.3 / oracle.top_curvature(c.layers, c.s)
    got = velocity(c.problem, c.layers, h)
    jacobian = reference.jacobian(c.layers)
    assert np.abs(got).max() > 1e-4
    assert np.abs(jacobian.T @ got).max() < 1e-11 * np.abs(got).max() * np.abs(jacobian).max()


def test_beyond_the_edge_of_stability_there_is_no_drift():
    c = case("2-3-2")
    top = oracle.top_curvature(c.layers, c.s)
    for beta in (0.0, 0.5):
        edge = 2 * (1 + beta) / top
        assert np.all(np.isfinite(velocity(c.problem, c.layers, 0.99 * edge, beta)))
        assert np.all(np.isnan(velocity(c.problem, c.layers, 1.01 * edge, beta)))


def test_batches_are_unstable_before_the_edge_of_the_mean():
    """Scalar: E(1 - h mu s_k / s)^2 < 1 below h mu = 2 / (1 + Var(s_k) / s^2)."""
    c = case("scalar batches")
    x2 = np.asarray(c.problem.data.x).ravel() ** 2
    variance = (4 - 2) / (2 * (4 - 1)) * np.var(x2) / np.mean(x2) ** 2
    edge = 2 / (1 + variance) / oracle.top_curvature(c.layers, c.s)
    assert variance > 0.3
    assert np.all(np.isfinite(velocity(c.problem, c.layers, 0.999 * edge)))
    for times in (1.001, 1.3, 3.0):
        assert np.all(np.isnan(velocity(c.problem, c.layers, times * edge)))


def test_without_noise_nothing_moves():
    c = case("2-3-2")
    problem = gf.Problem(c.problem.data, [gf.LabelNoise(0.0)])
    assert not np.any(velocity(problem, c.layers, 0.1))


def test_momentum_is_zero_by_default():
    c = case("scalar, depth 2")
    plain = drift(c.problem, as_weights(c.layers), jnp.asarray(0.1))
    close(reference.flatten(as_numpy(plain)), velocity(c.problem, c.layers, 0.1))


# What the oracle rests on


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "beta"),
    [((1, 1, 1), 0.9), ((1, 1, 1, 1), 0.0), ((2, 1, 2), 0.5), ((1, 2, 3), 0.0), ((2, 3, 2), 0.0)],
)
def test_expansion_of_the_limit_against_descent_in_many_digits(widths, beta):
    layers, s = oracle.network(widths, seed=3), SXX[widths[0]]
    h = 0.9 * (1 + beta) / oracle.top_curvature(layers, s)
    u, v = np.random.default_rng(4).normal(size=(2, sum(w.size for w in layers)))
    limit = oracle.limit_expansion(layers, s, h, beta).quadratic[: len(u)]
    jet = np.einsum("ijk,j,k->i", limit, np.tile(u, 2), np.tile(v, 2)).astype(float)
    close(jet, oracle.kicked_limit(layers, s, u, v, h, beta, digits=28), tolerance=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (2, 3, 2), (1, 2, 3), (2, 2, 2, 2)])
def test_second_derivatives_of_the_limit_in_closed_form(widths, beta):
    """Section 7b: two normal kicks, a normal and a tangential one, two tangential ones."""
    layers, s = oracle.network(widths), SXX[widths[0]]
    hessian, third = (d.astype(float) for d in oracle.derivatives(layers, s))
    values, vectors = np.linalg.eigh(hessian)
    kept = values > 1e-10 * values[-1]
    mu, normal, flat = values[kept], vectors[:, kept], vectors[:, ~kept]
    for part in (0.2, 1.8):
        h = part * (1 + beta) / mu[-1]
        full = oracle.limit_expansion(layers, s, h, beta).quadratic[: len(hessian)].astype(float)
        both = sum(np.split(full, 2, axis=1))
        both = sum(np.split(both, 2, axis=2))
        a, b = 1 + beta - h * mu[:, None], 1 + beta - h * mu
        lasting = (1 - beta**2) / (
            (1 - beta**2) * (1 - beta**2 - a * b) + beta * (a**2 + b**2) - 2 * beta**2 * a * b
        )
        rise = 1 / (h * mu) - beta / ((1 - beta) ** 2 * (1 + beta) + beta * h * mu)
        onto = flat @ flat.T
        inverse = np.linalg.pinv(hessian, rcond=1e-10, hermitian=True)
        for one, two, through, factor in (
            (normal, normal, onto, -h / (1 - beta) * lasting),
            (flat, normal, onto, -h / (1 - beta) ** 2 * rise),
            (flat, flat, inverse, -1 / (1 - beta) ** 2),
        ):
            force = np.einsum("jki,ja,kb->iab", third, one, two)
            expected = factor * np.einsum("il,lab->iab", through, force)
            got = np.einsum("ijk,ja,kb->iab", both, one, two)
            close(got, expected, tolerance=1e-10)


@pytest.mark.few_cases(20)
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("name", ["2-2-2-2", "1-2-3", *OTHERS])
def test_change_of_balancedness_from_second_moments_alone(name, beta):
    """h^2 E[g_{i+1}^T g_{i+1} - g_i g_i^T] of the stationary state, no derivative of the limit."""
    c = case(name)
    h = 0.2 * (1 - beta) / oracle.top_curvature(c.layers, c.s)
    move = oracle.noise_drift(c.layers, c.s, c.noise, h, beta)
    changes = oracle.balance_change(c.layers, oracle.layers_of(move, c.layers))
    expected = oracle.balance_drift(c.layers, c.s, c.noise, h, beta)
    assert_close(changes, expected, max(np.abs(e).max() for e in expected), 1e-10)


def test_small_steps_are_classical():
    """Two small steps, extrapolated to h = 0."""
    c = case("batches")
    columns = oracle.pulled(c.layers, np.sqrt(c.noise.chance)[:, None, None] * c.noise.e)
    h = 2e-3 / oracle.top_curvature(c.layers, c.s)
    one, two = (oracle.noise_drift(c.layers, c.s, c.noise, k * h) / (k * h) ** 2 for k in (1, 2))
    close(2 * one - two, oracle.classical_drift(c.layers, c.s, columns, 1.0), tolerance=1e-4)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_prediction_of_simulated_batches(beta):
    """400 paths of 2-2-1 with half batches: G after 4000 (2000) steps, within 4 standard errors.

    The residuals are small, as the theory is of leading order in them. The standard errors are 0.1
    and 0.2 % of the displacement; the fluctuating Hessian of the batches makes 14 and 25 % of it.
    """
    rng = np.random.default_rng(1)
    layers, x, y, s = oracle.fitted_sample((2, 2, 1), 4, residual=0.06, seed=1)
    p = reference.end_to_end(layers)
    noise = oracle.sample_noise(x, y, p, list(reference.batches(4, 2, False)))
    h = 0.5 / oracle.top_curvature(layers, s)
    steps, paths = (4000, 400) if beta == 0.0 else (2000, 400)
    predicted = oracle.follow(layers, s, noise, h, beta, steps, pieces=6)
    fixed = oracle.Noise(noise.chance, 0 * noise.s, noise.e)
    without = oracle.follow(layers, s, fixed, h, beta, steps, pieces=6)

    lower, upper = (np.broadcast_to(w, (paths, *w.shape)) for w in layers)
    v1, v2 = np.zeros_like(lower), np.zeros_like(upper)
    for k in range(steps + 300):  # the last steps without noise lead to the limit Phi_h
        rows = np.argsort(rng.random((paths, 4)), axis=1)[:, : 2 if k < steps else 4]
        xs, ys = x[rows], y[rows]
        error = xs @ np.swapaxes(upper @ lower, 1, 2) - ys
        m = np.swapaxes(error, 1, 2) @ xs / rows.shape[1]
        v1, v2 = (
            beta * v1 - h * np.swapaxes(upper, 1, 2) @ m,
            beta * v2 - h * m @ np.swapaxes(lower, 1, 2),
        )
        lower, upper = lower + v1, upper + v2
    start = reference.balancedness(layers)[0]
    moved = np.swapaxes(upper, 1, 2) @ upper - lower @ np.swapaxes(lower, 1, 2) - start
    mean, error = moved.mean(axis=0), moved.std(axis=0, ddof=1) / np.sqrt(paths)
    expected, plain = (reference.balancedness(z)[0] - start for z in (predicted, without))
    assert np.all(np.abs(mean - expected) < 4 * error)
    assert np.linalg.norm(error) < 0.003 * np.linalg.norm(expected)
    assert np.linalg.norm(plain - expected) > 0.12 * np.linalg.norm(expected)
