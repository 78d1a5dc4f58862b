r"""Noise of mechanisms inside the network and on the gradient, at weights on the minima manifold.

A mechanism inside the network is a set of small independent numbers $\zeta_u$ of mean 0 and
variance $v_u$: added to the factor 1 of a hidden unit (dropout) or of an entry of a layer
(DropConnect), or to the entry itself (noise on the weights). All that matters of one is its
direction $d_u(W) = \partial P / \partial \zeta_u$, in which $P$ is affine: $a b^\top$ with a column
$a$ of $A_l$ and a row $b$ of $B_{l+1}$ (units) or $B_l$ (entries), times the entry if it has a
factor. Where a step sees inputs of second moment $\hat S$ and the end-to-end gradient $\hat M$, one
number changes its gradient $g(\hat M) = (A_i^\top \hat M B_i^\top)_i$ by

$$\zeta_u \left( g(d_u \hat S) + \nabla_W \langle d_u, M \rangle \right)_{M = \hat M}
  + \zeta_u^2\, \nabla_W \langle d_u, M \rangle_{M = d_u \hat S} .$$

At first order in $v$ numbers act one at a time. Gaussian ones are small, and only the first term
counts. A mask is not small but rare, $\zeta = -1$ with probability $v$: all its moments are of
first order, and $\hat M$ is that with the unit or entry gone. So with $\kappa = 1$ for masks and
$\kappa = 0$ else the covariance is that of independent $\zeta_u z_u$ with

$$z_u = g(d_u \hat S) + \nabla_W \langle d_u, M \rangle_{M = \hat M - \kappa\, d_u \hat S} .$$

The first part of $z_u$ is normal to the minima, the second is both normal and tangential. All of
this is linear in $w = (\hat M, \hat S)$, and what counts is the second moment of $w$:

- *factors of units* are drawn for every row. A step averages $b$ independent rows with
  $w = (e x^\top, x x^\top)$: fourth moments of the data, with the noise on inputs and labels;
- *entries of layers* are drawn once a step: $w$ has the mean $(0, S)$ and fluctuates with the noise
  on the data.

**The split.** With $\tilde J$ the Jacobian of $\mathrm{vec}(P S^{1/2})$ the normal noise is
$\mathrm{Cov}(\tilde J z) = N_\mathrm{data} + N_\mathrm{layers} + N_\mathrm{moved}$: the noise on
the data at $P = T$; what `layer_noise_normal` gives; and the change of the noise on the data where
noise on the weights has moved $P$ by $dP$, which is $E[C(T + dP) - C(T)]$ carried to $x$. The
stationary fluctuation of $P$ changes it by the same law, so the caller adds the two covariances,
$X$ and `perturbation_covariance`. Factors of units have no such part: it is in the fourth moments.

**What else is of first order in $v$?** The term quadratic in $\zeta$ has the mean
$\sum_u v_u \nabla_W \langle d_u, M \rangle_{M = d_u \hat S}$. Its average is the gradient of the
averaged loss. It fluctuates with the data and is correlated with $g(\hat M)$: included. (The
correlation is zero for noise on labels, and for a Gaussian population without noise on the inputs.)
The fluctuation $\rho = P - T$ enters the residual $e = \rho x + \eta$ of a row and changes the
covariance by $v\, \mathrm{Cov}(\rho)$: of second order, left out. Given $\rho$ and the data the
part linear in $\zeta$ has mean 0, so that it is not correlated with $\rho$.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import EndToEnd, Weights
from gradflow.geometry.base import output_loss
from gradflow.geometry.manifold import tangent
from gradflow.loss import pull_back
from gradflow.network import left_products, right_products
from gradflow.problem import Problem
from gradflow.regularizers.averaged import layer_noises
from gradflow.regularizers.base import (
    AbstractActivationNoise,
    AbstractLayerNoise,
    AbstractWeightNoise,
)
from gradflow.regularizers.diffusion import data_sources
from gradflow.theory.layer_numbers import Numbers, is_mask, numbers_of, unit_matrices
from gradflow.theory.noise import gradient_noise_variances
from gradflow.theory.row_moments import data_columns, moment_columns


def perturbation_covariance(problem: Problem, weights: Weights) -> Float[Array, "outputs outputs"]:
    r"""$\Pi$: covariance of $\mathrm{vec}(dP\, S^{1/2})$ by the noise on the weights.

    $\tilde J\, \mathrm{Cov}(\xi)\, \tilde J^\top$ with the variances $\sigma^2$ of `WeightNoise`
    (in both forms) and $\alpha W^{\odot 2}$ of `DropConnect` on each entry, all added up.

    **Arguments:**

    - `problem`: data and regularizers.
    - `weights`: layers `(d_i, d_{i-1})` of a minimum.

    **Returns:** `(d_N d_0, d_N d_0)`, row-major vec; zeros without noise on the weights.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    size = weights[-1].shape[0] * weights[0].shape[1]
    total = jnp.zeros((size, size), weights[0].dtype)
    for r in layer_noises(problem.regularizers, len(weights)):
        if isinstance(r, AbstractWeightNoise):
            numbers = numbers_of(r, weights)
            d = numbers.directions(weights)
            moved = jnp.einsum("oiu,ij->oju", d, problem.noisy_root).reshape(size, -1)
            total = total + (moved * numbers.variances) @ moved.T
    return total


def layer_noise_normal(problem: Problem, weights: Weights) -> Float[Array, "outputs outputs"]:
    r"""$N_\mathrm{layers}$: covariance of $\tilde J z$ from inside the network and on the gradient.

    $$\sum_i v_i K_i + \sum_u v_u\, E[\tilde J z_u z_u^\top \tilde J^\top] + \dots$$

    with $K_i$ the part of layer $i$ of $K = \tilde J \tilde J^\top$: noise on the gradient and
    inside the network, $K \Pi K$ for Gaussian noise on the weights ($\Pi$ is
    `perturbation_covariance`) without noise on the data. The dots are the correlation of the noise
    on the data with the mean of the noise inside the network; the module says what is left to the
    caller.

    **Arguments:**

    - `problem`: data and regularizers.
    - `weights`: layers `(d_i, d_{i-1})` of a minimum.

    **Returns:** `(d_N d_0, d_N d_0)`, row-major vec; zeros without such noise.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    root, levels = problem.noisy_root, gradient_noise_variances(problem, len(weights))
    halves = [b @ root for b in right_products(weights)]
    parts = [
        v * jnp.kron(a @ a.T, half.T @ half)
        for v, a, half in zip(levels, left_products(weights), halves, strict=True)
    ]
    total = jnp.sum(jnp.stack(parts), axis=0)
    carry, data = _carry(weights, root), data_columns(problem, weights)
    for r in layer_noises(problem.regularizers, len(weights)):
        numbers = numbers_of(r, weights)
        v, seen = numbers.variances, moment_columns(r, problem, weights)
        if not _sees_residual(r, problem):
            pushed = _pushed(numbers, weights, seen, carry)
            total = total + jnp.einsum("auc,u,buc->ab", pushed, v, pushed)
            continue
        bends = numbers.bends(weights, root)
        moved = _pushed(numbers, weights, seen, carry) + _bent(numbers, weights, seen, bends)
        total = total + jnp.einsum("auc,u,buc->ab", moved, v, moved)
        if data is None:
            continue
        of_data = jnp.einsum("aoi,oic->ac", carry, data[: problem.data.d_out])
        of_mean = jnp.einsum("boiu,oiuc,u->bc", bends, numbers.shifted(weights, data), v)
        total = total + of_data @ of_mean.T + of_mean @ of_data.T
        if isinstance(r, AbstractWeightNoise):
            own = _pushed(numbers, weights, data, carry)
            total = total - jnp.einsum("auc,u,buc->ab", own, v, own)
    return total


def layer_noise_cross(
    problem: Problem, weights: Weights, response: Float[Array, "outputs outputs"]
) -> Weights:
    r"""The drift by noise that is tangential and normal at once, $E[D g(N(z))[P_T z]]$.

    $D g(N)[t]$ is the derivative of $g(N) = (A_i^\top N B_i^\top)_i$ along the weights $t$, and
    $N(z) = \mathrm{mat}(R\, \tilde J z)\, S^{1/2}$ with the response $R$: while the noise has moved
    the weights along the manifold by $P_T z$, the end-to-end gradient is $N(z)$. Linear in $R$. At
    first order in the variances of the noise inside the network, as `layer_noise_normal`.

    **Arguments:**

    - `problem`: data and regularizers.
    - `weights`: layers `(d_i, d_{i-1})` of a minimum.
    - `response`: $R$, `(d_N d_0, d_N d_0)`, row-major vec.

    **Returns:** one array a layer, not projected on the tangent space.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    root = problem.noisy_root

    def turn(answer: EndToEnd, along: Weights) -> Weights:
        return jax.jvp(lambda w: pull_back(w, answer @ root), (weights,), (along,))[1]

    answers = response.T.reshape(unit_matrices(weights).shape)
    each = jax.vmap(turn)(answers, tangential_normal_covariance(problem, weights))
    return tuple(jnp.sum(g, axis=0) for g in each)


def tangential_normal_covariance(problem: Problem, weights: Weights) -> Weights:
    r"""$E[P_T z\, (\tilde J z)_b]$, one array `(d_N d_0, d_i, d_{i-1})` a layer, first axis $b$.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    root, levels = problem.noisy_root, gradient_noise_variances(problem, len(weights))
    normals = jax.vmap(lambda m: pull_back(weights, m @ root))(unit_matrices(weights))
    total = tuple(v * n for v, n in zip(levels, normals, strict=True))
    carry, data = _carry(weights, root), data_columns(problem, weights)
    for r in layer_noises(problem.regularizers, len(weights)):
        if not _sees_residual(r, problem):
            continue
        numbers, seen = numbers_of(r, weights), moment_columns(r, problem, weights)
        bends = numbers.bends(weights, root)
        moved = _pushed(numbers, weights, seen, carry) + _bent(numbers, weights, seen, bends)
        m = jnp.einsum("oiuc,buc->boiu", numbers.residual(weights, seen), moved)
        if data is not None:
            of_data = jnp.einsum("boi,oic->bc", carry, data[: problem.data.d_out])
            m = m + jnp.einsum("oiuc,bc->boiu", numbers.shifted(weights, data), of_data)
        own = jax.vmap(partial(numbers.pulled, weights))(numbers.variances * m)
        total = tuple(a + b for a, b in zip(total, own, strict=True))
    return jax.vmap(lambda t: tangent(weights, t, output_loss(problem)))(total)


# How both reach the end-to-end matrix


def _sees_residual(noise: AbstractLayerNoise, problem: Problem) -> bool:
    r"""Whether $\hat M - \kappa\, d_u \hat S$ can be other than zero."""
    on_rows = isinstance(noise, AbstractActivationNoise)
    return on_rows or is_mask(noise) or bool(data_sources(problem.regularizers))


def _carry(weights: Weights, root: Float[Array, "d_in d_in"]) -> Float[Array, "outputs d_out d_in"]:
    r"""$\tilde J g(M)$, by component: what multiplies $M$."""
    blocks = [
        jnp.kron(a @ a.T, root @ (b.T @ b))
        for a, b in zip(left_products(weights), right_products(weights), strict=True)
    ]
    return jnp.sum(jnp.stack(blocks), axis=0).reshape(unit_matrices(weights).shape)


def _pushed(
    numbers: Numbers,
    weights: Weights,
    w: Float[Array, "D d_in columns"],
    carry: Float[Array, "outputs d_out d_in"],
) -> Float[Array, "outputs numbers columns"]:
    r"""$\tilde J g(d_u \hat S)$."""
    return jnp.einsum("aoi,oiuc->auc", carry, numbers.shifted(weights, w))


def _bent(
    numbers: Numbers,
    weights: Weights,
    w: Float[Array, "D d_in columns"],
    bends: Float[Array, "outputs d_out d_in numbers"],
) -> Float[Array, "outputs numbers columns"]:
    r"""$\tilde J\, \nabla_W \langle d_u, M \rangle$ at $M = \hat M - \kappa\, d_u \hat S$."""
    m = numbers.residual(weights, w)
    if numbers.is_mask:
        return jnp.einsum("aoiu,oiuc->auc", bends, m)
    return jnp.einsum("aoiu,oic->auc", bends, m[:, :, 0])
