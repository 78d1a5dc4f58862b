"""Gradient flow of the exact expected loss."""

from typing import Any, cast

import diffrax
import equinox as eqx
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, ArrayLike, UInt32

from gradflow.dynamics.base import AbstractDynamics, State, divergence_limit, over_paths
from gradflow.problem import Problem
from gradflow.regularizers.base import as_parameter
from gradflow.solvers.resumable import ResumableController
from gradflow.types import Scalar, Weights

MAX_STEPS = 1_000_000
"""Solver steps between two saved times before the solve is given up."""


class GradientFlow(AbstractDynamics):
    r"""The ODE $\dot W = -\nabla \bar L(W)$ with the averaged loss $\bar L$ of the problem.

    Integrated by diffrax with adaptive steps that land exactly on every saved time, so saved
    points are as accurate as the solution itself (interpolated ones conserve $G_i$ two to three
    digits worse).

    **Arguments:**

    - `rtol`, `atol`: relative and absolute tolerance of a step, > 0.
    - `solver`: any diffrax ODE solver with an error estimate; default `diffrax.Dopri8()`, or
        `diffrax.Kvaerno5()` with `stiff=True`. Implicit solvers iterate by Newton's method to near
        rounding unless they are given a root finder.
    - `stiff`: take the implicit default, for very unbalanced starts whose curvatures differ by
        many orders of magnitude.

    A path whose solve fails is reported as diverged.
    """

    rtol: Scalar
    atol: Scalar
    solver: diffrax.AbstractSolver
    stiff: bool = eqx.field(static=True)
    step_size: None

    def __init__(
        self,
        rtol: ArrayLike = 1e-8,
        atol: ArrayLike = 1e-10,
        solver: diffrax.AbstractSolver | None = None,
        stiff: bool = False,
    ):
        self.rtol = as_parameter(rtol)
        self.atol = as_parameter(atol)
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not 0.0 < float(value) < 1.0:
                raise ValueError(f"GradientFlow.{name} must lie in (0, 1); got {float(value)}.")
        if solver is not None and stiff:
            raise ValueError(
                "GradientFlow.stiff=True chooses the implicit default solver, but solver="
                f"{type(solver).__name__} was given; set only one of the two."
            )
        if solver is None:
            solver = diffrax.Kvaerno5() if stiff else diffrax.Dopri8()
        if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
            raise TypeError(
                "GradientFlow.solver must be a diffrax solver with an error estimate, such as "
                f"diffrax.Tsit5(); got {type(solver).__name__}."
            )
        self.solver = _with_newton(solver)
        self.stiff = stiff
        self.step_size = None

    @property
    def ticks_per_step(self) -> None:
        """None: its steps are adaptive."""
        return None

    def is_random(self, problem: Problem) -> bool:
        """False: the averaged loss is deterministic."""
        return False

    def check(self, problem: Problem, weights: Weights) -> None:
        """Nothing to check beforehand."""

    def init(self, problem: Problem, weights: Weights, block: int) -> State:
        """Start with a first step of the solver's choice."""
        paths = weights[0].shape[-1]
        return State(weights, jnp.zeros((paths,)), (), divergence_limit(weights))

    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """None are needed."""
        return ()

    def advance(
        self,
        problem: Problem,
        state: State,
        start: Array,
        stop: Array,
        key: UInt32[Array, "2"],
        paths: UInt32[Array, " paths"],
        block: int,
    ) -> State:
        """Integrate every path from flow time `start` to `stop`, each with its own steps."""

        def solve(weights: Weights, first_step: Scalar) -> tuple[Weights, Scalar]:
            controller = ResumableController(
                diffrax.PIDController(rtol=self.rtol, atol=self.atol), first_step
            )
            solution = diffrax.diffeqsolve(
                _terms(self.solver),
                self.solver,
                t0=start,
                t1=stop,
                dt0=None,
                y0=weights,
                args=problem,
                saveat=diffrax.SaveAt(t1=True, controller_state=True),
                stepsize_controller=controller,
                max_steps=MAX_STEPS,
                throw=False,
            )
            _, planned = cast(tuple[Any, Scalar], solution.controller_state)
            good = solution.result == diffrax.RESULTS.successful
            last = cast(Weights, solution.ys)
            return tuple(jnp.where(good, w[0], jnp.nan) for w in last), planned

        weights, planned = over_paths(solve)(state.weights, state.memory)
        return State(weights, planned, (), state.limit)


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


def _terms(solver: diffrax.AbstractSolver) -> diffrax.AbstractTerm:
    """The vector field as the solver takes it; an implicit-explicit one treats it as stiff."""
    term = diffrax.ODETerm(_descent_direction)
    if isinstance(getattr(solver, "tableau", None), diffrax.MultiButcherTableau):
        return diffrax.MultiTerm(diffrax.ODETerm(_standstill), term)
    return term


def _standstill(t: Any, weights: Weights, problem: Problem) -> Weights:
    del t, problem
    return tuple(jnp.zeros_like(w) for w in weights)


def _descent_direction(t: Any, weights: Weights, problem: Problem) -> Weights:
    del t
    return tuple(-g for g in problem.averaged_gradient(weights))
