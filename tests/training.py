"""Training loops in plain NumPy and SciPy, written from the formulas and used as expected values.

Nothing here imports gradflow except `draws`, which hands the very same random numbers to a loop.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import reference
from reference import Layers
from scipy.integrate import solve_ivp

from gradflow.random.streams import Stream


def unflatten(vector: np.ndarray, like: Layers) -> list[np.ndarray]:
    """The layers of a vector that `reference.flatten` made."""
    cuts = np.cumsum([w.size for w in like])[:-1]
    return [v.reshape(w.shape) for v, w in zip(np.split(vector, cuts), like, strict=True)]


def flow(
    layers: Layers,
    sxx: np.ndarray,
    syx: np.ndarray,
    times: Sequence[float],
    decay: float = 0.0,
    method: str = "DOP853",
    rtol: float = 1e-12,
) -> list[np.ndarray]:
    """W' = -grad L - decay W by SciPy; each layer `(time, d_i, d_{i-1})`."""

    def field(t: float, vector: np.ndarray) -> np.ndarray:
        weights = unflatten(vector, layers)
        return -reference.flatten(reference.gradient(weights, sxx, syx)) - decay * vector

    start = reference.flatten(layers)
    options = {"method": method, "t_eval": times, "rtol": rtol, "atol": 1e-13}
    solution = solve_ivp(field, (0.0, times[-1]), start, **options)
    assert solution.success
    points = [unflatten(v, layers) for v in solution.y.T]
    return [np.stack(layer) for layer in zip(*points, strict=True)]


def descend(
    layers: Layers,
    gradient: Callable[[Layers, int], Layers],
    step_size: float,
    steps: int,
    momentum: float = 0.0,
) -> list[np.ndarray]:
    """Heavy ball v+ = beta v - h g(W, k), W+ = W + v+ from rest; layers `(step, d_i, d_{i-1})`."""
    weights = [np.array(w) for w in layers]
    velocity = [np.zeros(w.shape) for w in layers]
    path = [weights]
    for k in range(steps):
        g = gradient(weights, k)
        velocity = [momentum * v - step_size * d for v, d in zip(velocity, g, strict=True)]
        weights = [w + v for w, v in zip(weights, velocity, strict=True)]
        path.append(weights)
    return [np.stack(layer) for layer in zip(*path, strict=True)]


def draws(key: jax.Array, steps: int, paths: int, substream: int) -> Stream:
    """The stream that regularizer number `substream` draws from in a run."""
    return Stream(key, jnp.arange(steps), jnp.arange(paths)).substream(substream)


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def at_time(layers: Sequence[np.ndarray], *index: int) -> list[np.ndarray]:
    """The network at an index of the leading axes of `trajectory.weights`."""
    return [np.asarray(w)[index] for w in layers]


def gram_path(layers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """G_i along leading axes."""
    return [
        np.swapaxes(above, -1, -2) @ above - below @ np.swapaxes(below, -1, -2)
        for below, above in itertools.pairwise(layers)
    ]
