"""Linear equations solved from products with the matrix alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.backend.types import Scalar
from gradflow.solvers.promotion import promoting

DIRECTIONS = 24
"""Directions that are searched at most."""


class _Search(NamedTuple):
    answer: Float[Array, " n"]
    rest: Float[Array, " n"]
    size: Scalar
    found: Int[Array, ""]
    directions: Float[Array, "most n"]
    images: Float[Array, "most n"]


@promoting
def solve_linear(
    matrix: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    right: Float[Array, " n"],
    tolerance: float,
) -> Float[Array, " n"]:
    r"""Solve $A x = b$ by generalised conjugate residuals.

    $x$ has the shortest rest $b - A x$ in the Krylov space, as in GMRES, of up to `DIRECTIONS`
    dimensions; beyond them the best $x$ so far is returned.

    **Arguments:**

    - `matrix`: $x \mapsto A x$.
    - `right`: $b$.
    - `tolerance`: the rest that is good enough, relative to $b$.

    **Source:** Eisenstat, Elman, Schultz, SIAM J. Numer. Anal. 20 (1983) 345.
    """
    most = min(DIRECTIONS, right.size)
    goal = tolerance * norm(right)

    def unfinished(now: _Search) -> Bool[Array, ""]:
        return (now.size > goal) & (now.found < most)

    def extend(now: _Search) -> _Search:
        direction, image = now.rest, matrix(now.rest)
        for _ in range(2):  # the second time removes what rounding left of the first
            parts = now.images @ image
            image = image - parts @ now.images
            direction = direction - parts @ now.directions
        length = norm(image)
        inverse = jnp.where(length > 0.0, 1.0 / length, 0.0)
        image, direction = image * inverse, direction * inverse
        advance = jnp.vdot(image, now.rest)
        rest = now.rest - advance * image
        return _Search(
            now.answer + advance * direction,
            rest,
            norm(rest),
            now.found + 1,
            now.directions.at[now.found].set(direction),
            now.images.at[now.found].set(image),
        )

    none = jnp.zeros((most, right.size), right.dtype)
    first = _Search(jnp.zeros_like(right), right, norm(right), jnp.array(0), none, none)
    return jax.lax.while_loop(unfinished, extend, first).answer


def norm(vector: Float[Array, " n"]) -> Scalar:
    """The Euclidean norm."""
    return jnp.sqrt(jnp.vdot(vector, vector))
