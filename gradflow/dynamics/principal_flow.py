"""The principal flow of gradient descent, exact on quadratic losses."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Complex, Float

from gradflow.backend.types import Scalar, Weights
from gradflow.checks import checked_step_size
from gradflow.dynamics.base import DYNAMICS
from gradflow.dynamics.ode import AbstractOdeFlow, checked_tolerances, chosen_solver
from gradflow.geometry.curvature import LARGEST_DENSE_HESSIAN
from gradflow.problem import Problem

REACH = 4.0
"""Squares of the real points from which a gradient is continued to the imaginary axis lie below."""


@DYNAMICS.register
class PrincipalFlow(AbstractOdeFlow):
    r"""The ODE in complex weights that follows gradient descent mode by mode.

    $$\dot W = \sum_i \frac{\log(1 - h \lambda_i)}{h \lambda_i}\,
      \langle \nabla \bar L(W), u_i \rangle\, u_i$$

    with the eigenpairs $(\lambda_i, u_i)$ of the Hessian of the averaged loss at $\mathrm{Re}\, W$
    and the gradient continued analytically to complex weights. The factor is the whole series
    $-(1 + h\lambda/2 + h^2\lambda^2/3 + \dots)$ of which `ModifiedFlow` keeps the first terms; it
    is complex for $h \lambda > 1$, where gradient descent steps over the minimum. Where the loss is
    quadratic (one layer) it passes through every iterate of gradient descent at $t = k h$:
    oscillation and divergence ($h \lambda > 2$) included.

    Saved weights are the real part. They compare with gradient descent at multiples of $h$; in
    between, a mode that oscillates spirals through the complex plane. A mode with $h \lambda = 1$
    is gone after one step of gradient descent; here $|1 - h\lambda|$ is kept above rounding, which
    shrinks it by a factor of rounding a step.

    **Arguments:**

    - `step_size`: $h > 0$ of the gradient descent that it describes.
    - `rtol`, `atol`, `solver`: as in `GradientFlow`.

    Each evaluation decomposes the dense Hessian, so networks are limited to
    `LARGEST_DENSE_HESSIAN` parameters. Source: Rosca, Wu, Qin & Dherin 2023, "On a continuous time
    model of gradient descent dynamics and instability in deep learning".
    """

    step_size: Scalar
    rtol: Scalar
    atol: Scalar
    solver: diffrax.AbstractSolver

    def __init__(
        self,
        step_size: ArrayLike,
        rtol: ArrayLike = 1e-8,
        atol: ArrayLike = 1e-10,
        solver: diffrax.AbstractSolver | None = None,
    ):
        self.step_size = checked_step_size("PrincipalFlow", step_size)
        self.rtol, self.atol = checked_tolerances("PrincipalFlow", rtol, atol)
        self.solver = chosen_solver("PrincipalFlow", solver, stiff=False)

    def check(self, problem: Problem, weights: Weights) -> None:
        """Raise a `ValueError` for too many parameters, or a penalty that cannot be continued."""
        parameters = sum(int(np.prod(w.shape[:-1])) for w in weights)
        if parameters > LARGEST_DENSE_HESSIAN:
            raise ValueError(
                f"net: the dense Hessian of {parameters} parameters is too large (limit "
                f"{LARGEST_DENSE_HESSIAN}); use ModifiedFlow, which needs no Hessian."
            )
        others = [type(p).__name__ for p in problem.other_penalties]
        if others:
            raise ValueError(
                f"regularizers: PrincipalFlow continues the gradient to complex weights as a "
                f"polynomial, which {', '.join(others)} need not be; use ModifiedFlow."
            )

    def auxiliary(self, problem: Problem, weights: Weights) -> tuple[Weights, ...]:
        """The imaginary parts of the weights, 0."""
        return (tuple(jnp.zeros_like(w) for w in weights),)

    def field(self, t: Any, state: tuple[Weights, ...], problem: Problem) -> tuple[Weights, ...]:
        """The derivatives of the real and the imaginary parts."""
        del t
        real, imaginary = state
        return principal_direction(problem, real, imaginary, self.step_size)


def principal_direction(
    problem: Problem, real: Weights, imaginary: Weights, h: Scalar
) -> tuple[Weights, Weights]:
    r"""The real and imaginary part of $\dot W$ at the weights with the given parts."""
    flat, unravel = ravel_pytree(real)

    def gradient(w: Float[Array, " parameters"]) -> Float[Array, " parameters"]:
        return ravel_pytree(problem.averaged_gradient(unravel(w)))[0]

    hessian = jax.jacfwd(gradient)(flat)
    values, vectors = jnp.linalg.eigh(0.5 * (hessian + hessian.T))
    g = _continued(gradient, flat, ravel_pytree(imaginary)[0], depth=len(real))
    direction = vectors @ (principal_factor(h * values) * (vectors.T @ g))
    return unravel(direction.real), unravel(direction.imag)


def principal_factor(z: Float[Array, " k"]) -> Complex[Array, " k"]:
    r"""$\log(1 - z)/z$ on the principal branch, $-1$ at $z = 0$, finite at $z = 1$."""
    eps = jnp.finfo(z.dtype).eps
    near_zero = jnp.abs(z) < eps
    safe = jnp.where(near_zero, 1.0, z)
    small = jnp.log1p(-jnp.minimum(z, 0.5))
    large = jnp.log(jnp.maximum(jnp.abs(1.0 - z), eps))
    real = jnp.where(near_zero, -1.0, jnp.where(z < 0.5, small, large) / safe)
    imaginary = jnp.where(z > 1.0, jnp.pi / safe, 0.0)
    return jax.lax.complex(real, imaginary)


def _continued(
    gradient: Any,
    x: Float[Array, " parameters"],
    y: Float[Array, " parameters"],
    depth: int,
) -> Complex[Array, " parameters"]:
    r"""The gradient at $x + i y$, from real evaluations of it along $x + s y$.

    It is a polynomial of degree $2 N - 1$ in $s$ whatever the noise, so its even and odd parts are
    polynomials of degree $N - 1$ in $s^2$: $N$ points $s_j$ give both, and at $s^2 = -1$ they are
    the real and the imaginary part. Points up to $s = 2$ keep the loss of digits below
    $T_{N-1}(3/2)$, a factor of 9 for 4 layers.
    """
    angles = np.pi * (np.arange(depth) + 0.5) / depth
    squares = 0.5 * REACH * (1.0 - np.cos(angles))
    others = [np.delete(squares, j) for j in range(depth)]
    share = [np.prod((-1.0 - o) / (s - o)) for s, o in zip(squares, others, strict=True)]
    points, weights = jnp.asarray(np.sqrt(squares), x.dtype), jnp.asarray(share, x.dtype)
    ahead = jax.vmap(lambda s: gradient(x + s * y))(points)
    behind = jax.vmap(lambda s: gradient(x - s * y))(points)
    even = weights @ (0.5 * (ahead + behind))
    odd = (weights / points) @ (0.5 * (ahead - behind))
    return jax.lax.complex(even, odd)
