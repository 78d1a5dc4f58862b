"""The stochastic modified equation of SGD."""

import warnings
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, UInt32

from gradflow.dynamics.base import (
    AbstractDynamics,
    State,
    advance_in_blocks,
    divergence_limit,
    empty_noise,
    is_alive,
    over_paths,
)
from gradflow.geometry.curvature import hessian_trace
from gradflow.loss import pull_back
from gradflow.network import DeepLinear, end_to_end
from gradflow.problem import Problem
from gradflow.regularizers.base import as_parameter
from gradflow.solvers.grid_path import GridBrownianPath
from gradflow.streams import Stream
from gradflow.types import EndToEnd, Scalar, Weights

COARSEST = 0.5
"""Largest integration step over step size at which the integration error stays below the O(h)
difference between SGD and its SDE."""


class CoarseIntegrationWarning(UserWarning):
    """The integration step is too coarse for the order that the dynamics claims."""


class StochasticFlow(AbstractDynamics):
    r"""The Ito SDE $dW = -\nabla \bar L\, dt + \sqrt h\, \Sigma(W)^{1/2} dB$ of SGD with step $h$.

    $\Sigma$ is the covariance of the problem's stochastic gradient (penalties and batch included),
    taken through its low-rank factor: `(d_N, d_0)` normals for noise on labels. Integrated with
    diffrax (Euler-Maruyama, an Ito solver; the noise depends on the state and does not commute) on
    a grid Brownian path, one solve over the whole ensemble. It is a weak approximation of order 1
    to SGD at $t = k h$ (Li, Tai, E 2017).

    **Arguments:**

    - `step_size`: $h > 0$ of the SGD it describes; sets the strength of the noise.
    - `order`: weak order of the approximation; 1.
    - `substeps`: integration steps per $h$; the integration step is `step_size / substeps`.
    """

    step_size: Scalar
    order: int = eqx.field(static=True)
    substeps: int = eqx.field(static=True)

    def __init__(self, step_size: ArrayLike, order: int = 1, substeps: int = 8):
        self.step_size = as_parameter(step_size)
        h = float(self.step_size)
        if not (0.0 < h < float("inf")):
            raise ValueError(f"StochasticFlow.step_size must be a finite number > 0; got {h}.")
        if order != 1:
            raise ValueError(
                f"StochasticFlow.order={order!r} is not available: the drift of the order-2 "
                "equation, -grad(L + (h/4)|grad L|^2), is missing; use order=1."
            )
        if not isinstance(substeps, int) or substeps < 1:
            raise ValueError(f"StochasticFlow.substeps must be an integer >= 1; got {substeps!r}.")
        self.order = order
        self.substeps = substeps

    @property
    def ticks_per_step(self) -> int:
        """`substeps`."""
        return self.substeps

    def is_random(self, problem: Problem) -> bool:
        """Whether the problem has noise."""
        return problem.is_stochastic

    def check(self, problem: Problem, weights: Weights) -> None:
        r"""Warn about an integration step that is too coarse for the claimed order.

        Euler-Maruyama with step $\Delta$ has a weak error $O(\Delta)$ and the equation differs from
        SGD by $O(h)$: $\Delta \le h/2$ keeps the first below the second, and
        $\Delta\, \mathrm{tr} H < 1$ at the start keeps it stable.
        """
        dt = float(self.step_size) / self.substeps
        trace = max(
            float(hessian_trace(DeepLinear([w[..., p] for w in weights]), problem.data))
            for p in range(min(weights[0].shape[-1], 8))
        )
        if self.is_random(problem) and 1.0 / self.substeps > COARSEST:
            warnings.warn(
                f"StochasticFlow.substeps={self.substeps}: integrating with steps of h = {dt:g} "
                "makes an error as large as the difference between SGD and its SDE, so order 1 "
                "cannot be seen; use substeps >= 2 (8 by default).",
                CoarseIntegrationWarning,
                stacklevel=3,
            )
        elif dt * trace > 1.0:
            warnings.warn(
                f"StochasticFlow.substeps={self.substeps}: the integration step {dt:g} times the "
                f"Hessian trace {trace:.3g} at the start exceeds 1, where Euler-Maruyama is "
                f"inaccurate; use substeps >= {int(self.substeps * dt * trace) + 1}.",
                CoarseIntegrationWarning,
                stacklevel=3,
            )

    def init(self, problem: Problem, weights: Weights, block: int) -> State:
        """Start at `weights`."""
        shapes = self.noise_shapes(problem, ())
        noise = empty_noise(shapes, block, weights[0].shape[-1])
        return State(weights, (), noise, divergence_limit(weights))

    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """What one application of the diffusion factor takes."""
        dtype = problem.data.sxx.dtype
        return tuple(jax.ShapeDtypeStruct(s, dtype) for s in problem.normal_shapes())

    def advance(
        self,
        problem: Problem,
        state: State,
        start: Int[Array, ""],
        stop: Int[Array, ""],
        key: UInt32[Array, "2"],
        paths: UInt32[Array, " paths"],
        block: int,
    ) -> State:
        """Take the integration steps `start` to `stop` (excluded) of every path."""
        shapes = problem.normal_shapes()
        dt = self.step_size / self.substeps

        def draw(first_step: Array) -> Any:
            stream = Stream(key, first_step + jnp.arange(block), paths)
            return tuple(stream.substream(i).normals(s) for i, s in enumerate(shapes))

        def run(state: State, first: Array, last: Array) -> State:
            term = StochasticGradientTerm(
                problem, GridBrownianPath(state.noise), dt, self.step_size, state.limit
            )
            solution = diffrax.diffeqsolve(
                term,
                diffrax.Euler(),
                t0=first.astype(dt.dtype),
                t1=last.astype(dt.dtype),
                dt0=jnp.ones((), dt.dtype),
                y0=state.weights,
                saveat=diffrax.SaveAt(t1=True),
                max_steps=block,
                throw=False,
            )
            weights = tuple(w[0] for w in cast(Weights, solution.ys))
            return State(weights, (), state.noise, state.limit)

        return advance_in_blocks(state, start, stop, block, draw, run)


class StochasticGradientTerm(diffrax.AbstractTerm):
    r"""Drift and diffusion of an ensemble in one pull-back, on a unit grid.

    Both enter through the end-to-end gradient, so one increment is

    $$\Delta W_i = -A_i^\top \left( \bar M\, \Delta t + \sqrt{h \Delta t}\, Z(\zeta) \right)
      B_i^\top - \lambda W_i \Delta t,$$

    with $Z$ the end-to-end diffusion factor applied to normals: a stochastic step costs what a
    deterministic one does. A diffrax `MultiTerm` would form the products of the layers twice.
    """

    problem: Problem
    path: GridBrownianPath
    dt: Scalar
    step_size: Scalar
    limit: Array

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The normals of the grid step that starts at `t0`."""
        return self.path.evaluate(t0, t1)

    def vf(self, t: Any, y: Weights, args: Any) -> Weights:
        """The state at which drift and diffusion are taken."""
        return y

    def prod(self, vf: Weights, control: Any) -> Weights:
        """The increment of every path over one grid step."""
        return over_paths(self._increment)(vf, control, self.limit)

    def _increment(self, weights: Weights, normals: Any, limit: Scalar) -> Weights:
        mean: EndToEnd = end_to_end(weights) @ self.problem.input_moment - self.problem.data.syx
        noise = self.problem.end_to_end_increment(weights, normals)
        total = mean * self.dt + jnp.sqrt(self.step_size * self.dt) * noise
        penalty = self.problem.add_penalties(tuple(jnp.zeros_like(w) for w in weights), weights)
        moved = tuple(
            -g - self.dt * d for g, d in zip(pull_back(weights, total), penalty, strict=True)
        )
        alive = is_alive(tuple(w + m for w, m in zip(weights, moved, strict=True)), limit)
        return tuple(jnp.where(alive, m, jnp.nan) for m in moved)
