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

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.geometry.base import output_loss
from gradflow.geometry.manifold import tangent
from gradflow.loss import pull_back
from gradflow.network import end_to_end, left_products, right_products, widths_of
from gradflow.problem import Problem
from gradflow.regularizers.averaged import layer_noises
from gradflow.regularizers.base import (
    AbstractActivationNoise,
    AbstractBatch,
    AbstractDataNoise,
    AbstractLayerNoise,
    AbstractWeightNoise,
    NoiseMoments,
)
from gradflow.regularizers.diffusion import data_sources
from gradflow.regularizers.drop_connect import DropConnect
from gradflow.regularizers.dropout import Dropout
from gradflow.regularizers.label_noise import LabelNoise
from gradflow.theory.noise import gradient_noise_variances
from gradflow.types import EndToEnd, Weights


class Numbers(NamedTuple):
    r"""The random numbers of one mechanism.

    - `variances`: $v_u$.
    - `directions`: $W \mapsto (d_u(W))_u$, `(d_N, d_0, numbers)`.
    - `is_mask`: $\kappa$.
    """

    variances: Float[Array, " numbers"]
    directions: Callable[[Weights], Array]
    is_mask: bool

    def shifted(
        self, weights: Weights, w: Float[Array, "D d_in columns"]
    ) -> Float[Array, "d_out d_in numbers columns"]:
        r"""$d_u \hat S$ of each $w = (\hat M, \hat S)$."""
        s = w[weights[-1].shape[0] :]
        return jnp.einsum("oju,jic->oiuc", self.directions(weights), s)

    def residual(
        self, weights: Weights, w: Float[Array, "D d_in columns"]
    ) -> Float[Array, "d_out d_in _ columns"]:
        r"""$\hat M - \kappa\, d_u \hat S$ of each $w$; one for all numbers if $\kappa = 0$."""
        m = w[: weights[-1].shape[0], :, None]
        return m - self.shifted(weights, w) if self.is_mask else m

    def pulled(self, weights: Weights, m: Float[Array, "d_out d_in numbers"]) -> Weights:
        r"""$\sum_u \nabla_W \langle d_u, M_u \rangle$."""
        return jax.vjp(self.directions, weights)[1](m)[0]

    def bends(
        self, weights: Weights, root: Float[Array, "d_in d_in"]
    ) -> Float[Array, "outputs d_out d_in numbers"]:
        r"""$\tilde J\, \nabla_W \langle d_u, M \rangle$, by component: what multiplies $M$.

        The derivatives of the directions along the normals $\tilde J^\top e_a$.
        """

        def along(unit: EndToEnd) -> Float[Array, "d_out d_in numbers"]:
            return jax.jvp(self.directions, (weights,), (pull_back(weights, unit @ root),))[1]

        return jax.vmap(along)(_unit_matrices(weights))


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

    answers = response.T.reshape(_unit_matrices(weights).shape)
    each = jax.vmap(turn)(answers, tangential_normal_covariance(problem, weights))
    return tuple(jnp.sum(g, axis=0) for g in each)


def tangential_normal_covariance(problem: Problem, weights: Weights) -> Weights:
    r"""$E[P_T z\, (\tilde J z)_b]$, one array `(d_N d_0, d_i, d_{i-1})` a layer, first axis $b$.

    **Raises:** `ValueError` for a noise that cannot act on a network of this depth.
    """
    root, levels = problem.noisy_root, gradient_noise_variances(problem, len(weights))
    normals = jax.vmap(lambda m: pull_back(weights, m @ root))(_unit_matrices(weights))
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


# The mechanisms


def is_mask(noise: AbstractLayerNoise) -> bool:
    r"""$\kappa$: whether the noise drops units or entries, where it could move them a little."""
    return isinstance(noise, DropConnect) or (
        isinstance(noise, Dropout) and noise.kind == "bernoulli"
    )


def numbers_of(noise: AbstractLayerNoise, weights: Weights) -> Numbers:
    """The factors of the hidden units or the entries of the layers, layer by layer, row-major."""
    depth = len(weights)
    if isinstance(noise, AbstractActivationNoise):
        variances = [
            jnp.full((width,), noise.activation_variance(layer, depth))
            for layer, width in enumerate(widths_of(weights)[1:-1], start=1)
        ]
        return Numbers(jnp.concatenate(variances), unit_directions, is_mask(noise))
    if not isinstance(noise, AbstractWeightNoise):
        raise TypeError(f"noise: {type(noise).__name__} acts neither on units nor on weights.")
    masks, variances = is_mask(noise), []
    for layer, w in enumerate(weights, start=1):
        at, zero = jnp.ones_like(w) if masks else w, jnp.zeros_like(w)
        variances.append(noise.weight_variance(layer, depth, at, zero).ravel())
    directions = factor_directions if masks else entry_directions
    return Numbers(jnp.concatenate(variances), directions, masks)


def unit_directions(weights: Weights) -> Float[Array, "d_out d_in units"]:
    r"""$A_l[:, u]\, B_{l+1}[u, :]$ of every hidden unit: $dP$ by its factor."""
    lefts, rights = left_products(weights)[:-1], right_products(weights)[1:]
    pieces = [jnp.einsum("ou,ui->oiu", a, b) for a, b in zip(lefts, rights, strict=True)]
    return jnp.concatenate(pieces, axis=-1)


def entry_directions(weights: Weights) -> Float[Array, "d_out d_in parameters"]:
    r"""$A_l[:, j]\, B_l[k, :]$ of every entry of the layers: $dP$ by the entry."""
    pieces = [
        jnp.einsum("oj,ki->oijk", a, b).reshape(a.shape[0], b.shape[1], -1)
        for a, b in zip(left_products(weights), right_products(weights), strict=True)
    ]
    return jnp.concatenate(pieces, axis=-1)


def factor_directions(weights: Weights) -> Float[Array, "d_out d_in parameters"]:
    r"""$dP$ by a factor of every entry of the layers."""
    return entry_directions(weights) * jnp.concatenate([w.ravel() for w in weights])


# The data


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
    units = _unit_matrices(weights)

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
    source: AbstractBatch | AbstractDataNoise,
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
    return jnp.sum(jnp.stack(blocks), axis=0).reshape(_unit_matrices(weights).shape)


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


def _unit_matrices(weights: Weights) -> Float[Array, "outputs d_out d_in"]:
    d_out, d_in = weights[-1].shape[0], weights[0].shape[1]
    return jnp.eye(d_out * d_in, dtype=weights[0].dtype).reshape(-1, d_out, d_in)
