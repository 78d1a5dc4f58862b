"""The stochastic modified equations of SGD."""

import math
import warnings
from typing import Any, ClassVar, Literal, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int

from gradflow.backend.compiled import compiled
from gradflow.backend.types import Scalar, Weights
from gradflow.checks import MOST_COUNTED, checked_count, checked_step_size
from gradflow.dynamics.base import (
    DYNAMICS,
    AbstractDynamics,
    RateTheory,
    Role,
    State,
    Step,
    advance_in_blocks,
    divergence_limit,
    whole_turns,
)
from gradflow.dynamics.layers import penalty_gradient
from gradflow.dynamics.modified_flow import is_reshuffled
from gradflow.dynamics.noise import shapes_of_one
from gradflow.dynamics.sde_terms import (
    ClosedNoiseTerm,
    SampledNoiseTerm,
    StochasticGradientTerm,
    drift_term,
)
from gradflow.network import left_products, right_products, widths_of
from gradflow.problem import Problem
from gradflow.random.streams import Normals, Source, Stream
from gradflow.solvers.grid_path import GridBrownianPath
from gradflow.solvers.small_noise import SmallNoise

COARSEST = 0.5
"""Largest integration step over step size at which the integration error stays below the
difference between SGD and its SDE."""

LEVY_STREAMS = (0x1E71, 0x1E72)
"""Substreams of the normals behind the Levy areas; regularizers have small numbers."""

Diffusion = Literal["auto", "closed", "sampled"]


class CoarseIntegrationWarning(UserWarning):
    """The integration is too coarse for the order that the dynamics claims."""


class SampledDiffusionWarning(UserWarning):
    """The increments are centred sampled gradients, for lack of a closed diffusion factor."""


@DYNAMICS.register
class StochasticFlow(AbstractDynamics):
    r"""The Ito SDE of SGD with step $h$: a stochastic modified equation.

    $$dW = -\nabla \left( \bar L + \tfrac h4 |\nabla \bar L|^2 \right) dt
      + \sqrt h\, \Sigma(W)^{1/2} dB,$$

    without the second term of the drift at order 1. $\Sigma$ is the covariance of the problem's
    stochastic gradient, the batch included, taken through its low-rank factor: `(d_N, d_0)` normals
    for noise on labels. At $t = k h$ the equation agrees with SGD weakly to the given order in $h$
    (Li, Tai, E 2019). At order 2 its generator on $G_i$ is the expected change of $G_i$ in a step
    of SGD, over $h$, exactly (with weight decay $\lambda$ up to $2 h \lambda^2 G_i$).

    Integrated on a grid Brownian path of `substeps` steps $\Delta = h / s$ in $h$, the
    whole ensemble at once. Order 1 uses the Euler-Maruyama method, whose weak error is $O(\Delta)$;
    order 2 uses `SmallNoise`, whose weak error is $O(\Delta^2 + h^2 \Delta)$, so that neither
    spoils the order with a fixed number of substeps.

    *Sampled increments.* Noise inside the network has no closed factor. Then each grid step takes a
    fresh draw, and $\sqrt{h \Delta}\,(\tilde g - \nabla \bar L)$ stands for the Gaussian increment:
    its mean and covariance are exact, and its third moment, $(h \Delta)^{3/2}$ times that of
    $\tilde g$, changes weak averages by $O((h \Delta)^{3/2})$ a step, $O(h^2 s^{-1/2})$ at a fixed
    time. This keeps order 1, and order 2: SGD itself differs from its SDE by that much.

    Anticorrelated weight noise stays in the weights of discrete training for one step; the equation
    describes the weights without it.

    *Solvers.* With a Stratonovich solver of diffrax the drift loses
    $\tfrac h2 \sum_c D b_c[b_c]$, $b_c$ the columns of the factor, which makes it the same
    equation. Columns are formed one by one: it costs as many derivatives as there are normals.

    **Arguments:**

    - `step_size`: $h > 0$ of the SGD it describes; sets the strength of the noise.
    - `order`: weak order of the approximation, 1 or 2.
    - `substeps`: integration steps per $h$; the integration step is `step_size / substeps`.
    - `solver`: a diffrax solver for Ito or Stratonovich equations with general noise, such as
        `diffrax.Heun()` or `diffrax.SPaRK()`, stepped at a constant size; default as above.
    - `diffusion`: "closed" for the closed factor, "sampled" for sampled increments, "auto" for the
        factor where there is one and otherwise, with a warning, sampled increments.

    **Raises:** `ValueError` or `TypeError` naming the argument that makes no sense.
    """

    role: ClassVar[Role | None] = Role.SDE

    step_size: Scalar
    order: int = eqx.field(static=True)
    substeps: int = eqx.field(static=True)
    solver: diffrax.AbstractSolver | None
    diffusion: Diffusion = eqx.field(static=True)

    def __init__(
        self,
        step_size: ArrayLike,
        order: int = 1,
        substeps: int = 8,
        solver: diffrax.AbstractSolver | None = None,
        diffusion: str = "auto",
    ):
        self.step_size = checked_step_size("StochasticFlow", step_size)
        if order not in (1, 2) or isinstance(order, bool):
            raise ValueError(f"StochasticFlow.order must be 1 or 2; got {order!r}.")
        self.order = int(order)
        self.substeps = checked_count("StochasticFlow.substeps", substeps)
        self.solver = _checked_solver(solver)
        if diffusion not in ("auto", "closed", "sampled"):
            raise ValueError(
                "StochasticFlow.diffusion must be 'auto', 'closed' or 'sampled'; got "
                f"{diffusion!r}."
            )
        self.diffusion = cast(Diffusion, diffusion)

    @property
    def ticks_per_step(self) -> int:
        """`substeps`."""
        return self.substeps

    @property
    def stability_limit(self) -> float | None:
        r"""The largest stable $h \lambda$ of the integration on a quadratic loss, without noise.

        $2 s$ at order 1; at order 2, $x + x^2/2 = 2 s$ with the drift's own term. None for a solver
        that was given.
        """
        if self.solver is not None:
            return None
        return 2.0 * self.substeps if self.order == 1 else math.sqrt(1.0 + 4.0 * self.substeps) - 1

    @property
    def rate_theory(self) -> RateTheory:
        """The slow flow of small steps; at order 2 the drift, since that has none of its own."""
        return "leading_order" if self.order == 1 else "one_step"

    def theory_options(self) -> dict[str, Any]:
        """An SDE of its order."""
        return {"discrete": False, "order": self.order}

    def is_random(self, problem: Problem) -> bool:
        """Whether the problem has noise."""
        return problem.is_stochastic

    def check(self, problem: Problem, weights: Weights) -> None:
        r"""Raise where white noise does not describe the problem, warn of what loses accuracy.

        The integration must be finer than the approximation, $\Delta \le h/2$, and stable, $\Delta$
        times the curvature at the start below 1.
        """
        _check_white(problem)
        self._check_diffusion(problem)
        if self.is_random(problem) and self._has_lost_order():
            return
        dt = float(self.step_size) / self.substeps
        curvature = max(
            float(_curvature_bound(problem, tuple(w[..., p] for w in weights)))
            for p in range(min(weights[0].shape[-1], 8))
        )
        if not dt * curvature <= 1.0:
            needed = self.substeps * dt * curvature
            cure = (
                f"use substeps >= {int(needed) + 1}"
                if needed < MOST_COUNTED
                else ("no number of substeps helps; start from smaller weights")
            )
            warnings.warn(
                f"StochasticFlow.substeps={self.substeps}: the integration step {dt:g} times the "
                f"Hessian trace {curvature:.3g} at the start exceeds 1, where explicit steps are "
                f"inaccurate; {cure}.",
                CoarseIntegrationWarning,
                stacklevel=3,
            )

    def init(self, problem: Problem, weights: Weights) -> State:
        """Start at `weights`."""
        # Steps of several stages written out would be a program that takes long to compile.
        euler = isinstance(self.solver, diffrax.Euler) or (self.solver is None and self.order == 1)
        whole = whole_turns(weights, ()) if euler else None
        return State(weights, (), (), divergence_limit(weights, problem.data), whole)

    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """What one grid step takes: normals of the factor and of Levy areas, or a draw."""
        return shapes_of_one(lambda stream: self.draw(problem, stream, widths))

    def advance(
        self,
        problem: Problem,
        state: State,
        start: Int[Array, ""],
        stop: Int[Array, ""],
        source: Source,
        block: int,
    ) -> State:
        """Take the integration steps `start` to `stop` (excluded) of every path."""
        widths = widths_of(state.weights)
        clock = self.step_size.dtype

        def draw(first_step: Array) -> Any:
            return self.draw(problem, source.at(first_step + jnp.arange(block)), widths)

        def stepper(state: State) -> Step:
            solver, terms = self._equation(problem, state.noise, state.limit)

            def one(j: Array, carry: tuple[Weights, Any]) -> tuple[Weights, Any]:
                # diffrax's own loop takes fractions of its length as times, which are no integers.
                weights, _ = carry
                times = j.astype(clock), (j + 1).astype(clock)
                memory = solver.init(terms, *times, weights, None)
                moved, *_ = solver.step(terms, *times, weights, None, memory, made_jump=False)
                return moved, ()

            return one

        return advance_in_blocks(state, start, stop, block, draw, stepper)

    def is_sampled(self, problem: Problem) -> bool:
        """Whether increments are sampled gradients."""
        if self.diffusion == "auto":
            return not problem.has_diffusion_factor
        return self.diffusion == "sampled"

    def follows_path(self, problem: Problem) -> bool:
        """Whether the noise is Gaussian, or taken through its closed factor."""
        closed = self.diffusion != "sampled" and problem.has_diffusion_factor
        return problem.is_gaussian or closed

    def why_not_normals(self, normals: Normals, problem: Problem) -> str | None:
        """Another law must keep the weak order: have its moments right, in a solver that keeps it.

        Sampled gradients take Gaussian normals alone.
        """
        if normals.law == "gaussian":
            return None
        if self.is_sampled(problem):
            return (
                "StochasticFlow takes centred sampled gradients as increments here, and their "
                "normals are the noise of training itself; use diffusion='closed' where there is a "
                "closed factor, or use law='gaussian'."
            )
        if not isinstance(self.solver, diffrax.Euler | SmallNoise | None):
            return (
                f"StochasticFlow.solver={type(self.solver).__name__} is not known to keep its "
                "order with increments of another law; leave solver out, or use law='gaussian'."
            )
        if self.order == 2 and normals.law == "two-point":
            return (
                "its moments are right up to the third, and StochasticFlow.order=2 needs them up "
                "to the fifth; use law='three-point'."
            )
        return None

    def draw(self, problem: Problem, stream: Stream, widths: tuple[int, ...]) -> tuple[Any, ...]:
        """The random numbers of a block of grid steps, and those of the areas the solver needs."""
        if self.is_sampled(problem):
            return (problem.draw(stream, widths),)
        streams = [stream, *(stream.substream(i) for i in LEVY_STREAMS[: _areas(self.solver)])]
        return tuple(problem.draw_normals(s, widths) for s in streams)

    def _equation(
        self, problem: Problem, noise: tuple[Any, ...], limit: Array
    ) -> tuple[diffrax.AbstractSolver, diffrax.AbstractTerm]:
        """The solver and the terms that it integrates over a block of noise."""
        path = GridBrownianPath(noise[0], noise[1:])
        dt = self.step_size / self.substeps
        sampled = self.is_sampled(problem)
        if self.solver is None and self.order == 1 and not sampled:
            term = StochasticGradientTerm(problem, path, dt, self.step_size, limit)
            return diffrax.Euler(), term
        solver = self.solver
        if solver is None:
            solver = diffrax.Euler() if self.order == 1 else SmallNoise()
        stratonovich = isinstance(solver, diffrax.AbstractStratonovichSolver)
        drift = drift_term(problem, limit, dt, self.step_size, self.order, stratonovich)
        scale = jnp.sqrt(self.step_size * dt)
        of_noise = SampledNoiseTerm if sampled else ClosedNoiseTerm
        return solver, diffrax.MultiTerm(drift, of_noise(problem, path, scale))

    def _check_diffusion(self, problem: Problem) -> None:
        inside = " and ".join(type(r).__name__ for r in problem.layer_noise)
        if self.diffusion == "closed" and not problem.has_diffusion_factor:
            raise ValueError(
                f"StochasticFlow.diffusion='closed': {inside} acts inside the network and has no "
                "closed diffusion factor; use diffusion='sampled'."
            )
        if not self.is_sampled(problem):
            return
        if self.solver is not None and not isinstance(self.solver, diffrax.Euler | SmallNoise):
            raise ValueError(
                f"StochasticFlow.solver={type(self.solver).__name__} needs the columns of a closed "
                "diffusion factor, and sampled increments have none; leave solver out."
            )
        if self.diffusion == "auto":
            warnings.warn(
                f"StochasticFlow.diffusion: {inside} has no closed diffusion factor, so the "
                "increments are centred sampled gradients: exact mean and covariance, not "
                "Gaussian. Weak averages keep their order; write diffusion='sampled' if you mean "
                "it.",
                SampledDiffusionWarning,
                stacklevel=4,
            )

    def _has_lost_order(self) -> bool:
        """Warn if the integration error is as large as what the equation leaves out."""
        dt = float(self.step_size) / self.substeps
        first_order = isinstance(self.solver, diffrax.Euler | diffrax.EulerHeun)
        first_order = first_order or (self.solver is None and self.order == 1)
        if first_order and self.order == 2:
            warnings.warn(
                f"StochasticFlow.solver={type(self.solver).__name__} integrates the drift to first "
                "order in the integration step, a fixed fraction of h, so order 2 cannot be seen; "
                "leave solver out or use one such as diffrax.Heun().",
                CoarseIntegrationWarning,
                stacklevel=4,
            )
        elif first_order and 1.0 / self.substeps > COARSEST:
            warnings.warn(
                f"StochasticFlow.substeps={self.substeps}: integrating with steps of h = {dt:g} "
                "makes an error as large as the difference between SGD and its SDE, so order 1 "
                "cannot be seen; use substeps >= 2 (8 by default).",
                CoarseIntegrationWarning,
                stacklevel=4,
            )
        else:
            return False
        return True


def _areas(solver: diffrax.AbstractSolver | None) -> int:
    """How many Levy areas a solver asks for."""
    if not isinstance(solver, diffrax.AbstractSRK):
        return 0
    return (solver.tableau.coeffs_hh is not None) + (solver.tableau.coeffs_kk is not None)


def _checked_solver(solver: Any) -> diffrax.AbstractSolver | None:
    if solver is None:
        return None
    name = type(solver).__name__
    kinds = diffrax.AbstractItoSolver | diffrax.AbstractStratonovichSolver
    if not isinstance(solver, kinds) or isinstance(solver, diffrax.AbstractWrappedSolver):
        raise TypeError(
            "StochasticFlow.solver must be a diffrax solver of Ito or Stratonovich equations that "
            f"takes whole steps, such as diffrax.Heun(); got {name}."
        )
    reason = None
    if isinstance(solver, diffrax.ItoMilstein | diffrax.StratonovichMilstein):
        reason = "assumes that the noise commutes, and gradient noise does not"
    elif isinstance(solver, diffrax.ReversibleHeun):
        reason = "is unstable at every step size where the loss is convex"
    elif isinstance(solver, diffrax.AbstractFosterLangevinSRK):
        reason = "solves the underdamped Langevin equation"
    elif isinstance(solver, diffrax.AbstractSRK) and solver.tableau.is_additive_noise():
        reason = "assumes noise that does not depend on the weights"
    if reason is not None:
        raise ValueError(
            f"StochasticFlow.solver={name} {reason}; use one for general noise such as "
            "diffrax.Heun() or diffrax.SPaRK()."
        )
    return solver


def _check_white(problem: Problem) -> None:
    if is_reshuffled(problem):
        raise ValueError(
            "Minibatch.reshuffled=True correlates the steps of an epoch, so white noise does not "
            "describe it; use reshuffled=False for stochastic flows."
        )


@compiled
def _curvature_bound(problem: Problem, weights: Weights) -> Scalar:
    r"""The Hessian trace with noisy inputs plus the curvature of the penalties along the weights.

    $$\sum_i |A_i|^2 \mathrm{tr}(B_i \bar S B_i^\top) + \lambda$$ for weight decay.
    """
    lefts, rights = left_products(weights), right_products(weights)
    trace = sum(
        jnp.sum(a * a) * jnp.sum((b @ problem.input_moment) * b)
        for a, b in zip(lefts, rights, strict=True)
    )
    _, pull = jax.jvp(lambda w: penalty_gradient(problem, w), (weights,), (weights,))
    inner = sum(jnp.sum(w * p) for w, p in zip(weights, pull, strict=True))
    norm = sum(jnp.sum(w * w) for w in weights)
    return trace + jnp.where(norm > 0.0, inner / jnp.where(norm > 0.0, norm, 1.0), 0.0)
