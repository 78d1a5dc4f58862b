"""Sums over the layers of a network, with or without a path axis."""

import jax.numpy as jnp

from gradflow.backend.types import Scalar, Weights
from gradflow.problem import Problem


def added(weights: Weights, update: Weights) -> Weights:
    """$W_i + U_i$."""
    return tuple(w + u for w, u in zip(weights, update, strict=True))


def minus_scaled(weights: Weights, h: Scalar, gradient: Weights) -> Weights:
    """$W_i - h g_i$."""
    return tuple(w - h * g for w, g in zip(weights, gradient, strict=True))


def penalty_gradient(problem: Problem, weights: Weights) -> Weights:
    """The gradient of all penalties together; zeros if there are none."""
    return problem.add_penalties(tuple(jnp.zeros_like(w) for w in weights), weights)


def over_all_paths(layers: Weights | None, weights: Weights) -> Weights:
    """One array a layer, repeated for every path of an ensemble; None for zeros."""
    if layers is None:
        return tuple(jnp.zeros_like(w) for w in weights)
    return tuple(
        jnp.broadcast_to(v[..., None], w.shape).astype(w.dtype)
        for v, w in zip(layers, weights, strict=True)
    )
