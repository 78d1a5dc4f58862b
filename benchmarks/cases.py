"""What the ensembles train: whitened data with noise on the labels, and the start."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import gradflow as gf


@dataclass(frozen=True)
class Training:
    """Label-noise training of a linear network on whitened data.

    A step of SGD is $W_i \\mathrel{-}= h\\, A_i^T (P - T + s \\xi) B_i^T$; the equation of SGD is
    integrated by Euler-Maruyama with `substeps` steps a step of SGD.
    """

    target: np.ndarray
    layers: tuple[np.ndarray, ...]
    step_size: float
    std: float
    substeps: int = 8

    @property
    def problem(self) -> gf.Problem:
        """As gradflow takes it."""
        noise = [gf.LabelNoise(self.std)] if self.std else []
        return gf.Problem(gf.Regression.whitened(self.target), noise)

    @property
    def descent_scales(self) -> tuple[float, float]:
        """The factors of drift and normals in one step of SGD."""
        return self.step_size, self.step_size * self.std

    @property
    def flow_scales(self) -> tuple[float, float]:
        """The factors of drift and normals in one Euler-Maruyama step."""
        dt = self.step_size / self.substeps
        return dt, float(np.sqrt(self.step_size * dt)) * self.std


def near_orthogonal(widths: Sequence[int], seed: int = 0) -> tuple[np.ndarray, ...]:
    """Layers close to 0.8 times orthogonal matrices."""
    rng = np.random.default_rng(seed)
    layers = []
    for below, above in itertools.pairwise(widths):
        size = max(below, above)
        frame = np.linalg.qr(rng.normal(size=(size, size)))[0][:above, :below]
        layers.append(0.8 * frame + 0.3 / np.sqrt(size) * rng.normal(size=(above, below)))
    return tuple(layers)


def positive_target(width: int, seed: int = 1) -> np.ndarray:
    """A symmetric target with eigenvalues 0.2 to 2."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return (q * np.linspace(0.2, 2.0, width)) @ q.T


def scalar(std: float = 0.5) -> Training:
    """Depth 2, one number a layer."""
    return Training(np.array([[1.0]]), (np.array([[2.0]]), np.array([[0.1]])), 0.05, std)


def width_ten(std: float = 0.2) -> Training:
    """Depth 3, width 10."""
    return Training(positive_target(10), near_orthogonal((10, 10, 10, 10)), 0.02, std)


def end_quantities(layers: Sequence[Any], target: np.ndarray) -> dict[str, np.ndarray]:
    """What agreement is judged by, one number a path; `layers` start with the path axis."""
    arrays = [np.asarray(w) for w in layers]
    product = arrays[0]
    for w in arrays[1:]:
        product = w @ product
    norms = [np.sum(w * w, axis=(1, 2)) for w in arrays]
    found = {"loss": 0.5 * np.sum((product - target) ** 2, axis=(1, 2))}
    for i in range(len(arrays) - 1):
        found[f"tr G_{i + 1}"] = norms[i + 1] - norms[i]
    return found
