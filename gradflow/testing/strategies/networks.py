"""Strategies for networks: depth, widths, imbalance and conditioning."""

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from gradflow.network import DeepLinear
from gradflow.testing.strategies.building import Draw, ValueOrStrategy, as_strategy, composite
from gradflow.testing.strategies.entries import (
    checked_conditioning,
    conditioned,
    entries,
    matrices,
    orthogonal,
    singular_values,
)

USUAL_SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 1),
    (3, 2),
    (1, 1, 1),
    (2, 2, 2),
    (3, 1, 2),
    (2, 3, 2, 1),
    (1, 2, 2, 3, 2),
)
"""The widths drawn by default: scalar networks, a square one, bottlenecks and bulges.

They are few because every new shape compiles.
"""


def shapes(
    depth: ValueOrStrategy[int] | None = None,
    *,
    min_depth: int = 1,
    max_depth: int = 4,
    max_width: int = 4,
    every: bool = False,
) -> st.SearchStrategy[tuple[int, ...]]:
    """Widths (d_0, ..., d_N), input first; they shrink to one layer and width 1.

    **Arguments:**

    - `depth`: the depth N, or a strategy for it; by default `min_depth` to `max_depth`.
    - `max_width`: the largest width.
    - `every`: draw every combination of widths instead of the few of `USUAL_SHAPES`. JAX compiles
        anew for every shape, so that a test takes a second or more per example.

    **Raises:** `ValueError` if no network is left.
    """
    if isinstance(depth, int) and depth < 1:
        raise ValueError(f"depth must be an integer >= 1; got {depth}.")
    if depth is None and not 1 <= min_depth <= max_depth:
        raise ValueError(
            f"min_depth={min_depth}, max_depth={max_depth}: give 1 <= min_depth <= max_depth."
        )
    if max_width < 1:
        raise ValueError(f"max_width must be an integer >= 1; got {max_width}.")
    if depth is not None:
        return _of_depth(as_strategy(depth), max_width, every)
    if every:
        return _of_depth(st.integers(min_depth, max_depth), max_width, every)
    depths = range(min_depth, max_depth + 1)
    return st.sampled_from([w for n in depths for w in _usual(n, max_width)])


def networks(
    depth: ValueOrStrategy[int] | None = None,
    widths: ValueOrStrategy[tuple[int, ...]] | None = None,
    imbalance: ValueOrStrategy[float] | None = None,
    conditioning: float | None = None,
    *,
    min_depth: int = 1,
    max_depth: int = 4,
    max_width: int = 4,
) -> st.SearchStrategy[DeepLinear]:
    r"""Deep linear networks of readable entries; they shrink to one layer, width 1 and zeros.

    **Arguments:**

    - `depth`: the number of layers, or a strategy for it; by default `min_depth` to `max_depth`.
    - `widths`: $(d_0, ..., d_N)$, or a strategy such as `shapes(every=True)`; by default the few
        of `USUAL_SHAPES`, so that examples share compiled programs.
    - `imbalance`: the imbalance $D(W) \ge 0$, or a strategy for it. 0 makes every
        $G_i = W_{i+1}^\top W_{i+1} - W_i W_i^\top$ zero; a positive one scales the layers so that
        one of them has a squared norm larger by $D$ than all others (which needs two layers). By
        default whatever the entries give.
    - `conditioning`: a bound on the ratio of the largest to the smallest singular value of every
        layer (the smallest that is not zero if a balanced network has a bottleneck). By default
        layers may be singular, or zero.
    - `max_width`, `min_depth`, `max_depth`: limits of the default widths.

    **Raises:** `ValueError` for limits that leave no network.
    """
    bound = checked_conditioning(conditioning)
    if isinstance(imbalance, float | int) and not 0 <= imbalance < np.inf:
        raise ValueError(f"imbalance must be a finite number >= 0; got {imbalance}.")
    if isinstance(imbalance, float | int) and imbalance > 0:
        if depth == 1:
            raise ValueError(
                f"imbalance={imbalance}: one layer has nothing to differ from; give depth >= 2."
            )
        min_depth = max(min_depth, 2)
    if widths is None:
        shape = shapes(depth, min_depth=min_depth, max_depth=max_depth, max_width=max_width)
    elif depth is not None:
        raise ValueError("depth and widths: give one of the two; widths fix the depth.")
    else:
        shape = as_strategy(widths)
    return _networks(shape, as_strategy(imbalance), bound)


@composite
def _networks(
    draw: Draw,
    shape: st.SearchStrategy[tuple[int, ...]],
    imbalance: st.SearchStrategy[float | None],
    conditioning: float | None,
) -> DeepLinear:
    widths = tuple(draw(shape))
    wanted = draw(imbalance)
    if wanted == 0 and len(widths) > 2:
        layers = draw(_balanced(widths, conditioning))
    else:
        layers = draw(_layers(widths, conditioning))
        if wanted:
            layers = _scaled_to(layers, wanted, *draw(_norms(len(layers))))
    return DeepLinear(layers)


@composite
def _layers(draw: Draw, widths: Sequence[int], conditioning: float | None) -> list[np.ndarray]:
    pairs = itertools.pairwise(widths)
    if conditioning is None:
        return [draw(matrices(above, below)) for below, above in pairs]
    sizes = st.sampled_from([1.0, 0.5, 2.0])
    return [draw(sizes) * draw(conditioned(above, below, conditioning)) for below, above in pairs]


@composite
def _balanced(draw: Draw, widths: Sequence[int], conditioning: float | None) -> list[np.ndarray]:
    r"""$W_i = Q_i \Sigma Q_{i-1}^\top$ with orthonormal columns $Q_i$ and one $\Sigma$ for all."""
    rank = min(widths)
    if conditioning is None:
        values = np.array(draw(st.tuples(*[entries(positive=True)] * rank)))
    else:
        size = draw(st.sampled_from([1.0, 0.5, 2.0]))
        values = size * draw(singular_values(rank, conditioning))
    frames = [draw(orthogonal(d))[:, :rank] for d in widths]
    return [(above * values) @ below.T for below, above in itertools.pairwise(frames)]


def _norms(depth: int) -> st.SearchStrategy[tuple[float, int]]:
    """The squared norm of the light layers, and the place of the heavy one."""
    return st.tuples(st.sampled_from([1.0, 0.5, 2.0]), st.integers(0, depth - 1))


def _scaled_to(
    layers: list[np.ndarray], imbalance: float, light: float, heavy: int
) -> list[np.ndarray]:
    if len(layers) == 1:
        raise ValueError(
            f"imbalance={imbalance}: a network of one layer was drawn, which has nothing to differ "
            "from; draw widths of at least two layers."
        )
    scaled = []
    for i, layer in enumerate(layers):
        direction = layer if np.any(layer) else np.eye(*layer.shape)
        size = light + imbalance if i == heavy else light
        scaled.append(np.sqrt(size) * direction / np.linalg.norm(direction))
    return scaled


@composite
def _of_depth(
    draw: Draw, depth: st.SearchStrategy[int], max_width: int, every: bool
) -> tuple[int, ...]:
    n = draw(depth)
    if every:
        return draw(st.tuples(*[st.integers(1, max_width)] * (n + 1)))
    return draw(st.sampled_from(_usual(n, max_width)))


def _usual(depth: int, max_width: int) -> list[tuple[int, ...]]:
    listed = [w for w in USUAL_SHAPES if len(w) == depth + 1 and max(w) <= max_width]
    return listed or [(d,) * (depth + 1) for d in range(1, min(max_width, 2) + 1)]
