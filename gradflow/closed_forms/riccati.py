"""Whitened networks of depth 2 whose balancedness is a multiple of the identity."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar, Weights
from gradflow.closed_forms.base import (
    AbstractClosedForm,
    copied,
    mean_decay,
    moment_arrays,
    why_not_quadratic,
)
from gradflow.problem import Problem

TOLERANCE = 1e-12
"""How far from a multiple of the identity, relative, moment and balancedness may be."""

STAGES = 12
ITERATIONS = 16


def _gauss_matrix(stages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes in (0, 1), integrals of the interpolant up to each node, and up to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(stages)
    degrees = np.arange(stages)
    legendre = np.polynomial.legendre.legvander(nodes, stages)
    # Coefficients of the interpolant in Legendre polynomials, then their integrals from -1.
    to_coefficients = (degrees[:, None] + 0.5) * (legendre[:, :stages] * weights[:, None]).T
    below = np.concatenate([-np.ones((stages, 1)), legendre[:, : stages - 1]], axis=1)
    integrals = (legendre[:, 1:] - below) / (2.0 * degrees + 1.0)
    integrals[:, 0] = nodes + 1.0
    return 0.5 * (nodes + 1.0), 0.5 * integrals @ to_coefficients, 0.5 * weights


NODES, PARTIAL, FULL = _gauss_matrix(STAGES)


class Riccati(AbstractClosedForm):
    r"""Depth 2, $\bar S = c I$ and $W_2^\top W_2 - W_1 W_1^\top = \gamma I$, any shapes.

    $Q = (W_1^\top; W_2)$ obeys $\dot Q = F Q - \tfrac c2 Q Q^\top Q$, and
    $Q(t) = e^{Ft} Q_0 C(t)$ with the matrix Riccati solution
    (docs/theory.md section 8; Braun et al. 2022, Domine et al. 2024)

    $$C C^\top = X = \Big( I + c\, Q_0^\top \int_0^t e^{2Fs} ds\, Q_0 \Big)^{-1}.$$

    That fixes $Q Q^\top$, hence $P$; the rotation of the hidden layer left over is carried along by
    $\dot C = \tfrac12 \dot X X^{-1} C$, which has no elementary solution. Both in pieces of the
    time short enough that no digits are lost, the second by Gauss quadrature to rounding. With
    weight decay only for $\gamma = 0$.
    """

    name: ClassVar[str] = "riccati"
    continues: ClassVar[bool] = True

    def why_not(self, problem: Problem, weights: Weights) -> str | None:
        """Needs depth 2, a white input moment and a start that is balanced up to the identity."""
        if len(weights) != 2:
            return f"depth is {len(weights)}, not 2"
        reason = why_not_quadratic(problem)
        if reason is not None:
            return reason
        sxx, _ = moment_arrays(problem)
        missed = _distance_from_identity(sxx) / (np.linalg.norm(sxx, 2) or 1.0)
        if missed > TOLERANCE or sxx[0, 0] <= 0.0:
            return "the input moment is not a positive multiple of the identity"
        w1, w2 = (np.asarray(w) for w in weights)
        gram = w2.T @ w2 - w1 @ w1.T
        size = max(np.linalg.norm(w1, 2), np.linalg.norm(w2, 2)) ** 2 or 1.0
        missed = _distance_from_identity(gram) / size
        if missed > TOLERANCE:
            return (
                "W_2^T W_2 - W_1 W_1^T is not a multiple of the identity (missed by "
                f"{missed:.1g} of the squared norm)"
            )
        rate, gamma = float(problem.weight_decay), float(np.mean(np.diag(gram)))
        if rate != 0.0 and abs(gamma) > TOLERANCE * size:
            return (
                f"weight decay {rate:g} needs a balanced start, but W_2^T W_2 - W_1 W_1^T is "
                f"{gamma:.3g} I"
            )
        return None

    def prepare(self, problem: Problem, weights: Weights) -> Any:
        """The weights."""
        return copied(weights)

    def evaluate(self, problem: Problem, prepared: Any, t: Scalar) -> Weights:
        """Piece by piece, each as long as the fastest rate allows."""
        w1, w2 = prepared
        d_in, d_hidden = w1.shape[1], w1.shape[0]
        c, rate = problem.input_moment[0, 0], problem.weight_decay
        gamma = jnp.where(rate > 0.0, 0.0, (jnp.sum(w2**2) - jnp.sum(w1**2)) / d_hidden)
        syx = problem.data.syx
        half = 0.5 * c * gamma
        f = jnp.block(
            [
                [-half * jnp.eye(d_in), syx.T],
                [syx, half * jnp.eye(w2.shape[0])],
            ]
        ) - rate * jnp.eye(d_in + w2.shape[0])
        values, vectors = jnp.linalg.eigh(f)
        fastest = jnp.max(jnp.abs(values))

        def unfinished(state: tuple[Array, Scalar]) -> Array:
            q, done = state
            return (done < t) & jnp.all(jnp.isfinite(q))

        def piece(state: tuple[Array, Scalar]) -> tuple[Array, Scalar]:
            q, done = state
            longest = 1.0 / (fastest + c * jnp.sum(q * q))
            last = longest >= t - done
            dt = jnp.where(last, t - done, longest)
            return _advance(q, values, c, dt), jnp.where(last, t, done + dt)

        q0 = vectors.T @ jnp.concatenate([w1.T, w2])
        q = vectors @ jax.lax.while_loop(unfinished, piece, (q0, jnp.zeros_like(t)))[0]
        moved = t > 0.0
        return jnp.where(moved, q[:d_in].T, w1), jnp.where(moved, q[d_in:], w2)


def _advance(
    q: Float[Array, "n hidden"], values: Float[Array, " n"], c: Scalar, dt: Scalar
) -> Float[Array, "n hidden"]:
    """Q after a short time, in the eigenbasis of F."""
    times = dt * NODES
    rates = 2.0 * values * times[:, None]
    slopes = c * jnp.einsum("na,sn,nb->sab", q, jnp.exp(rates), q)
    areas = times[:, None] * mean_decay(-rates)
    inner = jnp.eye(q.shape[1]) + c * jnp.einsum("na,sn,nb->sab", q, areas, q)
    generators = -0.5 * dt * jnp.linalg.solve(inner, slopes)
    identity = jnp.broadcast_to(jnp.eye(q.shape[1]), generators.shape)

    def improve(_: Array, turns: Array) -> Array:
        return identity + jnp.einsum("rs,sab,sbc->rac", PARTIAL, generators, turns)

    turns = jax.lax.fori_loop(0, ITERATIONS, improve, identity)
    change = jnp.einsum("s,sab,sbc->ac", FULL, generators, turns)
    grown = jnp.expm1(values * dt)[:, None] * q
    return q + (grown + (q + grown) @ change)


def _distance_from_identity(matrix: np.ndarray) -> float:
    """Spectral distance to the nearest multiple of the identity."""
    mean = np.trace(matrix) / len(matrix)
    return float(np.linalg.norm(matrix - mean * np.eye(len(matrix)), 2))
