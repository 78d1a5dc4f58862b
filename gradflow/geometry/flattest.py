r"""The flattest minima in closed form, and how far a network is from them.

Write $P' = T S^{1/2} = U \Sigma V^\top$, $B_i' = B_i S^{1/2}$. At a minimum $A_{i-1} B_i' = P'$ for
$i = 2..N$ and the Hessian has the nonzero eigenvalues of $K = \sum_i A_i A_i^\top \otimes
B_i'^\top B_i'$. For all $\rho_L, \rho_R \succeq 0$ of trace 1

$$\lambda_{\max}(K) \ge \mathrm{tr}[K (\rho_L \otimes \rho_R)]
  = \sum_i |\rho_L^{1/2} A_i|^2 |B_i' \rho_R^{1/2}|^2
  \ge N \bigl( \mathrm{tr}(S \rho_R)\,
      |\rho_L^{1/2} P' \rho_R^{1/2}|_*^{2(N-1)} \bigr)^{1/N}$$

with the nuclear norm $|\cdot|_*$: the geometric mean is below the arithmetic one, and $|XY|_* \le
|X| |Y|$ for $X = \rho_L^{1/2} A_{i-1}$, $Y = B_i' \rho_R^{1/2}$. At $\rho_L = I/d_N$, $\rho_R =
I/d_0$ this bounds $\mathrm{tr} H$; at $\rho_L \propto P' \rho_R P'^\top$ the sharpness. Each bound
is attained by a network built here, so these are the flattest minima of all: for every depth, every
shape, every $S$ (singular too) and targets of any rank that the hidden layers let through.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, SupportsIndex, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gradflow.backend.compiled import compiled
from gradflow.backend.types import Weights
from gradflow.checks import check_fit
from gradflow.data import Regression
from gradflow.geometry.base import OutputLoss, output_loss
from gradflow.geometry.bounds import least_sharpness
from gradflow.geometry.curvature import kernel_of_root
from gradflow.geometry.manifold import is_on_manifold, matched_loss, retract
from gradflow.network import DeepLinear, left_products, right_products
from gradflow.problem import Problem

Flatness: TypeAlias = Literal["sharpness", "trace"]
"""What is to be small: the largest eigenvalue of the Hessian or its trace."""

Matrix: TypeAlias = Float[np.ndarray, "_ _"]

_least_sharpness = compiled(least_sharpness)

MOST_SWEEPS = 500
"""Sweeps over the hidden layers in which a network is rotated towards another."""


@dataclass(frozen=True)
class FlattestMinimum:
    r"""A minimum that no other minimum beats in sharpness or in trace.

    - `net`: the network.
    - `by`: `"sharpness"` or `"trace"`.
    - `value`: its $\lambda_{\max}(H)$ or $\mathrm{tr} H$.
    - `bound`: a proved lower bound on that value at every minimum of these widths; `value / bound -
        1` is rounding.
    - `how`: how the network was found.
    """

    net: DeepLinear
    by: Flatness
    value: float
    bound: float
    how: str


@dataclass(frozen=True)
class FlatnessGap:
    r"""How far a minimum is from the flattest one.

    - `value`: its $\lambda_{\max}(H)$ or $\mathrm{tr} H$.
    - `ratio`: `value` over the flattest value, at least 1; infinite if only the latter is 0.
    - `excess`: the difference of the two.
    - `distance`: Frobenius norm, over all layers, of the difference to `flattest.net`, whose hidden
        units are rotated to make it small.
    - `flattest`: the flattest minimum, rotated.
    """

    value: float
    ratio: float
    excess: float
    distance: float
    flattest: FlattestMinimum


def flattest_minimum(
    data: Regression | Problem,
    widths: Sequence[SupportsIndex],
    by: Flatness = "sharpness",
    start: DeepLinear | None = None,
) -> FlattestMinimum:
    r"""The flattest network of given widths that minimises the loss of the data.

    With $P' = T S^{1/2} = U \Sigma V^\top$, $\nu = |P'|_*$ and $R_i$ the first unit vectors,

    $$W_1 S^{1/2} = c_1 R_1 \Sigma^{p} V^\top, \quad W_i = c_i R_i \Sigma^{q} R_{i-1}^\top, \quad
      W_N = c_N U \Sigma^{r} R_{N-1}^\top, \quad c_1 \cdots c_N = 1.$$

    *Trace*: $\min \mathrm{tr} H = N (d_N\, \mathrm{tr} S\, \nu^{2(N-1)})^{1/N}$ at $p = r = 1/2$,
    $q = 0$, with the $c_i$ that make all block traces equal. For $S$ of full rank this is every
    minimiser, up to rotations of the hidden units and to what middle layers do with units that
    carry no signal. With $S \propto I$ it is balanced only if $d_0 = d_N$ and, beyond depth 2, $T$
    is a multiple of an orthogonal matrix.

    *Sharpness*: with $Q = P'^\top P'$

    $$\min \lambda_{\max}(H)
      = \min_{a > 0} \lambda_{\max}\bigl(a S + (N-1)\, a^{-1/(N-1)} Q\bigr)
      = \max_{\rho} N\, \mathrm{tr}(S \rho)^{1/N}\, \mathrm{tr}(Q \rho)^{1 - 1/N}$$

    over $\rho \succeq 0$ of trace 1, at $p = 1$, $q = r = 0$, $c_i = a^{1/(2(N-1))}$ for $i > 1$:
    layers above the first that are isometries. The problem in $a$ is convex and its two sides agree
    to rounding. For $S = cI$ it is $c N |T|_2^{2-2/N}$, and the balanced network is returned. Other
    networks can be as sharp: the directions below the top of the spectrum have room.

    Noise on the inputs is part of $S$; penalties and noise inside the network are not looked at.
    Computed by NumPy on the host, in time $O(d_0^3)$.

    **Arguments:**

    - `data`: a `Regression`, or a `Problem` for its input noise.
    - `widths`: $(d_0, ..., d_N)$, input first.
    - `by`: `"sharpness"` or `"trace"`.
    - `start`: a network of these widths; the hidden units of the result are then rotated to be near
        it (to the nearest for depth 2; by alternating sweeps, a local optimum, beyond).

    **Returns:** a `FlattestMinimum`.

    **Raises:** `ValueError` if the widths do not fit the data, if a hidden layer is narrower than
    the rank of $T S^{1/2}$ (no minimum with zero residual), or `by` is unknown.

    **Source:** whitened data: Mulayoff and Michaeli, "Unique properties of flat minima in deep
    networks", ICML 2020; trace with $S = I$: Gatmiry et al., "The inductive bias of flatness
    regularization for deep matrix factorization", NeurIPS 2023. The general case is proved at the
    top of this file.
    """
    if by not in get_args(Flatness):
        raise ValueError(f'by: must be "sharpness" or "trace"; got {by!r}.')
    loss = output_loss(data)
    sizes = _checked_widths(widths, loss)
    left, sigma, right = _factors(loss, sizes)
    powers, scales, value, bound, how = _flattest_factors(by, loss, sizes, sigma)
    frames = [right, *(np.eye(d, sigma.size) for d in sizes[1:-1]), left]
    layers = [
        (c * above * sigma**power) @ below.T
        for c, power, (below, above) in zip(scales, powers, pairwise(frames), strict=True)
    ]
    if start is not None:
        if start.widths != sizes:
            raise ValueError(f"start: widths {start.widths} differ from widths {sizes}.")
        layers = _rotated(DeepLinear(layers), start)
    return FlattestMinimum(DeepLinear(layers), by, float(value), float(bound), how)


def flatness_gap(
    net: DeepLinear, data: Regression | Problem, by: Flatness = "sharpness"
) -> FlatnessGap:
    r"""How far a network is from the flattest minimum of its widths.

    $$\text{ratio} = \frac{\lambda_{\max}(H)}{\min_\Gamma \lambda_{\max}(H)}, \qquad
      \text{distance}^2 = \min_{R_i \in O(d_i)} \sum_i |W_i - R_i W^*_i R_{i-1}^\top|^2,$$

    and the same with $\mathrm{tr} H$. Rotations of hidden units change neither the end-to-end
    matrix nor the spectrum of the Hessian. A network off the manifold of minima is first moved onto
    it by `retract`, to a minimum that is near but not the limit of gradient flow.

    The distance is to the orbit of `flattest_minimum`. By trace, at depth 2 and for $S$ of full
    rank, that is the distance to the set of all minimisers. Else it is an upper bound, and a
    network whose ratio is 1 can have a distance: there are more minimisers, and beyond depth 2 the
    best rotation is searched.

    **Arguments:**

    - `net`: the network.
    - `data`, `by`: as in `flattest_minimum`.

    **Returns:** a `FlatnessGap`.

    **Raises:** `ValueError` as `flattest_minimum` and `retract` do.
    """
    loss = matched_loss(net, data)
    _factors(loss, net.widths)
    minimum, arrived, kernel = _nearby_minimum(net, loss)
    if not bool(arrived):
        raise ValueError(
            "net: Gauss-Newton steps from here do not reach a minimum of the loss; train the "
            "network closer to one first (flow_projection)."
        )
    spectrum = np.linalg.eigvalsh(kernel)
    value = float(spectrum[-1] if by == "sharpness" else np.trace(kernel))
    flattest = flattest_minimum(data, net.widths, by, start=minimum)
    least = flattest.value
    ratio = value / least if least > 0 else np.inf if value > 0 else 1.0
    distance = _distance(minimum.weights, flattest.net.weights)
    return FlatnessGap(value, ratio, value - least, distance, flattest)


@compiled
def _nearby_minimum(
    net: DeepLinear, loss: OutputLoss
) -> tuple[DeepLinear, Bool[Array, ""], Float[Array, "outputs outputs"]]:
    r"""The minimum that `retract` reaches, whether it is one, and the kernel $K$ there."""
    weights = retract(net.weights, loss)
    return DeepLinear(weights), is_on_manifold(weights, loss), kernel_of_root(weights, loss.root)


def _flattest_factors(
    by: Flatness, loss: OutputLoss, sizes: tuple[int, ...], sigma: Float[np.ndarray, " rank"]
) -> tuple[Float[np.ndarray, " depth"], Float[np.ndarray, " depth"], float, float, str]:
    r"""Powers of $\Sigma$ in the layers, their factors $c_i$, value, bound and how."""
    depth, root = len(sizes) - 1, np.asarray(loss.root, np.float64)
    tr_s, top_s = float(np.sum(root**2)), float(np.linalg.norm(root, 2) ** 2)
    inner = [0.0] * (depth - 2)
    if depth == 1:
        value = top_s if by == "sharpness" else sizes[-1] * tr_s
        how = "closed form: a single layer, whose Hessian is the same everywhere"
        return np.ones(1), np.ones(1), value, value, how
    if sigma.size == 0:
        how = "closed form: zero layers, because the target is zero"
        return np.ones(depth), np.zeros(depth), 0.0, 0.0, how
    if by == "trace":
        nuclear = float(np.sum(sigma))
        block = (sizes[-1] * tr_s * nuclear ** (2 * (depth - 1))) ** (1 / depth)
        first, last = (float(np.sqrt(nuclear * x / block)) for x in (tr_s, sizes[-1]))
        scales = np.array([first, *(nuclear / np.sqrt(block) for _ in inner), last])
        how = "closed form: equal block traces, middle layers that are isometries up to a factor"
        return np.array([0.5, *inner, 0.5]), scales, depth * block, depth * block, how
    if np.allclose(root, root[0, 0] * np.eye(sizes[0]), rtol=0, atol=1e-13 * root[0, 0]):
        value = float(depth * top_s ** (1 / depth) * sigma[0] ** (2 - 2 / depth))
        how = "closed form: whitened inputs, balanced layers"
        return np.full(depth, 1 / depth), _lifted(1 / top_s, depth), value, value, how
    value, ratio = (float(x) for x in _least_sharpness(loss, depth))
    bound = _proved_bound(root, loss, depth, ratio)
    how = "closed form up to a convex problem in one number: isometries above the first layer"
    return np.array([1.0, *inner, 0.0]), _lifted(ratio, depth), value, bound, how


def _lifted(ratio: float, depth: int) -> Float[np.ndarray, " depth"]:
    r"""Factors of product 1: $t^{1/(2N)}$ for the layers above the first."""
    above = ratio ** (1 / (2 * depth))
    return np.array([above ** (1 - depth), *np.full(depth - 1, above)])


def _proved_bound(root: Matrix, loss: OutputLoss, depth: int, t: float) -> float:
    r"""$N\, \mathrm{tr}(S \rho)^{1/N}\, \mathrm{tr}(Q \rho)^{1 - 1/N}$, the dual problem's value.

    At the root $t$ of the slope $v^\top S v - v^\top Q v / t$ two branches may cross, and the slope
    jump through zero: $\rho$ is the mixture of the top eigenvectors just below and just above at
    which it is zero.
    """
    s = root @ root
    product = np.asarray(loss.target, np.float64) @ root
    q = product.T @ product

    def moments(t: float) -> Float[np.ndarray, "2"]:
        v = np.linalg.eigh(s + (depth - 1) / t * q)[1][:, -1]
        return np.array([v @ s @ v, v @ q @ v])

    below, above = moments(t * (1 - 1e-8)), moments(t * (1 + 1e-8))
    falls, rises = below[0] - below[1] / t, above[0] - above[1] / t
    share = np.clip(falls / (falls - rises), 0.0, 1.0) if falls < rises else 0.5
    of_s, of_q = (1 - share) * below + share * above
    return float(depth * of_s ** (1 / depth) * of_q ** (1 - 1 / depth))


def _factors(loss: OutputLoss, sizes: tuple[int, ...]) -> tuple[Matrix, np.ndarray, Matrix]:
    r"""$U$, $\Sigma$ and $S^{-1/2} V$ of $T S^{1/2} = U \Sigma V^\top$, cut to its rank."""
    product = np.asarray(loss.target, np.float64) @ np.asarray(loss.root, np.float64)
    left, sigma, right = np.linalg.svd(product, full_matrices=False)
    cutoff = 100 * max(product.shape) * float(jnp.finfo(loss.target.dtype).eps) * sigma[0]
    rank = int(np.sum(sigma > cutoff))
    narrowest = min(sizes)
    if rank > narrowest:
        raise ValueError(
            f"widths: {sizes} let through rank {narrowest}, but the target has rank {rank}: such "
            "networks have a residual at every minimum, where the curvature is not that of the "
            f"manifold of minima; use hidden widths of at least {rank}, or a target of rank "
            f"{narrowest}."
        )
    inverse_root = np.asarray(loss.inverse_root, np.float64)
    return left[:, :rank], sigma[:rank], inverse_root @ right[:rank].T


def _rotated(net: DeepLinear, near: DeepLinear) -> list[Matrix]:
    r"""The layers $R_i W_i R_{i-1}^\top$ with rotations that bring them near a goal.

    Each sweep gives every hidden layer in turn its best rotation.
    """
    moved, goal = ([np.asarray(w) for w in n.weights] for n in (net, near))
    hidden = range(net.depth - 1)
    a, own_a = left_products(near.weights), left_products(net.weights)
    b, own_b = right_products(near.weights), right_products(net.weights)
    for i in hidden:
        overlap = a[i].T @ own_a[i] + b[i + 1] @ own_b[i + 1].T
        _turn(moved, i, _nearest_rotation(np.asarray(overlap)))
    distance = _distance(goal, moved)
    for _ in range(MOST_SWEEPS):
        for i in hidden:
            overlap = goal[i] @ moved[i].T + goal[i + 1].T @ moved[i + 1]
            _turn(moved, i, _nearest_rotation(overlap))
        before, distance = distance, _distance(goal, moved)
        if before - distance <= 1e-12 * before:
            break
    return moved


def _turn(layers: list[Matrix], i: int, rotation: Matrix) -> None:
    layers[i], layers[i + 1] = rotation @ layers[i], layers[i + 1] @ rotation.T


def _nearest_rotation(overlap: Matrix) -> Matrix:
    r"""The orthogonal $R$ with the largest $\langle R, M \rangle$."""
    left, _, right = np.linalg.svd(overlap)
    return left @ right


def _distance(one: Weights | list[Matrix], other: Weights | list[Matrix]) -> float:
    pairs = zip(one, other, strict=True)
    return float(np.sqrt(sum(np.sum((np.asarray(a) - np.asarray(b)) ** 2) for a, b in pairs)))


def _checked_widths(widths: Sequence[SupportsIndex], loss: OutputLoss) -> tuple[int, ...]:
    if not isinstance(widths, Sequence) or not all(hasattr(w, "__index__") for w in widths):
        raise TypeError(
            f"widths must be those of all layers, input first, such as [2, 3, 2]; got {widths!r}."
        )
    sizes = tuple(w.__index__() for w in widths)
    d_out, d_in = loss.y.shape
    check_fit("widths:", sizes, d_in, d_out)
    if min(sizes) < 1:
        raise ValueError(f"widths must be positive; got {sizes}.")
    return sizes
