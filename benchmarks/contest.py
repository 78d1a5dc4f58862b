"""Several ways to do the same work, timed in turns in one process."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SHORTEST = 0.1
"""Seconds of work in one timing; shorter work is repeated."""

PAUSE = 0.3
"""Seconds between two timings, in which the threads of the last contestant fall asleep."""

PATIENCE = 60.0
"""Seconds that one contestant may take in all; a slow one takes part in fewer rounds."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    - `run`: does it and returns when it is done.
    - `work`: how many units of work that is (steps times paths, solves, ...): times are given per
        unit, so that slow contestants may do less of it.
    - `facts`: what else the table says about it, such as an error.
    """

    name: str
    run: Callable[[], Any]
    work: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """The seconds per unit of work of one contestant, one number a round."""

    name: str
    seconds: list[float]
    first_call: float
    facts: dict[str, Any]

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)

    def ratios(self, other: "Timing") -> list[float]:
        """How many times longer it takes than another, round by round."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=False)]


def contest(
    contestants: Sequence[Contestant], rounds: int, patience: float = PATIENCE
) -> dict[str, Timing]:
    """Time every contestant once a round; the order rotates from round to round.

    The first call, which compiles, is kept apart.
    """
    timings: dict[str, Timing] = {}
    repeats: dict[str, int] = {}
    turns: dict[str, int] = {}
    for one in contestants:
        first = _seconds(one.run, 1)
        once = first if first > patience / 2 else _seconds(one.run, 1)
        repeats[one.name] = max(1, round(SHORTEST / once))
        turns[one.name] = max(1, int(patience / max(once, SHORTEST)))
        timings[one.name] = Timing(one.name, [], first, one.facts)
    for number in range(rounds):
        shift = number % len(contestants)
        for one in (*contestants[shift:], *contestants[:shift]):
            if number < turns[one.name]:
                seconds = _seconds(one.run, repeats[one.name]) / one.work
                timings[one.name].seconds.append(seconds)
    return timings


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    """The mean wall time of a call."""
    gc.collect()
    time.sleep(PAUSE)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats
