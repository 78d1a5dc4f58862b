"""SVAG against plain NumPy loops with the same random numbers, SGD, and the SDE."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training

import gradflow as gf
from gradflow.dynamics import svag
from gradflow.dynamics.base import initial_state
from gradflow.random.streams import Source, Stream

KEY = jax.random.key(11)
WIDTHS = (2, 3, 2)
ROWS, BATCH, H = 5, 2, 0.2
SVAG = gf.dynamics.SVAG


def samples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    return rng.normal(size=(ROWS, WIDTHS[0])), rng.normal(size=(ROWS, WIDTHS[-1]))


def start() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [0.7 * rng.normal(size=p) for p in zip(WIDTHS[1:], WIDTHS[:-1], strict=True)]


def problem_of(*regularizers: gf.AbstractRegularizer) -> gf.Problem:
    return gf.Problem(gf.Regression.from_samples(*samples()), regularizers)


MINIBATCH = problem_of(gf.Minibatch(BATCH, replacement=True), gf.WeightDecay(0.1))
LABEL = problem_of(gf.LabelNoise(0.8), gf.WeightDecay(0.1))


def run(problem: gf.Problem, dynamics: gf.AbstractDynamics, **options: Any) -> gf.Trajectory:
    chosen = {"steps": 6, "save": 7, "replicas": 3, "key": KEY, "observables": ["loss"]} | options
    return gf.simulate(problem, gf.DeepLinear(start()), dynamics, **chosen)


def batch_gradient(weights: reference.Layers, rows: Any) -> list[np.ndarray]:
    x, y = samples()
    x, y = x[list(rows)], y[list(rows)]
    errors = x @ reference.end_to_end(weights).T - y
    clean = reference.pull_back(weights, errors.T @ x / len(x))
    return [g + 0.1 * w for g, w in zip(clean, weights, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("problem", [MINIBATCH, LABEL], ids=["rows", "normals"])
def test_amplification_one_is_sgd_bit_for_bit(problem: gf.Problem):
    ours = run(problem, SVAG(H, 1))
    sgd = run(problem, gf.GradientDescent(H))
    for a, b in zip(ours.weights, sgd.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ours.time, sgd.time)


@pytest.mark.slow
def test_two_draws_combined():
    amplification, steps = 3, 4
    found = run(MINIBATCH, SVAG(H, amplification), steps=steps, save=steps + 1)
    np.testing.assert_allclose(found.time, H * np.arange(steps + 1), rtol=1e-14)
    ticks = amplification * steps
    stream = Stream(KEY, jnp.arange(ticks), jnp.arange(3))
    bounds = jnp.full((BATCH,), ROWS)
    one, two = (
        np.asarray(s.substream(0).integers(bounds, (BATCH,)))
        for s in (stream, stream.substream(svag.SECOND))
    )
    assert (one != two).mean() > 0.5
    root = math.sqrt(2 * amplification - 1)
    for r in range(3):

        def gradient(weights: reference.Layers, k: int, r: int = r) -> reference.Layers:
            pair = (batch_gradient(weights, rows[k, :, r]) for rows in (one, two))
            return [0.5 * ((1 + root) * a + (1 - root) * b) for a, b in zip(*pair, strict=True)]

        path = training.descend(start(), gradient, H / amplification, ticks)
        expected = [w[::amplification] for w in path]
        reference.assert_close([w[r] for w in found.weights], expected, reference.scale(*expected))


@pytest.mark.slow
@pytest.mark.parametrize(("amplification", "path_substeps"), [(2, None), (2, 6), (1, 3)])
def test_gaussian_noise_follows_the_brownian_path(amplification: int, path_substeps: int | None):
    steps, std = 5, 0.8
    found = run(LABEL, SVAG(H, amplification, path_substeps), steps=steps, save=steps + 1)
    ticks, fineness = amplification * steps, (path_substeps or amplification) // amplification
    fine = training.draws(KEY, ticks * fineness, 3, 0).normals((WIDTHS[-1], WIDTHS[0]))
    normals = np.asarray(fine).reshape(ticks, fineness, WIDTHS[-1], WIDTHS[0], 3).sum(1)
    normals = normals / math.sqrt(fineness)
    x, y = samples()
    sxx, syx = x.T @ x / ROWS, y.T @ x / ROWS
    root = training.symmetric_root(sxx)
    for r in range(3):

        def gradient(weights: reference.Layers, k: int, r: int = r) -> reference.Layers:
            noise = std * math.sqrt(amplification / ROWS) * normals[k, ..., r] @ root
            m = reference.end_to_end(weights) @ sxx - syx + noise
            pulled = reference.pull_back(weights, m)
            return [g + 0.1 * w for g, w in zip(pulled, weights, strict=True)]

        path = training.descend(start(), gradient, H / amplification, ticks)
        expected = [w[::amplification] for w in path]
        reference.assert_close([w[r] for w in found.weights], expected, reference.scale(*expected))


@pytest.mark.slow
def test_with_gaussian_noise_it_is_the_sde_on_as_many_substeps():
    """h/l (grad + sqrt(l) B zeta) is the Euler-Maruyama step: grad dt + sqrt(h dt) B zeta."""
    ours = run(LABEL, SVAG(H, 4))
    sde = run(LABEL, gf.StochasticFlow(H, substeps=4))
    reference.assert_close(ours.weights, sde.weights, reference.scale(sde.weights))


def first_substeps(problem: gf.Problem, amplification: int, paths: int) -> np.ndarray:
    """The displacement in the first substep of many paths, `(paths, entries)`."""
    dynamics = SVAG(H, amplification)
    weights = tuple(jnp.repeat(jnp.asarray(w)[..., None], paths, -1) for w in start())
    shapes = dynamics.noise_shapes(problem, WIDTHS)
    state = initial_state(dynamics, problem, weights, shapes, 1)
    after = jax.jit(
        lambda state: dynamics.advance(
            problem,
            state,
            jnp.asarray(0),
            jnp.asarray(1),
            Source(KEY, jnp.arange(paths, dtype=jnp.uint32)),
            1,
        )
    )(state)
    moved = [np.asarray(a - b) for a, b in zip(after.weights, weights, strict=True)]
    return np.concatenate([m.reshape(-1, paths) for m in moved]).T


@pytest.mark.slow
@pytest.mark.parametrize("amplification", [2, 8])
def test_mean_and_covariance_of_a_substep(amplification: int):
    """Mean -(h/l) grad and covariance (h^2/l) Sigma: h^2 Sigma in the l substeps of time h.

    All batches are enumerated. The standard error of a variance is below 3% of it, so that a factor
    of 1.15 would be seen at 5 standard errors.
    """
    paths = 40_000
    moved = first_substeps(MINIBATCH, amplification, paths)
    batches = list(itertools.product(range(ROWS), repeat=BATCH))
    values = np.array([reference.flatten(batch_gradient(start(), b)) for b in batches])
    mean, sigma = reference.mean_and_covariance(values, np.full(len(batches), 1 / len(batches)))
    expected_mean, expected = -H / amplification * mean, H**2 / amplification * sigma
    error = np.sqrt(np.diag(expected) / paths)
    assert np.all(np.abs(moved.mean(0) - expected_mean) < 5 * error)
    products = (moved - expected_mean)[:, :, None] * (moved - expected_mean)[:, None, :]
    spread = products.std(0) / math.sqrt(paths)
    assert np.all(np.abs(products.mean(0) - expected) < 5 * spread)
    variances = np.diag(expected)
    assert np.all(np.diag(spread) < 0.03 * variances)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": -1.0}, "SVAG.step_size must be a finite number > 0; got -1.0"),
        ({"amplification": 0}, "SVAG.amplification must be an integer >= 1; got 0"),
        ({"amplification": True}, "SVAG.amplification must be an integer >= 1; got True"),
        ({"path_substeps": 6}, "SVAG.path_substeps=6 must be a multiple of amplification=4"),
    ],
)
def test_refuses_settings_that_make_no_sense(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SVAG(**{"step_size": 0.1, "amplification": 4} | options)


@pytest.mark.parametrize(
    ("problem", "options", "message"),
    [
        (
            problem_of(gf.Minibatch(2, reshuffled=True)),
            {},
            "SVAG: reshuffled minibatches correlate the steps.* use reshuffled=False",
        ),
        (
            problem_of(gf.regularizers.WeightNoise(0.1, anticorrelated=True)),
            {},
            "SVAG: anticorrelated weight noise correlates the steps.* use anticorrelated=False",
        ),
        (MINIBATCH, {"path_substeps": 8}, "SVAG.path_substeps=8: .* not with Minibatch"),
    ],
)
def test_refuses_noise_that_it_does_not_describe(problem: Any, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run(problem, SVAG(0.1, 4, **options))
