"""Rates of SGD beside what theory, slow flow and SDE say of them, with verdicts."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.interpolate import PchipInterpolator

from gradflow.analysis.comparison.agreement import AGREE, UNDECIDED, decide
from gradflow.analysis.local_rates import local_rates
from gradflow.analysis.rates import FEWEST_POINTS, Rate, decay_rate
from gradflow.analysis.statistics import read_paths, trapezoid_weights, weighted_line
from gradflow.report.reading import RunView, run_views
from gradflow.study.results import StudyResult
from gradflow.study.spec.tables import GradientDescent, SlowFlow, StochasticFlow

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
class Verdict:
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
    verdict: Verdict | None


@dataclass(frozen=True)
class TheoryRow:
    r"""One training with everything that is said of its imbalance rate, per unit flow time.

    - `view`: the run of SGD, or the first of the others where there is none.
    - `step_size`, `h_lambda`: $h$ and $h \lambda_{\max}$ at the start of the phase; NaN if unknown.
    - `measured`: SGD; None where it has no rate.
    - `leading_order`, `finite_step`: predicted at the start of the phase.
    - `slow_flow`, `classical_flow`: exact in the step size, and of small steps.
    - `stochastic_flows`: SDEs.
    - `changes`: whether the measured rate changes along the run.
    """

    view: RunView
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
        return self.view.run.group or self.view.label


def compared_rates(result: StudyResult) -> Counter[str]:
    """Returns how many measured imbalance rates agree with theory, miss it, and so on.

    Every run with a rate and a prediction counts, but slow flows, which are theory themselves: as
    "agrees", "misses" or "undecided" within the tolerance, or "not constant" where the rate leaves
    the tolerance somewhere along the run: no number at the start of the phase predicts it.
    """
    said = {"agree": "agrees", "differ": "misses", "undecided": "undecided"}
    counts: Counter[str] = Counter()
    for view in run_views(result, ()):
        rate, prediction = view.run.rate, view.run.prediction
        if rate is None or prediction is None or view.is_slow:
            continue
        if not math.isfinite(prediction.imbalance_rate):
            continue
        measured, predicted = _of_run(view, rate), Measured(prediction.imbalance_rate)
        words = [judged(one, predicted).word for one in (measured, *map(Measured, measured.local))]
        moves = measured.local and set(words) != {"agree"}
        counts["not constant" if moves else said[words[0]]] += 1
    return counts


def theory_rows(result: StudyResult) -> list[TheoryRow]:
    """Returns one row for each run of SGD, with the SDEs and slow flows of the same training.

    They belong together if data, network, regularizers, step size and momentum are the same.
    SDEs and slow flows without SGD have rows of their own; trainings of which no rate is known
    have none.
    """
    views = run_views(result, ())
    trainings: dict[tuple[str, ...], list[RunView]] = {}
    for view in views:
        if isinstance(view.run.spec.dynamics, GradientDescent | StochasticFlow | SlowFlow):
            trainings.setdefault(_training(result, view), []).append(view)
    rows = []
    for members in trainings.values():
        descents = [v for v in members if isinstance(v.run.spec.dynamics, GradientDescent)]
        others = [v for v in members if v not in descents]
        rows += [_row(one, others) for one in descents] or [_row(None, others)]
    order = {view.name: i for i, view in enumerate(views)}
    known = [row for row in rows if _says_something(row)]
    return sorted(known, key=lambda row: order[row.view.name])


def _training(result: StudyResult, view: RunView) -> tuple[str, ...]:
    """Returns what is the same for SGD, its SDE and its slow flow."""
    run = view.run.spec
    dynamics = run.dynamics.model_dump()
    momentum = dynamics.get("momentum", 0.0)
    method = (
        str(dynamics["step_size"]),
        str(momentum),
        str(dynamics["decay"] if momentum else "coupled"),
        str(dynamics.get("nesterov", False)),
        str(dynamics.get("optimizer")),
    )
    problem = (result.spec.data_of(run), result.spec.network_of(run), *run.regularizers)
    return (*method, *(part.model_dump_json() for part in problem))


def _row(descent: RunView | None, others: Sequence[RunView]) -> TheoryRow:
    view = descent or others[0]
    rate, prediction = view.run.rate, view.run.prediction
    window = None if rate is None else rate.window
    measured = None if descent is None else _measured(descent, window)
    changes = measured is not None and window is not None and _changes(view, measured, window)

    def compared(name: str, number: Measured | None, at_start: bool) -> Compared | None:
        if number is None or not math.isfinite(number.value):
            return None
        verdict = None if measured is None else judged(measured, number)
        if verdict is not None and at_start and changes:
            verdict = Verdict("undecided", verdict.relative, verdict.sigmas, CHANGES)
        return Compared(name, number, verdict)

    def beside(other: RunView, name: str) -> Compared | None:
        number = _measured(other, window)
        if descent is not None and _is_smooth(other):
            number = _followed(other, descent, window)
        return compared(name, number, at_start=False)

    slow: dict[bool, Compared | None] = {True: None, False: None}
    equations = []
    if view.run.along is not None and prediction is not None and prediction.slow is not None:
        is_finite = prediction.slow.theory == "finite_step"
        name = "" if is_finite else "h \u2192 0"
        slow[is_finite] = compared(name, _of_rate(view.run.along, 0.0), at_start=False)
    for other in others:
        dynamics = other.run.spec.dynamics
        if isinstance(dynamics, SlowFlow):
            name = "" if dynamics.finite_step else "h \u2192 0"
            slow[dynamics.finite_step] = beside(other, name)
        elif isinstance(dynamics, StochasticFlow):
            name = f"order {dynamics.order}" if dynamics.order > 1 else ""
            equations.append(beside(other, name))
    leading = finite = None
    if prediction is not None:
        leading = Measured(prediction.leading_rate)
        # the prediction for an SDE is that of small steps
        is_sde = isinstance(view.run.spec.dynamics, StochasticFlow)
        finite = None if is_sde else Measured(prediction.imbalance_rate)
    step_size = view.run.trajectory.dynamics.step_size
    return TheoryRow(
        view=view,
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


def _measured(view: RunView, window: tuple[float, float] | None) -> Measured | None:
    """Returns the decay rate of the imbalance in a window, None where it cannot be measured."""
    if window is None:
        return None
    trajectory = view.run.trajectory
    try:
        rate = decay_rate(trajectory, "imbalance", window)
    except ValueError:
        return None
    return _of_run(view, rate)


def _of_run(view: RunView, rate: Rate) -> Measured:
    return _of_rate(rate, 0.0 if rate.replicas == 1 and _is_smooth(view) else rate.standard_error)


def _of_rate(rate: Rate, error: float) -> Measured:
    local = () if rate.constant else rate.local
    return Measured(rate.value, error, rate.replicas, rate.independent, local)


def _is_smooth(view: RunView) -> bool:
    trajectory = view.run.trajectory
    return not trajectory.dynamics.is_random(trajectory.problem)


def _followed(
    slow: RunView, descent: RunView, window: tuple[float, float] | None
) -> Measured | None:
    """Returns the rate of a path without noise, fitted at the times at which SGD was."""
    if window is None:
        return None
    saved = np.asarray(descent.run.trajectory.time, dtype=float)
    time = saved[(saved >= window[0]) & (saved <= window[1])]
    try:
        path = read_paths(slow.run.trajectory, "imbalance")
    except ValueError:
        return None
    inside = path.time[0] <= time[0] and time[-1] <= path.time[-1] * (1 + 1e-9)
    if time.size < FEWEST_POINTS or not inside or not np.all(path.values[0] > 0.0):
        return None
    logs = PchipInterpolator(path.time, np.log(path.values[0]))(np.minimum(time, path.time[-1]))
    slope = weighted_line(time, logs[None], trapezoid_weights(time))[1]
    local = local_rates(time, -logs[None], 1.0, None)
    return Measured(-float(slope[0]), local=() if local.constant else local.values)


def _changes(view: RunView, whole: Measured, window: tuple[float, float]) -> bool:
    """Returns whether the rate early in a window differs from that of all of it."""
    start, stop = window
    parts = [_measured(view, (start, start + share * (stop - start))) for share in _EARLY]
    return any(part is not None and judged(part, whole).word == "differ" for part in parts)


def judged(first: Measured, second: Measured) -> Verdict:
    """Returns the verdict on a number and the second, of which it may be `TOLERANCE` away."""
    difference, error = first.value - second.value, math.hypot(first.error, second.error)
    size = abs(second.value)
    relative = difference / size if size else math.copysign(math.inf, difference)
    if math.isnan(error):
        return Verdict("undecided", relative, math.nan, "one random path has no standard error")
    spread = sum(x.error**4 / max(x.independent - 1, 1) for x in (first, second))
    degrees = error**4 / spread if spread else 1.0
    replicas = max(first.replicas, second.replicas)
    found = decide(difference, error, degrees, TOLERANCE * size, LEVEL, replicas)
    sigmas = difference / error if error else math.nan
    if found.verdict != UNDECIDED:
        return Verdict("agree" if found.verdict == AGREE else "differ", relative, sigmas)
    needed = found.replicas_needed
    reason = "" if needed is None else f"about {needed} replicas decide"
    return Verdict("undecided", relative, sigmas, reason)
