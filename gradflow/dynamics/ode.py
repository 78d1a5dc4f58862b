"""Dynamics that are ordinary differential equations, integrated with adaptive steps."""

import abc
import functools
from collections.abc import Sequence
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, ArrayLike

from gradflow.backend.compiled import compiled
from gradflow.backend.tracing import as_floats, is_traced
from gradflow.backend.types import Scalar, Weights
from gradflow.checks import as_parameter
from gradflow.dynamics.base import (
    AbstractDynamics,
    End,
    Progress,
    State,
    divergence_limit,
    is_alive,
)
from gradflow.dynamics.integration import (
    BACKWARD,
    Solved,
    SolverMemory,
    advance_a_little,
    integrate,
)
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.random.streams import Source
from gradflow.solvers.both_modes import in_both_modes
from gradflow.solvers.dense_or_krylov import DenseOrKrylov
from gradflow.solvers.gauss_legendre import GaussLegendre


class AbstractOdeFlow(AbstractDynamics):
    """A dynamics that is an ordinary differential equation of the weights and auxiliary variables.

    `solver` integrates it to the relative and absolute tolerance `rtol` and `atol`.
    """

    rtol: eqx.AbstractVar[Scalar]
    atol: eqx.AbstractVar[Scalar]
    solver: eqx.AbstractVar[diffrax.AbstractSolver]

    @abc.abstractmethod
    def auxiliary(self, problem: Problem, weights: Weights) -> tuple[Weights, ...]:
        """What moves beside the weights, at the start; arrays end in the path axis."""

    @abc.abstractmethod
    def field(self, t: Any, state: tuple[Weights, ...], problem: Problem) -> tuple[Weights, ...]:
        """The time derivatives of the weights and their auxiliary variables, of one path."""

    @property
    def has_default_solver(self) -> bool:
        """Whether the solver is the explicit default; to ask for it by name makes no difference."""
        return False

    @property
    def successor(self) -> "AbstractOdeFlow | None":
        """The same flow with the implicit default solver, where the explicit one is a default."""
        if not self.has_default_solver:
            return None
        return eqx.tree_at(lambda flow: flow.solver, self, GaussLegendre(order=6))

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
            auxiliary, memory = state.memory
            assert state.progress is not None
            (weights, *auxiliary), memory, progress = advance_a_little(
                self.field,
                self.solver,
                self.rtol,
                self.atol,
                problem,
                (state.weights, *auxiliary),
                memory,
                state.progress,
                stop,
            )
            escaped = ~is_alive(weights, state.limit) & (progress.end == End.NONE)
            progress = eqx.tree_at(
                lambda p: p.end, progress, jnp.where(escaped, End.DIVERGED, progress.end)
            )
            weights = tuple(jnp.where(progress.end == End.NONE, w, jnp.nan) for w in weights)
            return State(weights, (tuple(auxiliary), memory), (), state.limit, progress=progress)

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

        **Raises:** `TypeError` or `ValueError` naming the argument that makes no sense.
        """
        if not isinstance(problem, Problem) or not isinstance(net, DeepLinear):
            raise TypeError(
                "solve takes (problem, net, times), a Problem and a DeepLinear; got "
                f"{type(problem).__name__} and {type(net).__name__}."
            )
        stops = _checked_stops(times)
        return in_both_modes(_solved_forward, _solved_reverse, (self, problem, net, stops))


def _checked_stops(times: ArrayLike | Sequence[float]) -> Array:
    """The times as an array; what is traced has a shape only."""
    stops = as_floats(times)
    if stops.ndim != 1:
        raise ValueError(f"times must be a list of flow times; got shape {stops.shape}.")
    if is_traced(stops):
        return stops
    known = np.asarray(stops)
    if not (np.all(np.isfinite(known)) and np.all(known >= 0.0) and np.all(np.diff(known) >= 0.0)):
        raise ValueError(f"times must be finite, >= 0 and increasing; got {known.tolist()}.")
    return stops


@compiled
def _start(flow: AbstractOdeFlow, problem: Problem, weights: Weights) -> State:
    memory = (flow.auxiliary(problem, weights), SolverMemory.at_start(weights))
    progress = Progress.at_start(weights[0].shape[-1])
    return State(weights, memory, (), divergence_limit(weights, problem.data), progress=progress)


def _solved(adjoint: diffrax.AbstractAdjoint, given: tuple[Any, Problem, Any, Array]) -> Weights:
    """The weights at the given times, by a program that one mode can differentiate."""
    flow, problem, net, stops = given
    if getattr(flow.solver, "scan_kind", "") is None:
        # Left to itself diffrax differentiates the loop over the stages in reverse mode only.
        flow = eqx.tree_at(lambda f: f.solver.scan_kind, flow, "bounded", is_leaf=_is_none)
    state = flow.init(problem, tuple(w[..., None] for w in net.weights))
    auxiliary, memory = state.memory
    start = Solved.at_start((state.weights, *auxiliary), memory)

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
