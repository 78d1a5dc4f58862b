"""Pairs of runs at one step size after the other, and the differences of what they observe."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gradflow.analysis.convergence.controls import brownian_controls, controlled_mean
from gradflow.analysis.convergence.coupling import Coupling
from gradflow.analysis.statistics import recorded, survivors
from gradflow.dynamics.base import AbstractDynamics
from gradflow.network import DeepLinear
from gradflow.observables import Observable
from gradflow.problem import Problem
from gradflow.results.trajectory import Trajectory
from gradflow.simulation.divergence import DivergedWarning
from gradflow.simulation.progress import Report
from gradflow.simulation.simulate import InterruptedWarning, simulate

Kind: TypeAlias = Literal["strong", "weak"]

CHUNK = 8192
"""Paths held at once: more do not run faster on a processor."""

MOST_SAMPLED = 32
"""Most weights that are watched beside the observables, to find the order of the pair."""

TOLERANCES = 10.0
"""A solver's global error may be this many of its local tolerances."""

LOOSER = 10.0
"""Factor on the tolerances in the second run of an integrator, which shows its error."""

ROUNDING = 1e3
"""Rounding errors of a run, in units of the last place."""

MISSED = 1e-6
"""Relative error of a step size that divides the flow time."""


def _all_weights(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    return jnp.concatenate([w.ravel() for w in net.weights])


def _some_weights(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    return _all_weights(net, problem, dynamics)[:: _stride(net)]


def _stride(net: DeepLinear) -> int:
    return math.ceil(net.num_parameters / MOST_SAMPLED)


WEIGHTS = Observable("weights", "weights W", "weight", _all_weights)
SAMPLED_WEIGHTS = Observable("sampled_weights", "weights W", "weight", _some_weights)


@dataclass(frozen=True)
class Measured:
    """One observable at one step size; arrays `(time, component)`."""

    names: tuple[str, ...]
    long_name: str
    units: str
    error: Float[np.ndarray, "time component"]
    standard_error: Float[np.ndarray, "time component"]
    scale: float
    precision: float
    integration: float = 0.0
    """Largest change of the values when the tolerances of an integrator are loosened."""


@dataclass(frozen=True)
class StepResult:
    """All observables at one step size."""

    observables: Mapping[str, Measured]
    tolerance: tuple[float, float]
    count: int
    diverged: int


@dataclass(frozen=True)
class PairedRuns:
    """Runs pairs of dynamics and takes their differences."""

    problem: Problem
    net: DeepLinear
    observables: tuple[Observable, ...]
    kind: Kind
    compared_at: Float[np.ndarray, " time"]
    replicas: int
    key: Any

    def measure(
        self, h: Float[np.ndarray, " point"], pairs: Sequence[Coupling], report: Report | None
    ) -> tuple[list[StepResult], bool]:
        """The step sizes one after the other, largest first; and whether it was stopped."""
        work = np.concatenate([[0.0], np.cumsum(1.0 / h)]) / np.sum(1.0 / h)
        steps: list[StepResult] = []
        still: dict[int, tuple[Trajectory, Trajectory | None]] = {}
        try:
            for i, pair in enumerate(pairs):
                key = None if self.key is None else jax.random.fold_in(self.key, i)
                runs = []
                for member, dynamics in enumerate((pair.first, pair.second)):
                    share = (work[i], 0.5 * (work[i + 1] - work[i]))
                    begin = share[0] + member * share[1]
                    shown = _part(report, begin, share[1], f"h = {h[i]:.4g}")
                    both = still.get(member)
                    if both is None:
                        run = self._run(dynamics, pair, member, key, shown)
                        loose = _with_looser_tolerance(dynamics)
                        check = None
                        if loose is not None and not pair.random[member]:
                            check = self._run(loose, pair, member, key, False)
                        both = run, check
                    if dynamics.step_size is None and not pair.random[member]:
                        still[member] = both
                    runs.append(both)
                if report is not None:
                    report(float(work[i + 1]), 1.0, f"h = {h[i]:.4g}")
                (one, one_check), (two, two_check) = runs
                steps.append(self._compare(pair, (one, two), (one_check, two_check), key))
        except KeyboardInterrupt:
            return steps, True
        return steps, False

    def _run(
        self,
        dynamics: AbstractDynamics,
        pair: Coupling,
        member: int,
        key: Any,
        report: Report | bool,
    ) -> Trajectory:
        """One dynamics to the last time, with replicas if it is random."""
        random = pair.random[member]
        own = jax.random.fold_in(key, member) if random and not pair.paired else key
        with warnings.catch_warnings():
            for kind in (InterruptedWarning, DivergedWarning):
                warnings.simplefilter("ignore", kind)  # this measurement says it itself
            run = simulate(
                self.problem,
                self.net,
                dynamics,
                t1=float(self.compared_at[-1]),
                replicas=self.replicas if random else None,
                key=own if random else None,
                save=self.compared_at,
                observables=list(self.observables),
                store_weights=False,
                chunk=CHUNK,
                progress=report,
            )
        if run.interrupted:
            raise KeyboardInterrupt
        return run

    def _compare(
        self,
        pair: Coupling,
        runs: tuple[Trajectory, Trajectory],
        checks: tuple[Trajectory | None, Trajectory | None],
        key: Any,
    ) -> StepResult:
        """The differences of two runs at the times asked for.

        `checks` are the same runs with looser tolerances, whose distance bounds the error of the
        integrators from above.
        """
        one, two = runs
        at = [_places(run, self.compared_at) for run in (one, two)]
        kept = survivors(one) & survivors(two)
        controls = np.zeros((int(kept.sum()), 0))
        if self.kind == "weak" and any(pair.random) and pair.grid is not None:
            controls = brownian_controls(
                self.problem,
                self.net.widths,
                pair.grid,
                float(self.compared_at[-1]),
                key,
                self.replicas,
            )[kept]
        found = {}
        for observable in self.observables:
            values = [
                recorded(run, observable.name)[:, place]
                for run, place in zip((one, two), at, strict=True)
            ]
            integration = [
                float(np.max(np.abs(value - recorded(check, observable.name)[:, place])))
                for value, check, place in zip(values, checks, at, strict=True)
                if check is not None and not check.diverged.any()
            ]
            measured = self._difference(observable, one, values, kept, controls, any(pair.random))
            found[observable.name] = replace(measured, integration=max(integration, default=0.0))
        tolerance = [_tolerance(d) for d in (pair.first, pair.second)]
        return StepResult(
            found,
            (max(t[0] for t in tolerance), max(t[1] for t in tolerance)),
            kept.size,
            int(np.sum(~kept)),
        )

    def _difference(
        self,
        observable: Observable,
        run: Trajectory,
        values: Sequence[np.ndarray],
        kept: Bool[np.ndarray, " replica"],
        controls: Float[np.ndarray, "survivor control"],
        random: bool,
    ) -> Measured:
        """The strong or weak difference of one observable."""
        names = _component_names(observable, run, self.net)
        flat = [v.reshape(*v.shape[:2], -1).astype(float) for v in values]
        pieces = [np.broadcast_to(f, (kept.size, *f.shape[1:]))[kept] for f in flat]
        if not all(np.isfinite(p).all() for p in pieces):
            raise ValueError(
                f"observable {observable.name!r} is not finite on a path that did not diverge; it "
                "has no order"
            )
        scale = max((float(np.abs(p).max()) for p in pieces if p.size), default=0.0)
        difference = pieces[0] - pieces[1]
        count, times, components = difference.shape
        if self.kind == "strong":
            names, components = ("",), 1
        shape = (times, components)
        nothing = np.full(shape, math.nan), np.full(shape, math.nan)
        if count == 0 or (random and count < 2):
            error, spread = nothing
        elif self.kind == "strong":
            squared = np.sum(difference**2, axis=2, keepdims=True)
            error = np.sqrt(squared.mean(axis=0))
            spread = np.zeros(shape)
            if random:
                deviation = squared.std(axis=0, ddof=1) / math.sqrt(count)
                half = 0.5 * deviation / np.where(error > 0.0, error, 1.0)
                spread = np.where(error > 0.0, half, 0.0)
        elif random:
            mean, own = controlled_mean(difference.reshape(count, -1), controls)
            error, spread = mean.reshape(shape), own.reshape(shape)
        else:
            error, spread = difference[0], np.zeros(shape)
        eps = float(np.finfo(values[0].dtype).eps)
        return Measured(names, observable.long_name, observable.units, error, spread, scale, eps)


# Small parts


def _component_names(observable: Observable, run: Trajectory, net: DeepLinear) -> tuple[str, ...]:
    """Labels of the components of an observable; of weights their own names."""
    if observable in (WEIGHTS, SAMPLED_WEIGHTS):
        names = [
            f"W{i}[{row}, {column}]"
            for i, w in enumerate(net.weights, start=1)
            for row, column in np.ndindex(w.shape)
        ]
        return tuple(names[:: _stride(net)] if observable is SAMPLED_WEIGHTS else names)
    array = run.to_xarray()[observable.name]
    dims = [str(d) for d in array.dims if d not in ("replica", "time")]
    if math.prod(array.sizes[d] for d in dims) == 1:
        return ("",)
    axes = [[f"{d}={v}" for v in array[d].values] for d in dims]
    return tuple(f"[{', '.join(part)}]" for part in product(*axes))


def _places(run: Trajectory, compared_at: Float[np.ndarray, " time"]) -> np.ndarray:
    """Where the times asked for are among the saved ones."""
    saved = np.asarray(run.time, dtype=float)
    place = np.abs(saved[:, None] - compared_at).argmin(axis=0)
    if np.any(np.abs(saved[place] - compared_at) > MISSED * compared_at):
        raise ValueError(
            f"t1: {type(run.dynamics).__name__} does not stop at t = {compared_at[-1]:g} but at "
            f"t = {saved[-1]:g}; its steps must add up to the flow times asked for."
        )
    return place


def _with_looser_tolerance(dynamics: AbstractDynamics) -> AbstractDynamics | None:
    """An adaptive dynamics with ten times its tolerances; None for what has none."""
    if _tolerance(dynamics) == (0.0, 0.0):
        return None
    loose = [jnp.minimum(LOOSER * t, 0.5) for t in (dynamics.rtol, dynamics.atol)]  # pyright: ignore[reportAttributeAccessIssue]
    return eqx.tree_at(lambda d: (d.rtol, d.atol), dynamics, tuple(loose))


def _tolerance(dynamics: AbstractDynamics) -> tuple[float, float]:
    """Relative and absolute tolerance of an adaptive integrator, 0 for what has none."""
    if dynamics.ticks_per_step is not None:
        return 0.0, 0.0
    return float(getattr(dynamics, "rtol", 0.0)), float(getattr(dynamics, "atol", 0.0))


def _part(report: Report | None, begin: float, share: float, words: str) -> Report | bool:
    """A report of one run as a part of the whole."""
    if report is None:
        return False

    def part(done: float, total: float, message: str) -> None:
        report(begin + share * done / total, 1.0, f"{words}, {message}")

    return part


def label(dynamics: AbstractDynamics) -> str:
    """The kind of a dynamics, with the order it claims."""
    order = getattr(dynamics, "order", None)
    return type(dynamics).__name__ + ("" if order is None else f"(order={order})")
