"""Input noise (noise augmentation)."""

from functools import partial

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.products import product
from gradflow.backend.types import EndToEnd, Scalar
from gradflow.checks import as_parameter, check_std
from gradflow.data import Regression
from gradflow.regularizers.base import (
    REGULARIZERS,
    AbstractDataNoise,
    NoiseMoments,
    symmetric_normal,
)


@REGULARIZERS.register
class InputNoise(AbstractDataNoise):
    r"""Fresh isotropic Gaussian noise on every input at every step, $x \to x + \sigma\,\xi$.

    The expected loss is $L + \tfrac{\sigma^2}{2} |P|^2$ (Bishop 1995); its flow conserves every
    $G_i$, so imbalance decays by the noise of the gradient alone. The covariance of the sample
    gradient $(e + P\xi)(x + \xi)^\top$ is exact to all orders in $\sigma$
    (docs/theory.md section 5).

    On population data without `Minibatch` there are no rows to perturb: the sampled gradient then
    has the exact mean and covariance and Gaussian shape.

    **Arguments:**

    - `std`: $\sigma \ge 0$, in units of the inputs.
    """

    std: Scalar = eqx.field(converter=partial(as_parameter, name="InputNoise.std"))

    def __check_init__(self):
        check_std("InputNoise.std", self.std)

    @property
    def is_stochastic(self) -> bool:
        """True."""
        return True

    def is_linear(self) -> bool:
        """False: the gradient has a term quadratic in the input noise."""
        return False

    def input_variance(self) -> Scalar:
        r"""$\sigma^2$."""
        return self.std**2

    def draw_shape(self, batch: int, data: Regression) -> tuple[int, ...]:
        """One number per sample and input."""
        return (batch, data.d_in)

    def perturb(
        self,
        normals: Array,
        x: Float[Array, "batch d_in"],
        y: Float[Array, "batch d_out"],
    ) -> tuple[Float[Array, "batch d_in"], Float[Array, "batch d_out"]]:
        r"""$(x + \sigma\,\xi, y)$."""
        return x + self.std * normals, y

    def normal_shape(self, data: Regression) -> tuple[int, ...]:
        """`(2 d_0 + d_N, d_0)` normals: input part, residual part and quadratic part."""
        return (2 * data.d_in + data.d_out, data.d_in)

    def increment(self, moments: NoiseMoments, normals: Array) -> EndToEnd:
        r"""The factor of $E_k\,\mathrm{Cov}[m_k]/b$, closed form in $3$ independent parts:

        $$\tfrac{\sigma}{\sqrt b} \left( M S^{-1/2} \Xi_1 + P\, \Xi_1^\top S^{1/2}
          + \Sigma_\eta^{1/2} \Xi_2 \right)
          + \tfrac{\sigma^2}{\sqrt b} P\, \tfrac{\Xi_3 + \Xi_3^\top}{\sqrt 2}.$$
        """
        d_in = moments.root.shape[0]
        first, residual, quadratic = jnp.split(normals, (d_in, normals.shape[0] - d_in))
        linear = (
            product(product(moments.m, moments.inverse_root), first)
            + product(product(moments.p, first, (1, 1)), moments.root)
            + product(moments.residual_root, residual)
        )
        square = product(moments.p, symmetric_normal(quadratic))
        return self.std / jnp.sqrt(moments.batch) * (linear + self.std * square)

    def covariance(self, moments: NoiseMoments) -> Float[Array, "outputs outputs"]:
        r"""That of `increment`, with $V = M S^{-1/2}$ and $Q = P P^\top$, for the entries $ai, ck$:

        $$\tfrac{\sigma^2}{b} \big( (V V^\top + \Sigma_\eta)_{ac}\, \delta_{ik} + Q_{ac} S_{ik}
          + M_{ak} P_{ci} + P_{ak} M_{ci}
          + \sigma^2 ( Q_{ac}\, \delta_{ik} + P_{ak} P_{ci} ) \big).$$
        """
        s, p, m = moments.root @ moments.root, moments.p, moments.m
        whitened = m @ moments.inverse_root
        residual = moments.residual_root @ moments.residual_root.T
        q, one = p @ p.T, jnp.eye(s.shape[0], dtype=s.dtype)

        def crossed(
            left: Float[Array, "d_out d_in"], right: Float[Array, "d_out d_in"]
        ) -> Float[Array, "d_out d_in d_out d_in"]:
            return jnp.einsum("ak,ci->aick", left, right)

        alike = whitened @ whitened.T + residual + self.std**2 * q
        total = jnp.einsum("ac,ik->aick", alike, one) + jnp.einsum("ac,ik->aick", q, s)
        total = total + crossed(m, p) + crossed(p, m) + self.std**2 * crossed(p, p)
        return self.std**2 / moments.batch * total.reshape(p.size, p.size)

    @property
    def is_multiplicative(self) -> bool:
        """True."""
        return True

    def feedback(
        self, moments: NoiseMoments, spread: Float[Array, "d_out d_in d_out d_in"]
    ) -> Float[Array, "d_out d_in d_out d_in"]:
        r"""$E[\rho\, (z z^\top - E z z^\top)]$ squared, with $z = x + \sigma\,\xi$ given $x$.

        By Isserlis, with $X_{ac} = E[\rho_a \rho_c^\top]$,

        $$\tfrac{\sigma^2}{b} \left( \mathrm{tr}(S X_{ac})\, I + \mathrm{tr}(X_{ac})\, S
          + X_{ac}^\top S + S X_{ac}^\top \right)
          + \tfrac{\sigma^4}{b} \left( \mathrm{tr}(X_{ac})\, I + X_{ac}^\top \right).$$
        """
        s = moments.root @ moments.root
        identity = jnp.eye(s.shape[0], dtype=s.dtype)
        turned = jnp.einsum("akci->aick", spread)
        traces = jnp.einsum("ajcj->ac", spread)
        linear = (
            jnp.einsum("jl,ajcl,ik->aick", s, spread, identity)
            + jnp.einsum("ac,ik->aick", traces, s)
            + jnp.einsum("aicl,lk->aick", turned, s)
            + jnp.einsum("il,alck->aick", s, turned)
        )
        square = jnp.einsum("ac,ik->aick", traces, identity) + turned
        return self.std**2 / moments.batch * (linear + self.std**2 * square)
