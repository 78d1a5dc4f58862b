"""The slow flow: motion along the minima manifold in the regularization phase."""

import warnings
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow.backend.compiled import compiled
from gradflow.backend.tracing import is_traced
from gradflow.backend.types import Scalar, Weights
from gradflow.checks import (
    Decay,
    as_parameter,
    checked_decay,
    checked_momentum,
    checked_step_size,
    remembered,
)
from gradflow.dynamics.base import (
    DYNAMICS,
    AbstractDynamics,
    End,
    Progress,
    RateTheory,
    Role,
    State,
    divergence_limit,
    is_alive,
)
from gradflow.dynamics.descent import GradientDescent
from gradflow.dynamics.integration import SolverMemory
from gradflow.dynamics.modified_flow import is_reshuffled
from gradflow.dynamics.ode import checked_tolerances, chosen_solver
from gradflow.dynamics.slow_motion import SlowMemory, along_manifold, moved_to, random_motion
from gradflow.dynamics.slow_sde import noise_square_rates
from gradflow.dynamics.update_rule import UpdateRule
from gradflow.geometry.base import check_double, output_loss
from gradflow.geometry.curvature import minima_sharpness
from gradflow.geometry.kernel import kernel_at
from gradflow.geometry.limit_maps import descent_projection, flow_projection
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.random.streams import Normals, Source
from gradflow.theory.drift import flow_imbalance_drift
from gradflow.theory.lyapunov import MOST_STEPS
from gradflow.theory.slow_drift import slow_drift
from gradflow.theory.slow_noise import (
    has_tangential_noise,
    tangential_noise,
    tangential_size,
)

NEAR = 0.95
"""Share of the largest stable step size from which on a start is warned of."""

CELL = 0.02
"""Default length of a cell, in units of the time in which drift and diffusion change a layer."""

PROBES = 16
"""Draws from which the strength of the diffusion is estimated for that."""

RESOLVED = 1e-5
"""Relative accuracy of the largest step size that an error names."""

BISECTIONS = 40
"""Halvings of an interval in which the end of a path, or of stability, is looked for."""


class EdgeOfStabilityWarning(UserWarning):
    """The slow flow starts close to where its theory ends."""


@DYNAMICS.register
class SlowFlow(AbstractDynamics):
    r"""Motion along the minima manifold: where SGD is after many steps, without taking them.

    $$\dot W = \text{slow\_drift}(W), \qquad t = h k,$$

    on $\{P S^{1/2} = T S^{1/2}\}$, exact in the step size $h$ and of leading order in the noise and
    the penalties; see `gradflow.theory.slow_drift`. Integrated with adaptive steps and retracted to
    the manifold, so that the end-to-end matrix is conserved to rounding at every saved time.

    *The start* may be anywhere: at $t = 0$ the weights are at the minimum that noise-free training
    (gradient descent with the same step size and momentum; gradient flow for `finite_step=False`)
    reaches from it. The length of this optimization phase is neglected, and with it what the noise
    does in it beyond the slow drift at its end: `gf.predict` says how much that is (`overlap`).

    *Noise along the manifold* (`GradientNoise`; noise inside the network where the data leave a
    residual or are noisy themselves) makes the motion itself random: the Ito equation
    $dW = a\, dt + B\, d\beta$ on the manifold, stepped in cells of the Brownian path with weak
    order 1 in their length. Then replicas differ, and a key is needed. Noise on the data alone
    kicks the weights across the manifold, and its slow flow is deterministic.

    *The edge of stability.* The theory ends where training about the minimum is no longer stable:
    at $h \lambda_\mathrm{max} = 2 (1 + \beta)$, earlier where the noise grows with the fluctuation
    that it makes. A start beyond it is an error, one within 5 % of it a warning, and a path that
    gets there stops (it counts as diverged), with a warning that says so.

    *Size.* Hidden widths cost next to nothing. Up to $d_N d_0 = 256$ the kernel of the end-to-end
    matrix is decomposed; beyond, noise on the data takes one Cholesky factorisation (labels) or a
    Krylov method on sums of Kronecker products (inputs, batches) a velocity, up to 64 inputs and
    outputs and somewhat more. See docs/slow_flow.md for times.

    **Arguments:**

    - `step_size`: $h > 0$ of the training that it describes.
    - `finite_step`: False for the classical limit $h \lambda \to 0$ of the drift.
    - `momentum`: heavy-ball $\beta$ of that training, in $[0, 1)$.
    - `decay`: whether its penalties are "coupled" to the momentum or "decoupled".
    - `rtol`, `atol`: relative and absolute tolerance of a step, > 0.
    - `solver`: any diffrax ODE solver with an error estimate; default `diffrax.Dopri8()`.
    - `cell`: length of the cells in flow time where the motion is random; default 0.02 times the
        shortest time in which drift or diffusion change a layer at the start.

    **Raises:** `ValueError` or `TypeError` naming the argument that makes no sense.
    """

    most_paths: ClassVar[int | None] = 4096
    role: ClassVar[Role | None] = Role.SLOW_FLOW

    step_size: Scalar
    finite_step: bool = eqx.field(static=True)
    momentum: Scalar | None
    decay: Decay = eqx.field(static=True)
    rtol: Scalar
    atol: Scalar
    solver: diffrax.AbstractSolver
    cell: Scalar | None

    def __init__(
        self,
        step_size: ArrayLike,
        finite_step: bool = True,
        momentum: ArrayLike = 0.0,
        *,
        decay: Decay | str = "coupled",
        rtol: ArrayLike = 1e-8,
        atol: ArrayLike = 1e-10,
        solver: diffrax.AbstractSolver | None = None,
        cell: ArrayLike | None = None,
    ):
        self.step_size = checked_step_size("SlowFlow", step_size)
        if not isinstance(finite_step, bool):
            raise ValueError(f"SlowFlow.finite_step must be True or False; got {finite_step!r}.")
        self.finite_step = finite_step
        self.momentum = remembered(checked_momentum("SlowFlow", momentum))
        self.decay = checked_decay("SlowFlow", decay)
        self.rtol, self.atol = checked_tolerances("SlowFlow", rtol, atol)
        self.solver = chosen_solver("SlowFlow", solver, stiff=False)
        self.cell = None if cell is None else as_parameter(cell, "SlowFlow.cell")
        if self.cell is None or is_traced(self.cell):
            return
        if self.cell.ndim != 0:
            raise ValueError(f"SlowFlow.cell must be a single number; got shape {self.cell.shape}.")
        if not 0.0 < float(self.cell) < float("inf"):
            raise ValueError(
                f"SlowFlow.cell must be a finite flow time > 0 or None; got {float(self.cell)}."
            )

    @property
    def ticks_per_step(self) -> None:
        """None: its steps are adaptive, or cells."""
        return None

    @property
    def update_rule(self) -> UpdateRule:
        """That of the training which it describes."""
        return UpdateRule(self.momentum, self.decay)

    @property
    def discrete_training(self) -> GradientDescent | None:
        """That training, if it is exact in the step size."""
        if not self.finite_step:
            return None
        beta = 0.0 if self.momentum is None else self.momentum
        return GradientDescent(self.step_size, beta, decay=self.decay)

    @property
    def rate_theory(self) -> RateTheory:
        """Its own."""
        return "finite_step" if self.finite_step else "leading_order"

    def theory_options(self) -> dict[str, Any]:
        """Step by step, or the limit of small steps."""
        return {"discrete": self.finite_step}

    def is_random(self, problem: Problem) -> bool:
        """Whether noise has a part along the manifold."""
        return has_tangential_noise(problem)

    def describes_noise(self, problem: Problem) -> bool:
        """Whether the problem has noise: it has the floor of its training, though it is smooth."""
        return problem.is_stochastic

    def why_not_normals(self, normals: Normals, problem: Problem) -> str:
        """It draws in cells of its own."""
        return (
            "SlowFlow reaches saved times by a Brownian bridge inside its cells, whose random "
            "numbers have a key of their own that normals does not change; leave it out."
        )

    def check(self, problem: Problem, weights: Weights) -> None:
        """Raise where training does not settle at a stable minimum, warn where it hardly does."""
        check_double(weights, "SlowFlow")
        if is_reshuffled(problem):
            raise ValueError(
                "Minibatch.reshuffled=True correlates the steps of an epoch, so the slow flow of "
                "fresh noise does not describe it; use reshuffled=False for SlowFlow."
            )
        minima, _ = self._minima(problem, weights)
        beyond = self.step_size / NEAR
        near = [m for m in minima if not _is_stable(self, problem, m, beyond)]
        if near:
            h_lam = max(self._edge_share(problem, m) for m in near) * self._edge
            warnings.warn(
                f"SlowFlow.step_size={float(self.step_size):g}: where the slow flow starts, at "
                f"h lam_max = {h_lam:.4g}, it is within 5 % of the largest stable one, where its "
                "theory ends. Fluctuations are large there and leading order in the noise is less "
                "accurate; a smaller step size keeps away from it.",
                EdgeOfStabilityWarning,
                stacklevel=3,
            )

    def init(self, problem: Problem, weights: Weights) -> State:
        """Start at the minima that the optimization phase reaches."""
        distinct, which = self._minima(problem, weights)
        stacked = tuple(jnp.stack(layers, axis=-1) for layers in zip(*distinct, strict=True))
        minima = tuple(w[..., which] for w in stacked)
        anchor = cell = None
        if self.is_random(problem):
            anchor = tuple(map(jnp.copy, minima))
            cell = jnp.stack([_cell(self, problem, m) for m in distinct])[which]
        start = jnp.zeros((which.size,), minima[0].dtype)
        memory = SlowMemory(
            SolverMemory.at_start(minima), anchor, cell, tuple(map(jnp.copy, minima)), start
        )
        return State(
            minima,
            memory,
            (),
            divergence_limit(minima, problem.data),
            progress=Progress.at_start(which.size),
        )

    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """None: a cell draws its own."""
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
        """Move every path along the manifold from flow time `start` to `stop`."""
        memory, progress = state.memory, state.progress
        assert progress is not None
        alive = jnp.isfinite(state.weights[0][0, 0])
        leaves = alive & (progress.time == start)  # not on the way since an earlier call
        before = jax.tree.map(
            lambda now, then: jnp.where(leaves, now, then), state.weights, memory.before
        )
        since = jnp.where(leaves, start, memory.since)
        if memory.anchor is None:
            weights, solver, progress = along_manifold(
                self._field, self.solver, self.rtol, self.atol, problem, state, stop
            )
            anchor = None
        else:
            weights, anchor, progress = random_motion(
                lambda w: self.velocity(problem, w),
                lambda w, z: self._diffusion(problem, w, z),
                problem,
                state,
                stop,
                source,
            )
            solver = memory.solver
        escaped = ~is_alive(weights, state.limit) & (progress.end == End.NONE)
        end = jnp.where(escaped | (progress.end == End.COLLAPSE), End.DIVERGED, progress.end)
        weights = tuple(jnp.where(end == End.NONE, w, jnp.nan) for w in weights)
        progress = eqx.tree_at(lambda p: p.end, progress, end)
        memory = SlowMemory(solver, anchor, memory.cell, before, since)
        return State(weights, memory, (), state.limit, progress=progress)

    def velocity(self, problem: Problem, weights: Weights) -> Weights:
        """The expected velocity of one path at weights on the manifold, one array a layer."""
        return slow_drift(
            problem,
            weights,
            self.step_size,
            self.momentum,
            finite_step=self.finite_step,
            decay=self.decay,
        )

    def imbalance_drift(self, problem: Problem, weights: Weights) -> Scalar:
        """The expected $dD/dt$ of one path at weights on the manifold."""
        velocity = self.velocity(problem, weights)
        size = tangential_size(problem, weights)
        if size > 0:
            # A motion of every layer along itself with which |W_i|^2 changes as noise makes it.
            rates = noise_square_rates(
                lambda w, z: self._diffusion(problem, w, z), size, weights, output_loss(problem)
            )
            velocity = tuple(
                v + 0.5 * rate * w / jnp.sum(w * w)
                for v, rate, w in zip(velocity, rates, weights, strict=True)
            )
        return flow_imbalance_drift(weights, velocity)

    def why_ended(self, problem: Problem, state: State, path: int, stop: float) -> str:
        """When and why a path stopped before flow time `stop`, where the run came to `state`."""
        last = tuple(w[..., path] for w in state.memory.before)
        time = float(state.memory.since[path])
        wandered = state.memory.anchor is not None
        if not wandered:
            last, time = self._followed_to_its_end(problem, last, time, stop)
        share = self._edge_share(problem, last)
        place = f"t = {time:.6g}, where h lam_max = {share * self._edge:.4g}"
        if wandered:
            return (
                f"the saved time after {place}: noise carried it to where training about the "
                "minima is not stable and the theory ends, or steps of a cell were too coarse for "
                "the drift near there (SlowFlow.cell)"
            )
        if share > NEAR:
            return f"{place}: the edge of stability is at {self._edge:g}, and its theory ends there"
        return f"{place}: beyond it fluctuations about the minima are not stationary"

    def _field(self, t: Any, weights: Weights, problem: Problem) -> Weights:
        """The velocity, tangent to the weights of the same end-to-end matrix wherever they are."""
        del t
        return self.velocity(problem, weights)

    def _diffusion(
        self, problem: Problem, weights: Weights, increment: Float[Array, " normals"]
    ) -> Weights:
        r"""$\tfrac{\sqrt h}{1 - \beta} F\, d\beta$, the motion by noise along the manifold."""
        scale = jnp.sqrt(self.step_size)
        if self.momentum is not None:
            scale = scale / (1.0 - self.momentum)
        return tuple(scale * z for z in tangential_noise(problem, weights, increment))

    # Where it starts, and where it cannot

    def _minima(self, problem: Problem, weights: Weights) -> tuple[list[Weights], np.ndarray]:
        """The minimum of every distinct start, and which of them is that of each path."""
        layers = jax.device_get(weights)
        flat = np.concatenate([w.reshape(-1, w.shape[-1]) for w in layers])
        _, first, which = np.unique(flat, axis=1, return_index=True, return_inverse=True)
        starts = [tuple(jnp.asarray(w[..., path]) for w in layers) for path in first]
        return [self._minimum(problem, start) for start in starts], which.reshape(-1)

    def _minimum(self, problem: Problem, start: Weights) -> Weights:
        """The minimum that the optimization phase reaches, if training is stable there."""
        net, h = DeepLinear(start), float(self.step_size)
        try:
            if self.finite_step:
                beta = 0.0 if self.momentum is None else self.momentum
                minimum = descent_projection(net, problem, self.step_size, beta).weights
            else:
                minimum = flow_projection(net, problem).weights
        except ValueError as error:
            raise ValueError(
                f"SlowFlow.step_size={h:g}: the optimization phase does not end at a minimum to "
                f"start from. {error}{self._hint(net, problem)}"
            ) from error
        if self.finite_step:
            self._check_stable(problem, minimum)
        return minimum

    def _hint(self, net: DeepLinear, problem: Problem) -> str:
        """What step size the minimum of gradient flow would allow, if it is the step size."""
        try:
            share = self._edge_share(problem, flow_projection(net, problem).weights)
        except ValueError:
            return ""
        if not self.finite_step or share < 1.0:
            return ""
        return (
            f" The minimum that gradient flow reaches has h lam_max = {share * self._edge:.4g}, "
            f"beyond the edge of stability at {self._edge:g}: there the largest step size is "
            f"{float(self.step_size) / share:.4g}."
        )

    def _check_stable(self, problem: Problem, minimum: Weights) -> None:
        h, share = float(self.step_size), self._edge_share(problem, minimum)
        if share < 1.0 and _is_stable(self, problem, minimum, self.step_size):
            return
        where = f"at the minimum where it starts h lam_max = {share * self._edge:.4g}"
        why = f"beyond the edge of stability at {self._edge:g}"
        if share < 1.0:
            why = (
                f"below the edge at {self._edge:g}, but the noise grows with the fluctuation that "
                "it makes, and no stationary fluctuation exists"
            )
            if kernel_at(minimum, output_loss(problem).root).is_large:
                why += f" (or none was found in {MOST_STEPS} steps of a Krylov method)"
        low, high = 0.0, min(h, h / share)
        if _is_stable(self, problem, minimum, jnp.asarray((1.0 - RESOLVED) * high)):
            low = high
        for _ in range(BISECTIONS):
            if high - low <= RESOLVED * high:
                break
            middle = 0.5 * (low + high)
            stable = _is_stable(self, problem, minimum, jnp.asarray(middle))
            low, high = (middle, high) if stable else (low, middle)
        largest = f"The largest step size at this minimum is {low:.4g}; lower it, or start flatter."
        if low == 0.0:
            largest = f"None was found down to {high:.2g} either; start from another minimum."
        raise ValueError(
            f"SlowFlow.step_size={h:g}: {where}, {why}: the theory of the slow flow ends there. "
            f"{largest}"
        )

    def _edge_share(self, problem: Problem, minimum: Weights) -> float:
        r"""$h \lambda_\mathrm{max}$ as a share of the edge of stability; 0 without finite steps."""
        if not self.finite_step:
            return 0.0
        return float(self.step_size * _top_curvature(problem, minimum)) / self._edge

    @property
    def _edge(self) -> float:
        r"""The $h \lambda$ from which on training is unstable, $2 (1 + \beta)$."""
        return 2.0 if self.momentum is None else 2.0 * (1.0 + float(self.momentum))

    def _followed_to_its_end(
        self, problem: Problem, weights: Weights, time: float, stop: float
    ) -> tuple[Weights, float]:
        """The last weights of a path that ends between `time` and `stop`, and when that is."""
        alive, low, high = tuple(w[..., None] for w in weights), time, stop
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            further = _followed(self, problem, alive, jnp.asarray(low), jnp.asarray(middle))
            if bool(jnp.isfinite(further[0][0, 0, 0])):
                alive, low = further, middle
            else:
                high = middle
        return tuple(w[..., 0] for w in alive), low


@compiled
def _cell(dynamics: SlowFlow, problem: Problem, minimum: Weights) -> Scalar:
    """The length of a cell: as asked for, or `CELL` of the shortest time scale at the start."""
    if dynamics.cell is not None:
        return dynamics.cell
    probes = jax.random.normal(jax.random.key(0), (PROBES, tangential_size(problem, minimum)))
    noise = jax.vmap(lambda z: dynamics._diffusion(problem, minimum, z))(probes)
    rates = [
        jnp.sqrt(jnp.sum(v * v) / jnp.sum(w * w)) + jnp.sum(z * z) / PROBES / jnp.sum(w * w)
        for w, v, z in zip(minimum, dynamics.velocity(problem, minimum), noise, strict=True)
    ]
    return CELL / jnp.max(jnp.stack(rates))


@compiled
def _top_curvature(problem: Problem, minimum: Weights) -> Scalar:
    return minima_sharpness(minimum, output_loss(problem).root)


@compiled
def _is_stable(dynamics: SlowFlow, problem: Problem, minimum: Weights, step_size: Scalar) -> Array:
    """Whether the slow flow has a velocity at a minimum."""
    at = eqx.tree_at(lambda d: d.step_size, dynamics, step_size)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in at.velocity(problem, minimum)]))


@compiled
def _followed(
    dynamics: SlowFlow, problem: Problem, weights: Weights, start: Array, stop: Array
) -> Weights:
    tolerances = dynamics.rtol, dynamics.atol
    return moved_to(dynamics._field, dynamics.solver, *tolerances, problem, weights, start, stop)
