"""The stochastic variance-amplified gradient algorithm, between SGD and its SDE."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int

from gradflow.backend.types import Scalar, Weights
from gradflow.checks import checked_count, checked_step_size
from gradflow.dynamics.base import (
    DYNAMICS,
    AbstractDynamics,
    RateTheory,
    State,
    Step,
    advance_in_blocks,
    divergence_limit,
    mask_diverged,
    over_paths,
    whole_turns,
)
from gradflow.dynamics.descent import GradientDescent
from gradflow.dynamics.layers import minus_scaled
from gradflow.dynamics.noise import (
    at_step,
    check_gaussian,
    drawn_on_grid,
    shapes_of_one,
    with_path_substeps,
)
from gradflow.network import widths_of
from gradflow.problem import Problem
from gradflow.random.streams import Source, Stream
from gradflow.regularizers import Minibatch

SECOND = 0x5A5A5A5A
"""The substream of the second draw; regularizers and channels have small numbers."""


@DYNAMICS.register
class SVAG(AbstractDynamics):
    r"""SGD with steps $h / l$ and noise amplified to that of SGD with step $h$.

    $$W_{j+1} = W_j - \frac{h}{l}\, \tfrac12 \left[ (1 + \sqrt{2l - 1})\, \tilde g^{(1)}(W_j)
      + (1 - \sqrt{2l - 1})\, \tilde g^{(2)}(W_j) \right], \qquad t = j h / l,$$

    with two independent draws at the same weights. The combination has mean $\nabla \bar L$ and
    covariance $l\, \Sigma$, so that it tends to the order-1 SDE of SGD with step $h$ as
    $l \to \infty$, where $l = 1$ is SGD, with the same numbers for the same key. What changes
    between $l = 1$ and large $l$ is therefore what SGD has beyond its SDE: the discrete time and
    the shape of the noise (Li, Malladi, Arora 2021).

    Where the noise is exactly Gaussian only the combination matters; one normal scaled by
    $\sqrt l$ replaces the two draws, and it follows the Brownian path of `StochasticFlow` on the
    same key with `substeps=path_substeps`.

    **Arguments:**

    - `step_size`: $h > 0$ of the SGD it describes, flow time per `amplification` substeps.
    - `amplification`: $l \ge 1$.
    - `path_substeps`: grid steps of the Brownian path per $h$, a multiple of `amplification`;
        default `amplification`.
    """

    step_size: Scalar
    amplification: int = eqx.field(static=True)
    path_substeps: int = eqx.field(static=True)

    def __init__(
        self, step_size: ArrayLike, amplification: int = 4, path_substeps: int | None = None
    ):
        self.step_size = checked_step_size("SVAG", step_size)
        self.amplification = checked_count("SVAG.amplification", amplification)
        if path_substeps is None:
            path_substeps = self.amplification
        self.path_substeps = checked_count("SVAG.path_substeps", path_substeps)
        if self.path_substeps % self.amplification:
            raise ValueError(
                f"SVAG.path_substeps={path_substeps} must be a multiple of amplification="
                f"{amplification}, so that every substep covers whole steps of the grid."
            )

    @property
    def ticks_per_step(self) -> int:
        """`amplification`."""
        return self.amplification

    @property
    def stability_limit(self) -> float:
        r"""The largest stable $h \lambda$ on a quadratic loss: $2 l$."""
        return 2.0 * self.amplification

    @property
    def discrete_training(self) -> GradientDescent:
        """Descent with its steps $h / l$."""
        return GradientDescent(self.step_size / self.amplification)

    @property
    def rate_theory(self) -> RateTheory:
        """The drift of one step: it has no slow flow of its own, unless it is SGD."""
        return "finite_step" if self.amplification == 1 else "one_step"

    def theory_options(self) -> dict[str, Any]:
        """Step by step, with amplified noise."""
        return {"discrete": True, "amplification": self.amplification}

    def is_random(self, problem: Problem) -> bool:
        """Whether the problem has noise."""
        return problem.is_stochastic

    def check(self, problem: Problem, weights: Weights) -> None:
        """Raise a `ValueError` for noise that is not independent from step to step."""
        if self.path_substeps > self.amplification:
            check_gaussian("SVAG.path_substeps", self.path_substeps, problem)
        rule = problem.minibatch
        for present, what, fix in (
            (problem.has_weight_shift, "anticorrelated weight noise", "anticorrelated=False"),
            (
                isinstance(rule, Minibatch) and rule.reshuffled,
                "reshuffled minibatches",
                "reshuffled=False",
            ),
        ):
            if present:
                raise ValueError(
                    f"SVAG: {what} correlate{'' if what.endswith('s') else 's'} the steps, and "
                    "amplified independent draws do not describe them; use "
                    f"{fix} or GradientDescent."
                )

    def init(self, problem: Problem, weights: Weights) -> State:
        """Start at `weights`."""
        return State(
            weights, (), (), divergence_limit(weights, problem.data), whole_turns(weights, ())
        )

    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """What the draws of one substep take."""
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
        """Take the substeps `start` to `stop` (excluded) of every path."""
        widths = widths_of(state.weights)
        dt = self.step_size / self.amplification

        def draw(first_step: Array) -> Any:
            steps = first_step + jnp.arange(block)
            return self.draw(problem, source.at(steps), widths)

        def step(weights: Weights, noise: Any) -> Weights:
            return minus_scaled(weights, dt, self._gradient(problem, weights, noise))

        def stepper(state: State) -> Step:
            def one(j: Array, carry: tuple[Weights, Any]) -> tuple[Weights, Any]:
                moved = over_paths(step)(carry[0], at_step(state.noise, j))
                return mask_diverged(moved, state.limit), ()

            return one

        return advance_in_blocks(state, start, stop, block, draw, stepper)

    @property
    def grid_steps(self) -> int:
        """`path_substeps`."""
        return self.path_substeps

    def follows_path(self, problem: Problem) -> bool:
        """Whether the noise is Gaussian."""
        return problem.is_gaussian

    def on_grid(self, steps: int) -> "SVAG | None":
        """With so many `path_substeps`, if every substep covers whole ones."""
        return None if steps % self.amplification else with_path_substeps(self, steps)

    def draw(self, problem: Problem, stream: Stream, widths: tuple[int, ...]) -> tuple[Any, ...]:
        """The draws of a block of substeps: two, or one where it says it all."""
        first = drawn_on_grid(problem, stream, widths, self.path_substeps // self.amplification)
        if self.amplification == 1:
            return (first,)
        if problem.is_gaussian:
            amplitude = math.sqrt(self.amplification)
            return (jax.tree.map(lambda normals: amplitude * normals, first),)
        return first, problem.draw(stream.substream(SECOND), widths)

    def _gradient(self, problem: Problem, weights: Weights, draws: tuple[Any, ...]) -> Weights:
        """The amplified gradient of one substep of one path."""
        gradients = [problem.sampled_gradient(weights, draw) for draw in draws]
        if len(gradients) == 1:
            return gradients[0]
        root = math.sqrt(2.0 * self.amplification - 1.0)
        first, second = 0.5 * (1.0 + root), 0.5 * (1.0 - root)
        return tuple(first * a + second * b for a, b in zip(*gradients, strict=True))
