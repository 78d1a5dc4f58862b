"""Rates of SGD beside what theory, slow flow and SDE say of them, with verdicts."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import numpy as np
from scipy.interpolate import PchipInterpolator

from gradflow.analysis.comparison.agreement import AGREE, UNDECIDED, decide
from gradflow.analysis.comparison.evaluated import EvaluatedRun
from gradflow.analysis.local_rates import local_rates
from gradflow.analysis.rates import FEWEST_POINTS, Rate, decay_rate
from gradflow.analysis.statistics import read_paths, trapezoid_weights, weighted_line
from gradflow.dynamics.base import AbstractDynamics, Role
from gradflow.dynamics.effective_time import momentum_of

TOLERANCE = 0.05
"""Relative difference of two rates within which they agree."""

LEVEL = 0.025
"""Probability with which a verdict may be wrong, of each of its two one-sided tests."""

_EARLY = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Shares of a run in which its rate is compared with that of the whole run."""

RULE = (
    f"SGD and a number agree where they are within {100 * TOLERANCE:g}\u00a0% of that number, and "
    f"differ where they are not, each with {100 * (1 - LEVEL):g}\u00a0% confidence (two one-sided "
    "tests); else it is undecided. All rates are fitted to the regularization phase of the SGD "
    "run. Predictions are rates at its start: where the measured rate changes along the run they "
    "get no verdict, and the slow flow, which follows the change, does."
)

Word = Literal["agree", "differ", "undecided"]
CHANGES = "the rate changes along the run"


@dataclass(frozen=True)
class Measured:
    """A number with its standard error: 0 where it is exact, NaN where it is not known.

    - `independent`: over how many replicas, or antithetic pairs, the error is taken.
    - `local`: a rate over thirds of its window where it is not constant, else empty.
    """

    value: float
    error: float = 0.0
    replicas: int = 1
    independent: int = 1
    local: tuple[float, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What SGD says of a number.

    - `word`: agree, differ or undecided; `reason`: why it is undecided.
    - `relative`: (SGD - number) / |number|; `sigmas`: the difference in standard errors, NaN
      without one.
    """

    word: Word
    relative: float
    sigmas: float
    reason: str = ""


@dataclass(frozen=True)
class Compared:
    """A number that stands beside SGD: its name where there are several, and the verdict."""

    name: str
    number: Measured
    verdict: Judgement | None


@dataclass(frozen=True)
class TheoryRow:
    r"""One training with everything that is said of its imbalance rate, per unit flow time.

    - `run`: that of SGD, or the first of the others where there is none.
    - `step_size`, `h_lambda`: $h$ and $h \lambda_{\max}$ at the start of the phase; NaN if unknown.
    - `measured`: SGD; None where it has no rate.
    - `leading_order`, `finite_step`: predicted at the start of the phase.
    - `slow_flow`, `classical_flow`: exact in the step size, and of small steps.
    - `stochastic_flows`: SDEs.
    - `changes`: whether the measured rate changes along the run.
    """

    run: EvaluatedRun
    step_size: float
    h_lambda: float
    measured: Measured | None
    leading_order: Compared | None
    finite_step: Compared | None
    slow_flow: Compared | None
    classical_flow: Compared | None
    stochastic_flows: tuple[Compared, ...]
    changes: bool

    @property
    def label(self) -> str:
        """Returns what people call the regularizer: the group, or the run that has none."""
        return self.run.group or self.run.label


def compared_rates(runs: Iterable[EvaluatedRun]) -> Counter[str]:
    """Returns how many measured imbalance rates agree with theory, miss it, and so on.

    Every run with a rate and a prediction counts, but slow flows, which are theory themselves: as
    "agrees", "misses" or "undecided" within the tolerance. Where the rate leaves the tolerance
    somewhere along the run, no number at the start of the phase predicts it: the slow flow along
    the run is compared in its place, and without one the rate counts as "not constant".
    """
    said = {"agree": "agrees", "differ": "misses", "undecided": "undecided"}
    counts: Counter[str] = Counter()
    for run in runs:
        rate, prediction = run.rate, run.prediction
        if rate is None or prediction is None or run.is_slow:
            continue
        if not math.isfinite(prediction.imbalance_rate):
            continue
        measured, predicted = _of_run(run, rate), Measured(prediction.imbalance_rate)
        words = [judged(one, predicted).word for one in (measured, *map(Measured, measured.local))]
        if not measured.local or set(words) == {"agree"}:
            counts[said[words[0]]] += 1
        elif run.along is None:
            counts["not constant"] += 1
        else:
            counts[said[judged(measured, _of_rate(run.along, 0.0)).word]] += 1
    return counts


def theory_rows(runs: Sequence[EvaluatedRun]) -> list[TheoryRow]:
    """Returns one row for each run of SGD, with the SDEs and slow flows of the same training.

    They belong together if problem, start, step size and momentum are the same.
    SDEs and slow flows without SGD have rows of their own; trainings of which no rate is known
    have none.
    """
    trainings: list[list[EvaluatedRun]] = []
    for run in runs:
        if run.trajectory.dynamics.role is not None:
            for members in trainings:
                if _same_training(members[0], run):
                    members.append(run)
                    break
            else:
                trainings.append([run])
    rows = []
    for members in trainings:
        descents = [r for r in members if r.trajectory.dynamics.role is Role.TRAINING]
        others = [r for r in members if r not in descents]
        rows += [_row(one, others) for one in descents] or [_row(None, others)]
    order = {run.name: i for i, run in enumerate(runs)}
    known = [row for row in rows if _says_something(row)]
    return sorted(known, key=lambda row: order[row.run.name])


def _same_training(first: EvaluatedRun, second: EvaluatedRun) -> bool:
    """Returns whether two runs are of one training: SGD, its SDE and its slow flow."""
    one, other = first.trajectory, second.trajectory
    return (
        _method(one.dynamics) == _method(other.dynamics)
        and bool(eqx.tree_equal(one.problem, other.problem))
        and bool(eqx.tree_equal(one.start, other.start))
    )


def _method(dynamics: AbstractDynamics) -> tuple[str, ...]:
    momentum, rule = momentum_of(dynamics), dynamics.update_rule
    return (
        str(rule.schedule or dynamics.step_size),
        str(momentum),
        str(rule.decay if momentum else "coupled"),
        str(rule.nesterov),
        str(rule.optimizer),
    )


def _row(descent: EvaluatedRun | None, others: Sequence[EvaluatedRun]) -> TheoryRow:
    run = descent or others[0]
    rate, prediction = run.rate, run.prediction
    window = None if rate is None else rate.window
    measured = None if descent is None else _measured(descent, window)
    changes = measured is not None and window is not None and _changes(run, measured, window)

    def compared(name: str, number: Measured | None, at_start: bool) -> Compared | None:
        if number is None or not math.isfinite(number.value):
            return None
        verdict = None if measured is None else judged(measured, number)
        if verdict is not None and at_start and changes:
            verdict = Judgement("undecided", verdict.relative, verdict.sigmas, CHANGES)
        return Compared(name, number, verdict)

    def beside(other: EvaluatedRun, name: str) -> Compared | None:
        number = _measured(other, window)
        if descent is not None and other.is_smooth:
            number = _followed(other, descent, window)
        return compared(name, number, at_start=False)

    slow: dict[bool, Compared | None] = {True: None, False: None}
    equations = []
    if run.along is not None and prediction is not None and prediction.slow is not None:
        is_finite = prediction.slow.theory == "finite_step"
        name = "" if is_finite else "h \u2192 0"
        slow[is_finite] = compared(name, _of_rate(run.along, 0.0), at_start=False)
    for other in others:
        dynamics = other.trajectory.dynamics
        options = dynamics.theory_options()
        if dynamics.is_slow:
            is_finite = options["discrete"]
            slow[is_finite] = beside(other, "" if is_finite else "h \u2192 0")
        elif dynamics.role is Role.SDE:
            order = options.get("order", 1)
            equations.append(beside(other, f"order {order}" if order > 1 else ""))
    leading = finite = None
    if prediction is not None:
        leading = Measured(prediction.leading_rate)
        # the prediction for an SDE is that of small steps
        is_sde = run.trajectory.dynamics.role is Role.SDE
        finite = None if is_sde else Measured(prediction.imbalance_rate)
    step_size = run.trajectory.dynamics.step_size
    return TheoryRow(
        run=run,
        step_size=math.nan if step_size is None else float(step_size),
        h_lambda=math.nan if prediction is None else prediction.sharpness,
        measured=measured,
        leading_order=compared("", leading, at_start=True),
        finite_step=compared("", finite, at_start=True),
        slow_flow=slow[True],
        classical_flow=slow[False],
        stochastic_flows=tuple(e for e in equations if e is not None),
        changes=changes,
    )


def _says_something(row: TheoryRow) -> bool:
    theory = (row.leading_order, row.finite_step, row.slow_flow, row.classical_flow)
    return row.measured is not None or any((*theory, *row.stochastic_flows))


def _measured(run: EvaluatedRun, window: tuple[float, float] | None) -> Measured | None:
    """Returns the decay rate of the imbalance in a window, None where it cannot be measured."""
    if window is None:
        return None
    trajectory = run.trajectory
    try:
        rate = decay_rate(trajectory, "imbalance", window)
    except ValueError:
        return None
    return _of_run(run, rate)


def _of_run(run: EvaluatedRun, rate: Rate) -> Measured:
    return _of_rate(rate, 0.0 if rate.replicas == 1 and run.is_smooth else rate.standard_error)


def _of_rate(rate: Rate, error: float) -> Measured:
    local = () if rate.constant else rate.local
    return Measured(rate.value, error, rate.replicas, rate.independent, local)


def _followed(
    slow: EvaluatedRun, descent: EvaluatedRun, window: tuple[float, float] | None
) -> Measured | None:
    """Returns the rate of a path without noise, fitted at the times at which SGD was."""
    if window is None:
        return None
    saved = np.asarray(descent.trajectory.time, dtype=float)
    time = saved[(saved >= window[0]) & (saved <= window[1])]
    try:
        path = read_paths(slow.trajectory, "imbalance")
    except ValueError:
        return None
    inside = path.time[0] <= time[0] and time[-1] <= path.time[-1] * (1 + 1e-9)
    if time.size < FEWEST_POINTS or not inside or not np.all(path.values[0] > 0.0):
        return None
    logs = PchipInterpolator(path.time, np.log(path.values[0]))(np.minimum(time, path.time[-1]))
    slope = weighted_line(time, logs[None], trapezoid_weights(time))[1]
    local = local_rates(time, -logs[None], 1.0, None)
    return Measured(-float(slope[0]), local=() if local.constant else local.values)


def _changes(run: EvaluatedRun, whole: Measured, window: tuple[float, float]) -> bool:
    """Returns whether the rate early in a window differs from that of all of it."""
    start, stop = window
    parts = [_measured(run, (start, start + share * (stop - start))) for share in _EARLY]
    return any(part is not None and judged(part, whole).word == "differ" for part in parts)


def judged(first: Measured, second: Measured) -> Judgement:
    """Returns the verdict on a number and the second, of which it may be `TOLERANCE` away."""
    difference, error = first.value - second.value, math.hypot(first.error, second.error)
    size = abs(second.value)
    relative = difference / size if size else math.copysign(math.inf, difference)
    if math.isnan(error):
        return Judgement("undecided", relative, math.nan, "one random path has no standard error")
    spread = sum(x.error**4 / max(x.independent - 1, 1) for x in (first, second))
    degrees = error**4 / spread if spread else 1.0
    replicas = max(first.replicas, second.replicas)
    found = decide(difference, error, degrees, TOLERANCE * size, LEVEL, replicas)
    sigmas = difference / error if error else math.nan
    if found.verdict != UNDECIDED:
        return Judgement("agree" if found.verdict == AGREE else "differ", relative, sigmas)
    needed = found.replicas_needed
    reason = "" if needed is None else f"about {needed} replicas decide"
    return Judgement("undecided", relative, sigmas, reason)
