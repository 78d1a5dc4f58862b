"""What a study is: the models that a TOML spec is validated against.

Every model forbids unknown keys, and the description of a field is the sentence an error prints as
"allowed". Reading and error messages are in `load.py`, conditions between several keys in
`check.py` and in the tables themselves.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gradflow.study.spec.chosen import TableOf
from gradflow.study.spec.claim_tables import CLAIMS, Claim
from gradflow.study.spec.figure_tables import FIGURES, FigureTable
from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.run_tables import RunSpec, SaveSpec
from gradflow.study.spec.tables import NAME, Count, DataSpec, Name, NetworkSpec, Positive, Section

Figure = Annotated[FigureTable, TableOf(FIGURES)]
ClaimTable = Annotated[Claim, TableOf(CLAIMS, key="quantity")]


class RunOverrides(Section):
    """What the short variant changes in one run."""

    replicas: Count | None = Field(default=None, description="a whole number >= 1")
    t1: Positive | None = Field(default=None, description="the flow time to reach, a number > 0")
    steps: Count | None = Field(default=None, description="the number of steps, at least 1")
    save: SaveSpec | None = Field(
        default=None, description='{ points = 101, spacing = "lin" } or { times = [...] }'
    )


class ShortSpec(Section):
    """What the short variant changes: enough to try everything, too little to prove anything."""

    replicas: Count | None = Field(
        default=None, description="the largest number of replicas, at least 1"
    )
    points: int | None = Field(
        default=None, ge=2, description="the largest number of saved points, at least 2"
    )
    duration: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="a factor in (0, 1] on every t1 and steps"
    )
    runs: dict[Name, RunOverrides] = Field(
        default_factory=dict, description="tables [short.runs.NAME] with t1, steps, replicas, save"
    )


class StudySpec(Section):
    """A whole study."""

    name: Name = Field(description=NAME)
    title: str = Field(default="", description="text")
    description: str = Field(default="", description="text")
    seed: int = Field(default=0, ge=0, description="a whole number >= 0")
    eps: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="relative closeness that ends the optimization phase, in (0, 1)"
    )
    data: DataSpec | None = Field(default=None, description="a table with a source")
    datasets: dict[Name, DataSpec] = Field(
        default_factory=dict, description="tables [datasets.NAME] with a source"
    )
    network: NetworkSpec | None = Field(default=None, description="a table with an init")
    networks: dict[Name, NetworkSpec] = Field(
        default_factory=dict, description="tables [networks.NAME] with an init"
    )
    run: list[RunSpec] = Field(default_factory=list, description="[[run]] tables")
    orders: list[OrdersSpec] = Field(default_factory=list, description="[[orders]] tables")
    figure: list[Figure] = Field(default_factory=list, description="[[figure]] tables")
    claim: list[ClaimTable] = Field(default_factory=list, description="[[claim]] tables")
    short: ShortSpec = Field(default_factory=ShortSpec, description="a [short] table")

    def data_of(self, run: RunSpec | OrdersSpec) -> DataSpec:
        """The data table of a run or an [[orders]] table."""
        found = run.data
        if isinstance(found, str):
            found = self.data if found == "default" else self.datasets[found]
        assert found is not None, "check.py reports runs without data"
        return found

    def network_of(self, run: RunSpec | OrdersSpec) -> NetworkSpec:
        """The network table of a run or an [[orders]] table."""
        found = run.network
        if isinstance(found, str):
            found = self.network if found == "default" else self.networks[found]
        assert found is not None, "check.py reports runs without a network"
        return found
