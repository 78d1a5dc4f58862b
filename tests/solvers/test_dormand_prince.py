"""Dormand and Prince's method of order 8 against SciPy's."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from scipy.integrate import DOP853
from scipy.integrate._ivp.rk import rk_step

from gradflow.solvers import DormandPrince853
from gradflow.solvers.dormand_prince import TOGETHER


def pendulum(t: Any, y: Any, args: Any) -> Any:
    """Two coupled equations that depend on time, as a pytree."""
    angle, speed = y
    return speed, -jnp.sin(angle) * (1.0 + 0.3 * t)


def flat_pendulum(t: float, y: np.ndarray) -> np.ndarray:
    angle, speed = np.split(y, 2)
    return np.concatenate([speed, -np.sin(angle) * (1.0 + 0.3 * t)])


def step(start: tuple[Array, Array], t0: float, t1: float) -> Any:
    times = jnp.asarray(t0), jnp.asarray(t1)
    terms = diffrax.ODETerm(pendulum)
    return DormandPrince853().step(terms, *times, start, None, None, False)


def test_a_step_and_its_error_are_those_of_scipy():
    rng, size = np.random.default_rng(0), 3
    start = jnp.asarray(rng.normal(size=size)), jnp.asarray(rng.normal(size=size))
    t0, h = 0.7, 1.0
    y1, error = jax.jit(lambda y: step(y, t0, t0 + h)[:2])(start)
    y0 = np.concatenate(start)
    stages = np.empty((DOP853.n_stages + 1, y0.size))
    expected, _ = rk_step(
        flat_pendulum, t0, y0, flat_pendulum(t0, y0), h, DOP853.A, DOP853.B, DOP853.C, stages
    )
    np.testing.assert_allclose(np.concatenate(y1), expected, rtol=0.0, atol=1e-14)
    fifth, third = DOP853.E5 @ stages, DOP853.E3 @ stages
    estimate = h * fifth**2 / np.sqrt(fifth**2 + TOGETHER * third**2)
    np.testing.assert_allclose(np.concatenate(error), estimate, rtol=1e-9, atol=1e-14)
    assert np.max(np.abs(estimate)) > 1e-7


@pytest.mark.slow
def test_converges_with_order_8():
    start, term = (jnp.array([1.2]), jnp.array([0.4])), diffrax.ODETerm(pendulum)

    def end(solver: diffrax.AbstractSolver, steps: int) -> float:
        solution = diffrax.diffeqsolve(term, solver, 0.0, 2.0, 2.0 / steps, start)
        assert solution.ys is not None
        return float(solution.ys[0][0, 0])

    exact = end(diffrax.Dopri8(), 400)
    coarse, fine = (abs(end(DormandPrince853(), steps) - exact) for steps in (6, 12))
    assert fine > 1e-13
    assert 7.0 < np.log2(coarse / fine) < 9.0


def test_a_solve_that_stands_still_has_no_error():
    term = diffrax.ODETerm(lambda t, y, args: 0.0 * y)
    y1, error, *_ = DormandPrince853().step(
        term, jnp.asarray(0.0), jnp.asarray(1.0), jnp.ones(3), None, None, False
    )
    np.testing.assert_array_equal(y1, np.ones(3))
    np.testing.assert_array_equal(error, np.zeros(3))


def test_interpolates_between_steps():
    times = jnp.linspace(0.0, 2.0, 9)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y),
        DormandPrince853(),
        0.0,
        2.0,
        0.1,
        jnp.ones(1),
        saveat=diffrax.SaveAt(ts=times),
    )
    assert solution.ys is not None
    np.testing.assert_allclose(solution.ys[:, 0], np.exp(-times), rtol=0.0, atol=1e-6)
