"""Verdicts: how often they are wrong, and what they say when something does not fit."""

import jax
import numpy as np
import pytest
from scipy import stats

import gradflow as gf
from gradflow.analysis.comparison.agreement import AGREE, DIFFER, UNDECIDED, decide
from gradflow.analysis.comparison.compare import compare, compare_trajectories
from gradflow.analysis.comparison.matched_times import common_grid

TIME = np.linspace(0.0, 5.0, 6)
FLOW = {"dynamics": gf.GradientFlow()}


def normal(rng, replicas, mean, spread=1.0, time=TIME):
    return mean + spread * rng.standard_normal((replicas, time.size))


def verdict(comparison):
    (only,) = comparison.verdicts
    return only.verdict


@pytest.mark.parametrize("level", [0.05, 0.005])
def test_each_verdict_is_wrong_no_more_often_than_its_level(level):
    # The difference sits exactly on the tolerance: both "agree" and "differ" are wrong there, and
    # each is given with probability `level`.
    rng, trials, n, m = np.random.default_rng(1), 20_000, 40, 60
    a = rng.standard_normal((trials, n))
    b = 0.3 + 2.0 * rng.standard_normal((trials, m))
    va, vb = a.var(axis=1, ddof=1) / n, b.var(axis=1, ddof=1) / m
    degrees = (va + vb) ** 2 / (va**2 / (n - 1) + vb**2 / (m - 1))
    difference, error = b.mean(axis=1) - a.mean(axis=1), np.sqrt(va + vb)
    quick = stats.t.isf(level, degrees) * error
    expected = {AGREE: np.abs(difference) + quick <= 0.3, DIFFER: np.abs(difference) - quick > 0.3}
    for said, mask in expected.items():
        assert mask.sum() <= stats.binom.isf(1e-4, trials, level), said
    assert expected[DIFFER].sum() >= stats.binom.ppf(1e-4, trials, level)
    for i in range(200):
        got = decide(difference[i], error[i], degrees[i], 0.3, level, n).verdict
        assert got == next((s for s, mask in expected.items() if mask[i]), UNDECIDED)


def test_all_verdicts_of_a_comparison_hold_together(make_run):
    # 12 rows with the difference exactly on the tolerance.
    rng, trials, wrong = np.random.default_rng(2), 120, 0
    for _ in range(trials):
        runs = {
            "a": make_run(TIME, {k: normal(rng, 64, 10.0) for k in "xy"}),
            "b": make_run(TIME, {k: normal(rng, 64, 10.5) for k in "xy"}),
        }
        rows = compare_trajectories(runs, ["x", "y"], tolerance=0.05).rows
        wrong += any(row.verdict == DIFFER for row in rows)
    assert wrong <= stats.binom.isf(1e-3, trials, 0.05)


def test_power(make_run):
    # Error of a difference 0.07 against a tolerance of 0.5: equal means agree, twice the tolerance
    # differs, and both are found practically always.
    rng, trials = np.random.default_rng(3), 20
    for mean, expected in ((10.0, AGREE), (11.0, DIFFER)):
        for _ in range(trials):
            runs = {
                "a": make_run(TIME, {"loss": normal(rng, 400, 10.0)}),
                "b": make_run(TIME, {"loss": normal(rng, 400, mean)}),
            }
            comparison = compare_trajectories(runs, ["loss"])
            assert verdict(comparison) == expected
            assert comparison.agree == (expected == AGREE)


def test_row_against_scipy(make_run):
    rng = np.random.default_rng(4)
    a, b = normal(rng, 12, 4.0), normal(rng, 30, 4.4, 2.0)
    runs = {"sgd": make_run(TIME, {"loss": a}), "sde": make_run(TIME, {"loss": b})}
    comparison = compare_trajectories(runs, ["loss"], times=[3.0], confidence=0.9)
    (row,) = comparison.rows
    test = stats.ttest_ind(b[:, 3], a[:, 3], equal_var=False)
    assert row.difference == pytest.approx(b[:, 3].mean() - a[:, 3].mean())
    assert row.sigmas == pytest.approx(test.statistic)
    assert row.relative == pytest.approx(row.difference / abs(a[:, 3].mean()))
    assert (row.first, row.second, row.time, row.units) == ("sgd", "sde", 3.0, "weight^2")
    # The replicas it asks for: those at which the same difference just decides. One row and one
    # test of divergence share the level of 0.1.
    assert row.verdict == UNDECIDED
    margin = abs(0.05 * abs(a[:, 3].mean()) - abs(row.difference))
    reach = stats.t.isf(0.1 / 2, test.df) * row.standard_error
    assert row.replicas_needed == int(np.ceil(30 * (reach / margin) ** 2))
    shrink = np.sqrt(30 / row.replicas_needed)
    limit = 0.05 * abs(a[:, 3].mean())
    more = decide(row.difference, row.standard_error * shrink, test.df, limit, 0.05, 1)
    assert more.verdict != UNDECIDED
    assert str(row.replicas_needed) in str(comparison)


def test_deterministic_paths_are_compared_by_size_alone(make_run):
    x = np.exp(-TIME)
    for factor, expected in ((1.049, AGREE), (1.051, DIFFER)):
        runs = {"a": make_run(TIME, {"loss": x}, **FLOW)}
        runs["b"] = make_run(TIME, {"loss": x * factor}, **FLOW)
        comparison = compare_trajectories(runs, ["loss"])
        assert verdict(comparison) == expected
        assert all(row.standard_error == 0.0 for row in comparison.rows)
    assert "exact" in str(comparison)


def test_equal_starts_and_rounding_are_no_difference(make_run):
    rng = np.random.default_rng(5)
    a, b = normal(rng, 100, 5.0, 0.1), normal(rng, 100, 5.0, 0.1)
    a[:, 0] = b[:, 0] = 0.1 + 0.2
    runs = {"a": make_run(TIME, {"loss": a}), "b": make_run(TIME, {"loss": b})}
    first = compare_trajectories(runs, ["loss"]).rows[0]
    assert (first.difference, first.standard_error, first.sigmas) == (0.0, 0.0, 0.0)
    assert first.verdict == AGREE
    zero = {"a": make_run(TIME, {"loss": 0.0 * TIME}, **FLOW)}
    zero["b"] = make_run(TIME, {"loss": np.full_like(TIME, 1e-15)}, **FLOW)
    assert compare_trajectories(zero, ["loss"]).agree
    assert not compare_trajectories(zero, ["loss"], atol=0.0).agree


def test_what_has_decayed_to_nothing_is_compared_with_what_it_was(make_run):
    runs = {"a": make_run(TIME, {"loss": np.exp(-6.0 * TIME)}, **FLOW)}
    runs["b"] = make_run(TIME, {"loss": np.exp(-6.01 * TIME)}, **FLOW)
    comparison = compare_trajectories(runs, ["loss"])
    assert comparison.agree
    last = comparison.rows[-1]
    assert last.relative == pytest.approx(last.difference / 1e-3)
    # A level that is not negligible is still compared with itself.
    floor = {
        k: make_run(TIME, {"loss": np.exp(-6.0 * TIME) + c}, **FLOW)
        for k, c in (("a", 0.01), ("b", 0.011))
    }
    assert verdict(compare_trajectories(floor, ["loss"])) == DIFFER


def test_arrays_are_compared_component_by_component(make_run):
    x = np.stack([np.full(TIME.size, 4.0), np.full(TIME.size, 0.01)], axis=1)
    y = x + np.array([0.0, 0.3])
    runs = {"a": make_run(TIME, {"squared_norms": x}, dims=("layer",), **FLOW)}
    runs["b"] = make_run(TIME, {"squared_norms": y}, dims=("layer",), **FLOW)
    comparison = compare_trajectories(runs, ["squared_norms"])
    names = {row.observable: row.verdict for row in comparison.rows}
    assert names == {"squared_norms[layer=1]": AGREE, "squared_norms[layer=2]": DIFFER}
    assert len(comparison.verdicts) == 1
    assert "[layer=2]" in comparison.verdicts[0].reason
    # The scale is that of the whole array: 0.1 beside 4 is small, whatever the component is.
    small = make_run(TIME, {"squared_norms": x + np.array([0.0, 0.1])}, dims=("layer",), **FLOW)
    assert compare_trajectories({"a": runs["a"], "b": small}, ["squared_norms"]).agree


def test_one_deterministic_and_one_random(make_run):
    rng = np.random.default_rng(6)
    runs = {"flow": make_run(TIME, {"loss": np.full_like(TIME, 3.0)}, **FLOW)}
    runs["sgd"] = make_run(TIME, {"loss": normal(rng, 400, 3.0, 0.2)})
    comparison = compare_trajectories(runs, ["loss"])
    assert comparison.agree
    assert comparison.rows[2].standard_error == pytest.approx(0.01, rel=0.2)
    assert comparison.replicas == {"flow": 1, "sgd": 400}
    runs["sgd"] = make_run(TIME, {"loss": normal(rng, 1, 3.0)[0]})
    with pytest.raises(ValueError, match="'sgd' is a single path of a random dynamics"):
        compare_trajectories(runs, ["loss"])


def test_diverged_replicas_are_counted_and_tested(make_run):
    rng = np.random.default_rng(7)
    values = {"loss": normal(rng, 64, 5.0, 0.1)}
    whole = make_run(TIME, values)
    few = make_run(TIME, values, diverged=np.arange(64) < 1)
    many = make_run(TIME, values, diverged=np.arange(64) < 30)
    agree = compare_trajectories({"a": whole, "b": few}, ["loss"])
    assert agree.agree
    assert (agree.diverged, agree.replicas) == ({"a": 0, "b": 1}, {"a": 64, "b": 63})
    differ = compare_trajectories({"a": whole, "b": many}, ["loss"])
    assert all(row.verdict == AGREE for row in differ.rows)
    assert verdict(differ) == DIFFER
    p = stats.fisher_exact([[0, 64], [30, 34]]).pvalue
    assert differ.verdicts[0].reason.startswith("diverged: 30 of 64 replicas of b, 0 of 64 of a")
    assert f"{p:.2g}" in differ.verdicts[0].reason
    gone = make_run(TIME, values, diverged=np.full(64, True))
    lost = compare_trajectories({"a": whole, "b": gone}, ["loss"])
    assert (verdict(lost), lost.rows) == (DIFFER, ())
    with pytest.raises(ValueError, match="every replica of 'a' and of 'b' diverged"):
        compare_trajectories({"a": gone, "b": gone}, ["loss"])


def test_times_are_matched_and_never_interpolated(make_run):
    x = np.exp(-TIME)
    a = make_run(TIME, {"loss": x}, **FLOW)
    almost = make_run(TIME * (1.0 + 1e-13), {"loss": x}, **FLOW)
    assert compare_trajectories({"a": a, "b": almost}, ["loss"]).agree
    shifted = make_run(np.array([0.0, 1.0, 2.0, 3.25, 4.0, 5.0]), {"loss": x}, **FLOW)
    with pytest.raises(ValueError, match=r"'a' was not saved at t = 3\.25 \(nearest 3\)"):
        compare_trajectories({"a": a, "b": shifted}, ["loss"])
    common = compare_trajectories({"a": a, "b": shifted}, ["loss"], times=[1.0, 2.0, 4.0])
    assert [row.time for row in common.rows] == [1.0, 2.0, 4.0]
    with pytest.raises(ValueError, match=r"'b' was not saved at t = 3 \(nearest 3\.25\)"):
        compare_trajectories({"a": a, "b": shifted}, ["loss"], times=[1.0, 3.0])
    shorter = make_run(TIME[:4], {"loss": x[:4]}, **FLOW)
    with pytest.raises(ValueError, match=r"'b' was not saved at t = 4 \(nearest 3\), 5"):
        compare_trajectories({"a": a, "b": shorter}, ["loss"])
    with pytest.raises(ValueError, match="give one flow time or more"):
        compare_trajectories({"a": a, "b": a}, ["loss"], times=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observables": ["sharpness"]}, "add 'sharpness' to observables="),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1"),
    ],
)
def test_wrong_arguments_are_named(make_run, change, message):
    run = make_run(TIME, {"loss": np.exp(-TIME)}, **FLOW)
    arguments = {"trajectories": {"a": run, "b": run}, "observables": ["loss"]} | change
    with pytest.raises(ValueError, match=message):
        compare_trajectories(**arguments)
    with pytest.raises(ValueError, match="two or more trajectories"):
        compare_trajectories({"a": run}, ["loss"])


def test_the_grid_is_common_to_all_step_sizes():
    np.testing.assert_allclose(common_grid({}, 2.0, 5), np.linspace(0.0, 2.0, 5))
    np.testing.assert_allclose(common_grid({"a": 0.1, "b": 0.05}, 1.0, 6), np.linspace(0, 1, 6))
    # 0.1 and 0.07 meet every 0.7; 100 times do not fit.
    times = common_grid({"a": 0.1, "b": 0.07}, 7.5, 100)
    np.testing.assert_allclose(times, 0.7 * np.arange(11))
    np.testing.assert_allclose(common_grid({"a": 2e-7, "b": 1e-7}, 1e-6, 3), [0.0, 4e-7, 1e-6])
    for steps in ({"a": 0.1, "b": 0.07}, {"a": 0.1, "b": 0.1 * np.sqrt(2.0)}):
        with pytest.raises(ValueError, match=r"0\.1 \(a\), .* have no common multiple"):
            common_grid(steps, 0.6, 11)
    with pytest.raises(ValueError, match="t1 must be positive"):
        common_grid({}, 0.0, 5)


def test_the_text_is_an_aligned_table_and_the_frame_has_its_rows(make_run):
    rng = np.random.default_rng(8)
    runs = {
        "GradientDescent": make_run(TIME, {"loss": normal(rng, 50, 5.0)}),
        "SDE": make_run(TIME, {"loss": normal(rng, 50, 5.0)}),
    }
    comparison = compare_trajectories(runs, ["loss"])
    lines = str(comparison).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("observable"))
    assert lines[0] == "GradientDescent: 50 replicas, 0 diverged"
    assert len(lines) == start + 1 + TIME.size
    for heading in ("flow time", "mean first", "std. error", "relative"):
        end = lines[start].index(heading) + len(heading)
        assert all(line[end - 1] != " " and line[end] == " " for line in lines[start + 1 :])
    frame = comparison.to_dataframe()
    assert list(frame["time"]) == list(TIME)
    np.testing.assert_allclose(frame["difference"], frame["mean_second"] - frame["mean_first"])


@pytest.mark.slow
def test_real_dynamics_on_one_problem():
    problem = gf.Problem(gf.Regression.whitened(target=[[1.0]]), [gf.LabelNoise(0.5)])
    net = gf.DeepLinear([np.array([[2.0]]), np.array([[0.1]])])
    dynamics = [gf.GradientDescent(0.05), gf.GradientDescent(0.025), gf.GradientFlow()]
    comparison = compare(
        problem,
        net,
        dynamics,
        t1=10.0,
        replicas=128,
        key=jax.random.key(1),
        save=3,
        observables=["imbalance"],
    )
    half, flow = comparison.verdicts
    assert (half.first, half.second) == (
        "GradientDescent(step_size=0.05)",
        "GradientDescent(step_size=0.025)",
    )
    # The imbalance decays at the rate h s^2 2/(2 - h lambda), here over t = 10.
    expected = 3.99 * np.exp(-10.0 * 0.0125 * 2 / (2 - 0.05 * 4.4))
    assert comparison.rows[2].mean_first == pytest.approx(expected, rel=0.02)
    assert (half.verdict, flow.second, flow.verdict) == (DIFFER, "GradientFlow", DIFFER)
    assert comparison.replicas == {half.first: 128, half.second: 128, "GradientFlow": 1}
    # The same dynamics twice: keys of their own, so the numbers differ but the means agree.
    twice = compare(
        problem,
        net,
        {"one": dynamics[0], "two": dynamics[0]},
        t1=10.0,
        replicas=128,
        key=jax.random.key(2),
        save=3,
        observables=["imbalance"],
    )
    assert twice.agree
    assert twice.rows[-1].difference != 0.0
    with pytest.raises(ValueError, match="two or more; got 1"):
        compare(problem, net, dynamics[:1], t1=1.0, replicas=2, key=jax.random.key(0))


PLAIN = gf.Problem(gf.Regression.whitened(target=[[1.0]]))
SCALARS = gf.DeepLinear([np.array([[2.0]]), np.array([[0.1]])])


@pytest.mark.slow
def test_deterministic_dynamics_need_no_replicas_and_own_observables_are_taken():
    def ratio(net, problem):
        return net.weights[1][0, 0] / net.weights[0][0, 0]

    found = compare(
        PLAIN,
        SCALARS,
        [gf.GradientFlow(), gf.GradientDescent(1e-3)],
        t1=1.0,
        save=3,
        observables={"loss": None, "ratio": ratio},
    )
    assert [v.observable for v in found.verdicts] == ["loss", "ratio"]
    assert found.replicas == {"GradientFlow": 1, "GradientDescent": 1}
    last = found.rows[-1]
    # w1^2 - w2^2 stays 3.99 along the flow, and w1 w2 has come to 1 within 1e-3.
    p = 1.0
    u = np.sqrt(3.99**2 + 4 * p**2)
    assert last.mean_first == pytest.approx(np.sqrt((u - 3.99) / (u + 3.99)), rel=0.02)
    assert found.agree
    noisy = gf.Problem(PLAIN.data, [gf.LabelNoise(0.5)])
    for keys, missing in (({}, "replicas"), ({"replicas": 4}, "key")):
        with pytest.raises(ValueError, match=f"^{missing}: GradientDescent is random on this"):
            compare(noisy, SCALARS, [gf.GradientFlow(), gf.GradientDescent(0.1)], t1=1.0, **keys)


def test_momentum_beside_an_sde_is_compared_in_effective_time():
    # Heavy ball of step h is, per step, an SDE of step h / (1 - beta).
    problem = gf.Problem(PLAIN.data, [gf.LabelNoise(0.5)])
    found = compare(
        problem,
        SCALARS,
        {"ball": gf.GradientDescent(0.01, 0.9), "sde": gf.StochasticFlow(0.1)},
        t1=40.0,
        replicas=256,
        key=jax.random.key(0),
        save=5,
        observables=["imbalance"],
    )
    assert found.clock == "effective time"
    assert found.momenta == {"ball": pytest.approx(0.9), "sde": 0.0}
    assert [row.time for row in found.rows] == pytest.approx([0.0, 10.0, 20.0, 30.0, 40.0])
    # Its start-up takes the ball to a neighbouring minimum; from there both keep pace.
    assert max(abs(row.relative) for row in found.rows) < 0.25
    ball, sde = (
        np.log(getattr(found.rows[1], f"mean_{which}") / getattr(found.rows[4], f"mean_{which}"))
        for which in ("first", "second")
    )
    assert ball == pytest.approx(sde, rel=0.1)
    text = str(found)
    assert (
        "momenta differ, so times are effective, h k / (1 - momentum): 0.9 (ball), 0 (sde)" in text
    )
    assert "effective time" in text and "flow time" not in text


@pytest.mark.slow
def test_heavy_ball_of_small_steps_keeps_pace_with_gradient_flow():
    dynamics = [gf.GradientFlow(), gf.GradientDescent(1e-3, 0.9), gf.HeavyBallFlow(1e-3, 0.9)]
    found = compare(PLAIN, SCALARS, dynamics, t1=2.0, save=3, observables=["end_to_end"])
    assert found.clock == "effective time" and found.agree
    # The same momentum throughout: flow time, as ever.
    same = compare(PLAIN, SCALARS, dynamics[1:], t1=0.2, save=3, observables=["end_to_end"])
    assert same.clock == "flow time" and same.agree and "flow time" in str(same)


def test_trajectories_with_different_momenta_are_matched_in_effective_time(make_run):
    x = np.exp(-TIME)
    plain = make_run(TIME, {"loss": x}, **FLOW)
    ball = make_run(TIME / 2, {"loss": x}, [], gf.HeavyBallFlow(0.1, 0.5))
    found = compare_trajectories({"plain": plain, "ball": ball}, ["loss"])
    assert found.agree and found.momenta == {"plain": 0.0, "ball": 0.5}
    with pytest.raises(
        ValueError, match=r"'plain' was not saved at effective time h k / \(1 - momentum\) = 6"
    ):
        compare_trajectories(
            {"plain": plain, "ball": make_run(TIME, {"loss": x}, [], gf.HeavyBallFlow(0.1, 0.5))},
            ["loss"],
            times=[6.0],
        )
