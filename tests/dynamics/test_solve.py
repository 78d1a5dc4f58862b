"""Flows as pure functions: inside compiled programs, sweeps and derivatives."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.backend.types import Scalar
from gradflow.dynamics.integration import MANY, SolverMemory, integrate

TIMES = np.array([0.0, 0.3, 1.0, 2.5])
NET = gf.DeepLinear([[[0.5, 0.2], [0.1, -0.4], [0.3, 0.3]], [[0.2, 0.6, -0.1]]])
PROBLEM = gf.Problem(gf.Regression.whitened([[1.0, -0.5]]), [gf.InputNoise(0.2)])
FLOWS = [gf.GradientFlow(), gf.HeavyBallFlow(0.1, 0.5)]


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: type(f).__name__)
def test_gives_the_weights_of_simulate(flow: gf.AbstractDynamics):
    run = gf.simulate(PROBLEM, NET, flow, t1=TIMES[-1], save=TIMES, observables=["loss"])
    saved = eqx.filter_jit(flow.solve)(PROBLEM, NET, jnp.asarray(TIMES))
    for layer, expected, start in zip(saved, run.weights, NET.weights, strict=True):
        np.testing.assert_allclose(layer, expected, rtol=0.0, atol=1e-14)
        np.testing.assert_array_equal(layer[0], start)
    of_list = flow.solve(PROBLEM, NET, TIMES.tolist())
    np.testing.assert_allclose(of_list[0], saved[0], rtol=0.0, atol=1e-14)


@pytest.mark.slow
def test_a_sweep_is_one_program():
    scales = jnp.array([0.5, 1.0, 2.0])

    def end(scale: Scalar) -> Array:
        net = jax.tree.map(lambda w: scale * w, NET)
        return FLOWS[0].solve(PROBLEM, net, jnp.asarray(TIMES))[0]

    together = jax.jit(jax.vmap(end))(scales)
    for scale, of_one in zip(scales, together, strict=True):
        np.testing.assert_allclose(of_one, jax.jit(end)(scale), rtol=0.0, atol=1e-10)


@pytest.mark.slow
def test_can_be_differentiated():
    """Depth 2, one number a layer, target 1: the derivative of the end with respect to w_1(0)."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]))
    flow, times = gf.GradientFlow(1e-11, 1e-13), jnp.array([0.0, 0.4, 1.0])

    def product(first: Scalar) -> Scalar:
        net = gf.DeepLinear([first[None, None], [[0.4]]])
        w1, w2 = flow.solve(problem, net, times)
        return w1[-1, 0, 0] * w2[-1, 0, 0]

    def closed_form(first: float) -> float:
        """z = (w1 + w2)^2 is logistic between its roots 2 +- sqrt(4 + u^2), u = w1^2 - w2^2."""
        u = first**2 - 0.4**2
        spread = np.sqrt(4 + u**2)
        high, low = 2 + spread, 2 - spread
        start = (first + 0.4) ** 2
        ratio = (start - high) / (start - low) * np.exp(-spread)
        z = (high - low * ratio) / (1 - ratio)
        return (z - u**2 / z) / 4

    value, slope = jax.jit(jax.value_and_grad(product))(jnp.asarray(1.2))
    np.testing.assert_allclose(value, closed_form(1.2), rtol=1e-10)
    difference = (closed_form(1.2 + 1e-5) - closed_form(1.2 - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-8)


@pytest.mark.slow
def test_what_cannot_be_reached_is_nan():
    net = gf.DeepLinear([[[1e200]], [[1e200]]])
    problem = gf.Problem(gf.Regression.whitened([[1.0]]))
    first, _ = eqx.filter_jit(FLOWS[0].solve)(problem, net, jnp.asarray(TIMES))
    assert np.isfinite(first[0]).all()
    assert np.isnan(first[1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: type(f).__name__)
def test_a_time_may_come_twice(flow: gf.AbstractDynamics):
    """The weights stay where they are, and later ones do not notice but in how steps are cut."""
    once = flow.solve(PROBLEM, NET, TIMES)
    twice = flow.solve(PROBLEM, NET, np.repeat(TIMES, 2))
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_array_equal(b[::2], b[1::2])
        np.testing.assert_allclose(b[::2], a, rtol=0.0, atol=1e-9)


@pytest.mark.slow
def test_a_time_that_is_reached_costs_nothing():
    """Of a field that says when it is evaluated; the velocities of a slow flow take seconds."""
    seen: list[float] = []

    def field(t: Any, y: Any, problem: Any) -> Any:
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return -y

    rtol, ones = jnp.array(1e-8), (jnp.ones((1, 1)),)
    memory = SolverMemory.at_start(tuple(y[:, None] for y in ones))
    memory = eqx.tree_at(lambda m: m.planned, memory, jnp.array([0.3]))
    for stop in (0.5, 0.7):
        solved = integrate(
            field, gf.solvers.DormandPrince853(), rtol, rtol, PROBLEM, ones[0], memory,
            jnp.array([0.5]), jnp.array(stop),
        )  # fmt: skip
        jax.effects_barrier()
        if stop == 0.5:
            assert not seen
            assert (solved.states.item(), solved.memory.planned.item()) == (1.0, 0.3)
    assert min(seen) == 0.5
    assert 0.69 < max(seen) < 0.7 + 1e-12


@pytest.mark.slow
def test_the_derivative_by_a_saved_time_is_the_velocity():
    flow = gf.GradientFlow(1e-11, 1e-13)
    stop = jnp.array(0.7)

    def end(stop: Scalar) -> tuple[Array, ...]:
        times = jnp.stack([0.0 * stop, 0.4 * stop, stop])
        return tuple(w[-1] for w in flow.solve(PROBLEM, NET, times))

    layers, velocity = jax.jit(lambda t: (end(t), jax.jacrev(end)(t)))(stop)
    w1, w2 = (np.asarray(w) for w in layers)
    m = w2 @ w1 * (1.0 + 0.2**2) - np.array([[1.0, -0.5]])
    np.testing.assert_allclose(velocity[0], -w2.T @ m, rtol=0.0, atol=1e-8)
    np.testing.assert_allclose(velocity[1], -m @ w1.T, rtol=0.0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, MANY], ids=["as one vector", "in parts"])
@pytest.mark.parametrize("solver", [gf.solvers.DormandPrince853(), diffrax.Tsit5()])
def test_a_field_that_depends_on_time_is_integrated_over_the_time_asked_for(size, solver):
    """A driven pendulum of one or many parts, two paths, in two links of a chain, beside SciPy."""

    def field(t: Any, y: Any, problem: Any) -> Any:
        angle, speed = y
        return speed, -jnp.sin(angle) * (1.0 + 0.3 * t)

    def flat(t: float, y: np.ndarray) -> np.ndarray:
        return np.array([y[1], -np.sin(y[0]) * (1.0 + 0.3 * t)])

    starts = np.array([[0.5, 1.2], [0.1, -0.4]])  # angle and speed of both paths
    states = tuple(jnp.broadcast_to(row, (size, 2)) for row in starts)
    rtol, atol = jnp.array(1e-11), jnp.array(1e-12)
    memory = SolverMemory.at_start(tuple(y[:, None] for y in states))
    for start, stop in ((0.7, 1.9), (1.9, 2.0)):
        before = memory.planned
        solved = integrate(
            field, solver, rtol, atol, PROBLEM, states, memory, jnp.full(2, start), jnp.array(stop)
        )
        states, memory = solved.states, solved.memory
    for path in range(2):
        exact = solve_ivp(
            flat, (0.7, 2.0), starts[:, path], method="DOP853", rtol=1e-12, atol=1e-13
        ).y[:, -1]
        for part, expected in zip(states, exact, strict=True):
            np.testing.assert_allclose(part[:, path], expected, rtol=0.0, atol=1e-9)
    # A short link neither shortens nor lengthens what comes next.
    assert np.all((0.5 * before < memory.planned) & (memory.planned < 3.0 * before))


@pytest.mark.few_cases(3)
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, 0.0], "increasing"),
        ([-1.0, 1.0], ">= 0"),
        ([0.0, np.nan], "finite"),
        (1.0, "list of flow times"),
    ],
)
def test_times_that_make_no_sense_are_refused(times: Any, message: str):
    with pytest.raises(ValueError, match=message):
        gf.GradientFlow().solve(PROBLEM, NET, times)
