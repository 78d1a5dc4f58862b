"""The [[orders]] table: two dynamics at several step sizes, and how fast they approach each other.

A description is the sentence an error prints as "allowed".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from gradflow.study.tables import (
    NAME,
    WITHOUT_STEP,
    Count,
    DataSpec,
    DynamicsSpec,
    Name,
    NetworkSpec,
    Positive,
    RegularizerSpec,
    Section,
    name_or,
)

_STEPLESS = [kind.__name__ for kind in WITHOUT_STEP]


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
    regularizers: list[RegularizerSpec] = Field(
        default_factory=list, description='a list of tables such as { kind = "LabelNoise", ... }'
    )
    first: DynamicsSpec = Field(
        description='a table such as { kind = "GradientDescent" }, without step_size'
    )
    second: DynamicsSpec = Field(
        description='a table such as { kind = "ModifiedFlow", order = 2 }, without step_size'
    )
    step_sizes: Annotated[list[Positive], Field(min_length=2)] = Field(
        description="a list of at least two step sizes > 0"
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
    replicas: Count | None = Field(default=None, description="a whole number >= 1")
    seed: int | None = Field(default=None, ge=0, description="a whole number >= 0")

    @model_validator(mode="before")
    @classmethod
    def _give_step_size(cls, table: Any) -> Any:
        """Both dynamics get the first step size; the laboratory goes through all of them."""
        if not isinstance(table, dict):
            return table
        sizes = table.get("step_sizes")
        if not isinstance(sizes, list) or not sizes:
            return table
        filled = dict(table)
        for key in ("first", "second"):
            dynamics = table.get(key)
            if isinstance(dynamics, dict) and dynamics.get("kind") not in _STEPLESS:
                filled[key] = {"step_size": sizes[0], **dynamics}
        return filled

    @property
    def title(self) -> str:
        """What tables and figures call it."""
        return self.label or self.name
