"""The stage equations of an implicit Runge-Kutta step, solved to rounding."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.backend.types import Scalar
from gradflow.solvers.krylov import norm, solve_linear

Vector: TypeAlias = Float[Array, " n"]

WINDOW = 8
"""Moves that the fixed-point iteration remembers."""

SURE = 1.0 / 64.0
"""A rest below this many units of rounding ends the fixed-point iteration at once."""

STUCK = 16.0
"""A rest below this many units of rounding may end it when it stops shrinking."""

CONTRACTING = 1.5
"""Largest change of the rest per move up to which a plain iteration is sure to contract."""

HOPELESS = 1e3
"""Growth of the rest at which the fixed-point iteration is given up."""

STUCK_NEWTON = 1e3
"""A correction below this many units of rounding may end Newton's method if it stops shrinking."""

FORCING = 1e-4
"""Accuracy of the linear equations of Newton's method, relative to their right-hand sides."""

SHORTEST = 1.0 / 64.0
"""Part of a correction of Newton's method that is tried before it is taken regardless."""

EXACT = 1e-12
"""Accuracy of the linear equations of derivatives."""

MAX_SIMPLE = 120
MAX_NEWTON = 50


def solve_stages(
    slopes_at: Callable[[Vector], Vector], guess: Vector, step: Scalar, scale: Scalar
) -> tuple[Vector, Bool[Array, ""]]:
    r"""Solve $k = F(k)$ for the slopes $k$ at all stages, until rounding stops the progress.

    Accelerated fixed-point iteration, which costs one evaluation of $F$ an iteration; where it
    fails, Newton's method with a matrix-free linear solver, from the same guess. Differentiable in
    whatever $F$ depends on, by the implicit function theorem.

    **Arguments:**

    - `slopes_at`: $F$, the slopes at the stages that belong to given slopes.
    - `guess`: where to start.
    - `step`: the length of the step; what is left of the equations counts times the step.
    - `scale`: the size of the state, which rounding is relative to.

    **Returns:** the slopes and whether they converged.
    """
    unit = scale * jnp.finfo(scale.dtype).eps

    def residual(slopes: Vector) -> Vector:
        return slopes_at(slopes) - slopes

    def size(slopes: Vector) -> Scalar:
        return jnp.abs(step) * jnp.max(jnp.abs(slopes), initial=0.0)

    def solve(_: Any, guess: Vector) -> tuple[Vector, Scalar]:
        slopes, converged = _fixed_point(residual, guess, size, unit)
        start = jnp.where(converged, slopes, guess)
        slopes, converged = _newton(residual, start, converged, size, unit)
        return slopes, converged.astype(unit.dtype)  # JAX does not differentiate beside a bool

    def tangent_solve(matrix: Callable[[Vector], Vector], right: Vector) -> Vector:
        def solve(matrix: Callable[[Vector], Vector], right: Vector) -> Vector:
            return solve_linear(matrix, right, EXACT)

        return jax.lax.custom_linear_solve(matrix, right, solve, transpose_solve=solve)

    solution = jax.lax.custom_root(residual, guess, solve, tangent_solve, has_aux=True)
    slopes, converged = cast(tuple[Vector, Scalar], solution)
    return slopes, converged > 0.5


class _Fixed(NamedTuple):
    slopes: Vector
    rest: Vector
    size: Scalar
    best: Scalar
    stretch: Scalar
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    moves: Float[Array, "most n"]
    changes: Float[Array, "most n"]


def _fixed_point(
    residual: Callable[[Vector], Vector],
    guess: Vector,
    size_of: Callable[[Vector], Scalar],
    unit: Scalar,
) -> tuple[Vector, Bool[Array, ""]]:
    """Anderson acceleration with orthonormal changes of the rest, the oldest one replaced.

    It is relaxed by 2 / (1 + q), where q is the largest change of the rest per move so far: optimal
    for a symmetric negative derivative, and without it the window would have to be much longer.

    **Source:** Walker, Ni, SIAM J. Numer. Anal. 49 (2011) 1715.
    """
    most = min(WINDOW, guess.size)

    def unfinished(now: _Fixed) -> Bool[Array, ""]:
        hopeful = now.size < HOPELESS * now.best
        return ~now.converged & (now.iterations < MAX_SIMPLE) & hopeful

    def improve(now: _Fixed) -> _Fixed:
        parts = now.changes @ now.rest
        relaxed = 2.0 / (1.0 + now.stretch) * (now.rest - parts @ now.changes)
        move = relaxed - parts @ now.moves
        slopes = now.slopes + move
        rest = residual(slopes)
        size = size_of(rest)
        change = rest - now.rest
        length = norm(move)
        stretch = norm(change) / jnp.where(length > 0.0, length, 1.0)
        stretch = jnp.where(size > STUCK * unit, stretch, 0.0)  # rounding says nothing
        parts = now.changes @ change
        change = change - parts @ now.changes
        move = move - parts @ now.moves
        length = norm(change)
        inverse = jnp.where(length > 0.0, 1.0 / length, 0.0)
        slot = now.iterations % most
        stuck = (size >= now.best) & (size <= STUCK * unit)
        return _Fixed(
            slopes,
            rest,
            size,
            jnp.minimum(size, now.best),
            jnp.maximum(stretch, now.stretch),
            now.iterations + 1,
            stuck | (size <= SURE * unit),
            now.moves.at[slot].set(inverse * move),
            now.changes.at[slot].set(inverse * change),
        )

    none = jnp.zeros((most, guess.size), guess.dtype)
    rest = residual(guess)
    size = size_of(rest)
    stretch = jnp.ones_like(size)
    first = _Fixed(guess, rest, size, size, stretch, jnp.array(0), size <= SURE * unit, none, none)
    last = jax.lax.while_loop(unfinished, improve, first)
    # One more plain iteration is free. Where it contracts it removes what acceleration made of
    # rounding errors, which always point the same way and would add up over many steps.
    contracts = last.converged & (last.stretch < CONTRACTING)
    return last.slopes + jnp.where(contracts, last.rest, 0.0), last.converged


class _Newton(NamedTuple):
    slopes: Vector
    size: Scalar
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def _newton(
    residual: Callable[[Vector], Vector],
    start: Vector,
    converged: Bool[Array, ""],
    size_of: Callable[[Vector], Scalar],
    unit: Scalar,
) -> tuple[Vector, Bool[Array, ""]]:
    """Newton's method with corrections halved while they make the rest longer.

    It is judged by its corrections: those of a stiff equation do not feel rounding errors of the
    vector field, which the rest does.
    """

    def unfinished(now: _Newton) -> Bool[Array, ""]:
        return ~now.converged & (now.iterations < MAX_NEWTON) & ~jnp.isnan(now.size)

    def improve(now: _Newton) -> _Newton:
        rest, derivative = jax.linearize(residual, now.slopes)
        change = solve_linear(lambda v: -derivative(v), rest, FORCING)
        size = size_of(change)
        far = size > STUCK_NEWTON * unit

        def too_long(part: Scalar) -> Bool[Array, ""]:
            shorter = norm(residual(now.slopes + part * change)) < norm(rest)
            return far & (part > SHORTEST) & ~shorter

        change = jax.lax.while_loop(too_long, lambda part: part / 2, jnp.ones_like(unit)) * change
        stuck = (size >= now.size) & (size <= STUCK_NEWTON * unit)
        sure = size <= SURE * unit
        return _Newton(now.slopes + change, size, now.iterations + 1, stuck | sure)

    first = _Newton(start, jnp.full_like(unit, jnp.inf), jnp.array(0), converged)
    last = jax.lax.while_loop(unfinished, improve, first)
    return last.slopes, last.converged
