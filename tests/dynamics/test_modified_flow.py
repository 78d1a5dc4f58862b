"""The modified flow against NumPy derivatives, gradient descent and exact epochs."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training
from compiled import compiled

import gradflow as gf
from gradflow.dynamics.modified_flow import ModifiedFlow, modified_drift
from gradflow.regularizers import DropConnect, Dropout

SHAPES = [(3, 2), (2, 3, 2), (3, 2, 4, 1), (2, 3, 1, 3, 2)]
drift = compiled(modified_drift)


def samples(widths: Sequence[int], rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(widths))
    x = rng.normal(size=(rows, widths[0]))
    return x, rng.normal(size=(rows, widths[-1])) + x[:, :1]


def problem_of(
    widths: Sequence[int], *regularizers: gf.AbstractRegularizer, rows: int = 12
) -> gf.Problem:
    return gf.Problem(gf.Regression.from_samples(*samples(widths, rows)), regularizers)


def network_of(widths: Sequence[int], size: float = 0.7) -> gf.DeepLinear:
    rng = np.random.default_rng(7)
    return gf.DeepLinear(
        [size * rng.normal(size=pair) for pair in zip(widths[1:], widths, strict=False)]
    )


def moments_of(problem: gf.Problem) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(problem.data.sxx), np.asarray(problem.data.syx)


def along(
    layers: reference.Layers, direction: reference.Layers, sxx: np.ndarray, syx: np.ndarray
) -> np.ndarray:
    """D^2 g[v, v] of the gradient g: twice the coefficient of s^2 in g(W + s v), a polynomial."""
    degree = 2 * len(layers) - 1
    nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    values = [
        reference.flatten(
            reference.gradient(
                [w + s * v for w, v in zip(layers, direction, strict=True)], sxx, syx
            )
        )
        for s in nodes
    ]
    coefficients = np.linalg.solve(np.vander(nodes, increasing=True), np.stack(values))
    return 2.0 * coefficients[2] if degree >= 2 else np.zeros(values[0].shape)


@pytest.mark.few_cases(3)
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("widths", SHAPES)
def test_the_drift_is_the_series_of_backward_error_analysis(widths: tuple[int, ...], decay: float):
    noises = [gf.InputNoise(0.5), gf.WeightDecay(decay)] if decay else []
    problem, h = problem_of(widths, *noises), 0.3
    layers = reference.as_numpy(network_of(widths).weights)
    sxx, syx = moments_of(problem)
    sxx = sxx + (0.25 * np.eye(len(sxx)) if decay else 0.0)
    flat = reference.flatten(layers)
    g = reference.flatten(reference.gradient(layers, sxx, syx)) + decay * flat
    hessian = reference.hessian(layers, sxx, syx) + decay * np.eye(flat.size)
    third = along(layers, training.unflatten(g, layers), sxx, syx)
    expected = {1: -g}
    expected[2] = expected[1] - h / 2 * hessian @ g
    expected[3] = expected[2] - h**2 * (hessian @ hessian @ g / 3 + third / 12)
    for order, vector in expected.items():
        found = drift(problem, network_of(widths).weights, jnp.asarray(h), order)
        size = float(np.max(np.abs(vector)))
        reference.assert_close(found, training.unflatten(vector, layers), 1.0 + size, 1e-12)


@pytest.mark.parametrize("widths", SHAPES[1:])
def test_the_balancedness_moves_by_h_times_that_of_the_gradient(widths: tuple[int, ...]):
    """dG_i/dt = h (g_{i+1}^T g_{i+1} - g_i g_i^T) exactly at order 2 (theory section 3)."""
    problem, h = problem_of(widths), 0.3
    layers = reference.as_numpy(network_of(widths).weights)
    found = reference.as_numpy(drift(problem, network_of(widths).weights, jnp.asarray(h), 2))
    halves = [
        w.T @ a - u @ v.T
        for (u, w), (a, v) in zip(
            itertools.pairwise(layers), zip(found[1:], found[:-1], strict=True), strict=True
        )
    ]
    of_gradient = reference.balancedness(reference.gradient(layers, *moments_of(problem)))
    expected = [h * q for q in of_gradient]
    assert max(float(np.max(np.abs(q))) for q in expected) > 0.01
    size = reference.scale(layers, found)
    reference.assert_close([q + q.T for q in halves], expected, size)


@pytest.mark.slow
def test_tracks_gradient_descent_to_its_order():
    """The distance to gradient descent at t = 1 falls as h, h^2 and h^3."""
    widths, steps, t1 = (3, 2, 1, 2), np.array([0.04, 0.02, 0.01]), 1.0
    problem, net = problem_of(widths), network_of(widths)
    sxx, syx = moments_of(problem)
    tight = {"rtol": 1e-11, "atol": 1e-13}
    distances: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for h in steps:
        start = reference.as_numpy(net.weights)
        path = training.descend(
            start, lambda w, k: reference.gradient(w, sxx, syx), h, round(t1 / h)
        )
        for order, found in distances.items():
            dynamics = gf.GradientFlow(**tight) if order == 1 else ModifiedFlow(h, order, **tight)
            run = gf.simulate(problem, net, dynamics, t1=t1, save=2, observables=["loss"])
            pairs = zip(run.weights, path, strict=True)
            found.append(max(float(np.max(np.abs(w[-1] - v[-1]))) for w, v in pairs))
    for order, found in distances.items():
        slope = np.polyfit(np.log(steps), np.log(found), 1)[0]
        assert slope == pytest.approx(order, abs=0.15)


# Epochs


def flow(problem: gf.Problem, layers: reference.Layers, h: float, t1: float) -> list[np.ndarray]:
    """The order-2 flow over a short time: four steps of the classical Runge-Kutta method."""
    dt = t1 / 4

    def field(v: np.ndarray) -> np.ndarray:
        weights = tuple(jnp.asarray(w) for w in training.unflatten(v, layers))
        return reference.flatten(reference.as_numpy(drift(problem, weights, jnp.asarray(h), 2)))

    v = reference.flatten(layers)
    for _ in range(4):
        a = field(v)
        b = field(v + dt / 2 * a)
        c = field(v + dt / 2 * b)
        v = v + dt / 6 * (a + 2 * b + 2 * c + field(v + dt * c))
    return training.unflatten(v, layers)


def mean_after_an_epoch(
    layers: reference.Layers, x: np.ndarray, y: np.ndarray, size: int, h: float, decay: float
) -> list[np.ndarray]:
    """E W after one epoch of reshuffled batches: every order of the rows, equally likely."""
    n = len(x)
    ends = []
    for order in itertools.permutations(range(n)):
        rows = [list(order[k * size : (k + 1) * size]) for k in range(n // size)]

        def gradient(w: reference.Layers, k: int, rows: list = rows) -> reference.Layers:
            a, b = x[rows[k]], y[rows[k]]
            g = reference.gradient(w, a.T @ a / size, b.T @ a / size)
            return [v + decay * u for v, u in zip(g, w, strict=True)]

        ends.append([layer[-1] for layer in training.descend(layers, gradient, h, n // size)])
    return [np.mean(layer, axis=0) for layer in zip(*ends, strict=True)]


@pytest.mark.few_cases(2)
@pytest.mark.parametrize(
    ("widths", "rows", "size", "decay"),
    [((1, 1), 4, 1, 0.0), ((2, 2, 1), 4, 2, 0.5), ((1, 2, 1), 5, 2, 0.0)],
)
def test_follows_the_mean_over_an_epoch_of_reshuffled_batches(
    widths: tuple[int, ...], rows: int, size: int, decay: float
):
    """The error of one epoch is O(h^3); without the correction for correlated batches, O(h^2).

    (5 rows in batches of 2 leave one row out of every epoch.)
    """
    regularizers = [gf.Minibatch(size, reshuffled=True), gf.WeightDecay(decay)]
    problem = problem_of(widths, *regularizers, rows=rows)
    plain = problem_of(widths, gf.WeightDecay(decay), rows=rows)
    layers = reference.as_numpy(network_of(widths).weights)
    steps = (0.02, 0.01, 0.005)
    errors: dict[str, list[float]] = {"reshuffled": [], "plain": []}
    for h in steps:
        expected = mean_after_an_epoch(layers, *samples(widths, rows), size, h, decay)
        for name, chosen in (("reshuffled", problem), ("plain", plain)):
            end = flow(chosen, layers, h, h * (rows // size))
            errors[name].append(
                max(float(np.max(np.abs(w - v))) for w, v in zip(end, expected, strict=True))
            )
    slopes = {k: np.polyfit(np.log(steps), np.log(v), 1)[0] for k, v in errors.items()}
    assert slopes["reshuffled"] == pytest.approx(3.0, abs=0.15)
    assert slopes["plain"] == pytest.approx(2.0, abs=0.15)


def test_noise_inside_the_network_enters_the_mean_over_an_epoch():
    """Two rows, one a step, a scalar net whose hidden unit is dropped: E W by enumeration."""
    widths, keep = (1, 1, 1), 0.75
    problem = problem_of(widths, gf.Minibatch(1, reshuffled=True), Dropout(1 - keep), rows=2)
    x, y = (v.ravel() for v in samples(widths, 2))
    start = [float(w[0, 0]) for w in network_of(widths).weights]
    steps, errors = (0.04, 0.02, 0.01), []
    for h in steps:
        mean = np.zeros(2)
        for order in itertools.permutations(range(2)):
            for masks in itertools.product((0, 1), repeat=2):
                w1, w2 = start
                for k, mask in zip(order, masks, strict=True):
                    z = mask / keep
                    e = w2 * z * w1 * x[k] - y[k]
                    w1, w2 = w1 - h * e * w2 * z * x[k], w2 - h * e * z * w1 * x[k]
                chance = 0.5 * np.prod([keep if mask else 1 - keep for mask in masks])
                mean += chance * np.array([w1, w2])
        layers = reference.as_numpy(network_of(widths).weights)
        end = flow(problem, layers, h, 2.0 * h)
        errors.append(np.max(np.abs([w.item() for w in end] - mean)))
    assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(3.0, abs=0.15)


@pytest.mark.slow
def test_both_routes_to_the_spread_over_rows_agree():
    """Without strength, noise inside the network changes nothing but the route."""
    widths = (2, 3, 2)
    batches = gf.Minibatch(3, reshuffled=True)
    weights, h = network_of(widths).weights, jnp.asarray(0.3)
    products = drift(problem_of(widths, batches, gf.InputNoise(0.4)), weights, h, 2)
    layers = drift(problem_of(widths, batches, gf.InputNoise(0.4), DropConnect(0.0)), weights, h, 2)
    reference.assert_close(layers, products, reference.scale(reference.as_numpy(products)))
    plain = drift(problem_of(widths, gf.InputNoise(0.4)), weights, h, 2)
    assert max(float(np.max(np.abs(a - b))) for a, b in zip(plain, products, strict=True)) > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_size": 0.0}, r"ModifiedFlow.step_size must be a finite number > 0; got 0.0"),
        ({"order": 1}, "ModifiedFlow.order must be 2 or 3; got 1. Order 1 is GradientFlow"),
        ({"order": 4}, "ModifiedFlow.order must be 2 or 3; got 4"),
        ({"rtol": 0.0}, r"ModifiedFlow.rtol must lie in \(0, 1\); got 0.0"),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ModifiedFlow(**{"step_size": 0.1} | arguments)


def test_order_3_is_not_known_for_reshuffled_batches():
    problem = problem_of((1, 1), gf.Minibatch(2, reshuffled=True))
    with pytest.raises(ValueError, match=r"ModifiedFlow.order=3: .* use order=2, or reshuffled"):
        gf.simulate(problem, network_of((1, 1)), ModifiedFlow(0.1, order=3), t1=1.0)
