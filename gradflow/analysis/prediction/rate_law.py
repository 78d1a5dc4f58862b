"""What one theory says of a run: the slow flow of small steps, or of the step size itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gradflow.analysis.prediction.end_point import EndPoint, end_point
from gradflow.backend.compiled import compiled
from gradflow.backend.types import Weights
from gradflow.checks import Decay, is_number
from gradflow.dynamics.slow_flow import SlowFlow
from gradflow.geometry.base import output_loss
from gradflow.geometry.curvature import hessian_trace
from gradflow.geometry.imbalance import imbalance
from gradflow.geometry.manifold import why_singular
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.theory.end_point import Ending, driving_force, slow_end
from gradflow.theory.slow_noise import NEGLIGIBLE, tangential_noise, tangential_size
from gradflow.theory.slow_path import MOST_STEPS, slow_point, slow_points
from gradflow.theory.spread import imbalance_variance_rate

Theory: TypeAlias = Literal["leading_order", "finite_step"]
"""Which slow flow predicts: the classical one of small steps, or that of the step size itself."""


ZERO = 1e-8
"""Imbalance, relative to |W|^2, that is shown as 0: the slow flow is followed to about this."""

STILL = 1e-10
"""Speed of the slow flow, relative to what drives it, that is rounding."""

ROUNDING = 1e-15
"""The same, relative to the curvature times |W|."""


_LOST = (
    "on its way training about the minima becomes unstable, where the theory ends, or it takes "
    f"more than {MOST_STEPS:,} steps of the solver; simulate SlowFlow, which says which"
)


def rounded_speed(force: Any, curvature: Any, size: Any) -> Any:
    """The speed of a slow flow at weights of that norm that may be rounding."""
    return STILL * force + ROUNDING * curvature * size


@dataclass(frozen=True)
class SlowPoint:
    """Where the slow flow is: flow time, steps of training (NaN for a flow), $D$ and network."""

    time: float
    steps: float
    imbalance: float
    net: DeepLinear


@dataclass(frozen=True)
class RateLaw:
    r"""What one theory says: the slow flow of small steps, or that of the step size itself.

    Times and rates are in flow time $t = h k$. What does not exist is NaN or None, and `reason`
    says why.

    - `theory`: `"leading_order"` ($h \to 0$) or `"finite_step"`.
    - `problem`, `step_size`, `momentum`, `decay`: the training; step size 0 is gradient flow.
    - `limit`: the minimum reached, at which the regularization phase starts.
    - `optimization_end`, `optimization_rate`: end of the optimization phase, and the rate at which
        the residual dies in it according to this theory; both NaN where training does not settle at
        the minimum reached.
    - `loss_floor`: excess loss in the regularization phase.
    - `imbalance`, `imbalance_drift`, `imbalance_rate`: $D$, its expected $dD/dt$ and
        $-d \log D/dt$ at the minimum reached, not at the network given.
    - `separation`: `optimization_rate / imbalance_rate`.
    - `sharpness`: $\lambda_\mathrm{max}$ at the minimum reached.
    - `relative_error`: $E|\delta W|^2/|W|^2$ of the fast fluctuation at `limit`, or its root where
        the noise is skewed, and of penalties the rate at which they act over `optimization_rate`.
        The slow flow is the leading order in both: an estimate of the relative error, up to a
        factor of order one.
    - `has_noise`: whether noise acts in the training.
    - `largest_step_size`: the step size at `limit` below which training, or its SDE, is stable in
        mean square; NaN for a flow (`gradflow.theory.mean_square`).
    """

    theory: Theory
    problem: Problem
    step_size: float
    momentum: float
    decay: Decay
    limit: DeepLinear
    optimization_end: float
    optimization_rate: float
    loss_floor: float
    imbalance: float
    imbalance_drift: float
    imbalance_rate: float
    separation: float
    sharpness: float
    relative_error: float
    has_noise: bool
    largest_step_size: float = math.nan
    reason: str = ""

    @property
    def optimization_steps(self) -> float:
        """Steps of the optimization phase; NaN for a flow."""
        return self._steps(self.optimization_end)

    @property
    def half_life(self) -> float:
        """Flow time in which the imbalance halves along the slow flow; infinite if it does not.

        Integrated at the first call, like `end`.
        """
        return self._followed[0]

    @property
    def half_life_steps(self) -> float:
        """`half_life` in steps; NaN for a flow."""
        return self._steps(self.half_life)

    @property
    def end(self) -> EndPoint | None:
        """The stationary point of the slow flow, None where there is none (see `end_reason`)."""
        return self._followed[1]

    @property
    def end_reason(self) -> str:
        """Why there is no end point or half-life, empty if there is one."""
        return self._followed[2]

    @cached_property
    def imbalance_variance_rate(self) -> float:
        r"""$d\,\mathrm{Var}(D)/dt$ between runs, at `limit`; NaN where no formula is known."""
        if not self.has_noise:
            return 0.0
        elsewhere = self.problem.layer_noise or self.problem.has_gradient_noise
        if self.theory == "leading_order" or elsewhere or self.momentum > 0.0:
            return math.nan
        step_size = jnp.asarray(self.step_size)
        return float(_variance_rate(self.problem, self.limit.weights, step_size))

    def standard_deviation(self, time: float) -> float:
        """Of the imbalance between runs after a flow time in which it changes little."""
        return math.sqrt(self.imbalance_variance_rate * time)

    def at(self, time: float | None = None, *, steps: float | None = None) -> SlowPoint:
        """Where the slow flow is after a flow time, or a number of steps of training.

        Ten million steps take as long as ten. Time counts from the start of training; the length of
        the optimization phase, in which `limit` is reached, is neglected.

        **Raises:** `ValueError` where the motion is random (simulate `slow_flow` with replicas),
        nothing acts, or the path comes to where the theory ends before that time.
        """
        if time is not None and steps is not None:
            raise ValueError(f"at: time={time!r} and steps={steps!r}: give only one of them.")
        if time is steps is None:
            raise ValueError("at: give a flow time, as in at(100.0), or at(steps=10**7).")
        name, given = ("steps", steps) if time is None else ("time", time)
        if not is_number(given):
            raise TypeError(f"at: {name} must be a number; got {given!r}.")
        when = float(np.asarray(given))
        if not 0.0 <= when < math.inf:
            raise ValueError(f"at: {name} must be finite and >= 0; got {given!r}.")
        if name == "steps":
            if self.step_size == 0.0:
                raise ValueError(f"at: steps={given}, but a flow has no steps; give a flow time.")
            when *= self.step_size
        if why := self._no_path:
            raise ValueError(f"at: {why}.")
        net = self.limit
        if when > 0.0 and not self._rests:
            weights, arrived = _slow_point(*self._start(jnp.asarray(when)), **self._options())
            if not bool(arrived) and self.end is not None and when >= self._followed[3]:
                weights = self.end.net.weights  # so late that time has no digits for a step
            elif not bool(arrived):
                raise ValueError(f"at: the slow flow does not get to t = {when:g}: {_LOST}.")
            net = DeepLinear(weights)
        return SlowPoint(when, self._steps(when), float(imbalance(net)), net)

    def imbalances(self, times: Sequence[float] | np.ndarray) -> Float[np.ndarray, " time"]:
        """The imbalance of the slow flow at ascending flow times, followed once.

        **Raises:** `ValueError` as `at` does.
        """
        if why := self._no_path:
            raise ValueError(f"imbalances: {why}.")
        wanted = np.asarray(times, dtype=float)
        if self._rests:
            return np.full(wanted.shape, float(imbalance(self.limit)))
        weights, arrived = _slow_points(*self._start(jnp.asarray(wanted)), **self._options())
        if not np.all(arrived):
            first = wanted[int(np.argmin(np.asarray(arrived)))]
            raise ValueError(f"imbalances: the slow flow does not get to t = {first:g}: {_LOST}.")
        return np.asarray(jax.vmap(lambda w: imbalance(DeepLinear(w)))(weights))

    @property
    def turn_note(self) -> str:
        """Says that the imbalance ends above its start although it falls at first, or the reverse.

        Empty if it does not, or there is no end.
        """
        if self.end is None or not self.imbalance_drift * (self.end.imbalance - self.imbalance) < 0:
            return ""
        first, later = ("falls", "grows") if self.imbalance_drift < 0.0 else ("grows", "falls")
        return (
            f"the imbalance {first} at first and {later} later, to {self.end.imbalance:.4g} where "
            "the slow flow ends: rate and half-life are those of the beginning"
        )

    @property
    def slow_flow(self) -> SlowFlow:
        """The dynamics that this law describes; only with a step size."""
        finite = self.theory == "finite_step"
        return SlowFlow(self.step_size, finite, self.momentum, decay=self.decay)

    def _steps(self, time: float) -> float:
        return time / self.step_size if self.step_size > 0.0 else math.nan

    @cached_property
    def _followed(self) -> tuple[float, EndPoint | None, str, float]:
        """Half-life, end point, why there is none, and the flow time at which it is reached."""
        if why := self._no_path:
            return math.nan, None, why, math.nan
        if self._rests:
            return math.inf, end_point(self.problem, self.limit), "", 0.0
        found = slow_end(*self._start(), **self._options())
        half_life = float(found.half_life)
        if bool(found.ending != Ending.still):
            return half_life, None, str(Ending[found.ending]), math.nan
        end = end_point(self.problem, DeepLinear(found.weights))
        return half_life, end, "", float(found.time)

    def _start(self, *time: Array) -> tuple[Any, ...]:
        """Arguments of the functions that follow the slow flow; arrays, so as not to recompile."""
        law = jnp.asarray(self.step_size), jnp.asarray(self.momentum)
        return self.problem, self.limit.weights, *time, *law

    def _options(self) -> dict[str, Any]:
        return {"finite_step": self.theory == "finite_step", "decay": self.decay}

    @cached_property
    def _no_path(self) -> str:
        """Why there is no path to follow, empty if there is one."""
        if not math.isfinite(self.imbalance_drift):
            return self.reason
        if not (self.has_noise or self.problem.penalties or self.problem.layer_noise):
            return "no regularizer acts: every minimum is a stationary point"
        if why := why_singular(self.limit.weights, output_loss(self.problem)):
            return f"the minimum is a singular point of the minima manifold: {why}"
        random = self.step_size > 0.0 and self.slow_flow.is_random(self.problem)
        if random and not self._rests:
            return (
                "noise along the minima manifold makes the motion random: it has a distribution, "
                "no end point; simulate SlowFlow with replicas"
            )
        return ""

    @cached_property
    def _rests(self) -> bool:
        """Whether neither drift nor noise moves the weights along the manifold at `limit`."""
        if self.step_size == 0.0 or not math.isfinite(self.imbalance_drift):
            return False
        return bool(_rests(self.slow_flow, self.problem, self.limit.weights))


_slow_point = compiled(slow_point)
_slow_points = compiled(slow_points)
_variance_rate = compiled(imbalance_variance_rate)


@compiled
def _rests(flow: SlowFlow, problem: Problem, weights: Weights) -> Bool[Array, ""]:
    """Whether what a slow flow does at a minimum is rounding: its drift and its noise.

    One draw decides: of noise that acts at all it is almost surely not zero.
    """
    curvature = hessian_trace(DeepLinear(weights), problem.data)
    size, speed = (
        jnp.sqrt(sum(jnp.sum(w * w) for w in layers))
        for layers in (weights, flow.velocity(problem, weights))
    )
    force = driving_force(problem, weights, flow.step_size, flow.momentum, flow.finite_step)
    still = speed <= rounded_speed(force, curvature, size)
    normals = jax.random.normal(jax.random.key(0), (tangential_size(problem, weights),))
    if normals.size == 0:
        return still
    noise = sum(jnp.sum(z * z) for z in tangential_noise(problem, weights, normals))
    return still & (noise <= NEGLIGIBLE * curvature * jnp.trace(problem.data.syy))


def shown_imbalance(value: float, norms: tuple[float, ...]) -> float:
    """An imbalance as shown: 0 below `ZERO` of the squared norm, given layer by layer."""
    return 0.0 if abs(value) <= ZERO * sum(norms) else value
