"""Whether the rounding of large weights decides what a run says of its loss."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gradflow.backend.compiled import compiled
from gradflow.backend.types import Scalar, Weights
from gradflow.problem import Problem

LARGE = 1e4
"""Weight from which on it is worth a look."""

UNKNOWN = 0.01
"""Share of the loss that rounding may move before a word is due."""

NOTHING = 1e-6
"""Share of tr S_yy / 2 below which a loss is as good as none."""


class RoundingWarning(UserWarning):
    """Weights are so large that their rounding moves the loss of a run by more than it is."""


def rounded(problem: Problem, layers: Sequence[np.ndarray]) -> str | None:
    r"""What rounding does to the loss of the path with the largest weight; None if nothing.

    Weights known to $\epsilon \max |W|$ have a loss known to that times $|\nabla \bar L|_1$.

    **Arguments:**

    - `layers`: of every path at the last saved time, `(R, d_i, d_{i-1})`.
    """
    sizes = np.max([np.abs(w).max(axis=(1, 2)) for w in layers], axis=0)  # squares overflow
    sizes = np.where(np.isfinite(sizes), sizes, 0.0)
    path = int(np.argmax(sizes))
    if sizes[path] < LARGE:
        return None
    weights = tuple(w[path] for w in layers)
    loss, slope = map(float, _loss_and_slope(problem, weights))
    unit = float(np.finfo(layers[0].dtype).eps) * float(sizes[path])
    moved = unit * slope
    least = NOTHING * 0.5 * float(np.trace(problem.data.syy))
    if np.isnan(moved) or moved <= max(UNKNOWN * loss, least):
        return None
    return (
        f"weights of size {sizes[path]:.2g} are rounded at {unit:.2g}, which moves a loss of "
        f"{loss:.3g} by about {moved:.2g}: it is not known. Start nearer to the size of the data"
    )


@compiled
def _loss_and_slope(problem: Problem, weights: Weights) -> tuple[Scalar, Scalar]:
    gradient = problem.averaged_gradient(weights)
    return problem.averaged_loss(weights), jnp.stack([jnp.sum(jnp.abs(g)) for g in gradient]).sum()
