r"""The fast fluctuation about the minima manifold.

Training on the manifold's tangent is slow; across it the end-to-end matrix fluctuates about the
target with a covariance that is stationary on the slow time scale. It makes the loss floor and,
through the curvature of the manifold, the slow drift.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float

from gradflow.geometry.base import OutputLoss, output_loss
from gradflow.geometry.curvature import kernel_of_root
from gradflow.problem import Problem
from gradflow.regularizers.base import NoiseMoments
from gradflow.regularizers.diffusion import data_sources
from gradflow.theory.layer_noise import layer_noise_normal, perturbation_covariance
from gradflow.types import Scalar, Weights

NEGATIVE = -1e-6
"""Eigenvalue, relative to the largest, at which a solution is no covariance any more."""


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
    """

    step_size: Scalar
    momentum: Scalar
    discrete: bool = eqx.field(static=True)
    order: int = eqx.field(static=True, default=1)
    amplification: int = eqx.field(static=True, default=1)

    def damping(self, a: Float[Array, "*n"], b: Float[Array, "*m"]) -> Float[Array, "..."]:
        r"""$D_{ab}$, with which noise of covariance $N_{ab}$ has the fluctuation $h N_{ab}/D_{ab}$.

        Training, with heavy ball, from the stationary covariance of its linear recursion:
        $D_{ab} = (1 - \beta) (a + b - \tfrac{h}{1 + \beta} a b)
        + \tfrac{\beta h}{1 - \beta^2} (a - b)^2$.
        SVAG has $h / l$ for $h$; the SDE of order 1 has $(1 - \beta) (a + b)$, that of order 2
        $a + b + \tfrac h2 (a^2 + b^2)$.
        """
        h, beta = self.step_size, self.momentum
        if not self.discrete:
            first = (1.0 - beta) * (a + b)
            return first if self.order == 1 else first + 0.5 * h * (a**2 + b**2)
        h = h / self.amplification
        square = beta * h / (1.0 - beta**2) * (a - b) ** 2
        return (1.0 - beta) * (a + b - h / (1.0 + beta) * a * b) + square

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
    return Law(jnp.asarray(step_size), beta, discrete, order, amplification)


def fluctuation(problem: Problem, weights: Weights, law: Law, feedback: bool = True) -> Fluctuation:
    r"""The stationary fluctuation at weights on the minima manifold.

    With the noise $N(X)$ of one step in $x$, which the fluctuation itself feeds where the noise
    depends on the end-to-end matrix, $X$ solves the linear equation $D_{ab} X_{ab} = h N(X)_{ab}$.
    Where it has no positive solution training is unstable in mean square, and $X$ is NaN.
    `feedback=False` leaves out what $X$ feeds, which is of higher order in the step size.
    """
    loss = output_loss(problem)
    kernel = kernel_of_root(weights, loss.root)
    mu, vectors = jnp.linalg.eigh(kernel)
    moving = mu > 10.0 * mu.size * jnp.finfo(mu.dtype).eps * jnp.max(mu)
    a, b = mu[:, None], mu[None, :]
    stable = law.is_stable(mu) | ~moving
    both = moving[:, None] & moving[None, :] & stable[:, None] & stable[None, :]
    response = jnp.where(both, law.step_size / jnp.where(both, law.damping(a, b), 1.0), 0.0)
    ends = _DataNoise(problem, weights, loss, vectors * mu)
    noise = ends.own()
    if problem.layer_noise or problem.has_gradient_noise:
        noise = noise + vectors.T @ layer_noise_normal(problem, weights) @ vectors
        noise = noise + ends.fed_by(perturbation_covariance(problem, weights))
    x = response * noise
    if feedback and ends.is_multiplicative:
        x = _self_consistent(x, lambda y: response * ends.fed_by(vectors @ y @ vectors.T))
    x = jnp.where(jnp.all(stable), x, jnp.nan)
    return Fluctuation(mu, vectors, moving.astype(mu.dtype), x)


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


class _DataNoise(eqx.Module):
    r"""The noise on the data, as it acts on $x$, in the kernel's eigenbasis.

    `ends` is $V\, \mathrm{diag}(\mu)$: noise on $M$ reaches $x$ through $K$.
    """

    problem: Problem
    moments: NoiseMoments
    loss: OutputLoss
    ends: Float[Array, "outputs outputs"]

    def __init__(
        self,
        problem: Problem,
        weights: Weights,
        loss: OutputLoss,
        ends: Float[Array, "outputs outputs"],
    ):
        self.problem = problem
        self.moments = problem.noise_moments(weights)
        self.loss = loss
        self.ends = ends

    @property
    def is_multiplicative(self) -> bool:
        """Whether the noise depends on the end-to-end matrix."""
        return any(r.is_multiplicative for r in data_sources(self.problem.regularizers))

    def own(self) -> Float[Array, "outputs outputs"]:
        """The noise at the minimum itself."""
        sources = data_sources(self.problem.regularizers)
        return self._carried(
            sum((r.covariance(self.moments) for r in sources), start=self._nothing())
        )

    def fed_by(self, x: Float[Array, "outputs outputs"]) -> Float[Array, "outputs outputs"]:
        """The noise that fluctuations of $x$ with the given covariance add."""
        d_out, d_in = self.moments.p.shape
        inverse = self.loss.inverse_root
        shape = (d_out, d_in, d_out, d_in)
        spread = jnp.einsum("ij,ajcl,lk->aick", inverse, x.reshape(shape), inverse)
        total = jnp.zeros(shape, x.dtype)
        for r in data_sources(self.problem.regularizers):
            if r.is_multiplicative:
                total = total + r.feedback(self.moments, spread)
        return self._carried(total.reshape(x.shape))

    def _carried(self, c: Float[Array, "outputs outputs"]) -> Float[Array, "outputs outputs"]:
        d_out, d_in = self.moments.p.shape
        inverse = self.loss.inverse_root
        blocks = c.reshape(d_out, d_in, d_out, d_in)
        plain = jnp.einsum("ij,ajcl,lk->aick", inverse, blocks, inverse).reshape(c.shape)
        return self.ends.T @ plain @ self.ends

    def _nothing(self) -> Float[Array, "outputs outputs"]:
        size = self.moments.p.size
        return jnp.zeros((size, size), self.moments.p.dtype)


def _self_consistent(
    x: Float[Array, "outputs outputs"], feed: Callable[[Array], Array]
) -> Float[Array, "outputs outputs"]:
    """The solution of $X = x + feed(X)$, NaN if it is not a covariance."""
    operator = lx.FunctionLinearOperator(lambda y: y - feed(y), x)
    precision = float(jnp.finfo(x.dtype).eps)
    solver = lx.GMRES(rtol=1e3 * precision, atol=0.0, restart=40, stagnation_iters=40)
    found = lx.linear_solve(operator, x, solver, throw=False).value
    found = 0.5 * (found + found.T)
    # GMRES calls it a breakdown when it converges exactly: the residual decides.
    solved = jnp.linalg.norm(found - feed(found) - x) <= precision**0.5 * jnp.linalg.norm(x)
    spread = jnp.linalg.eigvalsh(found)
    return jnp.where(solved & (spread[0] >= NEGATIVE * spread[-1]), found, jnp.nan)
