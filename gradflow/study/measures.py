"""How each quantity of a claim is measured.

A measure is a function of a claim and the results of its runs. It raises `ValueError` with the
reason where the value cannot be measured. Errors are standard errors over replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

from gradflow.analysis.compare import compare_trajectories
from gradflow.analysis.predict import Prediction
from gradflow.analysis.rates import Rate, decay_rate, drift
from gradflow.geometry.imbalance import gram_differences
from gradflow.loss import gradient
from gradflow.network import DeepLinear
from gradflow.regularizers import WeightDecay
from gradflow.study.check import parameters
from gradflow.study.results import RunResult
from gradflow.study.spec import ClaimSpec
from gradflow.study.tables import GradientDescent

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """A measured value.

    Attributes:
        value: the number.
        error: its standard error, None where there is none.
        predicted: what theory says, None where it says nothing.
        word: the value of a quantity that is a word.
        detail: how it was measured, for people.
    """

    value: float
    error: float | None = None
    predicted: float | None = None
    word: str = ""
    detail: str = ""


Measure = Callable[[ClaimSpec, Sequence[RunResult]], Measurement]
MEASURES: dict[str, Measure] = {}
_M = TypeVar("_M", bound=Measure)


def measures(name: str) -> Callable[[_M], _M]:
    """Register the function that measures the quantity `name`."""

    def register(function: _M) -> _M:
        MEASURES[name] = function
        return function

    return register


# --- phases and rates ---------------------------------------------------------------------------


@measures("rate")
def rate(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Exponential decay rate of an observable in the regularization phase or a window."""
    (run,) = runs
    observable = claim.observable or "imbalance"
    of = "mean" if claim.of_mean else "replica"
    measured = decay_rate(run.trajectory, observable, window=_phase_window(claim, run), of=of)
    predicted = run.prediction.imbalance_rate if run.prediction else None
    return Measurement(
        measured.value,
        _error(measured.standard_error),
        predicted if observable == "imbalance" else None,
        detail=_fitted(measured),
    )


@measures("drift")
def slope(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Linear slope of an observable in the regularization phase or a window."""
    (run,) = runs
    observable = claim.observable or "imbalance"
    measured = drift(run.trajectory, observable, window=_phase_window(claim, run))
    predicted = run.prediction.imbalance_drift if run.prediction else None
    return Measurement(
        measured.value,
        _error(measured.standard_error),
        predicted if observable == "imbalance" else None,
        detail=_fitted(measured),
    )


def _phase_window(claim: ClaimSpec, run: RunResult) -> tuple[float, float] | None:
    """The claim's window, or the regularization phase; None leaves the choice to the fit."""
    if claim.window is None and run.phases and math.isfinite(run.phases.optimization_end):
        return run.phases.optimization_end, float(run.trajectory.time[-1])
    return _window(claim)


def _fitted(measured: Rate) -> str:
    window = f"t in [{measured.window[0]:.4g}, {measured.window[1]:.4g}]"
    return f"{window}; {measured.note}" if measured.note else window


@measures("optimization_end")
def optimization_end(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Flow time at which the optimization phase ends."""
    return _phase(runs, "optimization_end", "standard_error", "optimization_end")


@measures("optimization_rate")
def optimization_rate(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Exponential rate at which the optimization phase ends."""
    return _phase(runs, "optimization_rate", "optimization_rate_error", "optimization_rate")


@measures("separation")
def separation(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Optimization rate over regularization rate."""
    return _phase(runs, "separation", "separation_error", "separation")


def _phase(runs: Sequence[RunResult], value: str, error: str, predicted: str) -> Measurement:
    (run,) = runs
    if run.phases is None:
        raise ValueError("; ".join(run.notes) or "the run has no phases")
    prediction: Prediction | None = run.prediction
    return Measurement(
        float(getattr(run.phases, value)),
        _error(getattr(run.phases, error)),
        float(getattr(prediction, predicted)) if prediction else None,
        detail=run.phases.reason,
    )


# --- observables at the start and the end -------------------------------------------------------


@measures("final")
def final(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Replica mean of an observable at the end."""
    (run,) = runs
    return _mean(_scalar(claim, run)[:, -1])


@measures("change")
def change(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Replica mean of the final minus the initial value."""
    (run,) = runs
    values = _scalar(claim, run)
    return _mean(values[:, -1] - values[:, 0])


@measures("change_ratio")
def change_ratio(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Replica mean of the final over the initial value."""
    (run,) = runs
    values = _scalar(claim, run)
    if np.any(values[:, 0] == 0):
        raise ValueError(f"{claim.observable} is 0 at the start")
    return _mean(values[:, -1] / values[:, 0])


@measures("max_change")
def max_change(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Largest |x(t) - x(0)| over times, entries and replicas."""
    (run,) = runs
    values = _observable(claim, run)
    return Measurement(float(np.max(np.abs(values - values[:, :1]))))


@measures("difference")
def difference(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Mean at the end in the first run minus that in the second, or relative to the second."""
    first, second = (_mean(_scalar(claim, run)[:, -1]) for run in runs)
    both = f"{first.value:.6g} and {second.value:.6g}"
    error = math.hypot(first.error or 0.0, second.error or 0.0)
    has_error = first.error is not None or second.error is not None
    scale = abs(second.value) if claim.relative else 1.0
    if scale == 0:
        raise ValueError(f"{claim.observable} of the second run is 0, nothing to be relative to")
    return Measurement(
        (first.value - second.value) / scale, error / scale if has_error else None, detail=both
    )


@measures("agreement")
def agreement(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Whether two runs agree on an observable; the value is their largest relative difference."""
    first, second = runs
    if first.name == second.name:
        raise ValueError(f'runs: "{first.name}" is compared with itself')
    comparison = compare_trajectories(
        {first.name: first.trajectory, second.name: second.trajectory},
        [str(claim.observable)],
        claim.times,
        **({} if claim.tolerance is None else {"tolerance": claim.tolerance}),
    )
    (verdict,) = comparison.verdicts
    sizes = [abs(row.relative) for row in comparison.rows if math.isfinite(row.relative)]
    return Measurement(max(sizes, default=math.nan), word=verdict.verdict, detail=verdict.reason)


# --- G_i from stored weights --------------------------------------------------------------------


@measures("balancedness_change")
def balancedness_change(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Largest |G_i(t) - G_i(0)| over entries, layers, times and replicas."""
    (run,) = runs
    return Measurement(
        max(float(np.max(np.abs(g - g[:, :1]))) for g in _balancedness(_weights(run)))
    )


@measures("balancedness_decay")
def balancedness_decay(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Largest |G_i(t) - exp(-2 rate t) G_i(0)| under weight decay of the gradient flow."""
    (run,) = runs
    decay = _weight_decay(run)
    factor = np.exp(-2 * decay * run.trajectory.time)[None, :, None, None]
    return Measurement(
        max(float(np.max(np.abs(g - factor * g[:, :1]))) for g in _balancedness(_weights(run)))
    )


@measures("gd_identity")
def gd_identity(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    r"""Largest residual of the one-step identity of gradient descent.

    $$G_i^+ = (1-h\lambda)^2 G_i + h^2 (g_{i+1}^\top g_{i+1} - g_i g_i^\top)$$

    The gradients are those of the data loss at the stored weights, so the problem must have no
    noise.
    """
    (run,) = runs
    problem, dynamics = run.trajectory.problem, run.spec.dynamics
    if not isinstance(dynamics, GradientDescent) or problem.is_stochastic:
        raise ValueError("the one-step identity is checked for gradient descent without noise")
    layers = _weights(run)
    flat = tuple(jax.numpy.asarray(w.reshape(-1, *w.shape[2:])) for w in layers)
    gradients = jax.vmap(lambda w: gradient(DeepLinear(w), problem.data))(flat)
    step, shape = dynamics.step_size, layers[0].shape[:2]
    kicks = _balancedness(tuple(np.asarray(g).reshape(*shape, *g.shape[1:]) for g in gradients))
    decay = (1 - step * _weight_decay(run)) ** 2
    return Measurement(
        max(
            float(np.max(np.abs(g[:, 1:] - decay * g[:, :-1] - step**2 * kick[:, :-1])))
            for g, kick in zip(_balancedness(layers), kicks, strict=True)
        )
    )


def _balancedness(layers: Sequence[Values]) -> list[Values]:
    """`G_i` (or the same difference of gradients) for layers with leading axes (replica, time)."""
    if len(layers) < 2:
        raise ValueError("a network of depth 1 has no layers to balance")
    over_all = jax.vmap(jax.vmap(gram_differences))
    return [np.asarray(g) for g in over_all(tuple(map(jax.numpy.asarray, layers)))]


def _weight_decay(run: RunResult) -> float:
    rates = [r.rate for r in run.trajectory.problem.regularizers if isinstance(r, WeightDecay)]
    return float(sum(rates))


# --- expected drift, predictions, scaling -------------------------------------------------------


@measures("drift_ratio")
def drift_ratio(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    r"""$\langle D(t_1) - D(t_0) \rangle / \int \langle \text{expected drift} \rangle dt$.

    The integral is the exact sum of one-step drifts where every step was saved, and the trapezoid
    rule otherwise. The error is that of a ratio of correlated means (delta method).
    """
    (run,) = runs
    inside = _inside(claim, run)
    time = run.trajectory.time[inside]
    moved = _finite(run, "imbalance")[:, inside]
    expected = _finite(run, "imbalance_drift")[:, inside]
    steps = run.trajectory.step
    if steps is not None and np.all(np.diff(steps[inside]) == 1):
        integral = np.sum(expected[:, :-1] * np.diff(time), axis=1)
    else:
        integral = np.trapezoid(expected, time, axis=1)
    change = moved[:, -1] - moved[:, 0]
    ratio = float(np.mean(change) / np.mean(integral))
    scatter = _mean((change - ratio * integral) / np.mean(integral))
    return Measurement(ratio, scatter.error, detail=f"t in [{time[0]:.4g}, {time[-1]:.4g}]")


@measures("predicted_ratio")
def predicted_ratio(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Measured over predicted value of another quantity."""
    inner = MEASURES[str(claim.of)](claim, runs)
    if inner.predicted is None or not math.isfinite(inner.predicted) or inner.predicted == 0:
        raise ValueError(f"theory gives no prediction of {claim.of} for this run")
    error = None if inner.error is None else inner.error / abs(inner.predicted)
    detail = f"{inner.value:.6g} over {inner.predicted:.6g}"
    return Measurement(inner.value / inner.predicted, error, detail=detail)


@measures("exponent")
def exponent(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Least-squares slope of log|quantity| against log(parameter) over runs.

    The error is the larger of the scatter about the line (three runs or more) and what the errors
    of the points carry over to the slope.
    """
    points = [MEASURES[str(claim.of)](claim, [run]) for run in runs]
    values = np.array([point.value for point in points])
    if not np.all(np.isfinite(values)) or np.any(values == 0):
        raise ValueError(
            f"{claim.of} is {', '.join(f'{v:.3g}' for v in values)}; its log is needed"
        )
    x = np.log([parameters(run.spec)[str(claim.parameter)] for run in runs])
    y = np.log(np.abs(values))
    leverage = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    value = float(np.sum(leverage * y))
    errors = np.array([(point.error or 0.0) / abs(point.value) for point in points])
    carried = float(np.sqrt(np.sum((leverage * errors) ** 2)))
    scatter = 0.0
    if len(runs) > 2:
        residual = y - y.mean() - value * (x - x.mean())
        scatter = float(np.sqrt(np.sum(residual**2) / (len(runs) - 2) * np.sum(leverage**2)))
    error = max(carried, scatter)
    detail = ", ".join(f"{v:.4g}" for v in values)
    return Measurement(value, error if error > 0 else None, detail=f"{claim.of}: {detail}")


# --- reading trajectories -----------------------------------------------------------------------


def _window(claim: ClaimSpec) -> tuple[float, float] | None:
    return None if claim.window is None else (claim.window[0], claim.window[1])


def _inside(claim: ClaimSpec, run: RunResult) -> NDArray[np.bool_]:
    time = run.trajectory.time
    low, high = _window(claim) or (time[0], time[-1])
    inside = (time >= low) & (time <= high)
    if np.sum(inside) < 2:
        raise ValueError(f"fewer than two saved times lie in the window [{low:g}, {high:g}]")
    return inside


def _survivors(run: RunResult) -> NDArray[np.bool_]:
    """Which replicas did not diverge, `(replica,)`."""
    alive = ~np.atleast_1d(np.asarray(run.trajectory.diverged))
    if not alive.any():
        raise ValueError(f'run "{run.name}": every replica diverged')
    return alive


def _finite(run: RunResult, observable: str) -> Values:
    """An observable `(replica, time, ...)` of the replicas that did not diverge."""
    if observable not in run.trajectory:
        raise ValueError(f'run "{run.name}" did not record {observable}; add it to its observables')
    values = np.asarray(run.trajectory[observable], dtype=float)
    if run.trajectory.replicas is None:
        values = values[None]
    return values[_survivors(run)]


def _observable(claim: ClaimSpec, run: RunResult) -> Values:
    values = _finite(run, str(claim.observable))
    if claim.component is None:
        return values
    shape = values.shape[2:]
    fits = len(claim.component) == len(shape) and all(
        -size <= index < size for index, size in zip(claim.component, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"component = {claim.component} does not index {claim.observable} of shape {shape}"
        )
    return values[(..., *claim.component)]


def _scalar(claim: ClaimSpec, run: RunResult) -> Values:
    """One number a replica and time, `(replica, time)`."""
    values = _observable(claim, run)
    if values.ndim > 2:
        shape = values.shape[2:]
        raise ValueError(
            f"{claim.observable} has shape {shape}; choose an entry with component = "
            f"{[0] * len(shape)}"
        )
    return values


def _weights(run: RunResult) -> tuple[Values, ...]:
    """Stored weights `(replica, time, d_i, d_{i-1})` of the replicas that did not diverge."""
    layers = tuple(np.asarray(w, dtype=float) for w in run.trajectory.weights)
    if run.trajectory.replicas is None:
        layers = tuple(w[None] for w in layers)
    return tuple(w[_survivors(run)] for w in layers)


def _mean(values: Values) -> Measurement:
    """Mean and standard error over replicas, no error for a single one."""
    count = len(values)
    error = float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else None
    return Measurement(float(np.mean(values)), error)


def _error(value: float | None) -> float | None:
    """A standard error, None where the analysis gives NaN."""
    return None if value is None or math.isnan(value) else float(value)
