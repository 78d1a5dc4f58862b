"""Every quantity on runs whose values are known in closed form."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats
from specs import make_run

import gradflow as gf
from gradflow.analysis import Phases, Prediction, Rate, predict
from gradflow.study.claims.claims import judge
from gradflow.study.spec.claim_tables import CLAIMS
from gradflow.study.spec.kind_tables import first_sentence


def claim(quantity, **keys):
    return CLAIMS[quantity].model_validate(
        {"sentence": "x", "run": "run", "quantity": quantity, "at_most": 1.0, **keys}
    )


def measure(quantity, *runs, **keys):
    return claim(quantity, **keys).measure(runs)


def test_every_quantity_is_described():
    assert len(CLAIMS) > 20
    for quantity in CLAIMS.values():
        assert quantity.__doc__ and len(first_sentence(quantity)) > 20


def test_rate_and_drift_in_a_window():
    time = np.linspace(0.0, 2.0, 41)
    run = make_run(time=time, imbalance=3 * np.exp(-0.7 * time), loss=1.0 - 0.25 * time)
    rate = measure("rate", run, window=[0.5, 2.0])
    assert rate.value == pytest.approx(0.7, rel=1e-10)
    assert rate.error is None and rate.predicted is None
    drift = measure("drift", run, window=[0.0, 2.0], observable="loss")
    assert drift.value == pytest.approx(-0.25, rel=1e-10)


def test_rate_of_the_mean_is_not_the_mean_of_the_rates():
    time = np.linspace(0.0, 1.0, 21)
    rates = np.array([0.5, 1.5])
    run = make_run(time=time, replicas=2, imbalance=np.exp(-rates[:, None] * time))
    assert measure("rate", run, window=[0.0, 1.0]).value == pytest.approx(1.0, rel=1e-10)
    assert measure("rate", run, window=[0.0, 1.0], of_mean=True).value != pytest.approx(
        1.0, rel=1e-3
    )


def test_predictions_are_those_of_the_imbalance_only():
    time = np.linspace(0.0, 1.0, 21)
    run = make_run(time=time, imbalance=np.exp(-time), loss=np.exp(-2 * time))
    nan = math.nan
    limit = gf.DeepLinear([np.ones((1, 1)), np.ones((1, 1))])
    predicted = Prediction(nan, nan, nan, 0.8, -0.8, nan, 0.1, limit)
    run = type(run)(**{**run.__dict__, "prediction": predicted})
    assert measure("rate", run, window=[0, 1]).predicted == 0.8
    assert measure("rate", run, window=[0, 1], observable="loss").predicted is None
    ratio = measure("predicted_ratio", run, window=[0, 1], of="rate")
    assert ratio.value == pytest.approx(1.25)
    with pytest.raises(ValueError, match="no prediction of rate"):
        measure("predicted_ratio", run, window=[0, 1], of="rate", observable="loss")


@pytest.mark.slow
def test_a_claim_chooses_the_theory_of_its_prediction():
    """Label noise on a scalar network: rate h v, and h v 2/(2 - h lam) at finite step."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)])
    net = gf.DeepLinear([np.array([[2.0]]), np.array([[0.5]])])
    predicted = predict(problem, net, 0.1)
    time = np.linspace(0.0, 1.0, 21)
    run = dataclasses.replace(
        make_run(time=time, imbalance=np.exp(-time)), prediction=predicted, phases=phases_of(0.6)
    )

    def expected(quantity, theory):
        window = {"window": [0, 1]} if quantity in ("rate", "drift") else {}
        return measure(quantity, run, theory=theory, **window).predicted

    small, finite = 0.025, 0.025 * 2 / (2 - 0.1 * 4.25)
    assert expected("rate", "leading_order") == pytest.approx(small, rel=1e-6)
    a_step = -math.log1p(-0.1 * finite) / 0.1  # D falls by the factor 1 - h finite in each step
    assert expected("rate", "finite_step") == pytest.approx(a_step, rel=1e-6)
    assert expected("rate", None) == predicted.imbalance_rate
    assert expected("drift", "finite_step") == pytest.approx(-3.75 * finite, rel=1e-6)
    for name in ("optimization_end", "optimization_rate", "separation"):
        for theory, law in predicted.laws.items():
            assert expected(name, theory) == getattr(law, name)
    assert expected("separation", "leading_order") == pytest.approx(4.25 / small, rel=1e-6)
    residual = -math.log1p(-0.1 * 4.25) / 0.1  # the residual falls by 1 - h lambda in each step
    assert expected("separation", "finite_step") == pytest.approx(residual / a_step, rel=1e-6)
    ratio = measure("predicted_ratio", run, of="rate", theory="leading_order", window=[0, 1])
    assert ratio.value == pytest.approx(1 / small, rel=1e-6)
    without = dataclasses.replace(run, prediction=dataclasses.replace(predicted, finite_step=None))
    assert measure("rate", without, window=[0, 1], theory="finite_step").predicted is None
    with pytest.raises(ValueError, match="no prediction of drift"):
        measure("predicted_ratio", without, of="drift", theory="finite_step", window=[0, 1])


def test_a_slow_flow_is_in_its_regularization_phase_from_the_start():
    time = np.linspace(0.0, 2.0, 41)
    run = make_run(
        time=time,
        imbalance=np.exp(-0.7 * time),
        dynamics={"kind": "SlowFlow", "step_size": 0.1},
    )
    found = measure("rate", run)
    assert found.value == pytest.approx(0.7, rel=1e-10)
    assert found.detail.startswith("t in [0, 2]")


def pair_of_runs(moved, expected, times, slow_times):
    first = make_run("a", time=times, imbalance=moved)
    first = dataclasses.replace(first, phases=phases_of(0.0))
    return first, make_run("b", time=slow_times, imbalance=expected)


def phases_of(end):
    nan = math.nan
    rates = (nan, nan, (nan, nan), None, nan, nan)
    return Phases(end, nan, nan, nan, "excess_loss", 0.1, nan, *rates, replicas=1, diverged=0)


def with_rates(fast, slow):
    """A run whose rates over thirds of their windows are given; a single one is constant."""
    bent = slow if len(slow) > 1 else ()
    rate = Rate(
        float(np.mean(slow)), 0.0, 0.0, 0.0, 0.95, "exponential", "imbalance", (1.0, 2.0), 4, 0, 9,
        4, np.array(slow), constant=not bent, local=bent,
    )  # fmt: skip
    found = dataclasses.replace(
        phases_of(1.0),
        optimization_rate=float(np.mean(fast)),
        regularization_rate=rate,
        separation=float(np.mean(fast) / np.mean(slow)),
        optimization_rate_constant=len(fast) == 1,
        optimization_rate_local=fast,
    )
    run = make_run(time=np.linspace(0.0, 2.0, 5), imbalance=np.ones(5))
    return dataclasses.replace(run, phases=found, rate=rate)


@pytest.mark.parametrize(
    ("fast", "slow", "rates", "ratios"),
    [
        ((3.0,), (0.1,), (), ()),
        ((4.0, 3.0, 2.0), (0.1,), (4.0, 3.0, 2.0), (40.0, 30.0, 20.0)),
        ((3.0,), (0.1, 0.2, 0.3), (), (30.0, 15.0, 10.0)),
        ((4.0, 3.0, 2.0), (0.1, 0.2, 0.4), (4.0, 3.0, 2.0), (5.0, 40.0)),
    ],
)
def test_a_phase_with_a_rate_that_is_not_constant_has_parts(fast, slow, rates, ratios):
    run = with_rates(fast, slow)
    assert measure("optimization_rate", run).parts == pytest.approx(rates)
    separation = measure("separation", run)
    assert separation.parts == pytest.approx(ratios)
    claimed = CLAIMS["separation"].model_validate(
        {"sentence": "fast", "quantity": "separation", "run": "run", "at_least": 22.0}
    )
    expected = "holds" if not ratios else "undecided" if max(ratios) > 22.0 else "fails"
    result = judge(claimed, {"run": run})
    assert result.verdict == expected
    assert ("claim bounds that all of it obeys" in result.detail) == (expected == "undecided")


PAIR = {"run": None, "runs": ["a", "b"], "observable": "imbalance"}


def test_displacement_ratio_in_a_window_of_runs_saved_at_other_times():
    """The slow run starts elsewhere, and is interpolated where the first was saved."""
    times, slow_times = np.linspace(0.0, 4.0, 17), np.linspace(0.0, 4.0, 62)
    values = 3 * np.exp(-0.3 * times) + 9 * np.exp(-40 * times)
    first, second = pair_of_runs(values, 2 * np.exp(-0.3 * slow_times) + 5, times, slow_times)
    found = measure("displacement_ratio", first, second, window=[0.9, 3.6], **PAIR)
    assert found.value == pytest.approx(1.5, rel=1e-5)
    assert found.error is None and found.detail.endswith("t in [1, 3.5]")
    first = dataclasses.replace(first, phases=phases_of(0.6))
    found = measure("displacement_ratio", first, second, **PAIR)
    assert found.value == pytest.approx(1.5, rel=1e-5)
    assert found.detail.endswith("t in [0.75, 4]")


def test_displacement_ratio_ends_where_the_second_run_does():
    times = np.linspace(0.0, 4.0, 17)
    first, second = pair_of_runs(2 * times, times[:9] * 3, times, times[:9])
    assert measure("displacement_ratio", first, second, **PAIR).value == pytest.approx(2 / 3)
    almost = times * (1 - 1e-12)  # a run on a grid and a flow end at the same time but for rounding
    first, second = pair_of_runs(2 * times, times, times, almost)
    assert measure("displacement_ratio", first, second, **PAIR).detail.endswith("t in [0, 4]")
    with pytest.raises(ValueError, match=r"fewer than two times .* \[3.9, 4\]"):
        measure("displacement_ratio", first, second, window=[3.9, 4.0], **PAIR)
    first, second = pair_of_runs(2 * times, 0 * times, times, times)
    with pytest.raises(ValueError, match='imbalance does not change in run "b"'):
        measure("displacement_ratio", first, second, **PAIR)
    first = dataclasses.replace(first, phases=phases_of(math.nan))
    with pytest.raises(
        ValueError, match='run "a" has no end of its optimization phase; give the claim win'
    ):
        measure("displacement_ratio", first, second, **PAIR)


@pytest.mark.slow
def test_displacement_ratio_error_is_the_spread_of_repeated_experiments():
    """200 experiments know the spread to 5 %; both runs are noisy."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(200):
        ends = rng.normal(2.0, 1.0, (64, 1)), rng.normal(4.0, 1.5, (48, 1))
        runs = [
            make_run(
                name,
                time=np.array([0.0, 1.0]),
                replicas=len(end),
                imbalance=np.concatenate([0 * end, end], axis=1),
            )
            for name, end in zip("ab", ends, strict=True)
        ]
        found.append(measure("displacement_ratio", *runs, window=[0, 1], **PAIR))
    values = np.array([measurement.value for measurement in found])
    errors = np.array([measurement.error for measurement in found])
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.15)
    assert values.mean() == pytest.approx(0.5, abs=4 * errors.mean() / math.sqrt(200))


def test_component_ratio_is_that_of_the_means():
    rng = np.random.default_rng(6)
    values = np.abs(rng.normal(2.0, 0.8, (400, 3, 2)))
    run = make_run(time=np.arange(3.0), replicas=400, squared_norms=values)
    found = measure("component_ratio", run, observable="squared_norms", component=[1], over=[0])
    below, above = values[:, -1].T
    assert found.value == pytest.approx(above.mean() / below.mean())
    left_out = [np.delete(above, i).mean() / np.delete(below, i).mean() for i in range(len(above))]
    jackknife = math.sqrt(399 / 400 * np.sum((left_out - np.mean(left_out)) ** 2))
    assert found.error == pytest.approx(jackknife, rel=0.02)
    with pytest.raises(ValueError, match=r"over = \[2\] does not index squared_norms"):
        measure("component_ratio", run, observable="squared_norms", component=[1], over=[2])
    zero = make_run(time=np.arange(3.0), squared_norms=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="is 0 at the end"):
        measure("component_ratio", zero, observable="squared_norms", component=[1], over=[0])


def test_speed_up_is_the_ratio_of_wall_times():
    runs = [make_run(name) for name in "ab"]
    for run, seconds in zip(runs, (12.0, 0.05), strict=True):
        run.trajectory.to_xarray().attrs["wall_time_s"] = seconds
    found = measure("speed_up", *runs, run=None, runs=["a", "b"])
    assert found.value == pytest.approx(240.0)
    assert (found.error, found.detail) == (None, "12 s over 0.05 s")


def test_final_change_and_ratio_average_over_replicas():
    start, end = np.array([1.0, 2.0, 4.0]), np.array([2.0, 5.0, 5.0])
    run = make_run(time=np.array([0.0, 1.0]), replicas=3, loss=np.stack([start, end], axis=1))
    for quantity, values in (
        ("final", end),
        ("change", end - start),
        ("change_ratio", end / start),
    ):
        found = measure(quantity, run, observable="loss")
        assert found.value == pytest.approx(values.mean())
        assert found.error == pytest.approx(stats.sem(values))


def test_one_path_has_no_error():
    run = make_run(time=np.array([0.0, 1.0]), loss=np.array([1.0, 3.0]))
    assert measure("final", run, observable="loss").error is None
    run = make_run(time=np.array([0.0, 1.0]), replicas=1, loss=np.array([[1.0, 3.0]]))
    assert measure("final", run, observable="loss").error is None


def test_diverged_replicas_are_left_out():
    values = np.array([[1.0, 2.0], [1.0, 4.0], [1.0, math.nan]])
    run = make_run(
        time=np.array([0.0, 1.0]), replicas=3, diverged=np.array([False, False, True]), loss=values
    )
    assert measure("final", run, observable="loss").value == 3.0
    run = make_run(
        time=np.array([0.0, 1.0]), replicas=3, diverged=np.array([True] * 3), loss=values
    )
    with pytest.raises(ValueError, match="every replica diverged"):
        measure("final", run, observable="loss")


def test_components_of_an_observable():
    values = np.arange(8.0).reshape(2, 2, 2)  # time, layer, column
    run = make_run(time=np.array([0.0, 1.0]), squared_norms=values)
    assert measure("final", run, observable="squared_norms", component=[1, -1]).value == 7.0
    assert measure("max_change", run, observable="squared_norms").value == 4.0
    with pytest.raises(ValueError, match=r"has shape \(2, 2\); choose an entry"):
        measure("final", run, observable="squared_norms")
    for wrong in ([0], [2, 0]):
        with pytest.raises(ValueError, match="does not index squared_norms"):
            measure("final", run, observable="squared_norms", component=wrong)
    with pytest.raises(ValueError, match="did not record sharpness"):
        measure("final", run, observable="sharpness")


def test_change_ratio_from_zero_is_an_error():
    run = make_run(time=np.array([0.0, 1.0]), loss=np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="0 at the start"):
        measure("change_ratio", run, observable="loss")


@pytest.mark.parametrize("quantity", ["change", "change_ratio", "max_change"])
def test_what_is_counted_from_the_start_needs_it(quantity):
    run = make_run(time=np.array([0.5, 1.0]), loss=np.array([1.0, 2.0]))
    with pytest.raises(
        ValueError, match=r"not saved at its start but from t = 0\.5 on; write 0\.0"
    ):
        measure(quantity, run, observable="loss")


@pytest.mark.parametrize("quantity", ["balancedness_change", "diagonal_change", "noether_decay"])
def test_what_weights_are_counted_from_needs_the_start(quantity):
    run = make_run(time=np.array([0.5, 1.0]), W1=np.ones((2, 1, 1)), W2=np.ones((2, 1, 1)))
    with pytest.raises(ValueError, match=r"not saved at its start but from t = 0\.5 on"):
        measure(quantity, run)


def test_difference_adds_errors_in_quadrature():
    rng = np.random.default_rng(0)
    first, second = rng.normal(3.0, 1.0, (50, 1)), rng.normal(1.0, 2.0, (80, 1))
    runs = [
        make_run(name, time=np.zeros(1), replicas=len(values), loss=values)
        for name, values in (("a", first), ("b", second))
    ]
    keys = {"observable": "loss", "run": None, "runs": ["a", "b"]}
    found = measure("difference", *runs, **keys)
    welch = stats.ttest_ind(first[:, 0], second[:, 0], equal_var=False)
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.value / found.error == pytest.approx(welch.statistic)
    relative = measure("difference", *runs, relative=True, **keys)
    assert relative.value == pytest.approx(found.value / second.mean())


def test_agreement_is_the_verdict_of_the_comparison():
    time = np.linspace(0.0, 1.0, 5)
    runs = [make_run(name, time=time, loss=1 + c * time) for name, c in (("a", 0.0), ("b", 0.03))]
    keys = {"observable": "loss", "run": None, "runs": ["a", "b"], "at_most": None}
    assert measure("agreement", *runs, expected="agree", **keys).word == "agree"
    strict = measure("agreement", *runs, expected="agree", tolerance=0.01, **keys)
    assert strict.word == "differ"
    assert strict.value == pytest.approx(0.03)


def gradient_descent(step, decay, steps, seed=0, replicas=None):
    """Weights of gradient descent on L = 1/2 |P - T|^2 + decay/2 |W|^2, written out in NumPy."""
    rng = np.random.default_rng(seed)
    target = np.array([[1.0, -0.5]])
    shape = () if replicas is None else (replicas,)
    first, second = rng.normal(size=(*shape, 3, 2)), rng.normal(size=(*shape, 1, 3))
    path = [(first, second)]
    for _ in range(steps):
        residual = second @ first - target
        grads = np.swapaxes(second, -1, -2) @ residual, residual @ np.swapaxes(first, -1, -2)
        first = (1 - step * decay) * first - step * grads[0]
        second = (1 - step * decay) * second - step * grads[1]
        path.append((first, second))
    axis = 0 if replicas is None else 1
    return [np.stack(layer, axis=axis) for layer in zip(*path, strict=True)]


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("replicas", [None, 3])
def test_gd_identity_holds_for_gradient_descent_and_not_for_another_step(decay, replicas):
    weights = gradient_descent(0.05, decay, 20, replicas=replicas)
    regularizers = [gf.WeightDecay(decay)] if decay else []
    problem = gf.Problem(gf.Regression.whitened([[1.0, -0.5]]), regularizers)
    keys = {"time": 0.05 * np.arange(21), "weights": weights, "problem": problem}
    keys["replicas"] = replicas
    right = make_run(dynamics={"kind": "GradientDescent", "step_size": 0.05}, **keys)
    assert measure("gd_identity", right).value < 1e-13
    wrong = make_run(dynamics={"kind": "GradientDescent", "step_size": 0.06}, **keys)
    assert measure("gd_identity", wrong).value > 1e-5
    flow = make_run(**keys)
    with pytest.raises(ValueError, match="gradient descent without noise"):
        measure("gd_identity", flow)


def test_balancedness_of_stored_weights():
    time = np.linspace(0.0, 1.0, 6)
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(3, 2)), rng.normal(size=(1, 3))
    shrink = np.exp(-0.2 * time)[:, None, None]
    problem = gf.Problem(gf.Regression.whitened([[1.0, 0.0]]), [gf.WeightDecay(0.2)])
    run = make_run(time=time, weights=[shrink * first, shrink * second], problem=problem)
    start = second.T @ second - first @ first.T
    largest = np.max(np.abs(start)) * (1 - np.exp(-0.4))
    assert measure("balancedness_change", run).value == pytest.approx(largest)
    assert measure("balancedness_decay", run).value < 1e-14
    with pytest.raises(ValueError, match="were not stored"):
        measure("balancedness_change", make_run(loss=np.ones(11)))


def test_drift_ratio_sums_steps_or_integrates():
    rng = np.random.default_rng(2)
    drift = -0.1 - 0.05 * rng.random((4, 11))
    time, step = 0.5 * np.arange(11), np.arange(11)
    moved = np.concatenate([np.zeros((4, 1)), np.cumsum(0.5 * drift[:, :-1], axis=1)], axis=1)
    keys = {"time": time, "replicas": 4, "imbalance": 5 + moved, "imbalance_drift": drift}
    exact = measure("drift_ratio", make_run(step=step, **keys))
    assert exact.value == pytest.approx(1.0, abs=1e-14)
    assert exact.error == pytest.approx(0.0, abs=1e-14)
    flow = measure("drift_ratio", make_run(**keys), window=[1.0, 4.0])
    integral = np.trapezoid(drift[:, 2:9], time[2:9], axis=1).mean()
    assert flow.value == pytest.approx((moved[:, 8] - moved[:, 2]).mean() / integral)
    with pytest.raises(ValueError, match="fewer than two saved times"):
        measure("drift_ratio", make_run(**keys), window=[1.1, 1.2])


@pytest.mark.slow
def test_drift_ratio_error_is_the_spread_of_repeated_experiments():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(200):
        drift = np.broadcast_to(-1.0 - 0.3 * rng.normal(size=(64, 1)), (64, 11))
        noise = rng.normal(0.0, 0.2, (64, 11))
        noise[:, 0] = 0.0
        values = 5 + drift * np.linspace(0, 1, 11) + noise
        run = make_run(replicas=64, imbalance=values, imbalance_drift=drift)
        found.append(measure("drift_ratio", run))
    values = np.array([measurement.value for measurement in found])
    errors = np.array([measurement.error for measurement in found])
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.15)
    assert values.mean() == pytest.approx(1.0, abs=4 * errors.mean() / math.sqrt(200))


def scaling_runs(exponent, noise=0.0):
    steps = np.array([0.1, 0.05, 0.025, 0.0125])
    wiggle = np.exp(noise * np.array([1.0, -1.0, -1.0, 1.0]))
    return (
        steps,
        wiggle * 3 * steps**exponent,
        [
            make_run(
                f"r{i}",
                time=np.array([0.0, 1.0]),
                dynamics={"kind": "GradientDescent", "step_size": step},
                loss=np.array([1.0, 1.0 + change]),
            )
            for i, (step, change) in enumerate(
                zip(steps, wiggle * 3 * steps**exponent, strict=True)
            )
        ],
    )


def test_exponent_is_the_slope_of_the_logarithms():
    keys = {"of": "change", "parameter": "step_size", "observable": "loss", "run": None}
    keys["runs"] = ["r0", "r1", "r2", "r3"]
    _, _, runs = scaling_runs(1.5)
    assert measure("exponent", *runs, **keys).value == pytest.approx(1.5, rel=1e-12)
    steps, values, runs = scaling_runs(1.5, noise=0.1)
    fit = stats.linregress(np.log(steps), np.log(values))
    found = measure("exponent", *runs, **keys)
    assert found.value == pytest.approx(fit.slope, rel=1e-10)
    assert found.error == pytest.approx(fit.stderr, rel=1e-10)
    flat = [make_run(f"r{i}", loss=np.ones(11), dynamics=run.spec.dynamics.model_dump())
            for i, run in enumerate(runs)]  # fmt: skip
    with pytest.raises(ValueError, match="its log is needed"):
        measure("exponent", *flat, **keys)


def test_phases_are_read_or_their_absence_explained():
    with pytest.raises(ValueError, match="the run has no phases"):
        measure("separation", make_run(loss=np.ones(11)))
