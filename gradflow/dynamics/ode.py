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
from jaxtyping import Array, ArrayLike, Float

from gradflow.decompositions import decomposed_together, decomposes
from gradflow.dynamics.base import AbstractDynamics, State, divergence_limit, over_paths
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.products import in_groups
from gradflow.regularizers.base import as_parameter
from gradflow.solvers.both_modes import in_both_modes
from gradflow.solvers.dense_or_krylov import DenseOrKrylov
from gradflow.solvers.gauss_legendre import GaussLegendre
from gradflow.solvers.resumable import ResumableController
from gradflow.streams import Source
from gradflow.tracing import is_traced
from gradflow.types import Scalar, Weights

PROPORTIONAL, INTEGRAL = 0.2, 0.4
"""Coefficients of the step control; without a proportional part explicit steps at the edge of their
stability, where most steps of a flow are, are rejected four times as often."""

CHECKPOINTS = 16
"""States of a solve between two saved times that a derivative in reverse mode keeps."""

BACKWARD = diffrax.RecursiveCheckpointAdjoint(CHECKPOINTS)
"""How a solve is differentiated, unless forwards."""

MAX_STEPS = 1_000_000
"""Solver steps between two saved times before the solve is given up."""

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
        """Integrate every path from flow time `start` to `stop`, each with its own steps."""
        return self._moved(problem, state, start, stop)

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

    def _moved(
        self,
        problem: Problem,
        state: State,
        start: Array,
        stop: Array,
        adjoint: diffrax.AbstractAdjoint = BACKWARD,
    ) -> State:
        companions, planned = state.memory
        (weights, *companions), planned = integrate(
            self.field,
            self.solver,
            self.rtol,
            self.atol,
            problem,
            (state.weights, *companions),
            planned,
            start,
            stop,
            adjoint,
        )
        return State(weights, (tuple(companions), planned), (), state.limit)


@eqx.filter_jit
def _start(flow: AbstractOdeFlow, problem: Problem, weights: Weights) -> State:
    planned = jnp.zeros((weights[0].shape[-1],))
    memory = (flow.companions(problem, weights), planned)
    return State(weights, memory, (), divergence_limit(weights))


def _solved(adjoint: diffrax.AbstractAdjoint, given: tuple[Any, Problem, Any, Array]) -> Weights:
    """The weights at the given times, by a program that one mode can differentiate."""
    flow, problem, net, stops = given
    if getattr(flow.solver, "scan_kind", "") is None:
        # Left to itself diffrax differentiates the loop over the stages in reverse mode only.
        flow = eqx.tree_at(lambda f: f.solver.scan_kind, flow, "bounded", is_leaf=_is_none)
    state = flow.init(problem, tuple(w[..., None] for w in net.weights))

    def go(before: tuple[State, Array], stop: Array) -> tuple[tuple[State, Array], Weights]:
        state, start = before
        state = flow._moved(problem, state, start, stop, adjoint)
        return (state, stop), tuple(w[..., 0] for w in state.weights)

    return jax.lax.scan(go, (state, jnp.zeros((), stops.dtype)), stops)[1]


def _is_none(leaf: Any) -> bool:
    return leaf is None


_solved_forward = functools.partial(_solved, diffrax.ForwardMode())
_solved_reverse = functools.partial(_solved, BACKWARD)


def checked_tolerances(owner: str, rtol: ArrayLike, atol: ArrayLike) -> tuple[Scalar, Scalar]:
    """Relative and absolute tolerance as arrays.

    **Raises:** `ValueError` naming the field of `owner` that is no number in (0, 1).
    """
    tolerances = as_parameter(rtol), as_parameter(atol)
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


def integrate(
    field: VectorField,
    solver: diffrax.AbstractSolver,
    rtol: Scalar,
    atol: Scalar,
    problem: Problem,
    states: Any,
    first_steps: Float[Array, " paths"],
    start: Array,
    stop: Array,
    adjoint: diffrax.AbstractAdjoint = BACKWARD,
) -> tuple[Any, Float[Array, " paths"]]:
    """Integrate every path from flow time `start` to `stop`, each with its own steps.

    **Arguments:**

    - `states`: a pytree of arrays that end in the path axis.
    - `first_steps`: length of the first step of every path; 0 lets the solver choose.
    - `adjoint`: how the solve can be differentiated.

    **Returns:** the states at `stop`, NaN for a path whose solve failed, and the lengths of the
    steps that would come next.
    """
    # Solver time goes from 0 to 1. diffrax rounds the end of a solve down a hundred times, which
    # takes as long as a step of a small equation; for a constant the compiler does it.
    length = stop - start
    moves = length > 0.0
    unit = jnp.where(moves, length, 1.0)  # of solver time; nothing is divided by 0

    def solve(state: Any, first_step: Scalar) -> tuple[Any, Scalar]:
        state, restore = _flattened(state)

        def scaled_field(s: Any, y: Any, problem: Problem) -> Any:
            velocity = field(start + length * s, restore(y), problem)
            return _flattened(jax.tree.map(lambda v: length * v, velocity))[0]

        pid = diffrax.PIDController(rtol, atol, pcoeff=PROPORTIONAL, icoeff=INTEGRAL)
        controller = ResumableController(pid, first_step / unit, origin=start / unit)
        solution = diffrax.diffeqsolve(
            _terms(solver, scaled_field),
            solver,
            t0=0.0,
            t1=1.0,
            dt0=None,
            y0=state,
            args=problem,
            saveat=diffrax.SaveAt(t1=True, controller_state=True),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=MAX_STEPS,
            throw=False,
        )
        _, planned = cast(tuple[Any, Scalar], solution.controller_state)
        good = solution.result == diffrax.RESULTS.successful
        end = jax.tree.map(lambda y: jnp.where(good, y[0], jnp.nan), solution.ys)
        return restore(end), length * planned

    def of_group(group: tuple[Any, Array]) -> tuple[Any, Array]:
        if group[1].shape[0] > 1:
            return over_paths(solve)(*group)
        # A batch of one would still copy the state of every loop at each of its rounds.
        state, first_step = jax.tree.map(lambda y: y[..., 0], group)
        return jax.tree.map(lambda y: y[..., None], solve(state, first_step))

    few = first_steps.shape[0]
    if few > 1 and isinstance(solver, diffrax.AbstractImplicitSolver | GaussLegendre):
        few = 1
    elif few > 1 and decomposes(
        lambda y: field(start, y, problem), jax.tree.map(lambda y: y[..., 0], states)
    ):
        few = decomposed_together(tuple(jax.tree.leaves(states)))
    here = (states, first_steps)
    return jax.lax.cond(moves, lambda: in_groups(of_group, here, few), lambda: here)


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
