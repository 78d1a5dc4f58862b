r"""The fast fluctuation about the minima manifold.

Training on the manifold's tangent is slow; across it the end-to-end matrix fluctuates about the
target with a covariance that is stationary on the slow time scale. It makes the loss floor and,
through the curvature of the manifold, the slow drift.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from gradflow.backend.types import Scalar, Weights
from gradflow.geometry.base import output_loss
from gradflow.geometry.curvature import kernel_of_root
from gradflow.problem import Problem
from gradflow.theory.data_noise import DataNoise
from gradflow.theory.layer_noise import layer_noise_normal, perturbation_covariance
from gradflow.theory.mean_square import (
    certifies,
    largest_stable_step,
    shrinks,
    unless,
)
from gradflow.theory.self_consistent import self_consistent


class Fluctuation(eqx.Module):
    r"""Stationary covariance of $x = \mathrm{vec}((P - T) S^{1/2})$ in the kernel's eigenbasis.

    - `values`, `vectors`: eigenvalues $\mu_a$ and eigenvectors of the kernel $K$.
    - `moving`: which of them are not zero.
    - `covariance`: $X_{ab}$; NaN where training is unstable.
    """

    values: Float[Array, " outputs"]
    vectors: Float[Array, "outputs outputs"]
    moving: Float[Array, " outputs"]
    covariance: Float[Array, "outputs outputs"]

    def of_kernel(self, factors: Float[Array, " outputs"]) -> Float[Array, "outputs outputs"]:
        """The function of the kernel that has the given eigenvalues."""
        return (self.vectors * factors) @ self.vectors.T

    @property
    def response(self) -> Float[Array, "outputs outputs"]:
        r"""$\Psi = K^+ X$."""
        return self.vectors @ (self.inverse_values[:, None] * self.covariance) @ self.vectors.T

    def solve(self, x: Float[Array, " outputs"]) -> Float[Array, " outputs"]:
        """$K^+ x$."""
        return self.vectors @ (self.inverse_values * (self.vectors.T @ x))

    @property
    def inverse_values(self) -> Float[Array, " outputs"]:
        r"""$\mu_a^{-1}$, and 0 for directions that rest."""
        return self.moving / jnp.where(self.moving > 0.0, self.values, 1.0)


class Law(eqx.Module):
    r"""How fluctuations of a training with step size $h$ are damped.

    - `discrete`: training itself, or its SDE (of order `order`).
    - `momentum`: heavy-ball $\beta$.
    - `amplification`: $l$ of SVAG.
    - `heavy_ball`: whether it has a momentum.
    """

    step_size: Scalar
    momentum: Scalar
    discrete: bool = eqx.field(static=True)
    heavy_ball: bool = eqx.field(static=True)
    order: int = eqx.field(static=True, default=1)
    amplification: int = eqx.field(static=True, default=1)

    @property
    def coefficients(self) -> tuple[Scalar, Scalar, Scalar]:
        r"""$(p, q, r)$ of `damping`."""
        h, beta = self.step_size, self.momentum
        if not self.discrete:
            return 1.0 - beta, jnp.zeros_like(h), 0.5 * h * (self.order - 1)
        h = h / self.amplification
        square = beta * h / (1.0 - beta**2)
        return 1.0 - beta, -(1.0 - beta) * h / (1.0 + beta) - 2.0 * square, square

    @property
    def has_squares(self) -> bool:
        """Whether $r$ is other than zero."""
        return self.heavy_ball if self.discrete else self.order == 2

    def damping(self, a: Float[Array, "*n"], b: Float[Array, "*m"]) -> Float[Array, "..."]:
        r"""$D_{ab}$, with which noise of covariance $N_{ab}$ has the fluctuation $h N_{ab}/D_{ab}$.

        It is $p (a + b) + q a b + r (a^2 + b^2)$. Training, with heavy ball, from the stationary
        covariance of its linear recursion:
        $D_{ab} = (1 - \beta) (a + b - \tfrac{h}{1 + \beta} a b)
        + \tfrac{\beta h}{1 - \beta^2} (a - b)^2$.
        SVAG has $h / l$ for $h$; the SDE of order 1 has $(1 - \beta) (a + b)$, that of order 2
        $a + b + \tfrac h2 (a^2 + b^2)$.
        """
        p, q, r = self.coefficients
        return p * (a + b) + q * a * b + r * (a**2 + b**2)

    def is_stable(self, a: Float[Array, "*n"]) -> Array:
        """Whether a direction of the given curvature is damped at all."""
        return self.damping(a, a) > 0.0


def training_law(
    step_size: ArrayLike,
    discrete: bool,
    momentum: ArrayLike | None = None,
    order: int = 1,
    amplification: int = 1,
) -> Law:
    """The damping of a training, momentum 0 unless given."""
    beta = jnp.zeros(()) if momentum is None else jnp.asarray(momentum)
    heavy = momentum is not None
    return Law(jnp.asarray(step_size), beta, discrete, heavy, order, amplification)


def fluctuation(problem: Problem, weights: Weights, law: Law, feedback: bool = True) -> Fluctuation:
    r"""The stationary fluctuation at weights on the minima manifold.

    With the noise $N(X)$ of one step in $x$, which the fluctuation itself feeds where the noise
    depends on the end-to-end matrix, $X$ solves the linear equation $D_{ab} X_{ab} = h N(X)_{ab}$.
    Where training is unstable in mean square (`gradflow.theory.mean_square`) $X$ is NaN.
    `feedback=False` leaves out what $X$ feeds, which is of higher order in the step size.
    """
    modes = _modes(problem, weights)
    mu, vectors, moving, data = modes.values, modes.vectors, modes.moving, modes.data
    a, b = mu[:, None], mu[None, :]
    stable = law.is_stable(mu) | ~moving
    both = moving[:, None] & moving[None, :] & stable[:, None] & stable[None, :]
    response = jnp.where(both, law.step_size / jnp.where(both, law.damping(a, b), 1.0), 0.0)
    ends = vectors * mu  # noise reaches x through K
    noise = ends.T @ data.own() @ ends
    if problem.layer_noise or problem.has_gradient_noise:
        noise = noise + vectors.T @ layer_noise_normal(problem, weights) @ vectors
        noise = noise + ends.T @ data.fed_by(perturbation_covariance(problem, weights)) @ ends
    x = response * noise
    steady = jnp.all(stable)
    if feedback and data.is_multiplicative:
        # X = g u makes the equation symmetric: u = b + g F(g u) with what X feeds, F, through K.
        g, axes, driven = jnp.sqrt(response * a * b), data.coordinates(vectors), x
        start = jnp.where(g > 0.0, x / jnp.where(g > 0.0, g, 1.0), 0.0)
        x = g * self_consistent(lambda u: g * data.fed_along(axes, g * u), start)
        steady &= _is_steady(*jax.lax.stop_gradient((modes, response, x, driven)))
    x = jnp.where(steady, x, jnp.nan)
    return Fluctuation(mu, vectors, moving.astype(mu.dtype), x)


def largest_step_size(
    problem: Problem,
    weights: Weights,
    discrete: bool,
    momentum: ArrayLike | None = None,
    *,
    order: int = 1,
    amplification: int = 1,
) -> Scalar:
    r"""The step size $h_c$ below which training is stable in mean square at a minimum.

    Second moments of small deviations from the minimum shrink below it and grow beyond it, however
    little noise there is (`gradflow.theory.mean_square`). Noise on inputs and batches make it
    smaller than the edge of stability $2 (1 + \beta) / \lambda_\mathrm{max}$, which it is without
    them: at leading order noise on labels, on the gradient and inside the network does not depend
    on the deviation. Infinite for the SDE of a problem without such noise.

    The arguments are those of `stationary_covariance`.
    """
    unit = training_law(1.0, discrete, momentum, order, amplification)
    modes = _modes(problem, weights)
    fed_by = modes.fed_by if modes.data.is_multiplicative else None
    return largest_stable_step(modes.values, modes.moving, unit.coefficients, fed_by)


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
    $K = \sum_i A_i A_i^\top \otimes \bar S^{1/2} B_i^\top B_i \bar S^{1/2}$ (eigenvalues $\mu_a$),
    and the noise $N$ of one step, in the eigenbasis of $K$

    $$X_{ab} = \frac{h N_{ab}}{\mu_a + \mu_b - h \mu_a \mu_b} \text{ (discrete)},
      \qquad X_{ab} = \frac{h N_{ab}}{\mu_a + \mu_b} \text{ (SDE)};$$

    `Law.damping` has the denominators with momentum, of SVAG and of the SDE of order 2. Noise that
    depends on the end-to-end matrix is fed by $X$ itself: batches differ in the second moment of
    their inputs. Exact in the step size, leading order in the noise; NaN beyond the edge of
    stability (in mean square).

    **Arguments:**

    - `problem`, `weights`: where; weights on the minima manifold.
    - `step_size`: $h$ of the training.
    - `discrete`: training itself, or its SDE.
    - `momentum`: heavy-ball $\beta$ of the training.
    - `order`: of the SDE, 1 or 2.
    - `amplification`: $l$ of SVAG.
    """
    law = training_law(step_size, discrete, momentum, order, amplification)
    found = fluctuation(problem, weights, law)
    return found.vectors @ found.covariance @ found.vectors.T


class _Modes(eqx.Module):
    """The eigenbasis of the kernel at a minimum, and the noise on the data there."""

    values: Float[Array, " outputs"]
    vectors: Float[Array, "outputs outputs"]
    moving: Bool[Array, " outputs"]
    data: DataNoise

    def fed_by(self, x: Float[Array, "outputs outputs"]) -> Float[Array, "outputs outputs"]:
        """`DataNoise.fed_by` in this basis."""
        return self.vectors.T @ self.data.fed_by(self.vectors @ x @ self.vectors.T) @ self.vectors


def _modes(problem: Problem, weights: Weights) -> _Modes:
    loss = output_loss(problem)
    mu, vectors = jnp.linalg.eigh(kernel_of_root(weights, loss.root))
    moving = mu > 10.0 * mu.size * jnp.finfo(mu.dtype).eps * jnp.max(mu)
    return _Modes(mu, vectors, moving, DataNoise(problem, weights, loss))


def _is_steady(
    modes: _Modes,
    response: Float[Array, "outputs outputs"],
    x: Float[Array, "outputs outputs"],
    defect: Float[Array, "outputs outputs"],
) -> Bool[Array, ""]:
    """Whether fluctuations shrink, `response` being that of `fluctuation`.

    The fluctuation `x` that the noise keeps up says so where it reaches every direction, with the
    `defect` that it has without noise; white noise decides where it does not.
    """
    mu, moving = modes.values, modes.moving
    scale = jnp.sqrt(response * mu[:, None] * mu[None, :])
    white = jnp.diag(moving.astype(x.dtype))
    decide = partial(shrinks, lambda u: scale * modes.fed_by(scale * u), white)
    return unless(certifies(x, defect, moving), decide)
