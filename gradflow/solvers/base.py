"""What the step-size controllers that wrap another one have in common."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from gradflow.backend.types import Scalar


class AbstractWrappingController(diffrax.AbstractAdaptiveStepSizeController):
    """A step-size controller around another one, whose tolerances and norm it shows."""

    controller: eqx.AbstractVar[diffrax.AbstractAdaptiveStepSizeController]

    @property
    def rtol(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """Relative tolerance of the wrapped controller."""
        return self.controller.rtol

    @property
    def atol(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """Absolute tolerance of the wrapped controller."""
        return self.controller.atol

    @property
    def norm(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Error norm of the wrapped controller."""
        return self.controller.norm

    def wrap(self, direction: Any) -> "AbstractWrappingController":
        """Pass the direction of integration on to the wrapped controller."""
        return eqx.tree_at(lambda c: c.controller, self, self.controller.wrap(direction))


def largest(state: Any) -> Scalar:
    """The largest absolute value in a state, without a derivative."""
    leaves = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(state) if leaf.size]
    return jax.lax.stop_gradient(jnp.max(jnp.stack(leaves)))
