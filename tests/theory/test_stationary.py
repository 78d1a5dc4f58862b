"""The stationary fluctuation against Lyapunov equations, closed forms and enumerated batches."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.linalg
import slow_reference as oracle
from compiled import compiled
from reference import as_numpy, assert_close
from training import symmetric_root

import gradflow as gf
from gradflow.regularizers import GradientNoise
from gradflow.theory.stationary import stationary_covariance

covariance = compiled(stationary_covariance)

SXX = np.array([[1.3, 0.4], [0.4, 0.8]])
SINGULAR = np.array([[1.0, 0.5], [0.5, 0.25]])
LEVEL = 0.2


def stationary(problem, layers, h, discrete=True, beta=None, **options):
    """What gradflow says, in NumPy."""
    momentum = None if beta is None else jnp.asarray(beta)  # a Python float would compile anew
    weights = tuple(jnp.asarray(w) for w in layers)
    return as_numpy([covariance(problem, weights, jnp.asarray(h), discrete, momentum, **options)])[
        0
    ]


def labels(widths, s, std=0.5, n=3, gradient=False):
    """Label noise, and noise on the gradient if asked for."""
    layers = oracle.network(widths)
    p = reference.end_to_end(layers)
    extra = [GradientNoise(LEVEL)] if gradient else []
    data = gf.Regression.from_moments(s, p @ s, n=n)
    return gf.Problem(data, [gf.LabelNoise(std), *extra]), layers, std**2 / n


def recursion(layers, s, variance, gradient):
    """Kernel and noise of x+ = x - h (K x + noise), x = vec((P - T) S^{1/2}), from the Jacobian."""
    root = symmetric_root(s)
    widen = np.kron(np.eye(layers[-1].shape[0]), root)
    jacobian = widen @ reference.jacobian(layers).T
    kernel = jacobian @ jacobian.T
    # The noise on M is mat(z) S^{1/2} with z of covariance `variance` I; it reaches x through K.
    noise = variance * kernel @ kernel
    return kernel, noise + (LEVEL**2 * kernel if gradient else 0.0)


CHAINS = {
    "2-3-2": ((2, 3, 2), SXX, False),
    "2-3-2, singular": ((2, 3, 2), SINGULAR, False),
    "2-1-2": ((2, 1, 2), SXX, False),
    "1-2-3": ((1, 2, 3), SXX[:1, :1], False),
    "2-3-2, gradient": ((2, 3, 2), SXX, True),
    "2-2-1, gradient": ((2, 2, 1), SXX, True),
}


@pytest.mark.few_cases(9)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", CHAINS)
def test_covariance_solves_the_lyapunov_equation_of_position_and_velocity(name, beta):
    widths, s, gradient = CHAINS[name]
    problem, layers, variance = labels(widths, s, gradient=gradient)
    kernel, noise = recursion(layers, s, variance, gradient)
    values, vectors = np.linalg.eigh(kernel)
    basis = vectors[:, values > 1e-10 * values[-1]]
    inside, kick = basis.T @ kernel @ basis, basis.T @ noise @ basis
    one, size = np.eye(len(inside)), len(inside)
    for part in (0.1, 1.0, 1.9):
        h = part * (1 + beta) / values[-1]
        step = np.block([[one - h * inside, beta * one], [-h * inside, beta * one]])
        both = scipy.linalg.solve_discrete_lyapunov(step, h**2 * np.tile(kick, (2, 2)))
        expected = basis @ both[:size, :size] @ basis.T
        got = stationary(problem, layers, h, True, beta)
        assert_close([got], [expected], np.abs(expected).max(), 1e-10)


def sample(widths, n, size, replacement=False, inputs=0.0, singular=False):
    """Batches of a finite sample with a residual, and all of them enumerated."""
    layers, x, y, s = oracle.fitted_sample(widths, n, inputs, singular=singular)
    noises = [gf.Minibatch(size, replacement), *([gf.InputNoise(inputs)] if inputs else [])]
    problem = gf.Problem(gf.Regression.from_samples(x, y), noises)
    rows = list(reference.batches(n, size, replacement))
    return problem, layers, s, oracle.sample_noise(x, y, reference.end_to_end(layers), rows, inputs)


BATCHES = {
    "batches": lambda: sample((2, 3, 2), 4, 2),
    "replacement": lambda: sample((2, 2, 1), 4, 2, replacement=True),
    "batches, inputs": lambda: sample((1, 2, 3), 3, 2, inputs=0.3),
    "moments": lambda: sample((2, 3, 2), 9, 2),
    "moments, replacement, singular": lambda: sample((2, 2, 2), 9, 2, True, singular=True),
    "moments, inputs": lambda: sample((1, 2, 3), 4, 2, inputs=0.3),
}


@pytest.mark.few_cases(3)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_differ_in_their_hessian(name, beta):
    """Second moments of rho+ = rho - h K (rho S_k + E_k), all batches k enumerated."""
    problem, layers, s, noise = BATCHES[name]()
    assert (problem.data.fourth_moments is not None) == name.startswith("moments")
    back = np.linalg.pinv(oracle.factor_of(s)) @ symmetric_root(s)
    change = np.kron(np.eye(layers[-1].shape[0]), back)
    top = oracle.top_curvature(layers, s)
    stable = []
    for part in (0.05, 0.4, 1.5):
        h = part * (1 - beta) / top
        got = stationary(problem, layers, h, True, beta)
        try:
            x = oracle.stationary(layers, s, noise, h, beta).x
        except oracle.UnstableError:
            assert np.all(np.isnan(got))
            stable.append(False)
            continue
        expected = change.T @ x @ change
        assert_close([got], [expected], np.abs(expected).max(), 1e-10)
        stable.append(True)
    assert stable[:2] == [True, True]


@pytest.mark.slow
def test_enumerated_recursion_converges_to_the_covariance():
    """The moments of all batches, step after step from rest at the minimum, in another basis."""
    problem, layers, s, noise = BATCHES["replacement"]()
    kernel = sum(
        np.kron(a @ a.T, b.T @ b)
        for a, b in (
            (reference.above(layers, i), reference.below(layers, i))
            for i in range(1, len(layers) + 1)
        )
    )
    h = 0.5 / oracle.top_curvature(layers, s)
    spread = np.zeros_like(kernel)  # E vec(rho) vec(rho)^T
    outputs = np.eye(layers[-1].shape[0])
    for _ in range(2000):
        following = np.zeros_like(spread)
        for c, fluctuation, e in zip(*noise, strict=True):
            step = np.eye(len(kernel)) - h * kernel @ np.kron(outputs, s + fluctuation)
            kick = h * kernel @ e.ravel()
            following += c * (step @ spread @ step.T + np.outer(kick, kick))
        spread = following
    widen = np.kron(outputs, symmetric_root(s))
    expected = widen @ spread @ widen
    got = stationary(problem, layers, h)
    assert_close([got], [expected], np.abs(expected).max(), 1e-10)


def batch_noise(layers, s, noise):
    """K, the noise in x of one step at rest, and what fluctuations of covariance X add to it."""
    inverse = np.linalg.inv(symmetric_root(s))
    kernel, _ = recursion(layers, s, 0.0, False)
    e = (noise.e @ inverse).reshape(len(noise.e), -1)
    own = kernel @ np.einsum("q,qi,qj->ij", noise.chance, e, e) @ kernel
    wide = [kernel @ np.kron(np.eye(2), inverse @ z @ inverse) for z in noise.s]
    return (
        kernel,
        own,
        lambda x: sum(c * w @ x @ w.T for c, w in zip(noise.chance, wide, strict=True)),
    )


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_entries_with_momentum_in_closed_form(beta):
    """X_ab = h^2 N_ab s_ab in the eigenbasis of K, with the s_ab of theory section 7b."""
    problem, layers, s, noise = BATCHES["batches"]()
    kernel, own, fed_by = batch_noise(layers, s, noise)
    mu, vectors = np.linalg.eigh(kernel)
    h = 0.4 * (1 - beta) / mu[-1]
    got = stationary(problem, layers, h, True, beta)
    total = vectors.T @ (own + fed_by(got)) @ vectors
    off = total - np.diag(np.diag(total))
    assert np.abs(off).max() > 0.05 * np.abs(total).max()
    a, b = 1 + beta - h * mu[:, None], 1 + beta - h * mu
    lasting = (1 - beta**2) / (
        (1 - beta**2) * (1 - beta**2 - a * b) + beta * (a**2 + b**2) - 2 * beta**2 * a * b
    )
    expected = vectors @ (h**2 * lasting * total) @ vectors.T
    assert_close([got], [expected], np.abs(expected).max(), 1e-10)


def test_flows_feel_the_fluctuation_too():
    """K X + X K = h N(X), solved on a basis of matrices."""
    problem, layers, s, noise = BATCHES["batches"]()
    kernel, own, fed_by = batch_noise(layers, s, noise)
    h = 0.4 / np.linalg.eigvalsh(kernel)[-1]
    units = np.eye(kernel.size).reshape(-1, *kernel.shape)
    images = [(kernel @ u + u @ kernel - h * fed_by(u)).ravel() for u in units]
    expected = np.linalg.solve(np.stack(images, axis=1), h * own.ravel()).reshape(kernel.shape)
    got = stationary(problem, layers, h, False)
    assert_close([got], [expected], np.abs(expected).max(), 1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_beyond_the_edge_of_stability_there_is_none(beta):
    problem, layers, variance = labels((2, 3, 2), SXX)
    edge = 2 * (1 + beta) / np.linalg.eigvalsh(recursion(layers, SXX, variance, False)[0])[-1]
    assert np.all(np.isfinite(stationary(problem, layers, 0.99 * edge, True, beta)))
    assert np.all(np.isnan(stationary(problem, layers, 1.01 * edge, True, beta)))
