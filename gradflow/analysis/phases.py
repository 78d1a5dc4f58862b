"""The two phases of training: how fast the loss falls, when that ends, how slowly it goes on."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from gradflow.analysis.boundary import (
    SLAVED,
    Boundary,
    mean_curves,
    optimization_end,
    read_floor,
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
      error and the window fitted.
    - `regularization_rate`: decay rate of the imbalance from `optimization_end` to the last saved
      time; None if it cannot be measured (see `note`).
    - `separation`: optimization rate / regularization rate, the ratio of the time scales; its error
      means nothing where the regularization rate is not constant (`regularization_rate.constant`).
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

    def __str__(self) -> str:
        if np.isfinite(self.optimization_end):
            end = f"optimization phase ends at t = {self.optimization_end:.6g}"
            if np.isfinite(self.standard_error):
                end += f" +- {self.standard_error:.2g}"
            lines = [f"{end} ({self.criterion}, eps = {self.eps:.3g})"]
        else:
            lines = [f"optimization phase has no end: {self.reason}"]
        if np.isfinite(self.optimization_rate):
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

    def _shown_separation(self) -> str:
        """The ratio, with an error only if the two rates are constants."""
        if self.regularization_rate is not None and not self.regularization_rate.constant:
            return f"about {self.separation:.2g}: the regularization rate is not constant"
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
    $\epsilon$ and three standard errors.

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
    )


@dataclass(frozen=True)
class _Approach:
    """Rate of the residual, its error, the flow times fitted, and why there is none."""

    rate: float
    error: float
    window: tuple[float, float]
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
        return _no_approach()
    time = excess.time[used]
    rates = -0.5 * _log_slopes(time, distance[:, used])
    error = float(curves.error(rates))
    return _Approach(float(rates[0]), error, (float(time[0]), float(time[-1])))


def _of_paths(
    paths: Paths,
    level: Float[np.ndarray, "replica time"],
    cut: Float[np.ndarray, "replica time"],
    factor: float,
) -> _Approach:
    """Mean over paths without noise; each has a window of its own."""
    time = paths.time
    rates, starts, stops = [], [], []
    for path, least in zip(level, cut, strict=True):
        used = _descent(path, least)
        if used is None:
            return _no_approach()
        rates.append(-factor * _log_slopes(time[used], path[None, used])[0])
        starts.append(float(time[used][0]))
        stops.append(float(time[used][-1]))
    rate, error, _, _ = mean_with_error(np.array(rates), paths.samples, 0.95)
    return _Approach(rate, error, (min(starts), max(stops)))


def _no_approach() -> _Approach:
    nan = float("nan")
    note = (
        f"no optimization rate: fewer than {FEWEST_POINTS} saved times lie on the exponential "
        "approach to the floor; save more times early (log spacing), or start further from the "
        "floor"
    )
    return _Approach(nan, nan, (nan, nan), note)


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
