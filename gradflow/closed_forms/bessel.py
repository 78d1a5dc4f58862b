r"""Ratios of modified Bessel functions of neighbouring real orders, to rounding, for any size.

SciPy's `ive` and `kve` under- or overflow at large orders and small arguments, and differences of
their logarithms lose all digits; what the flow needs are ratios, which are computed here directly.
Orders are $\mu \pm \tfrac12$ with $\mu \ge 0$.
"""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from gradflow.backend.types import Scalar

LARGE = 30.0
"""From $\\sqrt{\\mu^2 + s^2}$ of about this on, the uniform expansion is exact to rounding."""

SERIES_TERMS = 100
NODES = 448
DEBYE_TERMS = 20


def _debye_polynomials(count: int) -> np.ndarray:
    r"""Coefficients of $v_k$ with $u_k(p) = p^k v_k(p^2)$, `(count, count)`; DLMF 10.41.9."""
    u = {0: Fraction(1)}
    table = np.zeros((count, count))
    for k in range(count):
        for power, value in u.items():
            table[k, (power - k) // 2] = float(value)
        following: dict[int, Fraction] = {}
        for power, value in u.items():
            half = Fraction(power, 2) * value
            eighth = value / 8
            for where, what in (
                (power + 1, half + eighth / (power + 1)),
                (power + 3, -half - 5 * eighth / (power + 3)),
            ):
                following[where] = following.get(where, Fraction(0)) + what
        u = following
    return table


_DEBYE = _debye_polynomials(DEBYE_TERMS)


def _expansion_tail(
    order: Scalar, s: Scalar, sign: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""$h = \sqrt{\nu^2 + s^2}$ and $\sum_{k \ge 1} (\pm 1)^k v_k(\nu^2/h^2) / h^k$."""
    h = jnp.hypot(order, s)
    k = jnp.arange(DEBYE_TERMS)
    values = jnp.asarray(_DEBYE) @ ((order / h) ** 2) ** k
    return h, jnp.sum((values * (sign / h) ** k)[1:])


def _log_ratio_large(mu: Scalar, s: Scalar, sign: float) -> Scalar:
    r"""$\log I_{\mu+1/2}/I_{\mu-1/2}$ (sign 1) or $\log K_{\mu-1/2}/K_{\mu+1/2}$ (sign -1)."""
    up, down = mu + 0.5, mu - 0.5
    h_up, tail_up = _expansion_tail(up, s, sign)
    h_down, tail_down = _expansion_tail(down, s, sign)
    rise = 2.0 * mu / (h_up + h_down)  # h_up - h_down
    exponent = rise - 0.5 * (jnp.arcsinh(up / s) + jnp.arcsinh(down / s))
    exponent = exponent - mu * jnp.log1p((1.0 + rise) / (down + h_down))
    amplitude = 0.5 * jnp.log1p(rise / h_down)
    change = jnp.log1p((tail_up - tail_down) / (1.0 + tail_down))
    return exponent - sign * amplitude + sign * change


def _series(order: Scalar, s: Scalar) -> Scalar:
    r"""$F_\nu = \sum_k (s^2/4)^k / (k!\,(\nu+1)_k)$, so that
    $I_\nu = (s/2)^\nu F_\nu / \Gamma(\nu + 1)$.
    """
    j = jnp.arange(1, SERIES_TERMS + 1)
    return 1.0 + jnp.sum(jnp.cumprod((0.5 * s) ** 2 / (j * (order + j))))


def _second_kind(mu: Scalar, s: Scalar) -> tuple[Scalar, Scalar]:
    r"""$K_{\mu-1/2}/K_{\mu+1/2}$ and 1 minus it, by $K_\nu = \int_0^\infty e^{-s \cosh x}
    \cosh \nu x\,dx$, whose trapezoidal rule converges faster than any power.
    """
    last = jnp.arccosh(1.0 + 1400.0 / s)
    x = last * (jnp.arange(NODES) / NODES)
    weight = jnp.where(jnp.arange(NODES) == 0, 0.5, 1.0)
    # Divided by e^{(mu + 1/2) x} at the largest term, so that nothing overflows.
    exponent = -2.0 * s * jnp.sinh(0.5 * x) ** 2 + (mu + 0.5) * x
    scale = weight * jnp.exp(exponent - jnp.max(exponent))
    up = jnp.sum(scale * (1.0 + jnp.exp(-2.0 * (mu + 0.5) * x)))
    down = jnp.sum(scale * (jnp.exp(-x) + jnp.exp(-2.0 * mu * x)))
    gap = jnp.sum(scale * jnp.expm1(-2.0 * mu * x) * jnp.expm1(-x))
    return down / up, gap / up


def bessel_ratios(mu: Scalar, s: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    r"""$R_I = I_{\mu+1/2}/I_{\mu-1/2}$, $R_K = K_{\mu-1/2}/K_{\mu+1/2}$ and $1 - R_K$ at $s > 0$.

    Relative accuracy near rounding for all $\mu \ge 0$ and $s \ge 10^{-17}$.
    """
    large = jnp.hypot(mu - 0.5, s) >= LARGE
    log_i = _log_ratio_large(mu, jnp.where(large, s, LARGE), 1.0)
    small, modest = jnp.where(large, 1.0, s), jnp.where(large, 1.0, mu)
    first = 0.5 * small / (modest + 0.5) * _series(modest + 0.5, small)
    first = first / _series(modest - 0.5, small)
    # The trapezoidal rule holds for every s; the difference 1 - R_K needs it at small mu.
    uniform = large & (mu >= 1.0)
    log_k = _log_ratio_large(mu, jnp.where(uniform, s, LARGE), -1.0)
    second, gap = _second_kind(jnp.where(uniform, 1.0, mu), jnp.where(uniform, 1.0, s))
    return (
        jnp.where(large, jnp.exp(log_i), first),
        jnp.where(uniform, jnp.exp(log_k), second),
        jnp.where(uniform, -jnp.expm1(log_k), gap),
    )


def reflected_ratio(mu: Scalar, s: Scalar) -> Scalar:
    r"""$I_{|\nu|}/I_\nu$ for $\nu = \mu - \tfrac12$: 1 unless $\mu < \tfrac12$, $s$ modest."""
    other = (mu < 0.5) & (s < LARGE)
    order, small = jnp.where(other, 0.5 - mu, 0.0), jnp.where(other, s, 1.0)
    log_ratio = 2.0 * order * jnp.log(0.5 * small) + gammaln(1.0 - order) - gammaln(1.0 + order)
    return jnp.exp(log_ratio) * _series(order, small) / _series(-order, small)


def log_first_kind_growth(mu: Scalar, s0: Scalar, x: Scalar) -> Scalar:
    r"""$\log I_\nu(s_0) - \log I_\nu(s_0 e^{-x})$ for $\nu = \mu - \tfrac12$ and $x \ge 0$."""
    order, s1 = mu - 0.5, s0 * jnp.exp(-x)
    large0, large1 = jnp.hypot(order, s0) >= LARGE, jnp.hypot(order, s1) >= LARGE
    (h0, tail0), (h1, tail1) = (
        _expansion_tail(order, jnp.where(large, s, LARGE), 1.0)
        for large, s in ((large0, s0), (large1, s1))
    )
    # Both large: the difference of the exponents without forming them.
    drop = -s0 * jnp.expm1(-2.0 * x) * (s0 / (h0 + h1))  # h0 - h1
    both = drop + order * (x - jnp.log1p(drop / (order + h1)))
    both = both - 0.5 * jnp.log1p(drop / h1) + jnp.log1p((tail0 - tail1) / (1.0 + tail1))
    modest = jnp.where(large1, 1.0, order)
    small1 = jnp.where(large1, 1.0, s1)
    log_series1 = jnp.log(_series(modest, small1))
    above = h0 - order * jnp.arcsinh(order / jnp.where(large0, s0, LARGE))
    above = above - 0.5 * jnp.log(2.0 * jnp.pi * h0) + jnp.log1p(tail0)
    below = modest * jnp.log(0.5 * small1) - gammaln(modest + 1.0) + log_series1
    neither = modest * x + jnp.log(_series(modest, jnp.where(large0, 1.0, s0))) - log_series1
    return jnp.where(large1, both, jnp.where(large0, above - below, neither))
