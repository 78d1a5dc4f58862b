"""Gauss-Legendre collocation: a solver that keeps quadratic invariants."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from gradflow.solvers.collocation import gauss
from gradflow.solvers.promotion import promoting
from gradflow.solvers.stage_equations import solve_stages

MANY = 1000
"""Size of the state from which on stages are evaluated one by one: XLA's batched products of
matrices are slow on CPUs except for small ones."""

FURTHEST = 3.0
"""Steps grown by more than this factor are not predicted from the step before."""

Vector = Float[Array, " n"]


class Memory(NamedTuple):
    """What one step hands to the next.

    - `carry`: what rounding cut off the state, for compensated summation.
    - `slope`: the vector field at the end of the step.
    - `slopes`: the slopes at its stages, `(s, n)`.
    - `length`: its length; 0 before the first.
    """

    carry: Vector
    slope: Vector
    slopes: Float[Array, "s n"]
    length: Any


class GaussLegendre(diffrax.AbstractAdaptiveSolver[Memory]):
    r"""Collocation at the Gauss points, which keeps every quadratic invariant to rounding.

    $$ k_i = f\Big(t_0 + c_i h,\; y_0 + h \sum_j a_{ij} k_j\Big), \qquad
       y_1 = y_0 + h \sum_i b_i k_i $$

    If the equation $\dot y = f$ conserves $y^\top C y + d^\top y$, so does every step, whatever
    its length: along gradient flow $G_i = W_{i+1}^\top W_{i+1} - W_i W_i^\top$ for every $i$. The
    stage equations are solved until rounding stops the progress, and the steps are added with
    compensated summation.

    The method is A-stable and symmetric, but does not damp what it does not resolve: components
    with $h \lambda \gg 1$ keep their size and change sign.

    **Arguments:**

    - `order`: 2, 4 or 6: one, two or three stages.

    Takes an `ODETerm` with any pytree of arrays as state; complex ones are taken as pairs of real
    ones, so the vector field need not be holomorphic. The error estimate is the change of
    the defect of the collocation polynomial; it shrinks like $h^{s+2}$ with $s$ stages, that is
    with power 3, 4, 5 of the step, where the error of a step itself has 3, 5, 7. A step whose stage
    equations do not converge has error estimate infinity, so that adaptive steps are tried again
    shorter; with constant steps the solve ends with `RESULTS.nonlinear_divergence`. Between the
    ends of steps the solution is interpolated by cubics, which keep invariants only as well as they
    approximate.

    **Raises:** `ValueError` for another order.

    **Source:** Hairer, Lubich, Wanner, "Geometric Numerical Integration", IV.2.1 and VIII.6.
    """

    stages: int = eqx.field(static=True)

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation
    )

    def __init__(self, order: int = 6):
        if order not in (2, 4, 6):
            raise ValueError(f"GaussLegendre.order must be 2, 4 or 6; got {order}.")
        self.stages = order // 2

    def order(self, terms: Any) -> int:
        """Twice the number of stages."""
        del terms
        return 2 * self.stages

    def error_order(self, terms: Any) -> int:
        """The power of the step with which the error estimate shrinks."""
        del terms
        return self.stages + 2

    @promoting
    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> Memory:
        """No step before this one: the first prediction is a constant slope."""
        del t1
        state, _ = _as_vector(y0)
        slope, _ = _as_vector(terms.vf(t0, y0, args))
        slopes = jnp.broadcast_to(slope, (self.stages, *slope.shape))
        return Memory(jnp.zeros_like(state), slope, slopes, jnp.zeros_like(t0 - t0))

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        """The vector field."""
        return terms.vf(t0, y0, args)

    @promoting
    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Any,
        solver_state: Memory,
        made_jump: Any,
    ) -> tuple[Any, Any, dict[str, Any], Memory, diffrax.RESULTS]:
        """Solve the stage equations from the extrapolation of the last step, and update."""
        rule = gauss(self.stages)
        start, unravel = _as_vector(y0)
        length = terms.contr(t0, t1)

        def field(t: Any, state: Vector) -> Vector:
            return _as_vector(terms.vf(t, unravel(state), args))[0]

        memory = solver_state
        if made_jump is not False:
            slope = jax.lax.cond(made_jump, lambda: field(t0, start), lambda: memory.slope)
            before = jnp.where(made_jump, 0.0, memory.length)
            memory = memory._replace(slope=slope, length=before)

        times = t0 + rule.c * (t1 - t0)

        shape = (self.stages, start.size)

        def slopes_at(flat: Vector) -> Vector:
            moved = rule.a @ flat.reshape(shape)
            moved = start + (memory.carry + length * moved)
            if start.size < MANY:
                return jax.vmap(field)(times, moved).ravel()
            return jnp.concatenate([field(t, y) for t, y in zip(times, moved, strict=True)])

        guess = self._predicted(memory, t1 - t0)
        travel = jnp.abs(length) * jnp.max(jnp.abs(guess), initial=0.0)
        scale = jnp.maximum(jnp.max(jnp.abs(start), initial=0.0), travel)
        slopes, converged = solve_stages(slopes_at, guess.ravel(), length, scale)
        slopes = slopes.reshape(shape)

        increment = memory.carry + length * jnp.tensordot(rule.b, slopes, axes=1)
        end = jnp.where(converged, start + increment, jnp.nan)
        slope, derivative = jax.linearize(lambda state: field(t1, state), end)
        error = self._error(length, memory.slope, slopes, slope, derivative)
        error = jnp.where(converged, error, jnp.inf)
        y1 = unravel(end)
        dense = {
            "y0": y0,
            "y1": y1,
            "k0": unravel(length * memory.slope),
            "k1": unravel(length * slope),
        }
        new = Memory((start - end) + increment, slope, slopes, t1 - t0)
        result = diffrax.RESULTS.where(
            converged,
            diffrax.RESULTS.successful,
            diffrax.RESULTS.promote(optimistix.RESULTS.nonlinear_divergence),
        )
        return y1, unravel(error), dense, new, result

    def _predicted(self, memory: Memory, length: Any) -> Float[Array, "s n"]:
        """The slope polynomial of the last step at the stages of this one."""
        rule = gauss(self.stages)
        ratio = length / jnp.where(memory.length == 0, jnp.inf, memory.length)
        ratio = jnp.where(ratio <= FURTHEST, ratio, 0.0)  # 0 predicts the slope at the start
        powers = (ratio * rule.c)[:, None] ** np.arange(self.stages + 1)
        weights = powers @ rule.inverse_powers
        return (
            jnp.tensordot(weights[:, :-1], memory.slopes, axes=1) + weights[:, -1:] * memory.slope
        )

    def _error(
        self,
        length: Any,
        first: Vector,
        slopes: Float[Array, "s n"],
        last: Vector,
        derivative: Callable[[Vector], Vector],
    ) -> Vector:
        r"""How much the defect $f(u) - \dot u$ of the collocation polynomial $u$ changes.

        Its change over the step alone would be blind for linear equations, its change along the
        vector field for quadratures.
        """
        rule = gauss(self.stages)
        after = jnp.concatenate([slopes, last[None]])
        whole = jnp.concatenate([first[None], after])
        along = length * derivative(jnp.tensordot(rule.defect, after, axes=1))
        across = jnp.tensordot(rule.difference, whole, axes=1)
        return rule.error * length * (jnp.abs(along) + jnp.abs(across))


def _as_vector(tree: Any) -> tuple[Vector, Callable[[Vector], Any]]:
    """A state as one real vector, complex arrays as their two parts; and the way back."""
    if not any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(tree)):
        return ravel_pytree(tree)
    leaves, structure = jax.tree.flatten(tree)
    vector, unravel = ravel_pytree(
        [(leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,) for leaf in leaves]
    )

    def restore(vector: Vector) -> Any:
        parts = [p[0] if len(p) == 1 else jax.lax.complex(*p) for p in unravel(vector)]
        return jax.tree.unflatten(structure, parts)

    return vector, restore
