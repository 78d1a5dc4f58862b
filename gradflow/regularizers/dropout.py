"""Dropout."""

from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar
from gradflow.checks import as_layers, as_parameter, check_layers, check_rate
from gradflow.random.streams import Stream
from gradflow.regularizers.base import REGULARIZERS, AbstractActivationNoise


@REGULARIZERS.register
class Dropout(AbstractActivationNoise):
    r"""Every hidden activation is multiplied by a random factor of mean 1, fresh for every row.

    Factors are 0 with probability $p$ and $1/(1-p)$ otherwise (Bernoulli), or $1 + \sqrt\alpha\, z$
    with a standard normal $z$ (Gaussian); both have the variance $\alpha = p/(1-p)$. The expected
    loss gains

    $$R = \tfrac{\alpha}{2} \sum_k |W_2[:, k]|^2\, (W_1 S W_1^\top)_{kk}$$

    at depth 2, and for any depth what the recursion $S_l = C_l + \alpha\, \mathrm{diag}\, C_l$ adds
    (docs/theory.md section 5). Its flow conserves the diagonal of every $G_i$, hence the imbalance.
    (Srivastava et al. 2014; Mianjy, Arora, Vidal 2018.)

    **Arguments:**

    - `rate`: $p$ in $[0, 1)$, the probability to drop.
    - `distribution`: `"bernoulli"` or `"gaussian"`.
    - `layers`: the hidden layers that drop, numbers in 1..N-1; all by default.
    """

    rate: Scalar = eqx.field(converter=partial(as_parameter, name="Dropout.rate"))
    distribution: str = eqx.field(static=True, default="bernoulli")
    layers: tuple[int, ...] | None = eqx.field(static=True, default=None, converter=as_layers)

    def __check_init__(self):
        check_rate("Dropout.rate", self.rate)
        if self.distribution not in ("bernoulli", "gaussian"):
            raise ValueError(
                'Dropout.distribution must be "bernoulli" or "gaussian"; got '
                f"{self.distribution!r}."
            )
        check_layers("Dropout.layers", self.layers)

    @property
    def is_stochastic(self) -> bool:
        """True."""
        return True

    def check(self, depth: int) -> None:
        """Raise a `ValueError` if a network of this depth lacks a hidden layer that should drop."""
        if depth == 1:
            raise ValueError(
                "Dropout acts on hidden activations, and a network of depth 1 has none; use a "
                "deeper network, or DropConnect, which acts on weights."
            )
        if self.layers is not None and self.layers[-1] >= depth:
            raise ValueError(
                f"Dropout.layers: {self.layers[-1]} is not a hidden layer of a network of depth "
                f"{depth}; choose from 1 to {depth - 1}."
            )

    def acts_on(self, layer: int, depth: int) -> bool:
        """Whether the activations of layer `layer` are dropped."""
        return layer < depth and (self.layers is None or layer in self.layers)

    def activation_variance(self, layer: int, depth: int) -> Scalar:
        r"""$\alpha = p/(1-p)$ on the layers that drop."""
        alpha = self.rate / (1.0 - self.rate)
        return alpha if self.acts_on(layer, depth) else jnp.zeros_like(alpha)

    def draw(self, stream: Stream, batch: int, widths: tuple[int, ...]) -> Any:
        """Kept or not (or normals), one `(K, batch, d_l, R)` array a hidden layer that drops."""
        depth = len(widths) - 1

        def one(layer: int) -> Array | None:
            own, shape = stream.substream(layer), (batch, widths[layer])
            if not self.acts_on(layer, depth):
                return None
            if self.distribution == "gaussian":
                return own.normals(shape)
            return own.booleans(1.0 - self.rate, shape)

        return tuple(one(layer) for layer in range(1, depth))

    def perturb_activation(
        self, draw: Any, layer: int, depth: int, h: Float[Array, "batch d_l"]
    ) -> Float[Array, "batch d_l"]:
        """The activations times their factors."""
        if not self.acts_on(layer, depth):
            return h
        if self.distribution == "gaussian":
            return h * (1.0 + jnp.sqrt(self.rate / (1.0 - self.rate)) * draw[layer - 1])
        return jnp.where(draw[layer - 1], h / (1.0 - self.rate), 0.0)
