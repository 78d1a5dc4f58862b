r"""Lower bounds on the curvature of minima, for any widths, inputs and outputs.

At a minimum $A_{i-1} B_i S^{1/2} = T S^{1/2}$ for $i = 2..N$, $A_N = I$, $B_1 = I$, and the nonzero
spectrum of the Hessian is that of $K = \sum_i A_i A_i^\top \otimes S^{1/2} B_i^\top B_i S^{1/2}$.
For $\rho_L, \rho_R \succeq 0$ of trace 1, the inequality of the means and $|X Y|_* \le |X| |Y|$
give

$$\lambda_{\max}(K) \ge \sum_i |\rho_L^{1/2} A_i|^2\, |B_i S^{1/2} \rho_R^{1/2}|^2
  \ge N \bigl( \mathrm{tr}(S \rho_R)\, |\rho_L^{1/2} T S^{1/2} \rho_R^{1/2}|_*^{2(N-1)}
  \bigr)^{1/N}.$$

The trace is $d_N d_0$ times the middle at multiples of the identity; the best bound on the
sharpness has $\rho_L \propto T S^{1/2} \rho_R S^{1/2} T^\top$. Both bounds are attained where the
hidden layers are at least as wide as the rank of $T S^{1/2}$.
"""

from collections.abc import Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gradflow.backend.compiled import compiled
from gradflow.backend.tracing import is_traced
from gradflow.backend.types import EndToEnd, Scalar
from gradflow.checks import check_fit
from gradflow.data import Regression
from gradflow.geometry.base import OutputLoss, check_data, output_loss
from gradflow.geometry.curvature import check_minima
from gradflow.problem import Problem

HALVINGS = 80
"""Halvings of an interval of logarithms, down to rounding from any start."""

INSTEAD = "leave it out, or follow gf.sharpness and gf.hessian_trace of the problem itself"


def sharpness_bound(data: Regression | Problem, depth: int | Sequence[int]) -> Scalar:
    r"""The least sharpness that a minimum can have.

    With $Q = S^{1/2} T^\top T S^{1/2}$,

    $$\lambda_{\max}(H) \ge \max_{\rho} N\, \mathrm{tr}(S \rho)^{1/N}\, \mathrm{tr}(Q \rho)^{1-1/N}
      = \min_{a > 0} \lambda_{\max}\bigl(a S + (N-1)\, a^{-1/(N-1)} Q\bigr)$$

    over $\rho \succeq 0$ of trace 1. It holds at every minimum and is attained where the hidden
    layers are at least as wide as the rank of $T S^{1/2}$. Whitened inputs give
    $N |T|_2^{2 - 2/N}$ (Mulayoff and Michaeli), $\rho = v v^\top$ with $v \propto S^{1/2} p^\top$
    for one output weaker than or equal to $N |p|^{2 - 2/N}\, p S p^\top / |p|^2$ (Marion and
    Chizat); a single layer gives $\lambda_{\max}(S)$.

    The problem in $a$ is convex in $\log a$ and solved to rounding by bisection of its slope.

    **Arguments:**

    - `data`: a `Regression`, or a `Problem` for the noise on its inputs, which is part of $S$;
        penalties are not included (weight decay adds its rate to the curvature at these weights).
    - `depth`: $N \ge 1$; or the widths $(d_0, ..., d_N)$, of which only the number counts once
        they fit the data.

    **Raises:** `ValueError` for a depth below 1, widths that `trace_bound` would refuse, or noise
    inside the network, which has other minima; `TypeError` for something that is neither.

    **Source:** proved at the top of this file. Mulayoff and Michaeli, "Unique properties of flat
    minima in deep networks", ICML 2020; Marion and Chizat, "Deep linear networks for regression are
    implicitly regularized towards flat minima", NeurIPS 2024, whose loss has no factor 1/2.
    """
    check_data(data)
    check_minima(data, "sharpness_bound", INSTEAD)
    loss = output_loss(data)
    if isinstance(depth, Sequence) and not isinstance(depth, str):
        layers = len(_fitting(depth, loss)) - 1
    elif _is_integer(depth):
        layers = int(depth)
    else:
        raise TypeError(
            f"depth must be a number of layers, or widths (d_0, ..., d_N); got {depth!r}."
        )
    if layers < 1:
        raise ValueError(f"depth must be at least 1; got {layers}.")
    return _least_sharpness(loss, layers)[0]


def least_sharpness(loss: OutputLoss, depth: int) -> tuple[Scalar, Scalar]:
    r"""The least sharpness of a minimum, and the ratio $t$ of $Q$ to $S$ at which it is attained.

    $$\min_{t > 0} t^{1-1/N}\, \lambda_{\max}(S + (N-1)\, Q / t), \qquad t = a^{N/(N-1)},$$

    the problem of `sharpness_bound`. With the top eigenvector $v$ its slope in $\log t$ has the
    sign of $v^\top S v - v^\top Q v / t$, and rises. A zero target gives 0, and $t = 1$.
    """
    s = loss.root @ loss.root
    top_s = jnp.linalg.norm(loss.root, 2) ** 2
    if depth == 1:
        return top_s, jnp.ones_like(top_s)
    product = loss.target @ loss.root
    q = product.T @ product
    top_q, top_t = jnp.linalg.norm(product, 2) ** 2, jnp.linalg.norm(loss.target, 2) ** 2
    zero = top_q <= 0.0
    # v'Qv <= |T|^2 v'Sv, so the slope is not negative at t = |T|^2; nor is it positive below
    # (1 - 1/N) |Q|/|S|, because v'Qv >= |Q| - t |S| / (N-1) for the top eigenvector.
    least = jnp.where(zero, 1.0, (1.0 - 1.0 / depth) * top_q / top_s)
    largest = jnp.where(zero, 1.0, top_t)

    def halve(_: Int[Array, ""], bracket: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        below, above = bracket
        middle = 0.5 * (below + above)
        v = jnp.linalg.eigh(s + (depth - 1) * jnp.exp(-middle) * q)[1][:, -1]
        rises = v @ s @ v >= jnp.exp(-middle) * (v @ q @ v)
        return jnp.where(rises, below, middle), jnp.where(rises, middle, above)

    ends = jnp.log(least) - 1e-6, jnp.log(largest) + 1e-6
    below, above = jax.lax.fori_loop(0, HALVINGS, halve, ends)
    t = jnp.exp(0.5 * (below + above))
    value = t ** (1.0 - 1.0 / depth) * jnp.linalg.eigvalsh(s + (depth - 1) / t * q)[-1]
    return jnp.where(zero, 0.0, value), jnp.where(zero, 1.0, t)


_least_sharpness = compiled(least_sharpness)


def trace_bound(data: Regression | Problem, widths: Sequence[int]) -> Scalar:
    r"""The least Hessian trace that a minimum of given widths can have.

    $$\mathrm{tr} H \ge N\, (d_N\, \mathrm{tr} S)^{1/N}\, |T S^{1/2}|_*^{2 - 2/N}$$

    with the nuclear norm, for every depth: $d_1 \mathrm{tr} S$ for one layer, $2 \sqrt{d_2
    \mathrm{tr} S}\, |T S^{1/2}|_*$ for two. It is attained, with all block traces equal and middle
    layers that are isometries up to a factor on the units that carry signal.

    **Arguments:**

    - `data`: as in `sharpness_bound`.
    - `widths`: $(d_0, ..., d_N)$, input first.

    **Raises:** `ValueError` if the widths do not fit the data, if a hidden layer is narrower than
    the rank of $T S^{1/2}$ (then no network reaches the minimum of the loss), or for noise inside
    the network, which has other minima.

    **Source:** proved at the top of this file; $S = I$: Gatmiry et al., "The inductive bias of
    flatness regularization for deep matrix factorization", NeurIPS 2023.
    """
    check_data(data)
    check_minima(data, "trace_bound", INSTEAD)
    loss = output_loss(data)
    sizes = _fitting(widths, loss)
    product = loss.target @ loss.root
    depth, d_out = len(sizes) - 1, sizes[-1]
    nuclear = jnp.sum(jnp.linalg.svd(product, compute_uv=False))
    first = (d_out * jnp.sum(loss.root**2)) ** (1.0 / depth)
    return depth * first * nuclear ** (2.0 - 2.0 / depth)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _fitting(widths: object, loss: OutputLoss) -> tuple[int, ...]:
    """The widths, if they are some and networks of theirs can reach the minimum of the loss."""
    if not isinstance(widths, Sequence) or not all(map(_is_integer, widths)):
        raise TypeError(
            "widths must be those of all layers, input first, such as [2, 3, 2] (with a depth "
            f"alone only the sharpness has a bound); got {widths!r}."
        )
    sizes = tuple(map(int, widths))
    d_out, d_in = loss.target.shape
    check_fit("widths:", sizes, d_in, d_out)
    _check_widths(loss.target @ loss.root, sizes)
    return sizes


def _check_widths(product: EndToEnd, widths: Sequence[int]) -> None:
    """Raise a `ValueError` for a bottleneck; traced data pass, as they have no rank yet."""
    if is_traced(product):
        return
    singular: Float[Array, " k"] = jnp.linalg.svd(product, compute_uv=False)
    cutoff = 100.0 * max(product.shape) * float(jnp.finfo(product.dtype).eps) * float(singular[0])
    rank = int(np.sum(np.asarray(singular) > cutoff))
    if min(widths) < rank:
        raise ValueError(
            f"widths: {tuple(widths)} let through rank {min(widths)}, but the target has rank "
            f"{rank}: such networks do not reach the minimum of the loss; use hidden widths of at "
            f"least {rank}."
        )
