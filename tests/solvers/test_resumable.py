"""A chain of solves that remembers its step length, and a solve that knows when to give up."""

import itertools

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from gradflow.solvers import ResumableController


def controller(first_step: float = 0.0) -> ResumableController:
    pid = diffrax.PIDController(rtol=1e-8, atol=1e-10)
    return ResumableController(pid, jnp.asarray(first_step))


def oscillator(t: Array, y: Array, args: None) -> Array:
    return jnp.stack([y[1], -y[0]])


@eqx.filter_jit
def solve(y: Array, start: Array, stop: Array, first_step: Array) -> tuple[Array, Array, Array]:
    """The end, the planned next step, and the number of steps."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(oscillator),
        diffrax.Tsit5(),
        start,
        stop,
        None,
        y,
        stepsize_controller=ResumableController(
            diffrax.PIDController(rtol=1e-8, atol=1e-10), first_step
        ),
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        throw=False,
    )
    assert solution.ys is not None
    assert solution.controller_state is not None
    return solution.ys[0], solution.controller_state[1], solution.stats["num_steps"]


@pytest.mark.slow
def test_a_chain_of_solves_costs_what_one_solve_does():
    whole, _, steps = solve(jnp.array([1.0, 0.0]), *map(jnp.asarray, (0.0, 20.0, 0.0)))
    links, y, planned, total = 40, jnp.array([1.0, 0.0]), jnp.asarray(0.0), 0
    times = np.linspace(0.0, 20.0, links + 1)
    for start, stop in itertools.pairwise(times):
        y, planned, count = solve(y, jnp.asarray(start), jnp.asarray(stop), planned)
        total += int(count)
    np.testing.assert_allclose(y, [np.cos(20.0), -np.sin(20.0)], atol=1e-6)
    np.testing.assert_allclose(whole, y, atol=1e-6)
    assert int(steps) > 3 * links
    assert total <= int(steps) + links  # one cut step a link, and no slow starts


@pytest.mark.slow
def test_a_step_cut_short_does_not_shrink_the_next_one():
    """The last step of a link is as long as what was left, the next link starts as planned."""
    _, planned, _ = solve(jnp.array([1.0, 0.0]), *map(jnp.asarray, (0.0, 5.0, 0.0)))
    _, after, count = solve(jnp.array([1.0, 0.0]), *map(jnp.asarray, (5.0, 5.001, planned)))
    assert int(count) == 1
    assert float(planned) > 0.02
    assert float(after) >= float(planned)


def test_the_first_step_is_the_one_given():
    end, (_, planned) = controller(0.125).init(
        diffrax.ODETerm(oscillator), 1.0, 2.0, jnp.ones(2), None, None, Wanted.func, 5
    )
    assert float(end) == 1.125
    assert float(planned) == 0.125


class Wanted:
    """What diffrax passes to a controller to evaluate the vector field."""

    @staticmethod
    def func(terms: diffrax.ODETerm, t: Array, y: Array, args: None) -> Array:
        return terms.vf(t, y, args)


def explosion(power: int, stop: float) -> diffrax.Solution:
    """y' = y^p from 1, which leaves the floating-point numbers at t = 1/(p - 1)."""
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: y**power),
        diffrax.Tsit5(),
        0.0,
        stop,
        None,
        jnp.asarray(1.0),
        stepsize_controller=controller(0.4),
        max_steps=2000,
        throw=False,
    )


def test_gives_up_at_a_singularity():
    solution = explosion(2, 2.0)
    assert solution.result == diffrax.RESULTS.dt_min_reached
    assert int(solution.stats["num_steps"]) < 1500


def test_a_step_that_overflows_is_tried_again():
    """The first trial step of 0.4 overflows in y^300, whose solution lives until 1/299."""
    solution = explosion(300, 1e-3)
    assert solution.result == diffrax.RESULTS.successful
    assert solution.ys is not None
    exact = (1.0 - 299 * 1e-3) ** (-1.0 / 299)
    np.testing.assert_allclose(solution.ys[-1], exact, rtol=1e-6)


def test_nan_ends_a_solve_at_once():
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: y),
        diffrax.Tsit5(),
        0.0,
        1.0,
        None,
        jnp.asarray(jnp.nan),
        stepsize_controller=controller(),
        max_steps=2000,
        throw=False,
    )
    assert solution.result == diffrax.RESULTS.dt_min_reached
    assert int(solution.stats["num_steps"]) < 400  # tenths of a step down to the smallest number


@pytest.mark.parametrize("name", ["rtol", "atol", "norm"])
def test_shows_the_tolerances_of_the_controller_inside(name: str):
    assert getattr(controller(), name) == getattr(controller().controller, name)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("origin", "most"), [(1.0, 30), (1e-100, 250)])
def test_gives_up_where_rounding_would_hide_a_step(origin: float, most: int):
    """In a field without numbers steps shrink fivefold down to 256 roundings of the time."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.full_like(y, jnp.nan)),
        diffrax.Tsit5(),
        0.0,
        1.0,
        None,
        jnp.ones(1),
        stepsize_controller=ResumableController(
            diffrax.PIDController(rtol=1e-8, atol=1e-10), jnp.asarray(1.0), origin
        ),
        throw=False,
    )
    assert solution.result == diffrax.RESULTS.dt_min_reached
    assert int(solution.stats["num_steps"]) < most
