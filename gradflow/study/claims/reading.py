"""How measures read trajectories.

Errors are standard errors over independent replicas.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradflow.random.antithetic import IndependentSamples
from gradflow.study.results import RunResult
from gradflow.study.spec.claim_keys import OfComponent, OfObservable, WithWindow
from gradflow.study.spec.claim_tables import Measurement

Values = NDArray[np.float64]


def claim_window(claim: WithWindow) -> tuple[float, float] | None:
    """The window a claim gives, in flow time."""
    return None if claim.window is None else (claim.window[0], claim.window[1])


def inside_window(claim: WithWindow, run: RunResult) -> NDArray[np.bool_]:
    """Which saved times lie in the window of a claim, `(time,)`."""
    time = run.trajectory.time
    low, high = claim_window(claim) or (time[0], time[-1])
    inside = (time >= low) & (time <= high)
    if np.sum(inside) < 2:
        raise ValueError(f"fewer than two saved times lie in the window [{low:g}, {high:g}]")
    return inside


def check_start(run: RunResult) -> None:
    """Raise unless the first saved time is the start.

    **Raises:** `ValueError` saying how to save it.
    """
    first = float(run.trajectory.time[0])
    if first > 0.0:
        raise ValueError(
            f'run "{run.name}" was not saved at its start but from t = {first:g} on; write 0.0 as '
            "the first of its save times"
        )


def survivors(run: RunResult) -> NDArray[np.bool_]:
    """Which replicas did not diverge, `(replica,)`."""
    alive = ~np.atleast_1d(np.asarray(run.trajectory.diverged))
    if not alive.any():
        raise ValueError(f'run "{run.name}": every replica diverged')
    return alive


def finite(run: RunResult, observable: str) -> Values:
    """An observable `(replica, time, ...)` of the replicas that did not diverge."""
    if observable not in run.trajectory:
        raise ValueError(f'run "{run.name}" did not record {observable}; add it to its observables')
    values = np.asarray(run.trajectory[observable], dtype=float)
    if run.trajectory.replicas is None:
        values = values[None]
    return values[survivors(run)]


def observable_values(claim: OfComponent, run: RunResult) -> Values:
    """The claim's observable, or one entry of it, `(replica, time, ...)`."""
    if claim.component is None:
        return finite(run, claim.observable)
    return entry(claim, run, "component")


def entry(claim: OfObservable, run: RunResult, key: Literal["component", "over"]) -> Values:
    """The entry of the claim's observable that one of its keys chooses, `(replica, time)`."""
    values = finite(run, claim.observable)
    chosen, shape = getattr(claim, key), values.shape[2:]
    fits = len(chosen) == len(shape) and all(
        -size <= index < size for index, size in zip(chosen, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{key} = {chosen} does not index {claim.observable} of shape {shape}")
    return values[(..., *chosen)]


def scalar(claim: OfComponent, run: RunResult) -> Values:
    """One number a replica and time, `(replica, time)`."""
    values = observable_values(claim, run)
    if values.ndim > 2:
        shape = values.shape[2:]
        raise ValueError(
            f"{claim.observable} has shape {shape}; choose an entry with component = "
            f"{[0] * len(shape)}"
        )
    return values


def stored_weights(run: RunResult) -> tuple[Values, ...]:
    """Stored weights `(replica, time, d_i, d_{i-1})` of the replicas that did not diverge."""
    layers = tuple(np.asarray(w, dtype=float) for w in run.trajectory.weights)
    if run.trajectory.replicas is None:
        layers = tuple(w[None] for w in layers)
    return tuple(w[survivors(run)] for w in layers)


def mean(values: Values, run: RunResult) -> Measurement:
    """Mean and standard error over the replicas that did not diverge, no error for a single one."""
    samples = IndependentSamples(survivors(run), run.trajectory.normals.antithetic)
    return Measurement(float(np.mean(values)), known(float(samples.standard_error(values))))


def known(value: float | None) -> float | None:
    """A standard error, None where the analysis gives NaN."""
    return None if value is None or math.isnan(value) else float(value)
