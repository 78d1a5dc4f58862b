r"""How many paths decompose their matrices in one library call.

Under `jax.vmap` the matrices of all paths go to LAPACK as one batch. JAX's kernels for CPUs hand a
batch of much work to the pool of threads on which XLA runs the program, and wait for it. When
several devices do so at once, or one in two places, every thread of the pool waits for the pool:
the program hangs for good (jaxlib 0.10.2, `ParallelBatchMap`). A batch of little work, or of
one matrix, stays where it is, and is no slower: paths that decompose matrices come in small groups.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from gradflow.products import on_cpu
from gradflow.types import Weights

LAPACK = frozenset(
    {"cholesky", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "householder_product",
     "linear_solve", "lu", "ormqr", "qr", "schur", "svd", "triangular_solve", "tridiagonal"}
)  # fmt: skip
"""The operations of JAX that are LAPACK's, and `linear_solve` of lineax, which hides them."""

POOLED = 200_000
"""Floating-point operations of a batch from which on it is handed to the pool."""

COST = 30
"""Operations over $n^3$ of the most expensive decomposition, the singular values with vectors."""


def decomposes(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function of one path decomposes matrices; `arguments` need shapes only."""
    return traced(function, *arguments)[1]


def traced(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], bool]:
    """A function of one path, traced once, and whether it decomposes matrices."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)

    def run(*arguments: Any) -> Any:
        results = jaxpr_as_fun(program)(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run, any(name in LAPACK for name in _primitives(program.jaxpr))


def decomposed_together(weights: Weights) -> int:
    """How many of the paths of an ensemble may decompose their matrices at once.

    The largest are taken to have as many rows as a path has weights, or entries of its end-to-end
    matrix. All paths on an accelerator, which has no such pool.

    **Arguments:** `weights`: `(d_i, d_{i-1}, R)` a layer.
    """
    paths = weights[0].shape[-1]
    if not on_cpu():
        return paths
    rows = sum(w.shape[0] * w.shape[1] for w in weights)
    rows = max(rows, weights[-1].shape[0] * weights[0].shape[1])
    return min(paths, max(1, (POOLED - 1) // (COST * rows**3)))


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
    """The names of all operations of a program, with those inside of its loops and branches."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(parameter, ClosedJaxpr):
                yield from _primitives(parameter.jaxpr)
            elif isinstance(parameter, Jaxpr):
                yield from _primitives(parameter)
