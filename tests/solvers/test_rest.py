"""Solves that end where nothing moves, and errors that are relative where numbers are small."""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from gradflow.solvers import DormandPrince853, RelativeErrors, RestController
from gradflow.solvers.rest import PATIENCE, RestMemory, is_at_rest

LIMIT = jnp.array([np.pi, np.e])
PULL = jnp.array([[50.0, 1.0], [1.0, 2.0]])


@eqx.filter_jit
def solve(field, start: Array, stop: float, smallest: float = np.inf) -> tuple[Array, Array, Array]:
    """The end, the number of still steps, and the number of steps."""
    pid = diffrax.PIDController(rtol=1e-8, atol=1e-10, pcoeff=0.2, icoeff=0.4)
    memory = RestMemory(jnp.array(0), jnp.array(0), jnp.array(jnp.inf))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        DormandPrince853(),
        0.0,
        stop,
        None,
        start,
        stepsize_controller=RestController(RelativeErrors(pid, jnp.asarray(smallest)), memory),
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        max_steps=100_000,
        throw=False,
    )
    assert solution.ys is not None
    assert solution.controller_state is not None
    return solution.ys[0], solution.controller_state[1].still, solution.stats["num_steps"]


def decay(t: Array, y: Array, args: None) -> Array:
    return -PULL @ (y - LIMIT)


def test_rest_at_the_edge_of_stability_is_found():
    """A field that is never exactly 0, so that steps at the edge tremble by the tolerance."""

    def field(t: Array, y: Array, args: None) -> Array:
        return -PULL @ (jnp.exp(y) - jnp.array([2.3, 0.7])) + 1e-14 * jnp.cos(t)

    end, still, steps = solve(field, jnp.array([1.0, -1.0]), 1e9)
    assert is_at_rest(still)
    assert PATIENCE < int(steps) < 10 * PATIENCE
    np.testing.assert_allclose(end, np.log([2.3, 0.7]), rtol=1e-12)


def test_a_short_solve_does_not_rest():
    """At t = 1 the slow component is still on its way: exact by the eigenvectors."""
    start = jnp.array([1.0, -1.0])
    end, still, _ = solve(decay, start, 1.0)
    assert not is_at_rest(still)
    values, vectors = np.linalg.eigh(np.asarray(PULL))
    offset = vectors @ (np.exp(-values) * (vectors.T @ np.asarray(start - LIMIT)))
    np.testing.assert_allclose(end, np.asarray(LIMIT) + offset, rtol=1e-7)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("drift", [1e-3, 1e-6])
def test_a_drift_is_no_rest(drift: float):
    """A component that moves at a constant speed beside a stiff one is followed to the end."""

    def field(t: Array, y: Array, args: None) -> Array:
        return jnp.stack([-50.0 * (y[0] - jnp.cos(y[1])), drift + 0.0 * y[1]])

    end, still, _ = solve(field, jnp.array([0.0, 0.0]), 2000.0)
    assert not is_at_rest(still)
    np.testing.assert_allclose(end[1], 2000.0 * drift, rtol=1e-8)


@pytest.mark.parametrize("start", [1e-12, 1e-30])
def test_growth_from_below_the_tolerance(start: float):
    """y' = y (1 - y): y = a e^t / (1 - a + a e^t), half way at ln(1/a - 1)."""
    half = float(np.log(1.0 / start - 1.0))
    end, *_ = solve(lambda t, y, args: y * (1.0 - y), jnp.array([start]), half, start)
    np.testing.assert_allclose(end, 0.5, rtol=1e-6)


def test_growth_beside_a_large_number():
    """The same about 0 in a state whose other component is 1, which says nothing of its size."""
    half = float(np.log(1e8 - 1.0))

    def field(t: Array, y: Array, args: None) -> Array:
        return jnp.stack([y[0] * (1.0 - y[0]), 0.0 * y[1]])

    end, *_ = solve(field, jnp.array([1e-8, 1.0]), half)
    np.testing.assert_allclose(end[0], 0.5, rtol=1e-5)
