r"""The noise on the data as it acts on the whitened end-to-end gradient."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.products import product
from gradflow.backend.types import Weights
from gradflow.geometry.base import OutputLoss
from gradflow.problem import Problem
from gradflow.regularizers.base import NoiseMoments
from gradflow.regularizers.diffusion import data_sources


class DataNoise(eqx.Module):
    r"""Covariance of $\mathrm{vec}(\tilde M S^{-1/2})$, in which noise reaches $x$ through $K$."""

    problem: Problem
    moments: NoiseMoments
    inverse_root: Float[Array, "d_in d_in"]

    def __init__(self, problem: Problem, weights: Weights, loss: OutputLoss):
        self.problem = problem
        self.moments = problem.noise_moments(weights)
        self.inverse_root = loss.inverse_root

    @property
    def is_multiplicative(self) -> bool:
        """Whether the noise depends on the end-to-end matrix."""
        return any(r.is_multiplicative for r in data_sources(self.problem.regularizers))

    def own(self) -> Float[Array, "outputs outputs"]:
        """The noise at the minimum itself."""
        sources = data_sources(self.problem.regularizers)
        size = self.moments.p.size
        nothing = jnp.zeros((size, size), self.moments.p.dtype)
        return self._whitened(sum((r.covariance(self.moments) for r in sources), start=nothing))

    def fed_by(self, x: Float[Array, "outputs outputs"]) -> Float[Array, "outputs outputs"]:
        """The noise that fluctuations of $x$ with the given covariance add."""
        return self._whitened(self._fed_by_map(self._whitened(x)))

    def fed_along(
        self, ends: Float[Array, "outputs modes"], x: Float[Array, "modes modes"]
    ) -> Float[Array, "modes modes"]:
        r"""$E^\top F(E X E^\top) E$: `fed_by` for $x$ in coordinates, $E$ of `coordinates`."""
        fed = self._fed_by_map(product(product(ends, x), ends, (1, 1)))
        return product(product(ends, fed, (0, 0)), ends)

    def coordinates(self, axes: Float[Array, "outputs modes"]) -> Float[Array, "outputs modes"]:
        r"""$(I \otimes S^{-1/2})\, V$: what $\rho = \mathrm{vec}(P - T)$ is along axes of $x$."""
        blocks = axes.reshape(*self.moments.p.shape, -1)
        return jnp.einsum("ij,ajm->aim", self.inverse_root, blocks).reshape(axes.shape)

    def _fed_by_map(self, spread: Float[Array, "outputs outputs"]) -> Array:
        """The noise on $M$ that fluctuations of the end-to-end matrix add."""
        shape = self.moments.p.shape * 2
        total = jnp.zeros(shape, spread.dtype)
        for r in data_sources(self.problem.regularizers):
            if r.is_multiplicative:
                total = total + r.feedback(self.moments, spread.reshape(shape))
        return total.reshape(spread.shape)

    def _whitened(self, c: Float[Array, "outputs outputs"]) -> Float[Array, "outputs outputs"]:
        r"""$(I \otimes S^{-1/2})\, C\, (I \otimes S^{-1/2})$."""
        d_out, d_in = self.moments.p.shape
        blocks = c.reshape(d_out, d_in, d_out, d_in)
        inverse = self.inverse_root
        return jnp.einsum("ij,ajcl,lk->aick", inverse, blocks, inverse).reshape(c.shape)
