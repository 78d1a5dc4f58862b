"""From a validated spec to what `simulate` takes: data, network, problem, dynamics."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

import jax
import numpy as np

from gradflow import init
from gradflow.data import Regression
from gradflow.dynamics import AbstractDynamics, GradientDescent, GradientFlow, StochasticFlow
from gradflow.network import DeepLinear
from gradflow.observables import resolve
from gradflow.problem import Problem
from gradflow.regularizers import InputNoise, LabelNoise, Minibatch, WeightDecay
from gradflow.study.faults import Fault
from gradflow.study.load import Study
from gradflow.study.locate import Path
from gradflow.study.quantities import QUANTITIES
from gradflow.study.spec import RunSpec, StudySpec, TimeSeries
from gradflow.study.tables import (
    BalancedInit,
    DataSpec,
    DynamicsSpec,
    FileData,
    GaussianInit,
    GivenWeights,
    MomentsData,
    NetworkSpec,
    OrthogonalInit,
    RegularizerSpec,
    SklearnData,
    UnbalancedInit,
    WhitenedData,
)
from gradflow.types import Weights

_DYNAMICS = {kind.__name__: kind for kind in (GradientFlow, GradientDescent, StochasticFlow)}
_OF_ARRAYS = ("max_change", "agreement")
_REGULARIZERS = {kind.__name__: kind for kind in (LabelNoise, InputNoise, WeightDecay, Minibatch)}


@dataclass(frozen=True)
class PreparedRun:
    """One run, ready to be simulated."""

    spec: RunSpec
    problem: Problem
    network: DeepLinear
    dynamics: AbstractDynamics
    key: jax.Array
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the observables at one time of one path."""


def prepare(study: Study) -> tuple[PreparedRun, ...]:
    """Build everything a study needs, before anything is integrated.

    **Raises:** `SpecError` with the line of every table that cannot be built.
    """
    faults: list[Fault] = []
    prepared = []
    for number, run in enumerate(study.spec.run):
        at: Path = ("run", number)
        place = _data_place(run, at)
        try:
            data = build_data(study.spec.data_of(run), study.path.parent)
            place = _network_place(run, at)
            network = build_network(study.spec.network_of(run))
            _check_widths(network, data)
            place = (*at, "regularizers")
            regularizers = [build_regularizer(item) for item in run.regularizers]
            problem = Problem(data, regularizers=regularizers)
            place = (*at, "dynamics")
            dynamics = build_dynamics(run.dynamics)
            place = (*at, "observables")
            shapes = observable_shapes(run, problem, network, dynamics)
        except (ValueError, TypeError, OSError) as error:
            faults.append(Fault(place, str(error)))
            continue
        key = run_key(study.spec, run)
        prepared.append(PreparedRun(run, problem, network, dynamics, key, shapes))
    faults += _entries(study.spec, {run.spec.name: run.shapes for run in prepared})
    if faults:
        raise study.error(faults)
    return tuple(prepared)


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
            return init.gaussian(spec.widths, jax.random.key(spec.seed), spec.scale)
        case OrthogonalInit():
            return init.orthogonal(spec.widths, jax.random.key(spec.seed), spec.scale)
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


def build_dynamics(spec: DynamicsSpec) -> AbstractDynamics:
    """The dynamics of a dynamics table."""
    return _DYNAMICS[spec.kind](**spec.model_dump(exclude={"kind"}))


def build_regularizer(spec: RegularizerSpec) -> LabelNoise | InputNoise | WeightDecay | Minibatch:
    """The regularizer of a regularizer table."""
    return _REGULARIZERS[spec.kind](**spec.model_dump(exclude={"kind"}))


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


def run_key(spec: StudySpec, run: RunSpec) -> jax.Array:
    """The random key of a run.

    It depends on the study's seed and the run's name, not on its position, so adding a run changes
    no other; runs with equal seeds of their own share their noise.
    """
    if run.seed is not None:
        return jax.random.key(run.seed)
    return jax.random.fold_in(jax.random.key(spec.seed), zlib.crc32(run.name.encode()))


def _entries(spec: StudySpec, shapes: Mapping[str, dict[str, tuple[int, ...]]]) -> Iterator[Fault]:
    """Claims and figures that need one number where an observable has another shape."""
    for i, claim in enumerate(spec.claim):
        quantity = claim.of or claim.quantity
        takes_arrays = quantity in _OF_ARRAYS and claim.component is None
        if claim.observable is None or takes_arrays:
            continue
        for name in claim.run_names:
            shape = shapes.get(name, {}).get(claim.observable, ())
            takes_entry = "component" in QUANTITIES[claim.quantity].keys
            if shape and not takes_entry:
                message = f"{claim.observable} has shape {[*shape]}; {quantity} needs a number"
                yield Fault(("claim", i, "observable"), message)
            elif takes_entry:
                yield from _entry(claim.observable, claim.component, shape, ("claim", i))
    for i, figure in enumerate(spec.figure):
        if not isinstance(figure, TimeSeries):
            continue
        for observable in figure.observables:
            for name in figure.runs or shapes:
                if shape := shapes.get(name, {}).get(observable, ()):
                    yield from _entry(observable, figure.component, shape, ("figure", i))


def _entry(
    observable: str, component: list[int] | None, shape: tuple[int, ...], at: Path
) -> Iterator[Fault]:
    chosen = component or []
    fits = len(chosen) == len(shape) and all(
        -size <= index < size for index, size in zip(chosen, shape, strict=True)
    )
    if fits:
        return
    given = "is missing" if component is None else f"got {component}"
    kind = f"has shape {[*shape]}; give the indices of one entry" if shape else "is a number"
    yield Fault((*at, "component"), f"{given}; {observable} {kind}")


def _optional_key(seed: int | None) -> jax.Array | None:
    return None if seed is None else jax.random.key(seed)


def _data_place(run: RunSpec, at: Path) -> Path:
    if isinstance(run.data, str):
        return ("data",) if run.data == "default" else ("datasets", run.data)
    return (*at, "data")


def _network_place(run: RunSpec, at: Path) -> Path:
    if isinstance(run.network, str):
        return ("network",) if run.network == "default" else ("networks", run.network)
    return (*at, "network")


def _check_widths(network: DeepLinear, data: Regression) -> None:
    widths = network.widths
    if (widths[0], widths[-1]) != (data.d_in, data.d_out):
        raise ValueError(
            f"widths {' -> '.join(map(str, widths))} do not fit the data, which have {data.d_in} "
            f"input{'s' * (data.d_in != 1)} and {data.d_out} target{'s' * (data.d_out != 1)}"
        )
