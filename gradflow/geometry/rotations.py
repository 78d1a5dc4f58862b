r"""Rotations of the hidden units, which change the layers and not the function.

$W_i \to R_i W_i R_{i-1}^\top$ with $R_0 = R_N = I$ leaves the end-to-end matrix, the norms and the
spectra of everything unchanged.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gradflow.backend.types import Weights

EXACT = 1e-14
"""Residual, relative to the right-hand side, at which the conjugate gradients have arrived."""

MOST_ITERATIONS = 500
"""Of the conjugate gradients: in exact numbers they need one for each angle."""


def without_rotation(weights: Weights, velocity: Weights) -> Weights:
    r"""The part of a velocity that is orthogonal to all rotations of the hidden units.

    $V_i - (A_i W_i - W_i A_{i-1})$ with the skew $A_i$ that make its norm least.

    **Arguments:**

    - `weights`, `velocity`: one array a layer, `(d_i, d_{i-1})`.
    """
    hidden = tuple(jnp.zeros((len(w), len(w)), w.dtype) for w in weights[:-1])

    def rotated(free: tuple[Array, ...]) -> Weights:
        none = [jnp.zeros((n, n), free[0].dtype) for n in (weights[0].shape[1], len(weights[-1]))]
        skew = [none[0], *(a - a.T for a in free), none[1]]
        return tuple(
            above @ w - w @ below for below, w, above in zip(skew, weights, skew[1:], strict=False)
        )

    if not hidden:
        return velocity
    transposed = jax.linear_transpose(rotated, hidden)
    (pull,) = transposed(velocity)
    free, _ = jax.scipy.sparse.linalg.cg(
        lambda a: transposed(rotated(a))[0], pull, tol=EXACT, maxiter=MOST_ITERATIONS
    )
    return tuple(v - r for v, r in zip(velocity, rotated(free), strict=True))
