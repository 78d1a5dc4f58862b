"""How an ensemble moves along the minima manifold, with or without noise along it."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from gradflow.backend.lapack_batches import decomposed_together
from gradflow.backend.products import in_groups
from gradflow.backend.types import Scalar, Weights
from gradflow.dynamics.base import Progress, State, over_paths
from gradflow.dynamics.integration import (
    SolverMemory,
    VectorField,
    advance_a_little,
    integrate,
)
from gradflow.dynamics.slow_sde import Diffusion, Drift, advance_in_cells, cells_before
from gradflow.geometry.base import output_loss
from gradflow.geometry.manifold import retract
from gradflow.problem import Problem
from gradflow.random.streams import Source
from gradflow.theory.slow_noise import tangential_size


class SlowMemory(eqx.Module):
    """What a slow flow carries beside the weights; arrays end in the path axis.

    - `solver`: what the solver of the deterministic motion carries.
    - `anchor`, `cell`: of the random motion, see `advance_in_cells`; None without it.
    - `before`, `since`: the weights at the last saved time but one at which the path was alive, and
        that time.
    """

    solver: SolverMemory
    anchor: Weights | None
    cell: Float[Array, " paths"] | None
    before: Weights
    since: Float[Array, " paths"]


def along_manifold(
    field: VectorField,
    solver: diffrax.AbstractSolver,
    rtol: Scalar,
    atol: Scalar,
    problem: Problem,
    state: State,
    stop: Array,
) -> tuple[Weights, SolverMemory, Progress]:
    """The weights of every path as far as it may go, on the manifold once all are at `stop`."""
    loss = output_loss(problem)

    def unfinished(carry: tuple[Weights, SolverMemory, Progress]) -> Array:
        return jnp.any(carry[2].may_move(stop))

    def go(
        carry: tuple[Weights, SolverMemory, Progress],
    ) -> tuple[Weights, SolverMemory, Progress]:
        return advance_a_little(field, solver, rtol, atol, problem, *carry, stop)

    assert state.progress is not None
    moved = (state.weights, state.memory.solver, state.progress)
    weights, memory, progress = jax.lax.while_loop(unfinished, go, moved)
    weights = jax.lax.cond(
        jnp.any(progress.on_the_way(stop)),
        lambda: weights,
        lambda: in_groups(
            over_paths(lambda w: retract(w, loss)), weights, decomposed_together(weights)
        ),
    )
    return weights, memory, progress


def moved_to(
    field: VectorField,
    solver: diffrax.AbstractSolver,
    rtol: Scalar,
    atol: Scalar,
    problem: Problem,
    weights: Weights,
    start: Array,
    stop: Array,
) -> Weights:
    """The weights of an ensemble at `stop` from those at `start`, NaN where it does not arrive."""
    memory = SolverMemory.at_start(weights)
    begin = jnp.broadcast_to(start, memory.planned.shape)
    solved = integrate(field, solver, rtol, atol, problem, weights, memory, begin, stop)
    loss = output_loss(problem)
    moved = over_paths(lambda w: retract(w, loss))(solved.states)
    return tuple(jnp.where(solved.time >= stop, w, jnp.nan) for w in moved)


def random_motion(
    drift: Drift,
    diffusion: Diffusion,
    problem: Problem,
    state: State,
    stop: Array,
    source: Source,
) -> tuple[Weights, Weights, Progress]:
    """The weights at `stop` and the anchors before it, where the motion is random.

    A path that may take no more cells stays at the anchor that it has reached.
    """
    loss, memory = output_loss(problem), state.memory
    size = tangential_size(problem, tuple(w[..., 0] for w in memory.before))

    def one(
        anchor: Weights, cell: Scalar, progress: Progress, path: UInt32[Array, ""]
    ) -> tuple[Weights, Weights, Progress]:
        done, last = progress.steps, cells_before(stop, cell)
        reached = jnp.minimum(last, done + progress.allowed)
        weights, anchor = advance_in_cells(
            drift,
            diffusion,
            lambda w: retract(w, loss),
            size,
            anchor,
            cell,
            done,
            reached,
            jnp.where(reached < last, reached * cell, stop),
            source.of_path(path),
        )
        time = jnp.where(reached < last, progress.time, stop)
        allowed = progress.allowed - (reached - done)
        return weights, anchor, Progress(time, reached, allowed, progress.end)

    def of_group(group: tuple[Weights, Array, Progress, Array]) -> Any:
        return over_paths(one)(*group)

    paths = (memory.anchor, memory.cell, state.progress, source.paths)
    return in_groups(of_group, paths, decomposed_together(memory.before))
