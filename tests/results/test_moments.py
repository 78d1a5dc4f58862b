"""Moments of chunks against NumPy on everything at once."""

import numpy as np
import pytest

from gradflow.results.moments import Moments

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(4, 4)) @ RNG.normal(size=(4, 1000)) + [[0.0], [10.0], [-3.0], [1e3]]


def gathered(values: np.ndarray, sizes: list[int], paired: int = 4) -> Moments:
    """The moments of chunks of the given sizes."""
    ends = np.cumsum(sizes)
    moments = Moments.of(values[:, :0], paired)
    for first, last in zip([0, *ends], [*ends, values.shape[1]], strict=False):
        moments = moments.merged(Moments.of(values[:, first:last], paired))
    return moments


@pytest.mark.parametrize("sizes", [[], [500], [1, 1, 1], [999], [0, 10, 0, 700], [7] * 142])
def test_any_division_into_chunks_gives_the_moments_of_all(sizes: list[int]):
    found = gathered(VALUES, sizes)
    assert found.count == 1000
    np.testing.assert_allclose(found.mean, VALUES.mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(found.variance, VALUES.var(axis=1, ddof=1), rtol=1e-11)
    np.testing.assert_allclose(found.covariance, np.cov(VALUES), rtol=1e-11)
    error = VALUES.std(axis=1, ddof=1) / np.sqrt(1000)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-11)
    np.testing.assert_array_equal(found.minimum, VALUES.min(axis=1))
    np.testing.assert_array_equal(found.maximum, VALUES.max(axis=1))


def test_a_large_mean_costs_no_digits_of_the_variance():
    """Sums of squares would have lost all of them: the spread is 1e-7 of the mean."""
    values = 1e6 + 0.1 * RNG.normal(size=(1, 5000))
    exact = np.var(values - 1e6, ddof=1)
    found = gathered(values, [100] * 40, paired=1)
    np.testing.assert_allclose(found.variance, exact, rtol=1e-8)
    np.testing.assert_allclose(found.covariance, [[exact]], rtol=1e-8)


def test_only_the_first_entries_are_paired():
    found = gathered(VALUES, [300, 300], paired=2)
    assert found.mean.shape == (4,)
    np.testing.assert_allclose(found.covariance, np.cov(VALUES[:2]), rtol=1e-11)
    assert gathered(VALUES, [300], paired=0).covariance.shape == (0, 0)


def test_few_paths_have_no_spread():
    one = Moments.of(VALUES[:, :1], 4)
    np.testing.assert_array_equal(one.mean, VALUES[:, 0])
    assert np.isnan(one.variance).all() and np.isnan(one.standard_error).all()
    none = Moments.of(VALUES[:, :0], 4)
    assert none.count == 0
    assert np.isnan(none.mean).all()
    assert none.merged(none).count == 0


def test_what_is_no_number_shows():
    values = VALUES.copy()
    values[1, 40] = np.nan
    found = gathered(values, [100, 100])
    assert np.isnan(found.mean).tolist() == [False, True, False, False]
    assert np.isnan(found.variance).tolist() == [False, True, False, False]
    assert np.isnan(found.maximum).tolist() == [False, True, False, False]
