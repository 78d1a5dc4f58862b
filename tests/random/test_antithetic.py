"""Errors over antithetic replicas are those of pairs, wherever a statement has one.

Replicas of a pair are a common part plus and minus an odd part ten times as large. What comes from
the means of pairs is written out with NumPy; an error over replicas would be far larger.
"""

from typing import Any

import numpy as np
import pytest
from scipy import stats
from specs import make_run

import gradflow as gf
from gradflow.analysis.boundary import mean_curves
from gradflow.analysis.rates import decay_rate, drift
from gradflow.analysis.statistics import independent_samples, read_paths
from gradflow.random.antithetic import IndependentSamples
from gradflow.study.spec.claim_tables import CLAIMS

TIME = np.linspace(0.0, 10.0, 41)
RNG = np.random.default_rng(7)
COUNT = 24
COMMON = 0.05 * RNG.standard_normal(COUNT)
ODD = 0.5 * RNG.standard_normal(COUNT)
MEMBERS = np.stack([COMMON + ODD, COMMON - ODD], axis=1).ravel()
"""One number a replica, `(2 COUNT,)`."""

ERROR = COMMON.std(ddof=1) / np.sqrt(COUNT)


def antithetic(**options: Any) -> Any:
    """A run with given values whose replicas are antithetic."""
    run = make_run(time=TIME, replicas=2 * COUNT, **options)
    run.trajectory.to_xarray().attrs["normals"] = '{"antithetic": true}'
    return run


def test_replicas_are_their_own_units_without_pairs():
    kept = np.array([True, False, True, True])
    samples = IndependentSamples(kept)
    values = np.array([[1.0, 2.0], [3.0, 5.0], [5.0, 11.0]])
    assert samples.count == 3
    np.testing.assert_array_equal(samples.means(values), values)
    np.testing.assert_allclose(samples.standard_error(values), stats.sem(values))


def test_pairs_are_units_where_both_are_kept():
    kept = np.array([True, True, False, True, True, True, False, False])
    samples = IndependentSamples(kept, antithetic=True)
    values = np.array([1.0, 3.0, 100.0, 6.0, 8.0])  # of replicas 0, 1, 3, 4, 5
    assert samples.count == 2
    np.testing.assert_array_equal(samples.means(values), [2.0, 7.0])
    assert samples.standard_error(values) == pytest.approx(2.5)
    matrices = np.multiply.outer(values, np.eye(2))
    np.testing.assert_allclose(samples.standard_error(matrices), 2.5 * np.eye(2))


@pytest.mark.parametrize(
    "samples",
    [
        IndependentSamples(np.array([True])),
        IndependentSamples(np.ones(2, bool), True),
        IndependentSamples(np.eye(2)[0] > 0, True),
    ],
)
def test_fewer_than_two_units_have_no_spread(samples: IndependentSamples):
    error = samples.standard_error(np.ones((int(samples.kept.sum()), 3)))
    assert error.shape == (3,) and np.isnan(error).all()


def test_a_trajectory_says_which_of_its_replicas_are_independent():
    lost = np.arange(2 * COUNT) == 5
    values = np.ones((2 * COUNT, TIME.size))
    samples = independent_samples(antithetic(x=values, diverged=lost).trajectory)
    assert samples.antithetic and samples.count == COUNT - 1
    np.testing.assert_array_equal(samples.kept, ~lost)
    plain = independent_samples(
        make_run(time=TIME, replicas=2 * COUNT, x=values, diverged=lost).trajectory
    )
    assert not plain.antithetic and plain.count == 2 * COUNT - 1


def test_a_slope():
    run = antithetic(imbalance=np.multiply.outer(MEMBERS, TIME))
    found = drift(run.trajectory, window=(0.0, 10.0))
    assert found.value == pytest.approx(COMMON.mean())
    assert found.standard_error == pytest.approx(ERROR)
    reach = stats.t.ppf(0.975, COUNT - 1) * ERROR
    assert (found.low, found.high) == pytest.approx((COMMON.mean() - reach, COMMON.mean() + reach))
    assert (found.replicas, found.independent) == (2 * COUNT, COUNT)
    assert found.per_replica.size == 2 * COUNT


def test_a_rate_of_replicas_and_of_their_mean():
    run = antithetic(imbalance=np.exp(-np.multiply.outer(1.0 + 0.1 * MEMBERS, TIME)))
    typical = decay_rate(run.trajectory, window=(0.0, 10.0))
    assert typical.value == pytest.approx(1.0 + 0.1 * COMMON.mean())
    assert typical.standard_error == pytest.approx(0.1 * ERROR)
    # The mean of cosh(0.1 ODD t) exp(-(1 + 0.1 COMMON) t): the jackknife over pairs.
    of_mean = decay_rate(run.trajectory, window=(0.0, 2.0), of="mean")
    used = TIME <= 2.0
    time = TIME[used]
    pairs = run.trajectory["imbalance"][:, used].reshape(COUNT, 2, -1).mean(axis=1)
    weights = np.gradient(time)
    weights[[0, -1]] *= 0.5

    def rate(curve: np.ndarray) -> float:
        return -np.polyfit(time, np.log(curve), 1, w=np.sqrt(weights))[0]

    left_out = [rate(np.delete(pairs, i, axis=0).mean(axis=0)) for i in range(COUNT)]
    pseudo = COUNT * rate(pairs.mean(axis=0)) - (COUNT - 1) * np.array(left_out)
    assert of_mean.value == pytest.approx(pseudo.mean())
    assert of_mean.standard_error == pytest.approx(stats.sem(pseudo))
    assert of_mean.independent == of_mean.per_replica.size == COUNT
    one_pair = make_run(time=TIME, replicas=2, imbalance=np.exp(-np.outer([1.0, 2.0], TIME)))
    one_pair.trajectory.to_xarray().attrs["normals"] = '{"antithetic": true}'
    with pytest.raises(ValueError, match=r"two independent replicas .* has 1"):
        decay_rate(one_pair.trajectory, window=(0.0, 2.0), of="mean")


def test_a_change_of_the_rate_is_judged_by_pairs():
    """The pairs bend by a tenth together, their members by five either way."""
    bent = np.maximum(TIME - 5.0, 0.0)
    members = np.repeat(0.1 + 0.01 * COMMON, 2) + np.tile([5.0, -5.0], COUNT)
    run = antithetic(imbalance=TIME + np.multiply.outer(members, bent))
    assert "the rate is not constant" in drift(run.trajectory, window=(0.0, 10.0)).note


def test_means_that_are_compared():
    values = 1.0 + np.multiply.outer(MEMBERS, np.ones(TIME.size))
    first = antithetic(x=values).trajectory
    second = make_run(time=TIME, replicas=3, x=np.ones((3, TIME.size))).trajectory
    table = gf.compare_trajectories({"a": first, "b": second}, ["x"], [10.0])
    (row,) = table.rows
    assert row.standard_error == pytest.approx(ERROR)
    assert table.replicas == {"a": 2 * COUNT, "b": 3}
    # With the degrees of freedom of pairs, at the level that the two tests share.
    reach = stats.t.ppf(1 - 0.05 / 2, COUNT - 1) * ERROR
    limit = abs(COMMON.mean()) + reach
    for factor, verdict in ((1.001, "agree"), (0.999, "not enough replicas")):
        tolerance = factor * limit / (1.0 + COMMON.mean())
        table = gf.compare_trajectories({"a": first, "b": second}, ["x"], [10.0], tolerance)
        assert table.rows[0].verdict == verdict


def test_diverged_pairs_count_once():
    """Six pairs of 24 are lost at once, and none of 48 replicas: Fisher's test of 6 and 0 pairs."""
    values = np.ones((2 * COUNT, TIME.size))
    lost = np.arange(2 * COUNT) < 12
    runs = {
        "a": antithetic(x=values, diverged=lost).trajectory,
        "b": antithetic(x=values).trajectory,
    }
    (verdict,) = gf.compare_trajectories(runs, ["x"], [10.0]).verdicts
    p = stats.fisher_exact([[6, COUNT - 6], [0, COUNT]]).pvalue
    assert verdict.reason.endswith(f"p = {p:.2g}")


def test_groups_of_the_jackknife_hold_whole_pairs():
    """Also where there are more pairs than groups; a split pair would show its odd part."""
    for count, groups in ((COUNT, COUNT), (40, 32)):
        common, odd = 0.05 * RNG.standard_normal(count), 0.5 * RNG.standard_normal(count)
        members = np.stack([common + odd, common - odd], axis=1).ravel()
        excess = np.multiply.outer(1.0 + members, np.exp(-TIME))
        run = make_run(
            time=TIME, replicas=2 * count, excess_loss=excess, loss_floor=np.ones_like(excess)
        ).trajectory
        run.to_xarray().attrs["normals"] = '{"antithetic": true}'
        curves = mean_curves(read_paths(run, "excess_loss"), read_paths(run, "loss_floor"))
        assert curves.groups == groups
        # For a mean the jackknife is nearly the standard error itself.
        error = stats.sem(common) * np.exp(-TIME)
        tolerance = 1e-10 if groups == count else 0.3
        np.testing.assert_allclose(curves.error(curves.excess), error, rtol=tolerance)


def test_claims_of_a_study():
    run = antithetic(x=np.multiply.outer(MEMBERS, TIME))
    claim = {"sentence": "x", "run": "run", "observable": "x"}
    for quantity in ("final", "change"):
        found = CLAIMS[quantity].model_validate(claim | {"quantity": quantity}).measure([run])
        assert found.value == pytest.approx(10.0 * COMMON.mean())
        assert found.error == pytest.approx(10.0 * ERROR)
