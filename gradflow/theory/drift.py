"""Exact expected drift of the balancedness under one step of training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from gradflow.backend.types import Scalar, Weights
from gradflow.geometry.imbalance import gram_differences, squared_norms
from gradflow.loss import pull_back
from gradflow.network import DeepLinear, left_products, right_products, widths_of
from gradflow.problem import Problem
from gradflow.theory.floor import other_pull
from gradflow.theory.noise import (
    check_outside,
    gradient_noise_variances,
    noise_columns,
    noise_covariance,
)

TIED = 1e-6
"""Relative difference of squared norms below which two layers are tied."""

INSTEAD = (
    "follow the balancedness over replicas instead; flow_balancedness_drift gives that of the "
    "averaged flow"
)


def expected_balancedness_drift(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    discrete: bool,
    *,
    order: int = 1,
    amplification: int = 1,
) -> list[Float[Array, "_ _"]]:
    r"""The expected change of every $G_i$ per unit of flow time at the weights.

    $$\frac{E\, dG_i}{dt} = -2 \lambda G_i + \dot G_i[-\nabla R]
      + h\, [\bar g_{i+1}^\top \bar g_{i+1} - \bar g_i \bar g_i^\top]_\mathrm{discrete}
      + h \sum_c (g_{c,i+1}^\top g_{c,i+1} - g_{c,i}\, g_{c,i}^\top)
      + h (v_{i+1} d_{i+1} - v_i d_{i-1})\, I$$

    with $R$ the penalties beside weight decay (`flow_balancedness_drift` has $\dot G_i$), $\bar g$
    the averaged gradient (penalties included), $g_c$ the columns of the diffusion
    factor of the data noise pulled back and $v_i$ the variance of the noise on the gradient. Exact
    for one step of plain SGD (`discrete`) and for the generator of the SDE; with $h = 0$ it is
    gradient flow (docs/theory.md sections 3 to 6). Order 2 of the SDE has the second term too, and
    $-2 h \lambda^2 G_i$. SVAG has $h / l$ in the second term.

    **Arguments:**

    - `problem`, `weights`: where.
    - `step_size`: $h$ of the training.
    - `discrete`: training itself, or its SDE.
    - `order`: of the SDE, 1 or 2.
    - `amplification`: $l$ of SVAG.

    **Raises:** `ValueError` for noise inside the network, whose gradient is not that of an
    end-to-end matrix, and for other penalties than weight decay in an SDE of order 2.
    """
    check_outside(problem, "expected_balancedness_drift", INSTEAD)
    h = jnp.asarray(step_size)
    rate = problem.weight_decay
    balance = gram_differences(weights)
    noise = noise_balancedness(problem, weights)
    drift = [-2.0 * rate * g + h * z for g, z in zip(balance, noise, strict=True)]
    if (other := _other_velocity(problem, weights, discrete, order)) is not None:
        pulled = flow_balancedness_drift(weights, other)
        drift = [d + p for d, p in zip(drift, pulled, strict=True)]
    square, shrink = _mean_terms(h, discrete, order, amplification)
    if square is not None:
        mean = gram_differences(problem.averaged_gradient(weights))
        parts = zip(drift, mean, balance, strict=True)
        drift = [d + square * m - shrink * rate**2 * g for d, m, g in parts]
    return drift


def noise_balancedness(problem: Problem, weights: Weights) -> list[Float[Array, "_ _"]]:
    r"""What the noise on data and gradient adds to every $G_i$ per unit of flow time, over $h$.

    $$\sum_c (g_{c,i+1}^\top g_{c,i+1} - g_{c,i}\, g_{c,i}^\top)
      + (v_{i+1} d_{i+1} - v_i d_{i-1})\, I,$$

    the last two terms of `expected_balancedness_drift`.
    """
    widths = widths_of(weights)
    variances = gradient_noise_variances(problem, len(weights))
    columns = jax.vmap(pull_back, in_axes=(None, 0))(weights, noise_columns(problem, weights))
    total = []
    for i, z in enumerate(jax.vmap(gram_differences)(columns)):
        isotropic = variances[i + 1] * widths[i + 2] - variances[i] * widths[i]
        total.append(jnp.sum(z, axis=0) + isotropic * jnp.eye(widths[i + 1], dtype=z.dtype))
    return total


def flow_balancedness_drift(weights: Weights, velocity: Weights) -> list[Float[Array, "_ _"]]:
    r"""$\dot G_i$ of weights that move with the given velocity $V$, one array a layer.

    $$\dot G_i = W_{i+1}^\top V_{i+1} + V_{i+1}^\top W_{i+1} - V_i W_i^\top - W_i V_i^\top.$$

    With $V = -\nabla \bar L$ (`Problem.averaged_gradient`) this is gradient flow under every
    regularizer. Noise on the data leaves $-2 \lambda G_i$; dropout and DropConnect conserve the
    diagonals alone; noise on the weights of a network of depth 2 gives
    $2 \sigma^2 (d_2 W_1 S W_1^\top - \mathrm{tr}(S)\, W_2^\top W_2)$ (docs/theory.md section 5).
    """
    upper = [w.T @ v for w, v in zip(weights[1:], velocity[1:], strict=True)]
    lower = [v @ w.T for w, v in zip(weights[:-1], velocity[:-1], strict=True)]
    return [a + a.T - b - b.T for a, b in zip(upper, lower, strict=True)]


def layer_drifts(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    discrete: bool,
    extra: Float[Array, "outputs outputs"] | None = None,
    *,
    order: int = 1,
    amplification: int = 1,
) -> Float[Array, " depth"]:
    r"""Expected $d|W_i|^2/dt$ of every layer, up to the part that all layers share, `(N,)`.

    Differences between layers are the traces of `expected_balancedness_drift`. `extra` is added
    to the covariance of the noise on $M$, e.g. the stationary covariance of $M$ itself.

    **Raises:** `ValueError` for noise inside the network.
    """
    check_outside(problem, "layer_drifts", INSTEAD)
    h = jnp.asarray(step_size)
    rate = problem.weight_decay
    norms = squared_norms(DeepLinear(weights))
    covariance = noise_covariance(problem, weights)
    if extra is not None:
        covariance = covariance + extra
    lefts, rights = left_products(weights), right_products(weights)
    variances = gradient_noise_variances(problem, len(weights))
    noise = jnp.stack(
        [
            jnp.sum(covariance * jnp.kron(a @ a.T, b.T @ b)) + v * w.size
            for a, b, v, w in zip(lefts, rights, variances, weights, strict=True)
        ]
    )
    drift = -2.0 * rate * norms + h * noise
    if (other := _other_velocity(problem, weights, discrete, order)) is not None:
        pairs = zip(weights, other, strict=True)
        drift = drift + 2.0 * jnp.stack([jnp.sum(w * v) for w, v in pairs])
    square, shrink = _mean_terms(h, discrete, order, amplification)
    if square is not None:
        mean = problem.averaged_gradient(weights)
        squares = jnp.stack([jnp.sum(g * g) for g in mean])
        drift = drift + square * squares - shrink * rate**2 * norms
    return drift


def _other_velocity(
    problem: Problem, weights: Weights, discrete: bool, order: int
) -> Weights | None:
    """The velocity that penalties beside weight decay give; None if there are none."""
    pull = other_pull(problem, weights)
    if pull is None:
        return None
    if order == 2 and not discrete:
        raise ValueError(
            "regularizers: the drift of the imbalance under the SDE of order 2 is known for "
            "WeightDecay alone of all penalties; watch imbalance over replicas, or take order=1."
        )
    return tuple(-g for g in pull)


def imbalance_drift(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    discrete: bool,
    extra: Float[Array, "outputs outputs"] | None = None,
    *,
    order: int = 1,
    amplification: int = 1,
) -> Scalar:
    r"""The expected $dD/dt$: the drift of $|W_i|^2 - |W_j|^2$ for the pair that attains $D(W)$.

    Among layers tied up to rounding for the largest (smallest) norm the one that grows most
    (shrinks most) counts, as it does a moment later.

    **Raises:** `ValueError` for noise inside the network.
    """
    check_outside(problem, "imbalance_drift", INSTEAD)
    options = {"order": order, "amplification": amplification}
    drift = layer_drifts(problem, weights, step_size, discrete, extra, **options)
    return _drift_of_largest(weights, drift)


def flow_imbalance_drift(weights: Weights, velocity: Weights) -> Scalar:
    r"""$dD/dt$ of weights that move with the given velocity, one array a layer.

    That of the pair that attains $D(W)$, as in `imbalance_drift`.
    """
    drift = jnp.stack([2.0 * jnp.sum(w * v) for w, v in zip(weights, velocity, strict=True)])
    return _drift_of_largest(weights, drift)


def _mean_terms(
    h: Scalar, discrete: bool, order: int, amplification: int
) -> tuple[Scalar | None, Scalar]:
    r"""The factors of the square of the mean gradient and of $-\lambda^2 G_i$."""
    if discrete:
        return h / amplification, jnp.zeros_like(h)
    return (h, 2.0 * h) if order == 2 else (None, jnp.zeros_like(h))


def _drift_of_largest(weights: Weights, drift: Float[Array, " depth"]) -> Scalar:
    norms = squared_norms(DeepLinear(weights))
    top, bottom = jnp.max(norms), jnp.min(norms)
    near = TIED * top
    growing = jnp.max(jnp.where(norms >= top - near, drift, -jnp.inf))
    shrinking = jnp.min(jnp.where(norms <= bottom + near, drift, jnp.inf))
    return growing - shrinking
