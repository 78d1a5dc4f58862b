"""Measures that read recorded observables, and the list of all measures of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.interpolate import PchipInterpolator

from gradflow.analysis.comparison.compare import compare_trajectories
from gradflow.analysis.rates import Rate, decay_rate, drift
from gradflow.study.claims.measurement import (
    Measure,
    Measurement,
    Values,
    check_start,
    claim_window,
    entry,
    finite,
    inside_window,
    known,
    mean,
    observable_values,
    registering,
    scalar,
)
from gradflow.study.claims.weight_measures import WEIGHT_MEASURES
from gradflow.study.results import RunResult
from gradflow.study.spec.check import parameters
from gradflow.study.spec.spec import ClaimSpec

MEASURES: dict[str, Measure] = dict(WEIGHT_MEASURES)
"""Every measure of runs, by the name of its quantity."""

measures = registering(MEASURES)

ROUNDING = 1e-9
"""Ends of runs that differ by no more than this are the same: one of them may be on a grid."""

# --- phases and rates ---------------------------------------------------------------------------


@measures("rate")
def rate(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Exponential decay rate of an observable in the regularization phase or a window."""
    (run,) = runs
    observable = claim.observable or "imbalance"
    of = "mean" if claim.of_mean else "replica"
    measured = decay_rate(run.trajectory, observable, window=_phase_window(claim, run), of=of)
    predicted = _predicted(claim, run, "imbalance_rate")
    return Measurement(
        measured.value,
        known(measured.standard_error),
        predicted if observable == "imbalance" else None,
        detail=_fitted(measured),
        parts=_parts(measured),
    )


@measures("drift")
def slope(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Linear slope of an observable in the regularization phase or a window."""
    (run,) = runs
    observable = claim.observable or "imbalance"
    measured = drift(run.trajectory, observable, window=_phase_window(claim, run))
    predicted = _predicted(claim, run, "imbalance_drift")
    return Measurement(
        measured.value,
        known(measured.standard_error),
        predicted if observable == "imbalance" else None,
        detail=_fitted(measured),
        parts=_parts(measured),
    )


def _parts(measured: Rate) -> tuple[float, ...]:
    return () if measured.constant else measured.local


def _predicted(claim: ClaimSpec, run: RunResult, field: str) -> float | None:
    """What the theory that the claim names says, None where it says nothing."""
    source = run.prediction
    if source is not None and claim.theory is not None:
        source = source.laws.get(claim.theory)
    return None if source is None else float(getattr(source, field))


def _phase_window(claim: ClaimSpec, run: RunResult) -> tuple[float, float] | None:
    """The claim's window, or the regularization phase; None leaves the choice to the fit."""
    time = run.trajectory.time
    if claim.window is None and run.is_slow:
        return float(time[0]), float(time[-1])
    if claim.window is None and run.phases and math.isfinite(run.phases.optimization_end):
        return run.phases.optimization_end, float(time[-1])
    return claim_window(claim)


def _fitted(measured: Rate) -> str:
    window = f"t in [{measured.window[0]:.4g}, {measured.window[1]:.4g}]"
    return f"{window}; {measured.note}" if measured.note else window


@measures("optimization_end")
def optimization_end(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Flow time at which the optimization phase ends."""
    return _phase(claim, runs, "optimization_end", "standard_error")


@measures("optimization_rate")
def optimization_rate(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Exponential rate at which the optimization phase ends."""
    measured, phases = (
        _phase(claim, runs, "optimization_rate", "optimization_rate_error"),
        runs[0].phases,
    )
    if phases is None or phases.optimization_rate_constant:
        return measured
    return replace(measured, parts=phases.optimization_rate_local)


@measures("separation")
def separation(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Optimization rate over regularization rate."""
    measured = _phase(claim, runs, "separation", "separation_error")
    phases = runs[0].phases
    rate = None if phases is None else phases.regularization_rate
    if phases is None or rate is None or not phases.changing:
        return measured
    fast, slow = (phases.optimization_rate,), (rate.value,)
    if not phases.optimization_rate_constant:
        fast = phases.optimization_rate_local
    if not rate.constant:
        slow = rate.local
    if 0.0 in slow:
        return measured
    ratios = tuple(one / other for one in fast for other in slow)
    if len(fast) > 1 and len(slow) > 1:
        ratios = min(ratios), max(ratios)
    detail = measured.detail or rate.note or f"{phases.changing} not constant"
    return replace(measured, detail=detail, parts=ratios)


def _phase(claim: ClaimSpec, runs: Sequence[RunResult], value: str, error: str) -> Measurement:
    (run,) = runs
    if run.phases is None:
        raise ValueError("; ".join(run.notes) or "the run has no phases")
    return Measurement(
        float(getattr(run.phases, value)),
        known(getattr(run.phases, error)),
        _predicted(claim, run, value),
        detail=run.phases.reason or run.phases.note,
    )


# --- observables at the start and the end -------------------------------------------------------


@measures("final")
def final(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Replica mean of an observable at the end."""
    (run,) = runs
    return mean(scalar(claim, run)[:, -1], run)


@measures("change")
def change(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Replica mean of the final minus the initial value."""
    (run,) = runs
    check_start(run)
    values = scalar(claim, run)
    return mean(values[:, -1] - values[:, 0], run)


@measures("change_ratio")
def change_ratio(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Replica mean of the final over the initial value."""
    (run,) = runs
    check_start(run)
    values = scalar(claim, run)
    if np.any(values[:, 0] == 0):
        raise ValueError(f"{claim.observable} is 0 at the start")
    return mean(values[:, -1] / values[:, 0], run)


@measures("component_ratio")
def component_ratio(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Replica mean of one entry of an observable over that of another, at the end.

    The error is that of a ratio of correlated means (delta method).
    """
    (run,) = runs
    above, below = (entry(claim, run, key)[:, -1] for key in ("component", "over"))
    if np.mean(below) == 0:
        raise ValueError(f"{claim.observable} {claim.over} is 0 at the end")
    ratio = float(np.mean(above) / np.mean(below))
    return Measurement(ratio, mean((above - ratio * below) / np.mean(below), run).error)


@measures("max_change")
def max_change(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Largest |x(t) - x(0)| over times, entries and replicas."""
    (run,) = runs
    check_start(run)
    values = observable_values(claim, run)
    return Measurement(float(np.max(np.abs(values - values[:, :1]))))


@measures("difference")
def difference(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Mean at the end in the first run minus that in the second, or relative to the second."""
    first, second = (mean(scalar(claim, run)[:, -1], run) for run in runs)
    both = f"{first.value:.6g} and {second.value:.6g}"
    error = math.hypot(first.error or 0.0, second.error or 0.0)
    has_error = first.error is not None or second.error is not None
    scale = abs(second.value) if claim.relative else 1.0
    if scale == 0:
        raise ValueError(f"{claim.observable} of the second run is 0, nothing to be relative to")
    return Measurement(
        (first.value - second.value) / scale, error / scale if has_error else None, detail=both
    )


@measures("displacement_ratio")
def displacement_ratio(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    r"""$\langle x(t_1) - x(t_0) \rangle$ of the first run over that of the second.

    The times are the first and the last that the first run saved in the window: the claim's, or the
    regularization phase of the first run. The second run is interpolated there. The runs are
    independent, so their relative errors add in quadrature.
    """
    first, second = runs
    own, other = first.trajectory.time, second.trajectory.time
    window = _phase_window(claim, first)
    if window is None:
        raise ValueError(
            f'run "{first.name}" has no end of its optimization phase; give the claim '
            "window = [t_start, t_stop]"
        )
    low, high = window
    inside = own[(own >= max(low, other[0])) & (own <= min(high, other[-1] * (1 + ROUNDING)))]
    if inside.size < 2:
        raise ValueError(
            f'run "{first.name}" saved fewer than two times in the window [{low:g}, {high:g}] '
            f'that run "{second.name}" covers'
        )
    ends = inside[[0, -1]]
    moved, expected = (mean(_displacement(claim, run, ends), run) for run in runs)
    if expected.value == 0:
        raise ValueError(f'{claim.observable} does not change in run "{second.name}"')
    ratio = moved.value / expected.value
    error = math.hypot(moved.error or 0.0, ratio * (expected.error or 0.0)) / abs(expected.value)
    has_error = moved.error is not None or expected.error is not None
    detail = f"{moved.value:.6g} over {expected.value:.6g}, t in [{ends[0]:.4g}, {ends[1]:.4g}]"
    return Measurement(ratio, error if has_error else None, detail=detail)


def _displacement(claim: ClaimSpec, run: RunResult, ends: Values) -> Values:
    """What the claim's observable changes between two times, `(replica,)`."""
    time = run.trajectory.time
    between = PchipInterpolator(time, scalar(claim, run), axis=1)
    start, stop = between(np.minimum(ends, time[-1])).T
    return stop - start


@measures("speed_up")
def speed_up(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Wall time of the first run over that of the second.

    The runner compiles the runs of such a claim before it times them. All replicas of a run count.
    """
    first, second = (float(run.trajectory.attrs["wall_time_s"]) for run in runs)
    return Measurement(first / second, detail=f"{first:.3g} s over {second:.3g} s")


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


# --- expected drift, predictions, scaling -------------------------------------------------------


@measures("drift_ratio")
def drift_ratio(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    r"""$\langle D(t_1) - D(t_0) \rangle / \int \langle \text{expected drift} \rangle dt$.

    The integral is the exact sum of one-step drifts where every step was saved, and the trapezoid
    rule otherwise. The error is that of a ratio of correlated means (delta method).
    """
    (run,) = runs
    inside = inside_window(claim, run)
    time = run.trajectory.time[inside]
    moved = finite(run, "imbalance")[:, inside]
    expected = finite(run, "imbalance_drift")[:, inside]
    steps = run.trajectory.step
    if steps is not None and np.all(np.diff(steps[inside]) == 1):
        integral = np.sum(expected[:, :-1] * np.diff(time), axis=1)
    else:
        integral = np.trapezoid(expected, time, axis=1)
    change = moved[:, -1] - moved[:, 0]
    ratio = float(np.mean(change) / np.mean(integral))
    scatter = mean((change - ratio * integral) / np.mean(integral), run)
    return Measurement(ratio, scatter.error, detail=f"t in [{time[0]:.4g}, {time[-1]:.4g}]")


@measures("predicted_ratio")
def predicted_ratio(claim: ClaimSpec, runs: Sequence[RunResult]) -> Measurement:
    """Measured over predicted value of another quantity."""
    inner = MEASURES[str(claim.of)](claim, runs)
    if inner.predicted is None or not math.isfinite(inner.predicted) or inner.predicted == 0:
        raise ValueError(f"theory gives no prediction of {claim.of} for this run")
    error = None if inner.error is None else inner.error / abs(inner.predicted)
    detail = f"{inner.value:.6g} over {inner.predicted:.6g}"
    parts = tuple(value / inner.predicted for value in inner.parts)
    if parts:
        detail = f"{detail}; {inner.detail}"
    return Measurement(inner.value / inner.predicted, error, detail=detail, parts=parts)


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
