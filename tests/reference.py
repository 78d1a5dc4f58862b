"""Deep linear networks in plain NumPy, written from the formulas and used as expected values.

Nothing here imports gradflow. Layers are lists of matrices, first layer first.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import numpy as np
from numpy.polynomial.hermite_e import hermegauss

Layers = Sequence[np.ndarray]


def as_numpy(layers: Sequence) -> list[np.ndarray]:
    """The layers of a gradflow network (or gradient) as NumPy arrays."""
    return [np.asarray(w) for w in layers]


def product(layers: Layers, first: int, last: int, width: int) -> np.ndarray:
    """W_last ... W_first (counted from 1); the identity of the given width if there is none."""
    return reduce(lambda p, i: layers[i - 1] @ p, range(first, last + 1), np.eye(width))


def end_to_end(layers: Layers) -> np.ndarray:
    """W_N ... W_1."""
    return product(layers, 1, len(layers), layers[0].shape[1])


def above(layers: Layers, i: int) -> np.ndarray:
    """A_i = W_N ... W_{i+1}."""
    return product(layers, i + 1, len(layers), layers[i - 1].shape[0])


def below(layers: Layers, i: int) -> np.ndarray:
    """B_i = W_{i-1} ... W_1."""
    return product(layers, 1, i - 1, layers[0].shape[1])


def loss(layers: Layers, sxx: np.ndarray, syx: np.ndarray, syy: np.ndarray) -> complex:
    """1/2 E|Px - y|^2 from the moments; holomorphic, so that complex steps work."""
    p = end_to_end(layers)
    return 0.5 * np.trace(p @ sxx @ p.T - 2.0 * p @ syx.T + syy)


def complex_step_gradient(f: Callable[[Layers], complex], layers: Layers) -> list[np.ndarray]:
    """The gradient of a holomorphic function of the layers, to rounding."""
    gradient = [np.zeros(w.shape) for w in layers]
    for i, w in enumerate(layers):
        for place in np.ndindex(w.shape):
            moved = [np.array(v, dtype=complex) for v in layers]
            moved[i][place] += 1e-30j
            gradient[i][place] = np.imag(f(moved)) / 1e-30
    return gradient


def pull_back(layers: Layers, m: np.ndarray) -> list[np.ndarray]:
    """A_i^T M B_i^T."""
    return [above(layers, i).T @ m @ below(layers, i).T for i in range(1, len(layers) + 1)]


def jacobian(layers: Layers) -> np.ndarray:
    """The matrix that takes vec M (row-major) to the gradient of all layers as one vector."""
    p = end_to_end(layers)
    units = np.eye(p.size).reshape(-1, *p.shape)
    return np.stack([flatten(pull_back(layers, unit)) for unit in units], axis=1)


def gradient(layers: Layers, sxx: np.ndarray, syx: np.ndarray) -> list[np.ndarray]:
    """The gradient of the loss in every layer."""
    return pull_back(layers, end_to_end(layers) @ sxx - syx)


def hessian(layers: Layers, sxx: np.ndarray, syx: np.ndarray) -> np.ndarray:
    """The Hessian of the loss: complex steps of its gradient, rows in the order of the layers."""
    columns = []
    for i, w in enumerate(layers):
        for place in np.ndindex(w.shape):
            moved = [np.array(v, dtype=complex) for v in layers]
            moved[i][place] += 1e-30j
            columns.append(flatten(gradient(moved, sxx, syx)).imag / 1e-30)
    return np.stack(columns, axis=1)


def flatten(layers: Layers) -> np.ndarray:
    """All entries in one vector, layer by layer."""
    return np.concatenate([w.ravel() for w in layers])


def balancedness(layers: Layers) -> list[np.ndarray]:
    """V_{i+1}^T V_{i+1} - V_i V_i^T, for weights or gradients V."""
    return [
        layers[i + 1].T @ layers[i + 1] - layers[i] @ layers[i].T for i in range(len(layers) - 1)
    ]


def scale(*groups: Layers) -> float:
    """1 + the largest squared Frobenius norm among the arrays: the size of rounding errors."""
    return 1.0 + max((float(np.sum(np.abs(w) ** 2)) for g in groups for w in g), default=0.0)


def assert_close(actual: Sequence, expected: Sequence, size: float, tolerance: float = 1e-12):
    """Equal layer by layer to `tolerance * size`."""
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True), start=1):
        message = f"entry {i} of {len(expected)}"
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=0.0, atol=tolerance * size, err_msg=message
        )


# Expectations over draws


def batches(n: int, size: int, replacement: bool) -> Iterator[tuple[int, ...]]:
    """Every batch of rows, all equally likely."""
    if replacement:
        return itertools.product(range(n), repeat=size)
    return itertools.combinations(range(n), size)


def gauss_hermite(dimensions: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (q, dimensions) and weights (q,) that integrate a standard normal.

    Exact for polynomials of degree up to 2 `points` - 1 in every coordinate.
    """
    nodes, weights = hermegauss(points)
    grid = np.array(list(itertools.product(nodes, repeat=dimensions)))
    each = np.array(list(itertools.product(weights, repeat=dimensions)))
    return grid, np.prod(each, axis=1) / math.sqrt(2.0 * math.pi) ** dimensions


def mean_and_covariance(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of vectors (q, k) with probabilities (q,)."""
    mean = weights @ values
    centred = values - mean
    return mean, (weights[:, None] * centred).T @ centred
