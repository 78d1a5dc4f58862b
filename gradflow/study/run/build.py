"""From a validated spec to what `simulate` takes: data, network, problem, dynamics."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path as FilePath

import jax
import numpy as np

from gradflow import init
from gradflow.analysis.convergence.coupling import at_step_size, couple
from gradflow.analysis.convergence.fit import FEWEST
from gradflow.backend.types import Weights
from gradflow.checks import check_fit
from gradflow.data import Regression
from gradflow.dynamics import AbstractDynamics, SlowFlow
from gradflow.dynamics.normals import check_normals, check_pairs
from gradflow.network import DeepLinear
from gradflow.observables import resolve
from gradflow.problem import Problem
from gradflow.random.streams import Normals
from gradflow.study.spec.errors import Fault
from gradflow.study.spec.load import Study
from gradflow.study.spec.locate import Path
from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.run_tables import NormalsSpec, RunSpec
from gradflow.study.spec.spec import StudySpec
from gradflow.study.spec.tables import (
    BalancedInit,
    DataSpec,
    FileData,
    GaussianInit,
    GivenWeights,
    MomentsData,
    NetworkSpec,
    OrthogonalInit,
    SklearnData,
    UnbalancedInit,
    WhitenedData,
)


@dataclass(frozen=True)
class PreparedRun:
    """One run, ready to be simulated."""

    spec: RunSpec
    problem: Problem
    network: DeepLinear
    dynamics: AbstractDynamics
    normals: Normals | None
    key: jax.Array
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the observables at one time of one path."""


@dataclass(frozen=True)
class PreparedOrders:
    """One [[orders]] table, ready to be measured."""

    spec: OrdersSpec
    problem: Problem
    network: DeepLinear
    first: AbstractDynamics
    second: AbstractDynamics
    key: jax.Array


@dataclass(frozen=True)
class Prepared:
    """Everything a study carries out, in the order of the spec."""

    runs: tuple[PreparedRun, ...]
    orders: tuple[PreparedOrders, ...]


def prepare(study: Study) -> Prepared:
    """Build everything a study needs, before anything is integrated.

    **Raises:** `SpecError` with the line of every table that cannot be built.
    """
    building = _Building(study)
    runs = [building.run(run, ("run", i)) for i, run in enumerate(study.spec.run)]
    orders = [building.orders(o, ("orders", i)) for i, o in enumerate(study.spec.orders)]
    prepared = Prepared(
        tuple(run for run in runs if run is not None), tuple(o for o in orders if o is not None)
    )
    shapes = {run.spec.name: run.shapes for run in prepared.runs}
    tables = [(("claim", i), claim) for i, claim in enumerate(study.spec.claim)]
    tables += [(("figure", i), figure) for i, figure in enumerate(study.spec.figure)]
    misfits = (fault for at, table in tables for fault in table.shape_faults(shapes, at))
    faults = [*building.faults, *misfits]
    if faults:
        raise study.error(faults)
    return prepared


class _Building:
    """Builds tables and remembers what was wrong, and where."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.faults: list[Fault] = []
        self.place: Path = ()

    def run(self, run: RunSpec, at: Path) -> PreparedRun | None:
        """A run, or None and a fault."""
        try:
            problem, network = self._problem(run, at)
            self.place = (*at, "dynamics")
            dynamics = run.dynamics.made
            self.place = (*at, "replicas")
            _check_replicas(run, problem, dynamics)
            self.place = (*at, "normals")
            normals = build_normals(run.normals)
            check_normals(normals, dynamics, problem, network.widths)
            check_pairs(normals, run.replicas)
            self.place = (*at, "observables")
            shapes = observable_shapes(run, problem, network, dynamics)
        except (ValueError, TypeError, OSError) as error:
            self.faults.append(Fault(self.place, str(error)))
            return None
        key = run_key(self.study.spec, run)
        return PreparedRun(run, problem, network, dynamics, normals, key, shapes)

    def orders(self, orders: OrdersSpec, at: Path) -> PreparedOrders | None:
        """An [[orders]] table, or None and a fault."""
        try:
            problem, network = self._problem(orders, at)
            self.place = (*at, "first")
            first = orders.first.made
            self.place = (*at, "second")
            second = orders.second.made
            self.place = at
            if orders.replicas is None and any(d.is_random(problem) for d in (first, second)):
                raise ValueError("compares random dynamics; give replicas, such as 10000")
            self.place = (*at, "step_sizes")
            steps = _dividing(orders)
            self.place = (*at, "distance")
            if orders.distance == "strong":
                _check_common_noise(problem, network, first, second, steps)
        except (ValueError, TypeError, OSError) as error:
            self.faults.append(Fault(self.place, str(error)))
            return None
        key = run_key(self.study.spec, orders)
        return PreparedOrders(orders, problem, network, first, second, key)

    def _problem(self, table: RunSpec | OrdersSpec, at: Path) -> tuple[Problem, DeepLinear]:
        spec = self.study.spec
        self.place = _data_place(table, at)
        data = build_data(spec.data_of(table), self.study.path.parent)
        self.place = _network_place(table, at)
        network = build_network(spec.network_of(table))
        check_fit("widths", network.widths, data.d_in, data.d_out)
        self.place = (*at, "regularizers")
        regularizers = [item.made for item in table.regularizers]
        problem = Problem(data, regularizers=regularizers)
        if regularizers:
            jax.eval_shape(problem.averaged_loss, network.weights)  # raises if one does not fit
        return problem, network


def build_data(spec: DataSpec, folder: FilePath) -> Regression:
    """The regression data of a data table; files are looked up from `folder`."""
    match spec:
        case WhitenedData():
            return Regression.whitened(spec.target, n=spec.n, residual=spec.residual)
        case MomentsData():
            return Regression.from_moments(spec.sxx, spec.syx, spec.syy, n=spec.n)
        case FileData():
            options = spec.model_dump(exclude={"source", "path"})
            return Regression.from_file(folder / spec.path, **options)
        case SklearnData():
            options = spec.model_dump(exclude={"source", "name"})
            return Regression.from_sklearn(spec.name, **options)


def build_network(spec: NetworkSpec) -> DeepLinear:
    """The initial network of a network table."""
    match spec:
        case GivenWeights():
            return DeepLinear([np.asarray(matrix, dtype=float) for matrix in spec.weights])
        case GaussianInit():
            return init.gaussian(spec.widths, spec.scale, jax.random.key(spec.seed))
        case OrthogonalInit():
            return init.orthogonal(spec.widths, spec.scale, jax.random.key(spec.seed))
        case BalancedInit():
            start = spec.target if spec.target is not None else spec.scale or 1.0
            return init.balanced(start, spec.widths, _optional_key(spec.seed))
        case UnbalancedInit():
            return init.unbalanced(
                spec.widths,
                spec.imbalance,
                _optional_key(spec.seed),
                target=spec.target,
                scale=spec.scale,
                heavy=spec.heavy,
            )


def build_normals(spec: NormalsSpec | None) -> Normals | None:
    """What stands for the normals of a run.

    **Raises:** `ValueError` for options that contradict each other.
    """
    return None if spec is None else Normals(**dict(spec))


def observable_shapes(
    run: RunSpec, problem: Problem, network: DeepLinear, dynamics: AbstractDynamics
) -> dict[str, tuple[int, ...]]:
    """The shape of every observable of a run, found without computing it.

    **Raises:** `ValueError` for an observable that this dynamics does not have.
    """
    observables = resolve(run.observables)

    def evaluate(weights: Weights) -> dict[str, jax.Array]:
        net = DeepLinear(weights)
        return {o.name: o.evaluate(net, problem, dynamics) for o in observables}

    found = jax.eval_shape(evaluate, network.weights)
    return {name: tuple(value.shape) for name, value in found.items()}


def run_key(spec: StudySpec, run: RunSpec | OrdersSpec) -> jax.Array:
    """The random key of a run or an [[orders]] table.

    It depends on the study's seed and the run's name, not on its position, so adding a run changes
    no other; runs with equal seeds of their own share their noise.
    """
    if run.seed is not None:
        return jax.random.key(run.seed)
    return jax.random.fold_in(jax.random.key(spec.seed), zlib.crc32(run.name.encode()))


def _optional_key(seed: int | None) -> jax.Array | None:
    return None if seed is None else jax.random.key(seed)


def _data_place(run: RunSpec | OrdersSpec, at: Path) -> Path:
    if isinstance(run.data, str):
        return ("data",) if run.data == "default" else ("datasets", run.data)
    return (*at, "data")


def _network_place(run: RunSpec | OrdersSpec, at: Path) -> Path:
    if isinstance(run.network, str):
        return ("network",) if run.network == "default" else ("networks", run.network)
    return (*at, "network")


def _check_replicas(run: RunSpec, problem: Problem, dynamics: AbstractDynamics) -> None:
    if run.replicas is None or not isinstance(dynamics, SlowFlow) or dynamics.is_random(problem):
        return
    raise ValueError(
        f"got {run.replicas}; this SlowFlow is not random (no noise moves it along the manifold), "
        "so all of them would be the same; leave it out"
    )


def _dividing(orders: OrdersSpec) -> list[float]:
    """The step sizes rounded so that they divide the flow time."""
    counts = {max(round(orders.t1 / h), 1) for h in orders.step_sizes}
    steps = [orders.t1 / count for count in sorted(counts)]
    if len(steps) < FEWEST:
        rounded = ", ".join(f"{h:g}" for h in steps)
        raise ValueError(
            f"got {len(steps)} that divide t1 = {orders.t1:g} after rounding ({rounded}); an order "
            f"needs {FEWEST}"
        )
    return steps


def _check_common_noise(
    problem: Problem,
    network: DeepLinear,
    first: AbstractDynamics,
    second: AbstractDynamics,
    steps: list[float],
) -> None:
    for h in steps:
        pair = at_step_size(first, h, "first"), at_step_size(second, h, "second")
        shared = couple(problem, network.widths, *pair)
        if not shared.paired:
            names = " and ".join(type(one).__name__ for one in pair)
            raise ValueError(
                f'got "strong"; {names} share no noise ({shared.description}), so they have no '
                'distance path by path; give distance = "weak"'
            )
