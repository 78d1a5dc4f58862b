"""What every statement with an uncertainty is built from.

Replicas are independent, points of one path in time are not. So every standard error here comes
from the spread between replicas (or groups of them) and never from the scatter along a path. Of
antithetic replicas the pairs are independent: `IndependentSamples` turns replicas into what is.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import stdtrit

from gradflow.analysis.afterwards import recorded_array
from gradflow.random.antithetic import IndependentSamples
from gradflow.results.trajectory import Trajectory

MAX_GROUPS = 32
"""Groups of replicas that the jackknife leaves out in turn; more gain nothing but work."""


@dataclass(frozen=True)
class Paths:
    """A scalar observable along the replicas that did not diverge.

    - `observable`: its name.
    - `time`: saved flow times, `(time,)`.
    - `values`: `(replica, time)`; a single path is one replica.
    - `single`: whether the trajectory is one path, without a replica axis or with one replica.
    - `diverged`: how many replicas were left out because they diverged.
    - `precision`: spacing of the recorded floating-point numbers at 1.
    - `samples`: which of the replicas are independent.
    """

    observable: str
    time: Float[np.ndarray, " time"]
    values: Float[np.ndarray, "replica time"]
    single: bool
    diverged: int
    precision: float
    samples: IndependentSamples

    @property
    def replicas(self) -> int:
        """Number of replicas kept."""
        return self.values.shape[0]


def has(trajectory: Trajectory, observable: str) -> bool:
    """Whether the observable was recorded, or can be computed from stored weights."""
    try:
        recorded_array(trajectory, observable)
    except ValueError:
        return False
    return True


def recorded(trajectory: Trajectory, observable: str) -> np.ndarray:
    """The observable with a replica axis, `(replica, time, ...)`, diverged replicas included.

    A built-in one that was not recorded is computed from the stored weights.

    **Raises:** `ValueError` if it was not recorded and cannot be computed.
    """
    values = recorded_array(trajectory, observable).values
    values = values if np.issubdtype(values.dtype, np.floating) else values.astype(float)
    return values[None] if trajectory.replicas is None else values


def survivors(trajectory: Trajectory) -> Bool[np.ndarray, " replica"]:
    """Mask of the replicas that reached the end; a single path is one replica."""
    return ~np.atleast_1d(trajectory.diverged | trajectory.incomplete)


def _or_given_up(trajectory: Trajectory) -> str:
    return " or are incomplete" if trajectory.incomplete.any() else ""


def independent_samples(trajectory: Trajectory) -> IndependentSamples:
    """The independent samples of the replicas that did not diverge."""
    return IndependentSamples(survivors(trajectory), trajectory.normals.antithetic)


def read_paths(trajectory: Trajectory, observable: str, defined: bool = True) -> Paths:
    """Read a scalar observable, leaving out and counting diverged replicas.

    **Arguments:** `defined` asks for finite values on every replica that did not diverge.

    **Raises:** `ValueError` if it was not recorded, is not scalar, is not finite on a replica that
    did not diverge, or if every replica diverged.
    """
    values = recorded(trajectory, observable)
    if values.ndim != 2:
        raise ValueError(
            f"observable {observable!r} has shape {values.shape[2:]} at each time; a scalar is "
            "needed: record a component or a norm of it under a name of its own"
        )
    samples = independent_samples(trajectory)
    kept = samples.kept
    if not kept.any():
        raise ValueError(
            f"all {kept.size} replicas diverged{_or_given_up(trajectory)}, nothing is left to "
            "measure; use a smaller step size or less noise"
        )
    paths = values[kept]
    if defined and not np.isfinite(paths).all():
        replica, index = np.argwhere(~np.isfinite(paths))[0]
        raise ValueError(
            f"observable {observable!r} is {paths[replica, index]} at t = "
            f"{trajectory.time[index]:.6g} on a replica that did not diverge; choose a window or "
            "an observable without such values"
        )
    time = np.asarray(trajectory.time, dtype=float)
    precision = float(np.finfo(values.dtype).eps)
    lost = int(np.sum(~kept))
    return Paths(observable, time, paths.astype(float), kept.size == 1, lost, precision, samples)


def trapezoid_weights(time: Float[np.ndarray, " time"]) -> Float[np.ndarray, " time"]:
    r"""Weights $w_j$ with $\sum_j w_j f(t_j) \approx \int f\,dt$.

    With them a least-squares fit treats flow time evenly however the saved times cluster.
    """
    if time.size == 1:
        return np.ones(1)
    gaps = np.diff(time)
    return 0.5 * (np.concatenate([gaps, [0.0]]) + np.concatenate([[0.0], gaps]))


def weighted_line(
    time: Float[np.ndarray, " time"],
    values: Float[np.ndarray, "replica time"],
    weights: Float[np.ndarray, "... time"],
) -> tuple[Float[np.ndarray, " replica"], Float[np.ndarray, " replica"]]:
    r"""Weighted least-squares line $a + b t$ through each row.

    **Arguments:** `weights` is `(time,)` or `(replica, time)`.

    **Returns:** intercepts $a$ and slopes $b$, one a row.
    """
    total = np.sum(weights, axis=-1)
    centre = np.sum(weights * time, axis=-1) / total
    level = np.sum(weights * values, axis=-1) / total
    offset = time - np.expand_dims(centre, -1)
    slope = np.sum(weights * offset * values, axis=-1) / np.sum(weights * offset**2, axis=-1)
    return level - slope * centre, slope


def leave_out_means(
    values: Float[np.ndarray, "unit time"], groups: int
) -> Float[np.ndarray, "group time"]:
    """Means over independent rows with one group left out in turn (groups as equal as possible)."""
    samples = values.shape[0]
    starts = np.arange(groups) * samples // groups
    sums = np.add.reduceat(values, starts, axis=0)
    sizes = np.diff(np.append(starts, samples))[:, None]
    return (values.sum(axis=0) - sums) / (samples - sizes)


def jackknife_error(estimates: Float[np.ndarray, "group *shape"]) -> np.ndarray:
    r"""Standard error $\sqrt{\frac{G-1}{G}\sum_g(\theta_g-\bar\theta)^2}$ of leave-out values."""
    groups = estimates.shape[0]
    deviations = estimates - estimates.mean(axis=0)
    return np.asarray(np.sqrt((groups - 1) / groups * np.sum(deviations**2, axis=0)))


def student_interval(
    value: float, standard_error: float, degrees: int, confidence: float
) -> tuple[float, float]:
    """Two-sided Student-t interval; `(nan, nan)` without a standard error."""
    if not (np.isfinite(standard_error) and degrees > 0):
        return float("nan"), float("nan")
    half = float(stdtrit(degrees, 0.5 + 0.5 * confidence)) * standard_error
    return value - half, value + half


def mean_with_error(
    values: Float[np.ndarray, " replica"], samples: IndependentSamples, confidence: float
) -> tuple[float, float, float, float]:
    r"""Mean over replicas, its error $s/\sqrt m$ over $m$ samples, and the Student-t interval."""
    mean, error = float(np.mean(values)), float(samples.standard_error(values))
    return mean, error, *student_interval(mean, error, samples.count - 1, confidence)
