r"""How far the two phases overlap: what noise does to the imbalance while the residual decays."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.analysis.prediction.noise_free_run import MOST_POINTS
from gradflow.backend.compiled import compiled
from gradflow.backend.types import Weights
from gradflow.geometry.imbalance import squared_norms
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.regularizers.base import AbstractLayerNoise
from gradflow.results.trajectory import Trajectory
from gradflow.theory.drift import noise_balancedness


def overlap(
    problem: Problem, path: Trajectory, limit: DeepLinear, step_size: float, momentum: float
) -> float:
    r"""Expected change of the imbalance in the optimization phase that the slow flow leaves out.

    The slow flow starts at the minimum that noise-free training reaches, as if noise acted all the
    time as it does there. Noise-free training keeps every $G_i$ up to what a finite step changes,
    so the expected difference adds up along its path $W(t)$, at leading order in noise and step,

    $$\frac{h}{(1-\beta)^2} \int_0^\infty \mathrm{tr} \sum_{i=j}^{k-1}
      \Bigl[ n_i(W(t)) - n_i(W(\infty)) \Bigr]\, dt$$

    with $n_i$ the `noise_balancedness` and $j$, $k$ the layers of the smallest and largest norm
    (the sign turned where $k < j$). Batches have by far the largest part in it: their noise is that
    of the residuals. Noise inside the network is left out.

    **Arguments:**

    - `path`: noise-free run that ends at `limit`, with its weights.
    - `step_size`, `momentum`: $h$ and $\beta$.

    **Returns:** the change of $D$.
    """
    acting = [r for r in problem.regularizers if not isinstance(r, AbstractLayerNoise)]
    noisy = Problem(problem.data, acting)
    if limit.depth == 1 or not noisy.is_stochastic:
        return 0.0
    # Runs of all lengths share one program: the end of a short one is repeated.
    shown = np.minimum(np.arange(MOST_POINTS), path.time.size - 1)
    along = tuple(np.asarray(w)[shown] for w in path.weights)
    rates = _norm_rates(noisy, along, limit.weights)
    norms = np.asarray(squared_norms(limit))
    excess = rates[:, np.argmax(norms)] - rates[:, np.argmin(norms)]
    return float(step_size / (1.0 - momentum) ** 2 * np.trapezoid(excess, path.time[shown]))


def _norm_rates(
    problem: Problem, path: Sequence[np.ndarray], end: Weights
) -> Float[np.ndarray, "time depth"]:
    """Growth of the squared norms by noise beyond that at the end, over h."""
    with_end = [
        np.concatenate([along, np.asarray(w)[None]]) for along, w in zip(path, end, strict=True)
    ]
    rates = np.asarray(_rates(problem, tuple(map(jnp.asarray, with_end))))
    return rates[:-1] - rates[-1]


@compiled
def _rates(problem: Problem, path: Weights) -> Float[Array, "time depth"]:
    """Growth of the squared norms by noise, over h and up to what all layers share."""

    def of_one(at: Weights) -> Float[Array, " depth"]:
        gains = jnp.stack([jnp.trace(n) for n in noise_balancedness(problem, at)])
        return jnp.concatenate([jnp.zeros(1), jnp.cumsum(gains)])

    return jax.lax.map(of_one, path)
