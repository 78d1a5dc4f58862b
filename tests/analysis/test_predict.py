"""Predictions on the scalar network of depth 2, where every one of them is a short formula.

With noise of variance v on the gradient with respect to p = w1 w2 the imbalance u obeys
u+ = u (1 - h^2 E[m^2]), and the residual m is an autoregression with the variance of its steps.
"""

import math

import jax
import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

import gradflow as gf
from gradflow.dynamics import SlowFlow

H, STD, DECAY = 0.05, 0.4, 0.01
V = STD**2
NET = gf.DeepLinear([[[2.0]], [[0.1]]])
DATA = gf.Regression.whitened([[1.0]])
NOISY = gf.Problem(DATA, [gf.LabelNoise(STD)])


def minimum(h):
    """Imbalance and sharpness where descent without noise ends; h = 0 is the flow."""
    w1, w2 = 2.0, 0.1
    if h > 0:
        for _ in range(5000):
            r = w1 * w2 - 1.0
            w1, w2 = w1 - h * r * w2, w2 - h * r * w1
    u = w1**2 - w2**2
    return u, np.sqrt(u**2 + 4.0)


def test_sgd_under_label_noise():
    u, sharpness = minimum(H)
    found = gf.predict(NOISY, NET, gf.GradientDescent(H))
    second = 2.0 * V / (2.0 - H * sharpness)
    assert found.imbalance_drift == pytest.approx(-H * second * u, rel=1e-8)
    assert found.imbalance_rate == pytest.approx(-np.log(1.0 - H**2 * second) / H, rel=1e-8)
    assert found.optimization_rate == pytest.approx(-np.log(1.0 - H * sharpness) / H, rel=1e-6)
    floor = 0.5 * H * V * sharpness / (2.0 - H * sharpness)
    assert found.loss_floor == pytest.approx(floor, rel=1e-6)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("amplification", [4, 1])
def test_svag_under_label_noise(amplification):
    eta = H / amplification
    u, sharpness = minimum(eta)
    found = gf.predict(NOISY, NET, gf.SVAG(H, amplification))
    second = 2.0 * amplification * V / (2.0 - eta * sharpness)
    assert found.imbalance_drift == pytest.approx(-eta * second * u, rel=1e-8)
    assert found.imbalance_rate == pytest.approx(-np.log(1.0 - eta**2 * second) / eta, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_stochastic_flows_under_label_noise(order):
    u, sharpness = minimum(0.0)
    found = gf.predict(NOISY, NET, gf.StochasticFlow(H, order=order))
    residual = 0.0 if order == 1 else H * sharpness * V / (2.0 + H * sharpness)
    assert found.imbalance_rate == pytest.approx(H * (V + residual), rel=1e-6)
    assert found.imbalance_drift == pytest.approx(-H * (V + residual) * u, rel=1e-6)
    assert found.optimization_rate == pytest.approx(sharpness, rel=1e-6)


@pytest.mark.parametrize("flow", [gf.GradientFlow(), gf.ExactFlow()])
def test_flows_under_weight_decay(flow):
    found = gf.predict(gf.Problem(DATA, [gf.WeightDecay(DECAY)]), NET, flow)
    assert found.imbalance_rate == pytest.approx(2.0 * DECAY, rel=1e-10)


def test_descent_under_weight_decay():
    problem = gf.Problem(DATA, [gf.WeightDecay(DECAY)])
    found = gf.predict(problem, NET, gf.GradientDescent(H))
    assert found.imbalance_rate == pytest.approx(-2.0 * np.log(1.0 - H * DECAY) / H, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_heavy_ball_under_label_noise(beta):
    h = 0.5 * (1.0 - beta) ** 2
    found = gf.predict(NOISY, NET, h, momentum=beta)
    w1, w2 = (float(w[0, 0]) for w in found.limit.weights)
    u, lam, edge = w1**2 - w2**2, w1**2 + w2**2, 2.0 * (1.0 + beta)
    leading = h * V / (1.0 - beta) ** 2
    assert found.leading_rate == pytest.approx(leading, rel=1e-9)
    assert found.imbalance_rate == pytest.approx(leading * edge / (edge - h * lam), rel=1e-9)
    assert found.imbalance_drift == pytest.approx(-found.imbalance_rate * u, rel=1e-12)
    assert found.sharpness == pytest.approx(h * lam, rel=1e-12)
    assert found.stability == pytest.approx(h * lam / edge, rel=1e-12)
    same = gf.predict(NOISY, NET, gf.GradientDescent(h, beta))
    assert same.imbalance_rate == found.imbalance_rate


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("decay", "slower"), [("coupled", 1.0), ("decoupled", 0.5)])
def test_heavy_ball_with_weight_decay(decay, slower):
    """Decoupled decay does not pass through the velocity, and pulls at P that much less."""
    h, beta = 0.02, 0.5
    problem = gf.Problem(DATA, [gf.WeightDecay(DECAY)])
    found = gf.predict(problem, NET, h, momentum=beta, decay=decay)
    assert found.imbalance_rate == pytest.approx(2.0 * DECAY * slower / (1.0 - beta), rel=1e-9)
    lam = found.sharpness / h
    assert found.loss_floor == pytest.approx(2.0 * (slower * DECAY / lam) ** 2, rel=1e-9)


def test_both_theories_at_the_same_minimum():
    u, sharpness = minimum(H)
    found = gf.predict(NOISY, NET, H)
    assert found.leading_rate == pytest.approx(H * V, rel=1e-9)
    assert found.leading_drift == pytest.approx(-H * V * u, rel=1e-9)
    assert found.optimization_steps == pytest.approx(found.optimization_end / H, rel=1e-12)
    assert found.sharpness == pytest.approx(H * sharpness, rel=1e-9)
    assert found.stability == pytest.approx(H * sharpness / 2.0, rel=1e-9)
    assert found.relative_error == pytest.approx(
        H * V / (sharpness * (2.0 - H * sharpness)), rel=1e-9
    )
    assert set(found.laws) == {"leading_order", "finite_step"}
    assert found.reason == ""


@pytest.mark.slow
def test_half_lives_are_quadratures():
    h = 0.4
    u, _ = minimum(h)
    found = gf.predict(NOISY, NET, h)

    def slowness(x):
        return (2.0 - h * np.hypot(x, 2.0)) / (2.0 * h * V * x)

    expected, _ = quad(slowness, 0.5 * u, u, epsabs=1e-12)
    assert found.half_life == pytest.approx(expected, rel=1e-7)
    assert found.leading_half_life == pytest.approx(np.log(2.0) / (h * V), rel=1e-7)
    assert expected < 0.8 * found.leading_half_life
    assert found.end is not None and found.end_reason == ""
    np.testing.assert_allclose([w[0, 0] for w in found.end.weights], [1.0, 1.0], atol=1e-6)
    assert found.end_imbalance == pytest.approx(0.0, abs=1e-6)
    text = str(found)
    assert "half-life" in text and "finite step" in text and f"{expected:.4g}" in text


@pytest.mark.slow
def test_where_training_is_after_any_number_of_steps():
    h = 0.4
    u, _ = minimum(h)
    found = gf.predict(NOISY, NET, h)

    def drift(t, x):
        return -h * V * 2.0 / (2.0 - h * np.hypot(x, 2.0)) * x

    path = solve_ivp(drift, (0.0, 20.0), [u], rtol=1e-12, atol=1e-14, dense_output=True)
    for steps in (0, 10, 50):
        there = found.at(steps=steps)
        assert there.time == pytest.approx(h * steps) and there.steps == steps
        assert there.imbalance == pytest.approx(path.sol(h * steps)[0], rel=1e-7)
        assert float(there.net.end_to_end[0, 0]) == pytest.approx(1.0, abs=1e-12)
    assert found.at(20.0).imbalance == found.at(steps=50).imbalance
    assert found.at(steps=10**7).imbalance == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match=r"give a flow time, as in at\(100"):
        found.at()
    with pytest.raises(ValueError, match="give only one of them"):
        found.at(1.0, steps=2)
    with pytest.raises(ValueError, match="finite and >= 0; got -1"):
        found.at(-1.0)


def test_what_is_neglected_is_of_the_size_of_the_relative_error():
    """SGD by NumPy from the minimum: the change of u against that of the finite-step theory.

    At a relative error of 0.02 the standard error of the comparison is a tenth of it.
    """
    h, steps, burn, paths = 0.35, 15, 40, 200_000
    start = gf.DeepLinear([[[1.3]], [[1.0 / 1.3]]])
    lam = 1.3**2 + 1.3**-2
    v = 0.02 * lam * (2.0 - h * lam) / h
    found = gf.predict(gf.Problem(DATA, [gf.LabelNoise(np.sqrt(v))]), start, h)
    assert found.relative_error == pytest.approx(0.02, rel=1e-6)
    rng = np.random.default_rng(0)
    w1, w2 = np.full(paths, 1.3), np.full(paths, 1.0 / 1.3)
    before = np.zeros(paths)
    for k in range(burn + steps):
        if k == burn:
            before = w1**2 - w2**2
        m = w1 * w2 - 1.0 + np.sqrt(v) * rng.standard_normal(paths)
        w1, w2 = w1 - h * m * w2, w2 - h * m * w1

    def drift(t, u):
        return -h * v * 2.0 / (2.0 - h * np.hypot(u, 2.0)) * u

    mean = before.mean()
    expected = solve_ivp(drift, (0.0, h * steps), [mean], rtol=1e-10).y[0, -1] - mean
    change = w1**2 - w2**2 - before
    error = change.std() / np.sqrt(paths) / abs(expected)
    assert error < 0.3 * found.relative_error
    assert abs(change.mean() / expected - 1.0) < 3.0 * found.relative_error


@pytest.mark.slow
def test_label_noise_ends_at_equal_block_traces():
    """Widths 1-2-3, whitened: |W_2|^2 / |W_1|^2 -> d_2 / d_0 = 3, and D does not halve."""
    net = gf.init.gaussian([1, 2, 3], key=jax.random.key(0))
    data = gf.Regression.whitened([[0.8], [0.5], [-0.3]])
    found = gf.predict(gf.Problem(data, [gf.LabelNoise(STD)]), net, SlowFlow(H, finite_step=False))
    assert found.end is not None and found.finite_step is None
    first, second = (float((w**2).sum()) for w in found.end.weights)
    assert second / first == pytest.approx(3.0, rel=1e-6)
    assert found.end_block_traces is not None
    np.testing.assert_allclose(found.end_block_traces, found.end_block_traces[0], rtol=1e-6)
    assert found.end_imbalance == pytest.approx(second - first, rel=1e-9)
    assert math.isnan(found.half_life) and "never halves" in found.end_reason


@pytest.mark.slow
def test_weight_decay_ends_balanced():
    found = gf.predict(gf.Problem(DATA, [gf.WeightDecay(DECAY)]), NET, gf.GradientFlow())
    assert found.half_life == pytest.approx(np.log(2.0) / (2.0 * DECAY), rel=1e-6)
    assert found.end_imbalance == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(found.sharpness) and found.finite_step is None
    with pytest.raises(ValueError, match="a flow has no steps"):
        found.at(steps=3)
    start = float(gf.imbalance(found.limit))
    assert found.at(30.0).imbalance == pytest.approx(start * np.exp(-60.0 * DECAY), rel=1e-7)


@pytest.mark.slow
def test_noise_along_the_manifold_has_no_end():
    problem = gf.Problem(DATA, [gf.GradientNoise(0.1), gf.WeightDecay(DECAY)])
    found = gf.predict(problem, NET, gf.GradientDescent(H))
    assert found.imbalance_rate > 0.0
    assert found.end is None and found.end_imbalance is None and found.end_block_traces is None
    assert math.isnan(found.half_life) and "motion random" in found.end_reason
    with pytest.raises(ValueError, match="simulate SlowFlow with replicas"):
        found.at(1.0)


@pytest.mark.parametrize(
    "dynamics", [gf.SVAG(H, 4), gf.StochasticFlow(H, order=2)], ids=["svag", "order 2"]
)
def test_what_has_no_slow_flow_of_its_own_says_so(dynamics):
    found = gf.predict(NOISY, NET, dynamics)
    assert math.isnan(found.half_life) and found.end is None
    assert "SVAG and the SDE of order 2" in found.end_reason
    assert found.leading_rate == pytest.approx(H * V, rel=1e-9)
    with pytest.raises(ValueError, match="at: half-life and end point"):
        found.at(1.0)


def test_without_regularizers_nothing_moves():
    found = gf.predict(gf.Problem(DATA), NET, H)
    assert "no regularizer acts" in found.reason and "no regularizer acts" in found.end_reason
    assert math.isnan(found.half_life) and found.end is None


@pytest.mark.slow
def test_noise_inside_the_network():
    """Gaussian factors of variance a make the noise T^2 a x^4 of p; Bernoulli ones none at all.

    One Gaussian input a step has E x^4 = 3.
    """
    rate = 1e-4
    variance = rate / (1.0 - rate)
    gaussian = gf.Problem(DATA, [gf.Dropout(rate, distribution="gaussian")])
    found = gf.predict(gaussian, NET, H)
    assert found.leading_rate == pytest.approx(3.0 * H * variance, rel=1e-3)
    second = 2.0 / (2.0 - found.sharpness)
    assert found.imbalance_rate == pytest.approx(3.0 * H * variance * second, rel=1e-3)
    still = gf.predict(gf.Problem(DATA, [gf.Dropout(rate)]), NET, H)
    assert still.imbalance_drift == 0.0 and "stands still" in still.reason


@pytest.mark.parametrize("std", [1e-2, 1e-6])
def test_weak_noise_is_not_taken_for_none(std: float):
    r"""White inputs and $w_1 w_2 = 1$: $\dot D = -h \sigma^2 D$ halves $D$ in $\log 2/h \sigma^2$.

    Steps of size $h$ make the rate $2 / (2 - h \lambda)$ times as large, $\lambda = 4.25$.
    """
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(std)])
    found = gf.predict(problem, gf.DeepLinear([[[2.0]], [[0.5]]]), 0.1)
    rate = 0.1 * std**2
    assert found.leading_rate == pytest.approx(rate, rel=1e-9)
    compounded = -math.log1p(-0.1 * rate * 2.0 / (2.0 - 0.425)) / 0.1
    assert found.imbalance_rate == pytest.approx(compounded, rel=1e-9)
    assert found.leading_half_life == pytest.approx(math.log(2.0) / rate, rel=1e-6)
    times = np.array([0.0, 0.3, 1.0, 2.0]) / rate
    along = found.leading_order.imbalances(times)
    np.testing.assert_allclose(along, 3.75 * np.exp(-rate * times), rtol=1e-7)


def test_oscillations_at_the_edge_of_stability_are_no_saddle():
    x = np.asarray([[0.3, 0.1], [0.8, -0.5], [1.1, 0.4], [1.9, -1.2]])
    y = np.stack([1.2 * x[:, 0] + 0.1 * x[:, 1] ** 2 + 0.1, x[:, 1] - 0.1 * x[:, 0] ** 2], axis=1)
    net = gf.init.gaussian((2, 2, 2), 1.0, jax.random.key(0))
    problem = gf.Problem(gf.Regression.from_samples(x, y), [gf.LabelNoise(0.1)])
    with pytest.raises(ValueError, match=r"dynamics: .* edge of stability: h lam_max is 4\.158"):
        gf.predict(problem, net, 0.6)


@pytest.mark.parametrize(
    ("dynamics", "message"),
    [
        (gf.ModifiedFlow(H), "predictions cover .*; got ModifiedFlow"),
        (gf.HeavyBallFlow(H, 0.5), "predictions cover .*; got HeavyBallFlow"),
        (gf.GradientDescent(H, 0.5, nesterov=True), "dynamics: .* has Nesterov momentum"),
        (gf.GradientDescent(H, optimizer=gf.FromOptax("adam")), "dynamics: .* has an optimizer"),
    ],
)
def test_what_is_not_covered_is_refused(dynamics, message):
    with pytest.raises(ValueError, match=message):
        gf.predict(NOISY, NET, dynamics)


def test_arguments_that_make_no_sense():
    with pytest.raises(TypeError, match="must be a step size or a dynamics"):
        gf.predict(NOISY, NET, np.ones(2))
    with pytest.raises(ValueError, match="stand beside a step size"):
        gf.predict(NOISY, NET, gf.GradientDescent(H), momentum=0.5)
    with pytest.raises(ValueError, match=r"GradientDescent.step_size must be .* > 0; got -1"):
        gf.predict(NOISY, NET, -1.0)
    with pytest.raises(ValueError, match=r"diverges at t = .*smaller step size"):
        gf.predict(NOISY, NET, 2.0)


@pytest.mark.slow
def test_training_that_noise_makes_unstable():
    """h lam below 2, but the rows of a batch differ so much that the variance grows."""
    x = np.array([[0.1], [0.1], [0.1], [2.0]])
    data = gf.Regression.from_samples(x, x + np.array([[0.3], [-0.3], [0.0], [0.0]]))
    found = gf.predict(gf.Problem(data, [gf.Minibatch(1)]), NET, 0.35)
    assert found.stability < 1.0
    assert math.isnan(found.imbalance_rate) and "unstable in mean square" in found.reason
    assert found.end is None and found.end_reason


@pytest.mark.parametrize("rate", [0.005, 0.02, 0.2, 3.0])
def test_weight_decay_that_is_not_weak_is_said_and_counts_as_an_error(rate):
    found = gf.predict(gf.Problem(DATA, [gf.WeightDecay(rate)]), NET, gf.GradientFlow())
    _, sharpness = minimum(0.0)
    assert found.relative_error == pytest.approx(2.0 * rate / sharpness, rel=1e-6)
    assert ("penalties are not weak" in found.start_note) == (2.0 * rate / sharpness > 0.1)
    if rate > 0.1:
        return

    def velocity(t, w):
        r = w[0] * w[1] - 1.0
        return [-r * w[1] - rate * w[0], -r * w[0] - rate * w[1]]

    (w1, w2) = solve_ivp(velocity, (0.0, 4.0), [2.0, 0.1], rtol=1e-11, atol=1e-13).y[:, -1]
    error = abs(0.5 * (w1 * w2 - 1.0) ** 2 / found.loss_floor - 1.0)
    # the floor moves with the imbalance, by 2 rate t of it, beside what is neglected
    assert error < 2.0 * (2.0 * rate * 4.0) + found.relative_error


@pytest.mark.slow
def test_an_imbalance_that_turns_round_is_said():
    """The imbalance of the data with batches of 5 falls to 0.04 and rises to 1.36.

    The slow flow itself says so, by another solver.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3))
    y = x @ rng.normal(size=(3, 2)) + 0.3 * rng.normal(size=(50, 2))
    net = gf.DeepLinear([0.5 * rng.normal(size=(4, 3)), 0.5 * rng.normal(size=(2, 4))])
    problem = gf.Problem(gf.Regression.from_samples(x, y), [gf.Minibatch(5)])
    found = gf.predict(problem, net, 0.05)
    assert found.slow is not None
    run = gf.simulate(problem, found.limit, gf.SlowFlow(0.05), t1=1e5, save=[0.0, 300.0, 1e5])
    start, least, end = run["imbalance"]
    assert least < 0.5 * start < 0.5 * end
    assert f"grows later, to {end:.4g}" in found.slow.turn_note
    assert found.slow.turn_note in str(found)
    quiet = gf.predict(NOISY, NET, H)
    assert quiet.slow is not None and quiet.slow.turn_note == ""
