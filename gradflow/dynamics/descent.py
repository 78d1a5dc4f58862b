"""Gradient descent and stochastic gradient descent."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from gradflow.backend.compiled import compiled
from gradflow.backend.types import Scalar, Weights
from gradflow.checks import (
    Decay,
    check_velocity,
    checked_count,
    checked_decay,
    checked_momentum,
    checked_step_size,
    checked_velocity,
    remembered,
)
from gradflow.dynamics.base import (
    DYNAMICS,
    AbstractDynamics,
    RateTheory,
    Role,
    State,
    Step,
    advance_in_blocks,
    divergence_limit,
    mask_diverged,
    over_paths,
    whole_turns,
)
from gradflow.dynamics.layers import added, minus_scaled, over_all_paths, penalty_gradient
from gradflow.dynamics.noise import (
    at_step,
    check_gaussian,
    drawn_on_grid,
    shapes_of_one,
    with_path_substeps,
)
from gradflow.dynamics.optimizers import (
    check_descends,
    is_transformation,
    started,
    takes_learning_rate,
    updated,
)
from gradflow.dynamics.stepwise import step_numbers, stepped
from gradflow.dynamics.update_rule import UpdateRule
from gradflow.network import DeepLinear, widths_of
from gradflow.problem import Problem
from gradflow.random.streams import Source, Stream


@DYNAMICS.register
class GradientDescent(AbstractDynamics):
    r"""Discrete training: GD on a problem without noise, SGD on a problem with noise.

    $$v_{k+1} = \beta v_k - h_k\, \tilde g(W_k), \qquad W_{k+1} = W_k + v_{k+1}, \qquad
      t_k = \sum_{j<k} h_j,$$

    where $\tilde g$ is the exact stochastic gradient of one draw of all regularizers (penalties
    included). With `nesterov=True` the second line is $W_{k+1} = W_k + \beta v_{k+1}
    - h_k \tilde g(W_k)$: Nesterov's method in the variables of its look-ahead point (Bengio et al.
    2013; PyTorch's `SGD(nesterov=True)` with $v = -h b$), which equals the form of
    Sutskever et al. 2013 up to that change of variables. With anticorrelated weight noise
    (Orvieto et al. 2022) $\xi_{k+1} - \xi_k$ is added to $W_{k+1}$, $\xi_0 = 0$.

    **Arguments:**

    - `step_size`: $h > 0$, flow time per step; or a schedule: a function of the step number that
        gives $h_k \ge 0$, as `optax` makes them (a warm-up from 0, a decay to 0). It must be
        traceable (`jnp.where` instead of `if`).
    - `momentum`: $\beta$ in $[0, 1)$; heavy ball unless `nesterov`.
    - `nesterov`: look ahead; needs `momentum` > 0.
    - `decay`: "coupled" adds the gradient of the penalties to the gradient; "decoupled" keeps it
        out of the velocity and the optimizer and subtracts $h_k$ times it from the weights
        (Loshchilov and Hutter 2019): $W_{k+1} = (1 - h_k \lambda) W_k + v_{k+1}$ for weight decay.
    - `optimizer`: a function that makes an optax gradient transformation from a learning rate,
        such as `optax.adam`; it is given $h$ or the schedule. Or a gradient transformation, used
        as it is: `step_size` then only defines flow time (and decoupled decay).
    - `velocity`: $v_0$ in weight units per step, one `(d_i, d_{i-1})` array a layer; default 0.
    - `path_substeps`: if larger than 1, the Gaussian noise of step $k$ is the normalised sum of the
        normals of the `path_substeps` grid steps inside it. The distribution is the same, and with
        the same key the noise follows the Brownian path of `StochasticFlow` with as many substeps.

    **Raises:** `ValueError` or `TypeError` naming the argument that makes no sense.
    """

    role: ClassVar[Role | None] = Role.TRAINING

    step_size: Scalar
    momentum: Scalar | None
    nesterov: bool = eqx.field(static=True)
    decay: Decay = eqx.field(static=True)
    optimizer: Any
    velocity: Weights | None
    path_substeps: int = eqx.field(static=True)
    schedule: Callable[[Any], Any] | None

    def __init__(
        self,
        step_size: ArrayLike | Callable[[Any], Any],
        momentum: ArrayLike = 0.0,
        *,
        nesterov: bool = False,
        decay: Decay | str = "coupled",
        optimizer: Any = None,
        velocity: Sequence[Any] | None = None,
        path_substeps: int = 1,
    ):
        self.schedule = step_size if callable(step_size) else None
        self.step_size = (
            _first_step_size(step_size)
            if callable(step_size)
            else checked_step_size("GradientDescent", step_size)
        )
        self.momentum = remembered(checked_momentum("GradientDescent", momentum))
        self.decay = checked_decay("GradientDescent", decay)
        self.velocity = checked_velocity("GradientDescent", velocity)
        self.path_substeps = checked_count("GradientDescent.path_substeps", path_substeps)
        self.nesterov = bool(nesterov)
        self.optimizer = _as_optimizer(optimizer)
        for name, given in (("nesterov", self.nesterov), ("velocity", velocity is not None)):
            if given and self.momentum is None:
                raise ValueError(
                    f"GradientDescent.{name} needs momentum > 0; without it no step remembers the "
                    "last one."
                )
        if self.optimizer is not None:
            if self.momentum is not None:
                raise ValueError(
                    f"GradientDescent.momentum={momentum}: an optimizer brings its own "
                    "momentum; set it there, as in functools.partial(optax.sgd, momentum=0.9)."
                )
            made = self._transformation()
            if not is_transformation(made):
                raise TypeError(
                    "GradientDescent.optimizer must make an optax gradient transformation from a "
                    f"learning rate, as optax.adam does; it made {type(made).__name__}."
                )

    @property
    def ticks_per_step(self) -> int:
        """1."""
        return 1

    @property
    def stability_limit(self) -> Scalar | None:
        r"""The largest stable $h \lambda$ on a quadratic loss; None where it is not known.

        $2 (1 + \beta)$, and $2 (1 + \beta) / (1 + 2 \beta)$ for Nesterov's method.
        """
        if self.optimizer is not None or self.schedule is not None:
            return None
        beta = jnp.zeros(()) if self.momentum is None else self.momentum
        limit = 2.0 * (1.0 + beta)
        return limit / (1.0 + 2.0 * beta) if self.nesterov else limit

    @property
    def update_rule(self) -> UpdateRule:
        """Its own."""
        return UpdateRule(self.momentum, self.decay, self.nesterov, self.optimizer, self.schedule)

    @property
    def discrete_training(self) -> "GradientDescent":
        """Itself."""
        return self

    @property
    def rate_theory(self) -> RateTheory:
        """The slow flow exact in the step size."""
        return "finite_step"

    def theory_options(self) -> dict[str, Any]:
        """Step by step."""
        return {"discrete": True}

    def is_random(self, problem: Problem) -> bool:
        """Whether the problem has noise."""
        return problem.is_stochastic

    def check(self, problem: Problem, weights: Weights) -> None:
        """Raise if the velocity, the optimizer or the shared Brownian path does not fit.

        An unstable step size is no error: it shows as diverged replicas.
        """
        check_velocity("GradientDescent", self.velocity, weights)
        if not (self.optimizer is None or takes_learning_rate(self.optimizer)):
            check_descends(self.optimizer, self._transformation())
        if self.path_substeps > 1:
            check_gaussian("GradientDescent.path_substeps", self.path_substeps, problem)

    def init(self, problem: Problem, weights: Weights) -> State:
        """Start with the velocity asked for and a fresh optimizer."""
        velocity = None
        if self.momentum is not None:
            velocity = over_all_paths(self.velocity, weights)
        optimizer = None
        if self.optimizer is not None:
            made = self._transformation()
            fresh = over_paths(lambda w: started(made, w))(weights)
            # Some optimizers remember the weights; the run gives both buffers away.
            optimizer = jax.tree.map(jnp.copy, fresh)
        shift = over_all_paths(None, weights) if problem.has_weight_shift else None
        memory = _Memory(velocity, optimizer, shift)
        whole = whole_turns(weights, memory)
        return State(weights, memory, (), divergence_limit(weights, problem.data), whole)

    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """What one draw of the problem's regularizers takes, and the step size of a schedule."""
        scheduled = jax.ShapeDtypeStruct((), self.step_size.dtype)
        draws = shapes_of_one(lambda stream: problem.draw(stream, widths))
        return draws, None if self.schedule is None else scheduled

    def draw(self, problem: Problem, stream: Stream, widths: tuple[int, ...]) -> Any:
        """The draws of some steps, each made of the grid steps of the path inside it."""
        return drawn_on_grid(problem, stream, widths, self.path_substeps)

    @property
    def grid_steps(self) -> int:
        """`path_substeps`."""
        return self.path_substeps

    def follows_path(self, problem: Problem) -> bool:
        """Whether the noise is Gaussian and all steps have the same size."""
        return problem.is_gaussian and self.schedule is None

    def on_grid(self, steps: int) -> "GradientDescent":
        """With so many `path_substeps`."""
        return with_path_substeps(self, steps)

    def advance(
        self,
        problem: Problem,
        state: State,
        start: Int[Array, ""],
        stop: Int[Array, ""],
        source: Source,
        block: int,
    ) -> State:
        """Take the steps `start` to `stop` (excluded) of every path."""
        widths = widths_of(state.weights)

        def draw(first_step: Array) -> tuple[Any, Any]:
            return self._numbers(problem, source, first_step + jnp.arange(block), widths)

        def stepper(state: State) -> Step:
            def one(j: Array, carry: tuple[Weights, Any]) -> tuple[Weights, Any]:
                return self._stepped(problem, carry, at_step(state.noise, j), state.limit)

            return one

        return advance_in_blocks(state, start, stop, block, draw, stepper)

    def solve(
        self,
        problem: Problem,
        net: DeepLinear,
        times: ArrayLike | Sequence[float] | None = None,
        *,
        steps: ArrayLike | Sequence[int] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Weights:
        """The weights at increasing flow times, one `(T, d_i, d_{i-1})` array a layer.

        A pure function, for use inside `jax.jit`, `jax.vmap` and derivatives of either mode and any
        order, as those of the flows. The path is that of replica 0 of `simulate` with the same key.

        **Arguments:**

        - `times`: `(T,)` flow times >= 0, rounded to the nearest step; or `steps`: numbers of
            steps >= 0, which a schedule and derivatives by the step size need. Both fix the number
            of steps and must be known outside `jit`.
        - `key`: `jax.random.key(seed)`; needed if the problem is random.

        **Returns:** the weights, NaN once they have diverged.

        **Raises:** `ValueError` or `TypeError` naming the argument that makes no sense.
        """
        known = self.step_size if self.schedule is None else None
        numbers = step_numbers("GradientDescent", known, times, steps)
        if self.is_random(problem) and key is None:
            raise ValueError("key: this run is random; pass key=jax.random.key(seed).")
        weights = tuple(w[..., None] for w in net.weights)
        self.check(problem, weights)
        state = self.init(problem, weights)
        key_data = jnp.zeros((2,), jnp.uint32) if key is None else key
        source = Source(key_data, jnp.zeros((1,), jnp.uint32))

        def step(k: Int[Array, ""], carry: tuple[Weights, Any]) -> tuple[Weights, Any]:
            drawn = self._numbers(problem, source, k[None], net.widths)
            return self._stepped(problem, carry, at_step(drawn, 0), state.limit)

        return stepped(step, (state.weights, state.memory), numbers)

    def _numbers(
        self, problem: Problem, source: Source, steps: Array, widths: tuple[int, ...]
    ) -> tuple[Any, Any]:
        """The random numbers of some steps, and their step sizes if a schedule gives them."""
        noise = self.draw(problem, source.at(steps), widths)
        if self.schedule is None:
            return noise, None
        step_sizes = scheduled_step_sizes(self.schedule, steps)
        return noise, jnp.broadcast_to(step_sizes[:, None], (steps.size, source.paths.size))

    def _stepped(
        self,
        problem: Problem,
        carry: tuple[Weights, Any],
        numbers: tuple[Any, Any],
        limit: Float[Array, " paths"],
    ) -> tuple[Weights, Any]:
        """Weights and memory of every path after one step."""

        def step(
            weights: Weights, memory: _Memory, numbers: tuple[Any, Any]
        ) -> tuple[Weights, _Memory]:
            noise, scheduled = numbers
            h = self.step_size if scheduled is None else scheduled
            return self._step(problem, weights, memory, noise, h)

        moved, memory = over_paths(step)(*carry, numbers)
        return mask_diverged(moved, limit), memory

    def _step(
        self,
        problem: Problem,
        weights: Weights,
        memory: "_Memory",
        noise: Any,
        h: Scalar,
    ) -> tuple[Weights, "_Memory"]:
        """One step of one path."""
        coupled = self.decay == "coupled"
        gradient = problem.sampled_gradient(weights, noise, coupled)
        velocity, optimizer, shift = memory.velocity, memory.optimizer, memory.shift
        if self.optimizer is not None:
            made = self._transformation()

            def loss(at: Weights) -> Scalar:
                return problem.sampled_loss(at, noise, coupled)

            update, optimizer = updated(made, gradient, optimizer, weights, loss)
            moved = added(weights, update)
        elif self.momentum is None or velocity is None:
            moved = minus_scaled(weights, h, gradient)
        else:
            beta = self.momentum
            velocity = tuple(beta * v - h * g for v, g in zip(velocity, gradient, strict=True))
            if self.nesterov:
                ahead = minus_scaled(tuple(beta * v for v in velocity), h, gradient)
                moved = added(weights, ahead)
            else:
                moved = added(weights, velocity)
        if not coupled:
            moved = minus_scaled(moved, h, penalty_gradient(problem, weights))
        if shift is not None:
            following = problem.weight_shift(weights, noise)
            moved = tuple(w + (b - a) for w, a, b in zip(moved, shift, following, strict=True))
            shift = following
        return moved, _Memory(velocity, optimizer, shift)

    def _transformation(self) -> Any:
        """The optax gradient transformation."""
        if is_transformation(self.optimizer):
            return self.optimizer
        return self.optimizer(self.step_size if self.schedule is None else self.schedule)


class _Memory(eqx.Module):
    r"""What discrete training remembers of a path; None for what it does not need.

    - `velocity`: $v_k$. `optimizer`: the state of the optimizer.
    - `shift`: the anticorrelated noise $\xi_k$ that the weights hold.
    """

    velocity: Weights | None
    optimizer: Any
    shift: Weights | None


# Schedules and optimizers


@compiled
def scheduled_step_sizes(
    schedule: Callable[[Any], Any], steps: Int[Array, " steps"]
) -> Float[Array, " steps"]:
    """The step sizes $h_k$ of a schedule at the given steps."""
    return jax.vmap(lambda k: jnp.asarray(schedule(k), jnp.result_type(float)).reshape(()))(steps)


def _first_step_size(schedule: Callable[[Any], Any]) -> Scalar:
    r"""$h_0 \ge 0$ of a schedule; the others are looked at when a run asks for them."""
    try:
        (first,) = scheduled_step_sizes(schedule, jnp.zeros((1,), jnp.int32))
    except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
        raise TypeError(
            "GradientDescent.step_size: a schedule must be a function of the step number that "
            "gives one number and can be traced by JAX (jnp.where instead of if); calling it "
            f"failed with {type(error).__name__}."
        ) from error
    if not isinstance(first, Tracer) and float(first) == 0.0:
        return first
    return checked_step_size("GradientDescent", first)


def _as_optimizer(optimizer: Any) -> Any:
    if isinstance(optimizer, functools.partial):
        # Two partials of equal contents are the same program to this one, not to functools'.
        return eqx.Partial(optimizer.func, *optimizer.args, **optimizer.keywords)
    if optimizer is None or is_transformation(optimizer) or callable(optimizer):
        return optimizer
    raise TypeError(
        "GradientDescent.optimizer must be a function of the learning rate such as optax.adam, or "
        f"an optax gradient transformation such as optax.adam(0.1); got {optimizer!r}."
    )
