"""The [[run]] tables.

A description is the sentence an error prints as "allowed".
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from gradflow.study.spec.kind_tables import DynamicsTable, RegularizerTable
from gradflow.study.spec.tables import (
    NAME,
    Count,
    DataSpec,
    Name,
    NetworkSpec,
    NonNegative,
    Positive,
    Section,
    name_or,
)


class SaveSpec(Section):
    """Where along a run the observables are recorded."""

    points: int | None = Field(default=None, ge=2, description="a whole number >= 2")
    spacing: Literal["lin", "log"] = Field(default="lin", description="'lin' or 'log'")
    times: list[NonNegative] | None = Field(
        default=None, min_length=1, description="increasing flow times >= 0"
    )


class NormalsSpec(Section):
    """What stands for the standard normals of a run."""

    law: Literal["gaussian", "two-point", "three-point"] = Field(
        default="gaussian",
        description="'gaussian', or for weak quantities of a StochasticFlow 'two-point' (order 1) "
        "or 'three-point'",
    )
    antithetic: bool = Field(
        default=False, description="true (replicas in pairs of opposite normals) or false"
    )
    precision: Literal["double", "single"] = Field(
        default="double", description="'double' or 'single'"
    )


class RunSpec(Section):
    """One problem, one network, one dynamics."""

    name: Name = Field(description=NAME)
    label: str = Field(default="", description="text for figures and tables")
    group: str = Field(default="", description="text; runs of one group are drawn together")
    data: Annotated[
        Annotated[Name, Tag("=name")] | Annotated[DataSpec, Tag("=data")], name_or("data")
    ] = Field(default="default", description="a name from [datasets] or a table like [data]")
    network: Annotated[
        Annotated[Name, Tag("=name")] | Annotated[NetworkSpec, Tag("=network")], name_or("network")
    ] = Field(default="default", description="a name from [networks] or a table like [network]")
    dynamics: DynamicsTable = Field(description='a table such as { kind = "GradientFlow" }')
    regularizers: list[RegularizerTable] = Field(
        default_factory=list, description='a list of tables such as { kind = "WeightDecay", ... }'
    )
    replicas: Count | None = Field(default=None, description="a whole number >= 1")
    seed: int | None = Field(
        default=None, ge=0, description="a whole number >= 0; runs with equal seeds share noise"
    )
    normals: NormalsSpec | None = Field(
        default=None, description='{ antithetic = true, precision = "single" } or a law'
    )
    t1: Positive | None = Field(default=None, description="the flow time to reach, a number > 0")
    steps: Count | None = Field(default=None, description="the number of steps, at least 1")
    save: SaveSpec = Field(
        default_factory=lambda: SaveSpec(points=101),
        description='{ points = 101, spacing = "lin" } or { times = [...] }',
    )
    observables: list[str] | None = Field(
        default=None, min_length=1, description="a list of names of observables"
    )
    store_weights: bool | None = Field(default=None, description="true or false")

    @property
    def is_antithetic(self) -> bool:
        """Whether its replicas come in pairs of opposite normals."""
        return self.normals is not None and self.normals.antithetic

    @property
    def title(self) -> str:
        """What tables and figures call the run."""
        return self.label or self.name


def parameters(run: RunSpec) -> dict[str, float]:
    """The positive numbers of a run by name: `step_size`, `WeightDecay.rate`, ..."""
    found: dict[str, float] = {}
    for owner in (run.dynamics, *run.regularizers):
        for key, value in owner.model_dump().items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                is_dynamics = owner is run.dynamics
                found[key if is_dynamics else f"{owner.kind}.{key}"] = float(value)
    return found
