"""Noise on the weights, and its anticorrelated form (anti-PGD)."""

from functools import partial
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar
from gradflow.checks import as_layers, as_parameter, check_layers, check_std, check_within
from gradflow.random.streams import Stream
from gradflow.regularizers.base import REGULARIZERS, AbstractWeightNoise, layer_shapes


@REGULARIZERS.register
class WeightNoise(AbstractWeightNoise):
    r"""Isotropic Gaussian noise on the weights, $W \to W + \sigma\,\xi$, one draw a step.

    The gradient of a step is taken at the perturbed weights, which all rows share. The expected
    loss is

    $$\bar L = L + \tfrac{\sigma^2}{2} \mathrm{tr} H + \tfrac{\sigma^4}{2} d_1 d_2\, \mathrm{tr} S$$

    at depth 2 and $L + \tfrac{\sigma^2}{2} \mathrm{tr} H + O(\sigma^4)$ beyond; the recursion
    $S_l = W_l S_{l-1} W_l^\top + \sigma^2\, \mathrm{tr} S_{l-1}\, I$ is exact
    (docs/theory.md section 5).

    With `anticorrelated=True` the noise stays in the weights,
    $W_{k+1} = W_k - h\, g(W_k) + \sigma (\xi_{k+1} - \xi_k)$ with $\xi_0 = 0$ (anti-PGD; Orvieto et
    al. 2022). Then $Z = W - \sigma\,\xi$ obeys $Z_{k+1} = Z_k - h\, g(Z_k + \sigma\,\xi_k)$: plain
    noise on the weights $Z$. So flows describe $Z$ and are the same for both forms (with penalties,
    which descent takes at $W$, the same up to their noise); a discrete run records $W$.

    **Arguments:**

    - `std`: $\sigma \ge 0$, in units of the weights.
    - `anticorrelated`: leave the noise in the weights of discrete training.
    - `layers`: the layers whose weights are noisy, numbers in 1..N; all by default.
    """

    std: Scalar = eqx.field(converter=partial(as_parameter, name="WeightNoise.std"))
    anticorrelated: bool = eqx.field(static=True, default=False)
    layers: tuple[int, ...] | None = eqx.field(static=True, default=None, converter=as_layers)

    def __check_init__(self):
        check_std("WeightNoise.std", self.std)
        if not isinstance(self.anticorrelated, bool):
            raise TypeError(
                f"WeightNoise.anticorrelated must be True or False; got {self.anticorrelated!r}."
            )
        check_layers("WeightNoise.layers", self.layers)

    @property
    def is_stochastic(self) -> bool:
        """True."""
        return True

    @property
    def is_shift(self) -> bool:
        """Whether the noise is anticorrelated."""
        return self.anticorrelated

    def check(self, depth: int) -> None:
        """Raise a `ValueError` if a network of this depth lacks a layer that should be noisy."""
        check_within("WeightNoise.layers", self.layers, depth)

    def acts_on(self, layer: int) -> bool:
        """Whether the weights of layer `layer` are noisy."""
        return self.layers is None or layer in self.layers

    def weight_variance(
        self,
        layer: int,
        depth: int,
        w: Float[Array, "d_l d_below"],
        variance: Float[Array, "d_l d_below"],
    ) -> Float[Array, "d_l d_below"]:
        r"""$V + \sigma^2$."""
        return variance + self.std**2 if self.acts_on(layer) else variance

    def draw(self, stream: Stream, widths: tuple[int, ...]) -> Any:
        """Normals, one `(K, d_l, d_{l-1}, R)` array a noisy layer."""
        return tuple(
            stream.substream(layer).normals(shape) if self.acts_on(layer) else None
            for layer, shape in enumerate(layer_shapes(widths), start=1)
        )

    def perturb_weight(
        self, draw: Any, layer: int, depth: int, w: Float[Array, "d_l d_below"]
    ) -> Float[Array, "d_l d_below"]:
        r"""$W_l + \sigma\,\xi_l$."""
        return w + self.std * draw[layer - 1] if self.acts_on(layer) else w
