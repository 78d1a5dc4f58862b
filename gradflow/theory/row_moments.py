r"""Second and fourth moments of what a step sees of the data, $w = (\hat M, \hat S)$.

See `gradflow.theory.layer_noise` for the notation.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import EndToEnd, Weights
from gradflow.network import end_to_end
from gradflow.problem import Problem
from gradflow.regularizers.base import (
    AbstractActivationNoise,
    AbstractEndToEndNoise,
    AbstractLayerNoise,
    NoiseMoments,
)
from gradflow.regularizers.diffusion import data_sources
from gradflow.regularizers.label_noise import LabelNoise
from gradflow.theory.layer_numbers import unit_matrices


def moment_columns(
    noise: AbstractLayerNoise, problem: Problem, weights: Weights
) -> Float[Array, "D d_in columns"]:
    r"""$(w_c)$ with $\sum_c w_c w_c^\top$ the second moment of the $w$ that a number sees.

    $D = d_N + d_0$. Factors of units see one of the rows of a batch, whose share is a mean.
    """
    if isinstance(noise, AbstractActivationNoise):
        return _root(fourth_moments(problem, weights) / problem.batch)
    nothing = jnp.zeros((problem.data.d_out, problem.data.d_in), weights[0].dtype)
    mean = jnp.concatenate([nothing, problem.input_moment])[..., None]
    data = data_columns(problem, weights)
    return mean if data is None else jnp.concatenate([mean, data], axis=-1)


def data_columns(problem: Problem, weights: Weights) -> Float[Array, "D d_in columns"] | None:
    r"""$(w_c)$ with $\sum_c w_c w_c^\top$ the covariance of $w$ in one step; None without any.

    $\hat S$ is how $\hat M$ depends on $P$.

    **Raises:** `ValueError` for `Minibatch(reshuffled=True)`, whose steps are correlated in time.
    """
    sources = data_sources(problem.regularizers)
    if not sources:
        return None
    data, moments = problem.data, problem.noise_moments(weights)
    units = unit_matrices(weights)

    def columns(p: EndToEnd) -> Float[Array, "outputs columns"]:
        at = eqx.tree_at(lambda m: (m.p, m.m), moments, (p, p @ data.sxx - data.syx))
        return jnp.concatenate([_columns(r, at, units) for r in sources], axis=1)

    def input_row(unit: EndToEnd) -> Float[Array, "d_in columns"]:
        return jax.jvp(columns, (moments.p,), (unit,))[1][: data.d_in]

    of_m = columns(moments.p).reshape(data.d_out, data.d_in, -1)
    of_s = jax.vmap(input_row)(units[: data.d_in])  # the first output
    return compressed(jnp.concatenate([of_m, of_s]))


def compressed(columns: Float[Array, "D d_in _"]) -> Float[Array, "D d_in _"]:
    """At most `D d_in` columns with the same sum of squares."""
    if columns.shape[-1] <= columns.shape[0] * columns.shape[1]:
        return columns
    return _root(jnp.einsum("mic,njc->minj", columns, columns))


def _root(moments: Float[Array, "D d_in D d_in"]) -> Float[Array, "D d_in columns"]:
    """A Cholesky factor, of the moments plus rounding errors of the identity: they may be singular.

    An eigendecomposition needs no such shift, but takes a hundred times as long.
    """
    size = moments.shape[0] * moments.shape[1]
    matrix = moments.reshape(size, size)
    scale = jnp.trace(matrix)
    shift = 10.0 * size * jnp.finfo(matrix.dtype).eps * scale
    identity = jnp.eye(size, dtype=matrix.dtype)
    safe = jnp.where(scale > 0.0, matrix + shift * identity, identity)
    root = jnp.where(scale > 0.0, jnp.linalg.cholesky(safe), 0.0)
    return root.reshape(*moments.shape[:2], size)


def _columns(
    source: AbstractEndToEndNoise,
    moments: NoiseMoments,
    units: Float[Array, "outputs d_out d_in"],
) -> Float[Array, "outputs columns"]:
    """The factor of one noise as a matrix, by rows: there may be a normal for every sample."""
    at = jnp.zeros(source.normal_shape(moments.data), moments.p.dtype)
    _, back = jax.vjp(lambda normals: source.increment(moments, normals), at)
    return jax.vmap(lambda unit: back(unit)[0].ravel())(units)


def fourth_moments(problem: Problem, weights: Weights) -> Float[Array, "D d_in D d_in"]:
    r"""$E[u_m x_i\, u_n x_j]$ with $u = (e, x)$ for one row of a step, `(D, d_0, D, d_0)`.

    $D = d_N + d_0$. With the second moments $V$ of $u$ a Gaussian has
    $V_{mi} V_{nj} + V_{mn} V_{ij} + V_{mj} V_{in}$ (Isserlis). Rows $u_k$ with Gaussian noise on
    them have this of $V$ with the noise, plus $E_k[u_k x_k u_k x_k]$ less this of $V$ without it.
    """
    data = problem.data
    total = _isserlis(row_moments(problem, weights), data.d_in)
    if data.x is None or data.y is None:
        return total
    u = jnp.concatenate([data.x @ end_to_end(weights).T - data.y, data.x], axis=1)
    rows = (u[:, :, None] * data.x[:, None, :]).reshape(data.x.shape[0], -1)
    of_rows = (rows.T @ rows / data.x.shape[0]).reshape(total.shape)
    return total + of_rows - _isserlis(row_moments(problem, weights, noisy=False), data.d_in)


def row_moments(problem: Problem, weights: Weights, noisy: bool = True) -> Float[Array, "D D"]:
    r"""Second moments of $(e, x)$ for one row of a step, with the noise on inputs and labels."""
    data, p = problem.data, end_to_end(weights)
    off = p - data.best_map
    errors = off @ data.sxx @ off.T + data.residual_sqrt @ data.residual_sqrt
    cross = p @ data.sxx - data.syx
    clean = jnp.block([[errors, cross], [cross.T, data.sxx]])
    if not noisy:
        return clean
    labels = sum(r.std**2 for r in problem.data_noise if isinstance(r, LabelNoise))
    moved = jnp.concatenate([p, jnp.eye(data.d_in, dtype=p.dtype)])
    of_labels = jnp.pad(labels * jnp.eye(data.d_out, dtype=p.dtype), (0, data.d_in))
    return clean + problem.input_variance * (moved @ moved.T) + of_labels


def _isserlis(v: Float[Array, "D D"], d_in: int) -> Float[Array, "D d_in D d_in"]:
    mixed, inner = v[:, -d_in:], v[-d_in:, -d_in:]
    return (
        jnp.einsum("mi,nj->minj", mixed, mixed)
        + jnp.einsum("mn,ij->minj", v, inner)
        + jnp.einsum("mj,ni->minj", mixed, mixed)
    )
