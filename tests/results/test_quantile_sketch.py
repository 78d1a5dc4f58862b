"""Quantiles of chunks against NumPy on everything at once."""

import numpy as np
import pytest
from scipy import stats

from gradflow.results.quantile_sketch import Sketch, numbers, ordered

PROBABILITIES = np.array([0.0, 0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999, 1.0])
RNG = np.random.default_rng(0)
SIZE = 30_000
DISTRIBUTIONS = {
    "normal": RNG.normal(size=SIZE),
    "narrow": 1.0 + 1e-4 * RNG.normal(size=SIZE),
    "narrow, negative": -7.0 - 1e-3 * RNG.normal(size=SIZE),
    "chi squared": 1e-9 * RNG.chisquare(1, size=SIZE),
    "heavy tails": RNG.standard_cauchy(size=SIZE),
    "many scales": np.exp(30.0 * RNG.normal(size=SIZE)),
    "one value": np.full(SIZE, 0.3),
    "two values": RNG.choice([-1.0, 2.0], size=SIZE),
}
each = pytest.mark.parametrize("values", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)


def sketch_of(values: np.ndarray, chunks: int = 1, bins: int = 512) -> Sketch:
    sketch = Sketch(bins)
    for part in np.array_split(values, chunks):
        sketch.add(part)
    return sketch


@each
def test_the_bound_holds(values: np.ndarray):
    found, bound = sketch_of(values, chunks=7).quantiles(PROBABILITIES)
    exact = np.quantile(values, PROBABILITIES)
    assert np.all(np.abs(found - exact) <= bound + 1e-14 * np.abs(exact))


@each
def test_chunks_order_and_merging_change_no_bit(values: np.ndarray):
    one, many = sketch_of(values), sketch_of(RNG.permutation(values), chunks=100)
    half, rest = sketch_of(values[:999]), sketch_of(values[999:])
    half.merge(rest)
    rest.merge(sketch_of(values[:999]))
    for other in (many, half, rest):
        assert other.level == one.level
        np.testing.assert_array_equal(other.keys, one.keys)
        np.testing.assert_array_equal(other.counts, one.counts)
    assert one.counts.sum() == SIZE
    assert one.keys.size <= 512


def test_few_values_are_kept_as_they_are():
    values = RNG.normal(size=512)
    sketch = sketch_of(values, chunks=3)
    assert sketch.level == 0
    found, bound = sketch.quantiles(PROBABILITIES)
    np.testing.assert_allclose(found, np.quantile(values, PROBABILITIES), rtol=1e-14)
    assert not bound.any()
    sketch.add(np.array([0.123]))
    assert sketch.level > 0


def test_bins_are_as_fine_as_their_number_allows():
    """Equal values fill one bin; a smaller level would fill more than 512."""
    values = DISTRIBUTIONS["normal"]
    level = sketch_of(values).level
    assert np.unique(ordered(values) >> level).size <= 512
    assert np.unique(ordered(values) >> (level - 1)).size > 512
    assert sketch_of(DISTRIBUTIONS["one value"]).quantiles(PROBABILITIES)[0].tolist() == [0.3] * 9


def test_quantiles_of_a_normal_law():
    """With 4096 bins the sketch adds nothing to the standard error of a sample of 10^6."""
    sketch = sketch_of(np.random.default_rng(1).normal(size=1_000_000), chunks=5, bins=4096)
    p = np.array([0.01, 0.1, 0.5, 0.9, 0.99])
    found, bound = sketch.quantiles(p)
    exact = stats.norm.ppf(p)
    error = np.sqrt(p * (1 - p) / 1e6) / stats.norm.pdf(exact)
    assert np.all(np.abs(found - exact) < 4.0 * error)
    assert np.all(bound < 0.02 * np.abs(exact) + 1e-3)


def test_what_is_not_finite_shows():
    assert np.isnan(Sketch(64).quantiles(PROBABILITIES)[0]).all()
    for wrong in (np.nan, np.inf, -np.inf):
        sketch = sketch_of(np.array([1.0, wrong, 2.0]))
        assert sketch.undefined == 1
        assert np.isnan(sketch.quantiles(PROBABILITIES)).all()
        clean = sketch_of(np.array([1.0]))
        clean.merge(sketch)
        assert np.isnan(clean.quantiles(PROBABILITIES)).all()


def test_the_largest_numbers_fit():
    largest = np.finfo(float).max
    values = np.concatenate([largest * RNG.uniform(-1.0, 1.0, 10_000), [largest, -largest]])
    found, bound = sketch_of(values, bins=64).quantiles(PROBABILITIES)
    assert np.isfinite(found).all() and np.isfinite(bound).all()
    np.testing.assert_allclose(found[[0, -1]], [-largest, largest], rtol=0.2)


def test_keys_are_in_the_order_of_the_numbers():
    values = np.sort(np.concatenate([RNG.standard_cauchy(1000), [0.0, 5e-324, -5e-324, 1e308]]))
    assert np.all(np.diff(ordered(values)) > 0)
    np.testing.assert_array_equal(numbers(ordered(values)), values)
    assert ordered(np.array([-0.0, 0.0])).tolist() == [0, 0]
