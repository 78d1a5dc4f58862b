"""Times at which trajectories can be compared without interpolation."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from gradflow.analysis.unmeasured import Unmeasured

Clock: TypeAlias = Literal["flow time", "effective time"]
FLOW: Clock = "flow time"
EFFECTIVE: Clock = "effective time"

SAME_TIME = 1e-9
"""Relative difference below which two times are the same."""


def match_times(
    saved: Mapping[str, Float[np.ndarray, " _"]],
    times: Sequence[float] | None,
    clock: Clock = FLOW,
) -> dict[str, Int[np.ndarray, " match"]]:
    """Indices of the matched times in the saved times of every trajectory.

    **Arguments:**

    - `saved`: times by label.
    - `times`: times saved in all; None if all have the same ones.
    - `clock`: that of all these times.

    **Raises:** `ValueError` naming the nearest pairs if a time is missing: nothing is interpolated.
    """
    first, *_ = saved
    if times is None:
        for own in saved.values():
            _find(first, saved[first], own, clock)
    wanted = saved[first] if times is None else np.asarray(times, dtype=float).reshape(-1)
    if wanted.size == 0:
        raise ValueError(f"times: give one {clock} or more, or None for all saved ones")
    if not np.all(np.isfinite(wanted)):
        raise ValueError(f"times: must be finite numbers; got {wanted.tolist()}")
    return {label: _find(label, own, wanted, clock) for label, own in saved.items()}


def _find(
    label: str, own: Float[np.ndarray, " own"], wanted: Float[np.ndarray, " wanted"], clock: Clock
) -> Int[np.ndarray, " wanted"]:
    """Indices of the wanted times among a trajectory's own."""
    index = np.abs(own[:, None] - wanted[None, :]).argmin(axis=0)
    nearest = own[index]
    missing = np.abs(nearest - wanted) > SAME_TIME * np.abs(wanted)
    if missing.any():
        pairs = [
            f"{t:.9g} (nearest {n:.9g})"
            for t, n in zip(wanted[missing], nearest[missing], strict=True)
        ]
        shown = ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} more" if len(pairs) > 5 else "")
        what = "t" if clock == FLOW else f"{EFFECTIVE} h k / (1 - momentum)"
        raise Unmeasured(
            f"trajectory {label!r} was not saved at {what} = {shown}; nothing is interpolated",
            python="save all trajectories at the same times (multiples of every step size), or "
            "pass times= with times saved in all",
            spec="give the runs the same save = { times = [...] } (multiples of every step size), "
            "or the claim times = [...] saved in all",
        )
    return index


def common_grid(
    steps: Mapping[str, float], t1: float, save: int, clock: Clock = FLOW
) -> Float[np.ndarray, " save"]:
    """Times from 0 to `t1` that are multiples of every step size, as even as these allow.

    **Arguments:**

    - `steps`: step sizes by label; empty if nothing lives on a grid.
    - `t1`: end; `save`: number of times, fewer if the step sizes meet less often.
    - `clock`: that of step sizes and end.

    **Raises:** `ValueError` if the step sizes have no common multiple up to `t1`.
    """
    if not (t1 > 0.0 and save >= 2):
        raise ValueError(f"t1 must be positive and save at least 2; got t1={t1}, save={save}")
    if not steps:
        return np.linspace(0.0, t1, save)
    listed = ", ".join(f"{h:g} ({label})" for label, h in steps.items())
    finest = min(steps.values())
    parts = [Fraction(h / finest).limit_denominator(1000) for h in steps.values()]
    period = finest * lcm(*(f.numerator for f in parts)) / gcd(*(f.denominator for f in parts))
    ratios = np.array([period / h for h in steps.values()])
    count = int(np.floor(t1 / period * (1.0 + SAME_TIME)))
    per = "" if clock == FLOW else f" in {clock}, h / (1 - momentum),"
    if count == 0 or np.abs(ratios - np.round(ratios)).max() > SAME_TIME * ratios.max():
        raise ValueError(
            f"dynamics: the step sizes {listed}{per} have no common multiple up to t1 = {t1:g}; "
            "choose step sizes that are multiples of one another, or a longer t1"
        )
    return np.unique(np.round(np.linspace(0, count, save))) * period
