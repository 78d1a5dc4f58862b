r"""Stability in mean square: whether second moments of the fluctuation stay bounded.

One step of training multiplies $x = \mathrm{vec}((P - T) S^{1/2})$ by a matrix that differs from
step to step where the noise depends on the end-to-end matrix. Its second moments obey a linear map,
for plain training $X \to E[(I - h J) X (I - h J)^\top]$, and training is stable in mean square if
the spectral radius of that map is below 1: a property of the map, whether or not there is noise at
the minimum to feed it. With the damping $D = D_1 + h D_2$ of `gradflow.theory.stationary` (entries
in the eigenbasis of the kernel $K$) and the noise $F(X)$ that $X$ feeds

$$D_1 \circ X = h\, (F(X) - D_2 \circ X)$$

has a solution $X \ne 0$ where the radius is 1. The map takes covariances to covariances, so its
radius is an eigenvalue, with an $X$ that is a covariance (Krein and Rutman), and the first such $h$
is the largest stable step size. For $X = s \circ U$ with
$s_{ab} = (\mu_a \mu_b / D_{1,ab})^{1/2}$ the equation is symmetric, $U = h A U$: the stable step
sizes are all those below $h_c = 1 / \lambda_\mathrm{max}(A)$. For a scalar network and batches of
inputs with the mean square $m$ that is $h_c = 2\, E m / (a\, E m^2)$, $a = \mu / S$.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.backend.types import Scalar

MARGIN = 1e3
"""Smallest eigenvalue that is certainly positive, in rounding errors of the trace."""

MOST_STEPS = 128
"""Lanczos steps after which the largest eigenvalue found is taken."""

STRETCH = 8
"""Lanczos steps between two looks at it."""

SOLVED = 1e-10
"""Residual of conjugate gradients, relative to the start, at which they have a solution."""

MOST_SOLVING = 300
"""Steps of conjugate gradients until there is none."""

SETTLED = 1e-13
"""Relative change of it in a stretch at which it has converged."""


def largest_stable_step(
    values: Float[Array, " outputs"],
    moving: Bool[Array, " outputs"],
    coefficients: tuple[Scalar, Scalar, Scalar],
    fed: Callable[[Float[Array, "outputs outputs"]], Float[Array, "outputs outputs"]] | None,
) -> Scalar:
    r"""$h_c$, infinite where every step size is stable.

    **Arguments:**

    - `values`: $\mu_a$; `moving`: which of them are not zero.
    - `coefficients`: $(p, q, r)$ of `Law.damping` at step size 1.
    - `fed`: noise on the whitened end-to-end gradient that a covariance $X$ feeds, both in the
        eigenbasis of $K$; None for noise that does not depend on the end-to-end matrix.
    """
    p, q, r = coefficients
    mu = jnp.where(moving, values, 0.0)
    a, b = mu[:, None], mu[None, :]
    both = (a > 0.0) & (b > 0.0)
    inverse = jnp.where(both, 1.0 / jnp.where(both, p * (a + b), 1.0), 0.0)
    own = -(q * a * b + r * (a**2 + b**2)) * inverse
    if fed is None:
        top = jnp.max(jnp.diag(own))  # off the diagonal there is more damping
    else:
        scale = jnp.sqrt(a * b * inverse)

        # The X of the largest eigenvalue is a covariance: with a diagonal that is not negative.
        start = jnp.diag(moving.astype(mu.dtype))
        top = _largest_eigenvalue(lambda u: scale * fed(scale * u) + own * u, start)
    return jnp.where(top > 0.0, 1.0 / jnp.where(top > 0.0, top, 1.0), jnp.inf)


def certifies(
    x: Float[Array, "outputs outputs"],
    defect: Float[Array, "outputs outputs"],
    moving: Bool[Array, " outputs"],
) -> Bool[Array, ""]:
    r"""Whether a covariance $X$ proves stability: it and what a step would take of it are positive.

    A map that takes covariances to covariances has a radius below 1 if and only if it shrinks some
    positive definite $X$.

    **Arguments:**

    - `x`: $X$; `defect`: $X$ minus what it feeds.
    """
    rounding = MARGIN * x.shape[0] * float(jnp.finfo(x.dtype).eps) * jnp.trace(x)
    shift = jnp.where(moving, -rounding, 1.0)
    both = jnp.stack([x, defect]) + jnp.diag(shift)
    return (rounding > 0.0) & jnp.all(jnp.isfinite(jnp.linalg.cholesky(both)))


def shrinks(
    step: Callable[[Float[Array, "n n"]], Float[Array, "n n"]], start: Float[Array, "n n"]
) -> Bool[Array, ""]:
    r"""Whether all eigenvalues of a symmetric operator on symmetric matrices are below 1.

    Conjugate gradients for $u - A u = b$ get to a solution along directions of positive curvature
    if and only if they are, for a start $b$ with a part along the largest. `False` where they do
    not get there in `MOST_SOLVING` steps: so close to 1 is the largest.

    **Arguments:**

    - `step`: $A$.
    - `start`: $b$.
    """
    goal = SOLVED**2 * jnp.sum(start * start)

    def unfinished(now: _Solving) -> Bool[Array, ""]:
        return now.positive & (now.rest > goal) & (now.steps < MOST_SOLVING)  # NaN ends it

    def further(now: _Solving) -> _Solving:
        image = now.direction - step(now.direction)
        curvature = jnp.sum(now.direction * image)
        residual = now.residual - now.rest / curvature * image
        rest = jnp.sum(residual * residual)
        direction = residual + rest / now.rest * now.direction
        return _Solving(residual, direction, rest, curvature > 0.0, now.steps + 1)

    begun = _Solving(start, start, jnp.sum(start * start), jnp.array(True), jnp.array(0))
    end = jax.lax.while_loop(unfinished, further, begun)
    return end.positive & (end.rest <= goal)


def unless(known: Bool[Array, ""], decide: Callable[[], Bool[Array, ""]]) -> Bool[Array, ""]:
    """True if it is known already; else what `decide` says, computed only if some path needs it.

    A condition would be computed for every path under `jax.vmap`, a loop is not.
    """
    _, answer = jax.lax.while_loop(
        lambda now: ~now[0], lambda _: (jnp.array(True), decide()), (known, known)
    )
    return answer


class _Solving(NamedTuple):
    """Conjugate gradients on their way; `rest` is the squared norm of the residual."""

    residual: Float[Array, "n n"]
    direction: Float[Array, "n n"]
    rest: Scalar
    positive: Bool[Array, ""]
    steps: Int[Array, ""]


class _Search(NamedTuple):
    """Lanczos iterations on their way: two vectors and the tridiagonal matrix."""

    before: Float[Array, "n n"]
    vector: Float[Array, "n n"]
    diagonal: Float[Array, " steps"]
    beside: Float[Array, " steps"]
    top: Scalar
    gain: Scalar
    steps: Int[Array, ""]


def _largest_eigenvalue(
    matrix: Callable[[Float[Array, "n n"]], Float[Array, "n n"]], start: Float[Array, "n n"]
) -> Scalar:
    """The largest eigenvalue of a symmetric operator on symmetric matrices, 0 if it is negative.

    By Lanczos steps. Without orthogonalising again, eigenvalues of the tridiagonal matrix that have
    converged come more than once, but none is wrong (Paige).
    """
    size = len(start) * (len(start) + 1) // 2
    stretch = min(STRETCH, size)
    most = stretch * -(-min(MOST_STEPS, size) // stretch)

    def step(k: Int[Array, ""], now: _Search) -> _Search:
        place = now.steps + k
        last = jnp.where(place > 0, now.beside[place - 1], 0.0)
        image = matrix(now.vector) - last * now.before
        along = jnp.sum(now.vector * image)
        rest = image - along * now.vector
        length = jnp.linalg.norm(rest)
        following = rest / jnp.where(length > 0.0, length, 1.0)
        return now._replace(
            before=now.vector,
            vector=following,
            diagonal=now.diagonal.at[place].set(along),
            beside=now.beside.at[place].set(length),
        )

    def on(now: _Search) -> _Search:
        after = jax.lax.fori_loop(0, stretch, step, now)
        done = now.steps + stretch
        # What leads to steps that were not taken yet does not count.
        beside = jnp.where(jnp.arange(most) < done - 1, after.beside, 0.0)[:-1]
        triangle = jnp.diag(after.diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
        top = jnp.linalg.eigvalsh(triangle)[-1]
        return after._replace(top=top, gain=top - now.top, steps=done)

    def unfinished(now: _Search) -> Bool[Array, ""]:
        return (now.gain > SETTLED * now.top) & (now.steps < most)

    nothing, zero = jnp.zeros(most, start.dtype), jnp.zeros((), start.dtype)
    first = start / jnp.linalg.norm(start)
    begun = _Search(jnp.zeros_like(start), first, nothing, nothing, zero, zero + 1.0, jnp.array(0))
    return jax.lax.while_loop(unfinished, on, begun).top
