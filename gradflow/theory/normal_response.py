r"""The response $\Psi = K^+ X$ of every noise, in the form that is cheapest for its size."""

import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from gradflow.backend.types import Weights
from gradflow.geometry.base import output_loss
from gradflow.geometry.kernel import Kernel, kernel_at
from gradflow.problem import Problem
from gradflow.regularizers.diffusion import data_sources
from gradflow.regularizers.label_noise import LabelNoise
from gradflow.theory.lyapunov import krylov_response
from gradflow.theory.response import (
    AbstractResponse,
    MatrixResponse,
    UniformResponse,
)
from gradflow.theory.stationary import Fluctuation, Law, fluctuation

LARGEST_DECOMPOSED = 2_048
"""Size $d_N d_0$ up to which noise inside the network or on the gradient is covered: there the
eigendecomposition of $K$ takes 8 s on two cores, and the work grows as the cube of the size."""


def normal_response(
    problem: Problem, weights: Weights, law: Law, feedback: bool = True
) -> tuple[AbstractResponse, Fluctuation | None]:
    r"""$\Psi$ at weights on the minima manifold, and the fluctuation where it was decomposed.

    - Label noise alone: from one Cholesky factor, of any size; nothing at all for $h \to 0$.
    - Up to the size `LARGEST_DENSE_KERNEL`, and for noise inside the network or on the gradient:
      from the eigendecomposition of $K$.
    - Other noise on the data beyond that: by a Krylov method.

    **Raises:** `ValueError` for noise inside the network or on the gradient beyond
    `LARGEST_DECOMPOSED`.
    """
    kernel = kernel_at(weights, output_loss(problem).root)
    if is_isotropic(problem):
        return _label_response(problem, kernel, law), None
    if kernel.is_large and not has_inner_noise(problem):
        return krylov_response(problem, weights, law, feedback), None
    d_out, d_in = weights[-1].shape[0], weights[0].shape[1]
    if kernel.size > LARGEST_DECOMPOSED:
        raise ValueError(
            f"weights: noise inside the network or on the gradient needs all eigenvectors of the "
            f"kernel, but with {d_out} outputs and {d_in} inputs it has {kernel.size} rows (limit "
            f"{LARGEST_DECOMPOSED}). Keep noise on the data only (LabelNoise, InputNoise, "
            "Minibatch), which is covered at any size; take fewer inputs or outputs (hidden layers "
            "may be as wide as they are); or simulate GradientDescent instead."
        )
    state = fluctuation(problem, weights, law, feedback)
    return MatrixResponse(state.response.reshape(d_out, d_in, d_out, d_in)), state


def has_inner_noise(problem: Problem) -> bool:
    """Whether noise acts inside the network or on the gradient."""
    return bool(problem.layer_noise) or problem.has_gradient_noise


def is_isotropic(problem: Problem) -> bool:
    r"""Whether the noise is that of labels alone: $C = v\, I \otimes S$, which goes with $K$."""
    sources = data_sources(problem.regularizers)
    return not any(r.is_multiplicative for r in sources) and not has_inner_noise(problem)


def _label_response(problem: Problem, kernel: Kernel, law: Law) -> AbstractResponse:
    r"""$\Psi = \tfrac{h v}{1 - \beta} (2 - \tfrac{h}{1 + \beta} K)^{-1}$, by Cholesky.

    A Krylov method would need all $d_N d_0$ columns of the inverse, each with several products.
    Beyond the edge of stability the matrix is not positive, and the result is NaN.
    """
    d_out, d_in = kernel.outputs.shape[-1], kernel.inputs.shape[-1]
    dtype = kernel.outputs.dtype
    sources = [r for r in problem.regularizers if isinstance(r, LabelNoise)]
    v = sum((r.std**2 for r in sources), start=jnp.zeros((), dtype)) / problem.batch
    h, beta = law.step_size, law.momentum
    level = h * v / (1.0 - beta)
    if not law.discrete:
        return UniformResponse(0.5 * level, jnp.eye(d_out, dtype=dtype), jnp.eye(d_in, dtype=dtype))
    one = jnp.eye(kernel.size, dtype=dtype)
    root = jnp.linalg.cholesky(2.0 * one - h / (1.0 + beta) * kernel.matrix())
    psi = level * cho_solve((root, True), one)
    return MatrixResponse(psi.reshape(d_out, d_in, d_out, d_in))
