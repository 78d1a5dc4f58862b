"""Plateaus of the loss in the regularization phase."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from gradflow.geometry.curvature import kernel_of_root
from gradflow.network import end_to_end, left_products, right_products
from gradflow.problem import Problem
from gradflow.regularizers.weight_decay import WeightDecay
from gradflow.theory.noise import noise_covariance
from gradflow.types import EndToEnd, Scalar, Weights


def total_decay(problem: Problem) -> Scalar:
    r"""The total weight-decay rate $\lambda$ of a problem (0 without any)."""
    rates = [r.rate for r in problem.regularizers if isinstance(r, WeightDecay)]
    return sum(rates, start=jnp.zeros((), problem.data.sxx.dtype))


def slaved_residual(problem: Problem, weights: Weights) -> EndToEnd:
    r"""The residual $M$ to which weight decay slaves the end-to-end gradient, `(d_N, d_0)`.

    $$\mathrm{vec}\, M_\mathrm{slow} = -\lambda N\, \tilde K^{+}\, \mathrm{vec}\, P, \qquad
      \tilde K = \sum_i A_i A_i^\top \otimes B_i^\top B_i,$$

    the value at which the decay of $P$ and the pull of the data cancel (leading order in
    $\lambda$; theory section 4).
    """
    lefts, rights = left_products(weights), right_products(weights)
    kernel = sum(jnp.kron(a @ a.T, b.T @ b) for a, b in zip(lefts, rights, strict=True))
    p = end_to_end(weights)
    pull = jnp.linalg.pinv(kernel, hermitian=True) @ p.ravel()
    return (-total_decay(problem) * len(weights) * pull).reshape(p.shape)


def weight_decay_plateau(problem: Problem, weights: Weights) -> Scalar:
    r"""Excess loss held up by weight decay.

    $$\tfrac12 \mathrm{tr}(M_\mathrm{slow}\, \bar S^{+} M_\mathrm{slow}^\top).$$
    """
    m = slaved_residual(problem, weights)
    return 0.5 * jnp.sum((m @ problem.noisy_inverse_root) ** 2)


def stationary_covariance(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    discrete: bool,
    momentum: ArrayLike | None = None,
) -> Float[Array, "outputs outputs"]:
    r"""Covariance of $x = \mathrm{vec}((P - T) \bar S^{1/2})$ in the regularization phase.

    Linearised at the weights with the kernel $K$ (eigenvalues $\mu_a$) and the noise
    $C' = (I \otimes \bar S^{-1/2}) C (I \otimes \bar S^{-1/2})$, both in the eigenbasis of $K$:

    $$X_{ab} = \frac{h \mu_a \mu_b C'_{ab}}{\mu_a + \mu_b - h \mu_a \mu_b} \text{ (discrete)},
      \qquad X_{ab} = \frac{h \mu_a \mu_b C'_{ab}}{\mu_a + \mu_b} \text{ (SDE)}.$$

    With heavy-ball momentum only the diagonal, which the loss floor needs, is filled:
    $X_{aa} = h \mu_a C'_{aa} (1 + \beta) / ((1 - \beta)(2 (1 + \beta) - h \mu_a))$. Entries beyond
    the edge of stability are NaN.
    """
    h = jnp.asarray(step_size)
    mu, vectors = jnp.linalg.eigh(kernel_of_root(weights, problem.noisy_root))
    widen = jnp.kron(jnp.eye(problem.data.d_out, dtype=mu.dtype), problem.noisy_inverse_root)
    noise = vectors.T @ widen @ noise_covariance(problem, weights) @ widen @ vectors
    a, b = mu[:, None], mu[None, :]
    if not discrete:
        damping = a + b
    elif momentum is None:
        damping = a + b - h * a * b
    else:
        beta = jnp.asarray(momentum)
        damping = (1.0 - beta) * (a + b - h * a * b / (1.0 + beta))
        noise = jnp.diag(jnp.diag(noise))
    moving = a + b > jnp.max(mu) * mu.size * jnp.finfo(mu.dtype).eps
    stable = damping > 0.0
    ratio = jnp.where(moving, h * a * b / jnp.where(stable, damping, 1.0), 0.0)
    ratio = jnp.where(stable | ~moving, ratio, jnp.nan)
    return vectors @ (ratio * noise) @ vectors.T


def noise_floor(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    discrete: bool,
    momentum: ArrayLike | None = None,
) -> Scalar:
    r"""Expected excess loss in the regularization phase, $\tfrac12 \mathrm{tr} X$.

    Label noise on $n$ samples: $\tfrac{h s^2}{2 n} \sum_a \tfrac{\mu_a}{2 - h \mu_a} \approx
    \tfrac{h s^2}{4 n} \mathrm{tr} H$ (theory section 9).
    """
    return 0.5 * jnp.trace(stationary_covariance(problem, weights, step_size, discrete, momentum))
