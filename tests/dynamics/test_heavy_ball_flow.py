"""The flow of heavy-ball momentum: SciPy, the descent that it describes, and its Noether charge."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training
from reference import Layers
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.random.streams import Source

WIDTHS = (3, 2, 3, 2)
RATE = 0.15


def moments() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(9, 3))
    return rows.T @ rows / 9, rng.normal(size=(2, 3))


def layers_of(seed: int, size: float) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [size * rng.normal(size=pair) for pair in zip(WIDTHS[1:], WIDTHS[:-1], strict=True)]


START = layers_of(4, 0.6)
PULL = layers_of(5, 0.5)


def problem_of(rate: float, *more: gf.AbstractRegularizer) -> gf.Problem:
    sxx, syx = moments()
    return gf.Problem(gf.Regression.from_moments(sxx, syx), [gf.WeightDecay(rate), *more])


def run(dynamics: gf.AbstractDynamics, rate: float = RATE, **options: Any) -> gf.Trajectory:
    chosen = {"observables": ["loss"], "progress": False} | options
    return gf.simulate(problem_of(rate), gf.DeepLinear(START), dynamics, **chosen)


def clean(weights: Layers) -> list[np.ndarray]:
    return reference.gradient(weights, *moments())


def descend(
    h: float, beta: float, steps: int, velocity: Layers, decay: str, rate: float
) -> list[np.ndarray]:
    """The end of heavy ball: the penalty in the gradient, or beside the velocity."""
    weights, velocity = list(START), list(velocity)
    for _ in range(steps):
        pull = [rate * w for w in weights]
        g = clean(weights)
        if decay == "coupled":
            g = [a + b for a, b in zip(g, pull, strict=True)]
        velocity = [beta * v - h * d for v, d in zip(velocity, g, strict=True)]
        weights = [w + v for w, v in zip(weights, velocity, strict=True)]
        if decay == "decoupled":
            weights = [w - h * p for w, p in zip(weights, pull, strict=True)]
    return weights


def second_order(
    h: float,
    beta: float,
    t1: float,
    start_velocity: np.ndarray,
    decay: str,
    rate: float,
    rtol: float = 1e-11,
) -> np.ndarray:
    """m W'' + (1 - beta) W' + ... = -grad by SciPy, from a given W'(0)."""
    mass = (1 + beta) * h / 2
    friction, spring = 1 - beta, rate
    if decay == "decoupled":
        friction, spring = 1 - beta + h * beta * rate, (1 - beta) * rate
    size = start_velocity.size

    def field(t: float, state: np.ndarray) -> np.ndarray:
        w, v = state[:size], state[size:]
        g = reference.flatten(clean(training.unflatten(w, START)))
        return np.concatenate([v, -(g + spring * w + friction * v) / mass])

    state = np.concatenate([reference.flatten(START), start_velocity])
    solution = solve_ivp(field, (0.0, t1), state, method="DOP853", rtol=rtol, atol=rtol)
    assert solution.success
    return solution.y[:size, -1]


def matched_velocity(
    h: float, beta: float, velocity: Layers, decay: str, rate: float
) -> np.ndarray:
    """W'(0) that displaces the weights as much as the first steps of the descent do."""
    g, pull = reference.flatten(clean(START)), rate * reference.flatten(START)
    kick = 2 * beta * reference.flatten(velocity) / h
    if decay == "coupled":
        return (kick - g - pull) / (1 + beta)
    return (kick - g) / (1 + beta) - pull


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_against_scipy(decay: Any):
    h, beta = 0.1, 0.6
    velocity = [h * v for v in PULL]
    dynamics = gf.dynamics.HeavyBallFlow(h, beta, 1e-10, 1e-12, velocity=velocity, decay=decay)
    end = reference.flatten([np.asarray(w)[-1] for w in run(dynamics, t1=2.0, save=4).weights])
    start = matched_velocity(h, beta, velocity, decay, RATE)
    expected = second_order(h, beta, 2.0, start, decay, RATE)
    np.testing.assert_allclose(end, expected, rtol=0.0, atol=1e-8)


def exponents(errors: list[float]) -> np.ndarray:
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("kicked", [False, True], ids=["rest", "kicked"])
def test_second_order_against_the_descent(decay: Any, beta: float, kicked: bool):
    """With W'(0) = v_0 / h, which forgets that the transients differ, the order is 1."""
    ours, plain = [], []
    for h in (0.005, 0.0025, 0.00125):
        velocity = [kicked * h * v for v in PULL]
        steps = round(0.6 / h)
        discrete = reference.flatten(descend(h, beta, steps, velocity, decay, RATE))
        dynamics = gf.dynamics.HeavyBallFlow(h, beta, 1e-10, 1e-12, velocity=velocity, decay=decay)
        flow = run(dynamics, steps=steps, save=2)
        assert flow.time[-1] == pytest.approx(0.6)
        end = reference.flatten([np.asarray(w)[-1] for w in flow.weights])
        ours.append(float(np.linalg.norm(end - discrete)))
        naive = second_order(h, beta, 0.6, reference.flatten(velocity) / h, decay, RATE, 1e-7)
        plain.append(float(np.linalg.norm(naive - discrete)))
    np.testing.assert_allclose(exponents(ours), 2.0, atol=0.15)
    np.testing.assert_allclose(exponents(plain), 1.0, atol=0.05)


def charges(weights: Layers, velocity: Layers) -> list[np.ndarray]:
    """J_i = skew(W_{i+1}^T V_{i+1} + W_i V_i^T) along the leading axis."""
    out = []
    for (w, v), (above, v_above) in itertools.pairwise(zip(weights, velocity, strict=True)):
        j = np.swapaxes(above, -1, -2) @ v_above + w @ np.swapaxes(v, -1, -2)
        out.append((j - np.swapaxes(j, -1, -2)) / 2)
    return out


def states_of(dynamics: gf.dynamics.HeavyBallFlow, times: np.ndarray, rate: float):
    """Weights and velocities of the flow at the times, layers (time, d_i, d_{i-1})."""
    problem, block = problem_of(rate), 1
    state = dynamics.init(problem, tuple(jnp.asarray(w)[..., None] for w in START))
    advance = jax.jit(
        lambda state, start, stop: dynamics.advance(
            problem,
            state,
            start,
            stop,
            Source(jnp.zeros(2, jnp.uint32), jnp.zeros(1, jnp.uint32)),
            block,
        )
    )
    found = [(state.weights, state.memory[0][0])]
    for start, stop in itertools.pairwise(times):
        state = advance(state, start, stop)
        found.append((state.weights, state.memory[0][0]))
    weights, velocity = zip(*found, strict=True)
    return tuple(
        [np.stack([np.asarray(w)[..., 0] for w in layer]) for layer in zip(*kind, strict=True)]
        for kind in (weights, velocity)
    )


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_noether_charge_decays_by_friction_alone(decay: Any):
    h, beta, times = 0.2, 0.8, np.linspace(0.0, 2.0, 11)
    velocity = [h * v for v in PULL]
    dynamics = gf.dynamics.HeavyBallFlow(h, beta, 1e-11, 1e-13, velocity=velocity, decay=decay)
    weights, speed = states_of(dynamics, times, RATE)
    extra = h * beta * RATE if decay == "decoupled" else 0.0
    decayed = np.exp(-(1 - beta + extra) / ((1 + beta) * h / 2) * times)
    for j in charges(weights, speed):
        assert np.abs(j[0]).max() > 0.1
        np.testing.assert_allclose(j, decayed[:, None, None] * j[0], rtol=0.0, atol=1e-9)


@pytest.mark.slow
def test_the_balancedness_oscillates_as_theory_says():
    """m G'' + (1 - beta) G' + 2 lam G = 2 m (V_{i+1}^T V_{i+1} - V_i V_i^T)."""
    h, beta, dt = 0.3, 0.7, 0.02
    times = dt * np.arange(61)
    velocity = [h * v for v in PULL]
    dynamics = gf.dynamics.HeavyBallFlow(h, beta, 1e-12, 1e-14, velocity=velocity)
    weights, speed = states_of(dynamics, times, RATE)
    mass = (1 + beta) * h / 2
    # Central differences of order 8.
    first = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5, 0, 4 / 5, -1 / 5, 4 / 105, -1 / 280]) / dt
    second = np.array([-1 / 560, 8 / 315, -1 / 5, 8 / 5, -205 / 72])
    second = np.concatenate([second, second[3::-1]]) / dt**2

    def slope(values: np.ndarray, stencil: np.ndarray) -> np.ndarray:
        return sum(c * values[i : i + values.shape[0] - 8] for i, c in enumerate(stencil))

    for g, source in zip(training.gram_path(weights), training.gram_path(speed), strict=True):
        left = mass * slope(g, second) + (1 - beta) * slope(g, first) + 2 * RATE * g[4:-4]
        np.testing.assert_allclose(left, 2 * mass * source[4:-4], rtol=0.0, atol=1e-7)
        assert np.abs(source).max() > 0.1


@pytest.mark.slow
def test_noise_enters_through_the_averaged_loss():
    sxx, syx = moments()
    noisy = gf.simulate(
        problem_of(RATE, gf.InputNoise(0.5)),
        gf.DeepLinear(START),
        gf.dynamics.HeavyBallFlow(0.1, 0.6),
        t1=1.0,
        save=3,
        replicas=2,
    )
    smooth = gf.Problem(
        gf.Regression.from_moments(sxx + 0.25 * np.eye(3), syx), [gf.WeightDecay(RATE)]
    )
    expected = gf.simulate(
        smooth, gf.DeepLinear(START), gf.dynamics.HeavyBallFlow(0.1, 0.6), t1=1.0, save=3
    )
    for a, b in zip(noisy.weights, expected.weights, strict=True):
        np.testing.assert_allclose(a, np.stack([b, b]), rtol=0.0, atol=1e-9)


def test_a_blow_up_is_reported():
    """The gradient of the first stage overflows, and no step is short enough."""
    dynamics = gf.dynamics.HeavyBallFlow(0.1, 0.5, velocity=[1e200 * v for v in PULL])
    with pytest.warns(gf.DivergedWarning):
        assert bool(run(dynamics, t1=1.0, save=2).diverged)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0.0, 0.5), {}, "HeavyBallFlow.step_size must be a finite number > 0; got 0.0"),
        ((0.1, 1.0), {}, r"HeavyBallFlow.momentum must lie in \[0, 1\); got 1.0"),
        ((0.1, 0.5), {"rtol": 0.0}, r"HeavyBallFlow.rtol must lie in \(0, 1\)"),
        ((0.1, 0.5), {"decay": "none"}, "HeavyBallFlow.decay must be 'coupled' or 'decoupled'"),
        (
            (0.1, 0.5),
            {"velocity": [np.ones(1)]},
            "HeavyBallFlow.velocity: entry 1 must be a matrix",
        ),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments: tuple, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        gf.dynamics.HeavyBallFlow(*arguments, **options)


def test_refuses_a_velocity_of_other_shapes():
    with pytest.raises(ValueError, match=r"HeavyBallFlow.velocity has layers of shapes \[\(1, 1\)"):
        run(
            gf.dynamics.HeavyBallFlow(0.1, 0.5, velocity=[np.ones((1, 1)), np.ones((1, 1))]), t1=1.0
        )
