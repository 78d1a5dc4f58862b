"""Isotropic noise on the gradient (Langevin)."""

from functools import partial

import equinox as eqx

from gradflow.backend.types import Scalar
from gradflow.checks import as_parameter, check_std
from gradflow.regularizers.base import REGULARIZERS, AbstractGradientNoise


@REGULARIZERS.register
class GradientNoise(AbstractGradientNoise):
    r"""Fresh Gaussian noise on every entry of the gradient at every step, $g \to g + s\,\xi$.

    A step of descent moves every weight by $h s\,\xi$, the stochastic flow by $\sqrt h\, s\, dB$.
    The expected loss does not change. The noise knows nothing of the network, so imbalance does not
    decay by it: $G_i$ drifts by $h s^2 (d_{i+1} - d_{i-1})\, I$ per unit of flow time
    (docs/theory.md section 5).

    **Arguments:**

    - `std`: $s \ge 0$, in units of the gradient.
    """

    std: Scalar = eqx.field(converter=partial(as_parameter, name="GradientNoise.std"))

    def __check_init__(self):
        check_std("GradientNoise.std", self.std)

    @property
    def is_stochastic(self) -> bool:
        """True."""
        return True

    def level(self, layer: int, depth: int) -> Scalar:
        """`std` in every layer."""
        return self.std
