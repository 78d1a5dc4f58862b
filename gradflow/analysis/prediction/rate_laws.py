"""What a prediction holds: the rate laws at leading order and at finite step, and their table."""

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
from gradflow.geometry.imbalance import imbalance, squared_norms
from gradflow.geometry.manifold import why_singular
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.simulation.progress import announced
from gradflow.theory.end_point import Ending, driving_force, slow_end
from gradflow.theory.slow_noise import NEGLIGIBLE, tangential_noise, tangential_size
from gradflow.theory.slow_path import slow_point, slow_points
from gradflow.theory.spread import imbalance_variance_rate

Theory: TypeAlias = Literal["leading_order", "finite_step"]
"""Which slow flow predicts: the classical one of small steps, or that of the step size itself."""


ZERO = 1e-8
"""Imbalance, relative to |W|^2, that is shown as 0: the slow flow is followed to about this."""

STILL = 1e-10
"""Speed of the slow flow, relative to what drives it, that is rounding."""

ROUNDING = 1e-15
"""The same, relative to the curvature times |W|."""


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
        the noise is skewed. The slow flow is the leading order in it: an estimate of the relative
        error, up to a factor of order one.
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
            if not bool(arrived) and self.end is not None:
                weights = self.end.net.weights  # so late that time has no digits for a step
            elif not bool(arrived):
                raise ValueError(
                    f"at: the slow flow does not get to t = {when:g}: on its way training about "
                    "the minima becomes unstable, and the theory ends."
                )
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
            raise ValueError(
                f"imbalances: the slow flow does not get to t = {first:g}: on its way training "
                "about the minima becomes unstable, and the theory ends."
            )
        return np.asarray(jax.vmap(lambda w: imbalance(DeepLinear(w)))(weights))

    @property
    def slow_flow(self) -> SlowFlow:
        """The dynamics that this law describes; only with a step size."""
        finite = self.theory == "finite_step"
        return SlowFlow(self.step_size, finite, self.momentum, decay=self.decay)

    def _steps(self, time: float) -> float:
        return time / self.step_size if self.step_size > 0.0 else math.nan

    @cached_property
    def _followed(self) -> tuple[float, EndPoint | None, str]:
        """Half-life, end point and why there is none."""
        if why := self._no_path:
            return math.nan, None, why
        if self._rests:
            return math.inf, end_point(self.problem, self.limit), ""
        found = _slow_end(*self._start(), **self._options())
        half_life = float(found.half_life)
        if bool(found.ending != Ending.still):
            return half_life, None, str(Ending[found.ending])
        return half_life, end_point(self.problem, DeepLinear(found.weights)), ""

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


@dataclass(frozen=True)
class Prediction:
    r"""What theory predicts for a dynamics on a problem from a network.

    - `optimization_rate`: rate at which the residual $|M|$ dies at the minimum reached, the
        smallest eigenvalue of the end-to-end kernel (for gradient descent per unit of flow time,
        $-\log|1 - h\lambda|/h$); per flow time.
    - `optimization_end`: end of the optimization phase, flow time: the noise-free residual has come
        within `eps` of the floor.
    - `loss_floor`: excess loss in the regularization phase.
    - `imbalance_rate`: $-d \log D / dt$ at the start of the regularization phase, per flow time;
        negative if imbalance grows. `imbalance_drift`: $dD/dt$ there.
    - `separation`: `optimization_rate / imbalance_rate`, the ratio of the two time scales.
    - `limit`: the minimum reached, at which the regularization phase starts. Numbers "at the
        minimum reached" belong to it, not to the network given.
    - `reason`: why a field is NaN, empty if none is.
    - `optimization_steps`: `optimization_end` in steps; NaN for a flow.
    - `leading_rate`, `leading_drift`: `imbalance_rate` and `imbalance_drift` of the classical
        theory $h \to 0$, at the same minimum.
    - `relative_error`: $E|\delta W|^2/|W|^2$ of the fast fluctuation at `limit`, or its root where
        the noise is skewed: the size of what the theory neglects relative to what it keeps, up to a
        factor of order one.
    - `sharpness`: $h \lambda_\mathrm{max}$ at the minimum reached; `stability`: its share of the
        edge of stability $2 (1 + \beta)$, where the theory ends. NaN for a flow, which has no step
        size.
    - `largest_step_size`: the step size at `limit` below which the dynamics is stable in mean
        square. Noise on inputs and batches make it smaller than the edge of stability; other noise
        does not at leading order. Infinite for an SDE without such noise, NaN for a flow.
    - `overlap`: by how much noise is expected to change $D$ during the optimization phase beyond
        what the slow flow counts, which starts at `limit`; see `overlap.py`. A
        prediction is off by up to about that, and by more if the residual decays as slowly as $D$.
    - `start_note`: says that the network given is itself beyond the edge of stability, or that the
        phases overlap; else empty.
    - `leading_order`, `finite_step`: the rate laws of small steps, and of the step size itself,
        both at `limit`. For an SDE, which is a limit of small steps, and for a flow the second is
        None.
    - `slow`: the one that the run follows; None for SVAG and the SDE of order 2.

    `half_life`, `leading_half_life` and `end` with what belongs to it integrate the slow flow, in
    seconds and when they are first asked for; `print` asks for them.
    """

    optimization_rate: float
    optimization_end: float
    loss_floor: float
    imbalance_rate: float
    imbalance_drift: float
    separation: float
    eps: float
    limit: DeepLinear
    reason: str = ""
    optimization_steps: float = math.nan
    leading_rate: float = math.nan
    leading_drift: float = math.nan
    relative_error: float = math.nan
    sharpness: float = math.nan
    stability: float = math.nan
    largest_step_size: float = math.nan
    leading_order: RateLaw | None = None
    finite_step: RateLaw | None = None
    slow: RateLaw | None = None
    start_note: str = ""
    overlap: float = 0.0

    @property
    def half_life(self) -> float:
        """Flow time until the imbalance has halved along the slow flow; NaN if it never does."""
        return _finite_half_life(self.slow)

    @property
    def leading_half_life(self) -> float:
        r"""`half_life` of the classical theory $h \to 0$."""
        return _finite_half_life(self.leading_order)

    @property
    def end(self) -> DeepLinear | None:
        """The stationary point of the slow flow; None where there is none."""
        return None if self._end is None else self._end.net

    @property
    def end_imbalance(self) -> float | None:
        """The imbalance at the end."""
        return None if self._end is None else self._end.imbalance

    @property
    def end_block_traces(self) -> np.ndarray | None:
        """Traces of the Hessian's diagonal blocks at the end, `(N,)`; label noise equalises them.

        Exactly so for small steps; steps near the edge of stability prefer a lower sharpness.
        """
        return None if self._end is None else np.asarray(self._end.block_traces)

    @property
    def end_reason(self) -> str:
        """Why there is no half-life or no end, empty if there are both."""
        if self.slow is None:
            if self.leading_order is None:
                return ""
            return (
                "half-life and end point are those of a slow flow, which SVAG and the SDE of order "
                "2 do not have of their own; for those of small steps predict the SDE of order 1"
            )
        never = "the imbalance never halves on its way" if self.slow.half_life == math.inf else ""
        return "; ".join(text for text in (self.slow.end_reason, never) if text)

    @property
    def _end(self) -> EndPoint | None:
        return None if self.slow is None else self.slow.end

    @property
    def laws(self) -> dict[Theory, RateLaw]:
        """The rate laws that there are, by the name of the theory."""
        named: dict[Theory, RateLaw | None] = {
            "leading_order": self.leading_order,
            "finite_step": self.finite_step,
        }
        return {theory: law for theory, law in named.items() if law is not None}

    def at(self, time: float | None = None, *, steps: float | None = None) -> SlowPoint:
        """Imbalance and network after a flow time or steps of training; see `RateLaw.at`."""
        if self.slow is None:
            raise ValueError(f"at: {self.reason or self.end_reason}.")
        return self.slow.at(time, steps=steps)

    def __str__(self) -> str:
        with announced("following the slow flow to its end (compiled at the first call)"):
            table = prediction_rows(self)
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table]
        notes = [f"note: {text}" for text in prediction_notes(self)]
        return "\n".join([*(line.rstrip() for line in lines), *notes])


def _finite_half_life(law: RateLaw | None) -> float:
    return math.nan if law is None or math.isinf(law.half_life) else law.half_life


def prediction_rows(prediction: Prediction) -> list[tuple[str, str, str]]:
    """The table of a prediction: quantity, leading order, finite step; the first row is its head.

    Integrates the slow flows for half-lives and end points.
    """
    laws = prediction.leading_order, prediction.finite_step
    rows = [("", "leading order", "finite step")]
    for title, read in _ROWS:
        cells = [_MISSING if law is None else _written(read(law)) for law in laws]
        rows.append((title, cells[0], cells[1]))
    return rows


def prediction_notes(prediction: Prediction) -> list[str]:
    """Why something in the table of a prediction is missing."""
    texts = [prediction.start_note, prediction.reason]
    for law in prediction.laws.values():
        texts += [law.reason, law.end_reason]
    return [text for text in dict.fromkeys(texts) if text]


_slow_end = compiled(slow_end)
_slow_point = compiled(slow_point)
_slow_points = compiled(slow_points)
_variance_rate = compiled(imbalance_variance_rate)

_MISSING = "\u2013"


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


def _at_end(name: str) -> Any:
    return lambda law: math.nan if law.end is None else getattr(law.end, name)


def _imbalance(law: RateLaw) -> float:
    return shown_imbalance(law.imbalance, tuple(np.asarray(squared_norms(law.limit)).tolist()))


def _end_imbalance(law: RateLaw) -> float:
    if law.end is None:
        return math.nan
    return shown_imbalance(law.end.imbalance, law.end.squared_norms)


def _sharpness(law: RateLaw) -> float:
    return law.step_size * law.sharpness if law.step_size > 0.0 else math.nan


_ROWS: tuple[tuple[str, Any], ...] = (
    ("h lambda_max at the minimum reached", _sharpness),
    ("largest step size, mean square", lambda law: law.largest_step_size),
    ("optimization phase ends at t", lambda law: law.optimization_end),
    ("  in steps", lambda law: law.optimization_steps),
    ("optimization rate", lambda law: law.optimization_rate),
    ("loss floor", lambda law: law.loss_floor),
    ("imbalance D at the minimum reached", _imbalance),
    ("drift dD/dt", lambda law: law.imbalance_drift),
    ("rate -d log D/dt", lambda law: law.imbalance_rate),
    ("separation of the phases", lambda law: law.separation),
    ("half-life of the imbalance, t", lambda law: law.half_life),
    ("  in steps", lambda law: law.half_life_steps),
    ("relative error, about", lambda law: law.relative_error),
    ("scatter between runs, dVar(D)/dt", lambda law: law.imbalance_variance_rate),
    ("end point: imbalance D", _end_imbalance),
    ("  |W_i+1|^2/|W_i|^2", _at_end("norm_ratios")),
    ("  Hessian block traces", _at_end("block_traces")),
    ("  sharpness", _at_end("sharpness")),
)


def _written(value: float | tuple[float, ...]) -> str:
    """A number of the table with four digits, or several; a dash for one that does not exist."""
    if isinstance(value, tuple):
        return ", ".join(_written(one) for one in value) or _MISSING
    if math.isnan(value):
        return _MISSING
    return f"{value:#.4g}".removesuffix(".") if value and math.isfinite(value) else f"{value:g}"
