r"""The fluctuation about the minima where the kernel is too large to be decomposed.

The weights fluctuate about the manifold by $\delta W = \tilde J^\top w$ with the covariance
$W = E[w w^\top] = K^+ X K^+$, and $D_{ab} X_{ab} = h N_{ab}$ of `gradflow.theory.stationary` is

$$p (K W + W K) + q\, K W K + r (K^2 W + W K^2) = h \left( C + \mathcal F(K W K) \right),$$

with the coefficients of the damping, the noise $C$ on the whitened end-to-end gradient and what the
fluctuation $X = K W K$ itself feeds. Nothing but products with $K$, a sum of Kronecker products, is
taken. In the coordinates in which $K$ is nearly diagonal, the diagonal of $K$ gives the damping of
every entry well enough to scale the equation, which conjugate gradients (BiCGStab where the
fluctuation feeds the noise) then solve in few steps: the better the layers are balanced and the
data whitened, the fewer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from gradflow.backend.types import Weights
from gradflow.geometry.base import output_loss
from gradflow.geometry.curvature import minima_sharpness
from gradflow.geometry.kernel import Kernel, KernelBasis, kernel_at, kernel_basis
from gradflow.problem import Problem
from gradflow.theory.data_noise import DataNoise
from gradflow.theory.mean_square import certifies, unless
from gradflow.theory.response import AbstractResponse, MatrixResponse, TurnedResponse
from gradflow.theory.stationary import Law

RTOL = 1e-10
"""Residual of the scaled equation at which the iteration ends."""

ACCEPTED = 1e-9
"""Residual above which there is no result."""

LOOSE = 1e-4
"""The same where only the sign of the solution is asked for."""

MOST_STEPS = 300
"""Iterations until the equation is given up."""

RESTING = 1e-12
"""Diagonal entries of $K$, relative to the largest, that count as zero."""


def krylov_response(
    problem: Problem, weights: Weights, law: Law, feedback: bool = True
) -> AbstractResponse:
    r"""$\Psi = K^+ X = W K$ for noise on the data; NaN where there is none or none was found.

    **Arguments:** those of `gradflow.theory.stationary.fluctuation`.
    """
    basis = kernel_basis(kernel_at(weights, output_loss(problem).root))
    w, kernel = _weight_covariance(*_turned(problem, weights, basis), law, basis, feedback)
    d_out, d_in = basis.values.shape
    return TurnedResponse(basis, MatrixResponse(_times(w, kernel).reshape(2 * (d_out, d_in))))


def _turned(problem: Problem, weights: Weights, basis: KernelBasis) -> tuple[Problem, Weights]:
    """The same problem and network in other coordinates of outputs and inputs."""
    u, v = basis.outputs, basis.inputs
    turned = (weights[0] @ v, *weights[1:])
    turned = (*turned[:-1], u.T @ turned[-1])
    return Problem(problem.data.turned(u, v), problem.regularizers), turned


def _weight_covariance(
    problem: Problem, weights: Weights, law: Law, basis: KernelBasis, feedback: bool
) -> tuple[Float[Array, "outputs outputs"], Kernel]:
    """$W$ and the kernel in the coordinates of the basis, which the problem is in already."""
    loss = output_loss(problem)
    kernel, data = kernel_at(weights, loss.root), DataNoise(problem, weights, loss)
    h, (p, q, r) = law.step_size, law.coefficients
    fed = feedback and data.is_multiplicative
    mu = basis.values.ravel()
    moving = mu > RESTING * jnp.max(mu)
    both = moving[:, None] & moving[None, :]
    damping = jnp.where(both, law.damping(mu[:, None], mu[None, :]), 1.0)
    scale = jnp.where(both, 1.0 / jnp.sqrt(damping), 0.0)

    def equation(u: Float[Array, "outputs outputs"]) -> Float[Array, "outputs outputs"]:
        w = scale * u
        right = _times(w, kernel)  # W K
        around = _times(right.T, kernel)  # K W K
        total = p * (right + right.T) + q * around
        if law.has_squares:
            twice = _times(right, kernel)
            total = total + r * (twice + twice.T)
        if fed:
            total = total - h * data.fed_by(around)
        return scale * total

    noise = scale * h * data.own()
    norm = jnp.linalg.norm(noise)
    silent, size = norm == 0.0, jnp.where(norm == 0.0, 1.0, norm)
    stable = law.is_stable(minima_sharpness(weights, loss.root))
    target = jnp.where(stable, noise / size * noise.shape[0], jnp.nan)  # NaN ends the iteration
    options: Any = {"norm": _root_mean_square, "max_steps": MOST_STEPS}
    solver = lx.BiCGStab(0.0, RTOL, **options) if fed else lx.CG(0.0, RTOL, **options)
    tags = frozenset() if fed else lx.positive_semidefinite_tag
    operator = lx.FunctionLinearOperator(equation, target, tags)
    u = lx.linear_solve(operator, target, solver, throw=False).value
    u = jnp.where(silent & stable, 0.0, 0.5 * (u + u.T))
    image = equation(u)
    steady = _root_mean_square(image - target) <= ACCEPTED

    def proves(u: Float[Array, "outputs outputs"], image: Float[Array, "outputs outputs"]) -> Array:
        """Whether a covariance that the equation takes to positive noise says so of them all."""
        taken = image / jnp.where(both, scale, 1.0) / jnp.max(damping)
        return certifies(scale * u, taken, moving)

    def white_noise_settles() -> Array:
        white = jnp.diag(jnp.where(moving & stable, jnp.diag(scale), 0.0))
        probe = white / jnp.linalg.norm(white) * white.shape[0]
        loose = lx.BiCGStab(0.0, LOOSE, **options)
        found = lx.linear_solve(operator, probe, loose, throw=False).value
        found = 0.5 * (found + found.T)
        return proves(found, equation(found))

    if fed:
        steady &= unless(proves(u, image) | ~stable, white_noise_settles)
    w = scale * u * size / noise.shape[0]
    return jnp.where(steady & stable, w, jnp.nan), kernel


def _times(x: Float[Array, "outputs outputs"], kernel: Kernel) -> Float[Array, "outputs outputs"]:
    """$X K$, in groups of rows that stay in a cache."""
    d_out, d_in = kernel.outputs.shape[-1], kernel.inputs.shape[-1]
    across = jnp.moveaxis(kernel.inputs, 0, 1).reshape(d_in, -1)  # C_1, C_2, ... side by side
    down = jnp.moveaxis(kernel.outputs, 0, 2).reshape(d_out, -1)

    def rows(group: Float[Array, "d_in d_out d_in"]) -> Float[Array, "d_in d_out d_in"]:
        products = (group.reshape(-1, d_in) @ across).reshape(len(group), -1, d_in)
        return jnp.einsum("ab,mbj->maj", down, products)

    return jax.lax.map(rows, x.reshape(d_out, d_in, d_out, d_in)).reshape(x.shape)


def _root_mean_square(x: Float[Array, "outputs outputs"]) -> Array:
    return jnp.sqrt(jnp.mean(x * x))
