"""Discrete training against plain NumPy loops that are fed the very same random numbers."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import training

import gradflow as gf

KEY = jax.random.key(5)
WIDTHS = (3, 4, 2)
ROWS = 7


def samples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(ROWS, WIDTHS[0])), rng.normal(size=(ROWS, WIDTHS[-1]))


def problem_of(*regularizers: gf.AbstractRegularizer) -> gf.Problem:
    return gf.Problem(gf.Regression.from_samples(*samples()), regularizers)


def network_of(widths: tuple[int, ...] = WIDTHS) -> gf.DeepLinear:
    rng = np.random.default_rng(2)
    pairs = zip(widths[1:], widths[:-1], strict=True)
    return gf.DeepLinear([0.6 * rng.normal(size=pair) for pair in pairs])


def moments() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples()
    return x.T @ x / ROWS, y.T @ x / ROWS


def every_step(problem: gf.Problem, dynamics: gf.AbstractDynamics, steps: int, **options):
    return gf.simulate(
        problem,
        network_of(),
        dynamics,
        steps=steps,
        save=steps + 1,
        observables=["loss"],
        **options,
    )


@pytest.mark.few_cases(3)
@pytest.mark.parametrize(
    ("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.5, 0.0), (0.0, 0.2), (0.5, 0.2)]
)
def test_descent_without_noise(momentum: float, decay: float):
    regularizers = [gf.WeightDecay(decay)] if decay else []
    run = every_step(problem_of(*regularizers), gf.GradientDescent(0.05, momentum), 40)
    sxx, syx = moments()

    def gradient(weights: reference.Layers, k: int) -> reference.Layers:
        clean = reference.gradient(weights, sxx, syx)
        return [g + decay * w for g, w in zip(clean, weights, strict=True)]

    start = reference.as_numpy(network_of().weights)
    expected = training.descend(start, gradient, 0.05, 40, momentum)
    reference.assert_close(run.weights, expected, reference.scale(*expected))
    np.testing.assert_allclose(run.time, 0.05 * np.arange(41), rtol=1e-15)
    assert run.step is not None and run.step.tolist() == list(range(41))


def label_noise_loop(layers, sxx, syx, samples_in_a_step, std, normals, step_size, momentum=0.0):
    """Noise on the labels as noise on the end-to-end gradient: s/sqrt(n) Xi S^{1/2}."""
    root = training.symmetric_root(sxx)

    def gradient(weights: reference.Layers, k: int) -> reference.Layers:
        m = reference.end_to_end(weights) @ sxx - syx
        noise = std / np.sqrt(samples_in_a_step) * normals[k] @ root
        return reference.pull_back(weights, m + noise)

    return training.descend(layers, gradient, step_size, len(normals), momentum)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_label_noise_on_a_full_batch(momentum: float):
    run = every_step(
        problem_of(gf.LabelNoise(0.7)), gf.GradientDescent(0.1, momentum), 30, replicas=4, key=KEY
    )
    normals = np.asarray(training.draws(KEY, 30, 4, 0).normals((WIDTHS[-1], WIDTHS[0])))
    start = reference.as_numpy(network_of().weights)
    for r in range(4):
        expected = label_noise_loop(start, *moments(), ROWS, 0.7, normals[..., r], 0.1, momentum)
        actual = [w[r] for w in run.weights]
        reference.assert_close(actual, expected, reference.scale(*expected))


@pytest.mark.slow
def test_noisy_minibatches_with_weight_decay_and_momentum():
    input_std, label_std, decay, step_size, batch = 0.3, 0.7, 0.1, 0.05, 3
    problem = problem_of(
        gf.InputNoise(input_std),
        gf.WeightDecay(decay),
        gf.Minibatch(batch, replacement=True),
        gf.LabelNoise(label_std),
    )
    dynamics = gf.GradientDescent(step_size, 0.5)
    run = every_step(problem, dynamics, 30, replicas=3, key=KEY)
    on_inputs = np.asarray(training.draws(KEY, 30, 3, 0).normals((batch, WIDTHS[0])))
    rows = np.asarray(training.draws(KEY, 30, 3, 2).integers(jnp.full((batch,), ROWS), (batch,)))
    on_labels = np.asarray(training.draws(KEY, 30, 3, 3).normals((batch, WIDTHS[-1])))
    x, y = samples()
    start = reference.as_numpy(network_of().weights)
    for r in range(3):

        def gradient(weights: reference.Layers, k: int, r: int = r) -> reference.Layers:
            xs = x[rows[k, :, r]] + input_std * on_inputs[k, :, :, r]
            ys = y[rows[k, :, r]] + label_std * on_labels[k, :, :, r]
            errors = xs @ reference.end_to_end(weights).T - ys
            clean = reference.pull_back(weights, errors.T @ xs / batch)
            return [g + decay * w for g, w in zip(clean, weights, strict=True)]

        expected = training.descend(start, gradient, step_size, 30, 0.5)
        reference.assert_close([w[r] for w in run.weights], expected, reference.scale(*expected))


@pytest.mark.slow
def test_epochs_are_not_broken_by_blocks_of_noise():
    steps, batch = 600, 3  # blocks have at most 256 steps; an epoch has 2 and skips one row
    problem = problem_of(gf.Minibatch(batch, reshuffled=True))
    run = every_step(problem, gf.GradientDescent(0.05), steps, replicas=2, key=KEY)
    orders = np.asarray(training.draws(KEY, steps // 2, 2, 0).permutations(ROWS))
    x, y = samples()
    start = reference.as_numpy(network_of().weights)
    for r in range(2):

        def gradient(weights: reference.Layers, k: int, r: int = r) -> reference.Layers:
            chosen = orders[k // 2, batch * (k % 2) : batch * (k % 2 + 1), r]
            errors = x[chosen] @ reference.end_to_end(weights).T - y[chosen]
            return reference.pull_back(weights, errors.T @ x[chosen] / batch)

        expected = training.descend(start, gradient, 0.05, steps)
        reference.assert_close([w[r] for w in run.weights], expected, 1.0, 1e-10)


@pytest.mark.slow
def test_balancedness_moves_by_the_gram_difference_of_the_step():
    """G+ = G + dW_{i+1}^T dW_{i+1} - dW_i dW_i^T path by path, for gradients A^T M B^T."""
    problem = problem_of(gf.Minibatch(3), gf.LabelNoise(0.5), gf.InputNoise(0.2))
    run = every_step(problem, gf.GradientDescent(0.1), 30, replicas=3, key=KEY)
    (g,) = training.gram_path(run.weights)
    (moved,) = training.gram_path([np.diff(w, axis=1) for w in run.weights])
    np.testing.assert_allclose(g[:, 1:], g[:, :-1] + moved, rtol=0.0, atol=1e-13)
    assert np.abs(moved).max() > 1e-4


@pytest.mark.slow
def test_steps_that_are_too_long_for_some_replicas_leave_the_others_alone():
    """Curvature of scalar nets is w_1^2 + w_2^2: h = 0.1 is unstable beyond 20."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.1)])
    tame = [gf.DeepLinear([[[w]], [[0.5]]]) for w in (0.5, 1.0, 2.0, 3.0)]
    wild = [gf.DeepLinear([[[w]], [[w]]]) for w in (10.0, 20.0)]
    options = {"steps": 300, "key": KEY, "save": 31, "observables": ["loss", "imbalance"]}
    for dynamics in (gf.GradientDescent(0.1), gf.GradientDescent(0.1, 0.3)):
        nets = [tame[0], wild[0], tame[2], wild[1]]
        with pytest.warns(gf.DivergedWarning, match="2 of 4 paths diverged, the first by t = "):
            run = gf.simulate(problem, nets, dynamics, **options)
        alone = gf.simulate(problem, tame, dynamics, **options)
        assert run.diverged.tolist() == [False, True, False, True]
        gone = run.to_xarray()["diverged_at"].values
        for r in (1, 3):
            after = run.time >= gone[r]
            assert 0.0 < gone[r] < 5.0
            for name in ("loss", "imbalance", "W1", "W2"):
                assert np.isnan(run[name][r, after]).all()
                assert np.isfinite(run[name][r, ~after]).all()
        for r in (0, 2):
            for name in ("loss", "imbalance", "W1", "W2"):
                np.testing.assert_array_equal(run[name][r], alone[name][r])


def kick() -> list[np.ndarray]:
    """An initial velocity."""
    rng = np.random.default_rng(8)
    return [0.1 * rng.normal(size=w.shape) for w in network_of().weights]


def momentum_loop(
    clean: Callable[[reference.Layers, int], reference.Layers],
    step_sizes: np.ndarray,
    beta: float,
    velocity: reference.Layers,
    rate: float,
    nesterov: bool,
    decay: str,
) -> list[np.ndarray]:
    """Heavy ball or Nesterov with weight decay in the gradient or beside the velocity."""
    weights = reference.as_numpy(network_of().weights)
    path = [weights]
    for k, h in enumerate(step_sizes):
        g = clean(weights, k)
        if decay == "coupled":
            g = [d + rate * w for d, w in zip(g, weights, strict=True)]
        velocity = [beta * v - h * d for v, d in zip(velocity, g, strict=True)]
        if nesterov:
            moved = [beta * v - h * d for v, d in zip(velocity, g, strict=True)]
        else:
            moved = velocity
        shrink = 1 - h * rate if decay == "decoupled" else 1.0
        weights = [shrink * w + m for w, m in zip(weights, moved, strict=True)]
        path.append(weights)
    return [np.stack(layer) for layer in zip(*path, strict=True)]


def clean_gradient(weights: reference.Layers, k: int) -> reference.Layers:
    return reference.gradient(weights, *moments())


@pytest.mark.few_cases(3)
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy ball", "nesterov"])
def test_momentum_from_an_initial_velocity(nesterov: bool, decay: Any):
    dynamics = gf.GradientDescent(0.05, 0.8, nesterov=nesterov, decay=decay, velocity=kick())
    run = every_step(problem_of(gf.WeightDecay(0.3)), dynamics, 40)
    steps = np.full(40, 0.05)
    expected = momentum_loop(clean_gradient, steps, 0.8, kick(), 0.3, nesterov, decay)
    reference.assert_close(run.weights, expected, reference.scale(*expected))


@pytest.mark.slow
def test_coupled_and_decoupled_decay_are_the_same_without_momentum():
    problem = problem_of(gf.WeightDecay(0.3), gf.LabelNoise(0.5))
    options = {"replicas": 4, "key": KEY}
    one = every_step(problem, gf.GradientDescent(0.05), 20, **options)
    two = every_step(problem, gf.GradientDescent(0.05, decay="decoupled"), 20, **options)
    reference.assert_close(one.weights, two.weights, 1.0)


def charges(weights: reference.Layers) -> list[np.ndarray]:
    """J_i = skew(W_{i+1}^T v_{i+1} + W_i v_i^T) with v the last step, along `(step, ...)`."""
    found = []
    for below, above in itertools.pairwise(weights):
        v, v_above = np.diff(below, axis=0), np.diff(above, axis=0)
        j = np.swapaxes(above[1:], 1, 2) @ v_above + below[1:] @ np.swapaxes(v, 1, 2)
        found.append((j - np.swapaxes(j, 1, 2)) / 2)
    return found


def test_noether_charge_of_heavy_ball_shrinks_by_beta_a_step():
    """J_i -> beta J_i exactly (theory section 2), for every noise on the data as well."""
    problem = problem_of(gf.WeightDecay(0.1), gf.LabelNoise(0.5))
    dynamics = gf.GradientDescent(0.03, 0.95, velocity=kick())
    run = every_step(problem, dynamics, 50, replicas=4, key=KEY)
    for r in range(4):
        (j,) = charges([w[r] for w in run.weights])
        assert np.abs(j[0]).max() > 0.05
        factors = 0.95 ** np.arange(50)
        np.testing.assert_allclose(j, factors[:, None, None] * j[0], rtol=0.0, atol=1e-13)


@pytest.mark.parametrize(("decay", "speed_up"), [("coupled", 10.0), ("decoupled", 1.0)])
def test_rate_of_imbalance_under_weight_decay_and_momentum(decay: Any, speed_up: float):
    """2 lam / (1 - beta) a unit of time with decay in the gradient, 2 lam beside the velocity.

    Theory section 4, on the slow manifold; corrections are of order h lam / (1 - beta)^2 = 0.03%.
    """
    rate, h = 3e-4, 0.01
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.WeightDecay(rate)])
    net = gf.DeepLinear([[[2.0]], [[0.5]]])
    dynamics = gf.GradientDescent(h, 0.9, decay=decay)
    run = gf.simulate(problem, net, dynamics, steps=8000, save=[0.0, 20.0, 80.0])
    u = np.asarray(run["imbalance"])
    measured = -np.log(u[2] / u[1]) / 60.0
    assert measured == pytest.approx(2 * rate * speed_up, rel=1e-3)


# Optimizers and schedules of optax


def optax_loop(
    transformation: optax.GradientTransformation,
    gradient: Callable[[reference.Layers, int], reference.Layers],
    steps: int,
) -> list[np.ndarray]:
    """Run optax by hand on gradients from NumPy."""
    weights = tuple(jnp.asarray(w) for w in network_of().weights)
    state = transformation.init(weights)
    path = [weights]
    update = jax.jit(transformation.update)
    for k in range(steps):
        g = tuple(jnp.asarray(d) for d in gradient(reference.as_numpy(weights), k))
        change, state = update(g, state, weights)
        weights = tuple(w + c for w, c in zip(weights, change, strict=True))
        path.append(weights)
    return [np.stack(layer) for layer in zip(*map(reference.as_numpy, path), strict=True)]


SCHEDULE = optax.exponential_decay(0.05, transition_steps=7, decay_rate=0.7)


@pytest.mark.few_cases(2)
@pytest.mark.parametrize(
    ("step_size", "optimizer", "by_hand"),
    [
        (0.05, optax.adam, optax.adam(0.05)),
        (0.05, functools.partial(optax.adam, b1=0.5), optax.adam(0.05, b1=0.5)),
        (0.3, optax.adam(0.02, b2=0.9), optax.adam(0.02, b2=0.9)),
        (SCHEDULE, optax.rmsprop, optax.rmsprop(SCHEDULE)),
        (
            0.05,
            functools.partial(optax.sgd, momentum=0.8, nesterov=True),
            optax.sgd(0.05, momentum=0.8, nesterov=True),
        ),
    ],
    ids=["adam", "partial", "as it is", "schedule", "nesterov"],
)
def test_optimizers_of_optax(step_size: Any, optimizer: Any, by_hand: Any):
    run = every_step(problem_of(), gf.GradientDescent(step_size, optimizer=optimizer), 25)
    expected = optax_loop(by_hand, clean_gradient, 25)
    reference.assert_close(run.weights, expected, reference.scale(*expected))
    steps = [float(step_size(k)) if callable(step_size) else step_size for k in range(25)]
    np.testing.assert_allclose(run.time, np.append(0.0, np.cumsum(steps)), rtol=1e-14)


def test_own_nesterov_is_that_of_optax():
    run = every_step(problem_of(), gf.GradientDescent(0.05, 0.8, nesterov=True), 25)
    by_hand = optax.sgd(0.05, momentum=0.8, nesterov=True)
    expected = optax_loop(by_hand, clean_gradient, 25)
    reference.assert_close(run.weights, expected, reference.scale(*expected))


def test_adam_with_decoupled_decay_is_adamw():
    dynamics = gf.GradientDescent(0.05, optimizer=optax.adam, decay="decoupled")
    run = every_step(problem_of(gf.WeightDecay(0.3)), dynamics, 25)
    expected = optax_loop(optax.adamw(0.05, weight_decay=0.3), clean_gradient, 25)
    reference.assert_close(run.weights, expected, reference.scale(*expected))


@pytest.mark.slow
def test_every_path_has_an_optimizer_of_its_own():
    """Saving in between changes no bit, so state and block of noise are carried over."""
    problem = problem_of(gf.LabelNoise(0.7))
    dynamics = gf.GradientDescent(SCHEDULE, optimizer=optax.adam)
    run = every_step(problem, dynamics, 30, replicas=4, key=KEY)
    normals = np.asarray(training.draws(KEY, 30, 4, 0).normals((WIDTHS[-1], WIDTHS[0])))
    sxx, syx = moments()
    root = training.symmetric_root(sxx)
    for r in range(4):

        def gradient(weights: reference.Layers, k: int, r: int = r) -> reference.Layers:
            noise = 0.7 / np.sqrt(ROWS) * normals[k, ..., r] @ root
            m = reference.end_to_end(weights) @ sxx - syx + noise
            return reference.pull_back(weights, m)

        expected = optax_loop(optax.adam(SCHEDULE), gradient, 30)
        reference.assert_close([w[r] for w in run.weights], expected, reference.scale(*expected))
    options = {"observables": ["loss"], "replicas": 4, "key": KEY}
    rare = gf.simulate(problem, network_of(), dynamics, steps=30, save=2, **options)
    for often, seldom in zip(run.weights, rare.weights, strict=True):
        np.testing.assert_array_equal(often[:, -1], seldom[:, -1])


class Halving(eqx.Module):
    """A schedule whose numbers are arrays."""

    start: jax.Array

    def __call__(self, step: Any) -> Any:
        return self.start * 0.5 ** (step / 10)


def test_a_schedule_changes_the_steps_of_momentum():
    steps = 0.05 * 0.5 ** (np.arange(300) / 10) + 0.01
    schedule = functools.partial(lambda k, floor: Halving(jnp.asarray(0.05))(k) + floor, floor=0.01)
    run = every_step(problem_of(), gf.GradientDescent(schedule, 0.6), 300)
    zero = [np.zeros(w.shape) for w in network_of().weights]
    expected = momentum_loop(clean_gradient, steps, 0.6, zero, 0.0, False, "coupled")
    reference.assert_close(run.weights, expected, reference.scale(*expected), 1e-11)
    np.testing.assert_allclose(run.time, np.append(0.0, np.cumsum(steps)), rtol=1e-13)
    assert run.step is not None and run.step.tolist() == list(range(301))


def test_other_numbers_do_not_trace_again():
    traces = []

    def counting(learning_rate: Any, decay: float) -> optax.GradientTransformation:
        inner = optax.rmsprop(learning_rate, decay)

        def update(*arguments: Any) -> Any:
            traces.append(arguments)
            return inner.update(*arguments)

        return optax.GradientTransformation(inner.init, update)

    ends = []
    for h in (0.01, 0.02, 0.03):
        optimizer = functools.partial(counting, decay=0.8)
        run = every_step(problem_of(), gf.GradientDescent(h, optimizer=optimizer), 5)
        ends.append(float(run["loss"][-1]))
    for h in (0.01, 0.02):
        schedule = Halving(jnp.asarray(h))
        run = every_step(problem_of(), gf.GradientDescent(schedule, optimizer=optimizer), 5)
        ends.append(float(run["loss"][-1]))
    assert len(set(ends)) == 5
    assert len(traces) == 2  # a step size, a schedule


# Noise


@pytest.mark.slow
def test_anticorrelated_weight_noise_is_added_to_the_weights_and_taken_back():
    """W+ = W - h g(W) + xi_{k+1} - xi_k with the draw of step k as xi_{k+1} and xi_0 = 0."""
    std, h, rate, beta = 0.2, 0.05, 0.1, 0.4
    noisy = gf.regularizers.WeightNoise(std, anticorrelated=True)
    problem = problem_of(noisy, gf.WeightDecay(rate))
    run = every_step(problem, gf.GradientDescent(h, beta), 30, replicas=3, key=KEY)
    stream = training.draws(KEY, 30, 3, 0)
    shapes = [w.shape for w in network_of().weights]
    noise = [np.asarray(stream.substream(i).normals(s)) for i, s in enumerate(shapes, start=1)]
    for r in range(3):
        weights = reference.as_numpy(network_of().weights)
        velocity = shift = [np.zeros(s) for s in shapes]
        path = [weights]
        for k in range(30):
            g = clean_gradient(weights, k)
            g = [d + rate * w for d, w in zip(g, weights, strict=True)]
            velocity = [beta * v - h * d for v, d in zip(velocity, g, strict=True)]
            following = [std * z[k, ..., r] for z in noise]
            weights = [
                w + v + b - a
                for w, v, a, b in zip(weights, velocity, shift, following, strict=True)
            ]
            shift = following
            path.append(weights)
        expected = [np.stack(layer) for layer in zip(*path, strict=True)]
        reference.assert_close([w[r] for w in run.weights], expected, reference.scale(*expected))


@pytest.mark.slow
def test_noise_from_a_finer_brownian_path():
    """The noise of a step is the normalised sum of the normals of the grid steps inside it."""
    steps, fineness, h = 20, 4, 0.1
    dynamics = gf.GradientDescent(h, path_substeps=fineness)
    problem = problem_of(gf.LabelNoise(0.7))
    run = every_step(problem, dynamics, steps, replicas=4, key=KEY)
    fine = training.draws(KEY, steps * fineness, 4, 0).normals((WIDTHS[-1], WIDTHS[0]))
    summed = np.asarray(fine).reshape(steps, fineness, WIDTHS[-1], WIDTHS[0], 4).sum(1)
    normals = summed / math.sqrt(fineness)
    start = reference.as_numpy(network_of().weights)
    for r in range(4):
        expected = label_noise_loop(start, *moments(), ROWS, 0.7, normals[..., r], h)
        reference.assert_close([w[r] for w in run.weights], expected, reference.scale(*expected))
    # The equation on the same path stays close, on another path it does not.
    near, far = (
        every_step(problem, gf.StochasticFlow(h, substeps=fineness), steps, replicas=4, key=key)
        for key in (KEY, jax.random.key(6))
    )
    distances = [
        sum(np.sum((a - b)[:, -1] ** 2) for a, b in zip(run.weights, sde.weights, strict=True))
        for sde in (near, far)
    ]
    assert distances[0] < 0.1 * distances[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "GradientDescent.step_size must be a finite number > 0; got 0.0"),
        ((-1.0,), "GradientDescent.step_size"),
        ((float("nan"),), "GradientDescent.step_size"),
        ((float("inf"),), "GradientDescent.step_size"),
        ((0.1, 1.0), r"GradientDescent.momentum must lie in \[0, 1\); got 1.0"),
        ((0.1, -0.1), "GradientDescent.momentum"),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        gf.GradientDescent(*arguments)


def by_size(k: Any) -> float:
    return 0.1 if k < 3 else 0.01


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0.1,), {"nesterov": True}, ValueError, "GradientDescent.nesterov needs momentum > 0"),
        ((0.1,), {"velocity": kick()}, ValueError, "GradientDescent.velocity needs momentum > 0"),
        ((0.1,), {"decay": "weights"}, ValueError, "decay must be 'coupled' or 'decoupled'"),
        ((0.1,), {"path_substeps": 0}, ValueError, "path_substeps must be an integer >= 1; got 0"),
        ((0.1, 0.5), {"velocity": [np.ones(2)]}, ValueError, "velocity: entry 1 must be a matrix"),
        ((0.1, 0.5), {"velocity": ["a"]}, TypeError, "velocity must be a list with one array"),
        ((0.1, 0.5), {"optimizer": optax.adam}, ValueError, "momentum=0.5: an optimizer brings"),
        ((0.1,), {"optimizer": "adam"}, TypeError, "optimizer must be a function .* got 'adam'"),
        ((0.1,), {"optimizer": lambda h: h}, TypeError, "must make an optax gradient transf"),
        ((by_size,), {}, TypeError, "schedule must be a function .*jnp.where instead of if"),
        ((lambda k: jnp.zeros(3),), {}, TypeError, "gives one number"),
        ((lambda k: -0.1,), {}, ValueError, "step_size must be a finite number > 0; got -0.1"),
    ],
)
def test_refuses_options_that_make_no_sense(
    arguments: tuple, options: dict, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        gf.GradientDescent(*arguments, **options)


@pytest.mark.parametrize(
    ("dynamics", "message"),
    [
        (
            gf.GradientDescent(0.1, 0.5, velocity=[np.ones((4, 3))]),
            r"GradientDescent.velocity has layers of shapes \[\(4, 3\)\], but .* one array a layer",
        ),
        (
            gf.GradientDescent(0.1, path_substeps=2),
            "GradientDescent.path_substeps=2: a Brownian path .* not with Minibatch and InputNoise",
        ),
    ],
)
def test_refuses_what_does_not_fit_the_problem(dynamics: gf.GradientDescent, message: str):
    problem = problem_of(gf.Minibatch(3), gf.InputNoise(0.1), gf.WeightDecay(0.1))
    with pytest.raises(ValueError, match=message):
        every_step(problem, dynamics, 3, key=KEY)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    ("dynamics", "limit"),
    [
        (gf.GradientDescent(0.7), 2.0),
        (gf.GradientDescent(0.7, 0.5), 3.0),
        (gf.GradientDescent(0.7, 0.5, nesterov=True), 1.5),
    ],
)
def test_a_divergence_is_said_with_its_limit(dynamics, limit):
    """The Hessian of (w_1 w_2 - 1)^2 / 2 at (2, 0.1) is ((0.01, -0.6), (-0.6, 4))."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]))
    net = gf.DeepLinear([[[2.0]], [[0.1]]])
    steep = np.linalg.eigvalsh([[0.01, -0.6], [-0.6, 4.0]])[-1]
    far = gf.DeepLinear([[[20.0]], [[0.1]]])
    with pytest.warns(gf.DivergedWarning) as said:
        run = gf.simulate(problem, far, dynamics, steps=20, save=[0.7, 14.0])
    assert "Trajectory(GradientDescent, 2 times to t = 14, 1 of 1 diverged;" in repr(run)
    assert f"and steps are stable up to {limit:g}: use" in str(said[0].message)
    with pytest.warns(gf.DivergedWarning) as said:
        gf.simulate(problem, [net, net, net], gf.GradientDescent(5.0), steps=50, save=51)
    w1, w2, step = 2.0, 0.1, 0
    while w1**2 + w2**2 < 1e12 * (1.0 + 4.01):
        pull = w1 * w2 - 1.0
        w1, w2, step = w1 - 5.0 * pull * w2, w2 - 5.0 * pull * w1, step + 1
    (text,) = (str(w.message) for w in said)
    assert text == (
        f"GradientDescent: 3 of 3 paths diverged, the first by t = {5 * step} (step {step}); from "
        f"then on they are NaN. At its start h lam_max is {5 * steep:.4g}, and steps are stable up "
        f"to 2: use a step size smaller than {2 / steep:.4g}."
    )


@pytest.mark.parametrize("beta", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_stability_limit_is_that_of_the_recursion(beta, nesterov):
    """Spectral radius 1 of the step (w, v) on the loss h lam w^2 / 2."""
    if nesterov and beta == 0.0:
        return
    limit = float(gf.GradientDescent(1.0, beta, nesterov=nesterov).stability_limit)
    for x, stable in ((0.999 * limit, True), (1.001 * limit, False)):
        ahead = [1.0 - (1.0 + beta) * x, beta**2] if nesterov else [1.0 - x, beta]
        radius = np.abs(np.linalg.eigvals([ahead, [-x, beta]])).max()
        assert (radius < 1.0) == stable
