"""What a closed form is, and the parts of a problem that closed forms see."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar, Weights
from gradflow.problem import Problem


class AbstractClosedForm(eqx.Module):
    r"""A formula for the gradient flow $\dot W = -\nabla \bar L(W)$ of some problems and starts.

    - `name`: what users call it.
    - `continues`: evaluate from the last saved weights instead of from the start, because the cost
        grows with the time.
    """

    name: ClassVar[str]
    continues: ClassVar[bool]

    @abc.abstractmethod
    def why_not(self, problem: Problem, weights: Weights) -> str | None:
        """Why the form does not apply to one network, in a few words; None if it does."""

    @abc.abstractmethod
    def prepare(self, problem: Problem, weights: Weights) -> Any:
        """What `evaluate` needs to know of one start: a pytree of new arrays."""

    @abc.abstractmethod
    def evaluate(self, problem: Problem, prepared: Any, t: Scalar) -> Weights:
        """The weights a flow time `t` >= 0 after the start; can be compiled."""


def why_not_quadratic(problem: Problem) -> str | None:
    """Why the averaged loss is not that of linear regression plus weight decay; None if it is."""
    if problem.layer_noise:
        return f"{type(problem.layer_noise[0]).__name__} changes the averaged loss"
    for penalty in problem.other_penalties:
        return f"{type(penalty).__name__} adds a penalty other than weight decay"
    return None


def why_decaying(problem: Problem) -> str | None:
    """The rate of weight decay as a reason; None if it is 0."""
    rate = float(problem.weight_decay)
    return f"weight decay {rate:g} is not 0" if rate != 0.0 else None


def moment_arrays(
    problem: Problem,
) -> tuple[Float[np.ndarray, "d_in d_in"], Float[np.ndarray, "d_out d_in"]]:
    r"""$\bar S = S_{xx} + \sigma^2 I$ and $Y$ as NumPy arrays, for decisions."""
    return np.asarray(problem.input_moment), np.asarray(problem.data.syx)


def copied(weights: Weights) -> Weights:
    """New arrays: a run gives the buffers of its weights back to every step."""
    return tuple(jnp.array(w) for w in weights)


def mean_decay(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    r"""$(1 - e^{-x})/x$, the mean of $e^{-x u}$ over $0 \le u \le 1$; 1 at 0."""
    safe = jnp.where(x == 0.0, 1.0, x)
    return jnp.where(x == 0.0, 1.0, -jnp.expm1(-safe) / safe)
