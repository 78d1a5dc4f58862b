r"""Initial networks: random, balanced, or with a prescribed imbalance.

A network is balanced when $G_i = W_{i+1}^\top W_{i+1} - W_i W_i^\top = 0$ for every hidden layer;
its imbalance is $D(W) = \max_{ij} \bigl| |W_i|_F^2 - |W_j|_F^2 \bigr|$. Gradient flow conserves
both, so the initialisation decides them.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from scipy.optimize import root_scalar

from gradflow.backend.tracing import float_of, is_complex
from gradflow.network import DeepLinear

Widths: TypeAlias = Sequence[SupportsIndex]
"""The widths `(d_0, ..., d_N)`, input first."""

Matrix: TypeAlias = ArrayLike | Sequence[Sequence[float | int]]


def gaussian(
    widths: Widths,
    scale: float | int = 1.0,
    key: PRNGKeyArray | None = None,
) -> DeepLinear:
    r"""Independent entries $(W_i)_{kl} \sim \mathcal N(0, \text{scale}^2 / d_{i-1})$.

    The variance over the fan-in keeps $\mathbb E|W_i v|^2 = \text{scale}^2 \, d_i/d_{i-1} |v|^2$.

    **Arguments:**

    - `widths`: $(d_0, ..., d_N)$, input first.
    - `scale`: positive factor of every layer.
    - `key`: random key, third as in all of `init`; it is needed.

    **Raises:** `ValueError` if a width is not a positive integer or the scale not positive.
    """
    sizes = _checked_widths(widths)
    factor, random = _checked_scale(scale), _needed_key(key)
    shapes = tuple((above, below) for below, above in pairwise(sizes))
    layers = _normals(random, shapes)
    return DeepLinear([factor / np.sqrt(w.shape[1]) * w for w in layers])


def orthogonal(
    widths: Widths,
    scale: float | int = 1.0,
    key: PRNGKeyArray | None = None,
) -> DeepLinear:
    r"""Independent uniformly distributed semi-orthogonal layers times a scale.

    $W_i W_i^\top = \text{scale}^2 I$ if $d_i \le d_{i-1}$, else
    $W_i^\top W_i = \text{scale}^2 I$. Of equal widths the network is balanced.

    **Arguments:**

    - `widths`: $(d_0, ..., d_N)$, input first.
    - `scale`: positive singular value of every layer.
    - `key`: random key, third as in all of `init`; it is needed.

    **Raises:** `ValueError` if a width is not a positive integer or the scale not positive.

    **Source:** Saxe, McClelland, Ganguli, "Exact solutions to the nonlinear dynamics of learning
    in deep linear neural networks", ICLR 2014.
    """
    sizes = _checked_widths(widths)
    factor, random = _checked_scale(scale), _needed_key(key)
    shapes = tuple((above, below) for below, above in pairwise(sizes))
    return DeepLinear([factor * w for w in _semi_orthogonal(random, shapes)])


def balanced(
    target_or_scale: Matrix, widths: Widths, key: PRNGKeyArray | None = None
) -> DeepLinear:
    r"""A balanced network with a given end-to-end matrix, or with a random one.

    From the singular value decomposition $P = U S V^\top$ cut to rank $r = \min_i d_i$,

    $$W_i = R_i S^{1/N} R_{i-1}^\top, \quad R_N = U, \; R_0 = V, \; R_i^\top R_i = I_r,$$

    so that every $G_i = 0$ and $|W_i|_F^2 = \sum_a s_a^{2/N}$ for every layer.

    **Arguments:**

    - `target_or_scale`: the end-to-end matrix $P$ `(d_N, d_0)`; or a number, the common value of
        all $r$ singular values of an end-to-end matrix that is otherwise random (of either sign if
        $d_0 = d_N = 1$; write `[[2.0]]` for the matrix).
    - `widths`: $(d_0, ..., d_N)$, input first.
    - `key`: if given, the hidden $R_i$ are uniformly random instead of the first $r$ unit vectors.
        Needed to draw a random end-to-end matrix.

    **Raises:** `ValueError` if the matrix has the wrong shape or a rank above the narrowest width,
    or a random matrix is asked for without a key.

    **Source:** Arora, Cohen, Golowich, Hu, "A convergence analysis of gradient descent for deep
    linear neural networks", ICLR 2019, procedure 1.
    """
    sizes = _checked_widths(widths)
    values = _checked_numbers(target_or_scale)
    if values.ndim == 0:
        return DeepLinear(_random_balanced(_checked_scale(values), sizes, key))
    return DeepLinear(_balanced_to(values, sizes, key))


def unbalanced(
    widths: Widths,
    imbalance: float | int,
    key: PRNGKeyArray | None = None,
    target: Matrix | None = None,
    scale: float | int | None = None,
    heavy: int = 1,
) -> DeepLinear:
    r"""A network of prescribed imbalance $D(W)$, with a given or a random end-to-end matrix.

    A balanced network, all of whose layers have $|W_i|_F^2 = q$, is rescaled to

    $$W_h \to e^{(N-1)t/2}\, W_h, \quad W_i \to e^{-t/2}\, W_i \; (i \ne h), \quad
      q\,(e^{(N-1)t} - e^{-t}) = D,$$

    which keeps the end-to-end matrix. Layer $h$ then exceeds each of the others, which stay equal,
    by $D$ in squared norm.

    **Arguments:**

    - `widths`: $(d_0, ..., d_N)$, input first.
    - `imbalance`: $D \ge 0$, met up to rounding of the squared norms: to
        $10^{-12} \max(D, q)$.
    - `key`: random rotations of the hidden units; needed unless `target` is given.
    - `target`: the end-to-end matrix `(d_N, d_0)`, not zero; by default random as in `balanced`.
    - `scale`: singular values of the random end-to-end matrix, 1 by default.
    - `heavy`: the layer $h$ in $1..N$ that carries the norm.

    **Raises:** `ValueError` if the imbalance is negative, or positive at depth 1 or for a zero
    target, if there is no such layer, if both `target` and `scale` are given, or as `balanced`
    does.
    """
    sizes = _checked_widths(widths)
    depth = len(sizes) - 1
    imbalance = float(imbalance)
    if not 0 <= imbalance < np.inf:
        raise ValueError(
            f"init.imbalance: got {imbalance}; D(W) is a finite number of at least 0 (choose the "
            "layer that carries the norm with heavy=)."
        )
    if depth == 1 and imbalance != 0:
        raise ValueError(
            f"init.imbalance: got {imbalance} for one layer, which has nothing to differ from; "
            "pass imbalance=0 or add a width."
        )
    if isinstance(heavy, bool) or heavy not in range(1, depth + 1):
        raise ValueError(f"init.heavy: no layer {heavy!r}; the layers are 1 to {depth}.")
    if target is None:
        layers = _random_balanced(_checked_scale(1.0 if scale is None else scale), sizes, key)
    elif scale is not None:
        raise ValueError(
            f"init.scale: got {scale} beside a target, which has singular values of its own; pass "
            "one of the two."
        )
    else:
        layers = _balanced_to(_checked_numbers(target), sizes, key)
    if imbalance == 0:
        return DeepLinear(layers)
    squared_norm = float(np.sum(np.square(layers[heavy - 1])))
    if squared_norm == 0:
        raise ValueError(
            f"init.target: is zero, so no rescaling of the layers has imbalance {imbalance}; give "
            "a target that is not zero."
        )
    t = _rescaling(imbalance / squared_norm, depth)
    exponents = [(depth - 1) * t / 2 if i == heavy else -t / 2 for i in range(1, depth + 1)]
    return DeepLinear([np.exp(e) * w for e, w in zip(exponents, layers, strict=True)])


def _balanced_to(
    target: Float[np.ndarray, "..."], sizes: tuple[int, ...], key: PRNGKeyArray | None
) -> list[Float[np.ndarray, "_ _"]]:
    """The layers of a balanced network with end-to-end matrix `target`."""
    if target.shape != (sizes[-1], sizes[0]):
        raise ValueError(
            f"init.target: needs shape (d_N, d_0) = {(sizes[-1], sizes[0])} to match widths "
            f"{sizes}, got {target.shape}."
        )
    if not np.all(np.isfinite(target)):
        raise ValueError("init.target: has entries that are not finite; give finite numbers.")
    left, singular, right = np.linalg.svd(target, full_matrices=False)
    # The N-th root would turn rounding errors such as 1e-17 into weights.
    cutoff = max(target.shape) * np.finfo(np.float64).eps * singular[0]
    rank = int(np.sum(singular > cutoff))
    bottleneck = min(sizes)
    if rank > bottleneck:
        raise ValueError(
            f"init.target: has rank {rank}, but widths {sizes} let through at most {bottleneck}; "
            f"use widths of at least {rank} or a target of lower rank."
        )
    root = np.where(singular > cutoff, singular, 0.0)[:bottleneck] ** (1 / (len(sizes) - 1))
    hidden = _frames(sizes[1:-1], bottleneck, key)
    frames = [right[:bottleneck].T, *hidden, left[:, :bottleneck]]
    return _chain(root, frames)


def _random_balanced(
    scale: float, sizes: tuple[int, ...], key: PRNGKeyArray | None
) -> list[Float[np.ndarray, "_ _"]]:
    """The layers of a random balanced network with all singular values equal to `scale`."""
    if key is None:
        raise ValueError(
            "init.key: is needed to draw a random end-to-end matrix; pass key=jax.random.key(0), "
            "or the end-to-end matrix as target."
        )
    bottleneck = min(sizes)
    root = np.full(bottleneck, scale ** (1 / (len(sizes) - 1)))
    return _chain(root, _frames(sizes, bottleneck, key))


def _chain(
    root: Float[np.ndarray, " rank"], frames: list[Float[np.ndarray, "_ rank"]]
) -> list[Float[np.ndarray, "_ _"]]:
    r"""The layers $R_i S^{1/N} R_{i-1}^\top$."""
    return [(above * root) @ below.T for below, above in pairwise(frames)]


def _frames(
    sizes: Sequence[int], rank: int, key: PRNGKeyArray | None
) -> list[Float[np.ndarray, "_ rank"]]:
    """For every width `d` a `(d, rank)` matrix with orthonormal columns, random if there is a key.

    Without a key these are the first `rank` unit vectors.
    """
    if key is None or len(sizes) == 0:
        return [np.eye(d, rank) for d in sizes]
    frames = _semi_orthogonal(_checked_key(key), tuple((d, rank) for d in sizes))
    return [np.asarray(frame, np.float64) for frame in frames]


@partial(jax.jit, static_argnames="shapes")
def _normals(key: PRNGKeyArray, shapes: tuple[tuple[int, int], ...]) -> list[Float[Array, "_ _"]]:
    """Independent standard normal matrices, from one draw because compiling each takes time."""
    sizes = [rows * columns for rows, columns in shapes]
    draw = jax.random.normal(key, (sum(sizes),), float)
    parts = jnp.split(draw, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@partial(jax.jit, static_argnames="shapes")
def _semi_orthogonal(
    key: PRNGKeyArray, shapes: tuple[tuple[int, int], ...]
) -> list[Float[Array, "_ _"]]:
    r"""Independent uniform matrices with orthonormal columns, or rows if there are fewer.

    The factor $Q$ of a normal matrix $QR$ is uniform once the diagonal of $R$ is made positive.
    """
    matrices = []
    for normal in _normals(key, shapes):
        wide = normal.shape[0] < normal.shape[1]
        q, r = jnp.linalg.qr(normal.T if wide else normal)
        q = q * jnp.where(jnp.diag(r) < 0, -1.0, 1.0)
        matrices.append(q.T if wide else q)
    return matrices


def _rescaling(relative_imbalance: float, depth: int) -> float:
    r"""The root $t \ge 0$ of $e^{(N-1)t} - e^{-t} = D/q$ for depth $N \ge 2$."""

    def excess(t: float) -> float:
        return float(np.expm1((depth - 1) * t) - np.expm1(-t)) - relative_imbalance

    # e^{(N-1)t} = D/q + e^{-t} <= D/q + 1; the margin covers rounding.
    upper = (1 + 1e-9) * float(np.log1p(relative_imbalance)) / (depth - 1)
    precision = np.finfo(np.float64)
    solution = root_scalar(
        excess,
        method="brentq",
        bracket=(0.0, upper),
        xtol=float(precision.tiny),
        rtol=float(4 * precision.eps),
    )
    return float(solution.root)


def _checked_widths(widths: Widths) -> tuple[int, ...]:
    sizes = tuple(widths)
    if len(sizes) < 2:
        raise ValueError(
            f"init.widths: got {sizes}; a network needs at least the input and output widths "
            "(d_0, d_1)."
        )
    for i, d in enumerate(sizes):
        if isinstance(d, bool) or not isinstance(d, int | np.integer) or d < 1:
            raise ValueError(
                f"init.widths: d_{i} is {d!r} in {sizes}; every width must be a positive integer."
            )
    return tuple(int(d) for d in sizes)


def _checked_numbers(target: object) -> Float[np.ndarray, "..."]:
    if np.ma.isMaskedArray(target):
        raise ValueError(
            "init.target: is a masked array, whose mask would be lost; give a full matrix, such as "
            "target.filled(0.0)."
        )
    if is_complex(target):
        raise TypeError(
            "init.target: needs real numbers, got complex ones; give their real part if the "
            "imaginary one is 0."
        )
    try:
        return np.asarray(target, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"init.target: needs a rectangular matrix of real numbers, got {target!r}."
        ) from error


def _checked_scale(scale: Any) -> float:
    if _is_key(scale):
        raise TypeError("init.scale: got a random key; the key comes third, or as key=....")
    value = float_of(scale)
    if not 0 < value < np.inf:
        raise ValueError(f"init.scale: got {value}; it must be a positive finite number.")
    return value


def _needed_key(key: object) -> PRNGKeyArray:
    if key is None:
        raise ValueError("init.key: is needed to draw weights; pass key=jax.random.key(0).")
    return _checked_key(key)


def _checked_key(key: object) -> PRNGKeyArray:
    if not isinstance(key, Array) or not _is_key(key):
        raise TypeError(f"init.key: got {key!r}; pass a random key such as jax.random.key(0).")
    return key


def _is_key(value: object) -> bool:
    return isinstance(value, Array) and (
        jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype == np.uint32
    )
