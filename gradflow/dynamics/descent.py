"""Gradient descent and stochastic gradient descent."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, UInt32

from gradflow.dynamics.base import (
    AbstractDynamics,
    State,
    advance_in_blocks,
    bury,
    divergence_limit,
    empty_noise,
    over_paths,
    widths_of,
)
from gradflow.problem import Problem
from gradflow.regularizers.base import as_parameter
from gradflow.streams import Stream
from gradflow.types import Scalar, Weights


class GradientDescent(AbstractDynamics):
    r"""Discrete training: GD on a problem without noise, SGD on a problem with noise.

    $$v_{k+1} = \beta v_k - h\, \tilde g(W_k), \qquad W_{k+1} = W_k + v_{k+1}, \qquad t = k h,$$

    where $\tilde g$ is the exact stochastic gradient of one draw of all regularizers (penalties
    included) and $v_0 = 0$.

    **Arguments:**

    - `step_size`: $h > 0$, flow time per step.
    - `momentum`: heavy-ball $\beta$ in $[0, 1)$.
    """

    step_size: Scalar
    momentum: Scalar | None

    def __init__(self, step_size: ArrayLike, momentum: ArrayLike = 0.0):
        self.step_size = as_parameter(step_size)
        h = float(self.step_size)
        if not (0.0 < h < float("inf")):
            raise ValueError(f"GradientDescent.step_size must be a finite number > 0; got {h}.")
        beta = float(as_parameter(momentum))
        if not (0.0 <= beta < 1.0):
            raise ValueError(f"GradientDescent.momentum must lie in [0, 1); got {beta}.")
        self.momentum = as_parameter(beta) if beta > 0.0 else None

    @property
    def ticks_per_step(self) -> int:
        """1."""
        return 1

    def is_random(self, problem: Problem) -> bool:
        """Whether the problem has noise."""
        return problem.is_stochastic

    def check(self, problem: Problem, weights: Weights) -> None:
        """Nothing to check beforehand: an unstable step size shows as diverged replicas."""

    def init(self, problem: Problem, weights: Weights, block: int) -> State:
        """Start at rest."""
        paths = weights[0].shape[-1]
        shapes = self.noise_shapes(problem, widths_of(weights))
        velocity = () if self.momentum is None else tuple(jnp.zeros_like(w) for w in weights)
        return State(
            weights, velocity, empty_noise(shapes, block, paths), divergence_limit(weights)
        )

    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """What one draw of the problem's regularizers takes."""
        one = jax.ShapeDtypeStruct((1,), jnp.uint32)
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        drawn = eqx.filter_eval_shape(
            lambda k, s, p: problem.draw(Stream(k, s, p), widths), key, one, one
        )
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:-1], leaf.dtype), drawn)

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
        """Take the steps `start` to `stop` (excluded) of every path."""
        widths = widths_of(state.weights)

        def draw(first_step: Array) -> Any:
            return problem.draw(Stream(key, first_step + jnp.arange(block), paths), widths)

        def step(weights: Weights, velocity: Any, limit: Scalar, noise: Any) -> tuple[Weights, Any]:
            gradient = problem.sampled_gradient(weights, noise)
            if self.momentum is None:
                moved = tuple(
                    w - self.step_size * g for w, g in zip(weights, gradient, strict=True)
                )
                return bury(moved, limit), ()
            velocity = tuple(
                self.momentum * v - self.step_size * g
                for v, g in zip(velocity, gradient, strict=True)
            )
            moved = tuple(w + v for w, v in zip(weights, velocity, strict=True))
            return bury(moved, limit), velocity

        def run(state: State, first: Array, last: Array) -> State:
            def one(j: Array, carry: tuple[Weights, Any]) -> tuple[Weights, Any]:
                noise = jax.tree.map(
                    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, j, keepdims=False), state.noise
                )
                return over_paths(step)(*carry, state.limit, noise)

            weights, velocity = jax.lax.fori_loop(first, last, one, (state.weights, state.memory))
            return State(weights, velocity, state.noise, state.limit)

        return advance_in_blocks(state, start, stop, block, draw, run)
