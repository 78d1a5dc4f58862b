"""The order in the step size at which two dynamics agree."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from numbers import Real
from typing import get_args

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from gradflow.analysis.convergence.coupling import Coupling, DynamicsOfStep, at_step_size, couple
from gradflow.analysis.convergence.fit import DRIFTING, FEWEST, RESOLVED, OrderFit, fit_order
from gradflow.analysis.convergence.results import OrderPoints, OrderRow, Orders
from gradflow.analysis.convergence.runs import (
    MISSED,
    ROUNDING,
    SAMPLED_WEIGHTS,
    TOLERANCES,
    WEIGHTS,
    Kind,
    PairedRuns,
    StepResult,
    label,
)
from gradflow.checks import check_confidence
from gradflow.dynamics.effective_time import differ_in_momentum
from gradflow.network import DeepLinear
from gradflow.observables import Observable, ObservableSpec, resolve
from gradflow.problem import Problem
from gradflow.simulation.progress import ProgressBar, Report, automatic
from gradflow.simulation.simulate import InterruptedWarning

REPLICAS = 4096
"""Pairs of paths a step size unless asked otherwise."""

APART = 0.4
"""Orders differ by 1/2 at least: two whose estimates are further apart than this differ."""


def orders(
    problem: Problem,
    net: DeepLinear,
    first: DynamicsOfStep,
    second: DynamicsOfStep,
    step_sizes: Sequence[float],
    *,
    t1: float,
    observables: ObservableSpec | None = None,
    kind: Kind = "weak",
    replicas: int | None = None,
    key: PRNGKeyArray | None = None,
    times: Sequence[float] | None = None,
    confidence: float = 0.95,
    progress: bool | Report | None = None,
) -> Orders:
    r"""Measure the order $p$ at which two dynamics agree, $e(h) \sim c\, h^p$ at fixed flow time.

    The weak difference of an observable $\varphi$ is $E \varphi(W_1) - E \varphi(W_2)$, component
    by component; the strong one is $\sqrt{E |\varphi(W_1) - \varphi(W_2)|^2}$, path by path. Two
    deterministic dynamics have no expectations: their differences are exact.

    Both dynamics share their noise where it can be shared (`coupling` of the result says how), and
    weak differences are means of differences of pairs, with control variates made of the Brownian
    path. Order and interval come from `convergence.fit.fit_order`. A row says "not
    resolved" rather than fit noise, and "not asymptotic" rather than read a slope that is no order:
    differences expand in powers of h (noisy paths in powers of its square root), so a slope whose
    interval holds none of these, or that moves away from it as h falls, is not one. Intervals hold
    for differences of that kind; no number of step sizes shows what happens below the smallest.
    Integrators run twice, the second time with ten times their tolerance, and differences below
    the change are not read.

    A weak order holds for all test functions, so the order of the pair is the smallest over all of
    them, and an observable with a larger slope is one whose leading coefficient vanishes or nearly
    so. To find such cases up to 32 weights are always watched beside the observables; where they
    show a smaller order than these, the row of one is added.

    **Arguments:**

    - `problem`, `net`: what both act on and start from.
    - `first`, `second`: each a dynamics, taken at every step size h (one without a step size does
        not depend on h and runs once), or a function that makes one from h.
    - `step_sizes`: three or more; rounded so that they divide `t1`.
    - `t1`: flow time at which the dynamics are compared.
    - `observables`: as in `simulate`; "weights" means all entries. Default: weights for the strong
        distance, imbalance and end-to-end matrix for the weak one.
    - `kind`: "weak" or "strong".
    - `replicas`: pairs of paths at every step size; 4096 by default.
    - `key`: needed if one of the dynamics is random. Every step size has noise of its own.
    - `times`: flow times, multiples of every step size; the largest difference over them counts (at
        the time where it stands out most, for weak ones). Default: `t1`.
    - `confidence`: of the interval of each order.
    - `progress`: as in `simulate`.

    **Returns:** `Orders`; `str()` of it is a table. After Ctrl-C it holds the step sizes
    that were done, with `interrupted=True`; before there is one, `KeyboardInterrupt` is raised.

    **Raises:** `ValueError` or `TypeError` for bad input; a strong distance without common noise.
    """
    if not isinstance(net, DeepLinear):
        raise TypeError(f"net must be a DeepLinear; got {type(net).__name__}.")
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be 'strong' or 'weak'; got {kind!r}.")
    check_confidence(confidence)
    compared_at = _compared_at(t1, times)
    h, notes = _dividing(step_sizes, t1, compared_at)
    asked = _resolve(observables, kind)
    pairs = [_coupled(problem, net, first, second, float(step), kind) for step in h]
    _check_pairs(pairs, h, compared_at)
    if differ_in_momentum((pairs[0].first, pairs[0].second)):
        notes.append(
            "momenta differ, and the dynamics are compared at equal flow time h k; they keep pace "
            "in effective time h k / (1 - momentum), in which gradflow.compare compares them"
        )
    random = any(pairs[0].random)
    if random and key is None:
        raise ValueError("key: this measurement is random; pass key=jax.random.key(seed).")
    if replicas is not None and (not isinstance(replicas, int) or replicas < 2):
        raise ValueError(f"replicas must be an integer >= 2 or None; got {replicas!r}.")
    watched = asked if kind == "strong" or WEIGHTS in asked else (*asked, SAMPLED_WEIGHTS)
    paired_runs = PairedRuns(
        problem, net, watched, kind, compared_at, REPLICAS if replicas is None else replicas, key
    )
    report = _reporter(progress)
    try:
        seen, stopped = paired_runs.measure(h, pairs, report)
    finally:
        if isinstance(report, ProgressBar):
            report.close()
    if not seen:
        raise KeyboardInterrupt
    if stopped:
        text = f"stopped after {len(seen)} of {h.size} step sizes; what was done is returned."
        warnings.warn(text, InterruptedWarning, stacklevel=2)
        notes.append(text)
    lost = [f"{m.diverged} of {m.count} at h = {s:.4g}" for s, m in zip(h, seen, strict=False)]
    lost = [text for text, m in zip(lost, seen, strict=True) if m.diverged]
    if lost:
        notes.append(f"diverged, and left out of the fits: {', '.join(lost)}")
    # Paths under noise differ by powers of the square root of h, all else by powers of h.
    spacing = 0.5 if kind == "strong" and random else 1.0
    measured = _fits(h[: len(seen)], seen, kind, random, confidence, spacing)
    rows, points, overall = _judge(measured, [o.name for o in asked], confidence, spacing)
    return Orders(
        rows,
        points,
        overall,
        label(pairs[0].first),
        label(pairs[0].second),
        kind,
        random,
        pairs[0].description,
        tuple(map(float, compared_at)),
        confidence,
        tuple(notes),
        stopped,
    )


# From differences to orders


@dataclass(frozen=True)
class _Candidate:
    """One component of one observable with its fit."""

    observable: str
    points: OrderPoints
    fit: OrderFit


def _fits(
    h: Float[np.ndarray, " point"],
    steps: Sequence[StepResult],
    kind: Kind,
    random: bool,
    confidence: float,
    spacing: float,
) -> list[_Candidate]:
    """A fit of every component of every observable."""
    fits = []
    for name in steps[0].observables:
        parts = [s.observables[name] for s in steps]
        error = np.stack([p.error for p in parts])
        spread = np.stack([p.standard_error for p in parts])
        resolution = np.array(
            [
                max(TOLERANCES * (s.tolerance[0] * p.scale + s.tolerance[1]), p.integration)
                + ROUNDING * p.precision * p.scale
                for s, p in zip(steps, parts, strict=True)
            ]
        )
        for c, part in enumerate(parts[0].names):
            e, s = _at_largest(error[:, :, c], spread[:, :, c], kind == "weak" and random)
            e = np.where([step.diverged > 0 for step in steps], math.nan, e)
            fit = fit_order(h, e, s, resolution, confidence, spacing)
            points = OrderPoints(
                observable=part
                if name in (WEIGHTS.name, SAMPLED_WEIGHTS.name) and part
                else name + part,
                long_name=parts[0].long_name,
                units=parts[0].units,
                step_size=h,
                error=e,
                standard_error=s,
                resolution=resolution,
                replicas=np.array([step.count - step.diverged for step in steps]),
                diverged=np.array([step.diverged for step in steps]),
                seen=fit.seen,
                used=fit.used,
            )
            fits.append(_Candidate(name, points, fit))
    return fits


def _at_largest(
    error: Float[np.ndarray, "point time"], spread: Float[np.ndarray, "point time"], noisy: bool
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """The difference at the time where it is largest.

    A largest value over noise is not the largest of the differences: noisy ones are all taken at
    the time that stands out most at the largest step size that has any.
    """
    if error.shape[1] == 1:
        return error[:, 0], spread[:, 0]
    size = np.where(np.isfinite(error), np.abs(error), -1.0)
    if not noisy:
        best = size.argmax(axis=1)
        rows = np.arange(len(error))
        return np.abs(error[rows, best]), spread[rows, best]
    finite = np.flatnonzero(np.isfinite(error).all(axis=1))
    if finite.size == 0:
        return error[:, -1], spread[:, -1]
    first = finite[0]
    best = int(np.argmax(size[first] / np.where(spread[first] > 0.0, spread[first], np.inf)))
    return error[:, best], spread[:, best]


def _judge(
    candidates: Sequence[_Candidate], asked: Sequence[str], confidence: float, spacing: float
) -> tuple[tuple[OrderRow, ...], tuple[OrderPoints, ...], OrderRow | None]:
    """Rows, with slopes above the order of the pair taken back; the row that sets it.

    None sets it where an observable that was asked for is not asymptotic, unless it is the smallest
    of the possible orders.
    """
    resolved = [c for c in candidates if c.fit.status == RESOLVED]
    best = _smallest([c for c in resolved if c.observable in asked])
    witness = _smallest([c for c in resolved if c.observable not in asked])
    if witness is not None and (best is None or _above(best.fit, witness.fit)):
        best = witness
    drifting = [c for c in candidates if c.observable in asked and c.fit.status == DRIFTING]
    if best is not None and drifting and best.fit.order > 1.5 * spacing:
        best = None  # what is asked for may be on its way to a smaller order
    chosen = []
    for one in candidates:
        if one.observable not in asked and one is not best:
            continue
        fit = one.fit
        if best is not None and _above(fit, best.fit):
            reason = (
                f"the leading coefficient nearly vanishes: the slope is {fit.order:.3g}, but the "
                f"dynamics differ to order {best.fit.order:.3g} in {best.points.observable}; do "
                "not read an order"
            )
            fit = replace(
                fit,
                status=DRIFTING,
                order=math.nan,
                low=math.nan,
                high=math.nan,
                asymptotic_range=None,
                used=np.zeros_like(fit.used),
                reason=reason,
            )
        chosen.append((one, fit))
    made = [(_row(one, fit, confidence), one, fit) for one, fit in chosen]
    overall = next((row for row, one, _ in made if one is best), None)
    points = tuple(replace(one.points, used=fit.used) for _, one, fit in made)
    return tuple(row for row, _, _ in made), points, overall


def _smallest(resolved: Sequence[_Candidate]) -> _Candidate | None:
    """The smallest order: of all that cannot be told from it, the best known one."""
    if not resolved:
        return None
    least = min(resolved, key=lambda c: c.fit.order)
    close = [c for c in resolved if not _above(c.fit, least.fit)]
    return min(close, key=lambda c: c.fit.high - c.fit.low)


def _above(fit: OrderFit, other: OrderFit) -> bool:
    """Whether an order is larger than another one beyond doubt."""
    return fit.low > other.high and fit.order > other.order + APART


def _row(one: _Candidate, fit: OrderFit, confidence: float) -> OrderRow:
    needed = None
    if fit.replicas_factor is not None:
        needed = math.ceil(fit.replicas_factor * int(one.points.replicas.max()))
    return OrderRow(
        observable=one.points.observable,
        order=fit.order,
        low=fit.low,
        high=fit.high,
        confidence=confidence,
        status=fit.status,
        asymptotic_range=fit.asymptotic_range,
        reason=fit.reason,
        replicas_needed=needed,
    )


# What is asked for


def _compared_at(t1: float, times: Sequence[float] | None) -> Float[np.ndarray, " time"]:
    """The flow times at which the dynamics are compared."""
    if not (isinstance(t1, Real) and math.isfinite(t1) and t1 > 0.0):
        raise ValueError(f"t1 must be a finite flow time > 0; got {t1!r}.")
    if times is None:
        return np.array([float(t1)])
    compared_at = np.unique(np.asarray(times, dtype=float).reshape(-1))
    if compared_at.size == 0 or not (
        compared_at[0] > 0.0 and compared_at[-1] <= t1 * (1.0 + MISSED)
    ):
        raise ValueError(f"times must be flow times > 0 and <= t1 = {t1:g}; got {times!r}.")
    return compared_at


def _dividing(
    step_sizes: Sequence[float], t1: float, compared_at: Float[np.ndarray, " time"]
) -> tuple[Float[np.ndarray, " point"], list[str]]:
    """The step sizes, largest first, rounded so that they divide `t1`; and what was rounded."""
    wanted = np.asarray(list(step_sizes), dtype=float).reshape(-1)
    if not (np.isfinite(wanted).all() and np.all(wanted > 0.0)):
        raise ValueError(f"step_sizes must be finite numbers > 0; got {step_sizes!r}.")
    counts = np.maximum(np.round(t1 / wanted), 1.0)
    h = t1 / counts
    moved = [
        f"{a:.6g} became {b:.6g}"
        for a, b in zip(wanted, h, strict=True)
        if abs(a / b - 1.0) > MISSED
    ]
    notes = [f"step sizes that do not divide t1 = {t1:g}: {', '.join(moved)}"] if moved else []
    h = t1 / np.unique(counts)
    if h.size < FEWEST:
        raise ValueError(
            f"step_sizes: an order needs {FEWEST} different ones that divide t1 = {t1:g}; got "
            f"{', '.join(f'{x:g}' for x in h)}. Halve the smallest, for example."
        )
    for step, time in product(h, compared_at):
        if abs(round(time / step) - time / step) > MISSED * time / step:
            raise ValueError(
                f"times: t = {time:g} is no multiple of the step size {step:.6g}; choose times "
                "that are multiples of all step sizes."
            )
    return h, notes


def _resolve(spec: ObservableSpec | None, kind: Kind) -> tuple[Observable, ...]:
    """The observables asked for; "weights" are all entries of the network."""
    if spec is None:
        return (WEIGHTS,) if kind == "strong" else resolve(("imbalance", "end_to_end"))
    if isinstance(spec, Mapping):
        plain = {name: f for name, f in spec.items() if name != WEIGHTS.name or f is not None}
        return (*(resolve(plain) if plain else ()), *([WEIGHTS] if len(plain) < len(spec) else []))
    if isinstance(spec, str):
        spec = (spec,)
    return resolve([WEIGHTS if item == WEIGHTS.name else item for item in spec])


def _coupled(
    problem: Problem,
    net: DeepLinear,
    first: DynamicsOfStep,
    second: DynamicsOfStep,
    step: float,
    kind: Kind,
) -> Coupling:
    """Both dynamics at one step size."""
    made = [at_step_size(d, step, n) for d, n in ((first, "first"), (second, "second"))]
    found = couple(problem, net.widths, made[0], made[1])
    if kind == "strong" and not found.paired:
        raise ValueError(
            f"kind='strong': {label(found.first)} and {label(found.second)} share no noise "
            f"({found.description}), so there is no distance path by path; use kind='weak', or "
            "noise that both can follow (LabelNoise on the full batch, GradientNoise)."
        )
    return found


def _check_pairs(
    pairs: Sequence[Coupling],
    h: Float[np.ndarray, " point"],
    compared_at: Float[np.ndarray, " time"],
) -> None:
    """Raise unless the pairs depend on h and reach the times asked for."""
    fixed = [
        all(d.step_size is None and d is members[0] for d in members)
        for members in ([p.first for p in pairs], [p.second for p in pairs])
    ]
    if all(fixed):
        raise ValueError(
            f"first, second: neither {label(pairs[0].first)} nor {label(pairs[0].second)} has a "
            "step size, so nothing depends on h; give a function of the step size."
        )
    for pair, step in zip(pairs, h, strict=True):
        for one in (pair.first, pair.second):
            if one.step_size is None or one.ticks_per_step is None:
                continue
            own = float(one.step_size)
            counts = compared_at / own
            if np.any(np.abs(np.round(counts) - counts) > MISSED * counts):
                raise ValueError(
                    f"step_sizes: {label(one)} at h = {step:.6g} takes steps of {own:.6g}, which "
                    "do not divide the flow times asked for."
                )


def _reporter(progress: bool | Report | None) -> Report | None:
    """A bar on long measurements at a terminal (None), always (True), never (False)."""
    if progress is None:
        return automatic("orders")
    if isinstance(progress, bool):
        return ProgressBar("orders", patience=0.0) if progress else None
    return progress
