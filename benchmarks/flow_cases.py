"""Gradient flows to integrate, each to a time at which the loss is about 1e-12."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from cases import positive_target

SAVES = 51


@dataclass(frozen=True)
class FlowCase:
    """Gradient flow on whitened data from `layers` over the time `stop`."""

    title: str
    target: np.ndarray
    layers: tuple[np.ndarray, ...]
    stop: float

    @property
    def times(self) -> np.ndarray:
        """The saved times."""
        return np.linspace(0.0, self.stop, SAVES)

    @property
    def is_scalar(self) -> bool:
        """Whether every layer is one number."""
        return all(w.size == 1 for w in self.layers)

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(w.size for w in self.layers)


def chain(title: str, stop: float, *layers: float) -> FlowCase:
    """Layers of one number, target 1."""
    return FlowCase(title, np.array([[1.0]]), tuple(np.array([[w]]) for w in layers), stop)


def matching(depth: int, width: int, seed: int, noise: float = 0.3) -> tuple[np.ndarray, ...]:
    """Layers near 0.8 times orthogonal matrices whose product is near a multiple of the identity.

    From there a positive target is reached without passing a saddle.
    """
    rng = np.random.default_rng(seed)
    frames = [np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(depth - 1)]
    frames = [np.eye(width), *frames, np.eye(width)]
    return tuple(
        0.8 * above @ below.T + noise / np.sqrt(width) * rng.normal(size=(width, width))
        for below, above in itertools.pairwise(frames)
    )


def square(title: str, depth: int, width: int, stop: float) -> FlowCase:
    """A start without saddles on the way."""
    return FlowCase(title, positive_target(width), matching(depth, width, 0, 0.1), stop)


def unbalanced(title: str, stop: float) -> FlowCase:
    """A first layer with singular values from 0.7 to 30: curvatures from 0.5 to 900."""
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.normal(size=(10, 10)))[0] for _ in range(2))
    first = (left * np.geomspace(0.7, 30.0, 10)) @ right.T
    return FlowCase(title, positive_target(10), (first, *matching(2, 10, 3)), stop)


def small(title: str, stop: float) -> FlowCase:
    """A start of size 4e-3: one saddle after the other before the loss falls."""
    layers = tuple(4e-3 * w for w in matching(3, 10, 4))
    return FlowCase(title, positive_target(10), layers, stop)


CASES: dict[str, Callable[[], FlowCase]] = {
    "scalar-2": lambda: chain("scalar, depth 2", 3.0, 2.0, 0.1),
    "scalar-5": lambda: chain("scalar, depth 5", 3.0, 1.2, 0.5, 0.8, 0.3, 1.0),
    "width-10": lambda: square("depth 3, width 10", 3, 10, 33.0),
    "width-64": lambda: square("depth 4, width 64", 4, 64, 32.0),
    "width-256": lambda: square("depth 3, width 256", 3, 256, 34.0),
    "unbalanced": lambda: unbalanced("unbalanced, depth 3, width 10", 26.0),
    "small": lambda: small("small start, depth 3, width 10", 1850.0),
}
