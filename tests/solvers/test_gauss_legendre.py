"""Gauss-Legendre collocation: orders, invariants, stiffness, and steps that fail."""

import functools
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training
from compiled import compiled
from scipy.integrate import solve_ivp

from gradflow.loss import pull_back
from gradflow.network import end_to_end
from gradflow.solvers import GaussLegendre
from gradflow.solvers.collocation import gauss
from gradflow.solvers.krylov import solve_linear

ORDERS = [2, 4, 6]
INERTIA = np.array([1.0, 2.0, 4.0])
TOP = np.array([1.0, 0.3, -0.7])
SHAPES = [(2, 3, 2), (3, 2, 2, 1), (2, 3, 1, 3, 2)]


class Solved(NamedTuple):
    """The end of a solve and how it went."""

    end: Any
    steps: Any
    rejected: Any
    result: Any


def run_solve(
    field: Callable, order: int, y0: Any, args: Any, stop: Any, step: Any, tolerance: Any = None
) -> Solved:
    """Constant steps, or adaptive ones that begin with `step`."""
    controller = diffrax.ConstantStepSize()
    if tolerance is not None:
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        GaussLegendre(order),
        0.0,
        stop,
        step,
        y0,
        args,
        stepsize_controller=controller,
        max_steps=100_000,
        throw=False,
    )
    stats = solution.stats
    end = jax.tree.map(lambda leaf: leaf[0], solution.ys)
    return Solved(end, stats["num_steps"], stats["num_rejected_steps"], solution.result)


solve: Any = compiled(run_solve)


def rigid_body(t: Any, y: Any, args: Any) -> Any:
    """Euler's equations; |y|^2 and sum y_i^2 / I_i are kept."""
    return jnp.cross(y, y / args)


def oscillator(t: Any, y: Any, args: Any) -> Any:
    return {"q": y["p"], "p": -y["q"]}


def linear(t: Any, y: Any, matrix: Any) -> Any:
    return matrix @ y


def square(t: Any, y: Any, args: Any) -> Any:
    return y * y


def descent(t: Any, weights: Any, moments: Any) -> Any:
    sxx, syx = moments
    m = end_to_end(weights) @ sxx - syx
    return tuple(-g for g in pull_back(weights, m))


@functools.cache
def regression(widths: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """A network, and moments with a general covariance."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20, widths[0])) @ rng.normal(size=(widths[0],) * 2)
    y = rng.normal(size=(20, widths[-1])) + x[:, :1]
    layers = [0.7 * rng.normal(size=(a, b)) for b, a in itertools.pairwise(widths)]
    return layers, x.T @ x / 20, y.T @ x / 20


def descend(widths: tuple[int, ...], order: int, stop: Any, step: Any, tolerance: Any = None):
    layers, sxx, syx = regression(widths)
    weights = tuple(jnp.asarray(w) for w in layers)
    moments = (jnp.asarray(sxx), jnp.asarray(syx))
    return solve(descent, order, weights, moments, stop, step, tolerance)


def moved(widths: tuple[int, ...], end: Any) -> float:
    """The largest change of an entry of any G_i, in units of the largest squared weight."""
    start = regression(widths)[0]
    scale = max(np.max(np.abs(w)) ** 2 for w in [*start, *map(np.asarray, end)])
    pairs = zip(
        reference.balancedness(start), reference.balancedness(reference.as_numpy(end)), strict=True
    )
    return max(float(np.max(np.abs(b - a))) for a, b in pairs) / scale


@functools.cache
def spinning(stop: float) -> np.ndarray:
    options = {"method": "DOP853", "rtol": 1e-13, "atol": 1e-14}
    run = solve_ivp(lambda t, y: np.cross(y, y / INERTIA), (0.0, stop), TOP, **options)
    return run.y[:, -1]


def top_invariants(y: Any) -> np.ndarray:
    y = np.asarray(y)
    return np.array([np.sum(y**2), np.sum(y**2 / INERTIA)])


def stability(stages: int, z: np.ndarray) -> np.ndarray:
    """The diagonal Pade approximants of the exponential."""
    top = [(1.0, 0.5), (1.0, 0.5, 1.0 / 12.0), (1.0, 0.5, 0.1, 1.0 / 120.0)][stages - 1]
    return np.polyval(top[::-1], z) / np.polyval(top[::-1], -z)


# The coefficients


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_coefficients_keep_quadratic_invariants_exactly(stages: int):
    rule = gauss(stages)
    a = [[Fraction(x) for x in row] for row in rule.a]
    b = [Fraction(x) for x in rule.b]
    for i in range(stages):
        for j in range(stages):
            assert b[i] * a[i][j] + b[j] * a[j][i] == b[i] * b[j]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_coefficients_are_those_of_collocation(stages: int):
    nodes, weights = np.polynomial.legendre.leggauss(stages)
    rule = gauss(stages)
    np.testing.assert_allclose(rule.c, (nodes + 1.0) / 2.0, rtol=0.0, atol=1e-15)
    np.testing.assert_allclose(rule.b, weights / 2.0, rtol=0.0, atol=1e-15)
    for power in range(stages):
        integrals = rule.c ** (power + 1) / (power + 1)
        np.testing.assert_allclose(rule.a @ rule.c**power, integrals, rtol=0.0, atol=1e-15)


# The linear solver


def test_solves_linear_equations():
    rng = np.random.default_rng(0)
    matrix = np.eye(12) + 0.5 * rng.normal(size=(12, 12))
    right = rng.normal(size=12)
    answer = solve_linear(lambda x: jnp.asarray(matrix) @ x, jnp.asarray(right), 1e-14)
    np.testing.assert_allclose(answer, np.linalg.solve(matrix, right), rtol=0.0, atol=1e-12)


def test_linear_solver_stops_at_the_tolerance_and_at_no_right_hand_side():
    matrix = jnp.diag(jnp.linspace(1.0, 10.0, 20))
    right = jnp.ones(20)
    rest = right - matrix @ solve_linear(lambda x: matrix @ x, right, 0.1)
    assert 1e-4 < float(jnp.linalg.norm(rest) / jnp.linalg.norm(right)) <= 0.1
    assert not np.any(solve_linear(lambda x: matrix @ x, jnp.zeros(20), 1e-4))


# Orders


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_order(order: int):
    steps = {2: 0.02, 4: 0.2, 6: 0.5}[order] / np.array([1.0, 2.0])
    ends = [solve(rigid_body, order, TOP, INERTIA, 10.0, h).end for h in steps]
    errors = [np.max(np.abs(np.asarray(end) - spinning(10.0))) for end in ends]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.15
    assert 1e-12 < errors[1] < 1e-3
    for end in ends:
        np.testing.assert_allclose(top_invariants(end), top_invariants(TOP), rtol=0.0, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_error_follows_the_tolerance(order: int):
    tolerances = [1e-4, 1e-6] if order == 2 else [1e-5, 1e-8]
    errors = []
    for tolerance in tolerances:
        run = solve(rigid_body, order, TOP, INERTIA, 10.0, 0.1, tolerance)
        assert run.result == diffrax.RESULTS.successful
        errors.append(np.max(np.abs(np.asarray(run.end) - spinning(10.0))))
        np.testing.assert_allclose(
            top_invariants(run.end), top_invariants(TOP), rtol=0.0, atol=1e-14
        )
    # Order 2 adds up h^3 over 1/h steps: the error goes with the power 2/3 of the tolerance.
    assert errors[0] < {2: 300.0, 4: 30.0, 6: 30.0}[order] * tolerances[0]
    assert errors[1] < errors[0] * (tolerances[1] / tolerances[0]) ** 0.55


# Conservation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "order"),
    [(SHAPES[0], 2), (SHAPES[0], 4), (SHAPES[0], 6), (SHAPES[1], 6), (SHAPES[2], 6)],
)
def test_conserves_at_every_step_length(widths: tuple[int, ...], order: int):
    layers, sxx, syx = regression(widths)
    curvature = np.max(np.linalg.eigvalsh(reference.hessian(layers, sxx, syx)))
    for factor, steps in ((2.0, 50), (5.0, 20), (0.02, 4000)):
        step = factor / curvature
        run = descend(widths, order, steps * step, step)
        assert run.result == diffrax.RESULTS.successful
        assert moved(widths, run.end) < 3e-14
    start = reference.flatten(layers)
    assert np.max(np.abs(start - reference.flatten(reference.as_numpy(run.end)))) > 0.1


@pytest.mark.slow
def test_adaptive_steps_conserve_and_agree_with_scipy():
    widths = SHAPES[1]
    layers, sxx, syx = regression(widths)
    run = descend(widths, 6, 4.0, 0.01, 1e-9)
    (*_, expected) = zip(*training.flow(layers, sxx, syx, [0.0, 4.0]), strict=True)
    reference.assert_close(run.end, expected, 1.0, 1e-8)
    assert moved(widths, run.end) < 3e-14


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_invariant_of_an_oscillator_over_many_steps(order: int):
    y0 = {"q": jnp.array([1.0, 0.5]), "p": jnp.array([[0.0, 0.25]])[0]}
    run = solve(oscillator, order, y0, None, 2500.0, 0.5)
    assert int(run.steps) == 5000
    energy = np.asarray(run.end["q"]) ** 2 + np.asarray(run.end["p"]) ** 2
    np.testing.assert_allclose(energy, [1.0, 0.3125], rtol=0.0, atol=5e-13)
    if order == 6:  # 90,000 short steps: without compensated summation they add up to 5e-14
        run = solve(oscillator, order, y0, None, 4500.0, 0.05)
        energy = np.asarray(run.end["q"]) ** 2 + np.asarray(run.end["p"]) ** 2
        np.testing.assert_allclose(energy, [1.0, 0.3125], rtol=0.0, atol=1e-14)


# Stiffness


@pytest.mark.slow
@pytest.mark.parametrize("order", [2, 6])
def test_a_stiff_linear_equation_gets_the_stability_function(order: int):
    rates = np.array([-1e6, -300.0, -10.0, -0.5])
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    matrix = (q * rates) @ q.T
    run = solve(linear, order, jnp.asarray(q @ np.ones(4)), jnp.asarray(matrix), 20.0, 1.0)
    assert run.result == diffrax.RESULTS.successful
    np.testing.assert_allclose(
        q.T @ np.asarray(run.end), stability(order // 2, rates) ** 20, rtol=0.0, atol=1e-7
    )
    assert np.linalg.norm(run.end) <= 2.0


# Failure


@pytest.mark.slow
def test_a_constant_step_without_solution_ends_the_solve():
    # The stage of order 2 would solve Y = 1 + 5 Y^2, which has no real solution.
    run = solve(square, 2, jnp.array([1.0]), None, 10.0, 10.0)
    assert run.result == diffrax.RESULTS.nonlinear_divergence
    assert np.isnan(run.end[0])


@pytest.mark.slow
def test_an_adaptive_step_without_solution_is_tried_again_shorter():
    run = solve(square, 2, jnp.array([1.0]), None, 0.9, 0.9, 1e-7)
    assert run.result == diffrax.RESULTS.successful
    assert int(run.rejected) >= 1
    np.testing.assert_allclose(run.end, [10.0], rtol=1e-3)


@pytest.mark.slow
def test_throws_unless_asked_not_to():
    arguments = diffrax.ODETerm(square), GaussLegendre(2), 0.0, 10.0, 10.0, jnp.array([1.0])
    with pytest.raises(eqx.EquinoxRuntimeError):
        diffrax.diffeqsolve(*arguments)


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("order", [0, 3, 8])
def test_other_orders_are_refused(order: int):
    with pytest.raises(ValueError, match=f"must be 2, 4 or 6; got {order}"):
        GaussLegendre(order)


# The rest of diffrax


@pytest.mark.slow
def test_paths_of_a_vmap_do_not_disturb_each_other():
    starts = jnp.array([[1.0], [0.2], [-3.0]])
    run = jax.vmap(lambda y: solve(square, 2, y, None, 0.9, 0.9, 1e-7))(starts)
    alone = solve(square, 2, starts[1], None, 0.9, 0.9, 1e-7)
    np.testing.assert_allclose(run.end[:, 0], starts[:, 0] / (1 - 0.9 * starts[:, 0]), rtol=1e-3)
    np.testing.assert_allclose(run.end[1], alone.end, rtol=1e-13)


@pytest.mark.slow
def test_differentiates_both_ways():
    def end(rate: Any) -> Any:
        term = diffrax.ODETerm(lambda t, y, args: -args * y)
        options = {"adjoint": diffrax.DirectAdjoint(), "max_steps": 16}
        run = diffrax.diffeqsolve(
            term, GaussLegendre(6), 0.0, 1.0, 0.1, jnp.ones(1), rate, **options
        )
        assert run.ys is not None
        return run.ys[0, 0]

    expected = -np.exp(-2.0)
    np.testing.assert_allclose(jax.grad(end)(2.0), expected, rtol=1e-8)
    np.testing.assert_allclose(jax.jvp(end, (2.0,), (1.0,))[1], expected, rtol=1e-8)


@pytest.mark.slow
def test_backwards_in_time_dense_output_and_jumps():
    def field(t: Any, y: Any, args: Any) -> Any:
        return jnp.where(t > 0.7, 1.0, -1.0) * y

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        GaussLegendre(4),
        1.0,
        0.0,
        None,
        jnp.ones(1),
        saveat=diffrax.SaveAt(ts=[0.8, 0.35, 0.0]),
        stepsize_controller=diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=1e-8, atol=1e-8), jump_ts=[0.7]
        ),
    )
    assert solution.ys is not None
    expected = np.exp([-0.2, -0.3 + 0.35, -0.3 + 0.7])
    np.testing.assert_allclose(solution.ys[:, 0], expected, rtol=1e-6)
    assert int(solution.stats["num_steps"]) < 60
