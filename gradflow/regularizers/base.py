r"""What a regularizer is: one mechanism with three faces.

1. *sampled*: how one draw perturbs the forward pass; discrete SGD uses its exact gradient;
2. *averaged*: its part of the exact expected loss, which drives the flows;
3. *diffusion*: a factor $B(W)$ with $B B^\top$ the covariance of the stochastic gradient.

The mechanisms differ in *where* they act, and each place has its own abstract class: a penalty on
the weights, the choice of the batch, noise on the data, on the weights, on the hidden activations
and on the gradient. The faces of any combination are assembled from these pieces in `averaged.py`,
`diffusion.py` and `sampled.py`.
"""

import abc
import dataclasses
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.backend.products import product
from gradflow.backend.tracing import is_traced
from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.data import Regression
from gradflow.kinds import Kinds
from gradflow.random.streams import Stream


def _shown(value: Any) -> str:
    """A setting as text: the number of an array that holds one, or why there is none."""
    if is_traced(value):
        return "traced"
    if isinstance(value, jax.Array | np.ndarray | np.generic | float):
        array = np.asarray(value)
        return f"{array.item():.6g}" if array.size == 1 else f"array of shape {array.shape}"
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    plain = isinstance(value, str | bool | int | tuple | type(None))
    return plain and type(field.default) is type(value) and field.default == value


class NoiseMoments(eqx.Module):
    r"""The moments at the current weights from which every data noise builds its diffusion factor.

    With $e = P x - y = M S^{-1} x + \eta$ the error splits into a part carried by the input and a
    residual $\eta$ uncorrelated with it, whose covariance $\Sigma_\eta$ does not depend on $W$.

    - `p`: end-to-end matrix, `(d_N, d_0)`; `m`: clean gradient $M = P S - Y$, `(d_N, d_0)`.
    - `root`: $S^{1/2}$; `inverse_root`: $S^{-1/2}$ on the range of $S$.
    - `noisy_root`: $(S + \sigma^2 I)^{1/2}$ with the total input noise variance $\sigma^2$.
    - `residual_root`: $\Sigma_\eta^{1/2}$, `(d_N, d_N)`.
    - `batch`: number of samples whose noise is averaged in one step.
    - `data`: the regression data.
    """

    p: EndToEnd
    m: EndToEnd
    root: Float[Array, "d_in d_in"]
    inverse_root: Float[Array, "d_in d_in"]
    noisy_root: Float[Array, "d_in d_in"]
    residual_root: Float[Array, "d_out d_out"]
    batch: Scalar
    data: Regression


REGULARIZERS: Kinds[type["AbstractRegularizer"]] = Kinds("regularizers")
"""Those that specs and files know."""


class AbstractRegularizer(eqx.Module):
    """One mechanism that moves training along the minima manifold.

    To write one, derive from the class below it that says *where* it acts, never from this one:
    `AbstractPenalty`, `AbstractBatch`, `AbstractDataNoise`, `AbstractWeightNoise`,
    `AbstractActivationNoise` or `AbstractGradientNoise`. It is an `equinox.Module`: its settings
    are fields, arrays where they are swept (`eqx.field(converter=jnp.asarray)`), static where they
    choose a program. Every method is compiled, so it is written in `jax.numpy`. What it needs
    beyond one path's arrays it gets as arguments. docs/regularizers.md has examples.
    """

    def __repr__(self) -> str:
        settings = [(field, getattr(self, field.name, None)) for field in dataclasses.fields(self)]
        shown = [f"{f.name}={_shown(value)}" for f, value in settings if not _is_default(f, value)]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    @abc.abstractmethod
    def is_stochastic(self) -> bool:
        """Whether the mechanism makes the gradient random."""


class AbstractPenalty(AbstractRegularizer):
    """A deterministic term added to the loss.

    To write one, give `penalty`, `penalty_gradient` (`jax.grad(self.penalty)(weights)` will do) and
    `is_stochastic`, which is False. `Penalty` makes one from a function.
    """

    @abc.abstractmethod
    def penalty(self, weights: Weights) -> Scalar:
        """The term added to the loss."""

    @abc.abstractmethod
    def penalty_gradient(self, weights: Weights) -> Weights:
        """Its gradient, one array a layer."""


class AbstractEndToEndNoise(AbstractRegularizer):
    """Noise that enters through the gradient with respect to the end-to-end matrix alone.

    Its diffusion has a closed factor: `increment` is linear in standard normals of `normal_shape`
    and has the covariance `covariance` at `moments`.
    """

    @abc.abstractmethod
    def normal_shape(self, data: Regression) -> tuple[int, ...]:
        """Shape of the standard normals that `increment` takes."""

    @abc.abstractmethod
    def increment(self, moments: NoiseMoments, normals: Array) -> EndToEnd:
        """The diffusion factor applied to standard normals, as noise on $M$."""

    @abc.abstractmethod
    def covariance(self, moments: NoiseMoments) -> Float[Array, "outputs outputs"]:
        """Covariance of `increment`, `(d_N d_0, d_N d_0)`, row-major vec."""

    @property
    @abc.abstractmethod
    def is_multiplicative(self) -> bool:
        """Whether `covariance` depends on the end-to-end matrix."""

    @abc.abstractmethod
    def feedback(
        self, moments: NoiseMoments, spread: Float[Array, "d_out d_in d_out d_in"]
    ) -> Float[Array, "d_out d_in d_out d_in"]:
        r"""What fluctuations of $P$ add to `covariance`: $E[C(P + \rho)] - C(P)$, exactly.

        `spread` is $E[\rho_{ai} \rho_{ck}]$; linear in it, as $C$ is quadratic in $P$.
        """


class AbstractBatch(AbstractEndToEndNoise):
    """A choice of the rows that enter one step.

    To write one, give the sampled face (`size`, `check`, `draw`, `rows`) and the moments of the
    noise that it makes: `covariance` is that of the batch's gradient with respect to the end-to-end
    matrix at `moments`, `increment` a linear factor of it times normals of `normal_shape`, and
    `feedback` its change with the second moment of the fluctuating end-to-end matrix. The mean over
    draws must be the gradient of all rows. `Minibatch` is the example.
    """

    @abc.abstractmethod
    def size(self) -> int:
        """The number of rows in a step."""

    @abc.abstractmethod
    def check(self, data: Regression) -> None:
        """Raise a `ValueError` if the rule cannot be applied to the data."""

    @abc.abstractmethod
    def draw(self, stream: Stream, data: Regression) -> Array:
        """Random numbers for a block of steps, `(K, ..., R)`."""

    @abc.abstractmethod
    def rows(
        self, draw: Array, data: Regression, root: Float[Array, "d_in d_in"]
    ) -> tuple[Float[Array, "batch d_in"], Float[Array, "batch d_out"]]:
        """The inputs and targets of one step of one path."""


class AbstractDataNoise(AbstractEndToEndNoise):
    """Noise on inputs or labels; it enters through the end-to-end gradient alone.

    To write one, give the sampled face (`draw_shape`, `perturb`: the rows under standard normals),
    the averaged face (`input_variance`) and the diffusion (`covariance` of the noise on the
    end-to-end gradient, `increment`, a linear factor of it times normals of `normal_shape`, and
    `feedback`). `LabelNoise` is the shortest example.
    """

    @abc.abstractmethod
    def input_variance(self) -> Scalar:
        r"""The variance $\sigma^2$ added to every input coordinate (0 for noise on labels)."""

    @abc.abstractmethod
    def draw_shape(self, batch: int, data: Regression) -> tuple[int, ...]:
        """Shape of the standard normals of one step of one path in the sampled face."""

    @abc.abstractmethod
    def perturb(
        self,
        normals: Array,
        x: Float[Array, "batch d_in"],
        y: Float[Array, "batch d_out"],
    ) -> tuple[Float[Array, "batch d_in"], Float[Array, "batch d_out"]]:
        """The perturbed rows."""

    @abc.abstractmethod
    def is_linear(self) -> bool:
        """Whether $M$ is linear in the noise, so that a Gaussian increment is exact."""


class AbstractLayerNoise(AbstractRegularizer):
    """Noise inside the network: on its weights or on its hidden activations."""

    @abc.abstractmethod
    def check(self, depth: int) -> None:
        """Raise a `ValueError` if the noise cannot act on a network of this depth."""


class AbstractWeightNoise(AbstractLayerNoise):
    """Noise on the weights: one draw a step, which all rows share.

    A draw replaces $W_l$ by weights of the same mean with independent entries. To write one, give
    `draw` and `perturb_weight`, whose entries have exactly the variance that `weight_variance`
    returns, and `check`. `DropConnect` is the example.
    """

    @property
    @abc.abstractmethod
    def is_shift(self) -> bool:
        """Whether the dynamics adds the noise to the weights themselves (anticorrelated noise).

        Then `perturb_weight` adds numbers that do not depend on the weights, and the gradient is
        taken at the weights as they are. Such noise acts before all other noise on weights.
        """

    @abc.abstractmethod
    def weight_variance(
        self,
        layer: int,
        depth: int,
        w: Float[Array, "d_l d_below"],
        variance: Float[Array, "d_l d_below"],
    ) -> Float[Array, "d_l d_below"]:
        """Entry-wise variance of $W_l$ after this noise, given that before it."""

    @abc.abstractmethod
    def draw(self, stream: Stream, widths: tuple[int, ...]) -> Any:
        """Random numbers for a block of steps: a pytree of `(K, ..., R)` arrays."""

    @abc.abstractmethod
    def perturb_weight(
        self, draw: Any, layer: int, depth: int, w: Float[Array, "d_l d_below"]
    ) -> Float[Array, "d_l d_below"]:
        """The weights of layer `layer` (1..N) under one draw."""


class AbstractActivationNoise(AbstractLayerNoise):
    """Factors of mean 1 on hidden activations, independent for every row and every unit.

    To write one, give `draw` and `perturb_activation`, whose factors have exactly the variance that
    `activation_variance` returns, and `check`. `Dropout` is the example.
    """

    @abc.abstractmethod
    def activation_variance(self, layer: int, depth: int) -> Scalar:
        r"""Variance $\alpha_l$ of the factors on the activations of layer `layer` (0 for none)."""

    @abc.abstractmethod
    def draw(self, stream: Stream, batch: int, widths: tuple[int, ...]) -> Any:
        """Random numbers for a block of steps: a pytree of `(K, ..., R)` arrays."""

    @abc.abstractmethod
    def perturb_activation(
        self, draw: Any, layer: int, depth: int, h: Float[Array, "batch d_l"]
    ) -> Float[Array, "batch d_l"]:
        """The activations of layer `layer` under one draw, one row per sample."""


class AbstractGradientNoise(AbstractRegularizer):
    """Gaussian noise added to the gradient, independent in every entry and of the weights.

    To write one, give `level` (and `is_stochastic`, which is True). `GradientNoise` is the example.
    """

    @abc.abstractmethod
    def level(self, layer: int, depth: int) -> Scalar:
        """Standard deviation of the noise on every entry of the gradient of layer `layer`."""


def layer_shapes(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """The shapes `(d_i, d_{i-1})` of the layers of a network of the given widths."""
    return [(above, below) for below, above in itertools.pairwise(widths)]


def population_rows(
    normals: Float[Array, "batch channels"], data: Regression, root: Float[Array, "d_in d_in"]
) -> tuple[Float[Array, "batch d_in"], Float[Array, "batch d_out"]]:
    r"""Rows of a Gaussian population: $x = S^{1/2} z$, $y = T x + \Sigma_\eta^{1/2} z'$."""
    x = product(normals[:, : data.d_in], root)
    best = product(x, data.best_map, (1, 1))
    return x, best + product(normals[:, data.d_in :], data.residual_sqrt)


def symmetric_normal(normals: Float[Array, "d d"]) -> Float[Array, "d d"]:
    r"""$(\Xi + \Xi^\top)/\sqrt2$: the covariance of $z z^\top - I$ for a standard normal $z$."""
    return (normals + normals.T) * jnp.sqrt(jnp.asarray(0.5, normals.dtype))
