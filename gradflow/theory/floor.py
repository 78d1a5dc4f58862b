"""Plateaus of the loss in the regularization phase."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from gradflow.network import end_to_end, left_products, right_products
from gradflow.problem import Problem
from gradflow.regularizers.weight_decay import WeightDecay
from gradflow.theory.noise import check_outside, gradient_noise_variances, noise_covariance
from gradflow.types import EndToEnd, Scalar, Weights

INSTEAD = (
    "it moves the minima themselves; watch averaged_loss and gradient_norm, and compare with a "
    "run of GradientFlow, which follows the averaged loss"
)


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

    **Raises:** `ValueError` for noise inside the network, which pulls at $P$ too.
    """
    check_outside(problem, "slaved_residual", INSTEAD)
    lefts, rights = left_products(weights), right_products(weights)
    kernel = sum(jnp.kron(a @ a.T, b.T @ b) for a, b in zip(lefts, rights, strict=True))
    p = end_to_end(weights)
    pull = jnp.linalg.pinv(kernel, hermitian=True) @ p.ravel()
    return (-total_decay(problem) * len(weights) * pull).reshape(p.shape)


def weight_decay_plateau(problem: Problem, weights: Weights) -> Scalar:
    r"""Excess loss held up by weight decay.

    $$\tfrac12 \mathrm{tr}(M_\mathrm{slow}\, \bar S^{+} M_\mathrm{slow}^\top).$$

    **Raises:** `ValueError` for noise inside the network, which pulls at $P$ too.
    """
    check_outside(problem, "weight_decay_plateau", INSTEAD)
    m = slaved_residual(problem, weights)
    return 0.5 * jnp.sum((m @ problem.noisy_inverse_root) ** 2)


def stationary_covariance(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    discrete: bool,
    momentum: ArrayLike | None = None,
    *,
    order: int = 1,
    amplification: int = 1,
) -> Float[Array, "outputs outputs"]:
    r"""Covariance of $x = \mathrm{vec}((P - T) \bar S^{1/2})$ in the regularization phase.

    Linearised at the weights, $\dot x = -K x$ with the kernel
    $K = \sum_i K_i = \sum_i A_i A_i^\top \otimes \bar S^{1/2} B_i^\top B_i \bar S^{1/2}$
    (eigenvalues $\mu_a$), and the noise of one step $N = K C' K + \sum_i v_i K_i$ with
    $C' = (I \otimes \bar S^{-1/2}) C (I \otimes \bar S^{-1/2})$ from the data and the variances
    $v_i$ of the noise on the gradient. In the eigenbasis of $K$

    $$X_{ab} = \frac{h N_{ab}}{\mu_a + \mu_b - h \mu_a \mu_b} \text{ (discrete)},
      \qquad X_{ab} = \frac{h N_{ab}}{\mu_a + \mu_b} \text{ (SDE)},$$

    with $h / l$ in the denominator for SVAG and $\mu + h \mu^2 / 2$ for $\mu$ there for the SDE of
    order 2. With heavy-ball momentum only the diagonal, which the loss floor needs, is filled:
    $X_{aa} = h N_{aa} (1 + \beta) / ((1 - \beta) \mu_a (2 (1 + \beta) - h \mu_a))$. Entries beyond
    the edge of stability are NaN.

    **Arguments:**

    - `problem`, `weights`: where.
    - `step_size`: $h$ of the training.
    - `discrete`: training itself, or its SDE.
    - `momentum`: heavy-ball $\beta$ of the training.
    - `order`: of the SDE, 1 or 2.
    - `amplification`: $l$ of SVAG.

    **Raises:** `ValueError` for noise inside the network, which moves the minima themselves.
    """
    check_outside(problem, "stationary_covariance", INSTEAD)
    h = jnp.asarray(step_size)
    parts = [
        jnp.kron(a @ a.T, half.T @ half)
        for a, half in zip(
            left_products(weights),
            [b @ problem.noisy_root for b in right_products(weights)],
            strict=True,
        )
    ]
    mu, vectors = jnp.linalg.eigh(sum(parts))
    widen = jnp.kron(jnp.eye(problem.data.d_out, dtype=mu.dtype), problem.noisy_inverse_root)
    of_data = vectors.T @ widen @ noise_covariance(problem, weights) @ widen @ vectors
    a, b = mu[:, None], mu[None, :]
    variances = gradient_noise_variances(problem, len(weights))
    of_gradient = sum(v * k for v, k in zip(variances, parts, strict=True))
    noise = a * b * of_data + vectors.T @ of_gradient @ vectors
    if not discrete:
        damping = a + b if order == 1 else a + b + 0.5 * h * (a**2 + b**2)
    elif momentum is None:
        damping = a + b - h / amplification * a * b
    else:
        beta = jnp.asarray(momentum)
        damping = (1.0 - beta) * (a + b - h * a * b / (1.0 + beta))
        noise = jnp.diag(jnp.diag(noise))
    still = jnp.max(mu) * mu.size * jnp.finfo(mu.dtype).eps
    moving = (a > still) & (b > still)
    stable = damping > 0.0
    ratio = jnp.where(moving, h / jnp.where(moving & stable, damping, 1.0), 0.0)
    ratio = jnp.where(stable | ~moving, ratio, jnp.nan)
    return vectors @ (ratio * noise) @ vectors.T


def noise_floor(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    discrete: bool,
    momentum: ArrayLike | None = None,
    *,
    order: int = 1,
    amplification: int = 1,
) -> Scalar:
    r"""Expected excess loss in the regularization phase, $\tfrac12 \mathrm{tr} X$.

    Label noise on $n$ samples: $\tfrac{h s^2}{2 n} \sum_a \tfrac{\mu_a}{2 - h \mu_a} \approx
    \tfrac{h s^2}{4 n} \mathrm{tr} H$ (theory section 9). Noise on the gradient, of variance $v$:
    $\tfrac{h v}{2} \sum_a \tfrac{1}{2 - h \mu_a}$ over the directions in which $P$ can move.

    The arguments are those of `stationary_covariance`.

    **Raises:** `ValueError` for noise inside the network.
    """
    check_outside(problem, "noise_floor", INSTEAD)
    options = {"order": order, "amplification": amplification}
    x = stationary_covariance(problem, weights, step_size, discrete, momentum, **options)
    return 0.5 * jnp.trace(x)
