"""Statistics at every saved time against NumPy on all paths."""

import itertools

import numpy as np
import pytest

from gradflow.results.running_statistics import RunningStatistics

SHAPES = {"loss": (), "end": (2, 3), "norms": (2,)}
RNG = np.random.default_rng(0)
OBSERVED = [{n: RNG.normal(size=(200, *s)) for n, s in SHAPES.items()} for _ in range(3)]
ALIVE = [np.ones(200, bool), RNG.uniform(size=200) < 0.8, np.arange(200) < 3]


def gathered(chunks: list[int], times: int = 3) -> RunningStatistics:
    statistics = RunningStatistics(SHAPES, 3)
    for first, last in itertools.pairwise(np.cumsum([0, *chunks])):
        part = slice(first, last)
        for k in range(times):
            statistics.add(k, {n: v[part] for n, v in OBSERVED[k].items()}, ALIVE[k][part])
    return statistics


def test_every_observable_at_every_time():
    statistics = gathered([70, 1, 129])
    for k in range(3):
        moments, alive = statistics.moments[k], ALIVE[k]
        assert moments.count == alive.sum()
        assert statistics.lost[k] == 200 - alive.sum()
        for get, expected in (
            (moments.mean, lambda v: v.mean(axis=0)),
            (moments.variance, lambda v: v.var(axis=0, ddof=1)),
            (moments.minimum, lambda v: v.min(axis=0)),
        ):
            for name, found in statistics.of_observables(get).items():
                np.testing.assert_allclose(found, expected(OBSERVED[k][name][alive]), rtol=1e-11)
    assert statistics.paired == ["loss", "norms[0]", "norms[1]"]
    together = np.column_stack([OBSERVED[1]["loss"], OBSERVED[1]["norms"]])[ALIVE[1]]
    np.testing.assert_allclose(statistics.moments[1].covariance, np.cov(together.T), rtol=1e-11)


def test_quantiles_are_those_of_the_paths():
    found, bound = gathered([199, 1]).quantiles([0.1, 0.5])
    assert found.shape == (3, 2, 9)
    assert not bound.any()
    of = gathered([200]).of_observables(found)
    for k in range(3):
        expected = np.quantile(OBSERVED[k]["end"][ALIVE[k]], [0.1, 0.5], axis=0)
        np.testing.assert_allclose(of["end"][k], expected, rtol=1e-13)


def test_an_interrupted_ensemble_counts_what_it_has_seen():
    statistics = gathered([50, 50], times=2)
    assert statistics.seen == 2
    assert statistics.moments[1].count == ALIVE[1][:100].sum()
    assert statistics.quantiles([0.5])[0].shape == (2, 1, 9)


@pytest.mark.slow
def test_the_sketches_share_the_memory():
    small, large = RunningStatistics({"a": ()}, 10), RunningStatistics({"a": (100, 100)}, 100)
    assert small.sketches[0][0].bins == 2048
    assert large.sketches[0][0].bins == 64
    middle = RunningStatistics({"a": (30, 30)}, 10)
    assert 64 < middle.sketches[0][0].bins < 4096
    assert middle.sketches[0][0].bins * 16 * 900 * 10 <= 2**25
