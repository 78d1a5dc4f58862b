"""DropConnect."""

from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar
from gradflow.checks import as_layers, as_parameter, check_layers, check_rate, check_within
from gradflow.random.streams import Stream
from gradflow.regularizers.base import REGULARIZERS, AbstractWeightNoise, layer_shapes


@REGULARIZERS.register
class DropConnect(AbstractWeightNoise):
    r"""Every weight is dropped with probability $p$ or divided by $1 - p$, one mask a step.

    All rows of a step share the mask. The expected loss follows from the recursion
    $S_l = W_l S_{l-1} W_l^\top + \alpha\, \mathrm{diag}(W_l^{\odot 2}\, \mathrm{diag}\, S_{l-1})$
    with $\alpha = p/(1-p)$
    (docs/theory.md section 5). Its flow conserves the diagonal of every $G_i$,
    hence the imbalance. (Wan et al. 2013.)

    **Arguments:**

    - `rate`: $p$ in $[0, 1)$, the probability to drop.
    - `layers`: the layers whose weights drop, numbers in 1..N; all by default.
    """

    rate: Scalar = eqx.field(converter=partial(as_parameter, name="DropConnect.rate"))
    layers: tuple[int, ...] | None = eqx.field(static=True, default=None, converter=as_layers)

    def __check_init__(self):
        check_rate("DropConnect.rate", self.rate)
        check_layers("DropConnect.layers", self.layers)

    @property
    def is_stochastic(self) -> bool:
        """True."""
        return True

    @property
    def is_shift(self) -> bool:
        """False: the mask acts in the forward and backward pass only."""
        return False

    def check(self, depth: int) -> None:
        """Raise a `ValueError` if a network of this depth lacks a layer that should drop."""
        check_within("DropConnect.layers", self.layers, depth)

    def acts_on(self, layer: int) -> bool:
        """Whether the weights of layer `layer` are dropped."""
        return self.layers is None or layer in self.layers

    def weight_variance(
        self,
        layer: int,
        depth: int,
        w: Float[Array, "d_l d_below"],
        variance: Float[Array, "d_l d_below"],
    ) -> Float[Array, "d_l d_below"]:
        r"""$V + \alpha (V + W^{\odot 2})$."""
        if not self.acts_on(layer):
            return variance
        return variance + self.rate / (1.0 - self.rate) * (variance + w**2)

    def draw(self, stream: Stream, widths: tuple[int, ...]) -> Any:
        """Kept or not, one `(K, d_l, d_{l-1}, R)` array a layer that drops."""
        return tuple(
            stream.substream(layer).booleans(1.0 - self.rate, shape)
            if self.acts_on(layer)
            else None
            for layer, shape in enumerate(layer_shapes(widths), start=1)
        )

    def perturb_weight(
        self, draw: Any, layer: int, depth: int, w: Float[Array, "d_l d_below"]
    ) -> Float[Array, "d_l d_below"]:
        """The kept weights, divided by the probability to be kept."""
        if not self.acts_on(layer):
            return w
        return jnp.where(draw[layer - 1], w / (1.0 - self.rate), 0.0)
