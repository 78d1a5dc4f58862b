r"""Square roots of covariances whose derivatives exist where eigenvectors have none.

An eigenvector turns at a rate $1/(\lambda_i - \lambda_j)$, and white inputs have equal eigenvalues.
The root $R$ of $M$ does not mind: $R\, dR + dR\, R = dM$ (Higham 2008, *Functions of Matrices*,
6.1), which is solved with factors $1/(\sqrt{\lambda_i} + \sqrt{\lambda_j})$; a direction that $M$
lacks stays lacking.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def matrix_root(
    matrix: Float[Array, "d d"], values: Float[Array, " d"], vectors: Float[Array, "d d"]
) -> Float[Array, "d d"]:
    r"""$M^{1/2}$ of a covariance with the given eigenpairs; 0 where an eigenvalue is."""
    del matrix
    return (vectors * jnp.sqrt(values)) @ vectors.T


@matrix_root.defjvp
def _of_root(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    root = matrix_root(*primals)
    return root, sylvester(root, tangents[0])


@jax.custom_jvp
def inverse_root(
    matrix: Float[Array, "d d"], values: Float[Array, " d"], vectors: Float[Array, "d d"]
) -> Float[Array, "d d"]:
    r"""$M^{-1/2}$ where $M$ has a range, 0 where an eigenvalue is 0 up to rounding."""
    del matrix
    cutoff = jnp.max(values) * values.size * jnp.finfo(values.dtype).eps
    kept = values > cutoff
    inverses = jnp.where(kept, 1.0 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)
    return (vectors * inverses) @ vectors.T


@inverse_root.defjvp
def _of_inverse(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    inverse = inverse_root(*primals)
    change = sylvester(matrix_root(*primals), tangents[0])
    return inverse, -inverse @ change @ inverse


@jax.custom_jvp
def sylvester(root: Float[Array, "d d"], right: Float[Array, "d d"]) -> Float[Array, "d d"]:
    r"""The solution of $R X + X R = C$ for a covariance $R$, least in norm."""
    values, vectors = jnp.linalg.eigh(root)
    sums = values[:, None] + values
    kept = sums > 100 * values.size * jnp.finfo(values.dtype).eps * jnp.max(values)
    parts = jnp.where(kept, vectors.T @ right @ vectors / jnp.where(kept, sums, 1.0), 0.0)
    return vectors @ parts @ vectors.T


@sylvester.defjvp
def _of_sylvester(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (root, right), (of_root, of_right) = primals, tangents
    solution = sylvester(root, right)
    return solution, sylvester(root, of_right - of_root @ solution - solution @ of_root)


@jax.custom_jvp
def eigenpairs(matrix: Float[Array, "d d"]) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Eigenvalues, ascending, and eigenvectors, which keep still where eigenvalues are equal."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@eigenpairs.defjvp
def _of_pairs(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], Any]:
    values, vectors = eigenpairs(primals[0])
    change = vectors.T @ tangents[0] @ vectors
    gaps = values - values[:, None]
    apart = jnp.abs(gaps) > 100 * values.size * jnp.finfo(values.dtype).eps * jnp.max(values)
    turns = jnp.where(apart, change / jnp.where(apart, gaps, 1.0), 0.0)
    return (values, vectors), (jnp.diag(change), vectors @ turns)
