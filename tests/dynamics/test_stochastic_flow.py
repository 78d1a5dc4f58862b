"""The stochastic flow against its own definition in NumPy, closed forms, and SGD."""

import itertools
import warnings

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training
from compiled import compiled, draws, faces

import gradflow as gf
from gradflow.dynamics.modified_flow import modified_drift
from gradflow.dynamics.sde_terms import stratonovich_shift
from gradflow.dynamics.stochastic_flow import CoarseIntegrationWarning, SampledDiffusionWarning
from gradflow.random.streams import Stream
from gradflow.regularizers import Dropout, GradientNoise

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_diverged_replicas_are_nan_and_leave_the_others_alone():
    problem = scalar_problem(gf.LabelNoise(0.1))
    nets = [gf.DeepLinear([[[w]], [[w]]]) for w in (1.0, 30.0)]
    tame = [nets[0], gf.DeepLinear([[[0.5]], [[1.0]]])]
    options = {"steps": 100, "key": KEY, "save": 11, "observables": ["loss"]}
    dynamics = gf.StochasticFlow(0.1, substeps=2)
    with pytest.warns(CoarseIntegrationWarning), pytest.warns(gf.DivergedWarning):
        run = gf.simulate(problem, nets, dynamics, **options)
    alone = gf.simulate(problem, tame, dynamics, **options)
    assert run.diverged.tolist() == [False, True]
    after = run.time >= run.to_xarray()["diverged_at"].values[1]
    for name in ("loss", "W1", "W2"):
        assert np.isnan(run[name][1, after]).all()
        assert np.isfinite(run[name][1, ~after]).all()
        np.testing.assert_array_equal(run[name][0], alone[name][0])


@pytest.mark.slow
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
        ({"order": 3}, r"StochasticFlow.order must be 1 or 2; got 3"),
        ({"substeps": 0}, r"StochasticFlow.substeps must be an integer >= 1; got 0"),
        ({"diffusion": "exact"}, r"StochasticFlow.diffusion must be 'auto', .*; got 'exact'"),
        ({"solver": diffrax.ItoMilstein()}, "ItoMilstein assumes that the noise commutes"),
        ({"solver": diffrax.StratonovichMilstein()}, "assumes that the noise commutes"),
        ({"solver": diffrax.ShARK()}, "ShARK assumes noise that does not depend on the weights"),
        ({"solver": diffrax.ReversibleHeun()}, "ReversibleHeun is unstable at every step size"),
        ({"solver": diffrax.ALIGN(0.1)}, "ALIGN solves the underdamped Langevin equation"),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        gf.StochasticFlow(**{"step_size": 0.1} | arguments)


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.HalfSolver(diffrax.Euler())])
def test_refuses_what_is_no_solver_of_such_equations(solver: object):
    with pytest.raises(TypeError, match=r"StochasticFlow.solver must be .* such as diffrax.Heun"):
        gf.StochasticFlow(0.1, solver=solver)


# Order 2


def modified(
    layers: reference.Layers, h: float, sxx: np.ndarray, syx: np.ndarray, decay: float
) -> reference.Layers:
    """-g - (h/2) H g, with H g from a complex step of the gradient."""

    def gradient(at: reference.Layers) -> list[np.ndarray]:
        return [g + decay * w for g, w in zip(reference.gradient(at, sxx, syx), at, strict=True)]

    g = gradient(layers)
    moved = [w + 1e-30j * v for w, v in zip(layers, g, strict=True)]
    return [-a - h / 2 * b.imag / 1e-30 for a, b in zip(g, gradient(moved), strict=True)]


def plus(*groups: reference.Layers) -> list[np.ndarray]:
    return [np.sum(layers, axis=0) for layers in zip(*groups, strict=True)]


def times(c: float, layers: reference.Layers) -> list[np.ndarray]:
    return [c * w for w in layers]


@compiled
def normals_of(problem: gf.Problem, stream: Stream) -> tuple:
    return problem.draw_normals(stream, WIDTHS)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("diffusion", ["closed", "sampled"])
@pytest.mark.parametrize("order", [1, 2])
def test_each_step_with_the_same_random_numbers(order: int, diffusion: str):
    """Euler-Maruyama at order 1; at order 2 the two-stage step of Milstein and Tretyakov.

    Closed: noise on labels and gradient. Sampled: sqrt(h dt) (g_B - g) of a batch.
    """
    h, substeps, steps, decay, std, level = 0.1, 3, 2, 0.2, 0.7, 0.3
    dt, ticks = h / substeps, steps * substeps
    decayed = gf.WeightDecay(decay)
    if diffusion == "closed":
        problem = problem_of(gf.LabelNoise(std), GradientNoise(level), decayed)
    else:
        problem = problem_of(decayed, gf.Minibatch(2))
    dynamics = gf.StochasticFlow(h, order, substeps, diffusion=diffusion)
    run = gf.simulate(problem, network_of(), dynamics, steps=steps, replicas=2, key=KEY, save=3)
    stream = Stream(KEY, jnp.arange(ticks), jnp.arange(2))
    if diffusion == "closed":
        ((on_labels,), (on_gradient,)) = normals_of(problem, stream)
    else:
        _, rows = draws(problem, stream, WIDTHS)
    x, y = samples()
    sxx, syx = moments()
    root = training.symmetric_root(sxx)

    def noise(w: reference.Layers, k: int, r: int) -> list[np.ndarray]:
        if diffusion == "closed":
            of_labels = std / np.sqrt(ROWS) * np.asarray(on_labels)[k, :, :, r] @ root
            extra = [level * np.asarray(z)[k, ..., r] for z in on_gradient]
            return plus(reference.pull_back(w, of_labels), extra)
        chosen = np.asarray(rows)[k, :, r]
        a, b = x[chosen], y[chosen]
        of_batch = reference.gradient(w, a.T @ a / 2, b.T @ a / 2)
        return plus(of_batch, times(-1.0, reference.gradient(w, sxx, syx)))

    step = h if order == 2 else 0.0
    for r in range(2):
        w = reference.as_numpy(network_of().weights)
        path = [w]
        for k in range(ticks):
            f = times(dt, modified(w, step, sxx, syx, decay))
            g = times(-np.sqrt(h * dt), noise(w, k, r))
            if order == 2:
                f1 = times(dt, modified(plus(w, f, g), step, sxx, syx, decay))
                g1 = times(-np.sqrt(h * dt), noise(plus(w, f), k, r))
                f, g = times(0.5, plus(f, f1)), times(0.5, plus(g, g1))
            w = plus(w, f, g)
            path.append(w)
        expected = [np.stack(layer)[::substeps] for layer in zip(*path, strict=True)]
        found = [layer[r] for layer in run.weights]
        reference.assert_close(found, expected, reference.scale(*expected), 1e-11)


def test_the_generator_moves_the_balancedness_as_a_step_of_sgd_does():
    """Drift and Ito term of order 2 on G_i against E[dG_i]/h over every batch, exactly."""
    h, size = 0.2, 2
    problem = problem_of(gf.Minibatch(size))
    weights = network_of().weights
    w = reference.as_numpy(weights)
    a = reference.as_numpy(compiled(modified_drift)(problem, weights, jnp.asarray(h), 2))
    (half,) = [w[1].T @ a[1] - a[0] @ w[0].T]
    found = half + half.T
    for column in np.asarray(faces(problem, weights).columns):
        (of_noise,) = reference.balancedness(training.unflatten(column, w))
        found = found + h * of_noise
    x, y = samples()
    changes = []
    for batch in reference.batches(ROWS, size, replacement=False):
        b, c = x[list(batch)], y[list(batch)]
        g = reference.gradient(w, b.T @ b / size, c.T @ b / size)
        (after,) = reference.balancedness(plus(w, times(-h, g)))
        changes.append(after - reference.balancedness(w)[0])
    expected = np.mean(changes, axis=0) / h
    assert np.max(np.abs(expected)) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * reference.scale(w))


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_weak_order_on_a_common_brownian_path(order: int):
    """E p, E p^2 and E u at t = 1 differ from those of SGD by O(h^order) (theory section 6).

    The same path drives both, so 20 000 replicas resolve differences of 1e-5; E w_1 and the loss
    are left out, whose first coefficients nearly vanish here.
    """
    problem = scalar_problem(gf.LabelNoise(0.8))
    steps, substeps = (0.1, 0.05, 0.025, 0.0125), 4
    gaps, errors = [], []
    for h in steps:
        ends = []
        for dynamics in (
            gf.GradientDescent(h, path_substeps=substeps),
            gf.StochasticFlow(h, order, substeps=substeps),
        ):
            run = gf.simulate(
                problem,
                gf.DeepLinear([[[1.2]], [[0.3]]]),
                dynamics,
                t1=1.0,
                replicas=20_000,
                key=jax.random.key(0),
                save=2,
            )
            w1, w2 = (w[:, -1].ravel() for w in run.weights)
            ends.append(np.stack([w1 * w2, (w1 * w2) ** 2, w1**2 - w2**2]))
        difference = ends[0] - ends[1]
        gaps.append(np.abs(difference.mean(axis=1)))
        errors.append(difference.std(axis=1) / np.sqrt(difference.shape[1]))
    gaps, errors = np.stack(gaps), np.stack(errors)
    assert np.all(gaps > 3 * errors)
    x = np.log(steps)
    for gap, error in zip(gaps.T, errors.T, strict=True):
        (slope, _), covariance = np.polyfit(x, np.log(gap), 1, w=gap / error, cov="unscaled")
        assert abs(slope - order) < 0.15 + 3 * np.sqrt(covariance[0, 0])


# Sampled increments


@pytest.mark.slow
def test_noise_inside_the_network_is_sampled_and_says_so():
    """One grid step under dropout: mean and covariance by enumeration of the masks."""
    h, keep, replicas = 0.1, 0.6, 4000
    problem = problem_of(Dropout(1 - keep))
    with (
        pytest.warns(SampledDiffusionWarning, match=r"Dropout has no closed .*diffusion='sampled'"),
        pytest.warns(CoarseIntegrationWarning),
    ):
        run = gf.simulate(
            problem,
            network_of(),
            gf.StochasticFlow(h, substeps=1),
            steps=1,
            replicas=replicas,
            key=KEY,
            save=2,
        )
    w1, w2 = reference.as_numpy(network_of().weights)
    x, y = samples()
    masks = np.array(list(itertools.product((0, 1), repeat=3)))
    chances = np.prod(np.where(masks, keep, 1 - keep), axis=1)
    mean, covariance = np.zeros(12), np.zeros((12, 12))
    for a, b in zip(x, y, strict=True):
        gradients = []
        for z in masks / keep:
            e = w2 @ (z * (w1 @ a)) - b
            of_first, of_second = np.outer(z * (w2.T @ e), a), np.outer(e, z * (w1 @ a))
            gradients.append(np.concatenate([of_first.ravel(), of_second.ravel()]))
        m, c = reference.mean_and_covariance(np.stack(gradients), chances)
        mean, covariance = mean + m / ROWS, covariance + c / ROWS**2
    moved = [w[:, 1] - w[:, 0] for w in run.weights]
    increments = np.concatenate([m.reshape(replicas, -1) for m in moved], axis=1)
    spread = h**2 * covariance  # h times the integration step, here h
    error = np.mean(increments, axis=0) + h * mean
    assert error @ np.linalg.pinv(spread / replicas, rcond=1e-8) @ error < 12 + 5 * np.sqrt(24)
    found = np.cov(increments.T)
    # E|S - C|^2 = (tr C^2 + (tr C)^2)/R for normals; a wrong factor of 1.3 would be seen
    scale = np.sqrt((np.sum(spread**2) + np.trace(spread) ** 2) / replicas)
    assert np.linalg.norm(found - spread) < 2 * scale < 0.3 / 2 * np.linalg.norm(spread)


def test_says_which_diffusions_it_has():
    fixed = {"steps": 1, "key": KEY, "save": 2}
    dropped = problem_of(Dropout(0.5))
    with pytest.raises(ValueError, match="diffusion='closed': Dropout acts inside the network"):
        gf.simulate(dropped, network_of(), gf.StochasticFlow(0.1, diffusion="closed"), **fixed)
    with pytest.raises(ValueError, match="solver=Heun needs the columns of a closed"):
        gf.simulate(
            dropped,
            network_of(),
            gf.StochasticFlow(0.1, solver=diffrax.Heun(), diffusion="sampled"),
            **fixed,
        )


# Solvers


def test_the_correction_from_ito_to_stratonovich():
    """(1/2) sum_c D b_c[b_c], the columns differentiated by complex steps."""
    std, size = 0.7, 2
    problem = problem_of(gf.LabelNoise(std), gf.Minibatch(size), GradientNoise(0.5))
    w = reference.as_numpy(network_of().weights)
    x, y = samples()
    sxx, syx = moments()
    root = training.symmetric_root(sxx)
    fraction = (ROWS - size) / (size * (ROWS - 1))

    def columns(at: reference.Layers) -> list[list[np.ndarray]]:
        p = reference.end_to_end(at)
        m = p @ sxx - syx
        of_rows = [
            np.sqrt(fraction / ROWS) * (np.outer(p @ a - b, a) - m)
            for a, b in zip(x, y, strict=True)
        ]
        units = np.eye(4).reshape(4, 2, 2)
        of_labels = [std / np.sqrt(size) * unit @ root for unit in units]
        return [reference.pull_back(at, z) for z in [*of_rows, *of_labels]]

    expected = times(0.0, w)
    for c, column in enumerate(columns(w)):
        moved = [a + 1e-30j * b for a, b in zip(w, column, strict=True)]
        change = [v.imag / 1e-30 for v in columns(moved)[c]]
        expected = plus(expected, times(0.5, change))
    found = compiled(stratonovich_shift)(problem, network_of().weights)
    assert max(np.max(np.abs(v)) for v in expected) > 0.1
    reference.assert_close(found, expected, reference.scale(expected))


@pytest.mark.slow
@pytest.mark.parametrize("solver", [diffrax.Heun(), diffrax.SPaRK()])
def test_stratonovich_solvers_let_the_imbalance_decay(solver: diffrax.AbstractSolver):
    """u(t) = u(0) exp(-h s^2 t) on every path (theory section 6): an independent check.

    One Brownian motion drives the scalar net, so these solvers are of strong order 1.
    """
    h, std, t1 = 0.1, 0.5, 10.0
    run = gf.simulate(
        scalar_problem(gf.LabelNoise(std)),
        gf.DeepLinear([[[2.0]], [[0.5]]]),
        gf.StochasticFlow(h, substeps=16, solver=solver),
        t1=t1,
        replicas=100,
        key=KEY,
        save=5,
    )
    w1, w2 = run.weights
    u = (w1**2 - w2**2)[:, -1].ravel()
    ratio = np.log(u / 3.75) / (-h * std**2 * t1)
    assert np.max(np.abs(ratio - 1.0)) < 0.01


@pytest.mark.slow
def test_ito_and_stratonovich_routes_meet_on_the_same_path():
    """2-3-2 with noise that does not commute: on a path they differ by O(dt^(1/2)) or less."""
    problem, replicas = problem_of(gf.LabelNoise(0.5), gf.Minibatch(3)), 100
    gaps = {}
    difference = np.zeros(())
    for substeps in (4, 32):
        ends = []
        for solver in (None, diffrax.Heun()):
            run = gf.simulate(
                problem,
                network_of(),
                gf.StochasticFlow(0.1, order=2, substeps=substeps, solver=solver),
                t1=0.5,
                replicas=replicas,
                key=KEY,
                save=2,
            )
            ends.append(
                np.concatenate([w[:, -1].reshape(replicas, -1) for w in run.weights], axis=1)
            )
        difference = ends[0] - ends[1]
        gaps[substeps] = np.sqrt(np.mean(difference**2))
    error = np.std(difference, axis=0, ddof=1) / np.sqrt(replicas)
    assert np.all(np.abs(np.mean(difference, axis=0)) < 5 * error)
    assert gaps[32] < 0.01
    assert np.log(gaps[4] / gaps[32]) / np.log(8) > 0.4


def test_a_first_order_solver_cannot_show_order_2():
    problem = scalar_problem(gf.LabelNoise(0.5))
    net = gf.DeepLinear([[[1.0]], [[1.0]]])
    dynamics = gf.StochasticFlow(0.1, order=2, solver=diffrax.Euler())
    with pytest.warns(CoarseIntegrationWarning, match="order 2 cannot be seen; leave solver out"):
        gf.simulate(problem, net, dynamics, steps=1, key=KEY, save=2)


def test_the_curvature_of_a_penalty_counts():
    problem = scalar_problem(gf.LabelNoise(0.1), gf.WeightDecay(30.0))
    net = gf.DeepLinear([[[1.0]], [[1.0]]])  # Hessian trace 2
    fixed = {"steps": 1, "key": KEY, "save": 2}
    with pytest.warns(CoarseIntegrationWarning, match=r"Hessian trace 32 .* use substeps >= 4"):
        gf.simulate(problem, net, gf.StochasticFlow(0.1, substeps=2), **fixed)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("solver", [None, diffrax.Midpoint()])
def test_without_noise_every_solver_follows_the_modified_flow(
    solver: diffrax.AbstractSolver | None,
):
    """Order 2 without noise is the modified flow."""
    h, problem = 0.05, problem_of()
    dynamics = gf.StochasticFlow(h, order=2, substeps=32, solver=solver)
    run = gf.simulate(problem, network_of(), dynamics, t1=1.0, save=5)
    start = reference.as_numpy(network_of().weights)
    sxx, syx = moments()
    w, dt = start, h / 8
    for _ in range(round(1.0 / dt)):  # the classical Runge-Kutta method
        a = modified(w, h, sxx, syx, 0.0)
        b = modified(plus(w, times(dt / 2, a)), h, sxx, syx, 0.0)
        c = modified(plus(w, times(dt / 2, b)), h, sxx, syx, 0.0)
        d = modified(plus(w, times(dt, c)), h, sxx, syx, 0.0)
        w = plus(w, times(dt / 6, plus(a, times(2.0, b), times(2.0, c), d)))
    reference.assert_close([v[-1] for v in run.weights], w, reference.scale(w), 2e-6)
