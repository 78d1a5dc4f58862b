"""Normals from random bits against the quantile function of SciPy and of mpmath."""

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.stats
from compiled import compiled
from scipy.special import ndtri

from gradflow.random.normal_quantile import DOUBLE, SINGLE, double_normals, single_normals

RNG = np.random.default_rng(3)
EDGES = np.array([0, 1, 2**30, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
"""Words at the ends and around the middle."""

HIGH, LOW = (
    np.concatenate([RNG.integers(0, 2**32, 200_000, dtype=np.uint32), edges.ravel()])
    for edges in np.meshgrid(EDGES, EDGES)
)


def integers_of(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The upper 52 of 64 bits."""
    return (high.astype(np.uint64) << np.uint64(20)) | (low.astype(np.uint64) >> np.uint64(12))


def quantiles(m: np.ndarray, bits: int) -> np.ndarray:
    """Phi^-1((m + 1/2) / 2^bits), from the nearer end: both distances are exact doubles."""
    below = (m.astype(float) + 0.5) * 2.0**-bits
    above = (2.0**bits - m.astype(float) - 0.5) * 2.0**-bits
    return np.where(below < above, ndtri(below), -ndtri(above))


def test_double_normals_are_the_quantiles_of_their_bits():
    found = np.asarray(double_normals(jnp.asarray(HIGH), jnp.asarray(LOW)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, quantiles(integers_of(HIGH, LOW), 52), rtol=2e-10, atol=0.0)


@pytest.mark.parametrize(
    ("high", "low"), [(0, 0), (2**32 - 1, 2**32 - 1), (2**31, 0), (2**31 - 1, 2**32 - 1)]
)
def test_double_normals_at_the_ends_and_in_the_middle(high: int, low: int):
    m = (high << 20) | (low >> 12)
    with mpmath.workdps(40):
        u = (mpmath.mpf(m) + mpmath.mpf("0.5")) / mpmath.mpf(2) ** 52
        expected = float(mpmath.sqrt(2) * mpmath.erfinv(2 * u - 1))
    words = (jnp.array([word], jnp.uint32) for word in (high, low))
    np.testing.assert_allclose(double_normals(*words)[0], expected, rtol=2e-10, atol=0.0)


def test_single_normals_are_the_quantiles_of_their_bits():
    found = np.asarray(single_normals(jnp.asarray(HIGH)))
    assert found.dtype == np.float32
    tail = quantiles(HIGH & np.uint32(2**31 - 1), 32)
    expected = np.where(HIGH >> np.uint32(31) == 0, -tail, tail)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=2e-6)
    # The tail keeps its relative precision, down to the word that gives the largest normal.
    far = np.abs(expected) > 0.1
    np.testing.assert_allclose(found[far], expected[far], rtol=2e-6)
    assert np.abs(found).max() == pytest.approx(-ndtri(2.0**-33), rel=2e-6)


def test_opposite_bits_give_opposite_normals():
    high, low = jnp.asarray(HIGH), jnp.asarray(LOW)
    np.testing.assert_array_equal(double_normals(~high, ~low), -double_normals(high, low))
    flipped = single_normals(high ^ jnp.uint32(2**31))
    np.testing.assert_array_equal(flipped, -single_normals(high))


def test_normals_grow_with_their_bits():
    """Over evenly spaced bits and down both tails, by steps that the approximation resolves."""
    tail = np.unique(np.geomspace(1.0, 2.0**51, 4000).astype(np.uint64))
    m = np.unique(np.concatenate([tail, np.uint64(2**52 - 1) - tail]))
    m = np.unique(np.concatenate([m, np.linspace(0, 2**52 - 1, 20_001).astype(np.uint64)]))
    m = m[np.concatenate([[True], np.diff(quantiles(m, 52)) > 1e-8])]
    assert m.size > 20_000
    high, low = (m >> np.uint64(20)).astype(np.uint32), (m << np.uint64(12)).astype(np.uint32)
    assert np.all(np.diff(double_normals(jnp.asarray(high), jnp.asarray(low))) > 0.0)
    words = np.linspace(0, 2**31 - 1, 20_001).astype(np.uint32)
    assert np.all(np.diff(single_normals(jnp.asarray(words))) < 0.0)


@pytest.mark.parametrize("precision", ["double", "single"])
def test_a_million_normals(precision: str):
    """Moments up to the eighth within four standard errors, and the distribution function."""
    n = 1_000_000
    words = [jnp.asarray(RNG.integers(0, 2**32, n, dtype=np.uint32)) for _ in range(2)]
    z = double_normals(*words) if precision == "double" else single_normals(words[0])
    z = np.asarray(z, dtype=float)
    assert scipy.stats.kstest(z, "norm").pvalue > 0.01
    for power in range(1, 9):
        moment, square = (scipy.stats.norm.moment(p) for p in (power, 2 * power))
        error = np.sqrt((square - moment**2) / n)
        assert abs(np.mean(z**power) - moment) < 4.0 * error, power


@pytest.mark.parametrize(
    ("form", "tolerance"), [(DOUBLE, 2e-10), (SINGLE, 2.5e-6)], ids=["double", "single"]
)
def test_the_logarithm(form, tolerance: float):
    """Over all sizes, and next to 1 on both sides, where an error would be relative to nothing."""
    wide = np.exp(RNG.uniform(-70.0, 2.0, 100_000))
    near = 1.0 + RNG.uniform(-1e-3, 1e-3, 100_000)
    x = np.concatenate([wide, near, 2.0 ** np.arange(-100, 3)]).astype(form.floats)
    found = np.asarray(compiled(form.log)(jnp.asarray(x)), dtype=float)
    np.testing.assert_allclose(
        found, np.log(x.astype(float)), rtol=4e-7 * (form is SINGLE), atol=tolerance
    )
