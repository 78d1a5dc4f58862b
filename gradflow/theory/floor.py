"""Plateaus of the loss in the regularization phase."""

import jax.numpy as jnp
from jaxtyping import ArrayLike

from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.loss import push_forward
from gradflow.network import end_to_end, left_products, right_products
from gradflow.problem import Problem
from gradflow.regularizers.averaged import add_penalties
from gradflow.theory.noise import check_outside
from gradflow.theory.stationary import stationary_covariance

INSTEAD = (
    "it moves the minima themselves; watch averaged_loss and gradient_norm, and compare with a "
    "run of GradientFlow, which follows the averaged loss"
)


def other_pull(problem: Problem, weights: Weights) -> Weights | None:
    """The gradient of the penalties beside weight decay; None if there are none."""
    others = problem.other_penalties
    zeros = tuple(jnp.zeros_like(w) for w in weights)
    return add_penalties(zeros, weights, others) if others else None


def slaved_residual(problem: Problem, weights: Weights) -> EndToEnd:
    r"""The residual $M$ to which penalties slave the end-to-end gradient, `(d_N, d_0)`.

    $$\mathrm{vec}\, M_\mathrm{slow}
        = -\tilde K^{+}\, (\lambda N\, \mathrm{vec}\, P + J\, \nabla R), \qquad
      \tilde K = J J^\top = \sum_i A_i A_i^\top \otimes B_i^\top B_i,$$

    the value at which the decay of $P$ and the pull of the data cancel (leading order in the
    penalties; docs/theory.md section 4). $R$ are the penalties beside weight decay, $J$ the
    Jacobian of $\mathrm{vec}\, P$.

    **Raises:** `ValueError` for noise inside the network, which pulls at $P$ too.
    """
    check_outside(problem, "slaved_residual", INSTEAD)
    lefts, rights = left_products(weights), right_products(weights)
    kernel = sum(jnp.kron(a @ a.T, b.T @ b) for a, b in zip(lefts, rights, strict=True))
    p = end_to_end(weights)
    inverse = jnp.linalg.pinv(kernel, hermitian=True)
    residual = -problem.weight_decay * len(weights) * (inverse @ p.ravel())
    if (other := other_pull(problem, weights)) is not None:
        residual = residual - inverse @ push_forward(weights, other).ravel()
    return residual.reshape(p.shape)


def weight_decay_plateau(problem: Problem, weights: Weights) -> Scalar:
    r"""Excess loss held up by weight decay and other penalties.

    $$\tfrac12 \mathrm{tr}(M_\mathrm{slow}\, \bar S^{+} M_\mathrm{slow}^\top).$$

    **Raises:** `ValueError` for noise inside the network, which pulls at $P$ too.
    """
    check_outside(problem, "weight_decay_plateau", INSTEAD)
    m = slaved_residual(problem, weights)
    return 0.5 * jnp.sum((m @ problem.noisy_inverse_root) ** 2)


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
    \tfrac{h s^2}{4 n} \mathrm{tr} H$
    (docs/theory.md section 9). Noise on the gradient, of variance $v$:
    $\tfrac{h v}{2} \sum_a \tfrac{1}{2 - h \mu_a}$ over the directions in which $P$ can move.

    The arguments are those of `stationary_covariance`.

    **Raises:** `ValueError` for noise inside the network.
    """
    check_outside(problem, "noise_floor", INSTEAD)
    options = {"order": order, "amplification": amplification}
    x = stationary_covariance(problem, weights, step_size, discrete, momentum, **options)
    return 0.5 * jnp.trace(x)
