"""Fluctuations that feed their noise, against dense solutions and sums of their series."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled

from gradflow.theory.self_consistent import self_consistent

SIZE = 3


def feeding(radius, seed=0):
    """(Z_q) symmetric: X to sum_q Z_q X Z_q, symmetric, its largest eigenvalue the radius."""
    z = np.random.default_rng(seed).normal(size=(2, SIZE, SIZE))
    z = z + z.transpose(0, 2, 1)
    top = np.linalg.eigvalsh(sum(np.kron(one, one) for one in z))[-1]
    return z * np.sqrt(radius / top)


def covariance(seed=1):
    root = np.random.default_rng(seed).normal(size=(SIZE, SIZE))
    return root @ root.T


def solution(z, b):
    return self_consistent(lambda x: jnp.einsum("qij,jk,qkl->il", z, x, z), b)


@compiled
def solve(z, b):
    return solution(z, b)


@pytest.mark.parametrize("radius", [0.0, 0.5, 0.99])
def test_it_is_the_dense_solution(radius):
    z, b = feeding(radius), covariance()
    whole = np.eye(SIZE**2) - sum(np.kron(one, one) for one in z)
    expected = np.linalg.solve(whole, b.ravel()).reshape(b.shape)
    found = np.asarray(solve(z, b))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    assert np.linalg.eigvalsh(found)[0] > 0.0


@pytest.mark.parametrize("radius", [1.01, 3.0])
def test_what_feeds_itself_more_than_it_decays_has_no_covariance(radius):
    assert np.all(np.isnan(solve(feeding(radius), covariance())))


def test_the_size_of_the_noise_does_not_matter():
    z, b = feeding(0.5), covariance()
    expected = np.asarray(solve(z, b))
    for scale in (1e-250, 1e200):
        np.testing.assert_allclose(solve(z, scale * b), scale * expected, rtol=1e-12)
    np.testing.assert_array_equal(solve(z, 0.0 * b), np.zeros_like(b))
    assert np.all(np.isnan(solve(z, np.nan * b)))


def test_paths_of_an_ensemble_are_solved_on_their_own():
    """An unstable one does not stop the others."""
    z = np.stack([feeding(r) for r in (0.9, 2.0, 0.1)])
    b = np.stack([covariance(s) for s in (1, 2, 3)])
    found = np.asarray(jax.jit(jax.vmap(solution))(z, b))
    assert np.all(np.isnan(found[1]))
    for i in (0, 2):
        np.testing.assert_allclose(found[i], solve(z[i], b[i]), rtol=1e-12)


@pytest.mark.slow
def test_derivatives_forward_and_backward():
    z, b = feeding(0.5), covariance()

    def level(t):
        return jnp.trace(solution(t * z, jnp.asarray(b)))

    step = 1e-5
    expected = (level(1.0 + step) - level(1.0 - step)) / (2.0 * step)
    np.testing.assert_allclose(jax.grad(level)(1.0), expected, rtol=1e-8)
    np.testing.assert_allclose(jax.jvp(level, (1.0,), (1.0,))[1], expected, rtol=1e-8)
