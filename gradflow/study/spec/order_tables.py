"""The [[orders]] table: two dynamics at several step sizes, and how fast they approach each other.

A description is the sentence an error prints as "allowed".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import Field, Tag, model_validator

from gradflow.dynamics import DYNAMICS
from gradflow.study.spec.errors import Fault, shown
from gradflow.study.spec.kind_tables import DynamicsTable, RegularizerTable, table_of
from gradflow.study.spec.tables import (
    NAME,
    DataSpec,
    Name,
    NetworkSpec,
    Positive,
    Section,
    name_or,
)

_PAIR = ("first", "second")


def given_step_sizes(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Step sizes inside `first` and `second`, which would have no effect, in a spec as read."""
    found = table.get("orders")
    for i, orders in enumerate(found if isinstance(found, list) else ()):
        for key in _PAIR:
            dynamics = orders.get(key) if isinstance(orders, dict) else None
            if _takes_step_size(dynamics) and "step_size" in dynamics:
                message = f"got {shown(dynamics['step_size'])}; the step sizes are those of "
                yield Fault(("orders", i, key, "step_size"), f"{message}step_sizes; leave it out")


def _takes_step_size(dynamics: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a table that is written is one of a dynamics that takes a step size, or of none."""
    if not isinstance(dynamics, dict):
        return False
    known = DYNAMICS.get(str(dynamics.get("kind")))
    return known is None or "step_size" in table_of(known).model_fields


class OrdersSpec(Section):
    """The distance between two dynamics on one problem, for a list of step sizes."""

    name: Name = Field(description=NAME)
    label: str = Field(default="", description="text for figures and tables")
    data: Annotated[
        Annotated[Name, Tag("=name")] | Annotated[DataSpec, Tag("=data")], name_or("data")
    ] = Field(default="default", description="a name from [datasets] or a table like [data]")
    network: Annotated[
        Annotated[Name, Tag("=name")] | Annotated[NetworkSpec, Tag("=network")], name_or("network")
    ] = Field(default="default", description="a name from [networks] or a table like [network]")
    regularizers: list[RegularizerTable] = Field(
        default_factory=list, description='a list of tables such as { kind = "LabelNoise", ... }'
    )
    first: DynamicsTable = Field(
        description='a table such as { kind = "GradientDescent" }, without step_size'
    )
    second: DynamicsTable = Field(
        description='a table such as { kind = "ModifiedFlow", order = 2 }, without step_size'
    )
    step_sizes: Annotated[list[Positive], Field(min_length=3)] = Field(
        description="a list of at least three step sizes > 0"
    )
    t1: Positive = Field(description="the flow time at which they are compared, a number > 0")
    distance: Literal["strong", "weak"] = Field(
        default="strong", description="'strong' (of paths) or 'weak' (of means)"
    )
    observables: list[str] = Field(
        default_factory=lambda: ["weights"],
        min_length=1,
        description="a list of names of observables, or 'weights'",
    )
    replicas: int | None = Field(default=None, ge=2, description="a whole number >= 2")
    seed: int | None = Field(default=None, ge=0, description="a whole number >= 0")

    @model_validator(mode="before")
    @classmethod
    def _give_step_size(cls, table: Any) -> Any:
        """Both dynamics get the first step size; the measurement goes through all of them.

        Where that is not one, they get a placeholder: what is wrong with it is said once.
        """
        if not isinstance(table, dict):
            return table
        sizes = table.get("step_sizes")
        first = sizes[0] if isinstance(sizes, list) and sizes else None
        if not (isinstance(first, int | float) and math.isfinite(first) and first > 0):
            first = 1.0
        filled = dict(table)
        for key in _PAIR:
            dynamics = table.get(key)
            if _takes_step_size(dynamics):
                filled[key] = {**dynamics, "step_size": float(first)}
        return filled

    def as_given(self) -> dict[str, Any]:
        """All settings, ready for JSON, without the step size that was filled in."""
        settings = self.model_dump(mode="json")
        for key in _PAIR:
            settings[key].pop("step_size", None)
        return settings

    @property
    def title(self) -> str:
        """What tables and figures call it."""
        return self.label or self.name
