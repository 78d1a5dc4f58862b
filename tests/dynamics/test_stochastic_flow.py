"""The stochastic flow against its own definition in NumPy, closed forms, and SGD."""

import warnings

import jax
import numpy as np
import pytest
import reference
import training

import gradflow as gf
from gradflow.dynamics.stochastic_flow import CoarseIntegrationWarning

KEY = jax.random.key(11)
WIDTHS = (2, 3, 2)
ROWS = 6


def samples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=(ROWS, WIDTHS[0])), rng.normal(size=(ROWS, WIDTHS[-1]))


def moments() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples()
    return x.T @ x / ROWS, y.T @ x / ROWS


def problem_of(*regularizers: gf.AbstractRegularizer) -> gf.Problem:
    return gf.Problem(gf.Regression.from_samples(*samples()), regularizers)


def network_of() -> gf.DeepLinear:
    rng = np.random.default_rng(4)
    return gf.DeepLinear([0.4 * rng.normal(size=(3, 2)), 1.0 * rng.normal(size=(2, 3))])


def scalar_problem(*regularizers: gf.AbstractRegularizer) -> gf.Problem:
    return gf.Problem(gf.Regression.whitened([[1.0]]), regularizers)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_without_noise_it_is_the_euler_method(decay: float):
    regularizers = [gf.WeightDecay(decay)] if decay else []
    problem = problem_of(*regularizers)
    run = gf.simulate(problem, network_of(), gf.StochasticFlow(0.1, substeps=4), steps=20, save=21)
    sxx, syx = moments()

    def gradient(weights: reference.Layers, k: int) -> reference.Layers:
        clean = reference.gradient(weights, sxx, syx)
        return [g + decay * w for g, w in zip(clean, weights, strict=True)]

    start = reference.as_numpy(network_of().weights)
    path = training.descend(start, gradient, 0.025, 80)
    expected = [layer[::4] for layer in path]
    reference.assert_close(run.weights, expected, reference.scale(*expected))


def test_euler_maruyama_with_the_same_normals():
    """dW = -pull_back(M dt + sqrt(h dt) Z) - lambda W dt, Z of labels and batch averaged over b."""
    h, substeps, std, batch, decay, steps = 0.1, 4, 0.7, 2, 0.2, 70
    problem = problem_of(gf.LabelNoise(std), gf.Minibatch(batch), gf.WeightDecay(decay))
    dynamics = gf.StochasticFlow(h, substeps=substeps)
    run = gf.simulate(
        problem, network_of(), dynamics, steps=steps, replicas=3, key=KEY, save=steps + 1
    )
    ticks, dt = steps * substeps, h / substeps
    assert ticks > 256  # more than one block of noise
    on_labels = np.asarray(training.draws(KEY, ticks, 3, 0).normals((WIDTHS[-1], WIDTHS[0])))
    on_rows = np.asarray(training.draws(KEY, ticks, 3, 1).normals((ROWS,)))
    x, y = samples()
    sxx, syx = moments()
    root = training.symmetric_root(sxx)
    fraction = (ROWS - batch) / (batch * (ROWS - 1))
    start = reference.as_numpy(network_of().weights)
    for r in range(3):

        def gradient(weights: reference.Layers, k: int, r: int = r) -> reference.Layers:
            p = reference.end_to_end(weights)
            m = p @ sxx - syx
            rows = [np.outer(p @ a - b, a) - m for a, b in zip(x, y, strict=True)]
            of_batch = np.sqrt(fraction / ROWS) * np.tensordot(on_rows[k, :, r], rows, axes=1)
            of_labels = std / np.sqrt(batch) * on_labels[k, :, :, r] @ root
            clean = reference.pull_back(weights, m + np.sqrt(h / dt) * (of_batch + of_labels))
            return [g + decay * w for g, w in zip(clean, weights, strict=True)]

        path = training.descend(start, gradient, dt, ticks)
        expected = [layer[::substeps] for layer in path]
        reference.assert_close(
            [w[r] for w in run.weights], expected, reference.scale(*expected), 1e-11
        )


def scalar_log_ratio(substeps: int, replicas: int) -> np.ndarray:
    """log(u(t)/u(0)) / (-h s^2 t) of scalar depth 2 under label noise, which tends to 1."""
    h, std, t1 = 0.1, 0.5, 10.0
    net = gf.DeepLinear([[[2.0]], [[0.5]]])
    run = gf.simulate(
        scalar_problem(gf.LabelNoise(std)),
        net,
        gf.StochasticFlow(h, substeps=substeps),
        t1=t1,
        replicas=replicas,
        key=KEY,
        save=2,
    )
    w1, w2 = run.weights
    u = (w1**2 - w2**2)[:, -1].ravel()
    return np.log(u / 3.75) / (-h * std**2 * t1)


def test_label_noise_makes_the_imbalance_decay_almost_deterministically():
    """u(t) = u(0) exp(-h s^2 t) (theory section 6).

    Integrated with steps dt, log u moves by log(1 - x^2) with x^2 = h dt s^2 zeta^2 + ...: relative
    to h s^2 t its spread is sqrt(2 dt / t) and its error (lambda/2 + 3 h s^2/2) dt to first order,
    lambda = sqrt(u^2 + 4) = 3.5 to 4.3.
    """
    replicas, h, t1 = 1000, 0.1, 10.0
    errors = {}
    for substeps in (4, 16):
        ratio = scalar_log_ratio(substeps, replicas)
        spread = np.sqrt(2 * h / substeps / t1)
        assert np.std(ratio) == pytest.approx(spread, rel=0.25)
        errors[substeps] = (np.mean(ratio) - 1.0, spread / np.sqrt(replicas))
    for substeps, (error, sigma) in errors.items():
        assert abs(error) < 2.5 * h / substeps + 4 * sigma
    # first order in dt: four times finer is four times better, by many standard errors
    coarse, fine = errors[4], errors[16]
    assert coarse[0] > 5 * coarse[1]
    sigma = np.hypot(coarse[1], 4 * fine[1])
    assert abs(coarse[0] - 4 * fine[0]) < 4 * sigma + 0.25 * coarse[0]


def noise_power(
    weights: tuple[np.ndarray, np.ndarray], regularizer: gf.AbstractRegularizer
) -> list[np.ndarray]:
    """E|A_i^T Z B_i^T|^2 of both layers of a two-layer net, with leading axes (replica, time).

    Z is the centred end-to-end gradient: labels (s/n) sum eps x^T; batch f Cov(e x^T); inputs
    (1/n) sum (e + P xi)(x + xi)^T by Isserlis' theorem.
    """
    first, second = weights
    x, y = samples()
    sxx, syx = moments()
    p = second @ first
    m = p @ sxx - syx
    e = np.einsum("...ij,kj->...ki", p, x) - y
    eye = np.eye(2)
    pairs = [(np.swapaxes(second, -1, -2), eye), (eye, first)]  # (A_i^T, B_i)
    powers = []
    for a, b in pairs:
        ea = np.einsum("...ai,...ki->...ka", a, e)
        xb = np.einsum("...bj,kj->...kb", b, x)
        e2, x2 = np.sum(ea**2, -1), np.sum(xb**2, -1)
        if isinstance(regularizer, gf.LabelNoise):
            s2 = float(regularizer.std) ** 2
            power = s2 / ROWS * np.sum(a**2, (-1, -2)) * np.mean(x2, -1)
        elif isinstance(regularizer, gf.Minibatch):
            size = regularizer.batch_size
            fraction = (ROWS - size) / (size * (ROWS - 1))
            mean = np.sum((a @ m @ np.swapaxes(b, -1, -2)) ** 2, (-1, -2))
            power = fraction * (np.mean(e2 * x2, -1) - mean)
        else:
            s2 = float(regularizer.std) ** 2
            q = a @ p
            qb = q @ np.swapaxes(b, -1, -2)
            q2, b2 = np.sum(q**2, (-1, -2)), np.sum(b**2, (-1, -2))
            grams = np.einsum("...ai,...aj,...bi,...bj->...", q, q, b, b)
            cross = np.einsum("...ka,...ab,...kb->...k", ea, qb, xb)
            second_moment = (
                e2 * x2
                + s2 * (e2 * np.asarray(b2)[..., None] + x2 * np.asarray(q2)[..., None])
                + 4 * s2 * cross
                + (s2**2 * (q2 * b2 + 2 * grams))[..., None]
            )
            mean = e2 * x2 + 2 * s2 * cross + (s2**2 * np.sum(qb**2, (-1, -2)))[..., None]
            power = np.mean(second_moment - mean, -1) / ROWS
        powers.append(power)
    return powers


@pytest.mark.parametrize("regularizer", [gf.LabelNoise(0.8), gf.InputNoise(0.6), gf.Minibatch(2)])
@pytest.mark.parametrize("kind", [gf.GradientDescent, gf.StochasticFlow])
def test_the_imbalance_drifts_by_the_power_of_the_noise(
    kind: type, regularizer: gf.AbstractRegularizer
):
    """tr G - tr G(0) - sum of E[d tr G | W] is a martingale: its mean is 0, whatever the path.

    In one step of length h, E[d tr G] = h^2 (|A_2^T M B_2^T|^2 - |A_1^T M B_1^T|^2 + noise power).
    """
    h, steps, replicas = 0.04, 12, 3000
    problem = problem_of(regularizer)
    if kind is gf.StochasticFlow:  # one integration step a step, so that every state is saved
        dynamics = gf.StochasticFlow(h, substeps=1)
        expected_warning = pytest.warns(CoarseIntegrationWarning)
    else:
        dynamics, expected_warning = gf.GradientDescent(h), warnings.catch_warnings()
    with expected_warning:
        run = gf.simulate(
            problem,
            network_of(),
            dynamics,
            steps=steps,
            replicas=replicas,
            key=KEY,
            save=steps + 1,
            observables=["loss"],
        )
    first, second = run.weights
    trace = np.sum(second**2, (-1, -2)) - np.sum(first**2, (-1, -2))
    before = (first[:, :-1], second[:, :-1])
    sxx, syx = moments()
    if isinstance(regularizer, gf.InputNoise):
        sxx = sxx + float(regularizer.std) ** 2 * np.eye(2)
    m = before[1] @ before[0] @ sxx - syx
    of_mean = np.sum((m @ np.swapaxes(before[0], -1, -2)) ** 2, (-1, -2)) - np.sum(
        (np.swapaxes(before[1], -1, -2) @ m) ** 2, (-1, -2)
    )
    lower, upper = noise_power(before, regularizer)
    of_noise = h**2 * np.sum(upper - lower, axis=1)
    residual = trace[:, -1] - trace[:, 0] - h**2 * np.sum(of_mean, axis=1) - of_noise
    error = np.std(residual, ddof=1) / np.sqrt(replicas)
    assert abs(np.mean(residual)) < 4 * error
    # a covariance wrong by a factor of 2 moves the mean by of_noise or half of it
    assert abs(np.mean(of_noise)) / 2 > 10 * error


def second_moment(dynamics: gf.AbstractDynamics, replicas: int, seed: int) -> tuple[float, float]:
    """E p^2 at t = 1 of the scalar net under label noise, and its standard error."""
    run = gf.simulate(
        scalar_problem(gf.LabelNoise(0.8)),
        gf.DeepLinear([[[1.2]], [[0.3]]]),
        dynamics,
        t1=1.0,
        replicas=replicas,
        key=jax.random.key(seed),
        save=2,
        observables=["end_to_end"],
    )
    squares = run["end_to_end"][:, -1].ravel() ** 2
    return float(np.mean(squares)), float(np.std(squares) / np.sqrt(replicas))


def test_descent_and_stochastic_flow_agree_weakly_to_first_order():
    """|E p^2 (SGD) - E p^2 (SDE)| = c h (theory section 6: order 1.03); here c is near 0.3."""
    replicas = 20_000
    for h in (0.05, 0.0125):
        sgd, sgd_error = second_moment(gf.GradientDescent(h), replicas, 1)
        sde, sde_error = second_moment(gf.StochasticFlow(h, substeps=8), replicas, 2)
        difference, error = sgd - sde, np.hypot(sgd_error, sde_error)
        assert abs(difference) < 0.5 * h + 4 * error


def test_diverged_replicas_are_nan_and_leave_the_others_alone():
    problem = scalar_problem(gf.LabelNoise(0.1))
    nets = [gf.DeepLinear([[[w]], [[w]]]) for w in (1.0, 30.0)]
    tame = [nets[0], gf.DeepLinear([[[0.5]], [[1.0]]])]
    options = {"steps": 100, "key": KEY, "save": 11, "observables": ["loss"]}
    dynamics = gf.StochasticFlow(0.1, substeps=2)
    with pytest.warns(CoarseIntegrationWarning):
        run = gf.simulate(problem, nets, dynamics, **options)
    alone = gf.simulate(problem, tame, dynamics, **options)
    assert run.diverged.tolist() == [False, True]
    after = run.time >= run.to_xarray()["diverged_at"].values[1]
    for name in ("loss", "W1", "W2"):
        assert np.isnan(run[name][1, after]).all()
        assert np.isfinite(run[name][1, ~after]).all()
        np.testing.assert_array_equal(run[name][0], alone[name][0])


def test_warns_when_the_integration_is_as_coarse_as_the_approximation():
    problem = scalar_problem(gf.LabelNoise(0.5))
    net = gf.DeepLinear([[[1.0]], [[1.0]]])
    fixed = {"steps": 2, "key": KEY, "save": 2}
    with pytest.warns(CoarseIntegrationWarning, match=r"steps of h = 0.1 .* use substeps >= 2"):
        gf.simulate(problem, net, gf.StochasticFlow(0.1, substeps=1), **fixed)
    gf.simulate(problem, net, gf.StochasticFlow(0.1, substeps=2), **fixed)  # warns of nothing


def test_warns_when_the_integration_step_is_too_long_for_the_curvature():
    problem = scalar_problem(gf.LabelNoise(0.5))
    net = gf.DeepLinear([[[6.0]], [[1.0]]])  # Hessian trace 37
    fixed = {"steps": 2, "key": KEY, "save": 2}
    match = r"step 0.05 times the Hessian trace 37 .* use substeps >= 4"
    with pytest.warns(CoarseIntegrationWarning, match=match):
        gf.simulate(problem, net, gf.StochasticFlow(0.1, substeps=2), **fixed)
    gf.simulate(problem, net, gf.StochasticFlow(0.1, substeps=4), **fixed)


def test_reshuffled_batches_are_not_white_noise():
    problem = problem_of(gf.Minibatch(2, reshuffled=True))
    with pytest.raises(ValueError, match=r"Minibatch.reshuffled=True .* use reshuffled=False"):
        gf.simulate(problem, network_of(), gf.StochasticFlow(0.1), steps=2, key=KEY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_size": 0.0}, "StochasticFlow.step_size must be a finite number > 0; got 0.0"),
        ({"step_size": float("nan")}, "StochasticFlow.step_size"),
        ({"order": 2}, r"StochasticFlow.order=2 is not available: .*; use order=1"),
        ({"substeps": 0}, "StochasticFlow.substeps must be an integer >= 1; got 0"),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        gf.StochasticFlow(**{"step_size": 0.1} | arguments)
