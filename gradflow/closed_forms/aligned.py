"""Networks that fall apart into independent modes, each of them a scalar network."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gradflow.backend.types import Scalar, Weights
from gradflow.closed_forms.alignment import find_alignment
from gradflow.closed_forms.base import (
    AbstractClosedForm,
    copied,
    moment_arrays,
    why_decaying,
    why_not_quadratic,
)
from gradflow.closed_forms.chain_kernel import chain_weights
from gradflow.closed_forms.channel import Turn, invariants, rotate, rotation_angle
from gradflow.closed_forms.decaying_channel import decaying_turn
from gradflow.problem import Problem


class Modes(NamedTuple):
    """A start and its modes; see `Alignment`."""

    weights: Weights
    frames: tuple[Float[Array, "_ modes"], ...]
    values: Float[Array, "depth modes"]
    sxx: Float[Array, " modes"]
    b: Float[Array, " modes"]
    active: Bool[Array, " modes"]


def why_not_aligned(problem: Problem, weights: Weights) -> str | None:
    """Why layers, covariance and target have no common singular directions; None if they have."""
    found, missed = find_alignment([np.asarray(w) for w in weights], *moment_arrays(problem))
    if found is None:
        return (
            f"layers, input moment and target share no singular directions (missed by {missed:.1g})"
        )
    return None


def modes_of(problem: Problem, weights: Weights) -> Modes:
    """The modes of an aligned start.

    **Raises:** `ValueError` if it is not aligned.
    """
    found, _ = find_alignment([np.asarray(w) for w in weights], *moment_arrays(problem))
    if found is None:
        raise ValueError("weights: the network does not fall apart into modes.")
    parts = (found.values, found.sxx, found.b, found.active)
    return Modes(copied(weights), tuple(map(jnp.asarray, found.frames)), *map(jnp.asarray, parts))


class AlignedPairs(AbstractClosedForm):
    r"""Depth 2 with common singular directions: each mode is a scalar network of depth 2.

    Any imbalance in every mode, any input moment with the same directions, weight decay.
    """

    name: ClassVar[str] = "aligned pairs"
    continues: ClassVar[bool] = False

    def why_not(self, problem: Problem, weights: Weights) -> str | None:
        """Needs depth 2 and common singular directions."""
        if len(weights) != 2:
            return f"depth is {len(weights)}, not 2"
        return why_not_quadratic(problem) or why_not_aligned(problem, weights)

    def prepare(self, problem: Problem, weights: Weights) -> Any:
        """The modes, and whether weights decay."""
        decays = float(problem.weight_decay) > 0.0
        return modes_of(problem, weights), jnp.zeros(()) if decays else None

    def evaluate(self, problem: Problem, prepared: Any, t: Scalar) -> Weights:
        """Rotate every mode by its angle; what is in no mode only decays."""
        modes, decays = prepared
        rate = problem.weight_decay

        def move(w: Float[Array, "2"], sxx: Scalar, b: Scalar) -> Float[Array, "2"]:
            w1, w2 = w[:1], w[1:]
            if decays is None:
                theta = rotation_angle(*invariants(w1, w2), sxx, b, t)
                turn = Turn(theta, theta, -theta)
            else:
                turn = decaying_turn(*invariants(w1, w2), sxx, b, rate, t)
            return jnp.concatenate(rotate(w1, w2, turn))

        moved = jax.vmap(move, in_axes=(1, 0, 0), out_axes=1)(modes.values, modes.sxx, modes.b)
        shrunk = jnp.expm1(-rate * t) if decays is not None else jnp.zeros_like(t)
        kept = modes.values + shrunk * modes.values
        weights = tuple(w + shrunk * w for w in modes.weights)
        return _with_changes(modes, weights, moved - kept)


class AlignedChains(AbstractClosedForm):
    r"""Any depth $N \ge 2$ with common singular directions: each mode is a scalar chain.

    Balanced starts, whose modes follow $\dot\sigma = -N \sigma^{2 - 2/N} (s \sigma - b)$, and
    unbalanced ones; any input moment with the same directions.
    """

    name: ClassVar[str] = "aligned chains"
    continues: ClassVar[bool] = False

    def why_not(self, problem: Problem, weights: Weights) -> str | None:
        """Needs depth 2 or more, common singular directions and no weight decay."""
        if len(weights) < 2:
            return "depth is 1, not 2 or more"
        reason = why_not_quadratic(problem) or why_decaying(problem)
        if reason is None and float(jnp.min(problem.data.sxx_eigenvalues)) <= 0.0:
            reason = "the input moment is singular" if float(problem.input_variance) == 0 else None
        return reason or why_not_aligned(problem, weights)

    def prepare(self, problem: Problem, weights: Weights) -> Any:
        """The modes."""
        return modes_of(problem, weights)

    def evaluate(self, problem: Problem, prepared: Any, t: Scalar) -> Weights:
        """Move every mode as its chain."""
        move = eqx.Partial(chain_weights, t=t)
        moved = jax.vmap(move, in_axes=(1, 0, 0), out_axes=1)(
            prepared.values, prepared.sxx, prepared.b
        )
        return _with_changes(prepared, prepared.weights, moved - prepared.values)


def _with_changes(modes: Modes, weights: Weights, changes: Float[Array, "depth modes"]) -> Weights:
    """Add the changes of the modes to the layers."""
    changes = jnp.where(modes.active, changes, 0.0)
    return tuple(
        w + (top * change) @ low.T
        for w, low, top, change in zip(
            weights, modes.frames[:-1], modes.frames[1:], changes, strict=True
        )
    )
