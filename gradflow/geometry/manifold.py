r"""The minima manifold $\Gamma = \{P S^{1/2} = T S^{1/2}\}$: tangents, retraction, distance.

With $\tilde J V = dP[V]\, S^{1/2}$ the Hessian on $\Gamma$ is $\tilde J^\top \tilde J$. $\Gamma$
is a smooth manifold with tangent space $\ker \tilde J$ wherever $\tilde J$ has the rank that it
has at the minima around. With $a_i$ the rank of $A_i$, $b_i$ that of $B_i S^{1/2}$,
$a_0 = b_{N+1} = r$ the rank of $T S^{1/2}$ and $s$ that of $S$,

$$\mathrm{rank}\, \tilde J = s\, a_0 + \sum_{i=1}^N (a_i - a_{i-1})\, b_i,$$

(the column spaces of the $A_i$ and the row spaces of the $B_i$ are nested). What that implies:

- every hidden width $\ge \min(d_N, s)$ and $r = \min(d_N, s)$: $\tilde J$ is onto, all of $\Gamma$
  is smooth;
- the narrowest hidden width is $r$ (a bottleneck just wide enough): the image of $\tilde J$ is the
  tangent space of the matrices of rank $r$ everywhere on $\Gamma$, of dimension $r (d_N + s - r)$:
  smooth, with the pseudo-inverse of $K$ for its inverse;
- otherwise $r$ is smaller than every width: $\Gamma$ is a variety whose sheets meet in singular
  points, those where units lie idle between an input direction that dies at layer $j$ and an output
  direction that is born at layer $i \ge j + 2$: $b_{j+1} > b_{j+2}$, $a_i > a_{i-1}$ and
  $d_k - a_k - b_{k+1} + r > 0$ for every $j < k < i$. `singular_points` tests exactly this;
- a hidden width below $r$: no network attains the target, minima keep a residual $M \ne 0$, their
  Hessian has terms of $M$, and nothing here applies.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gradflow.backend.compiled import compiled
from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.data import Regression
from gradflow.geometry.base import OutputLoss, as_problem, check_double, output_loss
from gradflow.geometry.kernel import Kernel, kernel_at, kernel_basis
from gradflow.loss import pull_back, push_forward
from gradflow.network import DeepLinear, end_to_end, left_products, right_products, widths_of
from gradflow.problem import Problem

RANK_TOLERANCE = 1e-6
r"""Singular values below this fraction of the largest count as zero; in $K$, its square."""

ON_MANIFOLD = 1e-10
"""Relative residual up to which weights count as a minimum."""

MAX_CORRECTIONS = 100
"""Gauss-Newton steps of a retraction; it converges quadratically, so few are taken."""

MAX_DISTANCE_STEPS = 20_000
"""Steps of the search for the nearest minimum."""


# One path; every function may be compiled and mapped over paths


def residual(weights: Weights, loss: OutputLoss) -> EndToEnd:
    r"""$(P - T) S^{1/2}$, `(d_N, d_0)`: zero exactly on the manifold."""
    return (end_to_end(weights) - loss.target) @ loss.root


def manifold_residual(weights: Weights, loss: OutputLoss) -> Scalar:
    r"""$|(P - T) S^{1/2}| \,/\, (|T S^{1/2}| + |S^{1/2}| \prod_i |W_i|)$ in Frobenius norms.

    The denominator is the size of which rounding errors are a fraction, so that on the manifold
    this is a few times $10^{-16}$ for layers of any scale. For a target that is zero up to
    rounding, where a layer may vanish, the product is replaced by $(\sum_i |W_i|^2 / N)^{N/2}$.
    """
    squares = jnp.stack([jnp.sum(w * w) for w in weights])
    target = jnp.linalg.norm(loss.target @ loss.root)
    geometric, arithmetic = jnp.prod(squares), jnp.mean(squares) ** len(weights)
    root = jnp.linalg.norm(loss.root)
    vanishes = target <= _noise(target) * root * jnp.sqrt(arithmetic)
    scale = target + root * jnp.sqrt(jnp.where(vanishes, arithmetic, geometric))
    return jnp.linalg.norm(residual(weights, loss)) / jnp.maximum(scale, _TINY)


def is_on_manifold(weights: Weights, loss: OutputLoss) -> Bool[Array, ""]:
    """Whether the weights are a minimum up to `ON_MANIFOLD`."""
    return manifold_residual(weights, loss) <= ON_MANIFOLD


def pseudo_inverse(weights: Weights, root: Float[Array, "d_in d_in"]) -> "_PseudoInverse":
    r"""The map $\tilde J^+ = \tilde J^\top K^+$ from end-to-end matrices to weights.

    By an eigendecomposition of $K$ up to `LARGEST_DENSE_KERNEL`, taken once for all right-hand
    sides; by LSMR (Fong and Saunders 2011) on $\tilde J$ beyond it, its equations scaled in the
    coordinates in which $K$ is nearly diagonal unless a narrow layer leaves some without solution.
    """
    kernel = kernel_at(weights, root)
    return (_iterative_inverse if kernel.is_large else _dense_inverse)(weights, root, kernel)


def tangent(weights: Weights, velocity: Weights, loss: OutputLoss) -> Weights:
    r"""$P_T V = V - \tilde J^+ \tilde J V$: the part of a velocity along the manifold.

    Orthogonal projection on $\ker \tilde J$; taken twice, which removes the rounding error that
    an ill-conditioned $K$ leaves the first time.
    """
    inverse = pseudo_inverse(weights, loss.root)
    for _ in range(2):
        moved = push_forward(weights, velocity) @ loss.root
        velocity = _minus(velocity, inverse(moved))
    return velocity


def retract(weights: Weights, loss: OutputLoss) -> Weights:
    r"""The minimum that Gauss-Newton steps $W \leftarrow W - \tilde J^+ (P - T) S^{1/2}$ reach.

    Iterated until the residual is rounding error or shrinks no more, at most `MAX_CORRECTIONS`
    times: one or two steps from near the manifold. Steps longer than a quarter of $|W|$ are
    shortened to that, which keeps the way from far off short, too. At distance $\delta$ from the
    manifold the result differs from the limit of gradient flow by $O(\delta^2)$. Ask
    `is_on_manifold` whether it arrived: from far away, or at a singular point, it need not.
    """
    rounding = 2.0 * float(np.finfo(weights[0].dtype).eps)

    def unfinished(carry: tuple[Weights, Scalar, Scalar, Int[Array, ""]]) -> Bool[Array, ""]:
        _, now, before, steps = carry
        improving = (now < 0.5 * before) | (now > ON_MANIFOLD)
        return (now > rounding) & improving & (steps < MAX_CORRECTIONS)

    def correct(
        carry: tuple[Weights, Scalar, Scalar, Int[Array, ""]],
    ) -> tuple[Weights, Scalar, Scalar, Int[Array, ""]]:
        at, now, _, steps = carry
        step = pseudo_inverse(at, loss.root)(residual(at, loss))
        length = jnp.maximum(_norm(step), _TINY)
        rate = jnp.minimum(1.0, 0.25 * _norm(at) / length)
        moved = tuple(w - rate * v for w, v in zip(at, step, strict=True))
        return moved, manifold_residual(moved, loss), now, steps + 1

    start = manifold_residual(weights, loss)
    carry = (weights, start, jnp.full_like(start, jnp.inf), jnp.zeros((), int))
    return jax.lax.while_loop(unfinished, correct, carry)[0]


# Where the manifold is singular


def target_rank(weights: Weights, loss: OutputLoss) -> Int[Array, ""]:
    r"""The rank $r$ of $T S^{1/2}$; rounding errors of $P$ at the weights count as zero."""
    values = _singular(loss.target @ loss.root)
    largest = jnp.stack([_singular(w)[0] for w in (loss.root, *weights)])
    floor = _noise(values) / RANK_TOLERANCE * jnp.prod(largest)
    return _rank(values, jnp.maximum(values[0], floor))


def factor_ranks(
    weights: Weights, loss: OutputLoss
) -> tuple[Int[Array, " depth_plus_1"], Int[Array, " depth_plus_1"]]:
    r"""$(a_0, ..., a_N)$ and $(b_1, ..., b_{N+1})$, each `(N + 1,)`, as integers.

    $a_i = \mathrm{rank} A_i$, $b_i = \mathrm{rank}\, B_i S^{1/2}$ and $a_0 = b_{N+1} = r$, the rank
    of $T S^{1/2}$. A singular value counts if it exceeds `RANK_TOLERANCE` times the product of the
    largest of the factors.
    """
    largest = jnp.stack([_singular(w)[0] for w in weights])
    of_root, r = _singular(loss.root), target_rank(weights, loss)
    above = [
        _rank(_singular(a), jnp.prod(largest[i:]))
        for i, a in enumerate(left_products(weights), start=1)
    ]
    below = [
        _rank(_singular(b @ loss.root), jnp.prod(largest[:i]) * of_root[0])
        for i, b in enumerate(right_products(weights))
    ]
    return jnp.stack([r, *above]), jnp.stack([*below, r])


def jacobian_rank(weights: Weights, loss: OutputLoss) -> Int[Array, ""]:
    r"""The rank of $\tilde J$ on the manifold, from the ranks of the factors (module docstring)."""
    a, b = factor_ranks(weights, loss)
    return a[0] * b[0] + jnp.sum((a[1:] - a[:-1]) * b[:-1])


def singular_points(weights: Weights, loss: OutputLoss) -> Bool[Array, "depth_plus_1 depth_plus_1"]:
    r"""Entry $(j, i)$: whether idle units could join input directions that die at $j$ to outputs
    born at $i$.

    On the manifold the weights are a singular point exactly if any entry is true.
    """
    a, b = factor_ranks(weights, loss)
    depth = len(weights)
    widths = widths_of(weights)
    idle = [widths[k] - a[k] - b[k] + a[0] > 0 for k in range(1, depth)]
    entries = jnp.zeros((depth + 1, depth + 1), bool)
    for j in range(depth - 1):
        bridged = jnp.asarray(True)
        for i in range(j + 2, depth + 1):
            bridged = bridged & idle[i - 2]
            found = (b[j] > b[j + 1]) & (a[i] > a[i - 1]) & bridged
            entries = entries.at[j, i].set(found)
    return entries


def target_is_attainable(weights: Weights, loss: OutputLoss) -> Bool[Array, ""]:
    """Whether no hidden width is below the rank of the target."""
    return target_rank(weights, loss) <= min(widths_of(weights)[1:-1], default=np.inf)


def why_singular(weights: Weights, loss: OutputLoss) -> str | None:
    """Why the manifold has no tangent space at a minimum, in words; None where it is smooth.

    For concrete weights on the manifold (see `is_on_manifold`).
    """
    a, b = (np.asarray(ranks) for ranks in factor_ranks(weights, loss))
    widths, r = widths_of(weights), int(a[0])
    hidden = list(widths[1:-1])
    if hidden and min(hidden) < r:
        narrow = 1 + int(np.argmin(hidden))
        return (
            f"hidden width d_{narrow} = {widths[narrow]} is below the rank {r} of the target, so "
            "minima keep a residual and are no zeros of it; widen the layer or lower the rank of "
            "the target"
        )
    where = np.argwhere(np.asarray(singular_points(weights, loss)))
    if len(where):
        j, i = (int(k) for k in where[0])
        return (
            f"the target has rank {r}, and here so much of the factors is zero that sheets of the "
            f"manifold meet: W_{j + 1} takes the rank from {b[j]} to {b[j + 1]}, W_{i} from "
            f"{a[i]} to {a[i - 1]} (from the output down), and units between them are idle; start "
            "from weights of larger rank or imbalance, or take a target of full rank"
        )
    rank, seen = int(jacobian_rank(weights, loss)), _rank_of_kernel(weights, loss)
    if seen is not None and seen != rank:
        return (
            f"the Hessian has {rank} directions of nonzero curvature, but {seen} of them stand "
            f"above {RANK_TOLERANCE**2:.0e} of the largest: it is a singular point up to rounding"
        )
    return None


# Networks


def matched_loss(net: DeepLinear, data: Regression | Problem) -> OutputLoss:
    """`output_loss` of data that fit the network.

    **Raises:** `ValueError` if the widths of network and data differ, or in single precision.
    """
    problem = as_problem(net, data)
    check_double(net.weights, "geometry on the minima manifold")
    return output_loss(problem)


def nearest_minimum(net: DeepLinear, data: Regression | Problem) -> DeepLinear:
    r"""The minimum of the loss nearest to a network, $\arg\min_{W' \in \Gamma} |W - W'|$.

    From the Gauss-Newton retraction $W'$ of $W$, repeatedly
    $W' \leftarrow \mathrm{retract}(W' + \alpha P_T(W - W'))$, with the step size of Barzilai and
    Borwein (1988) halved until the distance shrinks, until the first-order condition
    $W - W' \in \mathrm{range}\, \tilde J^\top$ holds to $10^{-8}$ of the distance (which then is
    accurate to $10^{-16}$). The distance to $\Gamma$ may have several local minima; this is the
    one downhill from the retraction.

    Penalties and noise inside the network do not belong to the loss; noise on the inputs does.

    **Raises:** `ValueError` if the widths differ, the target cannot be attained, the retraction
    fails (a stationary point of the loss has no direction towards the manifold), or the search
    does not converge (at a singular point, or as far from the manifold as its curvature radius).
    """
    loss = matched_loss(net, data)
    if not bool(target_is_attainable(net.weights, loss)):
        raise ValueError(f"net: {why_singular(net.weights, loss)}.")
    found, steepness = _nearest(net.weights, loss)
    if not bool(is_on_manifold(found, loss)):
        raise ValueError(
            f"net: Gauss-Newton steps from widths {net.widths} do not reach the minima (relative "
            f"residual {float(manifold_residual(found, loss)):.3g}); near a saddle such as W = 0 "
            "no direction leads there. Move the network a little, or train it first "
            "(flow_projection)."
        )
    if not float(steepness) <= _STATIONARY:
        raise ValueError(
            f"net: no nearest minimum found in {MAX_DISTANCE_STEPS} steps (slope of the distance "
            f"{float(steepness):.3g}): the network is as far from the minima as their radius of "
            "curvature, or the nearest one is singular. Start nearer to the manifold."
        )
    return DeepLinear(found)


def distance_to_manifold(net: DeepLinear, data: Regression | Problem) -> Scalar:
    r"""The Euclidean distance $\min_{W' \in \Gamma} |W - W'|$ to `nearest_minimum`.

    **Raises:** as `nearest_minimum` does.
    """
    nearest = nearest_minimum(net, data)
    return _norm(_minus(net.weights, nearest.weights))


_STATIONARY = 1e-8
_TINY = float(np.finfo(np.float32).tiny)

_PseudoInverse = Callable[[EndToEnd], Weights]


@compiled
def _nearest(weights: Weights, loss: OutputLoss) -> tuple[Weights, Scalar]:
    """The nearest minimum and the slope of the distance there (0 where the distance is)."""

    def slope(at: Weights) -> tuple[Weights, Scalar]:
        apart = _minus(weights, at)
        along = tangent(at, apart, loss)
        rounding = float(np.finfo(weights[0].dtype).eps) * _norm(weights)
        return along, _norm(along) / jnp.maximum(_norm(apart), 100.0 * rounding / _STATIONARY)

    def unfinished(carry: tuple[Weights, Weights, Scalar, Scalar, Array]) -> Bool[Array, ""]:
        _, _, steepness, rate, steps = carry
        moving = (steepness > _STATIONARY) & (rate > 1e-9)
        return moving & (steps < MAX_DISTANCE_STEPS)

    def move(
        carry: tuple[Weights, Weights, Scalar, Scalar, Array],
    ) -> tuple[Weights, Weights, Scalar, Scalar, Array]:
        at, along, steepness, rate, steps = carry
        tried = retract(tuple(w + rate * v for w, v in zip(at, along, strict=True)), loss)
        gained = _norm(_minus(weights, at)) - _norm(_minus(weights, tried))
        ahead, slope_ahead = slope(tried)
        # Near the minimum the gain is below rounding: there a flatter point is progress, too.
        better = is_on_manifold(tried, loss) & (
            (gained > 0.1 * rate * steepness * _norm(along)) | (slope_ahead < steepness)
        )
        chosen = jax.tree.map(
            lambda new, old: jnp.where(better, new, old),
            (tried, ahead, slope_ahead),
            (at, along, steepness),
        )
        step, bend = _minus(tried, at), _minus(along, ahead)
        bold = _dot(step, step) / jnp.maximum(_dot(step, bend), 1e-2 * _dot(step, step))
        return (*chosen, jnp.where(better, bold, 0.5 * rate), steps + 1)

    start = retract(weights, loss)
    carry = (start, *slope(start), jnp.ones(()), jnp.zeros((), int))
    at, _, steepness, _, _ = jax.lax.while_loop(unfinished, move, carry)
    return at, steepness


def _dense_inverse(
    weights: Weights, root: Float[Array, "d_in d_in"], kernel: Kernel
) -> _PseudoInverse:
    values, vectors = jnp.linalg.eigh(kernel.matrix())
    kept = values > _kernel_cutoff(values)
    inverses = jnp.where(kept, 1.0 / jnp.where(kept, values, 1.0), 0.0)

    def apply(x: EndToEnd) -> Weights:
        solved = vectors @ (inverses * (vectors.T @ x.ravel()))
        return pull_back(weights, solved.reshape(x.shape) @ root)

    return apply


def _iterative_inverse(
    weights: Weights, root: Float[Array, "d_in d_in"], kernel: Kernel
) -> _PseudoInverse:
    narrow = min(widths_of(weights)[1:-1], default=np.inf) < min(weights[-1].shape[0], len(root))
    basis = kernel_basis(kernel)
    floor = RANK_TOLERANCE**2 * jnp.max(basis.values)
    lengths = jnp.sqrt(jnp.maximum(basis.values, floor))

    def scaled(x: EndToEnd) -> EndToEnd:
        # What a narrow layer cannot reach has to stay orthogonal to what it can.
        return x if narrow else basis.coordinates(x) / lengths

    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), weights)
    operator = lx.FunctionLinearOperator(lambda v: scaled(push_forward(weights, v) @ root), shapes)
    solver = lx.LSMR(rtol=1e-14, atol=1e-14, conlim=1.0 / RANK_TOLERANCE)

    def apply(x: EndToEnd) -> Weights:
        return lx.linear_solve(operator, scaled(x), solver, throw=False).value

    return apply


def _kernel_cutoff(values: Float[Array, " k"]) -> Scalar:
    return max(RANK_TOLERANCE**2, _noise(values)) * values[-1]


def _rank_of_kernel(weights: Weights, loss: OutputLoss) -> int | None:
    """The number of curvatures above the cutoff; None where the kernel is too large to tell."""
    kernel = kernel_at(weights, loss.root)
    if kernel.is_large:
        return None
    values = jnp.linalg.eigvalsh(kernel.matrix())
    return int(jnp.sum(values > _kernel_cutoff(values)))


def _singular(matrix: Float[Array, "rows columns"]) -> Float[Array, " k"]:
    return jnp.linalg.svd(matrix, compute_uv=False)


def _rank(singular: Float[Array, " k"], scale: Scalar) -> Int[Array, ""]:
    return jnp.sum(singular > max(RANK_TOLERANCE, _noise(singular)) * scale)


def _minus(a: Weights, b: Weights) -> Weights:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _dot(a: Weights, b: Weights) -> Scalar:
    return sum((jnp.sum(x * y) for x, y in zip(a, b, strict=True)), start=jnp.zeros(()))


def _norm(weights: Weights) -> Scalar:
    return jnp.sqrt(_dot(weights, weights))


def _noise(like: Array) -> float:
    """The relative size of an accumulated rounding error."""
    return 100.0 * float(np.finfo(like.dtype).eps)
