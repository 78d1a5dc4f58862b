"""When a run is saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

import numpy as np

from gradflow.dynamics.base import AbstractDynamics

Spacing: TypeAlias = Literal["lin", "log"]
Save: TypeAlias = int | Sequence[float] | np.ndarray

LOG_DECADES = 4
"""Log-spaced times of a flow start this many decades before its end."""

MOST_TICKS = 2**31 - 1
"""Steps are 32-bit integers."""


@dataclass(frozen=True)
class Schedule:
    """Saved times of a run.

    - `marks`: positions on the dynamics' own clock (integers on a grid, flow times otherwise).
    - `time`: flow times.
    - `step`: numbers of steps of size h, None for an adaptive dynamics.
    """

    marks: np.ndarray
    time: np.ndarray
    step: np.ndarray | None


def schedule(
    dynamics: AbstractDynamics,
    t1: float | None,
    steps: int | None,
    save: Save,
    spacing: Spacing,
) -> Schedule:
    """The schedule of a run; 0 is always saved first.

    **Raises:** `TypeError` or `ValueError` for a length or save times that make no sense.
    """
    if spacing not in ("lin", "log"):
        raise ValueError(f"spacing must be 'lin' or 'log'; got {spacing!r}.")
    if (t1 is None) == (steps is None):
        given = "neither" if t1 is None else "both"
        raise ValueError(f"t1 and steps: give the length of the run by one of them; got {given}.")
    for name, value in (("t1", t1), ("steps", steps)):
        if value is not None and not isinstance(value, Real):
            raise TypeError(f"{name} must be a number; got {value!r}.")
    if t1 is not None and not (np.isfinite(t1) and t1 > 0):
        raise ValueError(f"t1 must be a finite flow time > 0; got {t1}.")
    if dynamics.ticks_per_step is None or dynamics.step_size is None:
        if t1 is None:
            raise ValueError(
                f"steps={steps}: {type(dynamics).__name__} has no step size; give its length as "
                "flow time t1."
            )
        times = _flow_times(float(t1), save, spacing)
        return Schedule(times, times, None)
    h = float(dynamics.step_size)
    if t1 is not None:
        steps = round(float(t1) / h)
        if steps < 1:
            raise ValueError(
                f"t1={t1:g} is less than half of one step of size {h:g}; make the run longer or "
                "the step smaller."
            )
    if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1; got {steps!r}.")
    if steps * dynamics.ticks_per_step > MOST_TICKS:
        raise ValueError(
            f"steps={steps}: at most {MOST_TICKS // dynamics.ticks_per_step} steps can be "
            "addressed; use a larger step size or continue from the final network."
        )
    end = int(steps) * h if t1 is None else max(float(t1), int(steps) * h)
    saved = _grid_steps(int(steps), save, spacing, h, end)
    return Schedule(saved * dynamics.ticks_per_step, saved * h, saved)


def _count(save: int) -> int:
    if save < 2:
        raise ValueError(f"save={save}: at least 2 points (start and end) are saved.")
    return save


def _flow_times(t1: float, save: Save, spacing: Spacing) -> np.ndarray:
    if isinstance(save, int | np.integer):
        count = _count(int(save))
        if spacing == "lin":
            return np.linspace(0.0, t1, count)
        positive = np.geomspace(t1, t1 * 10.0**-LOG_DECADES, count - 1)[::-1]
        return np.concatenate([[0.0], positive])
    return _with_zero(_checked_times(save, t1))


def _grid_steps(steps: int, save: Save, spacing: Spacing, h: float, end: float) -> np.ndarray:
    if isinstance(save, int | np.integer):
        count = _count(int(save))
        if spacing == "lin":
            return np.unique(np.round(np.linspace(0, steps, min(count, steps + 1))).astype(int))
        positive = np.round(np.geomspace(steps, 1, count - 1)).astype(int)
        return np.unique(np.concatenate([[0], positive]))
    times = _with_zero(_checked_times(save, end))
    return np.unique(np.minimum(np.round(times / h).astype(int), steps))


def _checked_times(save: Save, t1: float) -> np.ndarray:
    times = np.asarray(save, dtype=float)
    if times.ndim != 1 or times.size == 0 or not np.all(np.isfinite(times)):
        raise ValueError("save: explicit times must be a non-empty list of finite flow times.")
    if np.any(np.diff(times) <= 0) or times[0] < 0:
        raise ValueError("save: explicit times must be >= 0 and strictly increasing.")
    if times[-1] > t1 * (1 + 1e-9):
        raise ValueError(
            f"save: the last time {times[-1]:g} lies beyond the end of the run at t = {t1:g}."
        )
    return times


def _with_zero(times: np.ndarray) -> np.ndarray:
    return times if times[0] == 0.0 else np.concatenate([[0.0], times])
