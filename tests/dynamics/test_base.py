"""What counts as diverged: the squared norm of all layers of a path, each path for itself."""

import jax.numpy as jnp
import numpy as np

from gradflow.data import Regression
from gradflow.dynamics.base import DIVERGENCE_FACTOR, divergence_limit, mask_diverged, squared_norm

RNG = np.random.default_rng(0)
LAYERS = [RNG.normal(size=shape) for shape in [(3, 2, 4), (1, 3, 4)]]


def test_norm_and_limit_of_every_path():
    weights = tuple(jnp.asarray(w) for w in LAYERS)
    norms = [sum(np.sum(w[..., r] ** 2) for w in LAYERS) for r in range(4)]
    np.testing.assert_allclose(squared_norm(weights), norms, rtol=1e-14)
    small, large = Regression.whitened([[0.5]]), Regression.whitened([[1e50]])
    expected = DIVERGENCE_FACTOR * (1.0 + np.array(norms))
    np.testing.assert_allclose(divergence_limit(weights, small), expected, rtol=1e-14)
    expected = np.full(4, DIVERGENCE_FACTOR * 1e100)
    np.testing.assert_allclose(divergence_limit(weights, large), expected, rtol=1e-14)


def test_a_path_is_masked_whichever_layer_is_too_large():
    large = [w.copy() for w in LAYERS]
    large[0][0, 0, 1], large[1][0, 2, 2], large[1][0, 0, 3] = 2e3, -2e3, np.inf
    masked = mask_diverged(tuple(jnp.asarray(w) for w in large), jnp.full(4, 1e6))
    for layer, start in zip(masked, LAYERS, strict=True):
        np.testing.assert_array_equal(layer[..., 0], start[..., 0])
        assert np.isnan(np.asarray(layer)[..., 1:]).all()
