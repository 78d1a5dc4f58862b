"""Exact expected drift of the balancedness under one step of training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from gradflow.geometry.imbalance import gram_differences, squared_norms
from gradflow.loss import pull_back
from gradflow.network import DeepLinear, left_products, right_products
from gradflow.problem import Problem
from gradflow.theory.floor import total_decay
from gradflow.theory.noise import noise_columns, noise_covariance
from gradflow.types import Scalar, Weights

TIED = 1e-6
"""Relative difference of squared norms below which two layers are tied."""


def expected_balancedness_drift(
    problem: Problem, weights: Weights, step_size: ArrayLike, discrete: bool
) -> list[Float[Array, "_ _"]]:
    r"""The expected change of every $G_i$ per unit of flow time at the weights.

    $$\frac{E\, dG_i}{dt} = -2 \lambda G_i
      + h\, [\bar g_{i+1}^\top \bar g_{i+1} - \bar g_i \bar g_i^\top]_\mathrm{discrete}
      + h \sum_c (g_{c,i+1}^\top g_{c,i+1} - g_{c,i}\, g_{c,i}^\top)$$

    with $\bar g$ the averaged gradient (penalties included) and $g_c$ the columns of the diffusion
    factor pulled back. Exact for one step of plain SGD (`discrete`) and for the generator of the
    order-1 SDE; with $h = 0$ it is gradient flow (theory sections 3 to 6).
    """
    h = jnp.asarray(step_size)
    rate = total_decay(problem)
    columns = jax.vmap(pull_back, in_axes=(None, 0))(weights, noise_columns(problem, weights))
    noise = jax.vmap(gram_differences)(columns)
    drift = [
        -2.0 * rate * g + h * jnp.sum(z, axis=0)
        for g, z in zip(gram_differences(weights), noise, strict=True)
    ]
    if discrete:
        mean = gram_differences(problem.averaged_gradient(weights))
        drift = [d + h * m for d, m in zip(drift, mean, strict=True)]
    return drift


def layer_drifts(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    discrete: bool,
    extra: Float[Array, "outputs outputs"] | None = None,
) -> Float[Array, " depth"]:
    r"""Expected $d|W_i|^2/dt$ of every layer, up to the part that all layers share, `(N,)`.

    Differences between layers are the traces of `expected_balancedness_drift`. `extra` is added
    to the covariance of the noise on $M$, e.g. the stationary covariance of $M$ itself.
    """
    h = jnp.asarray(step_size)
    covariance = noise_covariance(problem, weights)
    if extra is not None:
        covariance = covariance + extra
    lefts, rights = left_products(weights), right_products(weights)
    noise = jnp.stack(
        [
            jnp.sum(covariance * jnp.kron(a @ a.T, b.T @ b))
            for a, b in zip(lefts, rights, strict=True)
        ]
    )
    drift = -2.0 * total_decay(problem) * squared_norms(DeepLinear(weights)) + h * noise
    if discrete:
        mean = problem.averaged_gradient(weights)
        drift = drift + h * jnp.stack([jnp.sum(g * g) for g in mean])
    return drift


def imbalance_drift(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    discrete: bool,
    extra: Float[Array, "outputs outputs"] | None = None,
) -> Scalar:
    r"""The expected $dD/dt$: the drift of $|W_i|^2 - |W_j|^2$ for the pair that attains $D(W)$.

    Among layers tied up to rounding for the largest (smallest) norm the one that grows most
    (shrinks most) counts, as it does a moment later.
    """
    norms = squared_norms(DeepLinear(weights))
    drift = layer_drifts(problem, weights, step_size, discrete, extra)
    top, bottom = jnp.max(norms), jnp.min(norms)
    near = TIED * top
    growing = jnp.max(jnp.where(norms >= top - near, drift, -jnp.inf))
    shrinking = jnp.min(jnp.where(norms <= bottom + near, drift, jnp.inf))
    return growing - shrinking
