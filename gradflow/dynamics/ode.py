"""Adaptive integration of an ordinary differential equation for every path of an ensemble."""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, ArrayLike, Float

from gradflow.dynamics.base import over_paths
from gradflow.problem import Problem
from gradflow.regularizers.base import as_parameter
from gradflow.solvers.gauss_legendre import GaussLegendre
from gradflow.solvers.resumable import ResumableController
from gradflow.types import Scalar

MAX_STEPS = 1_000_000
"""Solver steps between two saved times before the solve is given up."""

VectorField: TypeAlias = Callable[[Any, Any, Problem], Any]
"""The time derivative of the state of one path, a function of (t, state, problem)."""


def checked_tolerances(owner: str, rtol: ArrayLike, atol: ArrayLike) -> tuple[Scalar, Scalar]:
    """Relative and absolute tolerance as arrays.

    **Raises:** `ValueError` naming the field of `owner` that does not lie in (0, 1).
    """
    tolerances = as_parameter(rtol), as_parameter(atol)
    for name, value in zip(("rtol", "atol"), tolerances, strict=True):
        if not 0.0 < float(value) < 1.0:
            raise ValueError(f"{owner}.{name} must lie in (0, 1); got {float(value)}.")
    return tolerances


def chosen_solver(
    owner: str,
    solver: diffrax.AbstractSolver | None,
    stiff: bool,
    conservative: bool = False,
) -> diffrax.AbstractAdaptiveSolver:
    """The solver asked for, or the explicit, implicit or conservative default.

    **Raises:** `ValueError` if more than one of a solver, `stiff` and `conservative` is given,
    `TypeError` for a solver without an error estimate.
    """
    if conservative and (stiff or solver is not None):
        other = "stiff=True" if solver is None else f"solver={type(solver).__name__}"
        raise ValueError(
            f"{owner}.conservative=True chooses the solver GaussLegendre(order=6), but {other} was "
            "given; set only one of the two."
        )
    if solver is not None and stiff:
        raise ValueError(
            f"{owner}.stiff=True chooses the implicit default solver, but solver="
            f"{type(solver).__name__} was given; set only one of the two."
        )
    if solver is None:
        implicit = diffrax.Kvaerno5() if stiff else diffrax.Dopri8()
        solver = GaussLegendre(order=6) if conservative else implicit
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise TypeError(
            f"{owner}.solver must be a diffrax solver with an error estimate, such as "
            f"diffrax.Tsit5(); got {type(solver).__name__}."
        )
    return cast(diffrax.AbstractAdaptiveSolver, _with_newton(solver))


def integrate(
    field: VectorField,
    solver: diffrax.AbstractSolver,
    rtol: Scalar,
    atol: Scalar,
    problem: Problem,
    states: Any,
    first_steps: Float[Array, " paths"],
    start: Array,
    stop: Array,
) -> tuple[Any, Float[Array, " paths"]]:
    """Integrate every path from flow time `start` to `stop`, each with its own steps.

    **Arguments:**

    - `states`: a pytree of arrays that end in the path axis.
    - `first_steps`: length of the first step of every path; 0 lets the solver choose.

    **Returns:** the states at `stop`, NaN for a path whose solve failed, and the lengths of the
    steps that would come next.
    """

    def solve(state: Any, first_step: Scalar) -> tuple[Any, Scalar]:
        controller = ResumableController(diffrax.PIDController(rtol=rtol, atol=atol), first_step)
        solution = diffrax.diffeqsolve(
            _terms(solver, field),
            solver,
            t0=start,
            t1=stop,
            dt0=None,
            y0=state,
            args=problem,
            saveat=diffrax.SaveAt(t1=True, controller_state=True),
            stepsize_controller=controller,
            max_steps=MAX_STEPS,
            throw=False,
        )
        _, planned = cast(tuple[Any, Scalar], solution.controller_state)
        good = solution.result == diffrax.RESULTS.successful
        return jax.tree.map(lambda y: jnp.where(good, y[0], jnp.nan), solution.ys), planned

    if first_steps.shape[0] == 1:
        # A batch of one would still copy the state of every loop at each of its rounds.
        ended, planned = solve(jax.tree.map(lambda y: y[..., 0], states), first_steps[0])
        return jax.tree.map(lambda y: y[..., None], ended), planned[None]
    return over_paths(solve)(states, first_steps)


def _with_newton(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    """An implicit solver with Newton to near rounding instead of diffrax's looser iteration.

    With that one the step control sees the error of the iteration: it rejects half the steps of
    Kvaerno5, and KenCarp4 never arrives.
    """
    if not isinstance(solver, diffrax.AbstractImplicitSolver):
        return solver
    if not eqx.tree_equal(solver.root_finder, type(solver)().root_finder):
        return solver
    newton = optimistix.Newton(rtol=1e-10, atol=1e-10)
    return eqx.tree_at(lambda s: s.root_finder, solver, newton)


def _terms(solver: diffrax.AbstractSolver, field: VectorField) -> diffrax.AbstractTerm:
    """The vector field as the solver takes it; an implicit-explicit one treats it as stiff."""
    term = diffrax.ODETerm(field)
    if isinstance(getattr(solver, "tableau", None), diffrax.MultiButcherTableau):
        return diffrax.MultiTerm(diffrax.ODETerm(_standstill), term)
    return term


def _standstill(t: Any, state: Any, problem: Problem) -> Any:
    del t, problem
    return jax.tree.map(jnp.zeros_like, state)
