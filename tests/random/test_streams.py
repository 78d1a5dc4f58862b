"""Random streams: published Threefry answers, statistics, independence of how they are cut."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiled import compiled
from jax.extend.random import threefry2x32_p

from gradflow.random.streams import Stream, _multiply_high, threefry

KEY = jax.random.key(7)


@compiled
def drawn(stream, kind, shape):
    return getattr(stream, kind)(shape)


def stream(steps, paths, key=KEY):
    return Stream(key, jnp.asarray(steps), jnp.asarray(paths))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_its_published_answers(key, counter, expected):
    """The known-answer vectors of Random123 for Threefry-2x32 with 20 rounds."""
    words = threefry(
        jnp.array(key, jnp.uint32),
        jnp.array([counter[0]], jnp.uint32),
        jnp.array([counter[1]], jnp.uint32),
    )
    assert tuple(int(w[0]) for w in words) == expected


def test_threefry_is_the_generator_of_jax():
    """Word for word, under keys and counters of all sizes, one key for many counters or many."""
    rng = np.random.default_rng(0)
    key, many, counters = (
        jnp.asarray(rng.integers(0, 2**32, shape, dtype=np.uint32))
        for shape in ((2,), (2, 1000), (2, 1000))
    )
    for keys in (key, many):
        words = [jnp.broadcast_to(word, 1000) for word in keys]
        expected = threefry2x32_p.bind(*words, *counters)
        for found, theirs in zip(threefry(keys, *counters), expected, strict=True):
            np.testing.assert_array_equal(found, theirs)


def test_keys_are_folded_as_jax_folds_them():
    base = stream([0], [0])
    for index in (0, 1, 2**31 + 5):
        expected = jax.random.key_data(jax.random.fold_in(KEY, index))
        np.testing.assert_array_equal(base.substream(index).key, expected)


def test_draws_are_addressed_by_step_path_and_channel():
    whole = np.asarray(drawn(stream(range(12), range(6)), "normals", (2, 3)))
    assert whole.shape == (12, 2, 3, 6)
    assert len(np.unique(whole)) == whole.size
    later = drawn(stream(range(5, 9), range(6)), "normals", (2, 3))
    assert np.array_equal(later, whole[5:9])
    chosen = drawn(stream([3, 3, 11], [4, 0]), "normals", (2, 3))
    assert np.array_equal(chosen, whole[[3, 3, 11]][..., [4, 0]])
    moved = stream([0], range(6)).at_steps(jnp.arange(12))
    assert np.array_equal(drawn(moved, "normals", (2, 3)), whole)


def test_substreams_and_seeds_differ():
    """Substreams are those of the folded key, and none repeats the numbers of another."""
    base = stream(range(4), range(3))
    parts = [drawn(s, "uniforms", (2,)) for s in (base, base.substream(0), base.substream(1))]
    parts.append(drawn(stream(range(4), range(3), jax.random.key(8)), "uniforms", (2,)))
    assert len(np.unique(np.stack(parts))) == 4 * 4 * 2 * 3
    raw = stream(range(4), range(3), jax.random.key_data(KEY))
    assert np.array_equal(drawn(raw, "uniforms", (2,)), parts[0])


def test_counters_have_32_bits():
    """The last step and the last path are addressed, and differ from the first."""
    last = drawn(stream(np.array([0, 2**32 - 1]), np.array([0, 2**32 - 1])), "uniforms", ())
    assert len(np.unique(last)) == 4


def test_uniforms_and_normals_have_their_distributions():
    uniforms = np.asarray(drawn(stream(range(40), range(250)), "uniforms", (10,))).ravel()
    assert uniforms.dtype == np.float64
    assert uniforms.min() >= 0.0 and uniforms.max() < 1.0
    assert scipy.stats.kstest(uniforms, "uniform").pvalue > 0.01
    low_bits = np.mod(uniforms * 2.0**20, 1.0)
    assert scipy.stats.kstest(low_bits, "uniform").pvalue > 0.01
    normals = np.asarray(drawn(stream(range(40), range(250)), "normals", (10,))).ravel()
    assert scipy.stats.kstest(normals, "norm").pvalue > 0.01
    assert np.all(np.isfinite(normals))
    count = normals.size
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(np.mean(normals**power) - moment) < 4 * np.sqrt(variance / count)


def test_normals_are_the_quantiles_of_the_uniforms():
    cut = (range(5), range(100))
    uniforms = np.asarray(drawn(stream(*cut), "uniforms", (3,)))
    normals = np.asarray(drawn(stream(*cut), "normals", (3,)))
    np.testing.assert_allclose(normals, scipy.stats.norm.ppf(uniforms), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_steps_channels_and_paths_are_uncorrelated(axis):
    """Neighbours along any axis: correlation 0 within 4 standard errors, also of the squares."""
    z = np.asarray(drawn(stream(range(40), range(50)), "normals", (30,)))
    first = np.take(z, range(z.shape[axis] - 1), axis).ravel()
    second = np.take(z, range(1, z.shape[axis]), axis).ravel()
    for power in (1, 2):
        r = np.corrcoef(first**power, second**power)[0, 1]
        assert abs(r) < 4 / np.sqrt(first.size)


def test_integers_are_uniform():
    bounds = jnp.array([2, 3, 7])
    values = np.asarray(
        compiled(lambda s: s.integers(bounds, (3,)))(stream(range(100), range(300)))
    )
    assert values.shape == (100, 3, 300)
    for channel, m in enumerate((2, 3, 7)):
        counts = np.bincount(values[:, channel].ravel(), minlength=m)
        assert len(counts) == m
        assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_upper_word_of_a_product():
    """Against Python integers, at the ends of the range and for random words."""
    rng = np.random.default_rng(0)
    edges = [0, 1, 2, 0xFFFF, 0x10000, 0x10001, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF]
    pairs = [(a, b) for a in edges for b in edges]
    pairs += [tuple(int(v) for v in p) for p in rng.integers(0, 2**32, (500, 2))]
    a, b = (np.array(side, np.uint32) for side in zip(*pairs, strict=True))
    expected = [(int(i) * int(j)) >> 32 for i, j in pairs]
    assert np.array_equal(_multiply_high(jnp.asarray(a), jnp.asarray(b)), expected)


def test_booleans_have_their_probability():
    probability = jnp.asarray(0.3)
    values = compiled(lambda s: s.booleans(probability, (5,)))(stream(range(50), range(200)))
    count = values.size
    assert abs(float(jnp.mean(values)) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / count)


def test_permutations_are_uniform():
    n = 4
    orders = np.asarray(compiled(lambda s: s.permutations(n))(stream(range(60), range(200))))
    assert orders.shape == (60, n, 200)
    assert np.array_equal(
        np.sort(orders, axis=1), np.broadcast_to(np.arange(n)[:, None], orders.shape)
    )
    numbers = np.tensordot(n ** np.arange(n), orders, axes=(0, 1)).ravel()
    _, counts = np.unique(numbers, return_counts=True)
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts).pvalue > 0.01


SINGLE_PRECISION = """
import functools
import equinox as eqx, jax, jax.numpy as jnp, numpy as np, scipy.stats
import gradflow as gf
from gradflow.random.streams import Stream

assert not jax.config.jax_enable_x64
fast = {"xla_backend_optimization_level": 0}
compiled = functools.partial(eqx.filter_jit, compiler_options=fast)
stream = Stream(jax.random.key(7), jnp.arange(40), jnp.arange(250))
for kind, law in (("uniforms", "uniform"), ("normals", "norm")):
    values = compiled(getattr(stream, kind))((10,))
    assert values.dtype == jnp.float32, values.dtype
    assert bool(jnp.all(jnp.isfinite(values)))
    assert scipy.stats.kstest(np.asarray(values).ravel(), law).pvalue > 0.01
x, y = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]]), np.array([[1.0], [2.0], [0.0]])
data = gf.Regression.from_samples(x, y)
net = gf.DeepLinear([[[0.5, -1.0]], [[2.0]]])
problem = gf.Problem(data, [gf.Minibatch(2), gf.LabelNoise(0.5), gf.InputNoise(0.1)])
one = Stream(jax.random.key(0), jnp.arange(1), jnp.arange(1))
draw = compiled(problem.draw)(one, net.widths)
draw = jax.tree.map(lambda leaf: leaf[0, ..., 0], draw)
g = compiled(problem.sampled_gradient)(net.weights, draw)
assert all(v.dtype == jnp.float32 for v in g)
errors = x @ np.array([[1.0], [-2.0]]) - y
np.testing.assert_allclose(gf.loss(net, data), np.mean(errors**2) / 2, rtol=1e-6)
print("single precision works")
"""


@pytest.mark.slow
def test_single_precision():
    """With GRADFLOW_X64=0 everything is float32 and follows the same laws."""
    environment = os.environ | {"GRADFLOW_X64": "0"}
    environment.pop("JAX_ENABLE_X64", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SINGLE_PRECISION],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "single precision works"
