"""Rates against ensembles whose rates are known exactly."""

import numpy as np
import pytest
from scipy import integrate, stats

import gradflow as gf
from gradflow.analysis.prediction.along import rate_along
from gradflow.analysis.rates import decay_rate, drift
from gradflow.analysis.statistics import trapezoid_weights

TIME = np.linspace(0.0, 10.0, 41)
LOG_TIME = np.concatenate([[0.0], np.geomspace(1e-3, 10.0, 60)])
DATA_OF_ONE = gf.Regression.whitened(target=[[1.0]])
NET_OF_ONE = gf.DeepLinear([np.array([[2.0]]), np.array([[0.5]])])


def brownian(rng, replicas, time):
    steps = np.sqrt(np.diff(time, prepend=0.0)) * rng.standard_normal((replicas, time.size))
    return np.cumsum(steps, axis=1)


def geometric(rng, replicas, time, rate, sigma):
    """Geometric Brownian paths: typical rate `rate`, rate of the mean `rate - sigma^2/2`."""
    return 3.0 * np.exp(-rate * time + sigma * brownian(rng, replicas, time))


def binomial_range(trials, probability, level=1e-4):
    return stats.binom.ppf(level, trials, probability), stats.binom.isf(level, trials, probability)


@pytest.mark.parametrize("time", [TIME, LOG_TIME], ids=["lin", "log"])
def test_an_exponential_path_gives_its_rate(make_run, time):
    rate = decay_rate(make_run(time, {"imbalance": 2.0 * np.exp(-0.7 * time)}), window=(0.0, 10.0))
    assert rate.value == pytest.approx(0.7, rel=1e-12)
    assert (rate.low, rate.high) == pytest.approx((0.7, 0.7), rel=1e-9)
    assert np.isnan(rate.standard_error)
    assert (rate.replicas, rate.diverged, rate.points) == (1, 0, time.size)
    assert rate.kind == "exponential"
    assert rate.note == ""


def test_a_single_path_shows_how_much_its_rate_varies(make_run):
    # log x = -t^2/2: rate t, so the thirds of (1, 4) have the rates 1.5, 2.5 and 3.5.
    time = np.linspace(0.0, 5.0, 501)
    run = make_run(time, {"imbalance": np.exp(-0.5 * time**2)})
    rate = decay_rate(run, window=(1.0, 4.0))
    assert (rate.low, rate.value, rate.high) == pytest.approx((1.5, 2.5, 3.5), rel=1e-3)
    assert rate.window == pytest.approx((1.0, 4.0))


def test_clustered_times_do_not_decide(make_run):
    # The least-squares slope of t^2 on t over (0, 1) is 1, whatever times are saved.
    time = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 200)])
    run = make_run(time, {"imbalance": np.exp(-(time**2))})
    assert decay_rate(run, window=(0.0, 1.0)).value == pytest.approx(1.0, rel=0.01)
    assert np.polyfit(time, time**2, 1)[0] < 0.9
    integral = integrate.trapezoid(np.cos(time), time)
    assert trapezoid_weights(time) @ np.cos(time) == pytest.approx(integral, rel=1e-12)


def test_estimate_error_and_interval_against_numpy_and_scipy(make_run):
    x = geometric(np.random.default_rng(1), 20, LOG_TIME, 0.4, 0.2)
    run = make_run(LOG_TIME, {"imbalance": x})
    rate = decay_rate(run, window=(0.5, 10.0), confidence=0.9)
    used = LOG_TIME >= 0.5
    t = LOG_TIME[used]
    weights = np.sqrt(np.convolve(np.diff(t), [0.5, 0.5]))  # polyfit squares them
    slopes = -np.polyfit(t, np.log(x[:, used]).T, 1, w=weights)[0]
    np.testing.assert_allclose(rate.per_replica, slopes, rtol=1e-10)
    assert rate.value == pytest.approx(slopes.mean(), rel=1e-10)
    assert rate.standard_error == pytest.approx(stats.sem(slopes), rel=1e-10)
    interval = stats.t.interval(0.9, 19, slopes.mean(), stats.sem(slopes))
    assert (rate.low, rate.high) == pytest.approx(interval, rel=1e-10)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    ("of", "truth"), [("replica", 0.5), ("mean", 0.5 - 0.3**2 / 2)], ids=["path", "mean"]
)
def test_intervals_cover_and_wrong_rates_are_rejected(make_run, of, truth):
    rng, trials = np.random.default_rng(2), 250
    time = np.linspace(0.0, 4.0, 21)
    rates = []
    for _ in range(trials):
        run = make_run(time, {"imbalance": geometric(rng, 64, time, 0.5, 0.3)})
        rates.append(decay_rate(run, window=(0.0, 4.0), of=of))
    low, high = np.array([(r.low, r.high) for r in rates]).T
    covered = int(np.sum((low <= truth) & (truth <= high)))
    least, most = binomial_range(trials, 0.95)
    assert least <= covered <= most
    # The error is about 0.02 here: a factor of 2 is always seen, the other rate half the time.
    assert np.all((high < 2.0 * truth) & (low > 0.5 * truth))
    errors = np.array([r.standard_error for r in rates])
    values = np.array([r.value for r in rates])
    assert values.std(ddof=1) == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.15)
    assert abs(values.mean() - truth) < 4.0 * values.std(ddof=1) / np.sqrt(trials)


def test_a_rate_wrong_by_ten_percent_is_rejected(make_run):
    rng, trials, truth = np.random.default_rng(3), 60, 0.5
    rejected = 0
    for _ in range(trials):
        run = make_run(TIME, {"imbalance": geometric(rng, 256, TIME, truth, 0.1)})
        rate = decay_rate(run, window=(0.0, 10.0))
        rejected += not rate.low <= 1.1 * truth <= rate.high
    assert rejected == trials


def test_the_mean_and_the_typical_path_differ_under_multiplicative_noise(make_run):
    run = make_run(TIME, {"imbalance": geometric(np.random.default_rng(4), 4096, TIME, 0.5, 0.4)})
    typical = decay_rate(run, window=(0.0, 4.0))
    mean = decay_rate(run, window=(0.0, 4.0), of="mean")
    assert abs(typical.value - 0.5) < 4.0 * typical.standard_error
    assert abs(mean.value - 0.42) < 4.0 * mean.standard_error
    assert typical.value - mean.value > 5.0 * np.hypot(typical.standard_error, mean.standard_error)
    assert mean.per_replica.shape == (4096,)


def test_the_window_ends_where_rounding_begins(make_run):
    time = np.linspace(0.0, 60.0, 121)
    run = make_run(time, {"imbalance": np.maximum(np.exp(-time), 1e-16)})
    rate = decay_rate(run, window=(0.0, 60.0))
    assert rate.value == pytest.approx(1.0, rel=1e-9)
    assert rate.window[1] == pytest.approx(-np.log(4096 * np.finfo(float).eps), abs=0.5)
    assert "rounding" in rate.note
    with pytest.raises(ValueError, match=r"leaves 0 of .* earlier window"):
        decay_rate(run, window=(40.0, 60.0))


def test_single_precision_ends_earlier(make_run):
    time = np.linspace(0.0, 60.0, 121)
    x = np.maximum(np.exp(-time), 1e-7).astype(np.float32)
    rate = decay_rate(make_run(time, {"imbalance": x}), window=(0.0, 60.0))
    assert rate.value == pytest.approx(1.0, rel=1e-5)
    assert rate.window[1] < 8.0


def test_all_replicas_stop_where_the_first_changes_sign(make_run):
    x = np.exp(-0.3 * TIME) * np.ones((5, 1))
    x[3, 20:] *= -1.0
    rate = decay_rate(make_run(TIME, {"imbalance": x}), window=(0.0, 10.0))
    assert rate.points == 20
    assert rate.value == pytest.approx(0.3, rel=1e-12)
    assert "a replica changes sign" in rate.note
    x[3, 2:] = 0.0
    with pytest.raises(ValueError, match=r"'imbalance': a replica changes sign .* t = 0\.5"):
        decay_rate(make_run(TIME, {"imbalance": x}), window=(0.0, 10.0))


def test_the_mean_is_followed_down_to_three_standard_errors(make_run):
    rng = np.random.default_rng(5)
    x = np.exp(-TIME) + 0.1 * rng.standard_normal((100, TIME.size))
    rate = decay_rate(make_run(TIME, {"imbalance": x}), window=(0.0, 10.0), of="mean")
    assert rate.window[1] == pytest.approx(-np.log(0.03), abs=0.6)
    assert "3 standard errors" in rate.note
    assert abs(rate.value - 1.0) < 4.0 * rate.standard_error


def test_diverged_replicas_are_left_out_and_counted(make_run):
    x = np.exp(-np.array([[0.1], [0.2], [0.3], [9.0]]) * TIME)
    run = make_run(TIME, {"imbalance": x}, diverged=[False, False, False, True])
    rate = decay_rate(run, window=(0.0, 10.0))
    assert (rate.replicas, rate.diverged) == (3, 1)
    assert rate.value == pytest.approx(0.2, rel=1e-12)
    gone = make_run(TIME, {"imbalance": x}, diverged=[True] * 4)
    with pytest.raises(ValueError, match="all 4 replicas diverged"):
        decay_rate(gone, window=(0.0, 10.0))


def test_a_rate_that_changes_is_noted_and_a_constant_one_is_not(make_run):
    rng = np.random.default_rng(6)
    x = geometric(rng, 64, TIME, 0.2, 0.05)
    constant = decay_rate(make_run(TIME, {"imbalance": x}), window=(0.0, 10.0))
    bent = decay_rate(make_run(TIME, {"imbalance": x + 0.5}), window=(0.0, 10.0))
    assert constant.note == ""
    assert "the rate is not constant" in bent.note
    assert "the rate is not constant" in str(bent)


def test_drift_is_the_linear_slope(make_run):
    rng, trials = np.random.default_rng(7), 200
    covered = 0
    for _ in range(trials):
        x = 1.0 - 0.25 * TIME + 0.3 * brownian(rng, 16, TIME)
        rate = drift(make_run(TIME, {"imbalance": x}), window=(0.0, 10.0))
        covered += rate.low <= -0.25 <= rate.high
    least, most = binomial_range(trials, 0.95)
    assert least <= covered <= most
    assert rate.kind == "linear"
    # A single parabola: slopes of t^2 over thirds of (0, 3) are 1, 3 and 5.
    time = np.linspace(0.0, 3.0, 301)
    path = drift(make_run(time, {"imbalance": time**2}), window=(0.0, 3.0))
    assert (path.low, path.value, path.high) == pytest.approx((1.0, 3.0, 5.0), rel=1e-3)


def test_without_a_window_the_rate_starts_at_the_end_of_the_optimization_phase(make_run):
    time = np.linspace(0.0, 40.0, 401)
    variables = {
        "slaved_deviation": np.exp(-time),
        "slaved_residual": np.full_like(time, 0.01),
        # Twice the rate before t = log(1000), where the deviation is a tenth of the residual.
        "imbalance": np.exp(-0.1 * time - 0.1 * np.minimum(time, np.log(1000.0))),
    }
    kinds = {"regularizers": [gf.WeightDecay(0.05)], "dynamics": gf.GradientFlow()}
    rate = decay_rate(make_run(time, variables, **kinds))
    assert rate.value == pytest.approx(0.1, rel=1e-9)
    assert rate.window[0] == pytest.approx(np.log(1000.0), abs=0.1)
    with pytest.raises(ValueError, match=r"loss floor .* is 0\); pass window="):
        decay_rate(make_run(time, variables, regularizers=[], dynamics=gf.GradientFlow()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": (3.0, 1.0)}, "t_start < t_stop"),
        ({"window": (3.01, 3.2)}, "holds 0 saved times .* widen it within 0 to 10"),
        ({"window": (0.0, 9.0), "confidence": 95.0}, "confidence must lie between 0 and 1"),
        ({"window": (0.0, 9.0), "of": "median"}, "of must be"),
        ({"window": (0.0, 9.0), "observable": "loss"}, "'loss' was not recorded .*imbalance"),
    ],
)
def test_wrong_arguments_are_named(make_run, arguments, message):
    run = make_run(TIME, {"imbalance": np.exp(-TIME)})
    with pytest.raises(ValueError, match=message):
        decay_rate(run, **arguments)


def test_values_that_cannot_be_fitted_are_named(make_run):
    norms = make_run(TIME, {"squared_norms": np.ones((TIME.size, 2))}, dims=("layer",))
    with pytest.raises(ValueError, match=r"shape \(2,\) .* a scalar is needed"):
        decay_rate(norms, "squared_norms", window=(0.0, 1.0))
    x = np.exp(-TIME)
    x[4] = np.inf
    with pytest.raises(ValueError, match="is inf at t = 1 on a replica that did not diverge"):
        decay_rate(make_run(TIME, {"imbalance": x}), window=(0.0, 5.0))


def silent(make_run, time, **variables):
    """A path of a dynamics without noise."""
    return make_run(time, variables, dynamics=gf.GradientFlow())


def test_a_noise_free_rate_that_changes_is_not_printed_as_a_number_with_an_error(make_run):
    # log x = -t^2/2: rate t, so the thirds of (1, 4) have the rates 1.5, 2.5 and 3.5.
    time = np.linspace(0.0, 5.0, 501)
    rate = decay_rate(silent(make_run, time, imbalance=np.exp(-0.5 * time**2)), window=(1.0, 4.0))
    assert not rate.constant
    assert rate.local == pytest.approx((1.5, 2.5, 3.5), rel=1e-3)
    assert "decay rate of imbalance: not constant, mean 2.5 per unit flow time" in str(rate)
    assert "1.5 → 2.5 → 3.5" in str(rate)
    assert "+-" not in str(rate)
    straight = decay_rate(silent(make_run, time, imbalance=np.exp(-0.5 * time)), window=(1.0, 4.0))
    assert straight.constant and straight.note == ""
    assert straight.local == pytest.approx((0.5, 0.5, 0.5), rel=1e-9)


def test_a_rate_that_rises_and_falls_again_is_not_constant(make_run):
    # Both halves of the window have the same mean rate; only the middle third is slower.
    time = np.linspace(-1.0, 1.0, 301) + 1.0
    logs = -(time - 1.0) - 0.3 * (time - 1.0) ** 3
    rate = decay_rate(silent(make_run, time, imbalance=np.exp(logs)), window=(0.0, 2.0))
    assert not rate.constant
    # The least-squares slope of u^3 over (a, b), by numpy.
    middle = np.polyfit(np.linspace(-1 / 3, 1 / 3, 101), np.linspace(-1 / 3, 1 / 3, 101) ** 3, 1)[0]
    assert rate.local[1] == pytest.approx(1.0 + 0.3 * middle, rel=1e-3)
    assert rate.local[0] == pytest.approx(rate.local[2], rel=1e-9)


def test_three_saved_times_are_enough_to_see_a_change(make_run):
    time = np.array([0.0, 1.0, 2.0])
    rate = decay_rate(
        silent(make_run, time, imbalance=np.exp([0.0, -1.0, -1.5])), window=(0.0, 2.0)
    )
    assert rate.local == pytest.approx((1.0, 0.5), rel=1e-9)
    assert not rate.constant


def test_what_stays_as_it_is_up_to_rounding_has_a_constant_rate(make_run):
    noise = 1e-9 * np.random.default_rng(8).standard_normal(TIME.size)
    run = silent(make_run, TIME, imbalance=3.0 * (1.0 + noise))
    assert decay_rate(run, window=(0.0, 10.0)).constant
    assert drift(run, window=(0.0, 10.0)).constant


def test_a_single_noisy_path_cannot_tell(make_run):
    rng = np.random.default_rng(9)
    run = make_run(TIME, {"imbalance": geometric(rng, 1, TIME, 0.2, 0.3)[0]})
    rate = decay_rate(run, window=(0.0, 10.0))
    assert rate.constant and "one path; over thirds of the window" in str(rate)
    assert max(rate.local) - min(rate.local) > 0.02 * max(map(abs, rate.local))


@pytest.mark.parametrize("of", ["replica", "mean"])
def test_a_change_is_seen_and_none_is_invented(make_run, of):
    rng, trials = np.random.default_rng(10), 200
    time = np.linspace(0.0, 4.0, 13)
    said = {0.0: 0, 0.1: 0}
    for bend in said:
        for _ in range(trials):
            x = geometric(rng, 24, time, 0.5, 0.05) * np.exp(-bend * time**2 / 2)
            said[bend] += not decay_rate(
                make_run(time, {"imbalance": x}), "imbalance", (0.0, 4.0), of=of
            ).constant
    assert said[0.0] <= stats.binom.isf(1e-4, trials, 1e-3)
    # The rates of the first and the last third are 8/30 apart, their difference known to 0.02.
    assert said[0.1] == trials


def test_a_drift_that_changes_is_not_constant(make_run):
    time = np.linspace(0.0, 3.0, 301)
    path = drift(silent(make_run, time, imbalance=time**2), window=(0.0, 3.0))
    assert not path.constant
    assert path.local == pytest.approx((1.0, 3.0, 5.0), rel=1e-3)
    assert str(path).startswith("drift of imbalance: not constant, mean 3 per unit flow time")


def test_the_slow_flow_is_followed_where_the_rate_changes(make_run):
    # Label noise on a scalar network: D' = -h s^2 2/(2 - h lam) D, lam = sqrt(D^2 + 4).
    h, s = 0.3, 0.1
    predicted = gf.predict(gf.Problem(DATA_OF_ONE, [gf.LabelNoise(s)]), NET_OF_ONE, h)
    start = float(predicted.at(0.0).imbalance)

    def decay(t, d):
        return -h * s**2 * 2.0 / (2.0 - h * np.sqrt(d**2 + 4.0)) * d

    time = np.linspace(0.0, 300.0, 61)
    d = integrate.solve_ivp(decay, (0.0, 300.0), [start], t_eval=time, rtol=1e-10, atol=1e-12).y[0]
    measured = decay_rate(silent(make_run, time, imbalance=d), window=(0.0, 300.0))
    found = rate_along(predicted, measured, time)
    assert found.value == pytest.approx(measured.value, rel=3e-3)  # 1 + h rate/2 is neglected
    assert found.local == pytest.approx(measured.local, rel=3e-3)
    assert not found.constant and not measured.constant
    assert abs(predicted.imbalance_rate / measured.value - 1.0) > 0.2
