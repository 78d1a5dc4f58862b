"""Gradient flow of the exact expected loss."""

from typing import Any

import diffrax
import equinox as eqx
from jaxtyping import ArrayLike

from gradflow.backend.types import Scalar, Weights
from gradflow.dynamics.base import DYNAMICS, RateTheory
from gradflow.dynamics.ode import AbstractOdeFlow, checked_tolerances, chosen_solver
from gradflow.problem import Problem
from gradflow.solvers.switching import Switching
from gradflow.theory.drift import flow_imbalance_drift, imbalance_drift


@DYNAMICS.register
class GradientFlow(AbstractOdeFlow):
    r"""The ODE $\dot W = -\nabla \bar L(W)$ with the averaged loss $\bar L$ of the problem.

    Integrated by diffrax with adaptive steps that land exactly on every saved time, so saved
    points are as accurate as the solution itself (interpolated ones conserve $G_i$ two to three
    digits worse).

    **Arguments:**

    - `rtol`, `atol`: relative and absolute tolerance of a step, > 0. Where weights start or stay
        smaller than `atol`, or a saddle is left, errors are relative all the same (see
        `gradflow.solvers.RelativeErrors`).
    - `solver`: any diffrax ODE solver with an error estimate; default `gradflow.solvers.Switching`,
        or `gradflow.solvers.GaussLegendre(order=6)` with `stiff=True`. Implicit solvers of diffrax
        iterate by Newton's method to near rounding unless they are given a root finder.
    - `stiff`: take the implicit default, for very unbalanced starts whose curvatures differ by
        many orders of magnitude.
    - `conservative`: take `GaussLegendre(order=6)`, which keeps every
        $G_i = W_{i+1}^\top W_{i+1} - W_i W_i^\top$ to rounding where the flow itself keeps it.
        Explicit solvers keep it to about `rtol` only, in a fraction of the time. With weight decay
        or other penalties $G_i$ moves, and is as accurate as the weights.

    A run may be of any length: a path that has come to rest stays there, and after 250,000 steps of
    the explicit default `simulate` goes on with the implicit one, which follows slow drifts in
    steps of their own length. A path that cannot go on, because its step size collapses (at the
    kink of a penalty) or after 10^8 steps of another solver, is reported as incomplete.
    """

    rtol: Scalar
    atol: Scalar
    solver: diffrax.AbstractSolver
    stiff: bool = eqx.field(static=True)
    conservative: bool = eqx.field(static=True)
    step_size: None

    def __init__(
        self,
        rtol: ArrayLike = 1e-8,
        atol: ArrayLike = 1e-10,
        solver: diffrax.AbstractSolver | None = None,
        stiff: bool = False,
        conservative: bool = False,
    ):
        self.rtol, self.atol = checked_tolerances("GradientFlow", rtol, atol)
        self.solver = chosen_solver(
            "GradientFlow",
            solver,
            stiff,
            conservative,
            explicit=Switching(self.rtol, self.atol),
        )
        self.stiff = stiff
        self.conservative = conservative
        self.step_size = None

    @property
    def has_default_solver(self) -> bool:
        """Whether it is the explicit one, named or not."""
        return isinstance(self.solver, Switching)

    @property
    def rate_theory(self) -> RateTheory:
        """The slow flow of small steps."""
        return "leading_order"

    def imbalance_drift(self, problem: Problem, weights: Weights) -> Scalar:
        """The limit of small steps; with noise inside the network that of the averaged loss."""
        if not problem.layer_noise:
            return imbalance_drift(problem, weights, 0.0, discrete=False)
        velocity = tuple(-g for g in problem.averaged_gradient(weights))
        return flow_imbalance_drift(weights, velocity)

    def check(self, problem: Problem, weights: Weights) -> None:
        """Nothing to check beforehand."""

    def auxiliary(self, problem: Problem, weights: Weights) -> tuple[Weights, ...]:
        """None."""
        return ()

    def field(self, t: Any, state: tuple[Weights, ...], problem: Problem) -> tuple[Weights, ...]:
        """The direction of steepest descent."""
        del t
        return (tuple(-g for g in problem.averaged_gradient(state[0])),)
