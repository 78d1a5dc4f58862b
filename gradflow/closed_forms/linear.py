"""Depth 1: a linear differential equation."""

from typing import Any, ClassVar

from gradflow.backend.types import Scalar, Weights
from gradflow.closed_forms.base import (
    AbstractClosedForm,
    copied,
    mean_decay,
    why_not_quadratic,
)
from gradflow.problem import Problem


class Linear(AbstractClosedForm):
    r"""Depth 1: $W(t) = W_0 - (W_0 \bar S - Y) \int_0^t e^{-\bar S u} du$.

    Any shapes, singular $\bar S$, weight decay (which adds $\lambda I$ to $\bar S$).
    """

    name: ClassVar[str] = "linear"
    continues: ClassVar[bool] = False

    def why_not(self, problem: Problem, weights: Weights) -> str | None:
        """Needs depth 1."""
        if len(weights) != 1:
            return f"depth is {len(weights)}, not 1"
        return why_not_quadratic(problem)

    def prepare(self, problem: Problem, weights: Weights) -> Any:
        """The weights."""
        return copied(weights)

    def evaluate(self, problem: Problem, prepared: Any, t: Scalar) -> Weights:
        """In the eigenbasis of the input moment."""
        (w,) = prepared
        vectors = problem.data.sxx_eigenvectors
        values = problem.data.sxx_eigenvalues + problem.input_variance + problem.weight_decay
        inside, target = w @ vectors, problem.data.syx @ vectors
        gone = t * mean_decay(values * t)
        moved = (target - inside * values) * gone
        return (w + moved @ vectors.T,)
