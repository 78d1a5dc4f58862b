"""The solver that switches: which method it takes, and that it is as accurate as is asked."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.solvers import DormandPrince853, Stabilized5, Switching
from gradflow.solvers.switching import PAUSE, SMALL

RTOL, ATOL = jnp.asarray(1e-8), jnp.asarray(1e-10)


def decay(t: Any, y: Any, args: Any) -> Any:
    """Rates from 0.2 to 12."""
    return -jnp.linspace(0.2, 12.0, y.size) * y


def ends(solver: Any, y0: Any, t1: float, state: Any) -> tuple[Any, Any]:
    """The end of one step, and the memory of the solver."""
    terms, times = diffrax.ODETerm(decay), (jnp.asarray(0.0), jnp.asarray(t1))
    y1, _, _, memory, _ = solver.step(terms, *times, y0, None, state, False)
    return np.asarray(y1), memory


def test_takes_the_stable_method_where_its_error_is_a_tenth_of_the_tolerance():
    small = 1e-6 * jnp.exp(-jnp.linspace(0.2, 12.0, SMALL))
    end, memory = ends(Switching(RTOL, ATOL), small, 0.2, jnp.array(0))
    np.testing.assert_allclose(end, ends(Stabilized5(), small, 0.2, None)[0], rtol=1e-12)
    assert memory == 0


def test_takes_the_accurate_method_elsewhere_and_waits_before_it_tries_again():
    large = jnp.ones(SMALL)
    end, memory = ends(Switching(RTOL, ATOL), large, 0.2, jnp.array(0))
    expected = ends(DormandPrince853(), large, 0.2, None)[0]
    np.testing.assert_allclose(end, expected, rtol=1e-12)
    assert memory == PAUSE
    small = 1e-6 * jnp.exp(-jnp.linspace(0.2, 12.0, SMALL))
    end, memory = ends(Switching(RTOL, ATOL), small, 0.2, jnp.array(2))
    np.testing.assert_allclose(end, ends(DormandPrince853(), small, 0.2, None)[0], rtol=1e-12)
    assert memory == 1


def test_a_small_state_takes_the_accurate_method():
    small = 1e-6 * jnp.ones(SMALL - 1)
    end, memory = ends(Switching(RTOL, ATOL), small, 0.2, jnp.array(0))
    np.testing.assert_array_equal(end, ends(DormandPrince853(), small, 0.2, None)[0])
    assert memory == 0


WIDTH, TIMES = 20, np.linspace(0.0, 36.0, 31)
TARGET = np.diag(np.linspace(0.2, 2.0, WIDTH))
"""The largest curvature at the end is 7.6, which makes 9 of a step between two saved times."""


def start() -> list[np.ndarray]:
    """Depth 3, near 0.8 times the identity; more weights than `SMALL`."""
    rng = np.random.default_rng(0)
    return [0.8 * np.eye(WIDTH) + 0.02 * rng.normal(size=(WIDTH, WIDTH)) for _ in range(3)]


def solved(solver: diffrax.AbstractSolver | None) -> tuple[list[np.ndarray], int]:
    """The weights at `TIMES`, and how many gradients they took."""
    calls: list[int] = []

    class Counted(gf.GradientFlow):
        def field(self, t: Any, state: Any, problem: gf.Problem) -> Any:
            jax.debug.callback(lambda: calls.append(1))
            return gf.GradientFlow.field(self, t, state, problem)

    flow, problem = Counted(solver=solver), gf.Problem(gf.Regression.whitened(TARGET))
    layers = jax.jit(lambda net: flow.solve(problem, net, TIMES))(gf.DeepLinear(start()))
    jax.effects_barrier()
    return [np.asarray(w) for w in layers], len(calls)


@pytest.mark.slow
def test_takes_fewer_gradients_where_a_stable_step_reaches_the_next_saved_time():
    (_, few), (_, many) = solved(None), solved(DormandPrince853())
    assert few < 0.95 * many


@pytest.mark.slow
def test_saved_points_conserve_and_have_the_loss_of_a_tight_solve():
    (w1, w2, w3), _ = solved(None)
    for below, above in ((w1, w2), (w2, w3)):
        g = above.mT @ above - below @ below.mT
        np.testing.assert_allclose(g, np.broadcast_to(g[0], g.shape), rtol=0.0, atol=2e-10)
    loss = 0.5 * np.sum((w3 @ w2 @ w1 - TARGET) ** 2, axis=(1, 2))
    np.testing.assert_allclose(loss, tight_loss(), rtol=0.0, atol=1e-9)


def tight_loss() -> np.ndarray:
    """SciPy's DOP853 at a tolerance of 1e-13, with gradients written out."""

    def layers(y: np.ndarray) -> np.ndarray:
        return y.reshape(3, WIDTH, WIDTH)

    def field(t: float, y: np.ndarray) -> np.ndarray:
        a, b, c = layers(y)
        m = TARGET - c @ b @ a
        return np.stack([(c @ b).T @ m, c.T @ m @ a.T, m @ (b @ a).T]).ravel()

    solution = solve_ivp(
        field,
        (0.0, TIMES[-1]),
        np.stack(start()).ravel(),
        method="DOP853",
        t_eval=TIMES,
        rtol=1e-13,
        atol=1e-14,
    )
    products = (c @ b @ a for a, b, c in map(layers, solution.y.T))
    return np.array([0.5 * np.sum((p - TARGET) ** 2) for p in products])
