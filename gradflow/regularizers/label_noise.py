"""Label noise."""

from functools import partial

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.products import product
from gradflow.backend.types import EndToEnd, Scalar
from gradflow.checks import as_parameter, check_std
from gradflow.data import Regression
from gradflow.regularizers.base import REGULARIZERS, AbstractDataNoise, NoiseMoments


@REGULARIZERS.register
class LabelNoise(AbstractDataNoise):
    r"""Fresh Gaussian noise on every label at every step, $y \to y + s\,\varepsilon$.

    The end-to-end gradient gains $-\tfrac{s}{b} \sum_k \varepsilon_k \tilde x_k^\top$ over a batch
    of $b$ samples: covariance $\tfrac{s^2}{b} I \otimes (S_{xx} + \sigma^2 I)$ with input noise of
    variance $\sigma^2$. The expected loss changes by a constant, which is left out.
    (Blanc, Gupta, Valiant, Valiant 2020; Damian, Ma, Lee 2021.)

    **Arguments:**

    - `std`: $s \ge 0$, in units of the targets.
    """

    std: Scalar = eqx.field(converter=partial(as_parameter, name="LabelNoise.std"))

    def __check_init__(self):
        check_std("LabelNoise.std", self.std)

    @property
    def is_stochastic(self) -> bool:
        """True."""
        return True

    def is_linear(self) -> bool:
        """True: the gradient is linear in the labels."""
        return True

    def input_variance(self) -> Scalar:
        """Zero: the inputs stay clean."""
        return jnp.zeros_like(self.std)

    def draw_shape(self, batch: int, data: Regression) -> tuple[int, ...]:
        """One number per sample and output."""
        return (batch, data.d_out)

    def perturb(
        self,
        normals: Array,
        x: Float[Array, "batch d_in"],
        y: Float[Array, "batch d_out"],
    ) -> tuple[Float[Array, "batch d_in"], Float[Array, "batch d_out"]]:
        r"""$(x, y + s\,\varepsilon)$."""
        return x, y + self.std * normals

    def normal_shape(self, data: Regression) -> tuple[int, ...]:
        """`(d_N, d_0)` normals, whatever the number of samples."""
        return (data.d_out, data.d_in)

    def increment(self, moments: NoiseMoments, normals: Array) -> EndToEnd:
        r"""$\tfrac{s}{\sqrt b}\, \Xi\, (S + \sigma^2 I)^{1/2}$."""
        return self.std / jnp.sqrt(moments.batch) * product(normals, moments.noisy_root)

    def covariance(self, moments: NoiseMoments) -> Float[Array, "outputs outputs"]:
        r"""$\tfrac{s^2}{b}\, I \otimes (S + \sigma^2 I)$."""
        outputs = jnp.eye(moments.p.shape[0], dtype=moments.p.dtype)
        inputs = moments.noisy_root @ moments.noisy_root
        return self.std**2 / moments.batch * jnp.kron(outputs, inputs)

    @property
    def is_multiplicative(self) -> bool:
        """False."""
        return False

    def feedback(
        self, moments: NoiseMoments, spread: Float[Array, "d_out d_in d_out d_in"]
    ) -> Float[Array, "d_out d_in d_out d_in"]:
        """Zero: the noise does not depend on the network."""
        return jnp.zeros_like(spread)
