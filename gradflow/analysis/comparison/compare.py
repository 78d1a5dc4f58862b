"""Lay dynamics side by side on one problem, at matched times."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from gradflow.analysis.afterwards import recorded_array
from gradflow.analysis.comparison.agreement import (
    DIFFER,
    UNDECIDED,
    Comparison,
    ComparisonRow,
    Verdict,
    decide,
    overall,
)
from gradflow.analysis.comparison.matched_times import (
    EFFECTIVE,
    FLOW,
    Clock,
    common_grid,
    match_times,
)
from gradflow.analysis.statistics import independent_samples, recorded
from gradflow.analysis.unmeasured import Unmeasured
from gradflow.checks import check_confidence
from gradflow.dynamics.base import AbstractDynamics
from gradflow.dynamics.effective_time import differ_in_momentum, momentum_of
from gradflow.network import DeepLinear
from gradflow.observables import ObservableSpec, resolve
from gradflow.problem import Problem
from gradflow.random.antithetic import IndependentSamples
from gradflow.results.trajectory import Trajectory
from gradflow.simulation.divergence import no_diverged_warning
from gradflow.simulation.simulate import simulate

NEGLIGIBLE = 1e-3
"""A mean below this fraction of its largest in the run is compared with that fraction."""


def compare(
    problem: Problem,
    net: DeepLinear,
    dynamics: Sequence[AbstractDynamics] | Mapping[str, AbstractDynamics],
    *,
    t1: float,
    replicas: int | None = None,
    key: PRNGKeyArray | None = None,
    save: int = 11,
    observables: ObservableSpec = ("loss", "imbalance"),
    tolerance: float = 0.05,
    confidence: float = 0.95,
    atol: float = 1e-12,
    progress: bool = False,
) -> Comparison:
    r"""Simulate every dynamics on one problem from one network and compare each with the first.

    Times are common multiples of all step sizes, as evenly spaced as these allow. Where momenta
    differ, times and step sizes are effective, $h k / (1 - \beta)$ and $h / (1 - \beta)$: so heavy
    ball stands beside an SDE of step size $h / (1 - \beta)$. Deterministic dynamics run one path,
    random ones `replicas` paths with keys of their own.

    **Arguments:**

    - `problem`, `net`: what every dynamics acts on and starts from.
    - `dynamics`: two or more, or a mapping from labels to them; the first is the reference.
    - `t1`: time of the last comparison (or the last common multiple before it), flow time or, if
      momenta differ, effective time.
    - `replicas`: of each random dynamics, and `key`, random: needed if there is one.
    - `save`: number of times from 0 to `t1`; fewer if the step sizes meet less often.
    - `observables`: names, or a mapping from names to functions of (network, problem), as for
      `simulate`.
    - `tolerance`, `confidence`, `atol`: as for `compare_trajectories`.
    - `progress`: show progress.

    **Returns:** a `Comparison`; `str()` of it is a table.

    **Raises:** `ValueError` if fewer than two dynamics are given, their grids do not meet, or one
    is random and replicas or key are missing.
    """
    labelled = dict(dynamics) if isinstance(dynamics, Mapping) else _label(dynamics)
    if len(labelled) < 2:
        raise ValueError(f"dynamics: a comparison needs two or more; got {len(labelled)}")
    noisy = [label for label, one in labelled.items() if one.is_random(problem)]
    for name, given, fix in (("replicas", replicas, "64"), ("key", key, "jax.random.key(0)")):
        if noisy and given is None:
            raise ValueError(
                f"{name}: {', '.join(noisy)} {_are(noisy)} random on this problem; give "
                f"{name}={fix}"
            )
    chosen = resolve(observables)
    clock = EFFECTIVE if differ_in_momentum(labelled.values()) else FLOW
    pace = {label: _pace(one, clock) for label, one in labelled.items()}
    steps = {label: h / pace[label] for label, h in _steps(labelled).items()}
    times = common_grid(steps, t1, save, clock)
    runs = {}
    for i, (label, one) in enumerate(labelled.items()):
        noise = None if key is None or label not in noisy else jax.random.fold_in(key, i)
        with no_diverged_warning():
            runs[label] = simulate(
                problem,
                net,
                one,
                t1=float(times[-1] * pace[label]),
                replicas=replicas if label in noisy else None,
                key=noise,
                save=times * pace[label],
                observables=chosen,
                store_weights=False,
                progress=progress,
            )
    names = [observable.name for observable in chosen]
    return compare_trajectories(runs, names, None, tolerance, confidence, atol)


def compare_trajectories(
    trajectories: Mapping[str, Trajectory],
    observables: Sequence[str],
    times: Sequence[float] | None = None,
    tolerance: float = 0.05,
    confidence: float = 0.95,
    atol: float = 1e-12,
) -> Comparison:
    r"""Compare every trajectory with the first, observable by observable, at matched times.

    Two one-sided Welch tests a row, with $\Delta$ the difference of the means, $s$ its standard
    error, $q$ a Student-t quantile and $c$ = tolerance x scale: "agree" if $|\Delta| + q s \le c$,
    "differ" if $|\Delta| - q s > c$, otherwise "not enough replicas". The level is shared between
    all tests (Bonferroni), so that all verdicts hold together with the stated confidence. Two
    deterministic paths have $s = 0$ and are compared by size alone.

    The scale of a row is the largest |mean| of the first trajectory over the components of the
    observable at that time, but at least 1e-3 of its largest over the run: what has decayed to
    nothing is compared with what it was.

    An observable agrees if all its rows agree and differs if one row differs. If the fractions of
    diverged replicas differ significantly (Fisher's exact test), every observable of the pair
    differs for that reason; means are over the other replicas. Arrays are compared component by
    component.

    **Arguments:**

    - `trajectories`: by label; the first is the reference. One of a random dynamics needs two or
      more replicas.
    - `observables`: names recorded in all of them.
    - `times`: saved in all; None if all have the same saved times. They are flow times, or, where
      momenta differ, effective times $h k / (1 - \beta)$.
    - `tolerance`: relative to the scale; `confidence`: of all verdicts together.
    - `atol`: a smaller difference counts as none, so that 0 and rounding agree.

    **Returns:** a `Comparison`.

    **Raises:** `ValueError` if times do not match (nothing is interpolated), an observable was not
    recorded, or a random dynamics comes with a single path.
    """
    check_confidence(confidence)
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive, for example 0.05; got {tolerance}")
    if len(trajectories) < 2:
        raise ValueError(f"a comparison needs two or more trajectories; got {len(trajectories)}")
    for label, run in trajectories.items():
        Trajectory.check(f"trajectories[{label!r}]", run)
    clock = EFFECTIVE if differ_in_momentum(r.dynamics for r in trajectories.values()) else FLOW
    saved = {
        label: np.asarray(run.time, dtype=float) / _pace(run.dynamics, clock)
        for label, run in trajectories.items()
    }
    index = match_times(saved, times, clock)
    first, *others = trajectories
    kept = {label: _kept(label, run) for label, run in trajectories.items()}
    for label in others:
        if not (kept[first].kept.any() or kept[label].kept.any()):
            raise ValueError(
                f"every replica of {first!r} and of {label!r} diverged: nothing is left to "
                "compare; use a smaller step size"
            )
    samples = {
        (label, name): _sample(label, run, name, kept[label])
        for (label, run), name in product(trajectories.items(), observables)
    }
    pairs = [
        _Pair(name, first, label, samples[first, name], samples[label, name])
        for label, name in product(others, observables)
    ]
    divergences = {label: _divergence(kept[first], kept[label]) for label in others}
    tests = sum(int(np.sum(pair.errors(index) > 0.0)) for pair in pairs)
    tests += sum(max(kept[first].kept.size, kept[label].kept.size) > 1 for label in others)
    level = (1.0 - confidence) / max(tests, 1)
    rows: list[ComparisonRow] = []
    verdicts: list[Verdict] = []
    for pair in pairs:
        lost, p = divergences[pair.second]
        found = pair.rows(saved[first][index[first]], index, tolerance, atol, level)
        rows += found
        if found and p > level:
            verdicts.append(overall(pair.observable, found, tolerance))
            continue
        why = (
            f"diverged: {lost[1]} of {lost[3]} replicas of {pair.second}, {lost[0]} of {lost[2]} "
            f"of {first}; Fisher exact p = {p:.2g}"
        )
        said = DIFFER if p <= level else UNDECIDED
        verdicts.append(Verdict(pair.observable, first, pair.second, said, why))
    return Comparison(
        tuple(rows),
        tuple(verdicts),
        tolerance,
        confidence,
        {label: int(samples.kept.sum()) for label, samples in kept.items()},
        {label: int(np.sum(~samples.kept)) for label, samples in kept.items()},
        {label: momentum_of(run.dynamics) for label, run in trajectories.items()}
        if clock == EFFECTIVE
        else {},
    )


@dataclass(frozen=True)
class _Sample:
    """Mean of one observable of one trajectory and its squared standard error.

    `independent` counts what the error is taken over.
    """

    names: tuple[str, ...]
    units: str
    mean: Float[np.ndarray, "time component"]
    squared_error: Float[np.ndarray, "time component"]
    replicas: int
    independent: int


@dataclass(frozen=True)
class _Pair:
    """One observable in two trajectories."""

    observable: str
    first: str
    second: str
    one: _Sample
    two: _Sample

    def errors(self, index: Mapping[str, Int[np.ndarray, " match"]]) -> np.ndarray:
        """Standard errors of the differences, `(match, component)`."""
        one = self.one.squared_error[index[self.first]]
        return np.sqrt(one + self.two.squared_error[index[self.second]])

    def rows(
        self,
        times: Float[np.ndarray, " match"],
        index: Mapping[str, Int[np.ndarray, " match"]],
        tolerance: float,
        atol: float,
        level: float,
    ) -> list[ComparisonRow]:
        """One row a matched time and component; none if a trajectory has no replica left."""
        if min(self.one.replicas, self.two.replicas) == 0:
            return []
        at, to = index[self.first], index[self.second]
        errors, degrees = self.errors(index), self._degrees(at, to)
        means, others = self.one.mean[at], self.two.mean[to]
        scales = self._scales(means)
        rows = []
        for i, c in product(range(len(times)), range(len(self.one.names))):
            difference, error = float(others[i, c] - means[i, c]), float(errors[i, c])
            limit = max(tolerance * scales[i], atol)
            replicas = max(self.one.replicas, self.two.replicas)
            decision = decide(difference, error, float(degrees[i, c]), limit, level, replicas)
            rows.append(
                ComparisonRow(
                    observable=self.observable + self.one.names[c],
                    units=self.one.units,
                    first=self.first,
                    second=self.second,
                    time=float(times[i]),
                    mean_first=float(means[i, c]),
                    mean_second=float(others[i, c]),
                    difference=difference,
                    standard_error=error,
                    sigmas=_ratio(difference, error),
                    relative=_ratio(difference, float(scales[i])),
                    verdict=decision.verdict,
                    replicas_needed=decision.replicas_needed,
                )
            )
        return rows

    def _scales(self, means: Float[np.ndarray, "match component"]) -> np.ndarray:
        largest = np.abs(self.one.mean).max()
        if largest == 0.0:
            return np.full(len(means), np.abs(self.two.mean).max())
        return np.maximum(np.abs(means).max(axis=1), NEGLIGIBLE * largest)

    def _degrees(
        self, at: Int[np.ndarray, " match"], to: Int[np.ndarray, " match"]
    ) -> Float[np.ndarray, "match component"]:
        """Degrees of freedom after Welch and Satterthwaite."""
        one, two = self.one.squared_error[at], self.two.squared_error[to]
        free = [max(sample.independent - 1, 1) for sample in (self.one, self.two)]
        spread = one**2 / free[0] + two**2 / free[1]
        known = np.isfinite(spread) & (spread > 0.0)
        return np.divide((one + two) ** 2, spread, out=np.ones_like(spread), where=known)


def _are(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _ratio(value: float, size: float) -> float:
    """Their quotient; 0/0 is 0."""
    if size > 0.0:
        return value / size
    return 0.0 if value == 0.0 else float(np.copysign(np.inf, value))


def _kept(label: str, run: Trajectory) -> IndependentSamples:
    """The replicas that did not diverge."""
    samples = independent_samples(run)
    if samples.kept.size < 2 and run.dynamics.is_random(run.problem):
        raise Unmeasured(
            f"trajectory {label!r} is a single path of a random dynamics, so its mean has no known "
            "error",
            python="simulate it with replicas=, 64 for a start",
            spec=f'give run "{label}" replicas = 64 for a start',
        )
    return samples


def _sample(label: str, run: Trajectory, observable: str, samples: IndependentSamples) -> _Sample:
    """Mean and squared standard error at every saved time, arrays flattened to components."""
    array = recorded_array(run, observable)
    values = recorded(run, observable)[samples.kept]
    if not np.isfinite(values).all():
        raise ValueError(
            f"observable {observable!r} of trajectory {label!r} is not finite on a replica that "
            "did not diverge; it cannot be compared"
        )
    dims = [str(d) for d in array.dims if d not in ("replica", "time")]
    axes = [[f"{d}={v}" for v in array[d].values] for d in dims]
    names = tuple(f"[{', '.join(part)}]" if part else "" for part in product(*axes))
    count, times = values.shape[:2]
    values = values.reshape(count, times, len(names)).astype(float)
    if count == 0:
        empty = np.zeros((times, len(names)))
        return _Sample(names, "", empty, empty, 0, 0)
    # Relative to one replica, so that equal replicas have a spread of exactly 0.
    start, values = values[0], values - values[0]
    if samples.count > 1:
        squared = samples.standard_error(values) ** 2
    else:
        squared = np.full(values.shape[1:], 0.0 if samples.kept.size == 1 else np.inf)
    measured_in = str(array.attrs.get("units", ""))
    mean = start + values.mean(axis=0)
    return _Sample(names, measured_in, mean, squared, count, samples.count)


def _divergence(
    one: IndependentSamples, two: IndependentSamples
) -> tuple[tuple[int, int, int, int], float]:
    """Diverged and all replicas of two runs, and the p-value of equal fractions (Fisher).

    A deterministic run would do the same every time, so it counts as often as the other one. Of
    antithetic replicas there are at least as many independent ones as there are pairs, so they
    count half.
    """
    first, second = one.kept, two.kept
    sizes = max(first.size, second.size)
    counts, totals = [], []
    for samples in (one, two):
        times = sizes if samples.kept.size == 1 else 1
        share = 0.5 if samples.antithetic else 1.0
        counts.append(round(share * int(np.sum(~samples.kept))) * times)
        totals.append(round(share * samples.kept.size) * times)
    if sizes == 1:
        p = 1.0 if counts[0] == counts[1] else 0.0
    else:
        from scipy import stats  # takes half a second to import

        table = [[c, n - c] for c, n in zip(counts, totals, strict=True)]
        test: Any = stats.fisher_exact(table)
        p = float(test.pvalue)
    lost = (int(np.sum(~first)), int(np.sum(~second)), first.size, second.size)
    return lost, p


def _label(dynamics: Sequence[AbstractDynamics]) -> dict[str, AbstractDynamics]:
    """Labels from the kind, then the step size, then the place in the list, as needed."""
    kinds = [type(one).__name__ for one in dynamics]
    names = []
    for kind, one in zip(kinds, dynamics, strict=True):
        step = "" if one.step_size is None else f"(step_size={float(one.step_size):g})"
        names.append(kind if kinds.count(kind) == 1 else kind + step)
    counts = Counter(names)
    unique = [n if counts[n] == 1 else f"{n} #{i + 1}" for i, n in enumerate(names)]
    return dict(zip(unique, dynamics, strict=True))


def _pace(dynamics: AbstractDynamics, clock: Clock) -> float:
    """Flow time per unit of a clock."""
    return 1.0 - momentum_of(dynamics) if clock == EFFECTIVE else 1.0


def _steps(dynamics: Mapping[str, AbstractDynamics]) -> dict[str, float]:
    """Step sizes of the dynamics that live on a grid."""
    return {
        label: float(one.step_size)
        for label, one in dynamics.items()
        if one.ticks_per_step is not None and one.step_size  # a schedule may begin at 0
    }
