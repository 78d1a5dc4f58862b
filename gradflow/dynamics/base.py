"""What a dynamics is, and how an ensemble is stepped in blocks of noise."""

import abc
import enum
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gradflow.backend.compiled import compiled
from gradflow.backend.products import in_groups, on_cpu, paths_together
from gradflow.backend.types import Scalar, Weights
from gradflow.data import Regression
from gradflow.dynamics.update_rule import UpdateRule
from gradflow.kinds import Kinds
from gradflow.network import widths_of
from gradflow.problem import Problem
from gradflow.random.streams import Normals, Source, Stream
from gradflow.theory.drift import imbalance_drift

DIVERGENCE_FACTOR = 1e12
"""A replica has diverged once |W|^2 exceeds this multiple of 1 + |W(0)|^2 (or is not finite)."""

BLOCK_BYTES = 2**22
"""Noise drawn at once on CPUs: about the size of the second-level cache."""

FEWEST_STEPS = 16
"""Steps of noise drawn at once though they do not fit there: every group of paths is read from
memory and started anew for every block."""

MOST_BYTES = 2**26
"""Noise drawn at once at most on CPUs."""

ACCELERATOR_BYTES = 2**31
"""Noise drawn at once on an accelerator, where a draw is a kernel of its own."""

CPU_STEPS = 2
"""Steps of numbers in a turn of the loop on a CPU."""

MAX_STEPS = 100_000_000
"""Solver steps of a path before it is given up as incomplete."""

HANDOVER = 250_000
"""Solver steps of a path after which the successor of its dynamics goes on. An explicit solver that
has taken so many is at the edge of its stability and follows something slow; a flow that moves at
the rate of its largest curvature is at rest long before."""

ACCELERATOR_STEPS = 16
"""Steps of scalar networks written out one after the other on an accelerator: they become one
kernel. With a kernel and a turn of a loop for each, 10^5 paths take 13 us a step on an H100, with
16 of them 2.9 us."""


Step: TypeAlias = Callable[[Array, tuple[Weights, Any]], tuple[Weights, Any]]
"""A step, as a function of its number in a block and of weights and memory."""


class End(enum.IntEnum):
    """Why a path has ended before the run."""

    NONE = 0
    DIVERGED = 1
    STEP_LIMIT = 2
    COLLAPSE = 3

    @property
    def sentence(self) -> str:
        """What happened and what to do, for a path that is incomplete."""
        return {
            End.STEP_LIMIT: (
                f"the path had taken {MAX_STEPS:,} solver steps, the limit. The equation is stiff "
                "there: an implicit solver takes longer steps (stiff=True where there is such an "
                "option, or solver=diffrax.Kvaerno5()), or make the run shorter"
            ),
            End.COLLAPSE: (
                "its step size collapsed. The field is not smooth there, as at the kink of a "
                "penalty: GradientDescent handles it, or smooth the penalty. Without a penalty the "
                "start is too far out for this flow, or closer to 0 than 1e-154, whose square is 0"
            ),
        }[self]


class Progress(eqx.Module):
    """What an adaptive dynamics says of every path; every array is `(R,)`.

    - `time`: the flow time reached.
    - `steps`: steps of the solver, or cells of a random motion, since the start.
    - `allowed`: how many more of them may be taken in this call; a call is short, so that the host
        can look at the keyboard.
    - `end`: why the path has ended, one of `End`.
    """

    time: Float[Array, "*paths"]
    steps: Int[Array, "*paths"]
    allowed: Int[Array, "*paths"]
    end: Int[Array, "*paths"]

    @classmethod
    def at_start(cls, paths: int) -> "Progress":
        """That of paths at flow time 0."""
        counts = jnp.zeros((paths,), jnp.int32)
        without_limit = jnp.full_like(counts, jnp.iinfo(counts.dtype).max)
        return cls(jnp.zeros((paths,)), counts, without_limit, jnp.copy(counts))

    def on_the_way(self, stop: Array) -> Bool[Array, "*paths"]:
        """Which paths have neither ended nor reached flow time `stop`."""
        return (self.end == End.NONE) & (self.time < stop)

    def may_move(self, stop: Array) -> Bool[Array, "*paths"]:
        """Which of these may take another step in this call."""
        return self.on_the_way(stop) & (self.allowed > 0)


class State(eqx.Module):
    """What a dynamics carries from one time to the next; every array ends in the path axis.

    - `weights`: the layers, `(d_i, d_{i-1}, R)`; a diverged replica is NaN, and stays so.
    - `memory`: what else the dynamics needs: velocities, the next step length.
    - `noise`: the current block of random numbers, `(K, ..., R)`.
    - `limit`: the squared norm at which a replica counts as diverged, `(R,)`.
    - `whole`: weights and memory after the last whole turn of the loop over steps, see
        `whole_turns`; None where a turn is a single step.
    - `progress`: how far every path has come; None for a dynamics that always arrives.
    """

    weights: Weights
    memory: Any
    noise: Any
    limit: Float[Array, " paths"]
    whole: tuple[Weights, Any] | None = None
    progress: Progress | None = None


class Role(enum.Enum):
    """What a dynamics is to a training with step size $h$, where it is laid beside others."""

    TRAINING = "the training itself"
    SDE = "its stochastic differential equation"
    SLOW_FLOW = "its motion along the minima, from the start on"


RateTheory: TypeAlias = Literal["leading_order", "finite_step", "one_step"]
"""A theory of the regularization phase: the slow flow for small steps, the one exact in the step
size, or the expected drift of one step."""


DYNAMICS: Kinds[type["AbstractDynamics"]] = Kinds("dynamics")
"""Those that specs and files know."""


class AbstractDynamics(eqx.Module):
    """A way to move the weights.

    Marks are the dynamics' own clock: integers (steps of the grid) for a gridded dynamics, flow
    time for an adaptive one. `step_size` is the step size $h$ of the discrete training that the
    dynamics is or describes; None if it has none. `most_paths` are taken at once at most, where one
    step of more of them would keep Ctrl-C waiting; None for any number. `role` is None for what is
    neither a training nor an SDE or slow flow of one.

    Everything that the package knows of one kind of dynamics stands in its file. Abstract methods
    say how it moves; the others, what it is to theory and which noise it shares. Their defaults
    are those of something that theory does not cover.
    """

    most_paths: ClassVar[int | None] = None
    role: ClassVar[Role | None] = None

    step_size: eqx.AbstractVar[Any]

    # How it moves

    @property
    def successor(self) -> "AbstractDynamics | None":
        """The dynamics that goes on with a path after `HANDOVER` steps; None for itself.

        It takes the state as it is.
        """
        return None

    @property
    @abc.abstractmethod
    def ticks_per_step(self) -> int | None:
        """Grid steps per step of size $h$; None for an adaptive dynamics."""

    @abc.abstractmethod
    def is_random(self, problem: Problem) -> bool:
        """Whether replicas from one network differ on this problem."""

    @abc.abstractmethod
    def check(self, problem: Problem, weights: Weights) -> None:
        """Raise or warn, before anything is computed, about what cannot go well."""

    @abc.abstractmethod
    def init(self, problem: Problem, weights: Weights) -> State:
        """The state at mark 0 of an ensemble, without noise; `weights` end in the path axis."""

    @abc.abstractmethod
    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """Shapes of the random numbers of one step of one path, as `jax.eval_shape` gives them."""

    @abc.abstractmethod
    def advance(
        self,
        problem: Problem,
        state: State,
        start: Array,
        stop: Array,
        source: Source,
        block: int,
    ) -> State:
        """The state at mark `stop`, from that at mark `start`.

        A dynamics with a `progress` goes no further than it allows; it is then called again.
        """

    def why_ended(self, problem: Problem, state: State, path: int, stop: float) -> str | None:
        """When and why what it describes ends before flow time `stop`, for a path that diverged.

        None where nothing ends but numbers.
        """
        return None

    # The training that it is or describes, and what theory says of it

    @property
    def update_rule(self) -> UpdateRule:
        """The rule of that training, whose steps have size $h$."""
        return UpdateRule()

    @property
    def discrete_training(self) -> "AbstractDynamics | None":
        """The training whose finite steps it takes or keeps; None for a flow and an SDE."""
        return None

    @property
    def stability_limit(self) -> Any:
        r"""The largest stable $h \lambda$ on a quadratic loss; None where it is not known."""
        return None

    @property
    def rate_theory(self) -> RateTheory | None:
        """Which theory `gf.predict` takes for its rates; None where it predicts nothing."""
        return None

    @property
    def is_slow(self) -> bool:
        """Whether it lies on the minima from the start on."""
        return self.role is Role.SLOW_FLOW

    def describes_noise(self, problem: Problem) -> bool:
        """Whether the noise of the problem acts in it, if not path by path then on average."""
        return self.is_random(problem)

    def theory_options(self) -> dict[str, Any]:
        """How `gradflow.theory` is told of it: `discrete`, `order`, `amplification`.

        **Raises:** `ValueError` if theory does not cover it.
        """
        raise ValueError(
            f"observables: theory has no loss_floor under noise and no imbalance_drift for "
            f"{type(self).__name__}; leave them out."
        )

    def imbalance_drift(self, problem: Problem, weights: Weights) -> Scalar:
        """The expected $dD/dt$ of one path at the weights; by default that of its theory.

        **Raises:** `ValueError` if no formula holds for it.
        """
        options = self.theory_options()
        self.update_rule.check_plain(type(self).__name__, "imbalance_drift")
        return imbalance_drift(problem, weights, self.step_size, **options)

    # Its random numbers

    def draw(self, problem: Problem, stream: Stream, widths: tuple[int, ...]) -> Any:
        """The random numbers of the steps of a stream."""
        return problem.draw(stream, widths)

    def why_not_normals(self, normals: Normals, problem: Problem) -> str | None:
        """Why a random run takes no such normals, the end of a sentence; None where it does."""
        if normals.law == "gaussian":
            return None
        return (
            f"the normals of {type(self).__name__} are the noise of training itself and not "
            "increments of a Brownian motion, so another law is another model; law is for "
            "StochasticFlow, here use law='gaussian'."
        )

    @property
    def grid_steps(self) -> int | None:
        """Steps of the grid of its random numbers in a step of size $h$; None without a grid."""
        return self.ticks_per_step

    def follows_path(self, problem: Problem) -> bool:
        """Whether its noise is a Brownian path on an even grid of flow time, and nothing else."""
        return False

    def on_grid(self, steps: int) -> "AbstractDynamics | None":
        """The same dynamics on a path with so many grid steps in $h$; None if it takes no such."""
        return self if steps == self.grid_steps else None


def over_paths(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply a function of one path's arrays to ensembles: the path axis comes last."""
    return jax.vmap(function, in_axes=-1, out_axes=-1)


# What follows is of whole ensembles: under `over_paths`, a number of each path beside its matrices
# would have the matrices transposed in memory.


def squared_norm(weights: Weights) -> Float[Array, " paths"]:
    r"""$\sum_i |W_i|^2$ of every path."""
    return functools.reduce(jnp.add, [jnp.sum(w * w, axis=(0, 1)) for w in weights])


@compiled
def divergence_limit(weights: Weights, data: Regression) -> Float[Array, " paths"]:
    r"""The squared norm at which each path counts as diverged.

    Far beyond both its start and what fits the data: $10^{12} \max(1 + |W(0)|^2,
    \mathrm{tr} S_{yy} / \mathrm{tr} S_{xx})$.
    """
    size = jnp.trace(data.sxx)
    fitting = jnp.trace(data.syy) / jnp.where(size > 0.0, size, 1.0)
    return DIVERGENCE_FACTOR * jnp.maximum(1.0 + squared_norm(weights), fitting)


def is_alive(weights: Weights, limit: Float[Array, " paths"]) -> Bool[Array, " paths"]:
    """Whether the squared norm of every path is a number below its limit."""
    return squared_norm(weights) < limit


def mask_diverged(weights: Weights, limit: Float[Array, " paths"]) -> Weights:
    """NaN for every path that has diverged, the weights themselves for the others."""
    alive = is_alive(weights, limit)
    return tuple(jnp.where(alive, w, jnp.nan) for w in weights)


def block_length(shapes: Any, paths: int) -> int:
    """Steps of noise drawn at once: a power of two up to 256.

    As many as fit the cache, or at least 16 of them if they fit into 64 MB; on an accelerator as
    many as fit into two gigabytes.
    """
    per_step = sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )
    limits = (BLOCK_BYTES, MOST_BYTES) if on_cpu() else (ACCELERATOR_BYTES, ACCELERATOR_BYTES)
    cached, held = (most // max(per_step * paths, 1) for most in limits)
    fitting = max(cached, min(held, FEWEST_STEPS), 1)
    return int(2 ** np.clip(np.floor(np.log2(fitting)), 0, 8))


def advance_in_blocks(
    state: State,
    start: Int[Array, ""],
    stop: Int[Array, ""],
    block: int,
    draw: Callable[[Array], Any],
    stepper: Callable[[State], Step],
) -> State:
    """Step from `start` to `stop`, drawing noise at every multiple of `block`.

    Every group of paths takes the steps of a block by itself, so that its layers stay in the cache.

    **Arguments:**

    - `draw`: the random numbers of the block that starts at the given step.
    - `stepper`: gives the step of a group of paths, a function of its number *within* the current
        block, whose noise is `state.noise`, and of weights and memory.
    """
    together = paths_together(widths_of(state.weights), state.limit.size)

    def unfinished(carry: tuple[Array, State]) -> Array:
        step, state = carry
        return (step < stop) & jnp.any(jnp.isfinite(state.weights[0][0, 0]))

    def one_block(carry: tuple[Array, State]) -> tuple[Array, State]:
        step, state = carry
        first = step % block
        noise = jax.lax.cond(first == 0, lambda: draw(step), lambda: state.noise)
        state = eqx.tree_at(lambda s: s.noise, state, noise, is_leaf=lambda x: x is None)
        last = jnp.minimum(block, first + stop - step)

        def of_group(group: State) -> tuple[Weights, Any, tuple[Weights, Any] | None]:
            return _stepped(group, first, last, block, stepper(group))

        weights, memory, whole = in_groups(of_group, state, together)
        return step + last - first, State(weights, memory, noise, state.limit, whole)

    return jax.lax.while_loop(unfinished, one_block, (start, state))[1]


def steps_a_turn(weights: Weights) -> int:
    """How many steps a turn of a loop over steps takes.

    Several where they are elementwise: on an accelerator a kernel has a price, and on a CPU one
    step alone would have to copy a layer that the other one still needs, a twentieth of its time.
    Written out steps of matrices would be a program that takes XLA minutes to compile.
    """
    if max(widths_of(weights)) > 1:
        return 1
    return CPU_STEPS if on_cpu() else ACCELERATOR_STEPS


def whole_turns(weights: Weights, memory: Any) -> tuple[Weights, Any] | None:
    """What a state at mark 0 remembers as `whole`, for a dynamics that steps in turns.

    A step that is compiled alone rounds differently from one that is compiled together with
    others. Turns begin at multiples of their length and continue from each other, and a time inside
    a turn is reached from its beginning by single steps on the side: how a run is cut, by saved
    times or into slices, changes no bit of it.
    """
    if steps_a_turn(weights) == 1:
        return None
    return jax.tree.map(jnp.copy, (weights, memory))  # the run gives both buffers away


def _stepped(
    group: State, first: Int[Array, ""], last: Int[Array, ""], block: int, one: Step
) -> tuple[Weights, Any, tuple[Weights, Any] | None]:
    """Weights, memory and whole turns of a group after the steps `first` to `last` (excluded)."""
    here, whole = (group.weights, group.memory), group.whole
    count = 1 if whole is None else min(steps_a_turn(group.weights), block)
    if count > 1:
        begun, ended = first - first % count, last - last % count

        def turn(i: Array, carry: tuple[Weights, Any]) -> tuple[Weights, Any]:
            for j in range(count):
                carry = one(begun + i * count + j, carry)
            return carry

        whole = jax.lax.fori_loop(0, (ended - begun) // count, turn, whole)
        here = jax.tree.map(lambda a, b: jnp.where(ended > begun, a, b), whole, here)
        first = jnp.maximum(first, ended)
    weights, memory = jax.lax.fori_loop(first, last, one, here)
    return weights, memory, whole


def initial_state(
    dynamics: AbstractDynamics, problem: Problem, weights: Weights, shapes: Any, block: int
) -> State:
    """The state at mark 0 with room for a block of noise of the given shapes."""
    state = dynamics.init(problem, weights)
    paths = state.limit.size

    def empty(leaf: Any) -> Array:
        return jnp.zeros((block, *leaf.shape, paths), leaf.dtype)

    return eqx.tree_at(lambda s: s.noise, state, jax.tree.map(empty, shapes))
