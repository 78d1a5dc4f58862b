"""Gradient flow by power series in extended precision: a reference with 18 digits.

Nothing here imports gradflow. Layers are lists of matrices, first layer first.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

TERMS = 30

HAS_EXTENDED = np.finfo(np.longdouble).eps < 2e-19


def _times(a: NDArray, b: NDArray, k: int) -> NDArray:
    """Coefficient k of the product of two series of matrices."""
    return np.einsum("kij,kjl->il", a[: k + 1], b[k::-1])


def _series(layers: list[NDArray], sxx: NDArray, syx: NDArray, decay: float) -> list[NDArray]:
    """Taylor coefficients in time of every layer."""
    depth = len(layers)
    w = [np.zeros((TERMS + 1, *layer.shape), np.longdouble) for layer in layers]
    widths = [layers[0].shape[1], *(layer.shape[0] for layer in layers)]
    below = [np.zeros((TERMS, d, widths[0]), np.longdouble) for d in widths]
    above = [np.zeros((TERMS, d, widths[-1]), np.longdouble) for d in widths]
    below[0][0], above[-1][0] = np.eye(widths[0]), np.eye(widths[-1])
    m = np.zeros((TERMS, widths[-1], widths[0]), np.longdouble)
    for i, layer in enumerate(layers):
        w[i][0] = layer
    for k in range(TERMS):
        for i in range(depth):
            below[i + 1][k] = _times(w[i], below[i], k)
        for i in reversed(range(depth)):
            above[i][k] = _times(np.swapaxes(w[i], 1, 2), above[i + 1], k)
        m[k] = below[-1][k] @ sxx - (syx if k == 0 else 0)
        for i in range(depth):
            outer = np.stack([_times(above[i + 1], m, j) for j in range(k + 1)])
            g = _times(outer, np.swapaxes(below[i], 1, 2), k)
            w[i][k + 1] = -(g + decay * w[i][k]) / (k + 1)
    return w


def flow(
    layers: Sequence[np.ndarray],
    sxx: np.ndarray,
    syx: np.ndarray,
    times: ArrayLike,
    decay: float = 0.0,
) -> list[np.ndarray]:
    """W' = -grad L - decay W; each layer `(time, d_i, d_{i-1})`, float64."""
    now = [np.asarray(w, np.longdouble) for w in layers]
    sxx, syx = np.asarray(sxx, np.longdouble), np.asarray(syx, np.longdouble)
    t, path = np.longdouble(0.0), []
    for end in np.asarray(times, float):
        while t < end:
            series = _series(now, sxx, syx, decay)
            sizes = [max(np.max(np.abs(s[k])) for s in series) for k in (0, TERMS - 1, TERMS)]
            h = np.longdouble(end) - t
            for k, size in ((TERMS - 1, sizes[1]), (TERMS, sizes[2])):
                if size > 0.0:
                    h = min(h, (1e-20 * sizes[0] / size) ** (np.longdouble(1.0) / k))
            powers = h ** np.arange(TERMS + 1)
            now = [np.einsum("k,kij->ij", powers, s) for s in series]
            t = t + h if t + h < end else np.longdouble(end)
        path.append([np.asarray(w, np.float64) for w in now])
    return [np.stack(layer) for layer in zip(*path, strict=True)]
