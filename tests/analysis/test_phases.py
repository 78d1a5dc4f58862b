"""Phases against runs whose boundary and rates are known in closed form."""

import jax
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.analysis.boundary import optimization_end
from gradflow.analysis.phases import phases
from gradflow.analysis.statistics import recorded

TIME = np.linspace(0.0, 20.0, 201)
LOG_TIME = np.concatenate([[0.0], np.geomspace(0.05, 200.0, 150)])
DECAY = {"regularizers": [gf.WeightDecay(0.05)], "dynamics": gf.GradientFlow()}


def fluctuating(rng, replicas, time, rate=1.0, variance=0.01, start=1.0, imbalance_rate=0.02):
    """A residual that decays at `rate` and then fluctuates, sampled exactly (Ornstein-Uhlenbeck).

    E excess = floor + (start^2/2 - floor) exp(-2 rate t) with floor = variance/2.
    """
    residual = np.full((replicas, time.size), start)
    for j in range(1, time.size):
        keep = np.exp(-rate * (time[j] - time[j - 1]))
        noise = np.sqrt(variance * (1.0 - keep**2)) * rng.standard_normal(replicas)
        residual[:, j] = keep * residual[:, j - 1] + noise
    steps = np.sqrt(np.diff(time, prepend=0.0)) * rng.standard_normal(residual.shape)
    return {
        "excess_loss": residual**2 / 2,
        "loss_floor": np.full(residual.shape, variance / 2),
        "imbalance": np.exp(-imbalance_rate * time + 0.01 * np.cumsum(steps, axis=1)),
    }


def crossing(eps, rate=1.0, variance=0.01, start=1.0):
    return np.log((start**2 / variance - 1.0) / eps) / (2.0 * rate)


def test_the_slaved_residual_ends_the_phase_where_the_formula_says(make_run):
    # The deviation falls as 3 exp(-2 t) and the residual is 0.05: a tenth of it at log(600)/2.
    variables = {
        "slaved_deviation": 3.0 * np.exp(-2.0 * TIME),
        "slaved_residual": np.full_like(TIME, 0.05),
        "imbalance": np.exp(-0.1 * TIME),
    }
    found = phases(make_run(TIME, variables, **DECAY))
    assert found.optimization_end == pytest.approx(np.log(600.0) / 2, rel=1e-12)
    assert np.isnan(found.standard_error)
    assert found.low < found.optimization_end < found.high
    assert found.high - found.low == pytest.approx(0.1)
    assert found.optimization_rate == pytest.approx(2.0, rel=1e-12)
    assert found.regularization_rate.value == pytest.approx(0.1, rel=1e-9)
    assert found.regularization_rate.window[0] >= found.optimization_end
    assert found.separation == pytest.approx(20.0, rel=1e-9)
    assert np.isnan(found.separation_error)
    assert phases(make_run(TIME, variables, **DECAY), eps=0.01).optimization_end == pytest.approx(
        np.log(6000.0) / 2, rel=1e-12
    )


def test_deterministic_replicas_spread_over_their_starts(make_run):
    # Different starts cross at log(20 a)/2: mean and error of the mean in closed form.
    heights = np.array([[1.0], [2.0], [5.0]])
    variables = {
        "slaved_deviation": heights * np.exp(-2.0 * TIME),
        "slaved_residual": np.full((3, TIME.size), 0.5),
        "imbalance": np.exp(-0.1 * TIME) * heights,
    }
    found = phases(make_run(TIME, variables, **DECAY))
    ends = np.log(20.0 * heights[:, 0]) / 2
    assert found.optimization_end == pytest.approx(ends.mean(), rel=1e-9)
    assert found.standard_error == pytest.approx(stats.sem(ends), rel=1e-9)
    assert found.optimization_rate == pytest.approx(2.0, rel=1e-9)
    variables["slaved_deviation"][1] += 0.1
    stuck = phases(make_run(TIME, variables, **DECAY))
    assert np.isnan(stuck.optimization_end)
    assert "1 of 3 paths never reach" in stuck.reason
    assert "0.2 of |M_slow| at best" in stuck.reason


@pytest.mark.parametrize(("decay", "expected"), [(0.02, 1.558), (0.005, 1.869), (0.00125, 2.178)])
def test_weight_decay_on_a_scalar_network_against_scipy(make_run, decay, expected):
    # w1, w2 from (2, 0.1), target 1; the slaved residual is -2 decay p / (w1^2 + w2^2).
    def velocity(t, w):
        return -(w[0] * w[1] - 1.0) * w[::-1] - decay * w

    time = np.concatenate([[0.0], np.geomspace(1e-2, 2.0 / decay, 300)])
    w = solve_ivp(velocity, (0.0, time[-1]), [2.0, 0.1], "LSODA", time, rtol=1e-11, atol=1e-13).y
    residual = w[0] * w[1] - 1.0
    slaved = -2.0 * decay * w[0] * w[1] / (w**2).sum(axis=0)
    variables = {
        "slaved_deviation": np.abs(residual - slaved),
        "slaved_residual": np.abs(slaved),
        "imbalance": np.abs(w[0] ** 2 - w[1] ** 2),
        "loss_floor": slaved**2 / 2,
    }
    found = phases(make_run(time, variables, **DECAY))
    assert found.optimization_end == pytest.approx(expected, abs=2e-3)
    assert found.floor == pytest.approx(2 * decay**2 / 4.25**2, rel=0.1)
    assert found.optimization_rate == pytest.approx(np.hypot(3.99, 2.0), rel=0.02)
    assert found.regularization_rate.value == pytest.approx(2.0 * decay, rel=1e-6)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("time", [TIME, LOG_TIME], ids=["lin", "log"])
def test_a_noisy_boundary_is_unbiased_and_its_interval_covers(make_run, time):
    rng, trials = np.random.default_rng(11), 60
    ends = [
        optimization_end(make_run(time, fluctuating(rng, 256, time)), eps=0.2)
        for _ in range(trials)
    ]
    truth = crossing(0.2)
    value, error = np.array([(e.time, e.standard_error) for e in ends]).T
    assert np.all([e.eps == 0.2 for e in ends])
    assert abs(value.mean() - truth) < 0.5 * np.median(error)
    assert value.std() < 1.4 * np.median(error)
    covered = np.sum([e.low <= truth <= e.high for e in ends])
    assert covered >= stats.binom.ppf(1e-3, trials, 0.92)
    # Power: an end that is off by a quarter of the phase is rejected almost always.
    assert np.sum([e.low <= 1.25 * truth <= e.high for e in ends]) <= 0.25 * trials
    assert np.sum([e.low <= 1.5 * truth <= e.high for e in ends]) == 0


def test_the_rates_of_a_noisy_run_cover_and_are_sharp(make_run):
    rng, trials = np.random.default_rng(12), 40
    found = [phases(make_run(TIME, fluctuating(rng, 256, TIME)), eps=0.2) for _ in range(trials)]
    rate, error = np.array([(f.optimization_rate, f.optimization_rate_error) for f in found]).T
    assert abs(rate.mean() - 1.0) < 0.5 * np.median(error)
    assert np.median(error) < 0.12
    covered = np.sum(np.abs(rate - 1.0) <= stats.t.ppf(0.975, 31) * error)
    assert covered >= stats.binom.ppf(1e-3, trials, 0.92)
    slow = np.array([f.regularization_rate.value for f in found])
    assert slow.mean() == pytest.approx(0.02, abs=5e-5)
    separation, spread = np.array([(f.separation, f.separation_error) for f in found]).T
    np.testing.assert_allclose(separation, rate / slow)
    covered = np.sum(np.abs(separation - 50.0) <= 2.05 * spread)
    assert covered >= stats.binom.ppf(1e-3, trials, 0.92)


def test_few_replicas_raise_eps_and_say_so(make_run):
    rng, trials = np.random.default_rng(13), 40
    ends = [
        optimization_end(make_run(TIME, fluctuating(rng, 32, TIME)), eps=0.1) for _ in range(trials)
    ]
    # One standard error of a mean of chi-squares is sqrt(2/32) on the floor, more just above it.
    assert np.sqrt(2.0 / 32) < np.mean([e.eps for e in ends]) < 1.2 * np.sqrt(2.0 / 32)
    assert all(
        "eps raised from 0.1" in e.note and "replicas resolve eps = 0.1" in e.note for e in ends
    )
    offset = np.array([e.time - crossing(e.eps) for e in ends])
    assert abs(offset.mean()) < 0.5 * np.median([e.standard_error for e in ends])
    assert np.mean([e.low <= crossing(e.eps) <= e.high for e in ends]) > 0.75


def test_two_modes_and_a_floor_that_is_three_percent_off(make_run):
    rng, trials = np.random.default_rng(14), 40
    offsets, errors = [], []
    for _ in range(trials):
        one = fluctuating(rng, 256, TIME, start=0.6)
        two = fluctuating(rng, 256, TIME, rate=2.5, start=1.5)
        excess = one["excess_loss"] + two["excess_loss"]
        end = optimization_end(
            make_run(
                TIME, {"excess_loss": excess, "loss_floor": np.full_like(excess, 0.01 / 1.03)}
            ),
            eps=0.2,
        )
        times = np.linspace(0.0, 10.0, 100_001)
        ratio = 1.03 * (1 + 17.5 * np.exp(-2 * times) + 112.0 * np.exp(-5 * times))
        offsets.append(end.time - times[np.argmax(ratio <= 1.0 + end.eps)])
        errors.append(end.standard_error)
    assert abs(np.mean(offsets)) < np.median(errors)
    assert np.std(offsets) < 1.5 * np.median(errors)


def test_a_single_noisy_path_gets_a_time_without_an_error(make_run):
    rng = np.random.default_rng(15)
    offsets = []
    for _ in range(40):
        variables = {k: v[0] for k, v in fluctuating(rng, 1, TIME, variance=1e-4).items()}
        end = optimization_end(make_run(TIME, variables))
        assert np.isnan(end.standard_error)
        assert end.eps > 0.3
        offsets.append(end.time - crossing(end.eps, variance=1e-4))
    assert abs(np.mean(offsets)) < 0.5


def test_a_floor_without_noise_is_interpolated(make_run):
    # Excess 1e-3 (1 + 500 exp(-3 t)): 1.1 times the floor at log(5000)/3.
    excess = 1e-3 * (1.0 + 500.0 * np.exp(-3.0 * TIME))
    run = make_run(TIME, {"excess_loss": excess, "loss_floor": np.full_like(excess, 1e-3)})
    end = optimization_end(run)
    assert end.time == pytest.approx(np.log(5000.0) / 3, rel=1e-6)
    assert end.eps == 0.1
    assert end.floor == pytest.approx(1e-3)
    assert end.low <= end.time <= end.high


def test_a_floor_that_is_not_defined_at_first_is_above_stability(make_run):
    variables = fluctuating(np.random.default_rng(16), 512, TIME)
    whole = optimization_end(make_run(TIME, variables), eps=0.2)
    variables["loss_floor"][:, :5] = np.nan
    variables["loss_floor"][:100, 5:9] = np.nan
    assert optimization_end(make_run(TIME, variables), eps=0.2) == whole


def test_diverged_replicas_are_left_out_and_counted(make_run):
    variables = fluctuating(np.random.default_rng(17), 300, TIME)
    lost = np.arange(300) >= 256
    kept = {name: v[:256] for name, v in variables.items()}
    found = phases(make_run(TIME, variables, diverged=lost), eps=0.2)
    alone = phases(make_run(TIME, kept), eps=0.2)
    assert (found.replicas, found.diverged) == (256, 44)
    assert found.optimization_end == alone.optimization_end
    assert found.regularization_rate.diverged == 44


def test_a_run_that_starts_on_its_floor_has_no_optimization_phase(make_run):
    variables = fluctuating(np.random.default_rng(18), 256, TIME, start=0.1)
    found = phases(make_run(TIME, variables), eps=0.3)
    assert found.optimization_end == 0.0
    assert np.isnan(found.optimization_rate)
    assert "no optimization rate" in found.note
    assert found.regularization_rate is not None


def test_a_run_that_is_too_short_says_how_far_it_got(make_run):
    time = np.linspace(0.0, 1.5, 61)
    found = phases(make_run(time, fluctuating(np.random.default_rng(19), 256, time)))
    assert np.isnan(found.optimization_end)
    reached = float(found.reason.split("it is ")[1].split(" times")[0])
    assert reached == pytest.approx(1.0 + 99.0 * np.exp(-3.0), rel=0.2)
    assert "run longer" in found.reason
    assert found.regularization_rate is None
    assert np.isnan(found.optimization_rate)
    assert "optimization phase has no end" in str(found)
    assert "no optimization rate: the run does not reach its floor" in str(found)


def test_without_a_floor_there_is_no_regularization_phase(make_run):
    excess = 0.5 * np.exp(-3.0 * TIME)
    reason = "the loss floor of this problem under this dynamics is 0"
    free = phases(make_run(TIME, {"excess_loss": excess}, regularizers=[]))
    assert reason in free.reason
    assert free.optimization_rate == pytest.approx(1.5, rel=1e-9)
    assert np.isnan(free.separation)
    silent = {"excess_loss": excess, "loss_floor": 0.0 * excess}
    assert reason in phases(make_run(TIME, silent, dynamics=gf.GradientFlow())).reason
    none = {"slaved_residual": 0.0 * excess, "excess_loss": excess}
    assert reason in phases(make_run(TIME, none, **DECAY)).reason


@pytest.mark.parametrize(
    ("recorded", "kind", "missing"),
    [
        (["loss_floor"], {}, "excess_loss"),
        (["excess_loss"], {}, "loss_floor"),
        (["slaved_deviation"], DECAY, "slaved_residual"),
        (["slaved_residual"], DECAY, "slaved_deviation"),
        (["imbalance"], {"regularizers": []}, "excess_loss"),
    ],
)
def test_a_missing_observable_is_named(make_run, recorded, kind, missing):
    run = make_run(TIME, {name: np.exp(-TIME) for name in recorded}, **kind)
    with pytest.raises(ValueError, match=f"add '{missing}' to observables="):
        phases(run)
    with pytest.raises(ValueError, match="eps must be positive"):
        phases(run, eps=0.0)


def test_a_missing_imbalance_costs_only_its_rate(make_run):
    variables = fluctuating(np.random.default_rng(20), 256, TIME)
    del variables["imbalance"]
    found = phases(make_run(TIME, variables), eps=0.2)
    assert found.regularization_rate is None
    assert "no regularization rate: observable 'imbalance' was not recorded" in found.note


@pytest.mark.slow
def test_a_real_run_of_sgd_with_label_noise():
    # Scalar depth 2 from (2, 0.1): rate of the residual 4.4 to 5, imbalance h s^2 2/(2 - h lambda).
    h, s = 0.02, 0.5
    problem = gf.Problem(gf.Regression.whitened(target=[[1.0]]), [gf.LabelNoise(s)])
    net = gf.DeepLinear([np.array([[2.0]]), np.array([[0.1]])])
    run = gf.simulate(
        problem,
        net,
        gf.GradientDescent(h),
        t1=20.0,
        replicas=512,
        key=jax.random.key(3),
        save=200,
        spacing="log",
        observables=["excess_loss", "loss_floor", "imbalance"],
        progress=False,
    )
    found = phases(run)
    assert found.floor == pytest.approx(h * s**2 / 4 * np.hypot(3.99, 2.0), rel=0.1)
    rate = found.regularization_rate
    assert rate.value == pytest.approx(h * s**2 * 2 / (2 - h * 4.4), rel=0.02)
    assert abs(found.optimization_rate - 4.6) < 3.0 * found.optimization_rate_error + 0.3
    assert found.separation == pytest.approx(found.optimization_rate / rate.value)
    assert "ratio of the time scales" in str(found)


LABEL_NOISE = gf.Problem(gf.Regression.whitened(target=[[1.0]]), [gf.LabelNoise(0.5)])
SCALARS = gf.DeepLinear([np.array([[2.0]]), np.array([[0.1]])])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "dynamics", "names"),
    [
        (LABEL_NOISE, gf.GradientDescent(0.02), ["excess_loss", "loss_floor", "imbalance"]),
        (
            gf.Problem(LABEL_NOISE.data, [gf.WeightDecay(0.05)]),
            gf.GradientFlow(),
            ["slaved_deviation", "slaved_residual", "loss_floor", "imbalance"],
        ),
    ],
    ids=["noise", "decay"],
)
def test_what_was_not_recorded_is_computed_from_the_stored_weights(problem, dynamics, names):
    noisy = dynamics.is_random(problem)
    keys = {"t1": 10.0, "save": 60, "spacing": "log", "progress": False}
    keys |= {"replicas": 8, "key": jax.random.key(3)} if noisy else {}
    default = gf.simulate(problem, SCALARS, dynamics, **keys)
    asked = gf.simulate(problem, SCALARS, dynamics, **keys, observables=names)
    found, expected = phases(default, eps=0.5), phases(asked, eps=0.5)
    for field in ("optimization_end", "optimization_rate", "floor", "separation"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-9)
    assert np.isfinite(found.floor)
    for name in names:
        values = recorded(default, name)
        np.testing.assert_allclose(values, recorded(asked, name), rtol=1e-10, atol=1e-14)
    bare = gf.simulate(problem, SCALARS, dynamics, **keys, store_weights=False)
    missing = "loss_floor" if noisy else "slaved_residual"
    with pytest.raises(ValueError, match=f"{missing}.* was not recorded .*store_weights=True"):
        phases(bare)


def test_arrays_are_computed_afterwards_and_stay_nan_where_a_replica_diverged():
    with pytest.warns(gf.DivergedWarning):
        run = gf.simulate(
            gf.Problem(LABEL_NOISE.data),
            [SCALARS, gf.DeepLinear([np.array([[30.0]]), np.array([[0.1]])])],
            gf.GradientDescent(0.05),
            steps=40,
            save=5,
            observables=["loss"],
            store_weights=True,
            progress=False,
        )
    norms = recorded(run, "squared_norms")
    assert norms.shape == (2, 5, 2)
    stored = np.stack([w[..., 0, 0] ** 2 for w in run.weights], axis=-1)
    np.testing.assert_allclose(norms[0], stored[0], rtol=1e-12)
    assert run.diverged.tolist() == [False, True]
    assert np.isnan(norms[1, -1]).all()
    with pytest.raises(ValueError, match=r"'mine' was not recorded .* add 'mine' to observables="):
        recorded(run, "mine")


def test_a_phase_whose_rate_changes_says_so_and_gives_the_ratio_no_error(make_run):
    variables = {
        "slaved_deviation": 3.0 * np.exp(-2.0 * TIME),
        "slaved_residual": np.full_like(TIME, 0.05),
        "imbalance": np.exp(-0.1 * TIME - 0.005 * TIME**2),
    }
    found = phases(make_run(TIME, variables, **DECAY))
    assert found.regularization_rate is not None
    assert not found.regularization_rate.constant
    assert "decay rate of imbalance: not constant" in str(found)
    assert "the regularization rate is not constant" in str(found)


def two_modes(time, fast=3.0, slow=1.0, share=0.01):
    """A residual of two modes, and the rate at which it falls."""
    quick, late = np.exp(-fast * time), share * np.exp(-slow * time)
    return quick + late, (fast * quick + slow * late) / (quick + late)


def on_a_slaved_floor(deviation, floor=0.01, rate=0.02):
    return {
        "slaved_deviation": deviation,
        "slaved_residual": np.full_like(deviation, floor),
        "imbalance": np.exp(-rate * TIME) * np.ones_like(deviation),
    }


@pytest.mark.parametrize("heights", [None, [1.0, 2.0, 5.0]], ids=["one path", "three starts"])
def test_while_two_modes_decay_the_optimization_rate_is_not_constant(make_run, heights):
    deviation, _ = two_modes(TIME)
    if heights is not None:
        deviation = np.array(heights)[:, None] * deviation
    found = phases(make_run(TIME, on_a_slaved_floor(deviation), **DECAY))
    assert not found.optimization_rate_constant
    first, _, last = found.optimization_rate_local
    start, stop = (two_modes(np.array(t))[1] for t in found.optimization_rate_window)
    assert start > first > found.optimization_rate > last > stop > 1.0
    shown = str(found)
    assert f"optimization rate not constant: {first:.4g} → " in shown
    assert "the optimization rate is not constant" in shown.splitlines()[-1]
    assert "+-" not in shown.splitlines()[-1]
    if heights is None:  # the window of the last third, from its definition
        low, high = found.optimization_rate_window
        third = np.linspace(high - (high - low) / 3, high, 50)
        assert last == pytest.approx(two_modes(third)[1].mean(), rel=0.02)


@pytest.mark.parametrize("heights", [None, [1.0, 2.0, 5.0]], ids=["one path", "three starts"])
def test_one_mode_has_a_constant_optimization_rate(make_run, heights):
    deviation = np.exp(-2.0 * TIME)
    if heights is not None:
        deviation = np.array(heights)[:, None] * deviation
    found = phases(make_run(TIME, on_a_slaved_floor(deviation), **DECAY))
    assert found.optimization_rate_constant
    assert found.optimization_rate_local == pytest.approx((2.0,) * 3, rel=1e-9)
    assert "optimization rate 2 " in str(found)


def test_many_noisy_replicas_see_that_the_optimization_rate_changes(make_run):
    # The mean excess above its floor is that of the two modes, squared.
    rng, (deviation, _) = np.random.default_rng(21), two_modes(TIME)
    noise = 1.0 + 0.02 * rng.standard_normal((64, TIME.size))
    variables = {
        "excess_loss": deviation**2 / 2 * noise + 5e-6,
        "loss_floor": np.full((64, TIME.size), 5e-6),
        "imbalance": np.exp(-0.02 * TIME) * np.ones((64, 1)),
    }
    found = phases(make_run(TIME, variables))
    assert not found.optimization_rate_constant
    start, stop = (two_modes(np.array(t))[1] for t in found.optimization_rate_window)
    assert 1.02 * start > found.optimization_rate_local[0]
    assert found.optimization_rate_local[-1] > 0.98 * stop
    steady = variables | {"excess_loss": np.exp(-4.0 * TIME) / 2 * noise + 5e-6}
    assert phases(make_run(TIME, steady)).optimization_rate_constant


def test_a_run_that_never_reaches_its_floor_has_no_optimization_rate(make_run):
    # The distance falls to 0.2 of the residual and rises again: a rate of it means nothing.
    deviation = 0.02 + np.exp(-2.0 * TIME) + 1e-3 * TIME
    found = phases(make_run(TIME, on_a_slaved_floor(deviation, floor=0.1), **DECAY))
    assert np.isnan(found.optimization_rate) and np.isnan(found.separation)
    assert "optimization rate not measured" in str(found)
    assert "no optimization rate: the run does not reach its floor" in found.note
