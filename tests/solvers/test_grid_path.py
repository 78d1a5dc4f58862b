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


def test_has_no_values_at_a_single_time():
    with pytest.raises(ValueError, match="increments over grid steps"):
        path().evaluate(2.0)


def test_gives_levy_areas_of_a_unit_step():
    """H has variance 1/12 and K 1/720 over a unit step, independent of the increment."""
    normals = [jnp.asarray(k * INCREMENTS) for k in (1.0, 2.0, 3.0)]
    kinds = diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea
    for count, kind in enumerate(kinds):
        made = GridBrownianPath((normals[0],), tuple((n,) for n in normals[1 : 1 + count]))
        assert made.levy_area is kind
        increment = made.evaluate(2.0, 3.0, use_levy=True)
        assert isinstance(increment, kind)
        assert increment.dt == (1.0,)
        np.testing.assert_array_equal(increment.W[0], INCREMENTS[2])
        if count > 0:
            np.testing.assert_allclose(increment.H[0] * np.sqrt(12), 2.0 * INCREMENTS[2])
        if count > 1:
            np.testing.assert_allclose(increment.K[0] * np.sqrt(720), 3.0 * INCREMENTS[2])
    with pytest.raises(ValueError, match=r"GridBrownianPath.areas must hold at most 2; got 3"):
        GridBrownianPath(normals[0], (normals[0],) * 3)


@pytest.mark.slow
def test_the_areas_are_those_that_solvers_expect():
    """dX = -X dt + dB in one step of length 1/20, with the area of a finely resolved path.

    H = (1/dt) int (B - (t/dt) W) dt is what the step needs to see the path between its ends: with
    it the error is far below that without.
    """
    length, fine, paths = 0.05, 400, 300
    steps = np.random.default_rng(1).normal(size=(fine, paths)) / np.sqrt(fine)  # a unit step
    values = np.concatenate([np.zeros((1, paths)), np.cumsum(steps, axis=0)])
    share = np.linspace(0.0, 1.0, fine + 1)[:, None]
    bridge = values - share * values[-1]
    area = np.sum(0.5 * (bridge[1:] + bridge[:-1]), axis=0) / fine
    middle = (share[1:, 0] - 0.5 / fine)[:, None]
    exact = np.sqrt(length) * np.sum(np.exp(-length * (1.0 - middle)) * steps, axis=0)
    drift = diffrax.ODETerm(lambda t, x, args: -length * x)
    errors = []
    for h in (area, np.zeros(paths)):
        driver = GridBrownianPath(
            jnp.asarray(values[-1][None]), (jnp.asarray(np.sqrt(12) * h)[None],)
        )
        scale = lineax.DiagonalLinearOperator(jnp.full(paths, np.sqrt(length)))
        noise = diffrax.ControlTerm(lambda t, x, args, scale=scale: scale, driver)
        terms = diffrax.MultiTerm(drift, noise)
        solution = diffrax.diffeqsolve(terms, diffrax.SEA(), 0.0, 1.0, 1.0, jnp.zeros(paths))
        assert solution.ys is not None
        errors.append(np.sqrt(np.mean((np.asarray(solution.ys[-1]) - exact) ** 2)))
    assert errors[0] < 0.1 * errors[1]


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
