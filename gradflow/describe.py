"""Plain descriptions of problems and dynamics, and the way back: what makes a run repeatable."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np

from gradflow import dynamics as dynamics_room, regularizers as regularizers_room
from gradflow.dynamics.base import AbstractDynamics
from gradflow.regularizers.base import AbstractRegularizer


def describe(part: AbstractDynamics | AbstractRegularizer) -> dict[str, Any]:
    """A dynamics or regularizer as a JSON-ready dictionary: its kind and its fields."""
    described: dict[str, Any] = {"kind": type(part).__name__}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, diffrax.AbstractSolver):
            described[field.name] = type(value).__name__
        elif isinstance(value, jax.Array | np.ndarray):
            described[field.name] = float(value)
        elif value is not None:
            described[field.name] = value
    return described


def rebuild_regularizer(described: Mapping[str, Any]) -> AbstractRegularizer:
    """The regularizer that `describe` described.

    **Raises:** `ValueError` if its kind is not one that ships with gradflow.
    """
    fields = dict(described)
    kind = fields.pop("kind")
    if not hasattr(regularizers_room, kind):
        raise ValueError(
            f"regularizers: {kind!r} does not ship with gradflow; rebuild the problem by hand."
        )
    return getattr(regularizers_room, kind)(**fields)


def rebuild_dynamics(described: Mapping[str, Any]) -> AbstractDynamics:
    """The dynamics that `describe` described.

    **Raises:** `ValueError` if its kind or solver is not one that ships with gradflow or diffrax.
    """
    fields = dict(described)
    kind = fields.pop("kind")
    if not hasattr(dynamics_room, kind):
        raise ValueError(
            f"dynamics: {kind!r} does not ship with gradflow; rebuild the dynamics by hand."
        )
    name = fields.pop("solver", None)
    if name is not None and not fields["stiff"]:
        if hasattr(diffrax, name):
            fields["solver"] = getattr(diffrax, name)()
        else:
            raise ValueError(
                f"dynamics.solver: {name!r} is not a diffrax solver; rebuild the dynamics by hand."
            )
    return getattr(dynamics_room, kind)(**fields)


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
            f"{described['kind']}: a file holds only dynamics, solvers and regularizers that ship "
            "with gradflow or diffrax, with their default options; keep the numbers of this run "
            "with trajectory.to_xarray().to_netcdf(path)."
        )
