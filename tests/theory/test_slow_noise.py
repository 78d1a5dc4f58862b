"""The factor of the noise along the minima manifold; its covariance is tested with layer noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled
from reference import as_numpy

import gradflow as gf
from gradflow.regularizers import DropConnect, Dropout, GradientNoise, WeightNoise
from gradflow.theory import slow_noise
from gradflow.theory.slow_noise import (
    has_tangential_noise,
    tangential_factor,
    tangential_noise,
    tangential_size,
)

NOISELESS = gf.Regression.whitened([[1.5, 0.2]])
NOISY = gf.Regression.whitened([[1.5, 0.2]], n=2)
EXACT = gf.Regression.from_samples([[1.0], [2.0]], [[0.5], [1.0]])
RESIDUAL = gf.Regression.from_samples([[1.0], [2.0]], [[0.5], [1.2]])
GAUSSIAN = Dropout(0.1, "gaussian")
WEIGHTS = (jnp.array([[1.0, 0.4], [0.0, -0.7]]), jnp.array([[1.5, 4.0 / 7.0]]))

apply, matrix = compiled(tangential_noise), compiled(tangential_factor)


@pytest.mark.few_cases(11)
@pytest.mark.parametrize(
    ("data", "regularizers", "expected"),
    [
        (NOISELESS, [], False),
        (NOISELESS, [gf.LabelNoise(0.5), gf.Minibatch(2), gf.WeightDecay(0.1)], False),
        (NOISELESS, [GradientNoise(0.1)], True),
        (NOISELESS, [GradientNoise(0.0)], False),
        (NOISELESS, [Dropout(0.1)], True),
        (NOISELESS, [Dropout(0.0)], False),
        (NOISELESS, [DropConnect(0.1, layers=[2])], True),
        (NOISELESS, [GAUSSIAN], False),
        (NOISELESS, [GAUSSIAN, gf.Minibatch(1)], False),
        (NOISELESS, [GAUSSIAN, gf.LabelNoise(0.1)], True),
        (NOISELESS, [GAUSSIAN, gf.InputNoise(0.1)], True),
        (EXACT, [GAUSSIAN], False),
        (RESIDUAL, [GAUSSIAN], True),
        (RESIDUAL, [WeightNoise(0.1)], False),
        (RESIDUAL, [WeightNoise(0.1), gf.Minibatch(2)], False),
        (RESIDUAL, [WeightNoise(0.1), gf.Minibatch(1)], True),
        (EXACT, [WeightNoise(0.1), gf.Minibatch(1)], False),
        (EXACT, [WeightNoise(0.1), gf.LabelNoise(0.2)], True),
        (EXACT, [WeightNoise(0.0), gf.LabelNoise(0.2)], False),
        (EXACT, [WeightNoise(0.1), gf.LabelNoise(0.0)], False),
        (EXACT, [WeightNoise(0.1), gf.InputNoise(0.2)], True),
    ],
)
def test_which_noise_is_tangential(data, regularizers, expected):
    assert has_tangential_noise(gf.Problem(data, regularizers)) is expected


ALL = [GradientNoise(0.2), Dropout(0.1), GAUSSIAN, gf.LabelNoise(0.5), WeightNoise(0.1)]


@pytest.mark.slow
def test_factor_is_the_matrix_of_the_noise():
    """Columns are the noise of unit normals, and a draw is the matrix times the normals."""
    problem = gf.Problem(NOISY, ALL)
    factor = np.asarray(matrix(problem, WEIGHTS))
    size = tangential_size(problem, WEIGHTS)
    # 6 weights; 2 units and 6 entries see the 2 numbers of M, and the mask 3 x 2 of M and S
    assert factor.shape == (6, size)
    assert size == 6 + 2 * 6 + 2 * 2 + 6 * 2
    normals = np.random.default_rng(0).normal(size=size)
    noise = reference.flatten(as_numpy(apply(problem, WEIGHTS, normals)))
    np.testing.assert_allclose(noise, factor @ normals, atol=1e-12)


def test_noise_is_tangential():
    problem = gf.Problem(NOISY, ALL)
    normals = np.random.default_rng(0).normal(size=tangential_size(problem, WEIGHTS))
    noise = reference.flatten(as_numpy(apply(problem, WEIGHTS, normals)))
    across = reference.jacobian(as_numpy(WEIGHTS)).T @ noise
    assert np.abs(across).max() < 1e-13 < 0.1 < np.abs(noise).max()


@pytest.mark.slow
def test_variances_add_up_and_levels_scale():
    """F F^T of all is that of each; twice the std of the gradient noise is four times it."""
    alone = [[GradientNoise(0.2)], [Dropout(0.1)]]

    def covariance(regularizers):
        factor = matrix(gf.Problem(NOISY, regularizers), WEIGHTS)
        return np.asarray(factor @ factor.T)

    parts = [covariance(a) for a in alone]
    np.testing.assert_allclose(covariance(alone[0] + alone[1]), sum(parts), atol=1e-12)
    np.testing.assert_allclose(covariance([GradientNoise(0.4)]), 4.0 * parts[0], atol=1e-12)


@pytest.mark.slow
def test_no_noise_takes_no_normals():
    problem = gf.Problem(NOISY, [gf.LabelNoise(0.5), gf.WeightDecay(0.1)])
    assert tangential_size(problem, WEIGHTS) == 0
    noise = tangential_noise(problem, WEIGHTS, jnp.zeros((0,)))
    assert not any(np.any(v) for v in noise)
    assert tangential_factor(problem, WEIGHTS).shape == (6, 0)


def test_noise_on_weights_with_fixed_data_takes_no_normals():
    assert tangential_size(gf.Problem(NOISY, [WeightNoise(0.1)]), WEIGHTS) == 0


def test_many_paths_at_once():
    problem = gf.Problem(NOISY, [Dropout(0.1)])
    normals = np.random.default_rng(1).normal(size=(12, 3))
    stacked = tuple(jnp.stack([w] * 3, axis=-1) for w in WEIGHTS)
    paths = jax.vmap(tangential_noise, in_axes=(None, -1, -1), out_axes=-1)
    found = compiled(paths)(problem, stacked, jnp.asarray(normals))
    one = apply(problem, WEIGHTS, normals[:, 1])
    for many, single in zip(found, one, strict=True):
        np.testing.assert_allclose(many[..., 1], single, atol=1e-13)


def test_a_factor_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(slow_noise, "LARGEST_FACTOR", 70)
    problem = gf.Problem(NOISY, [Dropout(0.1)])
    with pytest.raises(ValueError, match=r"6 parameters has 12 columns, .* tangential_noise"):
        tangential_factor(problem, WEIGHTS)


def test_dropout_at_depth_one_is_refused():
    problem = gf.Problem(NOISY, [Dropout(0.1)])
    with pytest.raises(ValueError, match="depth 1 has none"):
        tangential_size(problem, (jnp.array([[1.5, 0.2]]),))
