"""Initial networks: balancedness, imbalance and end-to-end matrices recomputed with NumPy."""

import re
from functools import partial, reduce
from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from gradflow import init

# Few enough that compiling the random draws of every shape takes no time.
widths = st.sampled_from([(3, 2), (1, 1, 1), (5, 2, 4), (3, 3, 3, 3), (2, 4, 1, 3, 2, 2)])
any_widths = st.lists(st.integers(1, 6), min_size=2, max_size=7).map(tuple)
seeds = st.integers(0, 2**32 - 1)
sizes = st.floats(0.05, 20.0)


def layers(network) -> list[np.ndarray]:
    return [np.asarray(w) for w in network.weights]


def product(network) -> np.ndarray:
    return reduce(lambda below, above: above @ below, layers(network))


def squared_norms(network) -> np.ndarray:
    return np.array([np.sum(w**2) for w in layers(network)])


def balancedness(network) -> float:
    """The largest entry of any G_i relative to the largest squared norm."""
    ws = layers(network)
    gaps = [np.abs(b.T @ b - a @ a.T).max() for a, b in pairwise(ws)]
    return max(gaps, default=0.0) / squared_norms(network).max()


def matrix(seed: int, shape: tuple[int, ...], rank: int) -> np.ndarray:
    """A random end-to-end matrix for the widths, of the given rank."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(shape[-1], rank)) @ rng.normal(size=(rank, shape[0]))


@pytest.mark.slow
@given(widths, seeds)
def test_shapes(shape, seed):
    key = jax.random.key(seed)
    for network in (
        init.gaussian(shape, key=key),
        init.orthogonal(shape, key=key),
        init.balanced(2.0, shape, key),
        init.unbalanced(shape, 0.0, key),
    ):
        assert network.widths == shape
        assert all(w.dtype == np.float64 for w in layers(network))


# Random


def test_gaussian_moments():
    network = init.gaussian((200, 300, 50), 0.7, jax.random.key(1))
    for w in layers(network):
        variance = 0.49 / w.shape[1]
        assert abs(w.mean()) < 4 * np.sqrt(variance / w.size)
        assert abs((w**2).mean() / variance - 1) < 4 * np.sqrt(2 / w.size)
        assert abs((w**4).mean() / (3 * variance**2) - 1) < 4 * np.sqrt((105 - 9) / 9 / w.size)
    first, second = layers(network)
    overlap = np.sum(first[:50, :200] * second[:, :200]) / (0.49 / np.sqrt(200 * 300))
    assert abs(overlap) < 4 * np.sqrt(50 * 200)


@pytest.mark.slow
@given(widths, seeds, sizes)
def test_orthogonal_layers(shape, seed, scale):
    for w in layers(init.orthogonal(shape, scale, jax.random.key(seed))):
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        np.testing.assert_allclose(gram, scale**2 * np.eye(min(w.shape)), atol=1e-13 * scale**2)


def test_orthogonal_is_uniform():
    """Averages over keys of a uniform orthogonal matrix: E W = 0 and E W_kl^2 = 1/d."""
    draws = np.array(
        [layers(init.orthogonal((3, 3), key=jax.random.key(k)))[0] for k in range(300)]
    )
    assert np.abs(draws.mean(axis=0)).max() < 4.5 / np.sqrt(3 * 300)
    spread = np.sqrt((3 / 15 - 1 / 9) / 300)
    assert np.abs((draws**2).mean(axis=0) - 1 / 3).max() < 4.5 * spread


def test_keys_decide():
    for make in (init.gaussian, init.orthogonal, partial(init.balanced, 1.0)):
        a, b, c = (layers(make((5, 2, 4), key=jax.random.key(k))) for k in (0, 0, 1))
        assert all(np.array_equal(u, v) for u, v in zip(a, b, strict=True))
        assert not any(np.array_equal(u, v) for u, v in zip(a, c, strict=True))
    old_style = layers(init.gaussian((5, 2, 4), key=jax.random.PRNGKey(0)))
    new_style = layers(init.gaussian((5, 2, 4), key=jax.random.key(0)))
    assert all(np.array_equal(u, v) for u, v in zip(old_style, new_style, strict=True))


# Balanced


@given(st.data(), seeds, st.booleans(), st.sampled_from([1e-6, 1.0, 1e6]))
def test_balanced_to_a_target(data, seed, rotate, size):
    shape = data.draw(widths if rotate else any_widths)
    rank = data.draw(st.integers(1, min(shape)))
    target = size * matrix(seed, shape, rank)
    network = init.balanced(target, shape, jax.random.key(seed) if rotate else None)
    np.testing.assert_allclose(product(network), target, atol=1e-13 * np.abs(target).max())
    assert balancedness(network) < 1e-14
    singular = np.linalg.svd(target, compute_uv=False)[:rank]
    expected = np.sum(singular ** (2 / network.depth))
    np.testing.assert_allclose(squared_norms(network), expected, rtol=1e-8)


def test_rank_deficient_targets_leave_no_rounding_in_the_weights():
    target = np.outer([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    network = init.balanced(target, (3, 3, 3, 3, 3))
    for w in layers(network):
        assert np.sum(np.linalg.svd(w, compute_uv=False) > 1e-12) == 1


@pytest.mark.slow
@given(widths, seeds, sizes)
def test_balanced_of_a_scale(shape, seed, scale):
    network = init.balanced(scale, shape, jax.random.key(seed))
    assert balancedness(network) < 1e-14
    singular = np.linalg.svd(product(network), compute_uv=False)
    expected = np.zeros(min(shape[0], shape[-1]))
    expected[: min(shape)] = scale
    np.testing.assert_allclose(singular, expected, atol=1e-13 * scale)


def test_a_key_rotates_only_hidden_units():
    target = matrix(2, (5, 4), 2)
    plain = layers(init.balanced(target, (5, 2, 4)))
    turned = layers(init.balanced(target, (5, 2, 4), jax.random.key(0)))
    rotation = turned[0] @ np.linalg.pinv(plain[0])
    np.testing.assert_allclose(rotation @ plain[0], turned[0], atol=1e-14)
    np.testing.assert_allclose(plain[1], turned[1] @ rotation, atol=1e-14)
    assert not np.allclose(plain[0], turned[0])


def test_a_zero_target_is_balanced():
    network = init.balanced(np.zeros((2, 3)), (3, 4, 2))
    assert np.all(squared_norms(network) == 0)


# Unbalanced


@given(st.data(), seeds, st.floats(-8, 6), st.sampled_from(["target", "turned target", "scale"]))
def test_unbalanced(data, seed, magnitude, kind):
    shapes = any_widths if kind == "target" else widths
    shape = data.draw(shapes.filter(lambda shape: len(shape) > 2))
    heavy = data.draw(st.integers(1, len(shape) - 1))
    imbalance = 10.0**magnitude
    key = None if kind == "target" else jax.random.key(seed)
    if kind != "scale":
        target = matrix(seed, shape, data.draw(st.integers(1, min(shape))))
        network = init.unbalanced(shape, imbalance, key, target=target, heavy=heavy)
        np.testing.assert_allclose(product(network), target, atol=1e-12 * np.abs(target).max())
        balanced = squared_norms(init.balanced(target, shape))[0]
    else:
        network = init.unbalanced(shape, imbalance, key, scale=0.6, heavy=heavy)
        singular = np.linalg.svd(product(network), compute_uv=False)[: min(shape)]
        np.testing.assert_allclose(singular, 0.6, rtol=1e-12)
        balanced = min(shape) * 0.6 ** (2 / network.depth)
    norms = squared_norms(network)
    measured = norms.max() - norms.min()
    assert abs(measured - imbalance) <= 1e-12 * max(imbalance, balanced)
    others = np.delete(norms, heavy - 1)
    assert np.ptp(others) <= 1e-13 * norms.max()
    assert norms.argmax() == heavy - 1 or imbalance < 1e-12 * balanced


@given(st.floats(-4, 6), st.floats(0.01, 100.0))
def test_scalar_depth_two_closed_form(magnitude, target):
    """w_1^2 - w_2^2 = u and w_1 w_2 = T give w_1^2 = (sqrt(u^2 + 4 T^2) + u) / 2."""
    u = 10.0**magnitude
    network = init.unbalanced((1, 1, 1), u, target=[[target]])
    first, second = squared_norms(network)
    np.testing.assert_allclose(first, (np.hypot(u, 2 * target) + u) / 2, rtol=1e-12)
    np.testing.assert_allclose(second, target**2 / first, rtol=1e-11)


def test_defaults_of_unbalanced():
    network = init.unbalanced((5, 2, 4), 3.0, jax.random.key(0))
    singular = np.linalg.svd(product(network), compute_uv=False)
    np.testing.assert_allclose(singular, [1, 1, 0, 0], atol=1e-13)
    norms = squared_norms(network)
    np.testing.assert_allclose(norms[0] - norms[1], 3.0, rtol=1e-13)


def test_one_layer_has_no_imbalance():
    target = matrix(3, (3, 2), 2)
    np.testing.assert_allclose(
        product(init.unbalanced((3, 2), 0.0, target=target)), target, atol=1e-14
    )
    with pytest.raises(ValueError, match=r"init\.imbalance: got 1\.0 for one layer"):
        init.unbalanced((3, 2), 1.0, target=target)


# Refusals

KEY = jax.random.key(0)


@pytest.mark.parametrize("make", [init.gaussian, init.orthogonal])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((), r"init\.widths: got \(\)"),
        ((3,), r"init\.widths: got \(3,\)"),
        ((3, 0, 2), r"init\.widths: d_1 is 0 in \(3, 0, 2\)"),
        ((3, -1), r"init\.widths: d_1 is -1"),
        ((True, 2), r"init\.widths: d_0 is True"),
    ],
)
def test_bad_widths(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(wrong, key=KEY)


def test_numpy_widths_are_fine():
    assert init.gaussian(np.array([3, 2]).tolist(), key=KEY).widths == (3, 2)
    assert init.gaussian(list(np.array([3, 2])), key=KEY).widths == (3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: init.gaussian((2, 2), 0.0, KEY), r"init\.scale: got 0\.0"),
        (lambda: init.orthogonal((2, 2), -1.0, KEY), r"init\.scale: got -1\.0"),
        (lambda: init.balanced(np.inf, (2, 2), KEY), r"init\.scale: got inf"),
        (lambda: init.balanced(1.0, (2, 2)), r"init\.key: is needed"),
        (
            lambda: init.balanced(np.eye(3), (3, 2, 3)),
            r"init\.target: has rank 3, but widths \(3, 2, 3\) let through at most 2",
        ),
        (lambda: init.balanced(np.eye(3), (2, 2, 3)), r"shape \(d_N, d_0\) = \(3, 2\)"),
        (lambda: init.balanced([[1.0], [1.0, 2.0]], (2, 2)), r"init\.target: needs a rectangular"),
        (lambda: init.balanced([[np.nan]], (1, 1)), r"init\.target: .*not finite"),
        (lambda: init.unbalanced((2, 2, 2), -1.0, KEY), r"init\.imbalance: got -1\.0"),
        (lambda: init.unbalanced((2, 2, 2), np.inf, KEY), r"init\.imbalance: got inf"),
        (lambda: init.unbalanced((2, 2, 2), 1.0, KEY, heavy=3), r"init\.heavy: no layer 3.*1 to 2"),
        (lambda: init.unbalanced((2, 2, 2), 1.0, KEY, heavy=0), r"init\.heavy: no layer 0"),
        (lambda: init.unbalanced((2, 2, 2), 1.0), r"init\.key: is needed"),
        (
            lambda: init.unbalanced((1, 1, 1), 1.0, target=[[1.0]], scale=2.0),
            r"init\.scale: got 2\.0 beside a target",
        ),
        (lambda: init.unbalanced((1, 1, 1), 1.0, target=[[0.0]]), r"init\.target: is zero"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_key():
    for make in (init.gaussian, init.orthogonal):
        with pytest.raises(TypeError, match=re.escape("init.key: got 3; pass a random key")):
            make.__wrapped__((2, 2), 1.0, 3)


def test_the_key_is_third_everywhere():
    key = jax.random.key(3)
    for make in (init.gaussian, init.orthogonal):
        by_name = make((2, 3, 1), scale=0.5, key=key)
        for a, b in zip(make((2, 3, 1), 0.5, key).weights, by_name.weights, strict=True):
            np.testing.assert_array_equal(a, b)
        plain = make((2, 3, 1), key=key)
        np.testing.assert_allclose(by_name.weights[0], 0.5 * plain.weights[0], rtol=1e-15)
        with pytest.raises(ValueError, match=r"init\.key: is needed to draw weights"):
            make((2, 3, 1))
        with pytest.raises(TypeError, match=r"init\.scale: got a random key; the key comes third"):
            make.__wrapped__((2, 3, 1), key)


def test_a_masked_target_is_refused():
    masked = np.ma.masked_array([[1.0]], mask=[[True]])
    with pytest.raises(ValueError, match=r"init\.target: is a masked array"):
        init.balanced(masked, (1, 2, 1))
