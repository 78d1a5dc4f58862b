r"""Products of small matrices, many paths at once.

A path multiplies matrices of a few rows; an ensemble does so for every path. `product` is written
for one path. Under `jax.vmap` over the last axis, the path axis, it takes the form that is fastest
for the shapes:

- *summed*: $C_{ij} = \sum_k A_{ik} B_{kj}$ written out, every term a vector over the paths, for
    inner widths up to `MOST_SUMMED` if the factors of all paths fit in a cache;
- *batched*: one library call a path, for everything else.

The forms are fast only while the matrices that they read stay in the first-level cache, so an
ensemble is to be stepped in groups of `paths_together` paths.

Nanoseconds a path for the six products of a gradient of depth 3 and their update, double
precision, one core of an AMD EPYC (Zen 4), 1,024 paths; G paths together:

| width | summed, G = 8 | 16 | 32 | 64 | 256 | 1024 | batched, path axis first | GEMM rate |
|---|---|---|---|---|---|---|---|---|
| 1 | 16 | 10 | 5 | 6 | 3 | 2 | 3 | 0 |
| 2 | 58 | 22 | 19 | 15 | 15 | 20 | 29 | 2 |
| 3 | 138 | 113 | 52 | 38 | 40 | 47 | 73 | 7 |
| 4 | 204 | 187 | 86 | 82 | 90 | 119 | 962 | 16 |
| 10 | 591 | 699 | 805 | 786 | 1,886 | 2,726 | 1,363 | 250 |
| 16 | 1,893 | 2,642 | 6,250 | | | | 2,480 | 1,020 |
| 20 | 3,979 | 5,538 | 5,876 | | | | 4,462 | 2,000 |
| 32 | 42,573 | | | | | | 14,265 | 8,200 |

The same on one NVIDIA H100, where the first form is not stored between products:

| width | paths | summed | batched |
|---|---|---|---|
| 2 | 100,000 | 0.36 | 7.6 |
| 3 | 100,000 | 0.95 | 8.2 |
| 4 | 100,000 | 2.0 | 8.3 |
| 10 | 100,000 | 32 | 19 |
| 10 | 1,000 | 27 | 36 |
| 16 | 20,000 | | 24 |
| 32 | 10,000 | | 91 |
| 64 | 2,560 | | 370 |
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

MOST_SUMMED = 20
"""Inner width up to which products are written out as sums."""

MOST_FUSED = 1
"""Inner width up to which it is cheaper to compute a factor again than to store it."""

MOST_STREAMED = 4
"""Inner width up to which sums win even over factors that do not fit in a cache."""

MOST_SUMMED_ON_ACCELERATORS = 4
"""The same on an accelerator, where a chain of sums is one kernel and nothing is stored."""

CACHE_BYTES = 2**17
"""Memory of a factor up to which wider sums win."""

GROUP_BYTES = 2**14
"""Memory of one layer of a group: half of a first-level cache."""

FEWEST_LANES = 8
"""Paths of a group that fill the vector units of the machine."""


Axes = tuple[int, int]

_product = Primitive("product")


def product(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], axes: Axes = (1, 0)
) -> Float[Array, "_ _"]:
    r"""The product of two matrices of one path; an ensemble takes the form that suits its shapes.

    $A B$; with `axes` that are summed over, one of each factor: (0, 0) for $A^\top B$, (1, 1) for
    $A B^\top$. Nothing is transposed in memory.

    **Raises:** `TypeError` if the two axes differ in length.
    """
    if a.shape[axes[0]] != b.shape[axes[1]]:
        raise TypeError(f"product: shapes {a.shape} and {b.shape} do not fit on the axes {axes}.")
    return _product.bind(a, b, axes=axes)


def on_cpu() -> bool:
    """Whether this process computes on CPUs rather than on an accelerator."""
    return jax.default_backend() == "cpu"


def paths_together(widths: tuple[int, ...], paths: int) -> int:
    """How many paths of an ensemble to step together: as many as keep a layer in the cache.

    Groups are of about equal size and fill whole vectors. One path if the products are library
    calls anyway, all of them where nothing is stored between products, and on an accelerator.
    """
    widest = max(widths)
    if widest <= MOST_FUSED or not on_cpu():
        return paths
    if widest > MOST_SUMMED:
        return 1
    fitting = max(GROUP_BYTES // (8 * widest**2), FEWEST_LANES)
    equal = -(-paths // -(-paths // fitting))
    return min(-(-equal // FEWEST_LANES) * FEWEST_LANES, paths)


def in_groups(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """Apply a function of an ensemble to one group of its paths after the other.

    **Arguments:**

    - `function`: takes and gives pytrees of arrays whose last axis is the path axis.
    - `arrays`: the pytree of all paths.
    - `size`: the paths of a group. The last group overlaps the one before if it would be smaller.
    """
    paths = jax.tree.leaves(arrays)[0].shape[-1]
    if size >= paths:
        return function(arrays)
    of_group = jax.jit(function)  # traced once, for its shapes and for the loop

    def part(first: Array) -> Any:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size, axis=-1), arrays
        )

    def one(i: Array, done: Any) -> Any:
        first = jnp.minimum(i * size, paths - size)
        return jax.tree.map(
            lambda whole, own: jax.lax.dynamic_update_slice_in_dim(whole, own, first, axis=-1),
            done,
            of_group(part(first)),
        )

    shapes = jax.eval_shape(of_group, part(jnp.zeros((), int)))
    start = jax.tree.map(lambda s: jnp.zeros((*s.shape[:-1], paths), s.dtype), shapes)
    return jax.lax.fori_loop(0, -(-paths // size), one, start)


# The forms; a factor that all paths share has a path axis of length 1


@functools.partial(jax.jit, static_argnames="axes")
def _summed(a: Float[Array, "_ _ _"], b: Float[Array, "_ _ _"], axes: Axes) -> Array:
    columns, rows = jnp.moveaxis(a, axes[0], 0), jnp.moveaxis(b, axes[1], 0)
    terms = (columns[k][:, None] * rows[k][None] for k in range(len(rows)))
    return functools.reduce(jnp.add, terms)


def _stored(a: Float[Array, "_ _ _"], b: Float[Array, "_ _ _"], axes: Axes) -> Array:
    """The sum as a function that XLA may not inline.

    It would otherwise fuse a chain of products into one loop that computes every entry of a factor
    again for every entry that needs it.
    """
    with set_xla_metadata(inlineable="false"):
        return _summed(a, b, axes)


def _batched(a: Float[Array, "_ _ _"], b: Float[Array, "_ _ _"], axes: Axes) -> Array:
    return jnp.moveaxis(_one(jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, -1, 0), axes), 0, -1)


def _one(a: Float[Array, "... _ _"], b: Float[Array, "... _ _"], axes: Axes) -> Array:
    """Paths first, if there are any."""
    return jnp.matmul(a if axes[0] else a.mT, b.mT if axes[1] else b)


def _single(a: Float[Array, "_ _"], b: Float[Array, "_ _"], axes: Axes) -> Array:
    r"""The product of one path.

    On CPUs XLA multiplies $A^\top B$ at half the rate of $A B$ and $A B^\top$, so that $A$ is
    transposed beforehand; behind a barrier, or XLA would put the transposition back. It is not told
    of $B^\top$ as a transposition either: if $B$ is a product, it would compute $B^\top$ anew.
    """
    if axes[0] == 0 and on_cpu():
        a, axes = jax.lax.optimization_barrier(a.T), (1, axes[1])
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())))


def _of_paths(a: Float[Array, "_ _ _"], b: Float[Array, "_ _ _"], axes: Axes) -> Array:
    """The product of an ensemble in the form that suits its shapes."""
    inner = b.shape[axes[1]]
    if inner <= (MOST_FUSED if on_cpu() else MOST_SUMMED_ON_ACCELERATORS):
        return _summed(a, b, axes)
    cached = inner <= MOST_SUMMED and max(a.nbytes, b.nbytes) <= CACHE_BYTES
    if on_cpu() and (cached or inner <= MOST_STREAMED):
        return _stored(a, b, axes)
    return _batched(a, b, axes)


# What JAX has to know about `product`


def _mapped(
    operands: tuple[Array, Array], places: tuple[int | None, int | None], *, axes: Axes
) -> tuple[Array, int]:
    """The product under `jax.vmap`: the mapped axis comes last."""
    a, b = (
        x[..., None] if place is None else jnp.moveaxis(x, place, -1)
        for x, place in zip(operands, places, strict=True)
    )
    return _of_paths(a, b, axes), 2


def _shape(a: ShapedArray, b: ShapedArray, *, axes: Axes) -> ShapedArray:
    free = (a.shape[1 - axes[0]], b.shape[1 - axes[1]])
    return ShapedArray(free, jnp.promote_types(a.dtype, b.dtype))


def _to_first(g: Array, a: Any, b: Array, *, axes: Axes) -> Array:
    """What a cotangent of the product is on A."""
    other = 1 - axes[1]
    return product(g, b, (1, other)) if axes[0] else product(b, g, (other, 1))


def _to_second(g: Array, a: Array, b: Any, *, axes: Axes) -> Array:
    """What a cotangent of the product is on B."""
    other = 1 - axes[0]
    return product(g, a, (0, other)) if axes[1] else product(a, g, (other, 0))


_product.def_impl(jax.jit(_single, static_argnames="axes"))
_product.def_abstract_eval(_shape)
mlir.register_lowering(_product, mlir.lower_fun(_single, multiple_results=False))
batching.primitive_batchers[_product] = _mapped
ad.defbilinear(_product, _to_first, _to_second)
