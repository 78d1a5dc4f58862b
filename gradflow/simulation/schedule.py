"""When a run is saved."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from gradflow.backend.tracing import float_of
from gradflow.checks import MOST_COUNTED
from gradflow.dynamics.base import AbstractDynamics
from gradflow.dynamics.descent import scheduled_step_sizes

Spacing: TypeAlias = Literal["lin", "log"]
Save: TypeAlias = int | Sequence[float] | np.ndarray

LOG_DECADES = 4
"""Log-spaced times of a flow start this many decades before its end."""

MOST_SAVED = 2**26
"""Saved points of a run: half a gigabyte for the times alone."""

SAME_TIME = 1e-9
"""How far beyond the end of a run a time may lie, as a share of it, and still be the end."""

MOST_SCHEDULED = 2**26
"""Steps of a step-size schedule whose flow times are added up: half a gigabyte."""

SCHEDULED_AT_ONCE = 2**12
"""Step sizes of a schedule that are evaluated in one call."""

MOST_STANDING = 2**20
"""Steps of size 0 in a row after which a schedule is taken to stay there."""


@dataclass(frozen=True)
class Schedule:
    """Saved times of a run.

    - `save_positions`: on the dynamics' own clock (integers on a grid, flow times otherwise).
    - `time`: flow times.
    - `step`: numbers of steps of size h, None for an adaptive dynamics.
    """

    save_positions: np.ndarray
    time: np.ndarray
    step: np.ndarray | None


def schedule(
    dynamics: AbstractDynamics,
    t1: float | None,
    steps: int | None,
    save: Save,
    spacing: Spacing,
) -> Schedule:
    """The schedule of a run.

    A number of points has the start first; of explicit times only 0 is the start.

    **Raises:** `TypeError` or `ValueError` for a length or save times that make no sense.
    """
    if spacing not in ("lin", "log"):
        raise ValueError(f"spacing must be 'lin' or 'log'; got {spacing!r}.")
    if (t1 is None) == (steps is None):
        given = "neither" if t1 is None else "both"
        raise ValueError(f"t1 and steps: give the length of the run by one of them; got {given}.")
    for name, value in (("t1", t1), ("steps", steps)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"{name} must be a number; got {value!r}.")
    if isinstance(save, bool):
        raise TypeError(f"save must be a number of points or a list of flow times; got {save!r}.")
    if isinstance(save, int | np.integer) and save > MOST_SAVED:
        raise ValueError(f"save: at most {MOST_SAVED} points are saved; got {float_of(save):.3g}.")
    if t1 is not None:
        t1 = float_of(t1)
        if not (np.isfinite(t1) and t1 > 0):
            raise ValueError(f"t1 must be a finite flow time > 0; got {t1}.")
    if dynamics.ticks_per_step is None or dynamics.step_size is None:
        if t1 is None:
            if dynamics.step_size is None:
                raise ValueError(
                    f"steps={steps}: {type(dynamics).__name__} has no step size; give its length "
                    "as flow time t1."
                )
            t1 = _end(_checked_steps(steps, 1), float(dynamics.step_size))
        times = _flow_times(float(t1), save, spacing)
        return Schedule(times, times, None)
    step_sizes = dynamics.update_rule.schedule
    if step_sizes is not None:
        return _scheduled(step_sizes, t1, steps, save, spacing)
    h = float(dynamics.step_size)
    if t1 is not None:
        with np.errstate(over="ignore"):
            count = float(np.float64(t1) / h)
        asked = round(count) if count <= MOST_COUNTED else count
        if asked < 1:
            raise ValueError(_too_short(t1, h))
    else:
        asked = steps
    finest = max(dynamics.ticks_per_step, dynamics.grid_steps or 1)
    whole = _checked_steps(asked, finest)
    end = _end(whole, h) if t1 is None else max(float(t1), _end(whole, h))
    saved = _grid_steps(whole, save, spacing, h, end)
    return Schedule(saved * dynamics.ticks_per_step, saved * h, saved)


def _checked_steps(steps: Any, finest: int) -> int:
    if isinstance(steps, bool) or not steps >= 1:
        raise ValueError(f"steps must be an integer >= 1; got {steps!r}.")
    if steps * finest > MOST_COUNTED:
        raise ValueError(
            f"steps={float_of(steps):.10g}: at most {MOST_COUNTED // finest} steps can be "
            "addressed; use a larger step size or continue from the final network."
        )
    if not isinstance(steps, int | np.integer):
        raise ValueError(f"steps must be an integer >= 1; got {steps!r}.")
    return int(steps)


def _end(steps: int, h: float) -> float:
    """The flow time after so many steps."""
    end = steps * h
    if not np.isfinite(end):
        raise ValueError(
            f"steps={steps} of size {h:g} end beyond the largest flow time a number can hold; make "
            "the run shorter or the steps smaller."
        )
    return end


def _too_short(t1: float, h: float) -> str:
    return (
        f"t1={t1:g} is less than half of one step of size {h:g}; make the run longer or the step "
        "smaller."
    )


def _scheduled(
    step_sizes: Callable[[Any], Any],
    t1: float | None,
    steps: int | None,
    save: Save,
    spacing: Spacing,
) -> Schedule:
    r"""The schedule of a run whose step size varies: $t_k = \sum_{j<k} h_j$."""
    if t1 is None:
        steps = _checked_steps(steps, 1)
        if steps > MOST_SCHEDULED:
            raise ValueError(
                f"steps={steps}: at most {MOST_SCHEDULED} steps can follow a step-size schedule; "
                "continue from the final network."
            )
        times = _step_times(step_sizes, steps, np.inf)
        if times[-1] == 0.0:
            raise ValueError(
                f"GradientDescent.step_size: the schedule is 0 at all {steps} steps of the run; "
                "make the run longer or the schedule larger."
            )
    else:
        times = _step_times(step_sizes, MOST_SCHEDULED, float(t1))
        if times[-1] < t1:
            raise ValueError(
                f"t1={t1:g}: the step-size schedule has only reached t = {times[-1]:g} after "
                f"{times.size - 1} steps; make the run shorter or the steps larger."
            )
        last = int(_nearest(times, np.asarray([t1]))[0])
        if last < 1:
            raise ValueError(_too_short(t1, times[times > 0.0][0]))
        times = times[: last + 1]
    end = times[-1] if t1 is None else max(float(t1), times[-1])
    if isinstance(save, int | np.integer):
        count = _count(int(save))
        if spacing == "lin":
            wanted = times if count >= times.size else np.linspace(0.0, times[-1], count)
        else:
            wanted = np.append(0.0, np.geomspace(times[-1], times[times > 0.0][0], count - 1))
    else:
        wanted = _checked_times(save, end)
    saved = _distinct(_nearest(times, wanted), save)
    return Schedule(saved, times[saved], saved)


def _step_times(step_sizes: Callable[[Any], Any], steps: int, t1: float) -> np.ndarray:
    """The flow times of the first steps: up to the first beyond `t1`, at most `steps` of them.

    A step of size 0 takes none, and 0 is what a schedule means by a rounding error below it. One
    that stays at 0 is not followed to a `t1` beyond it.
    """
    pieces, count, time, standing, largest = [np.zeros(1)], 0, 0.0, 0, 0.0
    rounding = 8.0 * float(jnp.finfo(jnp.result_type(float)).eps)
    while count < steps and time < t1 and not (standing >= MOST_STANDING and t1 < np.inf):
        some = np.arange(count, count + SCHEDULED_AT_ONCE)
        h = np.asarray(scheduled_step_sizes(step_sizes, jnp.asarray(some)), dtype=float)
        h = h[: steps - count]
        largest = max(largest, float(np.max(h, initial=0.0, where=np.isfinite(h))))
        h = np.where((h < 0.0) & (h > -rounding * largest), 0.0, h)
        after = time + np.cumsum(h)
        reached = int(np.argmax(after >= t1)) + 1 if np.any(after >= t1) else h.size
        wrong = np.flatnonzero(~(np.isfinite(h[:reached]) & (h[:reached] >= 0.0)))
        if wrong.size:
            first = int(wrong[0])
            raise ValueError(
                f"GradientDescent.step_size: the schedule gives {h[first]} at step "
                f"{count + first}; it must be a finite number >= 0 at every step of the run (end "
                "the run before the schedule does, or keep the schedule from falling below 0)."
            )
        pieces.append(after[:reached])
        standing = 0 if np.any(h[:reached]) else standing + reached
        count, time = count + reached, float(after[reached - 1])
    return np.concatenate(pieces)


def _nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The steps whose times are nearest to the wanted ones.

    Of several at one time, with steps of size 0 between them, the first one; the last at the end.
    """
    above = np.clip(np.searchsorted(times, wanted), 1, times.size - 1)
    near = times[above - (wanted - times[above - 1] <= times[above] - wanted)]
    return np.where(near == times[-1], times.size - 1, np.searchsorted(times, near))


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
    return _checked_times(save, t1)


def _grid_steps(steps: int, save: Save, spacing: Spacing, h: float, end: float) -> np.ndarray:
    if isinstance(save, int | np.integer):
        count = _count(int(save))
        if spacing == "lin":
            return np.unique(np.round(np.linspace(0, steps, min(count, steps + 1))).astype(int))
        positive = np.round(np.geomspace(steps, 1, count - 1)).astype(int)
        return np.unique(np.concatenate([[0], positive]))
    times = _checked_times(save, end)
    return _distinct(np.minimum(np.round(times / h).astype(int), steps), save)


def _distinct(steps: np.ndarray, save: Save) -> np.ndarray:
    """The steps without repetition; warns if times that were given are the same step."""
    distinct = np.unique(steps)
    if distinct.size < steps.size and not isinstance(save, int | np.integer):
        warnings.warn(
            f"save: only {distinct.size} of the {steps.size} times are different steps of this "
            "run; every step is saved once, at its own flow time.",
            UserWarning,
            stacklevel=5,
        )
    return distinct


def _checked_times(save: Save, end: float) -> np.ndarray:
    """Explicit times in double precision; the end itself where one is its rounding."""
    if isinstance(save, np.ma.MaskedArray):
        raise TypeError(
            "save: got a masked array, whose mask would be lost; leave out what is masked, or take "
            "save.compressed()."
        )
    try:
        given = np.asarray(save)
    except ValueError as error:
        raise TypeError(f"save must be a number of points or flow times; got {save!r}.") from error
    if given.dtype.kind not in "iuf":
        raise TypeError(f"save must be a number of points or a list of flow times; got {save!r}.")
    times = given.astype(float)
    if times.ndim != 1 or times.size == 0 or not np.all(np.isfinite(times)):
        raise ValueError("save: explicit times must be a non-empty list of finite flow times.")
    if np.any(np.diff(times) <= 0) or times[0] < 0:
        raise ValueError("save: explicit times must be >= 0 and strictly increasing.")
    rounding = float(np.finfo(given.dtype).eps) if given.dtype.kind == "f" else 0.0
    if times[-1] > end * (1.0 + max(rounding, SAME_TIME)):
        raise ValueError(
            f"save: the last time {times[-1]:g} lies beyond the end of the run at t = {end:g}."
        )
    if times[-1] > end * (1.0 - rounding):
        times[-1] = end
    return times
