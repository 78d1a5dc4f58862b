"""Brownian increments on a grid, as diffrax sees them."""

import diffrax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

from gradflow.solvers import GridBrownianPath

INCREMENTS = np.random.default_rng(0).normal(size=(6, 2, 3))  # (step, channel, path)


def path() -> GridBrownianPath:
    return GridBrownianPath((jnp.asarray(INCREMENTS), jnp.asarray(2.0 * INCREMENTS)))


def test_gives_the_increment_of_every_step():
    for step in range(6):
        first, second = path().evaluate(step, step + 1)
        np.testing.assert_array_equal(first, INCREMENTS[step])
        np.testing.assert_array_equal(second, 2.0 * INCREMENTS[step])


def test_times_are_grid_steps_even_when_they_carry_rounding():
    for step in (1.0 - 1e-9, 1.0 + 1e-9):
        np.testing.assert_array_equal(path().evaluate(step, step + 1.0)[0], INCREMENTS[1])
    assert path().t0 == 0.0
    assert path().t1 == 6.0


def test_has_no_values_and_no_levy_area():
    with pytest.raises(ValueError, match="increments over grid steps"):
        path().evaluate(2.0)
    with pytest.raises(ValueError, match="no Levy area"):
        path().evaluate(2.0, 3.0, use_levy=True)


def test_drives_an_ito_equation():
    """dX = -X/2 dt + X dB with Euler-Maruyama on the grid, against the loop."""
    noise = INCREMENTS[:, 0]
    drift = diffrax.ODETerm(lambda t, x, args: -0.5 * x)
    diffusion = diffrax.ControlTerm(
        lambda t, x, args: lineax.DiagonalLinearOperator(x), GridBrownianPath(jnp.asarray(noise))
    )
    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(drift, diffusion), diffrax.Euler(), 0.0, 6.0, 1.0, jnp.ones(3)
    )
    x = np.ones(3)
    for step in range(6):
        x = x - 0.5 * x + x * noise[step]
    assert solution.ys is not None
    np.testing.assert_allclose(solution.ys[-1], x, rtol=1e-12)
