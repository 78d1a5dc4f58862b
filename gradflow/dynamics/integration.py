"""Ordinary differential equations of ensembles, solved link by link with adaptive steps."""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from gradflow.backend.lapack_batches import decomposed_together, decomposes
from gradflow.backend.products import in_groups
from gradflow.backend.types import Scalar, Weights
from gradflow.dynamics.base import MAX_STEPS, End, Progress, over_paths
from gradflow.problem import Problem
from gradflow.solvers.base import largest
from gradflow.solvers.gauss_legendre import GaussLegendre
from gradflow.solvers.relative_errors import RelativeErrors
from gradflow.solvers.rest import RestController, RestMemory, is_at_rest
from gradflow.solvers.resumable import ResumableController

PROPORTIONAL, INTEGRAL = 0.2, 0.4
"""Coefficients of the step control; without a proportional part explicit steps at the edge of their
stability, where most steps of a flow are, are rejected four times as often."""

CHECKPOINTS = 16
"""States of a solve between two saved times that a derivative in reverse mode keeps."""

MOST_STEPS = 1_000_000
"""Solver steps between two times of `solve` before it gives up."""

FEW, FEWER, FEWEST = 64, 16, 4
"""Solver steps between two looks at what is left to do: of small states, of those whose layers are
kept apart, and of fields that decompose matrices."""

COLLAPSED = 1e-5
"""Share of the longest average step so far below which the steps of a path are much too short."""

SHORT_STEPS = 2000
"""So many short steps in a row are a collapse."""

RUNAWAY = 1e-6
"""Relative change of the state within one step of a collapsed length above which it explodes."""

BACKWARD = diffrax.RecursiveCheckpointAdjoint(CHECKPOINTS)
"""How a solve is differentiated, unless forwards."""

MANY = 1000
"""Size of the state from which on its layers are kept apart: putting them together costs more."""

OVERFLOWS = 1.0 / 3.0
"""Power of the largest float: from such numbers in a state on any step would overflow."""

VectorField: TypeAlias = Callable[[Any, Any, Problem], Any]
"""The time derivative of the state of one path, a function of (t, state, problem)."""


class SolverMemory(eqx.Module):
    """What a solve leaves to the next one; every array is `(R,)`.

    - `planned`: the length of the step that would come next; 0 lets the solver choose.
    - `rest`: see `gradflow.solvers.RestController`.
    - `smallest`: least size of a row or column of weights at the start that is not 0, see
        `gradflow.solvers.RelativeErrors`.
    - `size`: the largest weight at the start.
    - `longest`, `short`: the longest average step so far, and how many steps in a row have been
        much shorter.
    """

    planned: Float[Array, "*paths"]
    rest: RestMemory
    smallest: Float[Array, "*paths"]
    size: Float[Array, "*paths"]
    longest: Float[Array, "*paths"]
    short: Int[Array, "*paths"]

    @classmethod
    def at_start(cls, weights: Weights) -> "SolverMemory":
        """That of the weights at the start."""
        nothing = jnp.zeros((weights[0].shape[-1],), weights[0].dtype)
        count = jnp.zeros(nothing.shape, jnp.int32)
        rest = RestMemory(count, jnp.copy(count), jnp.full_like(nothing, jnp.inf))
        size = over_paths(largest)(weights)
        return cls(
            nothing, rest, smallest_size(weights), size, jnp.copy(nothing), jnp.zeros_like(count)
        )


class Solved(eqx.Module):
    """What a solve has come to: the states, at which flow times `(R,)` and in how many steps.

    `failed` says that no shorter step helps.
    """

    states: Any
    memory: SolverMemory
    time: Float[Array, "*paths"]
    steps: Int[Array, "*paths"]
    failed: Bool[Array, "*paths"]

    @classmethod
    def at_start(cls, states: Any, memory: SolverMemory) -> "Solved":
        """That of states at flow time 0."""
        return _standing((states, memory, jnp.zeros_like(memory.planned)))


def smallest_size(weights: Weights) -> Float[Array, " paths"]:
    r"""$\min_k \max_l |(W_i)_{kl}|$ over rows and columns that are not 0; infinite if all are."""
    sizes = [jnp.max(jnp.abs(w), axis=axis) for w in weights for axis in (0, 1)]
    least = [jnp.min(jnp.where(s > 0.0, s, jnp.inf), axis=0) for s in sizes]
    return jax.lax.stop_gradient(jnp.min(jnp.stack(least), axis=0))


def advance_a_little(
    field: VectorField,
    solver: diffrax.AbstractSolver,
    rtol: Scalar,
    atol: Scalar,
    problem: Problem,
    states: Any,
    memory: SolverMemory,
    progress: Progress,
    stop: Array,
) -> tuple[Any, SolverMemory, Progress]:
    """Take a few steps with every path that may still move; arguments as of `integrate`.

    A path ends where it has taken `MAX_STEPS`, where its step size collapses, or where it explodes:
    where its step size collapses though the state has grown and still changes in every step.
    """
    one_path = jax.tree.map(lambda y: y[..., 0], states)
    few = FEW if sum(leaf.size for leaf in jax.tree.leaves(one_path)) < MANY else FEWER
    if decomposes(lambda y: field(stop, y, problem), one_path):
        few = FEWEST
    moves = progress.may_move(stop)
    start = jnp.where(moves, progress.time, stop)
    solved = integrate(
        field, solver, rtol, atol, problem, states, memory, start, stop, few, diffrax.ForwardMode()
    )
    steps = progress.steps + solved.steps

    # Steps that saved times cut short say nothing.
    whole = moves & (solved.steps >= few)
    average = (solved.time - start) / few
    short = jnp.where(average < COLLAPSED * memory.longest, memory.short + few, 0)
    memory = eqx.tree_at(
        lambda m: (m.longest, m.short),
        solved.memory,
        (
            jnp.where(whole, jnp.maximum(memory.longest, average), memory.longest),
            jnp.where(whole, short, memory.short),
        ),
    )

    def explodes(state: Any, time: Array, memory: SolverMemory) -> Array:
        velocity, size = largest(field(time, state, problem)), largest(state)
        changes = ~(velocity * memory.planned <= RUNAWAY * size)
        overflows = ~jnp.isfinite(velocity) | (size > float(jnp.finfo(size.dtype).max) ** OVERFLOWS)
        return overflows | (changes & ~(size <= memory.size))

    collapsed = moves & (solved.failed | (memory.short >= SHORT_STEPS))
    runaway = jax.lax.cond(
        jnp.any(collapsed),
        lambda: in_groups(
            lambda group: over_paths(explodes)(*group),
            (solved.states, solved.time, memory),
            decomposed_together(tuple(jax.tree.leaves(states))) if few == FEWEST else moves.size,
        ),
        lambda: jnp.zeros_like(collapsed),
    )
    limit = moves & (solved.time < stop) & (steps >= MAX_STEPS)
    end = jnp.where(limit, End.STEP_LIMIT, progress.end)
    end = jnp.where(collapsed, jnp.where(runaway, End.DIVERGED, End.COLLAPSE), end)
    time = jnp.where(moves, solved.time, progress.time)
    allowed = jnp.maximum(progress.allowed - solved.steps, 0)
    return solved.states, memory, Progress(time, steps, allowed, end)


def integrate(
    field: VectorField,
    solver: diffrax.AbstractSolver,
    rtol: Scalar,
    atol: Scalar,
    problem: Problem,
    states: Any,
    memory: SolverMemory,
    start: Float[Array, " paths"],
    stop: Array,
    most_steps: int = MOST_STEPS,
    adjoint: diffrax.AbstractAdjoint = BACKWARD,
) -> Solved:
    """Integrate every path from its flow time `start` towards `stop`, each with its own steps.

    A path that is there already costs nothing, and one that comes to rest is there at once.

    **Arguments:**

    - `states`: a pytree of arrays that end in the path axis.
    - `most_steps`: of every path.
    - `adjoint`: how the solve can be differentiated.
    """

    def solve(state: Any, memory: SolverMemory, start: Scalar, begin: Any) -> Solved:
        # Solver time goes from 0 to 1. diffrax rounds the end of a solve down a hundred times,
        # which takes as long as a step of a small equation; for a constant the compiler does it.
        length = stop - start
        unit = jnp.where(length > 0.0, length, 1.0)  # of solver time; nothing is divided by 0
        # Step lengths carry no derivative, and that of an infinite one would be NaN.
        unit, memory = jax.lax.stop_gradient((unit, memory))
        state, restore = _flattened(state)

        def scaled_field(s: Any, y: Any, problem: Problem) -> Any:
            velocity = field(start + length * s, restore(y), problem)
            return _flattened(jax.tree.map(lambda v: length * v, velocity))[0]

        pid = diffrax.PIDController(rtol, atol, pcoeff=PROPORTIONAL, icoeff=INTEGRAL)
        relative = RelativeErrors(pid, memory.smallest)
        rest = eqx.tree_at(lambda r: r.stable, memory.rest, memory.rest.stable / unit)
        resumable = ResumableController(relative, memory.planned / unit, origin=start / unit)
        solution = diffrax.diffeqsolve(
            _terms(solver, scaled_field),
            solver,
            t0=begin,
            t1=1.0,
            dt0=None,
            y0=state,
            args=problem,
            saveat=diffrax.SaveAt(t1=True, controller_state=True),
            stepsize_controller=RestController(resumable, rest, not is_implicit),
            adjoint=adjoint,
            max_steps=most_steps,
            throw=False,
        )
        (_, planned), rest, *_ = cast(tuple[Any, ...], solution.controller_state)
        planned, rest = jax.lax.stop_gradient((planned, rest))
        rest = eqx.tree_at(lambda r: r.stable, rest, unit * rest.stable)
        assert solution.ts is not None
        arrived = (solution.result == diffrax.RESULTS.successful) | is_at_rest(rest.still)
        time = jnp.where(arrived, stop, start + length * solution.ts[0])
        memory = eqx.tree_at(lambda m: (m.planned, m.rest), memory, (unit * planned, rest))
        failed = ~arrived & (solution.result != diffrax.RESULTS.max_steps_reached)
        end = restore(jax.tree.map(lambda y: y[0], solution.ys))
        steps = solution.stats["num_steps"].astype(jnp.int32)
        return Solved(end, memory, time, steps, failed)

    def of_group(group: tuple[Any, SolverMemory, Array]) -> Solved:
        if group[2].shape[0] > 1:
            begin = jnp.where(group[2] < stop, 0.0, 1.0)
            states, memory, start = group
            return over_paths(solve)(states, memory, start, begin)
        # A batch of one would still copy the state of every loop at each of its rounds.
        state, memory, start = jax.tree.map(lambda y: y[..., 0], group)
        return jax.tree.map(lambda y: y[..., None], solve(state, memory, start, 0.0))

    is_implicit = isinstance(solver, diffrax.AbstractImplicitSolver | GaussLegendre)
    few = start.shape[0]
    if few > 1 and is_implicit:
        few = 1
    elif few > 1 and decomposes(
        lambda y: field(stop, y, problem), jax.tree.map(lambda y: y[..., 0], states)
    ):
        few = decomposed_together(tuple(jax.tree.leaves(states)))

    def of_moving(group: tuple[Any, SolverMemory, Array]) -> Solved:
        return jax.lax.cond(jnp.any(group[2] < stop), of_group, _standing, group)

    return in_groups(of_moving, (states, memory, start), few)


def _standing(group: tuple[Any, SolverMemory, Array]) -> Solved:
    """What becomes of paths that are where they have to be."""
    states, memory, time = group
    nothing = jnp.zeros(time.shape, jnp.int32)
    return Solved(states, memory, time, nothing, jnp.zeros(time.shape, bool))


def _flattened(state: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A small state as one vector, whose sums and norms cost one loop each; and the way back."""
    if sum(leaf.size for leaf in jax.tree.leaves(state)) < MANY:
        return ravel_pytree(state)
    return state, lambda state: state


def _terms(solver: diffrax.AbstractSolver, field: VectorField) -> diffrax.AbstractTerm:
    """The vector field as the solver takes it; an implicit-explicit one treats it as stiff."""
    term = diffrax.ODETerm(field)
    if isinstance(getattr(solver, "tableau", None), diffrax.MultiButcherTableau):
        return diffrax.MultiTerm(diffrax.ODETerm(_standstill), term)
    return term


def _standstill(t: Any, state: Any, problem: Problem) -> Any:
    del t, problem
    return jax.tree.map(jnp.zeros_like, state)
