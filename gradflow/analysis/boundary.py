"""Where the optimization phase ends: the first time the run is on the floor of the next phase.

The floor is what holds the residual up once the minima manifold is reached. Weight decay alone
slaves the residual to the weights; noise keeps the loss fluctuating about a level. Nothing but the
saved times is used, so gridded runs, stochastic flows and flows are measured alike.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.optimize import isotonic_regression

from gradflow.analysis.statistics import (
    MAX_GROUPS,
    Paths,
    has,
    jackknife_error,
    leave_out_means,
    mean_with_error,
    read_paths,
    student_interval,
    survivors,
    trapezoid_weights,
    weighted_line,
)
from gradflow.checks import check_confidence
from gradflow.results.trajectory import Trajectory

NO_FLOOR = "no regularization phase: the loss floor of this problem under this dynamics is 0"
SLAVED = "|M - M_slow| <= eps |M_slow|"
FLOOR = "E excess_loss <= (1 + eps) E loss_floor"
NEGLIGIBLE_NOISE = 0.05
"""Below this fraction of eps the noise of the mean cannot move a crossing; then interpolate."""
FAR_ABOVE = 1e6
"""Stands for excess / floor where the floor is not defined."""
FIT_REACH = 20.0
"""The approach is fitted from this many standard errors above the floor downwards."""


@dataclass(frozen=True)
class Boundary:
    """The end of the optimization phase; the fields are those of `Phases`.

    `reason` says why `time` is nan; `note` says what was done when noise made it necessary.
    """

    time: float
    standard_error: float
    low: float
    high: float
    criterion: str
    eps: float
    floor: float
    replicas: int
    diverged: int
    reason: str = ""
    note: str = ""


def optimization_end(
    trajectory: Trajectory, eps: float = 0.1, confidence: float = 0.95
) -> Boundary:
    r"""First time at which the run is on the floor of the regularization phase.

    Without noise in this dynamics: $\inf\{t : |M - M_{slow}| \le \epsilon |M_{slow}|\}$, from
    `slaved_deviation` and `slaved_residual`. With noise: the time at which the replica means obey
    $E L_{exc} = (1+\epsilon) E L_{floor}$, from `excess_loss` and `loss_floor`.

    **Arguments:**

    - `trajectory`: the run.
    - `eps`: relative distance from the floor that counts as having reached it.
    - `confidence`: of the interval `low`, `high`.

    **Raises:** `ValueError` if an observable that is needed was not recorded.
    """
    Trajectory.check("trajectory", trajectory)
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, for example 0.1; got {eps}")
    check_confidence(confidence)
    if not trajectory.problem.regularizers:
        return _no_floor(trajectory, eps)
    if is_slaved(trajectory):
        residual = read_paths(trajectory, "slaved_residual")
        if not np.any(residual.values > 0.0):
            return _no_floor(trajectory, eps)
        deviation = read_paths(trajectory, "slaved_deviation")
        found = _slaved_end(deviation, residual, eps, confidence)
        if np.isfinite(found.time) and has(trajectory, "loss_floor"):
            floor = read_floor(trajectory)
            level = float(np.interp(found.time, floor.time, floor.values.mean(axis=0)))
            found = replace(found, floor=level)
        return found
    floor = read_floor(trajectory)
    if not np.any(floor.values > 0.0):
        return _no_floor(trajectory, eps)
    return _floor_end(mean_curves(read_paths(trajectory, "excess_loss"), floor), eps, confidence)


def read_floor(trajectory: Trajectory) -> Paths:
    """The loss floor; 0 where no replica has one, because it is beyond the edge of stability.

    Where only some replicas have one, the others get the mean of those.
    """
    paths = read_paths(trajectory, "loss_floor", defined=False)
    known = np.isfinite(paths.values)
    count = known.sum(axis=0)
    total = np.where(known, paths.values, 0.0).sum(axis=0)
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    return replace(paths, values=np.where(known, paths.values, mean))


def is_slaved(trajectory: Trajectory) -> bool:
    """Whether a penalty on the weights, and no noise in this dynamics, sets the floor."""
    problem = trajectory.problem
    return bool(problem.penalties) and not trajectory.dynamics.is_random(problem)


@dataclass(frozen=True)
class MeanCurves:
    r"""Replica means of the excess loss and its floor, `(1 + groups, time)`.

    Row 0 is over all replicas, the others leave one group of independent ones (or pairs) out in
    turn; a single path, or pair, has row 0 only.
    """

    time: Float[np.ndarray, " time"]
    excess: Float[np.ndarray, "row time"]
    floor: Float[np.ndarray, "row time"]
    replicas: int
    diverged: int

    @property
    def groups(self) -> int:
        """Groups that are left out in turn; 0 for a single path or pair."""
        return self.excess.shape[0] - 1

    def error(self, estimates: Float[np.ndarray, "row *shape"]) -> np.ndarray:
        """Jackknife standard error of row 0 of an estimate; nan for a single path."""
        if self.groups == 0:
            return np.full(estimates.shape[1:], np.nan)
        return jackknife_error(estimates[1:])


def mean_curves(excess: Paths, floor: Paths) -> MeanCurves:
    """Replica means with and without each group of replicas."""

    def rows(paths: Paths) -> np.ndarray:
        mean = paths.values.mean(axis=0, keepdims=True)
        of_samples = paths.samples.means(paths.values)
        if len(of_samples) < 2:
            return mean
        groups = min(len(of_samples), MAX_GROUPS)
        return np.concatenate([mean, leave_out_means(of_samples, groups)])

    return MeanCurves(excess.time, rows(excess), rows(floor), excess.replicas, excess.diverged)


def first_crossing(
    time: Float[np.ndarray, " time"], ratio: Float[np.ndarray, "row time"], level: float
) -> tuple[Float[np.ndarray, " row"], np.ndarray]:
    r"""First time each row falls to `level`, interpolated in the logarithm of the ratio.

    Where the ratio is above 1 on both sides of a level above 1 it is the distance $\rho - 1$ that
    decays exponentially, and its logarithm is interpolated instead.

    **Returns:** the times (nan where a row stays above, the first time where it starts below), and
    the index of the first saved time at or below the level (-1 where there is none).
    """
    below = ratio <= level
    index = np.where(below.any(axis=1), below.argmax(axis=1), -1)
    rows = np.arange(ratio.shape[0])
    before, after = ratio[rows, np.maximum(index - 1, 0)], ratio[rows, index]
    shift = np.where((level > 1.0) & (after > 1.0), 1.0, 0.0)
    tiny = np.finfo(float).tiny
    high = np.log(np.maximum(before - shift, tiny) / (level - shift))
    low = np.log(np.maximum(after - shift, tiny) / (level - shift))
    part = np.divide(high, high - low, out=np.ones_like(high), where=high > low)
    start, stop = time[np.maximum(index - 1, 0)], time[index]
    times = np.where(index == 0, time[0], start + part * (stop - start))
    return np.where(index < 0, np.nan, times), index


def _no_floor(trajectory: Trajectory, eps: float) -> Boundary:
    kept = survivors(trajectory)
    count, lost = int(kept.sum()), int(np.sum(~kept))
    nan = float("nan")
    return Boundary(nan, nan, nan, nan, "none", eps, 0.0, count, lost, NO_FLOOR)


def _slaved_end(deviation: Paths, residual: Paths, eps: float, confidence: float) -> Boundary:
    time = deviation.time
    size = np.maximum(residual.values, np.finfo(float).tiny)
    ratio = deviation.values / size
    ends, index = first_crossing(time, ratio, eps)
    counts = (deviation.replicas, deviation.diverged)
    nan = float("nan")
    if (index < 0).any():
        late = index < 0
        reason = (
            f"{late.sum()} of {late.size} paths never reach the slaved residual: |M - M_slow| is "
            f"still {ratio[late].min():.3g} of |M_slow| at best (eps = {eps:g}) by t = "
            f"{time[-1]:.6g}; run longer, or raise eps if the ratio has stopped falling"
        )
        return Boundary(nan, nan, nan, nan, SLAVED, eps, nan, *counts, reason)
    mean, error, low, high = mean_with_error(ends, deviation.samples, confidence)
    if deviation.single:
        low, high = float(time[max(index[0] - 1, 0)]), float(time[index[0]])
    return Boundary(mean, error, low, high, SLAVED, eps, nan, *counts)


def _floor_end(curves: MeanCurves, eps: float, confidence: float) -> Boundary:
    """The crossing of the noisy ratio of means with 1 + eps.

    The first saved time below 1 + eps would be early by chance, the more so the more times are
    saved. So the decay of the mean onto the floor is fitted where it stands out of the noise, and
    the crossing is read off the fit.
    """
    time, nan = curves.time, float("nan")
    counts = (curves.replicas, curves.diverged)
    ratio = np.full_like(curves.excess, FAR_ABOVE)
    np.divide(curves.excess, curves.floor, out=ratio, where=curves.floor > 0.0)
    smooth = _decreasing(time, ratio)
    noise, start = _plateau_noise(curves, ratio, smooth[0], eps)
    used = max(eps, noise)
    note = ""
    if used > eps:
        note = (
            f"eps raised from {eps:g} to {used:.3g}, one standard error of the mean excess loss on "
            f"the floor with {curves.replicas} replicas; about "
            f"{int(np.ceil(curves.replicas * (noise / eps) ** 2))} replicas resolve eps = {eps:g}"
        )
    if ratio[0, 0] <= 1.0 + used:
        zero = float(time[0])
        floor = float(curves.floor[0, 0])
        return Boundary(zero, 0.0, zero, zero, FLOOR, used, floor, *counts, note=note)
    if start < 0:
        reason = (
            f"the mean excess loss never reaches its floor: it is {smooth[0, -1]:.3g} times the "
            f"floor at the end of the run, t = {time[-1]:.6g} (1 + eps = {1.0 + used:.3g}); run "
            "longer, or raise eps if the ratio has stopped falling"
        )
        return Boundary(nan, nan, nan, nan, FLOOR, used, nan, *counts, reason, note)
    ends = _crossings(time, ratio, smooth, noise, used, start)
    if not time[0] <= ends[0] <= time[-1]:
        reason = (
            f"the fitted approach reaches 1 + eps = {1.0 + used:.3g} times the floor at t = "
            f"{ends[0]:.6g}, after the end of the run at t = {time[-1]:.6g}; run longer"
        )
        return Boundary(nan, nan, nan, nan, FLOOR, used, nan, *counts, reason, note)
    end, error = float(ends[0]), float(curves.error(ends))
    low, high = student_interval(end, error, curves.groups - 1, confidence)
    if curves.groups == 0:
        after = int(np.searchsorted(time, end))
        low, high = float(time[max(after - 1, 0)]), float(time[after])
    floor = float(np.interp(end, time, curves.floor[0]))
    return Boundary(end, error, low, high, FLOOR, used, floor, *counts, note=note)


def _decreasing(
    time: Float[np.ndarray, " time"], ratio: Float[np.ndarray, "row time"]
) -> Float[np.ndarray, "row time"]:
    """Each row replaced by the closest curve that never rises: averages neighbouring times."""
    weights = np.maximum(trapezoid_weights(time), np.finfo(float).tiny)
    return np.stack([isotonic_regression(r, weights=weights, increasing=False).x for r in ratio])


def _plateau_noise(
    curves: MeanCurves,
    ratio: Float[np.ndarray, "row time"],
    smooth: Float[np.ndarray, " time"],
    eps: float,
) -> tuple[float, int]:
    """Standard error of the ratio on the floor, and the first index clearly down at the floor.

    A single path shows its noise only by its scatter in time on the floor. The index is -1 if the
    ratio never comes down to 1 + max(eps, 3 standard errors).
    """
    size = ratio.shape[1]
    squares = curves.error(ratio) ** 2 if curves.groups else (ratio[0] - smooth) ** 2
    window = slice(size - max(size // 4, 2), size)
    noise, start = 0.0, -1
    for _ in range(2):
        noise = float(np.sqrt(np.mean(squares[window])))
        down = smooth <= 1.0 + max(eps, 3.0 * noise)
        if not down.any():
            return noise, -1
        start = int(down.argmax())
        window = slice(start, start + max(10, size // 8) if curves.groups else None)
    return noise, start


def _crossings(
    time: Float[np.ndarray, " time"],
    ratio: Float[np.ndarray, "row time"],
    smooth: Float[np.ndarray, "row time"],
    noise: float,
    eps: float,
    start: int,
) -> Float[np.ndarray, " row"]:
    """Time at which each row comes down to 1 + eps; `start` is the index that is clearly down."""
    if noise <= NEGLIGIBLE_NOISE * eps:
        return first_crossing(time, smooth, 1.0 + eps)[0]
    near, far = max(eps, 3.0 * noise), max(2.0 * eps, FIT_REACH * noise)
    first = int((smooth[0] <= 1.0 + far).argmax())
    previous = max(min(first, start - 1), 0)
    rate = np.log(far / near) / (time[previous + 1 if start == 0 else start] - time[previous])
    end = time[start] + np.log(near / eps) / rate
    stop = int(np.searchsorted(time, end + np.log(2.0) / rate, side="right"))
    used = slice(max(min(first, start - 2), 0), max(stop, start + 3))
    return _fit_approach(time[used], ratio[:, used], eps, end, float(rate))


def _fit_approach(
    time: Float[np.ndarray, " time"],
    ratio: Float[np.ndarray, "row time"],
    eps: float,
    end: float,
    rate: float,
) -> Float[np.ndarray, " row"]:
    r"""Least squares for $\rho(t) = 1 + \epsilon e^{a - b t}$ on the linear scale; returns $a/b$.

    Iteratively reweighted lines in $\log(\rho - 1)$, which may be negative by chance and then
    still count. The variance of a squared residual $r + \xi$ about its floor is proportional to
    $1 + 2(\rho - 1)$; weights take it from the fit, since an observed variance is low where the
    mean is low by chance and would pull the curve down.
    """
    evenly = trapezoid_weights(time)
    a, b = np.full(len(ratio), rate * end), np.full(len(ratio), rate)
    for _ in range(100):
        excess = eps * np.exp(np.clip(a[:, None] - b[:, None] * time, -50.0, 50.0))
        change = np.clip((ratio - 1.0 - excess) / excess, -1e3, 1e3)
        intercept, slope = weighted_line(time, change, evenly * excess**2 / (1.0 + 2.0 * excess))
        largest = np.abs(intercept[:, None] + slope[:, None] * time).max(axis=1)
        damping = 1.0 / np.maximum(largest, 1.0)
        a, b = a + damping * intercept, b - damping * slope
        if largest.max() < 1e-10:
            break
    return np.where(b > 0.0, a / np.where(b > 0.0, b, 1.0), np.nan)
