"""The part of a velocity that turns hidden units, against least squares over all skew matrices."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import gradflow as gf
from gradflow.geometry.rotations import without_rotation

WIDTHS = [(2, 3), (3, 4, 2), (2, 5, 3, 1), (1, 1, 1), (3, 1, 4, 2)]


def weights_of(widths, seed):
    rng = np.random.default_rng(seed)
    shapes = zip(widths[1:], widths[:-1], strict=True)
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


def turned(weights, skews):
    """The derivative of the layers under hidden rotations, by hand."""
    skews = [np.zeros((weights[0].shape[1],) * 2), *skews, np.zeros((len(weights[-1]),) * 2)]
    pairs = zip(weights, skews, skews[1:], strict=False)
    return [above @ np.asarray(w) - np.asarray(w) @ below for w, below, above in pairs]


def all_turns(weights):
    """The directions in which single angles turn the hidden units, as columns."""
    hidden = [len(w) for w in weights[:-1]]
    columns = []
    for layer, size in enumerate(hidden):
        for i in range(size):
            for j in range(i):
                skews = [np.zeros((n, n)) for n in hidden]
                skews[layer][i, j], skews[layer][j, i] = 1.0, -1.0
                columns.append(np.concatenate([t.ravel() for t in turned(weights, skews)]))
    return np.array(columns).T if columns else np.zeros((sum(w.size for w in weights), 0))


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("widths", WIDTHS)
def test_what_is_left_is_the_residual_of_least_squares(widths):
    weights, velocity = weights_of(widths, 0), weights_of(widths, 1)
    directions = all_turns(weights)
    flat = np.concatenate([np.ravel(v) for v in velocity])
    expected = flat - directions @ np.linalg.lstsq(directions, flat, rcond=None)[0]
    left = np.concatenate([np.ravel(v) for v in without_rotation(weights, velocity)])
    np.testing.assert_allclose(left, expected, atol=1e-12)


def test_a_rotation_leaves_nothing_and_the_function_alone():
    weights = weights_of((3, 4, 2), 2)
    skew = np.random.default_rng(3).normal(size=(4, 4))
    skew -= skew.T
    left = without_rotation(weights, tuple(map(jnp.asarray, turned(weights, [skew]))))
    assert max(float(jnp.max(jnp.abs(v))) for v in left) < 1e-13
    rotation = expm(1e-6 * skew)
    moved = [rotation @ np.asarray(weights[0]), np.asarray(weights[1]) @ rotation.T]
    for one, w, v in zip(moved, weights, turned(weights, [skew]), strict=True):
        np.testing.assert_allclose((one - np.asarray(w)) / 1e-6, v, atol=1e-4)
    before, after = gf.DeepLinear(weights).end_to_end, gf.DeepLinear(moved).end_to_end
    np.testing.assert_allclose(before, after, atol=1e-14)
