r"""How many paths decompose their matrices in one library call.

Under `jax.vmap` the matrices of all paths go to LAPACK as one batch. JAX's kernels for CPUs hand a
batch of much work to the pool of threads on which XLA runs the program, and wait for it. When
several devices do so at once, or one in two places, every thread of the pool waits for the pool:
the program hangs for good (jaxlib 0.10.2, `ParallelBatchMap`). A batch of little work, or of
one matrix, stays where it is, and is no slower: paths that decompose matrices come in small groups.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun

from gradflow.backend.products import on_cpu
from gradflow.backend.types import Weights

LAPACK = frozenset(
    {"cholesky", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "householder_product",
     "linear_solve", "lu", "ormqr", "qr", "schur", "svd", "triangular_solve", "tridiagonal"}
)  # fmt: skip
"""The operations of JAX that are LAPACK's, and `linear_solve` of lineax, which hides them."""

POOLED = 200_000
"""Floating-point operations of a batch from which on it is handed to the pool."""

COST = 30
"""Operations over $n^3$ of the most expensive decomposition, the singular values with vectors."""

CHEAPER = {"eigh": 10, "cholesky": 6}
"""The same of operations that cost less. Context switches give a batch away that is handed to the
pool: that happens at a cost between 4 and 8, between 2 and 4; of singular values at 8 to 12."""


def decomposes(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function of one path decomposes matrices; `arguments` need shapes only."""
    return traced(function, *arguments)[1] > 0


def traced(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], float]:
    """A function of one path, traced once, and the operations of its largest decomposition.

    0 if there is none, infinity where its size does not show.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)

    def run(*arguments: Any) -> Any:
        results = jaxpr_as_fun(program)(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run, max(map(_operations, _equations(program.jaxpr)), default=0.0)


def decomposed_together(weights: Weights, operations: float = math.inf) -> int:
    """How many of the paths of an ensemble may decompose their matrices at once.

    All paths on an accelerator, which has no such pool, or if there is nothing to decompose.

    **Arguments:**

    - `weights`: `(d_i, d_{i-1}, R)` a layer.
    - `operations`: of the largest decomposition of a path, as `traced` gives them; if they are not
        known, its matrix is taken to have as many rows as a path has weights, or entries of its
        end-to-end matrix.
    """
    paths = weights[0].shape[-1]
    if not on_cpu() or operations == 0.0:
        return paths
    if operations == math.inf:
        rows = sum(w.shape[0] * w.shape[1] for w in weights)
        operations = COST * max(rows, weights[-1].shape[0] * weights[0].shape[1]) ** 3
    return min(paths, max(1, int((POOLED - 1) // operations)))


def _operations(equation: JaxprEqn) -> float:
    """Those of a decomposition; 0 for everything else."""
    name = equation.primitive.name
    if name not in LAPACK:
        return 0.0
    shapes = [getattr(v.aval, "shape", ()) for v in equation.invars]
    sides = [side for shape in shapes if len(shape) > 1 for side in shape[-2:]]
    if name == "linear_solve" or not sides:
        return math.inf
    together = max(math.prod(shape[:-2]) for shape in shapes)
    return CHEAPER.get(name, COST) * together * float(max(sides)) ** 3


def _equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All operations of a program, with those inside of its loops and branches."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(parameter, ClosedJaxpr):
                yield from _equations(parameter.jaxpr)
            elif isinstance(parameter, Jaxpr):
                yield from _equations(parameter)
