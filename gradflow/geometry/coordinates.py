r"""Local coordinates $(P, G_1, ..., G_{N-1})$ of weight space: what moves fast and what slowly.

Gradient flow of any loss of $P$ moves $P$ and keeps every $G_i = W_{i+1}^\top W_{i+1} -
W_i W_i^\top$; noise at a minimum keeps $P$ and moves $G$. Together they determine the weights up to
what leaves both unchanged, such as a common change of orthonormal basis of a hidden layer that
commutes with its $G_i$.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gradflow.backend.compiled import compiled
from gradflow.backend.tracing import is_complex
from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.geometry.base import check_network
from gradflow.geometry.imbalance import gram_differences
from gradflow.network import DeepLinear, end_to_end

LARGEST_DENSE_JACOBIAN = 300
"""Parameters up to which the Jacobian of the coordinates is decomposed; beyond it, LSMR."""

MAX_NEWTON_STEPS = 50
"""Gauss-Newton steps towards given coordinates; the convergence is quadratic."""

ATTAINED = 1e-11
"""Relative error of the coordinates up to which they count as attained."""

Coordinates = tuple[EndToEnd, list[Float[Array, "_ _"]]]


def local_coordinates(net: DeepLinear) -> Coordinates:
    r"""The end-to-end matrix $P$ and the balancedness $[G_1, ..., G_{N-1}]$ of a network.

    `(d_N, d_0)` and `(d_i, d_i)` each; no $G_i$ at depth 1.
    """
    check_network(net)
    return net.end_to_end, gram_differences(net.weights)


def network_at(near: DeepLinear, p: Any, g: Sequence[Any]) -> DeepLinear:
    r"""The network near a given one with a given end-to-end matrix and balancedness.

    Gauss-Newton steps of least norm, $W \leftarrow W - DF^+ F(W)$ with
    $F(W) = (P(W) - p, G_1(W) - g_1, ...)$, halved where they do not lower $|F|$. Among the
    networks with these coordinates it is one near `near`, to second order the nearest.

    **Arguments:**

    - `near`: the network to start from.
    - `p`: the end-to-end matrix, `(d_N, d_0)`, as an array or nested lists.
    - `g`: one symmetric `(d_i, d_i)` matrix for each hidden layer.

    **Raises:** `ValueError` if a shape is wrong, a matrix is not symmetric or finite, or no network
    with these coordinates is found: narrow layers cannot attain every $G$ (their number of
    independent invariants is smaller), nor widths below the rank of $p$.
    """
    check_network(near)
    target = _checked(near, p, g)
    weights, error = _solve(near.weights, target)
    if not float(error) <= ATTAINED:
        raise ValueError(
            f"near: Gauss-Newton steps from widths {near.widths} end with a relative error of "
            f"{float(error):.3g} in (p, g): no network of these widths has these coordinates, or "
            "none near this one. Move p and g in smaller steps, or take wider layers."
        )
    return DeepLinear(weights)


@compiled
def _solve(weights: Weights, target: Coordinates) -> tuple[Weights, Scalar]:
    """The solution, and the relative error of its coordinates."""
    parameters = sum(w.size for w in weights)
    rounding = float(np.finfo(weights[0].dtype).eps)
    if parameters <= LARGEST_DENSE_JACOBIAN:
        solver: lx.AbstractLinearSolver = lx.SVD(rcond=1e-9)
    else:
        solver = lx.LSMR(rtol=1e-14, atol=1e-14, conlim=1e9)

    def difference(at: Weights, args: Any = None) -> Coordinates:
        del args
        found = (end_to_end(at), gram_differences(at))
        return jax.tree.map(jnp.subtract, found, target)

    def error(at: Weights) -> Scalar:
        squares = jnp.stack([jnp.sum(w * w) for w in at])
        scale = jnp.linalg.norm(target[0]) + jnp.sqrt(jnp.prod(squares)) + jnp.sum(squares)
        return _norm(difference(at)) / scale

    def unfinished(carry: tuple[Weights, Scalar, Scalar, Int[Array, ""]]) -> Bool[Array, ""]:
        _, now, rate, steps = carry
        return (now > rounding) & (rate > 1e-3) & (steps < MAX_NEWTON_STEPS)

    def step(
        carry: tuple[Weights, Scalar, Scalar, Int[Array, ""]],
    ) -> tuple[Weights, Scalar, Scalar, Int[Array, ""]]:
        at, now, rate, steps = carry
        operator = lx.JacobianLinearOperator(difference, at)
        move = lx.linear_solve(operator, difference(at), solver, throw=False).value
        tried = jax.tree.map(lambda w, v: w - rate * v, at, move)
        ahead = error(tried)
        better = ahead < now
        at = jax.tree.map(lambda new, old: jnp.where(better, new, old), tried, at)
        rate = jnp.where(better, jnp.minimum(2.0 * rate, 1.0), 0.5 * rate)
        return at, jnp.minimum(ahead, now), rate, steps + 1

    carry = (weights, error(weights), jnp.ones(()), jnp.zeros((), int))
    at, now, _, _ = jax.lax.while_loop(unfinished, step, carry)
    return at, now


def _checked(near: DeepLinear, p: Any, g: Sequence[Any]) -> Coordinates:
    for name, given in (("p", p), ("g", list(g))):
        if is_complex(given):
            raise TypeError(f"{name} must hold real numbers; got complex ones.")
    end = jnp.asarray(p, jnp.result_type(float))
    shape = (near.widths[-1], near.widths[0])
    if end.shape != shape or not bool(jnp.all(jnp.isfinite(end))):
        raise ValueError(f"p must be a {shape} matrix of finite numbers; got shape {end.shape}.")
    if len(g) != near.depth - 1:
        raise ValueError(
            f"g must have one matrix for each of the {near.depth - 1} hidden layers; got {len(g)}."
        )
    grams = [jnp.asarray(matrix, jnp.result_type(float)) for matrix in g]
    for i, (matrix, width) in enumerate(zip(grams, near.widths[1:-1], strict=True), start=1):
        if matrix.shape != (width, width) or not bool(jnp.all(jnp.isfinite(matrix))):
            raise ValueError(
                f"g: G_{i} must be a {(width, width)} matrix of finite numbers; got shape "
                f"{matrix.shape}."
            )
        skew = float(jnp.max(jnp.abs(matrix - matrix.T)))
        if skew > ATTAINED * (1.0 + float(jnp.max(jnp.abs(matrix)))):
            raise ValueError(
                f"g: G_{i} must be symmetric; entries differ from their mirror images by {skew:.3g}"
                f". Pass (G + G.T) / 2."
            )
    return end, grams


def _norm(tree: Any) -> Scalar:
    return jnp.sqrt(sum((jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)), jnp.zeros(())))
