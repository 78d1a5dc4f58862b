"""The second-order differential equation that heavy-ball momentum follows."""

from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
from jaxtyping import ArrayLike

from gradflow.backend.compiled import compiled
from gradflow.backend.types import Scalar, Weights
from gradflow.checks import (
    Decay,
    check_velocity,
    checked_decay,
    checked_momentum,
    checked_step_size,
    checked_velocity,
)
from gradflow.dynamics.base import DYNAMICS, over_paths
from gradflow.dynamics.layers import over_all_paths, penalty_gradient
from gradflow.dynamics.ode import AbstractOdeFlow, checked_tolerances, chosen_solver
from gradflow.dynamics.update_rule import UpdateRule
from gradflow.problem import Problem
from gradflow.solvers.dormand_prince import DormandPrince853


@DYNAMICS.register
class HeavyBallFlow(AbstractOdeFlow):
    r"""The ODE that heavy-ball descent follows to second order in its step size.

    $$m \ddot W + (1 - \beta) \dot W = -\nabla \bar L(W), \qquad m = (1 + \beta)\, h / 2, \qquad
      \dot W(0) = \frac{2 \beta v_0 / h - \nabla \bar L(W_0)}{1 + \beta},$$

    for $v_{k+1} = \beta v_k - h \nabla \bar L(W_k)$, $W_{k+1} = W_k + v_{k+1}$ at $t = k h$: the
    Taylor expansion of $W_{k+1} - W_k = \beta (W_k - W_{k-1}) - h \nabla \bar L(W_k)$ leaves a
    residual $h^2 (1 - \beta) \dddot W / 6$. The velocity decays to the slow one within a few steps,
    in the flow as $e^{-(1 - \beta) t / m}$ and in descent as $\beta^k$; the initial velocity is the
    one for which both transients, $v_0 = O(h)$, displace the weights equally. At a fixed time
    $W(k h) - W_k = O(h^2)$, with any other initial velocity $O(h)$. While the transients last, the
    two differ by $O(h)$.

    With decoupled decay, $W_{k+1} = W_k + v_{k+1} - h R(W_k)$ for the gradient $R$ of the
    penalties, which $v$ does not see, the same expansion gives

    $$m \ddot W + (1 - \beta) \dot W + (1 - \beta) R + h \beta R'[\dot W] = -\nabla \bar L_0(W),
      \qquad \dot W(0) = \frac{2 \beta v_0 / h - \nabla \bar L_0(W_0)}{1 + \beta} - R(W_0),$$

    where $\bar L_0$ is the averaged loss without penalties.

    $G_i$ is not conserved, but the Noether charge $J_i = \mathrm{skew}(W_{i+1}^\top \dot W_{i+1}
    + W_i \dot W_i^\top)$ is up to friction: $J_i(t) = J_i(0)\, e^{-(1 - \beta) t / m}$.

    Noise enters through the averaged loss alone.

    **Arguments:**

    - `step_size`: $h > 0$ of the descent that it describes.
    - `momentum`: $\beta$ in $[0, 1)$.
    - `rtol`, `atol`: relative and absolute tolerance of a step, > 0.
    - `solver`, `stiff`: as in `GradientFlow`.
    - `velocity`: $v_0$ in weight units per step, one `(d_i, d_{i-1})` array a layer; default 0.
    - `decay`: "coupled" or "decoupled", as in `GradientDescent`.

    A path whose solve fails is reported as diverged.
    """

    step_size: Scalar
    momentum: Scalar
    rtol: Scalar
    atol: Scalar
    solver: diffrax.AbstractSolver
    stiff: bool = eqx.field(static=True)
    velocity: Weights | None
    decay: Decay = eqx.field(static=True)

    def __init__(
        self,
        step_size: ArrayLike,
        momentum: ArrayLike,
        rtol: ArrayLike = 1e-8,
        atol: ArrayLike = 1e-10,
        solver: diffrax.AbstractSolver | None = None,
        stiff: bool = False,
        velocity: Sequence[Any] | None = None,
        decay: Decay | str = "coupled",
    ):
        self.step_size = checked_step_size("HeavyBallFlow", step_size)
        self.momentum = checked_momentum("HeavyBallFlow", momentum)
        self.rtol, self.atol = checked_tolerances("HeavyBallFlow", rtol, atol)
        self.solver = chosen_solver("HeavyBallFlow", solver, stiff, explicit=DormandPrince853())
        self.stiff = stiff
        self.velocity = checked_velocity("HeavyBallFlow", velocity)
        self.decay = checked_decay("HeavyBallFlow", decay)

    @property
    def mass(self) -> Scalar:
        r"""$m = (1 + \beta)\, h / 2$."""
        return 0.5 * (1.0 + self.momentum) * self.step_size

    @property
    def update_rule(self) -> UpdateRule:
        """Heavy ball."""
        return UpdateRule(self.momentum, self.decay)

    @property
    def has_default_solver(self) -> bool:
        """Whether it is the explicit one, named or not."""
        return isinstance(self.solver, DormandPrince853)

    def check(self, problem: Problem, weights: Weights) -> None:
        """Raise a `ValueError` if the velocity does not fit the network."""
        check_velocity("HeavyBallFlow", self.velocity, weights)

    def auxiliary(self, problem: Problem, weights: Weights) -> tuple[Weights, ...]:
        r"""The velocity $\dot W(0)$ of the descent."""
        return (_initial_velocity(self, problem, weights),)

    def field(self, t: Any, state: tuple[Weights, ...], problem: Problem) -> tuple[Weights, ...]:
        """The time derivatives of weights and velocity."""
        del t
        weights, velocity = state
        gradient = problem.averaged_gradient(weights)
        friction = 1.0 - self.momentum
        force = tuple(-g - friction * v for g, v in zip(gradient, velocity, strict=True))
        if self.decay == "decoupled":
            # The averaged gradient holds R once; the equation asks for (1 - beta) R + h beta R'[V].
            pull, change = jax.jvp(lambda w: penalty_gradient(problem, w), (weights,), (velocity,))
            force = tuple(
                f + self.momentum * (r - self.step_size * c)
                for f, r, c in zip(force, pull, change, strict=True)
            )
        return velocity, tuple(f / self.mass for f in force)


@compiled
def _initial_velocity(dynamics: HeavyBallFlow, problem: Problem, weights: Weights) -> Weights:
    """The velocities that displace the weights as the first steps of the descent do."""
    h, beta = dynamics.step_size, dynamics.momentum

    def of_path(weights: Weights, v0: Weights) -> Weights:
        total = problem.averaged_gradient(weights)
        start = tuple(
            (2.0 * beta / h * v - g) / (1.0 + beta) for v, g in zip(v0, total, strict=True)
        )
        if dynamics.decay == "coupled":
            return start
        # Of the total gradient R counts fully, not divided by 1 + beta.
        pull = penalty_gradient(problem, weights)
        return tuple(v - beta / (1.0 + beta) * r for v, r in zip(start, pull, strict=True))

    return over_paths(of_path)(weights, over_all_paths(dynamics.velocity, weights))
