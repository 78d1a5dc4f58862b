"""The stabilised method of order 5: its order, its stability, and its estimate of the error."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.solvers import Stabilized5
from gradflow.solvers.stabilized import LONGEST


def step(rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of length 1 of y' = rate y from 1, and its estimated error."""
    terms = diffrax.ODETerm(lambda t, y, args: jnp.asarray(rate) * y)
    y0, t0, t1 = jnp.ones(rate.shape), jnp.asarray(0.0), jnp.asarray(1.0)
    y1, error, *_ = Stabilized5().step(terms, t0, t1, y0, None, None, False)
    return np.asarray(y1), np.asarray(error)


@pytest.mark.slow
def test_converges_with_order_5_on_a_nonlinear_equation_that_depends_on_time():
    def field(t: jax.Array, y: jax.Array, args: None) -> jax.Array:
        return jnp.stack([y[1], -jnp.sin(y[0]) * (1.0 + 0.3 * t)])

    term, start = diffrax.ODETerm(field), jnp.array([1.2, 0.4])

    def end(solver: diffrax.AbstractSolver, steps: int) -> np.ndarray:
        solution = diffrax.diffeqsolve(term, solver, 0.0, 2.0, 2.0 / steps, start)
        assert solution.ys is not None
        return np.asarray(solution.ys[0])

    exact = end(diffrax.Dopri8(), 400)
    coarse, fine = (np.linalg.norm(end(Stabilized5(), n) - exact) for n in (16, 32))
    assert fine > 1e-12
    assert 4.6 < np.log2(coarse / fine) < 5.8


def test_the_estimate_is_of_order_4():
    _, error = step(np.array([-0.2, -0.1]))
    assert 4.5 < np.log2(error[0] / error[1]) < 5.5
    assert abs(error[0]) > abs(np.exp(-0.2) - step(np.array([-0.2]))[0][0])


def test_modes_decay_up_to_the_longest_step_and_grow_beyond():
    rates = -np.linspace(0.0, LONGEST, 2001)[1:]
    end, error = step(rates)
    assert np.max(np.abs(end)) < 1.0
    assert np.max(np.abs(end[rates < -2.0])) < 0.91
    assert np.max(np.abs(error)) < 1.4
    assert abs(step(np.array([-1.05 * LONGEST]))[0][0]) > 1.0
