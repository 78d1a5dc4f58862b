"""The two phases of training: how fast the loss falls, when that ends, how slowly it goes on."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from gradflow.analysis.boundary import (
    NO_FLOOR,
    SLAVED,
    Boundary,
    mean_curves,
    optimization_end,
    read_floor,
)
from gradflow.analysis.local_rates import (
    FLAT,
    LocalRates,
    compared,
    local_slopes,
    parts_of,
)
from gradflow.analysis.rates import FEWEST_POINTS, Rate, decay_rate
from gradflow.analysis.statistics import (
    Paths,
    has,
    mean_with_error,
    read_paths,
    trapezoid_weights,
    weighted_line,
)
from gradflow.analysis.unmeasured import Unmeasured
from gradflow.random.antithetic import IndependentSamples
from gradflow.results.trajectory import Trajectory

DEEPEST = 1e-14
"""The excess loss is followed down to this fraction of its initial value: rounding is below."""


@dataclass(frozen=True)
class Phases:
    """The optimization and the regularization phase of a run.

    - `optimization_end`: flow time; nan with a `reason` if the phase does not end.
    - `standard_error`, `low`, `high`: over replicas. For a single path nan, and the saved times
      that bracket the end.
    - `criterion`: what was compared; `eps`: the relative distance used, larger than asked for
      where noise hides the crossing (see `note`); `floor`: the mean loss floor at that time.
    - `optimization_rate`: rate of the residual, |M| ~ exp(-rate t), per unit flow time, with its
      error and the window fitted; nan (see `note`) where the run does not reach its floor.
    - `optimization_rate_constant`: False where that rate is seen to change along its window, as
      while several modes decay: it is then but a mean. `optimization_rate_local`: the rates of
      thirds of the window, in order.
    - `regularization_rate`: decay rate of the imbalance from `optimization_end` to the last saved
      time; None if it cannot be measured (see `note`).
    - `separation`: optimization rate / regularization rate, the ratio of the time scales; its error
      means nothing where one of them is not constant: see `separation_range`.
    - `replicas`: used; `diverged`: left out because they diverged.
    - `reason`: why `optimization_end` is nan; `note`: anything else the reader should know.
    """

    optimization_end: float
    standard_error: float
    low: float
    high: float
    criterion: str
    eps: float
    floor: float
    optimization_rate: float
    optimization_rate_error: float
    optimization_rate_window: tuple[float, float]
    regularization_rate: Rate | None
    separation: float
    separation_error: float
    replicas: int
    diverged: int
    reason: str = ""
    note: str = ""
    optimization_rate_constant: bool = True
    optimization_rate_local: tuple[float, ...] = ()

    @property
    def changing(self) -> str:
        """Which of the two rates are not constant, in words; empty where both are."""
        slow = self.regularization_rate
        bent = ["optimization"] * (not self.optimization_rate_constant)
        bent += ["regularization"] * (slow is not None and not slow.constant)
        return f"the {bent[0]} rate is" if len(bent) == 1 else "both rates are" if bent else ""

    def optimization_range(self, errors: float) -> tuple[float, float]:
        """What the optimization rate may be: its error bar, or thirds of its window.

        **Arguments:** `errors`: half the length of the bar, in standard errors.
        """
        if not self.optimization_rate_constant:
            return min(self.optimization_rate_local), max(self.optimization_rate_local)
        half = errors * self.optimization_rate_error
        return self.optimization_rate - half, self.optimization_rate + half

    def separation_range(self, errors: float) -> tuple[float, float]:
        r"""What the ratio of the rates may be.

        The error bar if both are constant. Else from the lowest optimization rate over the highest
        regularization rate to the highest over the lowest, of thirds of the window for a rate that
        is not constant, and of the error bar for one that is: no less uncertain than its parts. A
        rate without an error (one path) counts as exact; nan where the regularization rate is 0 or
        changes sign.

        **Arguments:** `errors`: half the length of a bar, in standard errors.
        """
        slow = self.regularization_rate
        if slow is None or not self.changing:
            half = errors * self.separation_error
            return self.separation - half, self.separation + half
        half = errors * np.nan_to_num(slow.standard_error)
        least, most = slow.value - half, slow.value + half
        if not slow.constant:
            least, most = min(slow.local), max(slow.local)
        low, high = self.optimization_range(errors)
        if np.isnan(low):
            low = high = self.optimization_rate
        if not least > 0.0:
            return float("nan"), float("nan")
        return min(low / most, low / least), high / least

    def __str__(self) -> str:
        if np.isfinite(self.optimization_end):
            end = f"optimization phase ends at t = {self.optimization_end:.6g}"
            if np.isfinite(self.standard_error):
                end += f" +- {self.standard_error:.2g}"
            lines = [f"{end} ({self.criterion}, eps = {self.eps:.3g})"]
        else:
            lines = [f"optimization phase has no end: {self.reason}"]
        if not self.optimization_rate_constant:
            lines.append(
                f"optimization rate not constant: {self._shown_local()} over thirds of the window, "
                f"mean {self.optimization_rate:.4g} per unit flow time"
            )
        elif np.isfinite(self.optimization_rate):
            error = self.optimization_rate_error
            spread = f" +- {error:.2g}" if np.isfinite(error) else ""
            rate = f"{self.optimization_rate:.6g}{spread}"
            lines.append(f"optimization rate {rate} per unit flow time")
        else:
            lines.append("optimization rate not measured")
        if self.regularization_rate is not None:
            lines.append(str(self.regularization_rate))
        if np.isfinite(self.separation):
            lines.append(f"ratio of the time scales {self._shown_separation()}")
        if self.note:
            lines.append(f"note: {self.note}")
        return "\n".join(lines)

    def _shown_local(self) -> str:
        return str(LocalRates(self.optimization_rate_local, self.optimization_rate_constant))

    def _shown_separation(self) -> str:
        """The ratio, with an error only if the two rates are constants."""
        if self.changing:
            return f"about {self.separation:.2g}: {self.changing} not constant"
        error = self.separation_error
        spread = f" +- {error:.2g}" if np.isfinite(error) else ""
        return f"{self.separation:.6g}{spread}"


def phases(trajectory: Trajectory, eps: float = 0.1, confidence: float = 0.95) -> Phases:
    r"""Measure the two phases of a run.

    The optimization phase ends when the run is on the floor of the regularization phase: without
    noise in this dynamics when $|M - M_{slow}| \le \epsilon |M_{slow}|$, with noise when the
    replica means obey $E L_{exc} = (1 + \epsilon) E L_{floor}$.

    The optimization rate is that of the residual: of $|M - M_{slow}|$, or half that of
    $E L_{exc} - E L_{floor}$, where these lie between 0.3 times their initial value (less if the
    descent is deep: its lower half on a logarithmic scale) and the larger of the floor times
    $\epsilon$ and three standard errors. While several modes decay it falls along this window: see
    `optimization_rate_constant`. A run that does not reach its floor has no such rate.

    With noise the crossing is read off a fit of the approach, since the first saved time below
    $1+\epsilon$ is early by chance. If one standard error of the mean on the floor exceeds `eps`,
    it replaces `eps`, and `eps` and `note` of the result say so. Errors come from a jackknife over
    at most 32 groups of replicas. On ensembles with a known crossing the bias is below half a
    standard error, and 95 % intervals cover 90 to 95 % with 64 or more replicas, 89 % with 16.

    **Arguments:**

    - `trajectory`: the run, with the observables `slaved_deviation` and `slaved_residual` (weight
      decay, no noise in this dynamics), `excess_loss` and `loss_floor` (otherwise), and
      `imbalance` for the regularization rate; those that were not recorded are computed from the
      weights, where these were stored.
    - `eps`: relative distance from the floor that counts as having reached it.
    - `confidence`: of the intervals.

    **Returns:** `Phases`.

    **Raises:** `ValueError` naming the observable that was neither recorded nor can be computed.
    """
    boundary = optimization_end(trajectory, eps, confidence)
    fast = _approach(trajectory, boundary)
    if not np.isfinite(boundary.time) and boundary.reason != NO_FLOOR:
        fast = _no_approach("the run does not reach its floor, so what it approaches is not known")
    slow, trouble = _regularization_rate(trajectory, boundary, confidence)
    separation = separation_error = float("nan")
    if slow is not None and slow.value > 0.0:
        separation = fast.rate / slow.value
        relative = np.hypot(fast.error / fast.rate, slow.standard_error / slow.value)
        separation_error = separation * float(relative)
    return Phases(
        optimization_end=boundary.time,
        standard_error=boundary.standard_error,
        low=boundary.low,
        high=boundary.high,
        criterion=boundary.criterion,
        eps=boundary.eps,
        floor=boundary.floor,
        optimization_rate=fast.rate,
        optimization_rate_error=fast.error,
        optimization_rate_window=fast.window,
        regularization_rate=slow,
        separation=separation,
        separation_error=separation_error,
        replicas=boundary.replicas,
        diverged=boundary.diverged,
        reason=boundary.reason,
        note="; ".join(filter(None, [boundary.note, fast.note, trouble])),
        optimization_rate_constant=fast.local.constant,
        optimization_rate_local=fast.local.values,
    )


@dataclass(frozen=True)
class _Approach:
    """Rate of the residual, its error, the flow times fitted, its parts, and why there is none."""

    rate: float
    error: float
    window: tuple[float, float]
    local: LocalRates
    note: str = ""


def _approach(trajectory: Trajectory, boundary: Boundary) -> _Approach:
    """The exponential approach to the floor, path by path, or of the mean if there is noise."""
    eps = boundary.eps
    if boundary.criterion == SLAVED:
        deviation = read_paths(trajectory, "slaved_deviation")
        residual = read_paths(trajectory, "slaved_residual")
        return _of_paths(deviation, deviation.values, eps * residual.values, 1.0)
    excess = read_paths(trajectory, "excess_loss")
    floor = replace(excess, values=np.zeros_like(excess.values))
    if has(trajectory, "loss_floor"):
        floor = read_floor(trajectory)
    deepest = max(DEEPEST, (100.0 * excess.precision) ** 2)
    if not trajectory.dynamics.is_random(trajectory.problem):
        distance = excess.values - floor.values
        cut = np.maximum(eps * floor.values, deepest * distance[:, :1])
        return _of_paths(excess, distance, cut, 0.5)
    curves = mean_curves(excess, floor)
    distance = curves.excess - curves.floor
    noise = 3.0 * np.nan_to_num(curves.error(distance))
    cut = np.maximum(eps * curves.floor[0], np.maximum(noise, deepest * distance[0, 0]))
    used = _descent(distance[0], cut)
    if used is None:
        return _no_approach(_TOO_FEW)
    time = excess.time[used]
    rates = -0.5 * _log_slopes(time, distance[:, used])
    error = float(curves.error(rates))
    local = _local_of_mean(time, distance[:, used])
    return _Approach(float(rates[0]), error, (float(time[0]), float(time[-1])), local)


def _local_of_mean(
    time: Float[np.ndarray, " time"], level: Float[np.ndarray, "row time"]
) -> LocalRates:
    """The rates of parts of the window of a mean, from jackknife pseudo-values."""
    logs = np.log(np.where(level > 0.0, level, np.nan))
    slopes = -0.5 * local_slopes(time, logs, parts_of(time))
    groups = level.shape[0] - 1
    if groups < 2 or not np.isfinite(slopes).all():
        return LocalRates(tuple(map(float, slopes[:, 0])), True)
    values = groups * slopes[:, :1] - (groups - 1) * slopes[:, 1:]
    flat = FLAT / float(time[-1] - time[0])
    found = compared(values, flat, IndependentSamples(np.ones(groups, bool)))
    return LocalRates(tuple(map(float, slopes[:, 0])), found.constant)


def _of_paths(
    paths: Paths,
    level: Float[np.ndarray, "replica time"],
    cut: Float[np.ndarray, "replica time"],
    factor: float,
) -> _Approach:
    """Mean over paths without noise; each has a window of its own."""
    time = paths.time
    windows = [_descent(path, least) for path, least in zip(level, cut, strict=True)]
    fitted = [
        (time[used], path[None, used]) for used, path in zip(windows, level, strict=True) if used
    ]
    if len(fitted) < len(windows):
        return _no_approach(_TOO_FEW)
    rates = np.array([-factor * _log_slopes(*one)[0] for one in fitted])
    rate, error, _, _ = mean_with_error(rates, paths.samples, 0.95)
    parts = min(parts_of(when) for when, _ in fitted)
    slopes = [-factor * local_slopes(when, np.log(path), parts)[:, 0] for when, path in fitted]
    flat = FLAT / min(float(when[-1] - when[0]) for when, _ in fitted)
    local = compared(np.stack(slopes, axis=1), flat, None)
    starts, stops = zip(*((float(when[0]), float(when[-1])) for when, _ in fitted), strict=True)
    return _Approach(rate, error, (min(starts), max(stops)), local)


_TOO_FEW = (
    f"fewer than {FEWEST_POINTS} saved times lie on the exponential approach to the floor; save "
    "more times early (log spacing), or start further from the floor"
)


def _no_approach(why: str) -> _Approach:
    nan = float("nan")
    window, local = (nan, nan), LocalRates((), True)
    return _Approach(nan, nan, window, local, f"no optimization rate: {why}")


def _descent(level: Float[np.ndarray, " time"], cut: Float[np.ndarray, " time"]) -> slice | None:
    """Saved times on the exponential approach: below 0.3 of the start, above the cut."""
    below = level <= cut
    stop = int(below.argmax()) if below.any() else level.size
    if stop == 0:
        return None
    # The start of a deep descent is not yet exponential: take its lower half if it can be fitted.
    lower_half = min(0.3 * level[0], np.sqrt(level[0] * level[stop - 1]))
    for top in (lower_half, 0.3 * level[0]):
        start = int((level <= top).argmax()) if level[stop - 1] <= top else stop
        if stop - start >= FEWEST_POINTS:
            return slice(start, stop)
    return None


def _log_slopes(
    time: Float[np.ndarray, " time"], level: Float[np.ndarray, "row time"]
) -> Float[np.ndarray, " row"]:
    """Slopes of the logarithms; nan for a row that is not positive throughout."""
    logs = np.log(np.where(level > 0.0, level, np.nan))
    return weighted_line(time, logs, trapezoid_weights(time))[1]


def _regularization_rate(
    trajectory: Trajectory, boundary: Boundary, confidence: float
) -> tuple[Rate | None, str]:
    """Decay rate of the imbalance after the optimization phase, or why there is none."""
    if not np.isfinite(boundary.time):
        return None, ""
    window = (boundary.time, float(trajectory.time[-1]))
    try:
        return decay_rate(trajectory, "imbalance", window, confidence), ""
    except Unmeasured as trouble:
        return None, f"no regularization rate: {trouble.fact}"
    except ValueError as trouble:
        return None, f"no regularization rate: {trouble}"
