"""What a study is: the models that a TOML spec is validated against.

Every model forbids unknown keys, and the description of a field is the sentence an error prints as
"allowed". Reading and error messages are in `load.py`, conditions between several keys in
`check.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from gradflow.study.spec.kind_tables import DynamicsTable, RegularizerTable
from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.quantities import QUANTITIES
from gradflow.study.spec.tables import (
    NAME,
    Count,
    DataSpec,
    Finite,
    Name,
    NetworkSpec,
    NonNegative,
    Positive,
    Section,
    by,
    name_or,
)

# --- runs ---------------------------------------------------------------------------------------


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


# --- figures ------------------------------------------------------------------------------------


Interval = Annotated[list[Finite], Field(min_length=2, max_length=2)]


Scale = Literal["linear", "log"]
_OF_ONE_RUN = [n for n, q in QUANTITIES.items() if q.runs == (1, 1) and not q.required]


class FigureBase(Section):
    """What every figure has."""

    name: Name | None = Field(default=None, description=NAME)
    title: str = Field(default="", description="text above the figure")
    caption: str = Field(default="", description="text below the figure")
    runs: list[Name] = Field(
        default_factory=list, description="a list of run names (default: all runs)"
    )


class TimeSeries(FigureBase):
    """Observables against flow time, one panel an observable."""

    kind: Literal["time_series"]
    observables: list[str] = Field(min_length=1, description="a list of recorded observables")
    component: list[int] | None = Field(
        default=None, description="indices of one entry of an observable that is not a number"
    )
    x_scale: Scale = Field(default="linear", description="'linear' or 'log'")
    y_scale: Annotated[
        Annotated[Scale, Tag("=scale")] | Annotated[list[Scale], Tag("=list")],
        Discriminator(lambda value: "=list" if isinstance(value, list) else "=scale"),
    ] = Field(
        default="linear", description="'linear' or 'log', or a list of one for each observable"
    )
    decades: Positive = Field(
        default=12.0, description="decades a log axis shows below its largest value, a number > 0"
    )
    relative: bool = Field(
        default=False, description="true (divide by the value at the start) or false"
    )
    mark_phases: bool = Field(
        default=True, description="true (mark the end of the optimization phase) or false"
    )


class PhasePortrait(FigureBase):
    """Paths in the plane of two weights, with the minima manifold and the flow."""

    kind: Literal["phase_portrait"]
    replicas: int = Field(
        default=3, ge=0, description="single replicas drawn beside the mean, a whole number >= 0"
    )
    xlim: Interval | None = Field(default=None, description="[low, high] for the first weight")
    ylim: Interval | None = Field(default=None, description="[low, high] for the second weight")


class Conservation(FigureBase):
    """How far observables move from their start, against flow time."""

    kind: Literal["conservation"]
    observables: list[str] = Field(
        default_factory=lambda: ["imbalance"],
        min_length=1,
        description="a list of recorded observables",
    )
    x_scale: Scale = Field(default="linear", description="'linear' or 'log'")


class Scaling(FigureBase):
    """A quantity of many runs against one of their parameters, on logarithmic axes."""

    kind: Literal["scaling"]
    quantity: Literal[tuple(_OF_ONE_RUN)] = Field(  # pyright: ignore[reportInvalidTypeForm]
        description="one of " + ", ".join(_OF_ONE_RUN)
    )
    parameter: str = Field(
        description="a parameter of the runs, such as 'step_size' or 'LabelNoise.std'"
    )
    observable: str | None = Field(default=None, description="an observable the runs record")
    component: list[int] | None = Field(
        default=None, description="indices of one entry of the observable"
    )
    window: Interval | None = Field(default=None, description="[start, stop] in flow time")
    slope: Finite | None = Field(default=None, description="slope of a line to compare with")


_RATES = ("optimization_rate", "regularization_rate", "separation")


class Rates(FigureBase):
    """Measured rates against predicted ones, with error bars."""

    kind: Literal["rates"]
    quantities: list[Literal["optimization_rate", "regularization_rate", "separation"]] = Field(
        default_factory=lambda: list(_RATES),
        min_length=1,
        description="a list out of " + ", ".join(_RATES),
    )


class Orders(FigureBase):
    """Distance between two dynamics against the step size, on logarithmic axes."""

    kind: Literal["orders"]
    orders: list[Name] = Field(
        default_factory=list, description="a list of names of [[orders]] tables (default: all)"
    )
    observables: list[str] = Field(
        default_factory=list, description="a list of their observables (default: all)"
    )


FigureSpec = Annotated[
    Annotated[TimeSeries, Tag("kind=time_series")]
    | Annotated[PhasePortrait, Tag("kind=phase_portrait")]
    | Annotated[Conservation, Tag("kind=conservation")]
    | Annotated[Scaling, Tag("kind=scaling")]
    | Annotated[Rates, Tag("kind=rates")]
    | Annotated[Orders, Tag("kind=orders")],
    by("kind"),
]

# --- claims -------------------------------------------------------------------------------------

_QUANTITY_NAMES = Literal[tuple(QUANTITIES)]  # pyright: ignore[reportInvalidTypeForm]


class ClaimSpec(Section):
    """A sentence with a check: a quantity, what is expected of it, and how far off it may be."""

    sentence: str = Field(min_length=1, description="the claim in words")
    quantity: _QUANTITY_NAMES = Field(  # pyright: ignore[reportInvalidTypeForm]
        description="one of " + ", ".join(QUANTITIES)
    )
    run: Name | None = Field(default=None, description="the name of a run")
    runs: list[Name] | None = Field(default=None, min_length=1, description="a list of run names")
    orders: Name | None = Field(default=None, description="the name of an [[orders]] table")
    observable: str | None = Field(default=None, description="an observable the run records")
    component: list[int] | None = Field(
        default=None, description="indices of one entry of the observable"
    )
    over: list[int] | None = Field(
        default=None, description="indices of the entry of the observable to divide by"
    )
    window: list[NonNegative] | None = Field(
        default=None, min_length=2, max_length=2, description="[start, stop] in flow time"
    )
    times: list[NonNegative] | None = Field(
        default=None, min_length=1, description="flow times at which runs are compared"
    )
    of: str | None = Field(default=None, description="the quantity an exponent or ratio is about")
    parameter: str | None = Field(
        default=None, description="a parameter of the runs, such as 'step_size' or 'LabelNoise.std'"
    )
    of_mean: bool = Field(
        default=False,
        description="true (rate of the mean over replicas) or false (mean of the rates)",
    )
    relative: bool = Field(
        default=False, description="true (difference divided by the second run's value) or false"
    )
    theory: Literal["leading_order", "finite_step"] | None = Field(
        default=None,
        description="the prediction of which theory: 'leading_order' or 'finite_step' (default: "
        "of the run's own dynamics)",
    )
    expected: (
        Annotated[
            Annotated[str, Tag("=name")] | Annotated[Finite, Tag("=number")], name_or("number")
        ]
        | None
    ) = Field(default=None, description="a number, or a word such as 'predicted' or 'agree'")
    tolerance: NonNegative | None = Field(
        default=None, description="the largest |measured - expected| / |expected|, a number >= 0"
    )
    absolute_tolerance: NonNegative | None = Field(
        default=None, description="the largest |measured - expected|, a number >= 0"
    )
    standard_errors: Positive | None = Field(
        default=None,
        description="the largest |measured - expected| in standard errors, a number > 0",
    )
    resolution: Positive | None = Field(
        default=None,
        description="the allowed deviation above which the claim is undecided, a number > 0 "
        "(default: half of |expected|)",
    )
    at_most: Finite | None = Field(default=None, description="a number")
    at_least: Finite | None = Field(default=None, description="a number")
    short: bool = Field(
        default=True, description="true, or false to leave the claim out of the short variant"
    )

    @property
    def run_names(self) -> list[str]:
        """The runs the claim is about, in order."""
        return [self.run] if self.run is not None else list(self.runs or ())


# --- the study ----------------------------------------------------------------------------------


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
    figure: list[FigureSpec] = Field(default_factory=list, description="[[figure]] tables")
    claim: list[ClaimSpec] = Field(default_factory=list, description="[[claim]] tables")
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
