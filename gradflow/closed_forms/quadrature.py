"""Monotone time functions t(a) given by their density dt/da, and their inverse."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
NODES, WEIGHTS = 0.5 * (_NODES + 1.0), 0.5 * _WEIGHTS
ITERATIONS = 60


def panel_times(
    density: Callable[[Array], Array], edges: Float[Array, " edges"]
) -> Float[Array, " edges"]:
    """The time at every edge, 0 at the first; Gauss-Legendre on every panel."""
    widths = jnp.diff(edges)
    points = edges[:-1, None] + widths[:, None] * NODES
    pieces = widths * (jax.vmap(jax.vmap(density))(points) @ WEIGHTS)
    return jnp.concatenate([jnp.zeros(1), jnp.cumsum(pieces)])


def position_at(
    density: Callable[[Array], Array],
    edges: Float[Array, " edges"],
    times: Float[Array, " edges"],
    t: Scalar,
) -> Scalar:
    """The position `a` at time `t` within the panels: Newton's method kept in a bracket."""
    panel = jnp.clip(jnp.searchsorted(times, t, side="right") - 1, 0, edges.size - 2)
    first, width = edges[panel], edges[panel + 1] - edges[panel]
    wanted = t - times[panel]

    def improve(_: Array, state: tuple[Scalar, Scalar, Scalar]) -> tuple[Scalar, Scalar, Scalar]:
        share, low, high = state
        length = share * width
        excess = length * (jax.vmap(density)(first + length * NODES) @ WEIGHTS) - wanted
        low, high = jnp.where(excess < 0.0, share, low), jnp.where(excess < 0.0, high, share)
        step = share - excess / (density(first + length) * width)
        inside = (step >= low) & (step <= high)
        return jnp.where(inside, step, 0.5 * (low + high)), low, high

    start = (jnp.full_like(t, 0.5), jnp.zeros_like(t), jnp.ones_like(t))
    share = jax.lax.fori_loop(0, ITERATIONS, improve, start)[0]
    return first + share * width
