"""The tables of data and networks.

A description is the sentence an error prints as "allowed". `build.py` turns tables into objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Matrix = Annotated[list[Annotated[list[Finite], Field(min_length=1)]], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]

NAME = "a name of lower-case letters, digits, _ and - (it names files)"
MATRIX = "a list of rows of numbers"


class Section(BaseModel):
    """Base of every part of a spec: unknown keys and loose types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def by(key: str) -> Discriminator:
    """Choose the model of a table by its `key`; tags read `key=value`, which no TOML key does."""

    def tag(table: Any) -> str | None:
        value = table.get(key) if isinstance(table, dict) else getattr(table, key, None)
        return None if value is None else f"{key}={value}"

    return Discriminator(tag)


def name_or(table: str) -> Discriminator:
    """A string refers to a named table; anything else is the table itself."""
    tag: Callable[[Any], str] = lambda value: "=name" if isinstance(value, str) else f"={table}"  # noqa: E731
    return Discriminator(tag)


# --- data ---------------------------------------------------------------------------------------


class WhitenedData(Section):
    """Population data with identity input covariance."""

    source: Literal["whitened"]
    target: Matrix = Field(description=f"the best linear map T (d_N x d_0), {MATRIX}")
    residual: (
        Annotated[
            Annotated[NonNegative, Tag("=number")] | Annotated[Matrix, Tag("=matrix")],
            Discriminator(lambda value: "=matrix" if isinstance(value, list) else "=number"),
        ]
        | None
    ) = Field(
        default=None,
        description=f"residual covariance of the targets: a number >= 0 or {MATRIX} (d_N x d_N)",
    )
    n: Count = Field(default=1, description="samples whose noise is averaged in a step, at least 1")


class MomentsData(Section):
    """Population data given by its second moments."""

    source: Literal["moments"]
    sxx: Matrix = Field(description=f"input second moment (d_0 x d_0), {MATRIX}")
    syx: Matrix = Field(description=f"target-input moment (d_N x d_0), {MATRIX}")
    syy: Matrix | None = Field(default=None, description=f"target moment (d_N x d_N), {MATRIX}")
    n: Count = Field(default=1, description="samples whose noise is averaged in a step, at least 1")


Standardize = Literal[True, False, "inputs", "targets", "both"]
STANDARDIZE = "true, false, 'inputs', 'targets' or 'both'"


Column = Annotated[
    Annotated[str, Tag("=name")] | Annotated[int, Tag("=position")], name_or("position")
]


class FileData(Section):
    """A finite sample read from a .csv, .parquet or .npz file."""

    source: Literal["file"]
    path: str = Field(min_length=1, description="path of the table, relative to the spec")
    targets: list[Column] | None = Field(
        default=None, min_length=1, description="names or positions of the target columns"
    )
    inputs: list[Column] | None = Field(
        default=None,
        min_length=1,
        description="names or positions of the input columns (default: all the others)",
    )
    standardize: Standardize = Field(default=True, description=STANDARDIZE)
    whiten: bool = Field(default=False, description="true or false")
    drop_constant: bool = Field(default=False, description="true or false")
    header: bool = Field(default=True, description="true (the first line names columns) or false")
    separator: str = Field(
        default=",", min_length=1, description="the text between the columns of a .csv file"
    )


class SklearnData(Section):
    """A data set that comes with scikit-learn."""

    source: Literal["sklearn"]
    name: Literal["breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine"] = Field(
        description="a data set that comes with scikit-learn, such as 'diabetes'"
    )
    targets: list[Column] | None = Field(
        default=None, min_length=1, description="names or positions of the targets to keep"
    )
    standardize: Standardize = Field(default=True, description=STANDARDIZE)
    whiten: bool = Field(default=False, description="true or false")
    drop_constant: bool | None = Field(default=None, description="true or false")


DataSpec = Annotated[
    Annotated[WhitenedData, Tag("source=whitened")]
    | Annotated[MomentsData, Tag("source=moments")]
    | Annotated[FileData, Tag("source=file")]
    | Annotated[SklearnData, Tag("source=sklearn")],
    by("source"),
]

# --- networks -----------------------------------------------------------------------------------

Widths = Annotated[
    list[Count],
    Field(min_length=2, description="the widths d_0, ..., d_N: at least two whole numbers >= 1"),
]


class GivenWeights(Section):
    """A network whose weights are written out."""

    init: Literal["weights"]
    weights: Annotated[list[Matrix], Field(min_length=1)] = Field(
        description="one matrix (d_i x d_{i-1}) a layer, first layer first"
    )


SEED = "a whole number >= 0"


class GaussianInit(Section):
    """Independent normal weights of variance scale^2 / d_{i-1}."""

    init: Literal["gaussian"]
    widths: Widths
    scale: Positive = Field(default=1.0, description="a number > 0")
    seed: int = Field(default=0, ge=0, description=SEED)


class OrthogonalInit(Section):
    """Layers with orthonormal rows or columns times a scale."""

    init: Literal["orthogonal"]
    widths: Widths
    scale: Positive = Field(default=1.0, description="a number > 0")
    seed: int = Field(default=0, ge=0, description=SEED)


class BalancedInit(Section):
    """Layers that factor one end-to-end matrix with every G_i = 0."""

    init: Literal["balanced"]
    widths: Widths
    target: Matrix | None = Field(
        default=None, description=f"the end-to-end matrix to factor (d_N x d_0), {MATRIX}"
    )
    scale: Positive | None = Field(
        default=None, description="singular values of a random end-to-end matrix, a number > 0"
    )
    seed: int | None = Field(default=None, ge=0, description=SEED)


class UnbalancedInit(Section):
    """Layers of which one exceeds the others by a chosen imbalance."""

    init: Literal["unbalanced"]
    widths: Widths
    imbalance: NonNegative = Field(description="the imbalance D at the start, a number >= 0")
    target: Matrix | None = Field(
        default=None, description=f"the end-to-end matrix to factor (d_N x d_0), {MATRIX}"
    )
    scale: Positive | None = Field(
        default=None, description="singular values of a random end-to-end matrix, a number > 0"
    )
    heavy: Count = Field(default=1, description="the layer 1..N that carries the norm")
    seed: int | None = Field(default=None, ge=0, description=SEED)


NetworkSpec = Annotated[
    Annotated[GivenWeights, Tag("init=weights")]
    | Annotated[GaussianInit, Tag("init=gaussian")]
    | Annotated[OrthogonalInit, Tag("init=orthogonal")]
    | Annotated[BalancedInit, Tag("init=balanced")]
    | Annotated[UnbalancedInit, Tag("init=unbalanced")],
    by("init"),
]
