r"""How sure the slow flow is: the size of the fast fluctuation, and the scatter between runs."""

import jax.numpy as jnp
from jaxtyping import ArrayLike

from gradflow.backend.types import Scalar, Weights
from gradflow.geometry.base import output_loss
from gradflow.geometry.imbalance import squared_norms
from gradflow.network import DeepLinear, left_products, right_products
from gradflow.problem import Problem
from gradflow.theory.layer_numbers import is_mask
from gradflow.theory.noise import check_outside
from gradflow.theory.normal_response import normal_response
from gradflow.theory.stationary import fluctuation, training_law


def fluctuation_share(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    momentum: ArrayLike | None = None,
    *,
    finite_step: bool = True,
) -> Scalar:
    r"""$E |\delta W|^2 / |W|^2$: how far training fluctuates about the minima manifold.

    $$E |\delta W|^2 = \mathrm{tr}(\tilde J^\top K^{-1} X K^{-1} \tilde J)
      = \mathrm{tr}(K^{-1} X)$$

    with the stationary covariance $X$ of `stationary_covariance`. The slow flow is the leading
    order in this number: what it neglects is of this size relative to what it keeps, with a
    factor of order one that depends on the problem; and of the size of its root if the noise
    `is_skewed`, through the third moments.

    **Arguments:** as for `slow_drift`.
    """
    law = training_law(step_size, finite_step, momentum)
    response, _ = normal_response(problem, weights, law, feedback=finite_step)
    moved = jnp.trace(response.over_inputs(jnp.eye(weights[0].shape[1], dtype=weights[0].dtype)))
    return moved / jnp.sum(squared_norms(DeepLinear(weights)))


def is_skewed(problem: Problem) -> bool:
    """Whether the noise has third moments: batches of a finite sample, and masks."""
    rows = problem.minibatch is not None and problem.data.x is not None
    return rows or any(is_mask(r) for r in problem.layer_noise)


def imbalance_variance_rate(problem: Problem, weights: Weights, step_size: ArrayLike) -> Scalar:
    r"""$d\, \mathrm{Var}(D) / dt$ between runs of plain training, per unit of flow time.

    One step changes the difference of the largest and the smallest squared norm of a layer by
    exactly $h^2 z^\top Q z$, where $z = \mathrm{vec}(\tilde M S^{-1/2})$ is the stochastic gradient
    and $Q = K_\mathrm{top} - K_\mathrm{bottom}$ the difference of the two layers' terms of $K$. At
    a minimum $z = x + \nu$ is the fluctuation plus fresh noise of covariance $C'$, with
    $x_{k+1} = x_k - h K z_k$, so that $\Gamma_l = E z_{k+l} z_k^\top$ is $X + C'$ at lag 0 and
    $F^{l-1} (F X - h K C')$ beyond, $F = I - h K$. For Gaussian $z$

    $$\frac{d\, \mathrm{Var}(D)}{dt} = 2 h^3 \Big( \mathrm{tr}(Q \Gamma_0 Q \Gamma_0)
      + 2 \sum_{l \ge 1} \mathrm{tr}(Q \Gamma_l Q \Gamma_l^\top) \Big).$$

    Over times in which $D$ itself changes little the standard deviation between runs is the root
    of this number times $t$. Exact in the step size, leading order in the noise. The noise of
    minibatches is not Gaussian; its fourth cumulant is neglected.

    **Raises:** `ValueError` for noise inside the network or on the gradient, whose gradients are
    not those of an end-to-end matrix.
    """
    check_outside(problem, "imbalance_variance_rate", "simulate replicas and take their spread")
    if problem.has_gradient_noise:
        raise ValueError(
            "imbalance_variance_rate covers noise on the data, not GradientNoise; simulate "
            "replicas and take their spread."
        )
    h, root = jnp.asarray(step_size), output_loss(problem).root
    state = fluctuation(problem, weights, training_law(h, True))
    norms = squared_norms(DeepLinear(weights))
    factors = zip(left_products(weights), right_products(weights), strict=True)
    kernels = jnp.stack([jnp.kron(a @ a.T, root @ (b.T @ b) @ root) for a, b in factors])
    q = kernels[jnp.argmax(norms)] - kernels[jnp.argmin(norms)]
    q = state.vectors.T @ q @ state.vectors
    x, mu = state.covariance, state.values
    a, b = mu[:, None], mu[None, :]
    inverse = state.inverse_values
    fresh = x * (a + b - h * a * b) / h * inverse[:, None] * inverse[None, :]
    damped = 1.0 - h * mu
    later = damped[:, None] * x - h * a * fresh
    now = q @ (x + fresh)
    still = (state.moving == 0.0)[:, None] | (state.moving == 0.0)[None, :]
    lags = jnp.where(still, 0.0, 1.0 / jnp.where(still, 1.0, 1.0 - damped[:, None] * damped))
    lagged = jnp.sum(q * (later @ q @ later.T) * lags)
    return 2.0 * h**3 * (jnp.sum(now * now.T) + 2.0 * lagged)
