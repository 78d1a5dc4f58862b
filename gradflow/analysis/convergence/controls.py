"""Control variates: functionals of the noise whose mean is known to be zero."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32
from numpy.polynomial import legendre

from gradflow.analysis.convergence.coupling import BrownianGrid
from gradflow.backend.compiled import KERNELS, compiled
from gradflow.problem import Problem
from gradflow.random.streams import Stream

MOMENTS = 3
"""Polynomials of flow time that weigh the noise."""

BLOCK_TICKS = 64
"""Grid steps whose normals are drawn at once."""

PER_CONTROL = 40
"""Replicas for every control: with fewer the regression costs more than it gives."""

CHANNELS_SQUARED = 8
"""Most normals a step whose products are controls too."""

MOST_NUMBERS = 2**22
"""Normals held at once."""


def brownian_controls(
    problem: Problem,
    widths: tuple[int, ...],
    grid: BrownianGrid,
    t1: float,
    key: PRNGKeyArray,
    replicas: int,
) -> Float[np.ndarray, "replica control"]:
    r"""Functionals of the Brownian path of every replica with mean zero.

    With $\zeta_{kj}$ the normals of grid step $j$ in step $k$, $S_k$ their normalised sum and $P_m$
    Legendre polynomials of flow time:

    $$\sum_k P_m(t_k) S_k, \qquad \sum_k P_m(t_k) \sum_j (j - \bar j) \zeta_{kj}, \qquad
      \sum_k P_m(t_k) (S_k S_k^\top - I).$$

    The first carry the linear response to the noise; the other two are the time and the double
    integrals within a step, by which dynamics on two grids differ path by path.

    **Returns:** `(replicas, q)`; no columns if there are too few replicas for a regression.
    """
    steps = max(round(t1 / (grid.tick * grid.per_step)), 1)
    shapes = problem.normal_shapes(widths)
    channels = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    single = channels * (1 if grid.per_step == 1 else 2)
    squared = channels * (channels + 1) // 2 if channels <= CHANNELS_SQUARED else 0
    affordable = replicas // PER_CONTROL
    if single * MOMENTS + squared * MOMENTS > affordable:
        squared = 0
    moments = min(MOMENTS, steps, affordable // max(single + squared, 1))
    if moments == 0:
        return np.zeros((replicas, 0))
    together = max(1, BLOCK_TICKS // grid.per_step)
    blocks = math.ceil(steps / together)
    basis = np.zeros((blocks * together, moments))
    middle = (np.arange(steps) + 0.5) / steps
    basis[:steps] = legendre.legvander(2.0 * middle - 1.0, moments - 1) / math.sqrt(steps)
    size = max(1, min(replicas, MOST_NUMBERS // (together * grid.per_step * channels)))
    pieces = []
    for first in range(0, replicas, size):
        # the last piece is as long as the others, so that one program serves all
        paths = jnp.arange(first, first + size, dtype=jnp.uint32)
        total = 0.0
        for b in range(blocks):
            rows = slice(b * together, (b + 1) * together)
            start = jnp.asarray(b * together * grid.per_step, jnp.uint32)
            total = total + _functionals(
                problem,
                key,
                start,
                paths,
                jnp.asarray(basis[rows]),
                grid.per_step,
                widths,
                squared > 0,
            )
        pieces.append(np.asarray(total))
    return np.concatenate(pieces, axis=1)[:, :replicas].T


def controlled_mean(
    values: Float[np.ndarray, "replica component"],
    controls: Float[np.ndarray, "replica control"],
) -> tuple[Float[np.ndarray, " component"], Float[np.ndarray, " component"]]:
    """Means over replicas, and their standard errors, after a regression on the controls.

    The intercept of ordinary least squares: what is left of the values where every control takes
    its mean of zero. Its bias is of the order of controls/replicas times the standard deviation of
    the residuals, well below the standard error.
    """
    count, used = controls.shape
    if count < 2:
        return values.sum(axis=0) / max(count, 1), np.full(values.shape[1], np.nan)
    design = np.column_stack([np.ones(count), controls])
    gram = np.linalg.pinv(design.T @ design, hermitian=True)
    offset = values[0]  # equal replicas then have a spread of exactly 0
    coefficients = gram @ (design.T @ (values - offset))
    residuals = values - offset - design @ coefficients
    variance = np.sum(residuals**2, axis=0) / max(count - used - 1, 1)
    return offset + coefficients[0], np.sqrt(gram[0, 0] * variance)


@partial(compiled, options=KERNELS)  # of few numbers it makes the noise of all steps and paths
def _functionals(
    problem: Problem,
    key: PRNGKeyArray,
    first_tick: UInt32[Array, ""],
    paths: UInt32[Array, " paths"],
    basis: Float[Array, "steps moments"],
    per_step: int,
    widths: tuple[int, ...],
    squared: bool,
) -> Float[Array, "controls paths"]:
    """The part of the functionals that the steps of one block contribute."""
    steps = basis.shape[0]
    ticks = first_tick + jnp.arange(steps * per_step, dtype=jnp.uint32)
    leaves = jax.tree.leaves(problem.draw_normals(Stream(key, ticks, paths), widths))
    z = jnp.concatenate([leaf.reshape(steps, per_step, -1, paths.size) for leaf in leaves], axis=2)
    sums = z.sum(axis=1) / math.sqrt(per_step)
    parts = [sums]
    if per_step > 1:
        lever = jnp.arange(per_step) - 0.5 * (per_step - 1)
        parts.append(jnp.einsum("j,kjcr->kcr", lever / jnp.linalg.norm(lever), z))
    if squared:
        i, j = np.triu_indices(z.shape[2])
        parts.append(sums[:, i] * sums[:, j] - jnp.asarray(i == j, z.dtype)[:, None])
    return jnp.concatenate(
        [jnp.einsum("km,kcr->mcr", basis, p).reshape(-1, paths.size) for p in parts]
    )
