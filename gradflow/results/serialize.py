"""Plain descriptions of problems and dynamics, and the way back: what makes a run repeatable."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np
import optax

from gradflow import (
    dynamics as dynamics_room,
    regularizers as regularizers_room,
    solvers as solvers_room,
)
from gradflow.dynamics.base import AbstractDynamics
from gradflow.dynamics.from_optax import FromOptax
from gradflow.regularizers.base import AbstractRegularizer
from gradflow.regularizers.penalty import Penalty
from gradflow.solvers.switching import Switching

RENAMED = {"kind": "distribution", "schedule": "step_size"}
"""Fields that a description calls otherwise: its own `kind` names the class, and a schedule stands
in the place of the step size."""


def describe(part: AbstractDynamics | AbstractRegularizer) -> dict[str, Any]:
    """A dynamics or regularizer as a JSON-ready dictionary: its kind and its fields."""
    described: dict[str, Any] = {"kind": type(part).__name__}
    scheduled = getattr(part, "schedule", None) is not None
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if scheduled and field.name == "step_size":
            value = None  # it is the first of the schedule's, which stands in its place
        if value is not None:
            described[RENAMED.get(field.name, field.name)] = _plain(value)
    return described


def rebuild_regularizer(described: Mapping[str, Any]) -> AbstractRegularizer:
    """The regularizer that `describe` described.

    **Raises:** `ValueError` if its kind is not one that ships with gradflow.
    """
    kind, fields = _kind_and_fields(described)
    if not hasattr(regularizers_room, kind):
        raise ValueError(
            f"regularizers: {kind!r} does not ship with gradflow; rebuild the problem by hand."
        )
    return getattr(regularizers_room, kind)(**fields)


def rebuild_dynamics(described: Mapping[str, Any]) -> AbstractDynamics:
    """The dynamics that `describe` described.

    **Raises:** `ValueError` if its kind or solver is not one that ships with gradflow or diffrax.
    """
    kind, fields = _kind_and_fields(described)
    if not hasattr(dynamics_room, kind):
        raise ValueError(
            f"dynamics: {kind!r} does not ship with gradflow; rebuild the dynamics by hand."
        )
    name = fields.pop("solver", None)
    # The explicit default takes the tolerances of its flow.
    by_default = fields.get("stiff") or fields.get("conservative") or name == Switching.__name__
    if name is not None and not by_default:
        fields["solver"] = _solver(name)
    return getattr(dynamics_room, kind)(**fields)


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


def _kind_and_fields(described: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    fields = {
        ("kind" if name == RENAMED["kind"] else name): _from_plain(value)
        for name, value in described.items()
        if name != "kind"
    }
    return described["kind"], fields


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
        return f".{RENAMED.get(field, field)} cannot be saved; give {fix}"
    return ""
