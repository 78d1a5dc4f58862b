"""The small-noise solver against exact moments of linear equations."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from scipy.linalg import expm

from gradflow.solvers import GridBrownianPath, SmallNoise

DRIFT = np.array([[-0.7, 1.1], [-0.4, 0.3]])
CHANNELS = np.array([[[0.5, -0.8], [0.2, 0.9]], [[-0.3, 0.4], [1.0, 0.6]]])  # do not commute
START = np.array([1.0, -0.6])


def one_step(solver: diffrax.AbstractSolver, dt: float, level: float) -> np.ndarray:
    """X after one step of dX = A X dt + level sum_c B_c X dB_c, for all Gauss-Hermite nodes."""
    nodes, _ = reference.gauss_hermite(2, 4)
    drift = diffrax.ODETerm(lambda t, x, args: dt * jnp.asarray(DRIFT) @ x)

    def columns(t: float, x: jax.Array, args: None) -> jax.Array:
        return level * np.sqrt(dt) * jnp.einsum("cij,j->ic", jnp.asarray(CHANNELS), x)

    def solve(increment: jax.Array) -> jax.Array:
        noise = diffrax.ControlTerm(columns, GridBrownianPath(increment[None]))
        terms = diffrax.MultiTerm(drift, noise)
        solution = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 1.0, jnp.asarray(START))
        assert solution.ys is not None
        return solution.ys[-1]

    return np.asarray(jax.vmap(solve)(jnp.asarray(nodes)))


def second_moment_error(solver: diffrax.AbstractSolver, dt: float, level: float) -> float:
    """E X X^T after one step against its closed equation, which is linear."""
    ends = one_step(solver, dt, level)
    _, weights = reference.gauss_hermite(2, 4)
    found = np.einsum("q,qi,qj->ij", weights, ends, ends)
    eye = np.eye(2)
    generator = np.kron(DRIFT, eye) + np.kron(eye, DRIFT)
    generator = generator + level**2 * sum(np.kron(b, b) for b in CHANNELS)
    exact = (expm(generator * dt) @ np.outer(START, START).ravel()).reshape(2, 2)
    return float(np.max(np.abs(found - exact)))


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order"), [(SmallNoise(), 3), (diffrax.Euler(), 2)])
def test_moments_of_a_step_with_noise_of_the_size_of_its_root(
    solver: diffrax.AbstractSolver, order: int
):
    """Noise level h^(1/2), dt = h/2: a step is wrong by O(h^3), one of Euler-Maruyama by O(h^2)."""
    steps = np.array([0.004, 0.002, 0.001])
    errors = [second_moment_error(solver, h / 2, np.sqrt(h)) for h in steps]
    assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.1)


@pytest.mark.slow
def test_what_is_left_grows_with_the_fourth_power_of_the_noise():
    dt = 1e-3
    levels = np.array([1.0, 1.3, 1.6])
    errors = [second_moment_error(SmallNoise(), dt, level) for level in levels]
    assert np.polyfit(np.log(levels), np.log(errors), 1)[0] == pytest.approx(4.0, abs=0.1)
