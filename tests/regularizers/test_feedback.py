"""What fluctuations of the end-to-end matrix add to the noise on the data."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.regularizers.diffusion import data_sources

D_IN, D_OUT = 3, 2


def population() -> gf.Regression:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(D_IN, D_IN))
    best = rng.normal(size=(D_OUT, D_IN))
    sxx = root @ root.T
    return gf.Regression.from_moments(sxx, best @ sxx, best @ sxx @ best.T + np.eye(D_OUT), n=3)


def sample(features: int = D_IN) -> gf.Regression:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, features)) @ rng.normal(size=(features, D_IN))
    return gf.Regression.from_samples(x, rng.normal(size=(7, D_OUT)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "regularizers"),
    [
        (population(), [gf.Minibatch(3), gf.InputNoise(0.3), gf.LabelNoise(0.2)]),
        (population(), [gf.InputNoise(0.4)]),
        (sample(), [gf.Minibatch(3), gf.InputNoise(0.3), gf.LabelNoise(0.2)]),
        (sample(), [gf.Minibatch(4, replacement=True)]),
        (sample(features=2), [gf.Minibatch(2), gf.InputNoise(0.5)]),
    ],
)
def test_feedback_is_the_quadratic_part_of_the_covariance(data, regularizers):
    r"""$C$ is quadratic in $P$, so $\tfrac12 (C(P + \rho) + C(P - \rho)) - C(P)$ is exact."""
    rng = np.random.default_rng(2)
    problem = gf.Problem(data, regularizers)
    weights = (jnp.asarray(rng.normal(size=(4, D_IN))), jnp.asarray(rng.normal(size=(D_OUT, 4))))
    moments = problem.noise_moments(weights)

    def covariance_at(source, p):
        there = eqx.tree_at(lambda m: (m.p, m.m), moments, (p, p @ data.sxx - data.syx))
        return source.covariance(there)

    shifts = rng.normal(size=(3, D_OUT, D_IN))
    spread = jnp.asarray(np.einsum("mai,mck->aick", shifts, shifts))
    for source in data_sources(regularizers):
        middle = covariance_at(source, moments.p)
        expected = sum(
            0.5 * (covariance_at(source, moments.p + r) + covariance_at(source, moments.p - r))
            - middle
            for r in shifts
        )
        found = source.feedback(moments, spread).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(middle).max())
        assert source.is_multiplicative == bool(np.abs(expected).max() > 1e-9)


def test_reshuffled_batches_have_no_white_feedback():
    problem = gf.Problem(sample(), [gf.Minibatch(2, reshuffled=True)])
    moments = problem.noise_moments((jnp.eye(D_IN), jnp.ones((D_OUT, D_IN))))
    (source,) = data_sources(problem.regularizers)
    with pytest.raises(ValueError, match="reshuffled=False"):
        source.feedback(moments, jnp.zeros((D_OUT, D_IN, D_OUT, D_IN)))
