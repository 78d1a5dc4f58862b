"""Discrete training against plain NumPy loops that are fed the very same random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
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


def every_step(problem: gf.Problem, dynamics: gf.GradientDescent, steps: int, **options):
    return gf.simulate(
        problem,
        network_of(),
        dynamics,
        steps=steps,
        save=steps + 1,
        observables=["loss"],
        **options,
    )


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


def test_balancedness_moves_by_the_gram_difference_of_the_step():
    """G+ = G + dW_{i+1}^T dW_{i+1} - dW_i dW_i^T path by path, for gradients A^T M B^T."""
    problem = problem_of(gf.Minibatch(3), gf.LabelNoise(0.5), gf.InputNoise(0.2))
    run = every_step(problem, gf.GradientDescent(0.1), 30, replicas=3, key=KEY)
    (g,) = training.gram_path(run.weights)
    (moved,) = training.gram_path([np.diff(w, axis=1) for w in run.weights])
    np.testing.assert_allclose(g[:, 1:], g[:, :-1] + moved, rtol=0.0, atol=1e-13)
    assert np.abs(moved).max() > 1e-4


def test_steps_that_are_too_long_for_some_replicas_leave_the_others_alone():
    """Curvature of scalar nets is w_1^2 + w_2^2: h = 0.1 is unstable beyond 20."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.1)])
    tame = [gf.DeepLinear([[[w]], [[0.5]]]) for w in (0.5, 1.0, 2.0, 3.0)]
    wild = [gf.DeepLinear([[[w]], [[w]]]) for w in (10.0, 20.0)]
    options = {"steps": 300, "key": KEY, "save": 31, "observables": ["loss", "imbalance"]}
    for dynamics in (gf.GradientDescent(0.1), gf.GradientDescent(0.1, 0.3)):
        nets = [tame[0], wild[0], tame[2], wild[1]]
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
