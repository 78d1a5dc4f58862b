"""The noise of batches from the fourth moments of the data, against sums over rows in NumPy."""

import itertools

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import gradflow as gf
from gradflow.data import fourth_moments as module
from gradflow.regularizers.diffusion import data_sources

D_IN, D_OUT, ROWS = 3, 2, 16


def rows(rank=D_IN, residual=0.5, seed=0):
    """Skewed inputs of a given rank and targets near a linear map of them."""
    rng = np.random.default_rng(seed)
    x = rng.exponential(size=(ROWS, rank)) @ rng.normal(size=(rank, D_IN))
    return x, x @ rng.normal(size=(D_IN, D_OUT)) + residual * rng.normal(size=(ROWS, D_OUT))


def batch_noise(problem, weights):
    """Covariance and feedback of the batches, each `(d_N, d_0, d_N, d_0)`."""
    moments = problem.noise_moments(weights)
    (source,) = data_sources(problem.regularizers)
    shape = (D_OUT, D_IN) * 2
    return source.covariance(moments).reshape(shape), lambda c: source.feedback(moments, c)


def network(seed=3):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s)) for s in ((4, D_IN), (D_OUT, 4)))


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("rank", [D_IN, 2])
def test_covariance_and_feedback_are_those_of_all_batches(rank, replacement):
    """Every batch of two rows: Cov[e x^T] as it is, and Cov[rho x x^T] for every rho of a few."""
    x, y = rows(rank)
    data, weights = gf.Regression.from_samples(x, y), network()
    assert data.fourth_moments is not None
    pairs = itertools.product if replacement else itertools.permutations
    batches = np.array(list(pairs(range(ROWS), repeat=2) if replacement else pairs(range(ROWS), 2)))
    p = np.asarray(weights[1] @ weights[0])
    e = x @ p.T - y
    gradients = np.einsum("ka,ki->kai", e, x)[batches].mean(axis=1)
    gradients = gradients - gradients.mean(axis=0)
    expected = np.einsum("bai,bck->aick", gradients, gradients) / len(batches)
    moments = np.einsum("kj,ki->kji", x, x)[batches].mean(axis=1)
    moments = moments - moments.mean(axis=0)
    rho = np.random.default_rng(1).normal(size=(3, D_OUT, D_IN))
    moved = np.einsum("maj,bji->mbai", rho, moments)
    fed = np.einsum("mbai,mbck->aick", moved, moved) / len(batches)
    spread = np.einsum("maj,mcl->ajcl", rho, rho)

    problem = gf.Problem(data, [gf.Minibatch(2, replacement=replacement)])
    found, feedback = batch_noise(problem, weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    got = feedback(jnp.asarray(spread))
    np.testing.assert_allclose(got, fed, rtol=0, atol=1e-13 * np.abs(fed).max())


def test_the_noise_of_data_that_are_almost_fitted_keeps_its_digits():
    """Residuals of 1e-7, whose squares are below the rounding of fourth moments of the targets."""
    x, y = rows(residual=1e-7)
    data = gf.Regression.from_samples(x, y)
    assert data.fourth_moments is not None
    best = np.linalg.lstsq(x, y, rcond=None)[0].T
    with mpmath.workdps(40):  # the residual itself loses digits in double precision
        exact = np.vectorize(mpmath.mpf, otypes=[object])
        e = (exact(x) @ exact(np.asarray(data.best_map)).T - exact(y)).astype(float)
    assert np.abs(np.asarray(data.best_map) - best).max() < 1e-13
    w = np.einsum("ka,ki->kai", e, x)
    w = w - w.mean(axis=0)
    expected = np.einsum("kai,kcj->aicj", w, w) / ROWS
    weights = (jnp.eye(D_IN), data.best_map)
    found, _ = batch_noise(gf.Problem(data, [gf.Minibatch(1)]), weights)
    # A residual is a difference of numbers like y and known to their rounding, its square to twice.
    rounding = 2.0 * np.finfo(float).eps * np.abs(y).max() / 1e-7
    assert rounding < 1e-6
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding * np.abs(expected).max())


def test_one_row_has_no_noise():
    data = gf.Regression.from_samples(np.full((6, 1), 1.1), np.full((6, 1), 0.7))
    assert data.fourth_moments is not None
    problem = gf.Problem(data, [gf.Minibatch(2)])
    moments = problem.noise_moments((jnp.array([[2.0]]),))
    (source,) = data_sources(problem.regularizers)
    assert float(jnp.abs(source.covariance(moments)).max()) < 1e-30
    assert float(jnp.abs(source.feedback(moments, jnp.ones((1, 1, 1, 1)))).max()) < 1e-30


def test_the_rows_serve_where_they_are_the_shorter_way(monkeypatch):
    x, y = rows()
    size = (D_IN + D_OUT) * D_IN
    assert gf.Regression.from_samples(x[:size], y[:size]).fourth_moments is not None
    assert gf.Regression.from_samples(x[: size - 1], y[: size - 1]).fourth_moments is None
    monkeypatch.setattr(module, "MOST_WORK", ROWS * size**2 - 1)
    assert gf.Regression.from_samples(x, y).fourth_moments is None


def test_moments_that_overflow_are_not_kept():
    x, y = rows()
    data = gf.Regression.from_samples(1e100 * x, y)
    assert data.fourth_moments is None
    assert bool(jnp.all(jnp.isfinite(data.sxx)))


def test_populations_and_turned_data_have_none():
    x, y = rows()
    data = gf.Regression.from_samples(x, y)
    assert data.turned(jnp.eye(D_OUT), jnp.eye(D_IN)).fourth_moments is None
    assert gf.Regression.whitened([[1.0]]).fourth_moments is None


def test_data_that_are_stored_and_read_have_the_same():
    data = gf.Regression.from_samples(*rows())
    again = gf.Regression.from_arrays(data.to_arrays(), data.attrs())
    assert data.fourth_moments is not None and again.fourth_moments is not None
    for name in ("inputs", "mixed", "residuals"):
        ours, theirs = (getattr(d.fourth_moments, name) for d in (data, again))
        np.testing.assert_array_equal(ours, theirs)
