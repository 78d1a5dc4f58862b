"""A problem: data plus regularizers, on which every dynamics acts."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.compiled import compiled
from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.data import Regression
from gradflow.data.roots import inverse_root, matrix_root
from gradflow.loss import on_inputs, pull_back
from gradflow.network import end_to_end
from gradflow.random.streams import Stream
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
    AbstractGradientNoise,
    AbstractLayerNoise,
    AbstractPenalty,
    AbstractRegularizer,
    AbstractWeightNoise,
    NoiseMoments,
)
from gradflow.regularizers.diffusion import (
    check_factor,
    draw_normals,
    end_to_end_increment,
    gradient_increment,
    has_diffusion_factor,
    normal_shapes,
)
from gradflow.regularizers.sampled import (
    draw_noise,
    is_gaussian,
    sampled_gradient,
    sampled_loss,
    weight_shift,
)
from gradflow.regularizers.weight_decay import WeightDecay


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
        self.root, self.inverse_root = _roots(data.sxx, values, vectors)
        self.noisy_root, self.noisy_inverse_root = _roots(self.input_moment, noisy, vectors)

    def __repr__(self) -> str:
        return f"Problem({self.data!r}, [{', '.join(map(repr, self.regularizers))}])"

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
        """The noises inside the network, on its weights or its hidden activations."""
        return tuple(r for r in self.regularizers if isinstance(r, AbstractLayerNoise))

    @property
    def has_gradient_noise(self) -> bool:
        """Whether there is noise on the gradient that does not depend on the weights."""
        return any(isinstance(r, AbstractGradientNoise) for r in self.regularizers)

    @property
    def has_weight_shift(self) -> bool:
        """Whether a discrete dynamics adds noise to the weights themselves: see `weight_shift`."""
        return any(isinstance(r, AbstractWeightNoise) and r.is_shift for r in self.regularizers)

    @property
    def has_diffusion_factor(self) -> bool:
        """Whether the covariance of the stochastic gradient has a closed factor: `noise`."""
        return has_diffusion_factor(self.regularizers)

    @property
    def is_gaussian(self) -> bool:
        """Whether one step of SGD is Gaussian given the weights.

        Then `sampled_gradient` is exactly `averaged_gradient` plus `noise`, and `draw` and
        `draw_normals` give the same numbers for the same stream.
        """
        return is_gaussian(self.data, self.regularizers)

    @property
    def penalties(self) -> tuple[AbstractPenalty, ...]:
        """The deterministic terms added to the loss."""
        return tuple(r for r in self.regularizers if isinstance(r, AbstractPenalty))

    @property
    def weight_decay(self) -> Scalar:
        r"""The total rate $\lambda$ of weight decay (0 without any)."""
        rates = (p.rate for p in self.penalties if isinstance(p, WeightDecay))
        return sum(rates, start=jnp.zeros((), self.data.sxx.dtype))

    @property
    def other_penalties(self) -> tuple[AbstractPenalty, ...]:
        """The penalties beside weight decay."""
        return tuple(p for p in self.penalties if not isinstance(p, WeightDecay))

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
            m=on_inputs(p, self.data) - self.data.syx,
            root=self.root,
            inverse_root=self.inverse_root,
            noisy_root=self.noisy_root,
            residual_root=self.data.residual_sqrt,
            batch=self.batch,
            data=self.data,
        )

    def normal_shapes(self, widths: tuple[int, ...]) -> tuple[Any, Any]:
        """The shapes of one draw of `draw_normals`, as `jax.ShapeDtypeStruct`.

        **Raises:** `ValueError` for noise inside the network, which has no closed factor.
        """
        return normal_shapes(self.data, self.regularizers, widths)

    def draw_normals(self, stream: Stream, widths: tuple[int, ...]) -> tuple[Any, Any]:
        """The normals of a block of steps: a pytree of `(K, ..., R)` arrays.

        A pair: the normals of `end_to_end_increment` and those of `gradient_noise`.

        **Raises:** `ValueError` for noise inside the network, which has no closed factor.
        """
        return draw_normals(self.data, self.regularizers, stream, widths)

    def end_to_end_increment(self, weights: Weights, data_normals: tuple[Array, ...]) -> EndToEnd:
        r"""The diffusion factor of the data noise: Gaussian noise on $M$ with its covariance.

        **Raises:** `ValueError` for noise inside the network, which has no closed factor.
        """
        check_factor(self.regularizers)
        return end_to_end_increment(self.regularizers, self.noise_moments(weights), data_normals)

    def gradient_noise(self, gradient_normals: tuple[tuple[Array, ...], ...]) -> Weights:
        """The noise on the gradient that does not depend on the weights, one array a layer.

        An empty tuple for a problem without `has_gradient_noise`.
        """
        return gradient_increment(self.regularizers, gradient_normals)

    def noise(self, weights: Weights, normals: tuple[Any, Any]) -> Weights:
        r"""$B(W)\,\zeta$ with $B B^\top$ the covariance of the stochastic gradient.

        **Raises:** `ValueError` for noise inside the network, which has no closed factor.
        """
        data_normals, gradient_normals = normals
        noise = pull_back(weights, self.end_to_end_increment(weights, data_normals))
        if not self.has_gradient_noise:
            return noise
        extra = self.gradient_noise(gradient_normals)
        return tuple(a + b for a, b in zip(noise, extra, strict=True))

    def draw(self, stream: Stream, widths: tuple[int, ...]) -> Any:
        """The random numbers of a block of steps: a pytree of `(K, ..., R)` arrays."""
        return draw_noise(self.data, self.regularizers, stream, widths)

    def sampled_gradient(self, weights: Weights, draw: Any, penalties: bool = True) -> Weights:
        """The stochastic gradient of one step of one path under a draw; exact.

        Its expectation is `averaged_gradient`; with `has_weight_shift` that of the gradient at
        `weights` plus `weight_shift`. `penalties=False` leaves the penalties out.
        """
        return sampled_gradient(
            self.data, self.regularizers, weights, self.noise_moments, draw, penalties
        )

    def sampled_loss(self, weights: Weights, draw: Any, penalties: bool = True) -> Scalar:
        """The loss of one step of one path under a draw, whose gradient `sampled_gradient` is.

        **Raises:** `ValueError` where no loss has that gradient.
        """
        return sampled_loss(
            self.data, self.regularizers, weights, self.noise_moments, draw, penalties
        )

    def weight_shift(self, weights: Weights, draw: Any) -> Weights:
        r"""The noise $\xi$ of a draw that stays in the weights; zeros without `has_weight_shift`.

        A discrete dynamics adds $\xi_{k+1} - \xi_k$ to the weights in step $k$, with $\xi_{k+1}$
        the shift of the draw of step $k$ and $\xi_0 = 0$. Then $Z = W - \xi$ moves by
        $-h\, \tilde g(Z_k + \xi_k)$: plain noise on the weights $Z$, which the averaged face and
        the flows describe.
        """
        return weight_shift(self.regularizers, weights, draw)

    def centred_gradient(self, weights: Weights, draw: Any) -> Weights:
        """The noise of the stochastic gradient under a draw: mean zero, exact covariance.

        With `has_weight_shift` the weights are those without the shift. Where the covariance has no
        closed factor this is the increment of a stochastic flow.
        """
        at = weights
        if self.has_weight_shift:
            shift = self.weight_shift(weights, draw)
            at = tuple(w + s for w, s in zip(weights, shift, strict=True))
        # Penalties cancel, except that a shift moves the weights that they see.
        kept = self.has_weight_shift
        g = self.sampled_gradient(at, draw, kept)
        mean = averaged_gradient(weights, self.data, self.regularizers, kept)
        return tuple(a - b for a, b in zip(g, mean, strict=True))

    def add_penalties(self, gradient: Weights, weights: Weights) -> Weights:
        """The gradient plus the gradients of all penalties."""
        return add_penalties(gradient, weights, self.regularizers)


@compiled
def _roots(
    moment: Float[Array, "d_0 d_0"], values: Float[Array, " d_0"], vectors: Float[Array, "d_0 d_0"]
) -> tuple[Float[Array, "d_0 d_0"], Float[Array, "d_0 d_0"]]:
    """The root of a second moment with the given eigenpairs, and its inverse."""
    return matrix_root(moment, values, vectors), inverse_root(moment, values, vectors)
