"""Weight decay."""

from functools import partial

import equinox as eqx
import jax.numpy as jnp

from gradflow.backend.types import Scalar, Weights
from gradflow.checks import as_parameter, check_nonnegative
from gradflow.regularizers.base import REGULARIZERS, AbstractPenalty


@REGULARIZERS.register
class WeightDecay(AbstractPenalty):
    r"""The penalty $\tfrac{\lambda}{2} \sum_i |W_i|^2$.

    Under it gradient flow has $G_i(t) = G_i(0) e^{-2 \lambda t}$ exactly, for all matrices
    (theory: weight decay).

    **Arguments:**

    - `rate`: $\lambda \ge 0$, per unit of flow time.
    """

    rate: Scalar = eqx.field(converter=partial(as_parameter, name="WeightDecay.rate"))

    def __check_init__(self):
        check_nonnegative("WeightDecay.rate", self.rate)

    @property
    def is_stochastic(self) -> bool:
        """False: the penalty is deterministic."""
        return False

    def penalty(self, weights: Weights) -> Scalar:
        r"""$\tfrac{\lambda}{2} \sum_i |W_i|^2$."""
        return 0.5 * self.rate * sum((jnp.sum(w * w) for w in weights), start=jnp.zeros(()))

    def penalty_gradient(self, weights: Weights) -> Weights:
        r"""$\lambda W_i$."""
        return tuple(self.rate * w for w in weights)
