"""Do two random ways to train end in the same distribution?"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Float
from scipy import stats

from gradflow.dynamics.base import AbstractDynamics
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.results.trajectory import Trajectory
from gradflow.simulation.divergence import no_diverged_warning
from gradflow.simulation.simulate import simulate
from gradflow.testing.running import checked_problem, entry_name, key_of
from gradflow.testing.showing import message, show_network, show_problem, show_subject

Sample: TypeAlias = Any
"""Replicas `(R, ...)`, a `Trajectory` with replicas, or a dynamics."""

POWER = 0.9
"""Probability with which the stated smallest difference is found."""

FEWEST = 20
"""Replicas below which standard errors and quantiles mean little."""


@dataclass(frozen=True)
class Match:
    """What a comparison of two samples could see.

    - `tests`: how many means, covariances and distributions were compared.
    - `threshold`: standard errors at which a single difference is called real.
    - `false_alarm`: the probability of one or more false alarms among all tests.
    - `detectable`: by component, the difference of means found with probability 0.9.
    - `worst`: the largest difference of a mean or covariance, in standard errors, and its name.
    """

    tests: int
    threshold: float
    false_alarm: float
    detectable: dict[str, float]
    worst: tuple[str, float]


@dataclass(frozen=True)
class _Finding:
    name: str
    first: float
    second: float
    error: float
    size: float  # in units of what is allowed


def assert_matches_in_distribution(
    first: Sample,
    second: Sample,
    *,
    problem: Problem | None = None,
    net: DeepLinear | None = None,
    t1: float | None = None,
    observable: str | Callable[[DeepLinear], Any] | None = None,
    replicas: int = 256,
    seed: int = 0,
    false_alarm: float = 1e-3,
) -> Match:
    r"""Assert that two samples have the same means, covariances and distribution functions.

    Means and covariances may differ by $k$ standard errors, and each component's two-sample
    Kolmogorov-Smirnov test must not reject; $k$ and its level share `false_alarm` evenly among
    all these tests (Bonferroni). Standard errors come from the spread between replicas, which
    must be independent of each other, also between the two samples.

    **Arguments:**

    - `first`, `second`: arrays of replicas `(R, ...)`; trajectories with replicas, taken at their
        last time; or dynamics, which are run on `problem` from `net` to flow time `t1` with
        `replicas` replicas and random keys of their own.
    - `observable`: for trajectories and dynamics, the name of an observable; for dynamics also a
        function of a network that gives an array. By default all weights.
    - `replicas`, `seed`: for dynamics.
    - `false_alarm`: the probability that two samples of one distribution are told apart.

    **Returns:** a `Match` that says how small a difference of means would have been seen.

    **Raises:** `AssertionError` that lists the worst differences, with standard errors and the
    smallest difference that would be found; `ValueError` for samples that cannot be compared.
    """
    if not 0.0 < false_alarm < 1.0:
        raise ValueError(f"false_alarm must be a probability in (0, 1); got {false_alarm}.")
    keys = jax.random.split(key_of(seed))
    a, names = _sample(first, "first", problem, net, t1, observable, replicas, keys[0])
    b, others = _sample(second, "second", problem, net, t1, observable, replicas, keys[1])
    if names != others:
        raise ValueError(
            f"first and second have {a.shape[1]} and {b.shape[1]} components; compare samples of "
            "the same quantity."
        )
    m = len(names)
    tests = 2 * m + m * (m + 1) // 2
    level = false_alarm / tests
    degrees = min(len(a), len(b)) - 1
    threshold = float(stats.t.isf(level / 2, degrees))
    mean_errors = np.hypot(_mean_errors(a), _mean_errors(b))
    findings = _means(a, b, names, mean_errors, threshold)
    findings += _covariances(a, b, names, threshold)
    furthest = max(findings, key=lambda f: f.size)
    findings += _distributions(a, b, names, level)
    power = threshold + float(stats.norm.ppf(POWER))
    detectable = {name: power * float(e) for name, e in zip(names, mean_errors, strict=True)}
    found = sorted((f for f in findings if f.size > 1.0), key=lambda f: -f.size)
    if not found:
        worst = (furthest.name, furthest.size * threshold)
        return Match(tests, threshold, false_alarm, detectable, worst)
    rows = [
        f"  {f.name}: {f.first:.6g} and {f.second:.6g}"
        + (
            f", {abs(f.first - f.second) / f.error:.1f} standard errors of {f.error:.2g}"
            if f.error > 0
            else ""
        )
        for f in found[:6]
    ]
    more = f"  and {len(found) - 6} more" if len(found) > 6 else ""
    seen = max(detectable, key=lambda name: detectable[name])
    raise AssertionError(
        message(
            f"{_label(first)} ({len(a)} replicas) and {_label(second)} ({len(b)} replicas) differ "
            f"in {len(found)} of {tests} tests:",
            *rows,
            more,
            f"allowed: {threshold:.2f} standard errors, and probability {level:.2g} of a "
            f"distribution function (false alarms: {false_alarm:g} over all tests)",
            f"power: a difference of means of {detectable[seen]:.3g} in {seen} (less in the "
            f"others) is found with probability {POWER:g}",
            "" if net is None else show_network(net),
            show_problem(problem),
        )
    )


def _label(sample: Sample) -> str:
    if isinstance(sample, AbstractDynamics):
        return show_subject(sample)
    return repr(sample) if isinstance(sample, Trajectory) else "a sample"


def _sample(
    sample: Sample,
    role: str,
    problem: Problem | None,
    net: DeepLinear | None,
    t1: float | None,
    observable: str | Callable[[DeepLinear], Any] | None,
    replicas: int,
    key: jax.Array,
) -> tuple[Float[np.ndarray, "replicas components"], list[str]]:
    """Replicas of every component, and the names of the components."""
    if isinstance(sample, AbstractDynamics):
        if net is None or t1 is None:
            raise ValueError(f"{role}: a dynamics is run from a network; give net= and t1=.")
        with no_diverged_warning():
            sample = simulate(
                checked_problem(problem, type(sample).__name__),
                net,
                sample,
                t1=t1,
                replicas=replicas,
                key=key,
                save=2,
                observables=_observables(observable),
                store_weights=observable is None,
                progress=False,
            )
        observable = None if observable is None else _name_of(observable)
    if isinstance(sample, Trajectory):
        return _of_trajectory(sample, role, observable)
    values = np.asarray(sample, dtype=float)
    if values.ndim == 0 or len(values) < FEWEST:
        raise ValueError(
            f"{role} must have replicas along its first axis, {FEWEST} or more; got shape "
            f"{values.shape}."
        )
    return _flattened(values, role, "component")


def _observables(observable: str | Callable[[DeepLinear], Any] | None) -> Any:
    if observable is None:
        return []
    if isinstance(observable, str):
        return [observable]
    return {_name_of(observable): _of_network_and_problem(observable)}


@functools.lru_cache(maxsize=64)  # one wrapper a function, so that a second run does not recompile
def _of_network_and_problem(
    observable: Callable[[DeepLinear], Any],
) -> Callable[[DeepLinear, Problem], Any]:
    return lambda net, problem: observable(net)


def _name_of(observable: str | Callable[[DeepLinear], Any]) -> str:
    return observable if isinstance(observable, str) else "observed"


def _of_trajectory(
    run: Trajectory, role: str, observable: Any
) -> tuple[Float[np.ndarray, "replicas components"], list[str]]:
    if run.replicas is None or run.replicas < FEWEST:
        raise ValueError(
            f"{role}: the trajectory has {run.replicas or 'no'} replicas; simulate at least "
            f"{FEWEST} of them."
        )
    if run.diverged.any():
        raise ValueError(
            f"{role}: {int(run.diverged.sum())} of {run.replicas} replicas diverged; use a smaller "
            "step size or less noise."
        )
    if run.incomplete.any():
        raise ValueError(
            f"{role}: {int(run.incomplete.sum())} of {run.replicas} replicas are incomplete; see "
            "the warning of simulate, or make the run shorter."
        )
    if run.normals.antithetic:
        raise ValueError(
            f"{role}: the replicas of the trajectory are antithetic pairs, which are not "
            "independent; simulate without, or give one of each pair as an array, run[name][::2]."
        )
    if observable is None:
        parts = [_flattened(w[:, -1], role, f"W_{i}") for i, w in enumerate(run.weights, start=1)]
        return np.concatenate([v for v, _ in parts], axis=1), [n for _, ns in parts for n in ns]
    if not isinstance(observable, str):
        raise TypeError(f"observable: for a trajectory give a recorded name; got {observable!r}.")
    return _flattened(np.asarray(run[observable], dtype=float)[:, -1], role, observable)


def _flattened(
    values: np.ndarray, role: str, name: str
) -> tuple[Float[np.ndarray, "replicas components"], list[str]]:
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{role}: {int(np.sum(~np.isfinite(values)))} values are not finite.")
    names = [entry_name(name, index) for index in np.ndindex(values.shape[1:])]
    return values.reshape(len(values), -1), names


def _mean_errors(values: Float[np.ndarray, "replicas components"]) -> np.ndarray:
    return np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def _means(
    a: np.ndarray, b: np.ndarray, names: list[str], errors: np.ndarray, threshold: float
) -> list[_Finding]:
    rounding = 1e-12 * (1.0 + np.abs(a).max(axis=0))
    return [
        _finding(f"mean of {name}", x, y, e, threshold, floor)
        for name, x, y, e, floor in zip(
            names, a.mean(axis=0), b.mean(axis=0), errors, rounding, strict=True
        )
    ]


def _covariances(
    a: np.ndarray, b: np.ndarray, names: list[str], threshold: float
) -> list[_Finding]:
    """Every covariance, in units that make all components of size one."""
    scale = np.sqrt(0.5 * (a.var(axis=0) + b.var(axis=0)))
    unit = np.where(scale > 0, scale, 1.0)
    moments = []
    for values in (a, b):
        centred = (values - values.mean(axis=0)) / unit
        products = centred[:, :, None] * centred[:, None, :]
        moments.append((products.mean(axis=0), products.std(axis=0) / math.sqrt(len(values))))
    (x, x_error), (y, y_error) = moments
    found = []
    for i, name in enumerate(names):
        for j in range(i, len(names)):
            label = f"variance of {name}" if i == j else f"covariance of {name} and {names[j]}"
            size = unit[i] * unit[j]
            error = math.hypot(x_error[i, j], y_error[i, j]) * size
            found.append(
                _finding(label, x[i, j] * size, y[i, j] * size, error, threshold, 1e-12 * size)
            )
    return found


def _distributions(a: np.ndarray, b: np.ndarray, names: list[str], level: float) -> list[_Finding]:
    found = []
    for name, x, y in zip(names, a.T, b.T, strict=True):
        test = stats.ks_2samp(x, y, method="asymp")
        at = float(getattr(test, "statistic_location"))  # noqa: B009  untyped in SciPy
        p_value = float(getattr(test, "pvalue"))  # noqa: B009
        low, high = (float(np.mean(values <= at)) for values in (x, y))
        size = math.log(max(p_value, 1e-300)) / math.log(level)
        found.append(_Finding(f"fraction of {name} up to {at:.6g}", low, high, 0.0, size))
    return found


def _finding(
    name: str, first: float, second: float, error: float, threshold: float, floor: float
) -> _Finding:
    """A difference in units of what is allowed."""
    allowed = max(threshold * float(error), float(floor))
    size = abs(float(first) - float(second)) / allowed
    return _Finding(name, float(first), float(second), float(error), size)
