"""Scalar networks of any depth."""

from typing import Any, ClassVar

import jax.numpy as jnp

from gradflow.backend.types import Scalar, Weights
from gradflow.closed_forms.base import (
    AbstractClosedForm,
    copied,
    why_decaying,
    why_not_quadratic,
)
from gradflow.closed_forms.chain_kernel import chain_weights
from gradflow.network import widths_of
from gradflow.problem import Problem


class ScalarChain(AbstractClosedForm):
    r"""All widths 1, depth $N \ge 2$, any start, signs and crossings of 0 included.

    $t = \int dx / \dot x$ in the smallest weight $x$, all others being functions of it.
    """

    name: ClassVar[str] = "scalar chain"
    continues: ClassVar[bool] = False

    def why_not(self, problem: Problem, weights: Weights) -> str | None:
        """Needs all widths 1, inputs that are not all 0, and no weight decay."""
        widths = widths_of(weights)
        if len(weights) < 2 or set(widths) != {1}:
            return f"widths are {widths}, not (1, ..., 1) of depth 2 or more"
        if float(problem.input_moment[0, 0]) == 0.0:
            return "the inputs are all 0"
        return why_not_quadratic(problem) or why_decaying(problem)

    def prepare(self, problem: Problem, weights: Weights) -> Any:
        """The weights."""
        return copied(weights)

    def evaluate(self, problem: Problem, prepared: Any, t: Scalar) -> Weights:
        """Each weight as a function of the smallest."""
        w = jnp.concatenate([layer[0] for layer in prepared])
        moved = chain_weights(w, problem.input_moment[0, 0], problem.data.syx[0, 0], t)
        return tuple(moved.reshape(-1, 1, 1))
