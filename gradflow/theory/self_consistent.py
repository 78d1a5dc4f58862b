r"""Fluctuations that feed the noise that makes them: $u = b + F u$ with a symmetric $F$.

$F$ takes covariances to covariances, so the solution is the covariance $\sum_k F^k b$ where this
sum converges, and none where it does not: $u - b$ would be none. An eigenvalue of $F$ of largest
modulus on the span of all $F^k b$ is positive, for $F^k b$ grows with it and stays a covariance. So
the sum converges where $1 - F$ is positive on that span, which is where conjugate gradients go:
the curvature of each of their directions says it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.backend.types import Scalar

MOST_STEPS = 300
"""Products with $F$ until the equation is given up."""


class _Search(NamedTuple):
    """Conjugate gradients on their way; `rest` is the squared norm of the residual."""

    solution: Float[Array, "n n"]
    residual: Float[Array, "n n"]
    direction: Float[Array, "n n"]
    rest: Scalar
    positive: Bool[Array, ""]
    steps: Int[Array, ""]


def self_consistent(
    feed: Callable[[Float[Array, "n n"]], Float[Array, "n n"]], b: Float[Array, "n n"]
) -> Float[Array, "n n"]:
    """The solution of $u = b + F u$; NaN where it is no covariance or none is found.

    **Arguments:**

    - `feed`: $F$ on symmetric matrices, linear and symmetric.
    - `b`: a covariance.
    """
    eps = float(jnp.finfo(b.dtype).eps)

    def equation(u: Float[Array, "n n"]) -> Float[Array, "n n"]:
        return u - feed(u)

    def solve(
        matvec: Callable[[Float[Array, "n n"]], Float[Array, "n n"]], b: Float[Array, "n n"]
    ) -> Float[Array, "n n"]:
        def unfinished(now: _Search) -> Bool[Array, ""]:
            return now.positive & (now.rest > goal) & (now.steps < MOST_STEPS)  # NaN ends it

        def step(now: _Search) -> _Search:
            image = matvec(now.direction)
            curvature = jnp.sum(now.direction * image)
            length = now.rest / curvature
            residual = now.residual - length * image
            rest = jnp.sum(residual * residual)
            return _Search(
                now.solution + length * now.direction,
                residual,
                residual + rest / now.rest * now.direction,
                rest,
                curvature > 0.0,
                now.steps + 1,
            )

        norm = jnp.max(jnp.abs(b))
        unit = b / jnp.where(norm > 0.0, norm, 1.0)
        size = jnp.sum(unit * unit)
        goal = (1e2 * eps) ** 2 * size
        start = _Search(jnp.zeros_like(b), unit, unit, size, jnp.array(True), jnp.array(0))
        end = jax.lax.while_loop(unfinished, step, start)
        solved = end.positive & (end.rest <= eps * size)
        return jnp.where(solved, norm * end.solution, jnp.nan)

    return jax.lax.custom_linear_solve(equation, b, solve, symmetric=True)
