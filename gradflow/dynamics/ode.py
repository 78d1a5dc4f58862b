"""Dynamics that are ordinary differential equations, integrated with adaptive steps."""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from gradflow.decompositions import decomposed_together, decomposes
from gradflow.dynamics.base import (
    MAX_STEPS,
    AbstractDynamics,
    End,
    Progress,
    State,
    divergence_limit,
    is_alive,
    over_paths,
)
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.products import in_groups
from gradflow.regularizers.base import as_parameter
from gradflow.solvers.base import largest
from gradflow.solvers.both_modes import in_both_modes
from gradflow.solvers.dense_or_krylov import DenseOrKrylov
from gradflow.solvers.gauss_legendre import GaussLegendre
from gradflow.solvers.relative_errors import RelativeErrors
from gradflow.solvers.rest import RestController, RestMemory, is_at_rest
from gradflow.solvers.resumable import ResumableController
from gradflow.streams import Source
from gradflow.tracing import is_traced
from gradflow.types import Scalar, Weights

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

VectorField: TypeAlias = Callable[[Any, Any, Problem], Any]
"""The time derivative of the state of one path, a function of (t, state, problem)."""


class AbstractOdeFlow(AbstractDynamics):
    """A dynamics that is an ordinary differential equation of the weights and companions of theirs.

    `solver` integrates it to the relative and absolute tolerance `rtol` and `atol`.
    """

    rtol: eqx.AbstractVar[Scalar]
    atol: eqx.AbstractVar[Scalar]
    solver: eqx.AbstractVar[diffrax.AbstractSolver]

    @abc.abstractmethod
    def companions(self, problem: Problem, weights: Weights) -> tuple[Weights, ...]:
        """What moves beside the weights, at the start; arrays end in the path axis."""

    @abc.abstractmethod
    def field(self, t: Any, state: tuple[Weights, ...], problem: Problem) -> tuple[Weights, ...]:
        """The time derivatives of the weights and their companions, of one path."""

    @property
    def ticks_per_step(self) -> None:
        """None: its steps are adaptive."""
        return None

    def is_random(self, problem: Problem) -> bool:
        """False: it has no noise of its own."""
        return False

    def init(self, problem: Problem, weights: Weights) -> State:
        """Start with a first step of the solver's choice."""
        return _start(self, problem, weights)

    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """None are needed."""
        return ()

    def advance(
        self,
        problem: Problem,
        state: State,
        start: Array,
        stop: Array,
        source: Source,
        block: int,
    ) -> State:
        """Integrate every path towards flow time `stop`, each with its own steps.

        A few steps at a time, as long as a path is on its way and may still take some; what the
        steps are does not depend on how many may be taken in a call.
        """

        def unfinished(state: State) -> Array:
            assert state.progress is not None
            return jnp.any(state.progress.may_move(stop))

        def go(state: State) -> State:
            companions, memory = state.memory
            assert state.progress is not None
            (weights, *companions), memory, progress = advance_a_little(
                self.field,
                self.solver,
                self.rtol,
                self.atol,
                problem,
                (state.weights, *companions),
                memory,
                state.progress,
                stop,
            )
            escaped = ~is_alive(weights, state.limit) & (progress.end == End.NONE)
            progress = eqx.tree_at(
                lambda p: p.end, progress, jnp.where(escaped, End.DIVERGED, progress.end)
            )
            weights = tuple(jnp.where(progress.end == End.NONE, w, jnp.nan) for w in weights)
            return State(weights, (tuple(companions), memory), (), state.limit, progress=progress)

        return jax.lax.while_loop(unfinished, go, state)

    def solve(
        self, problem: Problem, net: DeepLinear, times: ArrayLike | Sequence[float]
    ) -> Weights:
        """The weights at increasing flow times, one `(T, d_i, d_{i-1})` array a layer.

        A pure function, for use inside `jax.jit`, `jax.vmap` and `jax.grad`: a sweep over starts,
        problems or settings of the flow is one compiled program. It can be differentiated in
        reverse mode, in forward mode, and forwards over either for second derivatives
        (`jax.hessian`); not in reverse mode over a derivative. `simulate` integrates in the same
        way, and watches.

        **Arguments:**

        - `times`: `(T,)` flow times >= 0.

        **Returns:** the weights, NaN from the first time that could not be reached.
        """
        stops = jnp.asarray(times, jnp.result_type(float))
        return in_both_modes(_solved_forward, _solved_reverse, (self, problem, net, stops))


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
        rest = RestMemory(count, jnp.full_like(nothing, jnp.inf))
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


@eqx.filter_jit
def _start(flow: AbstractOdeFlow, problem: Problem, weights: Weights) -> State:
    memory = (flow.companions(problem, weights), SolverMemory.at_start(weights))
    progress = Progress.at_start(weights[0].shape[-1])
    return State(weights, memory, (), divergence_limit(weights), progress=progress)


def _solved(adjoint: diffrax.AbstractAdjoint, given: tuple[Any, Problem, Any, Array]) -> Weights:
    """The weights at the given times, by a program that one mode can differentiate."""
    flow, problem, net, stops = given
    if getattr(flow.solver, "scan_kind", "") is None:
        # Left to itself diffrax differentiates the loop over the stages in reverse mode only.
        flow = eqx.tree_at(lambda f: f.solver.scan_kind, flow, "bounded", is_leaf=_is_none)
    state = flow.init(problem, tuple(w[..., None] for w in net.weights))
    companions, memory = state.memory
    start = Solved.at_start((state.weights, *companions), memory)

    def go(before: Solved, stop: Array) -> tuple[Solved, Weights]:
        after = integrate(
            flow.field,
            flow.solver,
            flow.rtol,
            flow.atol,
            problem,
            before.states,
            before.memory,
            before.time,
            stop,
            adjoint=adjoint,
        )
        arrived = after.time >= stop
        states = jax.tree.map(lambda y: jnp.where(arrived, y, jnp.nan), after.states)
        after = eqx.tree_at(lambda s: s.states, after, states)
        return after, tuple(w[..., 0] for w in states[0])

    return jax.lax.scan(go, start, stops)[1]


def _is_none(leaf: Any) -> bool:
    return leaf is None


_solved_forward = functools.partial(_solved, diffrax.ForwardMode())
_solved_reverse = functools.partial(_solved, BACKWARD)


def checked_tolerances(owner: str, rtol: ArrayLike, atol: ArrayLike) -> tuple[Scalar, Scalar]:
    """Relative and absolute tolerance as arrays.

    **Raises:** `ValueError` naming the field of `owner` that is no number in (0, 1).
    """
    tolerances = as_parameter(rtol, f"{owner}.rtol"), as_parameter(atol, f"{owner}.atol")
    for name, value in zip(("rtol", "atol"), tolerances, strict=True):
        if value.ndim != 0:
            raise ValueError(f"{owner}.{name} must be a single number; got shape {value.shape}.")
        if not is_traced(value) and not 0.0 < float(value) < 1.0:
            raise ValueError(f"{owner}.{name} must lie in (0, 1); got {float(value)}.")
    return tolerances


def chosen_solver(
    owner: str,
    solver: diffrax.AbstractSolver | None,
    stiff: bool,
    conservative: bool = False,
    explicit: diffrax.AbstractSolver | None = None,
) -> diffrax.AbstractAdaptiveSolver:
    """The solver asked for, or the default: explicit, or implicit and conservative.

    The implicit default is `GaussLegendre(order=6)`: its matrix-free iteration takes a tenth of the
    time of `diffrax.Kvaerno5()` on unbalanced and on small starts of width 10. The explicit one is
    `diffrax.Dopri8()`, which compiles the vector field once only, unless another one is given.

    **Raises:** `ValueError` if more than one of a solver, `stiff` and `conservative` is given,
    `TypeError` for a solver without an error estimate.
    """
    if conservative and (stiff or solver is not None):
        other = "stiff=True" if solver is None else f"solver={type(solver).__name__}"
        raise ValueError(
            f"{owner}.conservative=True chooses the solver GaussLegendre(order=6), but {other} was "
            "given; set only one of the two."
        )
    if solver is not None and stiff:
        raise ValueError(
            f"{owner}.stiff=True chooses the implicit default solver, but solver="
            f"{type(solver).__name__} was given; set only one of the two."
        )
    if solver is None:
        explicit = diffrax.Dopri8() if explicit is None else explicit
        solver = GaussLegendre(order=6) if conservative or stiff else explicit
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise TypeError(
            f"{owner}.solver must be a diffrax solver with an error estimate, such as "
            f"diffrax.Tsit5(); got {type(solver).__name__}."
        )
    return cast(diffrax.AbstractAdaptiveSolver, _with_newton(solver))


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
        return ~(velocity * memory.planned <= RUNAWAY * size) & ~(size <= memory.size)

    collapsed = moves & (solved.failed | (memory.short >= SHORT_STEPS))
    runaway = jax.lax.cond(
        jnp.any(collapsed),
        lambda: over_paths(explodes)(solved.states, solved.time, memory),
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
        state, restore = _flattened(state)

        def scaled_field(s: Any, y: Any, problem: Problem) -> Any:
            velocity = field(start + length * s, restore(y), problem)
            return _flattened(jax.tree.map(lambda v: length * v, velocity))[0]

        pid = diffrax.PIDController(rtol, atol, pcoeff=PROPORTIONAL, icoeff=INTEGRAL)
        relative = RelativeErrors(pid, memory.smallest)
        rest = RestMemory(memory.rest.still, memory.rest.stable / unit)
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
            stepsize_controller=RestController(resumable, rest),
            adjoint=adjoint,
            max_steps=most_steps,
            throw=False,
        )
        (_, planned), rest, *_ = cast(tuple[Any, ...], solution.controller_state)
        rest = RestMemory(rest.still, unit * rest.stable)
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
            return over_paths(solve)(*group, begin)
        # A batch of one would still copy the state of every loop at each of its rounds.
        one = jax.tree.map(lambda y: y[..., 0], group)
        return jax.tree.map(lambda y: y[..., None], solve(*one, 0.0))

    few = start.shape[0]
    if few > 1 and isinstance(solver, diffrax.AbstractImplicitSolver | GaussLegendre):
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


def _with_newton(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    """An implicit solver with Newton to near rounding instead of diffrax's looser iteration.

    With that one the step control sees the error of the iteration: it rejects half the steps of
    Kvaerno5, and KenCarp4 never arrives.
    """
    if not isinstance(solver, diffrax.AbstractImplicitSolver):
        return solver
    if not eqx.tree_equal(solver.root_finder, type(solver)().root_finder):
        return solver
    newton = optimistix.Newton(rtol=1e-10, atol=1e-10, linear_solver=DenseOrKrylov())
    return eqx.tree_at(lambda s: s.root_finder, solver, newton)


def _terms(solver: diffrax.AbstractSolver, field: VectorField) -> diffrax.AbstractTerm:
    """The vector field as the solver takes it; an implicit-explicit one treats it as stiff."""
    term = diffrax.ODETerm(field)
    if isinstance(getattr(solver, "tableau", None), diffrax.MultiButcherTableau):
        return diffrax.MultiTerm(diffrax.ODETerm(_standstill), term)
    return term


def _standstill(t: Any, state: Any, problem: Problem) -> Any:
    del t, problem
    return jax.tree.map(jnp.zeros_like, state)
