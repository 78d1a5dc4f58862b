r"""A chain of scalar weights: the time it takes is a quadrature in its smallest weight.

With $x$ the weight of smallest modulus, all others are $|w_j| = \sqrt{x^2 + m_j}$ with conserved
$m_j \ge 0$, so $\dot x = (b - s\,x Q(x)) Q(x)$ with $Q = \prod_j \sqrt{x^2 + m_j}$ (signs taken
out). In this variable the weight may cross 0 and nothing is singular on the way.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.backend.types import Scalar
from gradflow.closed_forms.quadrature import panel_times, position_at

PANELS_PER_WEIGHT = 12
LEAST_PANELS = 72
LOG_PANELS = 48
CLOSE = 44.0
"""e-folds of the distance to the limit that are resolved; beyond, the approach is exponential."""


class Chain(NamedTuple):
    r"""A chain in terms of its smallest weight $x$, reflected so that $b \ge 0$.

    `squares` holds $m_j$ and `others` is True for every weight but the smallest.
    """

    x0: Scalar
    squares: Float[Array, " depth"]
    others: Bool[Array, " depth"]
    sxx: Scalar
    b: Scalar


def chain_weights(w: Float[Array, " depth"], sxx: Scalar, b: Scalar, t: Scalar) -> Array:
    """The weights of a scalar chain a flow time `t` after `w`."""
    depth = w.size
    smallest = jnp.argmin(jnp.abs(w))
    others = jnp.arange(depth) != smallest
    modulus = jnp.abs(w)
    least = modulus[smallest]
    signs = jnp.where(w < 0.0, -1.0, 1.0)
    sigma = jnp.prod(jnp.where(others, signs, 1.0))
    x0, force = w[smallest], sigma * b
    turn = jnp.where(force < 0.0, -1.0, 1.0)
    squares = jnp.where(others, (modulus - least) * (modulus + least), 0.0)
    chain = Chain(turn * x0, squares, others, sxx, jnp.abs(b))
    near = jnp.min(jnp.where(others, squares, jnp.inf))
    tied = near == 0.0
    stuck = tied & (chain.x0 == 0.0)
    fades = tied & ((chain.x0 < 0.0) | (chain.b == 0.0))
    moved, fresh = jax.lax.cond(
        fades,
        lambda: _fading_change(chain, t),
        lambda: _regular_change(chain, near, t),
    )
    moved = jnp.where(stuck, 0.0, moved)
    x = jnp.where(stuck, chain.x0, fresh)
    # By the change while it is small, by the value itself, which may be tiny, otherwise.
    square = moved * (x + chain.x0)
    slight = jnp.abs(square) <= 0.5 * modulus**2
    root = jnp.sqrt(jnp.maximum(modulus**2 + square, 0.0))
    change = square / jnp.where(slight & (modulus > 0.0), modulus + root, 1.0)
    far = signs * jnp.where(slight, modulus + change, jnp.hypot(x, jnp.sqrt(squares)))
    near_x = jnp.abs(moved) <= 0.5 * least
    return jnp.where(others, far, turn * jnp.where(near_x, chain.x0 + moved, x))


def _partner(chain: Chain, x: Scalar) -> Scalar:
    """$Q(x)$, the product of the moduli of the other weights."""
    roots = jnp.hypot(x, jnp.sqrt(chain.squares))
    return jnp.prod(jnp.where(chain.others, roots, 1.0))


def _limit(chain: Chain) -> Scalar:
    r"""The root of $x Q(x) = b/s$: bisection in $\log x$, then Newton's method."""
    target = chain.b / chain.sxx
    depth = chain.squares.size
    safe = jnp.where(target == 0.0, 1.0, target)
    log_target = jnp.log(safe)

    def height(y: Scalar) -> Scalar:
        halves = 0.5 * jnp.logaddexp(2.0 * y, jnp.log(chain.squares))
        return y + jnp.sum(jnp.where(chain.others, halves, 0.0)) - log_target

    largest = jnp.sum(jnp.where(chain.others, 0.5 * jnp.log1p(chain.squares), 0.0))
    low = jnp.minimum(log_target, log_target / depth) - largest - 1.0
    high = jnp.maximum(log_target, log_target / depth) + 1.0
    high = jnp.minimum(high, log_target / depth + 1e-9)

    def halve(_: Array, bracket: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        low, high = bracket
        middle = 0.5 * (low + high)
        below = height(middle) < 0.0
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 50, halve, (low, high))
    x = jnp.exp(0.5 * (low + high))
    for _ in range(3):
        slope = 1.0 + jnp.sum(
            jnp.where(chain.others, x * (x / jnp.where(chain.others, x**2 + chain.squares, 1.0)), 0)
        )
        value = jnp.expm1(jnp.log(x) - log_target + jnp.log(_partner(chain, x)))
        x = x - x * value / (slope * (1.0 + value))
    return jnp.where(target == 0.0, 0.0, x)


def _regular_change(chain: Chain, near: Scalar, t: Scalar) -> tuple[Scalar, Scalar]:
    """The change of x and x itself, on the way to the root of $x Q = b/s$."""
    depth = chain.squares.size
    x0, end = chain.x0, _limit(chain)
    unit = jnp.maximum(jnp.sqrt(near), jnp.minimum(jnp.maximum(x0, 0.0), end))
    unit = jnp.where(unit > 0.0, unit, 1.0)
    v0, v_end = jnp.arcsinh(x0 / unit), jnp.arcsinh(end / unit)
    sign = jnp.where(v_end >= v0, 1.0, -1.0)
    whole = _log_distance(unit, x0, end)
    at_rest = whole == 0.0
    whole = jnp.where(at_rest, 1.0, whole)
    close = jnp.minimum(whole, min(0.5, 2.0 / depth))
    far = whole - close
    q_end = _partner(chain, end)

    def place(a: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        """x, x - x0, |end - x| and the distance u in v, at position a."""
        logarithmic = a > far
        e = jnp.where(logarithmic, a - far, 0.0)
        u = jnp.where(logarithmic, close * jnp.exp(-e), whole - a)
        gone = jnp.where(logarithmic, far - close * jnp.expm1(-e), a)
        left = 2.0 * unit * jnp.cosh(v_end - 0.5 * sign * u) * jnp.sinh(0.5 * u)
        moved = sign * 2.0 * unit * jnp.cosh(v0 + 0.5 * sign * gone) * jnp.sinh(0.5 * gone)
        # From whichever end is near; between them, where x may be tiny, from v itself.
        v = jnp.where(gone < u, v0 + sign * gone, v_end - sign * u)
        early, late = jnp.abs(moved) <= 0.5 * jnp.abs(x0), left <= 0.5 * end
        x = jnp.where(late, end - sign * left, unit * jnp.sinh(v))
        x = jnp.where(early, x0 + moved, x)
        return x, jnp.where(early | ~late, moved, (end - x0) - sign * left), left, u

    def density(a: Scalar) -> Scalar:
        x, _, left, u = place(a)
        q = _partner(chain, x)
        # |end Q(end) - x Q(x)|, from the differences where it is small.
        moduli = jnp.where(chain.others, end**2 + chain.squares, 1.0)
        ratio = jnp.where(chain.others, -sign * left * (end + x) / moduli, 0.0)
        fine = (x > 0.5 * end) & (x < 2.0 * end + unit)
        growth = jnp.expm1(0.5 * jnp.sum(jnp.log1p(jnp.where(fine, ratio, 0.0))))
        gap = jnp.where(
            fine, left * q_end - sign * x * q_end * growth, jnp.abs(end * q_end - x * q)
        )
        speed = chain.sxx * gap * q  # |dx/dt|
        slope = jnp.hypot(x, unit)  # dx/dv
        return jnp.where(a > far, u, 1.0) * slope / speed

    panels = max(LEAST_PANELS, PANELS_PER_WEIGHT * depth)
    shares = jnp.arange(1, panels + 1) / panels
    edges = jnp.concatenate([jnp.zeros(1), far * shares])
    fine_panels = max(LOG_PANELS, PANELS_PER_WEIGHT * depth)
    edges = jnp.concatenate([edges, far + CLOSE * jnp.arange(1, fine_panels + 1) / fine_panels])
    times = panel_times(density, edges)
    a = position_at(density, edges, times, jnp.minimum(t, times[-1]))
    x, moved, left, _ = place(a)
    # Beyond the panels only an end at 0 is not yet reached to rounding; there Q is constant.
    rate = chain.sxx * q_end**2
    late = t > times[-1]
    tail = left * jnp.exp(-rate * jnp.where(late, t - times[-1], 0.0))
    x = jnp.where(late, end - sign * tail, x)
    moved = jnp.where(late, (end - x0) - sign * tail, moved)
    return jnp.where(at_rest, 0.0, moved), jnp.where(at_rest, x0, x)


def _log_distance(unit: Scalar, x: Scalar, y: Scalar) -> Scalar:
    """|asinh(x/unit) - asinh(y/unit)|, without cancellation."""
    a, b = x / unit, y / unit
    first, second = a * jnp.hypot(1.0, b), b * jnp.hypot(1.0, a)
    same = first * second > 0.0
    total = jnp.where(same, first + second, 1.0)
    return jnp.abs(jnp.arcsinh(jnp.where(same, (a - b) * (a + b) / total, first - second)))


def _fading_change(chain: Chain, t: Scalar) -> tuple[Scalar, Scalar]:
    """The change of x and x itself, on the way to the saddle at 0: two weights are equal."""
    depth = chain.squares.size
    y0 = jnp.where(chain.x0 == 0.0, 1.0, jnp.abs(chain.x0))
    alive = chain.others & (chain.squares > 0.0)
    order = jnp.sum(chain.others & (chain.squares == 0.0))  # equal weights besides x
    rest = jnp.prod(jnp.where(alive, jnp.sqrt(chain.squares), 1.0))
    nearest = jnp.sqrt(jnp.min(jnp.where(alive, chain.squares, jnp.inf)))
    pulled = chain.b > 0.0
    equal = jnp.exp(jnp.log(chain.b / (chain.sxx * rest)) / (order + 1.0))
    scale = jnp.minimum(jnp.minimum(y0, nearest), jnp.where(pulled, equal, jnp.inf))
    length = jnp.log(y0) - jnp.log(scale) + 40.0

    def density(a: Scalar) -> Scalar:
        y = y0 * jnp.exp(-a)
        q = _partner(chain, y)
        return y / ((chain.b + chain.sxx * y * q) * q)

    panels = 2 * max(LEAST_PANELS, PANELS_PER_WEIGHT * depth)
    edges = length * jnp.arange(panels + 1) / panels
    times = panel_times(density, edges)
    a = position_at(density, edges, times, jnp.minimum(t, times[-1]))
    # Beyond the panels the power law dy/dt = -speed y^power is exact.
    power = jnp.where(pulled, order, 2 * order + 1).astype(t.dtype)
    left = jnp.where(t > times[-1], t - times[-1], 0.0)
    last = y0 * jnp.exp(-length)
    speed = jnp.where(pulled, chain.b * rest, chain.sxx * rest**2) * last ** (power - 1.0)
    steep = jnp.where(power > 1.0, power - 1.0, 1.0)
    shrink = jnp.where(power > 1.0, jnp.log1p(steep * speed * left) / steep, speed * left)
    sign = jnp.where(chain.x0 < 0.0, -1.0, 1.0)
    return sign * y0 * jnp.expm1(-a - shrink), sign * y0 * jnp.exp(-a - shrink)
