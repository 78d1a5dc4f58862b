r"""Noise along the minima manifold: the diffusion of the slow flow.

Noise on the data is normal to the manifold, and so is the part $g(d_u \hat S)$ of noise inside the
network: both are $\tilde J^\top$ of something. What is left is, in the terms of
`gradflow.theory.layer_noise`,

$$P_T z = P_T \Big( \text{noise on the gradient}
  + \sum_u \zeta_u \nabla_W \langle d_u, M \rangle_{M = \hat M - \kappa\, d_u \hat S} \Big) .$$

So masks (Bernoulli dropout, DropConnect) always move along the manifold; Gaussian factors do if the
rows of a step keep a residual; Gaussian noise on the weights does together with noise on the data.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import Weights
from gradflow.geometry.base import output_loss
from gradflow.geometry.manifold import tangent
from gradflow.problem import Problem
from gradflow.regularizers.averaged import layer_noises
from gradflow.regularizers.base import (
    AbstractActivationNoise,
    AbstractGradientNoise,
    AbstractLayerNoise,
    AbstractRegularizer,
)
from gradflow.regularizers.diffusion import data_sources
from gradflow.theory.layer_numbers import is_mask, numbers_of
from gradflow.theory.noise import gradient_noise_variances
from gradflow.theory.row_moments import compressed, data_columns, moment_columns, row_moments

NEGLIGIBLE = 1e-26
"""Variance, as a fraction of that of the data, below which rounding errors make it."""

LARGEST_FACTOR = 50_000_000
"""Entries up to which `tangential_factor` forms the factor (400 MB in float64)."""


def has_tangential_noise(problem: Problem) -> bool:
    """Whether noise moves the weights of a deep network along the minima manifold.

    Noise on the gradient; masks; Gaussian factors of hidden units if the rows of a step keep a
    residual at the minima; Gaussian noise on the weights together with noise on the data. Levels
    must be concrete; a mechanism whose levels are all zero does not count.
    """
    if any(isinstance(r, AbstractGradientNoise) and _acts(r) for r in problem.regularizers):
        return True
    loss = output_loss(problem)
    target = (loss.target,)  # of depth 1: only the end-to-end matrix matters
    data, moments = problem.data, problem.noise_moments(target)
    for r in problem.layer_noise:
        if not _acts(r):
            continue
        if is_mask(r):
            return True
        if isinstance(r, AbstractActivationNoise):
            errors = jnp.trace(row_moments(problem, target)[: data.d_out, : data.d_out])
            size = jnp.trace(data.syy)
        else:
            sources = data_sources(problem.regularizers)
            errors = sum((jnp.trace(s.covariance(moments)) for s in sources), start=jnp.zeros(()))
            size = jnp.trace(data.syy) * jnp.trace(loss.s)
        if float(errors) > NEGLIGIBLE * float(size):
            return True
    return False


def tangential_size(problem: Problem, weights: Weights) -> int:
    """The number of standard normals that `tangential_noise` takes; 0 if there is none."""
    total = sum(w.size for w in weights) if problem.has_gradient_noise else 0
    for r in layer_noises(problem.regularizers, len(weights)):
        columns = eqx.filter_eval_shape(_columns, r, problem, weights)
        if columns is not None:
            total += columns.shape[-1] * numbers_of(r, weights).variances.size
    return total


def tangential_noise(
    problem: Problem, weights: Weights, normals: Float[Array, " normals"]
) -> Weights:
    r"""$F \zeta$ with $F F^\top = \mathrm{Cov}(P_T z)$: noise along the manifold in one step.

    The slow flow of training with step size $h$ and momentum $\beta$ moves by
    $\tfrac{\sqrt h}{1 - \beta} F\, dB$ in flow time. Nothing larger than the layers and the normals
    is formed; their number is that of the weights (noise on the gradient) or $d_N d_0$ to
    $(d_N + d_0)\, d_0$ times that of the hidden units or weights (noise inside the network).

    **Arguments:**

    - `problem`: data and regularizers.
    - `weights`: layers `(d_i, d_{i-1})` of a minimum.
    - `normals`: `(tangential_size(problem, weights),)`.

    **Returns:** one array a layer, tangent to the manifold.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    total = tuple(jnp.zeros_like(w) for w in weights)
    if problem.has_gradient_noise:
        levels = gradient_noise_variances(problem, len(weights))
        cuts = list(itertools.accumulate(w.size for w in weights))
        *pieces, normals = jnp.split(normals, cuts)
        total = tuple(
            jnp.sqrt(v) * z.reshape(w.shape)
            for v, z, w in zip(levels, pieces, weights, strict=True)
        )
    for r in layer_noises(problem.regularizers, len(weights)):
        numbers, columns = numbers_of(r, weights), _columns(r, problem, weights)
        if columns is None:
            continue
        rank = columns.shape[-1]
        own, normals = jnp.split(normals, (rank * numbers.variances.size,))
        z = own.reshape(-1, rank) * jnp.sqrt(numbers.variances)[:, None]
        w = jnp.einsum("mic,uc->miu", columns, z)
        m = w[: problem.data.d_out]
        if numbers.is_mask:
            d = numbers.directions(weights)
            m = m - jnp.einsum("oju,jiu->oiu", d, w[problem.data.d_out :])
        noise = numbers.pulled(weights, m)
        total = tuple(a + b for a, b in zip(total, noise, strict=True))
    return tangent(weights, total, output_loss(problem))


def tangential_factor(problem: Problem, weights: Weights) -> Float[Array, "parameters normals"]:
    r"""$F$ of `tangential_noise` as a matrix: rows in the order of the layers, row-major.

    **Raises:** `ValueError` beyond `LARGEST_FACTOR` entries.
    """
    size = tangential_size(problem, weights)
    parameters = sum(w.size for w in weights)
    if parameters * size > LARGEST_FACTOR:
        raise ValueError(
            f"weights: the factor of the tangential noise of {parameters} parameters has {size} "
            f"columns, too many for a matrix (limit {LARGEST_FACTOR} entries); apply it with "
            "tangential_noise(problem, weights, normals)."
        )

    def column(unit: Float[Array, " normals"]) -> Float[Array, " parameters"]:
        return jnp.concatenate([v.ravel() for v in tangential_noise(problem, weights, unit)])

    return jax.vmap(column, out_axes=1)(jnp.eye(size, dtype=weights[0].dtype))


def _acts(noise: AbstractRegularizer) -> bool:
    """Whether any of its levels is not zero."""
    return any(bool(jnp.any(level != 0.0)) for level in jax.tree.leaves(noise))


def _columns(
    noise: AbstractLayerNoise, problem: Problem, weights: Weights
) -> Float[Array, "_ d_in columns"] | None:
    r"""Columns of what tangential noise sees: $w$ for masks, $\hat M$ else; None for nothing."""
    if is_mask(noise):
        return moment_columns(noise, problem, weights)
    if isinstance(noise, AbstractActivationNoise):
        return compressed(moment_columns(noise, problem, weights)[: problem.data.d_out])
    data = data_columns(problem, weights)
    return None if data is None else compressed(data[: problem.data.d_out])
