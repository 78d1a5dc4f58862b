"""A problem: data plus regularizers, on which every dynamics acts."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.data import Regression
from gradflow.loss import pull_back
from gradflow.network import end_to_end
from gradflow.regularizers.averaged import (
    add_penalties,
    averaged_gradient,
    averaged_loss,
    input_moment,
    input_variance,
)
from gradflow.regularizers.base import (
    AbstractBatch,
    AbstractDataNoise,
    AbstractLayerNoise,
    AbstractPenalty,
    AbstractRegularizer,
    NoiseMoments,
)
from gradflow.regularizers.diffusion import end_to_end_increment, normal_shapes
from gradflow.regularizers.sampled import draw_noise, sampled_gradient
from gradflow.streams import Stream
from gradflow.types import EndToEnd, Scalar, Weights


class Problem(eqx.Module):
    """Regression data together with the regularizers that act on it.

    **Arguments:**

    - `data`: a `Regression`.
    - `regularizers`: any combination of regularizers; at most one `Minibatch` and one
        `InputNoise`.

    **Raises:** `TypeError` for something that is not a regularizer, `ValueError` for a combination
    that has no meaning.
    """

    data: Regression
    regularizers: tuple[AbstractRegularizer, ...]
    root: Float[Array, "d_in d_in"]
    inverse_root: Float[Array, "d_in d_in"]
    noisy_root: Float[Array, "d_in d_in"]
    noisy_inverse_root: Float[Array, "d_in d_in"]

    def __init__(self, data: Regression, regularizers: Sequence[AbstractRegularizer] = ()):
        if not isinstance(data, Regression):
            raise TypeError(f"Problem.data must be a Regression; got {type(data).__name__}.")
        if isinstance(regularizers, AbstractRegularizer):
            name = type(regularizers).__name__
            raise TypeError(f"Problem.regularizers must be a list; write [{name}(...)].")
        for r in regularizers:
            if not isinstance(r, AbstractRegularizer):
                raise TypeError(
                    "Problem.regularizers must hold regularizers such as LabelNoise(std); got "
                    f"{type(r).__name__}."
                )
        kinds = [type(r).__name__ for r in regularizers]
        for kind, fix in (
            ("Minibatch", "choose one batch size"),
            ("InputNoise", "give one with std = sqrt(std_1^2 + std_2^2)"),
        ):
            if kinds.count(kind) > 1:
                raise ValueError(
                    f"Problem.regularizers: {kinds.count(kind)} x {kind} given; {fix}."
                )
        for r in regularizers:
            if isinstance(r, AbstractBatch):
                r.check(data)
        self.data = data
        self.regularizers = tuple(regularizers)
        values, vectors = data.sxx_eigenvalues, data.sxx_eigenvectors
        noisy = values + self.input_variance
        self.root = (vectors * jnp.sqrt(values)) @ vectors.T
        self.inverse_root = (vectors * _inverse_roots(values)) @ vectors.T
        self.noisy_root = (vectors * jnp.sqrt(noisy)) @ vectors.T
        self.noisy_inverse_root = (vectors * _inverse_roots(noisy)) @ vectors.T

    @property
    def is_stochastic(self) -> bool:
        """Whether discrete training on this problem is random."""
        return any(r.is_stochastic for r in self.regularizers)

    @property
    def minibatch(self) -> AbstractBatch | None:
        """The rule that chooses the rows of a step, or None for all rows."""
        return next((r for r in self.regularizers if isinstance(r, AbstractBatch)), None)

    @property
    def data_noise(self) -> tuple[AbstractDataNoise, ...]:
        """The noises on inputs and labels."""
        return tuple(r for r in self.regularizers if isinstance(r, AbstractDataNoise))

    @property
    def layer_noise(self) -> tuple[AbstractLayerNoise, ...]:
        """The noises inside the network."""
        return tuple(r for r in self.regularizers if isinstance(r, AbstractLayerNoise))

    @property
    def penalties(self) -> tuple[AbstractPenalty, ...]:
        """The deterministic terms added to the loss."""
        return tuple(r for r in self.regularizers if isinstance(r, AbstractPenalty))

    @property
    def input_variance(self) -> Scalar:
        r"""The total variance $\sigma^2$ of the noise on each input coordinate."""
        return input_variance(self.regularizers)

    @property
    def input_moment(self) -> Float[Array, "d_in d_in"]:
        r"""The second moment of the perturbed inputs $\bar S = S_{xx} + \sigma^2 I$."""
        return input_moment(self.data, self.regularizers)

    @property
    def batch(self) -> Scalar:
        """The number of samples whose noise is averaged in one step."""
        rule = self.minibatch
        return self.data.n if rule is None else jnp.asarray(float(rule.size()))

    def averaged_loss(self, weights: Weights) -> Scalar:
        r"""The exact expected loss $\bar L(W)$, penalties included; it drives the flows."""
        return averaged_loss(weights, self.data, self.regularizers)

    def averaged_gradient(self, weights: Weights) -> Weights:
        r"""$\nabla \bar L(W)$, one array a layer."""
        return averaged_gradient(weights, self.data, self.regularizers)

    def noise_moments(self, weights: Weights) -> NoiseMoments:
        """The moments from which the diffusion factors are built."""
        p = end_to_end(weights)
        return NoiseMoments(
            p=p,
            m=p @ self.data.sxx - self.data.syx,
            root=self.root,
            inverse_root=self.inverse_root,
            noisy_root=self.noisy_root,
            residual_root=self.data.residual_sqrt,
            batch=self.batch,
            data=self.data,
        )

    def normal_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the standard normals that one draw of the diffusion takes."""
        return normal_shapes(self.data, self.regularizers)

    def end_to_end_increment(self, weights: Weights, normals: tuple[Array, ...]) -> EndToEnd:
        r"""The diffusion factor applied to normals: Gaussian noise on $M$ with its covariance."""
        return end_to_end_increment(self.regularizers, self.noise_moments(weights), normals)

    def noise(self, weights: Weights, normals: tuple[Array, ...]) -> Weights:
        r"""$B(W)\,\zeta$ with $B B^\top$ the covariance of the stochastic gradient."""
        return pull_back(weights, self.end_to_end_increment(weights, normals))

    def draw(self, stream: Stream, widths: tuple[int, ...]) -> Any:
        """The random numbers of a block of steps: a pytree of `(K, ..., R)` arrays."""
        return draw_noise(self.data, self.regularizers, stream, widths)

    def sampled_gradient(self, weights: Weights, draw: Any) -> Weights:
        """The stochastic gradient of one step of one path under a draw; exact."""
        moments = self.noise_moments(weights)
        return sampled_gradient(self.data, self.regularizers, weights, moments, draw)

    def add_penalties(self, gradient: Weights, weights: Weights) -> Weights:
        """The gradient plus the gradients of all penalties."""
        return add_penalties(gradient, weights, self.regularizers)


def _inverse_roots(values: Float[Array, " d_in"]) -> Float[Array, " d_in"]:
    r"""$\lambda^{-1/2}$, and 0 where the eigenvalue is 0 up to rounding."""
    cutoff = jnp.max(values) * values.size * jnp.finfo(values.dtype).eps
    kept = values > cutoff
    return jnp.where(kept, 1.0 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)
