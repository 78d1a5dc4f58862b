"""The tables a run is made of: data, network, dynamics, regularizers.

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

# --- dynamics -----------------------------------------------------------------------------------

STEP_SIZE = "step size h, a number > 0"
RTOL, ATOL = "relative tolerance, a number > 0", "absolute tolerance, a number > 0"
STIFF = "true (implicit solver) or false"
VELOCITY = "the velocity at the start in weight units a step: one matrix (d_i x d_{i-1}) a layer"
DECAY = "'coupled' (weight decay in the gradient) or 'decoupled'"
SUBSTEPS = "grid steps of the Brownian path per h, at least 1"


class GradientFlow(Section):
    """The ordinary differential equation dW/dt = -grad of the averaged loss."""

    kind: Literal["GradientFlow"]
    rtol: Positive = Field(default=1e-8, description=RTOL)
    atol: Positive = Field(default=1e-10, description=ATOL)
    stiff: bool = Field(default=False, description=STIFF)
    conservative: bool = Field(
        default=False, description="true (Gauss-Legendre collocation, keeps every G_i) or false"
    )


class ExactFlow(Section):
    """Gradient flow in closed form, where one is known."""

    kind: Literal["ExactFlow"]


class FromOptax(Section):
    """Something of optax by its name, with its options."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = Field(min_length=1, description="the name of a function of optax, such as 'adam'")


class GradientDescent(Section):
    """(Stochastic) gradient descent."""

    kind: Literal["GradientDescent"]
    step_size: Annotated[
        Annotated[Positive, Tag("=number")] | Annotated[FromOptax, Tag("=table")],
        Discriminator(lambda value: "=table" if isinstance(value, dict | FromOptax) else "=number"),
    ] = Field(
        description=f"{STEP_SIZE}, or an optax schedule such as "
        '{ name = "cosine_decay_schedule", init_value = 0.1, decay_steps = 1000 }'
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="a number in [0, 1)")
    nesterov: bool = Field(default=False, description="true or false")
    decay: Literal["coupled", "decoupled"] = Field(default="coupled", description=DECAY)
    optimizer: FromOptax | None = Field(
        default=None, description='an optax optimizer such as { name = "adam", b1 = 0.9 }'
    )
    velocity: list[Matrix] | None = Field(default=None, description=VELOCITY)
    path_substeps: Count = Field(default=1, description=SUBSTEPS)


class SVAG(Section):
    """Stochastic variance amplified gradient: from SGD (1) to its SDE (infinity)."""

    kind: Literal["SVAG"]
    step_size: Positive = Field(description=STEP_SIZE)
    amplification: Count = Field(description="steps per h, a whole number l >= 1")
    path_substeps: Count | None = Field(
        default=None, description=f"{SUBSTEPS}, a multiple of amplification"
    )


class HeavyBallFlow(Section):
    """The second-order differential equation of heavy-ball momentum."""

    kind: Literal["HeavyBallFlow"]
    step_size: Positive = Field(description=f"{STEP_SIZE}, of the descent it models")
    momentum: float = Field(ge=0, lt=1, description="a number in [0, 1)")
    rtol: Positive = Field(default=1e-8, description=RTOL)
    atol: Positive = Field(default=1e-10, description=ATOL)
    stiff: bool = Field(default=False, description=STIFF)
    velocity: list[Matrix] | None = Field(default=None, description=VELOCITY)


class ModifiedFlow(Section):
    """The backward-error-analysis flow of gradient descent."""

    kind: Literal["ModifiedFlow"]
    step_size: Positive = Field(description=f"{STEP_SIZE}, of the descent it models")
    order: Literal[2, 3] = Field(default=2, description="2 or 3")
    rtol: Positive = Field(default=1e-8, description=RTOL)
    atol: Positive = Field(default=1e-10, description=ATOL)
    stiff: bool = Field(default=False, description=STIFF)


class PrincipalFlow(Section):
    """The flow that follows gradient descent exactly on quadratics."""

    kind: Literal["PrincipalFlow"]
    step_size: Positive = Field(description=f"{STEP_SIZE}, of the descent it models")
    rtol: Positive = Field(default=1e-8, description=RTOL)
    atol: Positive = Field(default=1e-10, description=ATOL)


class StochasticFlow(Section):
    """The stochastic differential equation that models SGD."""

    kind: Literal["StochasticFlow"]
    step_size: Positive = Field(description=f"{STEP_SIZE}, of the SGD it models")
    order: Literal[1, 2] = Field(default=1, description="weak order, 1 or 2")
    substeps: Count = Field(default=8, description="integration steps per h, at least 1")
    diffusion: Literal["auto", "closed", "sampled"] = Field(
        default="auto",
        description="'auto', 'closed' (low-rank factor) or 'sampled' (centred draws)",
    )


class SlowFlow(Section):
    """Motion along the minima manifold, where SGD is in its regularization phase."""

    kind: Literal["SlowFlow"]
    step_size: Positive = Field(description=f"{STEP_SIZE}, of the training it describes")
    finite_step: bool = Field(
        default=True, description="true (exact in the step size) or false (leading order)"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="a number in [0, 1)")
    decay: Literal["coupled", "decoupled"] = Field(default="coupled", description=DECAY)
    rtol: Positive = Field(default=1e-8, description=RTOL)
    atol: Positive = Field(default=1e-10, description=ATOL)
    cell: Positive | None = Field(
        default=None, description="flow time of a step where noise moves it, a number > 0"
    )


DynamicsSpec = Annotated[
    Annotated[GradientFlow, Tag("kind=GradientFlow")]
    | Annotated[ExactFlow, Tag("kind=ExactFlow")]
    | Annotated[GradientDescent, Tag("kind=GradientDescent")]
    | Annotated[SVAG, Tag("kind=SVAG")]
    | Annotated[HeavyBallFlow, Tag("kind=HeavyBallFlow")]
    | Annotated[ModifiedFlow, Tag("kind=ModifiedFlow")]
    | Annotated[PrincipalFlow, Tag("kind=PrincipalFlow")]
    | Annotated[StochasticFlow, Tag("kind=StochasticFlow")]
    | Annotated[SlowFlow, Tag("kind=SlowFlow")],
    by("kind"),
]

WITHOUT_STEP = (GradientFlow, ExactFlow)
"""Dynamics without a step size, whose length is flow time."""

# --- regularizers -------------------------------------------------------------------------------

STD = "standard deviation, a number > 0"
LAYERS = "a list of layers 1..N (default: all)"


class LabelNoise(Section):
    """Fresh noise on the targets at every step."""

    kind: Literal["LabelNoise"]
    std: Positive = Field(description=STD)


class InputNoise(Section):
    """Fresh noise on the inputs at every step."""

    kind: Literal["InputNoise"]
    std: Positive = Field(description=STD)


class WeightDecay(Section):
    """The penalty rate/2 |W|^2."""

    kind: Literal["WeightDecay"]
    rate: Positive = Field(description="a number > 0")


class Minibatch(Section):
    """A random part of the sample at every step."""

    kind: Literal["Minibatch"]
    batch_size: Count = Field(description="a whole number >= 1")
    replacement: bool = Field(default=False, description="true or false")
    reshuffled: bool = Field(default=False, description="true or false")


Rate = Annotated[float, Field(gt=0, lt=1)]


class Dropout(Section):
    """Random factors of mean 1 on the hidden activations of every sample."""

    kind: Literal["Dropout"]
    rate: Rate = Field(description="the fraction dropped, in (0, 1)")
    distribution: Literal["bernoulli", "gaussian"] = Field(
        default="bernoulli", description="'bernoulli' or 'gaussian'"
    )
    layers: list[Count] | None = Field(default=None, description=LAYERS)


class DropConnect(Section):
    """Every weight is dropped with some probability at every step."""

    kind: Literal["DropConnect"]
    rate: Rate = Field(description="the fraction dropped, in (0, 1)")
    layers: list[Count] | None = Field(default=None, description=LAYERS)


class WeightNoise(Section):
    """Isotropic noise on the weights at every step."""

    kind: Literal["WeightNoise"]
    std: Positive = Field(description=STD)
    anticorrelated: bool = Field(default=False, description="true (anti-PGD) or false")
    layers: list[Count] | None = Field(default=None, description=LAYERS)


class GradientNoise(Section):
    """Isotropic noise on the gradient at every step."""

    kind: Literal["GradientNoise"]
    std: Positive = Field(description=STD)


RegularizerSpec = Annotated[
    Annotated[LabelNoise, Tag("kind=LabelNoise")]
    | Annotated[InputNoise, Tag("kind=InputNoise")]
    | Annotated[WeightDecay, Tag("kind=WeightDecay")]
    | Annotated[Minibatch, Tag("kind=Minibatch")]
    | Annotated[Dropout, Tag("kind=Dropout")]
    | Annotated[DropConnect, Tag("kind=DropConnect")]
    | Annotated[WeightNoise, Tag("kind=WeightNoise")]
    | Annotated[GradientNoise, Tag("kind=GradientNoise")],
    by("kind"),
]
