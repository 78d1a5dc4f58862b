"""Decay rates and drifts along a run, with honest uncertainties."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gradflow.analysis.boundary import optimization_end
from gradflow.analysis.local_rates import LocalRates, local_rates
from gradflow.analysis.statistics import (
    Paths,
    jackknife_error,
    leave_out_means,
    mean_with_error,
    read_paths,
    trapezoid_weights,
    weighted_line,
)
from gradflow.analysis.unmeasured import Unmeasured
from gradflow.checks import check_confidence
from gradflow.random.antithetic import IndependentSamples
from gradflow.results.trajectory import Trajectory

ROUNDING = 4096.0
"""An observable within this many units of rounding of its largest value cannot be fitted."""
FEWEST_POINTS = 3
"""Saved times that a fit needs: two always lie on a line."""


@dataclass(frozen=True)
class Rate:
    """A rate per unit of flow time, with its uncertainty.

    - `value`: the rate; positive for decay if `kind` is "exponential", the slope if "linear".
    - `standard_error`: spread over independent replicas / sqrt(their number); nan for one path.
    - `low`, `high`: Student-t interval. For a single path the range of the rates over thirds of
      the window, which says how well a single rate describes the path.
    - `confidence`: of the interval; `kind`: "exponential" or "linear"; `observable`: its name.
    - `window`: first and last flow time fitted; `points`: saved times fitted.
    - `replicas`: used; `diverged`: left out because they diverged; `independent`: the number of
      replicas, or of antithetic pairs, that the error is taken over.
    - `per_replica`: one estimate a replica, `(replica,)`; jackknife pseudo-values for `of="mean"`,
      one for each that is independent.
    - `constant`: False where the rate is seen to change along the window: it is then no number
      that an error belongs to, and `value` is but its mean. `local`: the rates of thirds of the
      window.
    - `note`: what the reader should know, such as a window cut short or a rate that changes.
    """

    value: float
    standard_error: float
    low: float
    high: float
    confidence: float
    kind: str
    observable: str
    window: tuple[float, float]
    replicas: int
    diverged: int
    points: int
    independent: int
    per_replica: Float[np.ndarray, " replica"]
    note: str = ""
    constant: bool = True
    local: tuple[float, ...] = ()

    def __str__(self) -> str:
        what = "decay rate" if self.kind == "exponential" else "drift"
        where = (
            f"per unit flow time, t = {self.window[0]:.6g} to {self.window[1]:.6g}, "
            f"{self.replicas} replicas, {self.diverged} diverged"
        )
        if not self.constant:
            text = f"{what} of {self.observable}: not constant, mean {self.value:.4g} {where}"
            return f"{text}; {self.note}"
        if np.isfinite(self.standard_error):
            spread = f"+- {self.standard_error:.2g} ({self.confidence:.0%} interval"
        else:
            spread = "(one path; over thirds of the window"
        text = (
            f"{what} of {self.observable}: {self.value:.6g} {spread} {self.low:.6g} to "
            f"{self.high:.6g}) {where}"
        )
        return f"{text}; {self.note}" if self.note else text


def decay_rate(
    trajectory: Trajectory,
    observable: str = "imbalance",
    window: tuple[float, float] | None = None,
    confidence: float = 0.95,
    of: str = "replica",
) -> Rate:
    r"""Exponential decay rate $r$ of an observable, $x(t) \approx x_0 e^{-r t}$.

    Least squares of $\log|x|$ on $t$, with trapezoid weights in time so that log-spaced saved
    times do not let their cluster decide. Only the spread between independent replicas enters the
    error, so correlation along a path does no harm.

    The window ends for every replica where the first one changes sign or falls to rounding level
    (in 64 bit about 1e-12 of its largest value). The end is common, since replicas that chose
    their own would select.

    **Arguments:**

    - `trajectory`: the run; diverged replicas are left out and counted.
    - `observable`: name of a recorded scalar observable.
    - `window`: first and last flow time; None for all from the end of the optimization phase on.
    - `confidence`: of the interval.
    - `of`: "replica" fits every replica and averages the rates: the rate of a typical path.
      "mean" fits the mean over replicas: the rate of $E x$, with a jackknife error. Under
      multiplicative noise the two differ.

    **Returns:** a `Rate`.

    **Raises:** `ValueError` if the observable is missing or too few usable times remain, or if
    `of="mean"` has no two independent replicas for its error.
    """
    if of not in ("replica", "mean"):
        raise ValueError(f'of must be "replica" or "mean"; got {of!r}')
    check_confidence(confidence)
    paths = read_paths(trajectory, observable)
    used = _window_indices(trajectory, paths.time, window)
    mean = of == "mean" and not paths.single
    values, samples = paths.values, paths.samples
    if mean:
        if samples.count < 2:
            raise Unmeasured(
                "the rate of a mean needs two independent replicas (or antithetic pairs) and has "
                f"{samples.count}",
                python='simulate more of them, or leave of="mean" out',
                spec="give the run more replicas, or the claim of_mean = false",
            )
        whole = samples.means(values)
        values = np.concatenate([whole.mean(axis=0)[None], leave_out_means(whole, samples.count)])
        error = jackknife_error(values[1:])
        lost = np.abs(values[0]) <= 3.0 * error
    else:
        largest = np.abs(values[:, : used[-1] + 1]).max(axis=1, keepdims=True)
        flipped = np.sign(values) != np.sign(values[:, used[:1]])
        lost = (flipped | (np.abs(values) <= ROUNDING * paths.precision * largest)).any(axis=0)
    used, note = _cut_short(paths, used, lost, mean)
    time, logs = paths.time[used], np.log(np.abs(values[:, used]))
    rates = -_slopes(time, logs)
    if mean:
        rates = samples.count * rates[0] - (samples.count - 1) * rates[1:]
        logs = samples.count * logs[0] - (samples.count - 1) * logs[1:]
        samples = IndependentSamples(np.ones(samples.count, bool))
    local = local_rates(time, -logs, 1.0, _noisy_samples(trajectory, paths, samples))
    return _summary(paths, samples, rates, local, "exponential", time, confidence, note)


def drift(
    trajectory: Trajectory,
    observable: str = "imbalance",
    window: tuple[float, float] | None = None,
    confidence: float = 0.95,
) -> Rate:
    r"""Linear drift $dx/dt$ of an observable: the slope of $x$ on $t$.

    Fitted as in `decay_rate`, but to $x$ itself; the mean of the slopes is the slope of the mean.

    **Arguments:** as for `decay_rate`.

    **Returns:** a `Rate` of kind "linear"; positive if the observable grows.

    **Raises:** `ValueError` if the observable is missing or the window holds too few saved times.
    """
    check_confidence(confidence)
    paths = read_paths(trajectory, observable)
    used = _window_indices(trajectory, paths.time, window)
    time, values = paths.time[used], paths.values[:, used]
    slopes, scale = _slopes(time, values), float(np.abs(values).max())
    local = local_rates(time, values, scale, _noisy_samples(trajectory, paths, paths.samples))
    return _summary(paths, paths.samples, slopes, local, "linear", time, confidence, "")


def _window_indices(
    trajectory: Trajectory, time: Float[np.ndarray, " time"], window: tuple[float, float] | None
) -> np.ndarray:
    if window is None:
        boundary = optimization_end(trajectory)
        if not np.isfinite(boundary.time):
            raise Unmeasured(
                f"no end of the optimization phase to start from ({boundary.reason})",
                python="pass window=(t_start, t_stop)",
                spec="give the claim window = [t_start, t_stop]",
            )
        start, stop = boundary.time, float(time[-1])
    else:
        start, stop = float(window[0]), float(window[1])
        if not start < stop:
            raise ValueError(
                f"window must be (t_start, t_stop) with t_start < t_stop; got {window}"
            )
    slack = 1e-9 * abs(float(time[-1]))
    used = np.flatnonzero((time >= start - slack) & (time <= stop + slack))
    if used.size < FEWEST_POINTS:
        raise Unmeasured(
            f"window ({start:.6g}, {stop:.6g}) holds {used.size} saved times and a rate needs "
            f"{FEWEST_POINTS}",
            python=f"widen it within 0 to {time[-1]:.6g}, or save more times",
            spec=f"give the claim window = [t_start, t_stop] within 0 to {time[-1]:.6g}, or the "
            "run save = { points = ... }",
        )
    return used


def _cut_short(
    paths: Paths, used: np.ndarray, lost: np.ndarray, mean: bool
) -> tuple[np.ndarray, str]:
    """The window up to the first time whose logarithm means nothing, and a note if it is cut."""
    bad = np.flatnonzero(lost[used])
    if bad.size == 0:
        return used, ""
    at = float(paths.time[used[bad[0]]])
    whose = "its mean" if mean else "a replica" if not paths.single else "it"
    how = "is within 3 standard errors of 0" if mean else "changes sign or falls to rounding level"
    if bad[0] < FEWEST_POINTS:
        raise Unmeasured(
            f"observable {paths.observable!r}: {whose} {how} at t = {at:.6g}, which leaves "
            f"{bad[0]} of {used.size} saved times of the window",
            python="choose an earlier window, or drift() for an observable that crosses 0",
            spec="give the claim an earlier window = [t_start, t_stop], or quantity = "
            '"drift" for an observable that crosses 0',
        )
    return used[: bad[0]], f"window ends before t = {at:.6g}, where {whose} {how}"


def _slopes(
    time: Float[np.ndarray, " time"], values: Float[np.ndarray, "row time"]
) -> Float[np.ndarray, " row"]:
    return weighted_line(time, values, trapezoid_weights(time))[1]


def _noisy_samples(
    trajectory: Trajectory, paths: Paths, samples: IndependentSamples
) -> IndependentSamples | None:
    """The samples whose spread is the noise; None where replicas would not differ."""
    noisy = paths.replicas > 1 or trajectory.dynamics.is_random(trajectory.problem)
    return samples if noisy else None


def _summary(
    paths: Paths,
    samples: IndependentSamples,
    rates: Float[np.ndarray, " replica"],
    local: LocalRates,
    kind: str,
    time: Float[np.ndarray, " time"],
    confidence: float,
    note: str,
) -> Rate:
    value, error, low, high = mean_with_error(rates, samples, confidence)
    if paths.single:
        low, high = min(*local.values, value), max(*local.values, value)
    if not local.constant:
        note = "; ".join(filter(None, [note, f"the rate is not constant: {local}"]))
    window = (float(time[0]), float(time[-1]))
    counts = (paths.replicas, paths.diverged, time.size, samples.count)
    summary = (value, error, low, high, confidence, kind, paths.observable, window)
    return Rate(*summary, *counts, rates, note, local.constant, local.values)
