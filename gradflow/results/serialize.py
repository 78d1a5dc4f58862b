"""Plain descriptions of problems and dynamics, and the way back: what makes a run repeatable."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import diffrax
import equinox as eqx
import jax
import numpy as np
import optax

from gradflow import solvers as solvers_room
from gradflow.dynamics import DYNAMICS, AbstractDynamics, FromOptax
from gradflow.kinds import Kinds
from gradflow.regularizers import REGULARIZERS, AbstractRegularizer, Penalty
from gradflow.solvers.switching import Switching

T = TypeVar("T", bound=type)


def describe(part: AbstractDynamics | AbstractRegularizer) -> dict[str, Any]:
    """A dynamics or regularizer as a JSON-ready dictionary: its kind and what makes it again."""
    described: dict[str, Any] = {"kind": type(part).__name__}
    for name in inspect.signature(type(part)).parameters:
        # The step size of a scheduled descent is the first of the schedule's.
        schedule = getattr(part, "schedule", None) if name == "step_size" else None
        value = getattr(part, name) if schedule is None else schedule
        if value is not None:
            described[name] = _plain(value)
    return described


def rebuild_regularizer(described: Mapping[str, Any]) -> AbstractRegularizer:
    """The regularizer that `describe` described.

    **Raises:** `ValueError` if its kind is not registered.
    """
    made, arguments = _kind_and_arguments(described, REGULARIZERS)
    return made(**arguments)


def rebuild_dynamics(described: Mapping[str, Any]) -> AbstractDynamics:
    """The dynamics that `describe` described.

    **Raises:** `ValueError` if its kind is not registered, or its solver does not ship with
    gradflow or diffrax.
    """
    made, arguments = _kind_and_arguments(described, DYNAMICS)
    name = arguments.pop("solver", None)
    # The explicit default takes the tolerances of its flow.
    by_default = (
        arguments.get("stiff") or arguments.get("conservative") or name == Switching.__name__
    )
    if name is not None and not by_default:
        arguments["solver"] = _solver(name)
    return made(**arguments)


def _plain(value: Any) -> Any:
    """A field as JSON can hold it; what it cannot hold becomes its name, and does not rebuild."""
    if isinstance(value, FromOptax):
        return {"optax": value.name, **dict(value.options)}
    if isinstance(value, jax.Array | np.ndarray):
        return np.asarray(value).tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__


def _kind_and_arguments(described: Mapping[str, Any], kinds: Kinds[T]) -> tuple[T, dict[str, Any]]:
    kind = described["kind"]
    if kind not in kinds:
        raise ValueError(
            f"{kinds.concept}: {kind!r} is not known here. Import the module that defines it and "
            f"registers it, or rebuild it by hand; known are {', '.join(kinds)}."
        )
    arguments = {k: _from_plain(value) for k, value in described.items() if k != "kind"}
    return kinds[kind], arguments


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping) and "optax" in value:
        options = dict(value)
        return FromOptax(options.pop("optax"), **options)
    return value


def _solver(name: str) -> diffrax.AbstractSolver:
    for room in (diffrax, solvers_room):
        if hasattr(room, name):
            return getattr(room, name)()
    raise ValueError(
        f"dynamics.solver: {name!r} is not a solver of diffrax or gradflow; rebuild the dynamics "
        "by hand."
    )


def check_rebuilds(part: AbstractDynamics | AbstractRegularizer) -> None:
    """Check that a description leads back to the same object.

    **Raises:** `ValueError` if it does not: the part, its solver or the solver's options are the
    user's own.
    """
    described = describe(part)
    rebuild = rebuild_dynamics if isinstance(part, AbstractDynamics) else rebuild_regularizer
    try:
        same = eqx.tree_equal(rebuild(described), part)
    except (ValueError, TypeError):
        same = False
    if not same:
        raise ValueError(
            f"{described['kind']}{_culprit(part)}: a file holds only dynamics, solvers and "
            "regularizers that ship with gradflow or diffrax, with their default options; keep the "
            "numbers of this run with trajectory.to_xarray().to_netcdf(path)."
        )


def _culprit(part: AbstractDynamics | AbstractRegularizer) -> str:
    """The field that cannot be held, and what to write there, where it is a function of optax."""
    if isinstance(part, Penalty):
        return f".function of {part.name!r} is a function of your own, which no file brings back"
    for field in ("optimizer", "schedule"):
        value = getattr(part, field, None)
        if value is None or isinstance(value, FromOptax):
            continue
        function = getattr(value, "func", value)  # of functools.partial and eqx.Partial
        name = getattr(function, "__name__", "")
        fix = 'gf.FromOptax("adam", ...), the name and options of what made it'
        if getattr(optax, name, None) is function:
            options = getattr(value, "keywords", {})
            given = [f'"{name}"', *(f"{key}={option!r}" for key, option in options.items())]
            fix = f"gf.FromOptax({', '.join(given)})"
        elif field == "schedule":
            fix = 'gf.FromOptax("exponential_decay", ...), the name and options of what made it'
        return f".{'step_size' if field == 'schedule' else field} cannot be saved; give {fix}"
    return ""
