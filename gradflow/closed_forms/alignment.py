"""Do layers, covariance and target share one set of singular directions?"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-12
"""How far from 0, relative to what it is made of, a coupling between directions may be."""

ATTEMPTS = 4


@dataclass(frozen=True)
class Alignment:
    r"""Directions along which a network falls apart into scalar chains.

    - `frames`: `(d_i, m)` for $i = 0..N$: unit vectors $r_i$ of $m$ modes; 0 for an idle one.
    - `values`: `(N, m)`, $r_i^\top W_i r_{i-1}$; `sxx`, `b`: `(m,)`, $r_0^\top S r_0$ and
        $r_N^\top Y r_0$.
    - `active`: `(m,)`, False for modes that never move.
    """

    frames: tuple[np.ndarray, ...]
    values: np.ndarray
    sxx: np.ndarray
    b: np.ndarray
    active: np.ndarray


def find_alignment(
    layers: list[np.ndarray], sxx: np.ndarray, syx: np.ndarray
) -> tuple[Alignment | None, float]:
    """The alignment of the layers, or None and by how much it is missed."""
    missed = np.inf
    for attempt in range(ATTEMPTS):
        found = _directions(layers, sxx, syx, np.random.default_rng(attempt))
        missed = min(missed, _coupling(layers, sxx, syx, found))
        if missed <= TOLERANCE:
            return found, missed
    return None, missed


def _directions(
    layers: list[np.ndarray], sxx: np.ndarray, syx: np.ndarray, rng: np.random.Generator
) -> Alignment:
    below = list(itertools.accumulate(layers, lambda p, w: w @ p))
    tops = itertools.accumulate(reversed(layers[1:]), lambda p, w: p @ w)
    maps = [*below, syx, *(top.T @ syx for top in tops)]
    squares = [sxx, *(m.T @ m for m in maps), below[-1].T @ syx + syx.T @ below[-1]]
    norms = [np.linalg.norm(s) for s in squares]
    kept = [s / n for s, n in zip(squares, norms, strict=True) if n > 0.0]
    mixed = sum((rng.uniform(1.0, 2.0) * s for s in kept), np.zeros_like(sxx))
    inputs = np.linalg.eigh(mixed)[1]
    modes = inputs.shape[1]
    frames = [np.zeros((w.shape[0], modes)) for w in layers]
    frames = [inputs.copy(), *frames]
    active = np.ones(modes, dtype=bool)
    scales = [float(np.linalg.norm(w)) for w in layers]
    for k in range(modes):
        chain = _chain(layers, scales, inputs[:, k], syx)
        active[k] = chain is not None
        for frame, vector in zip(frames, chain or [], strict=False):
            frame[:, k] = vector
    values = np.stack(
        [np.sum(frames[i + 1] * (w @ frames[i]), axis=0) for i, w in enumerate(layers)]
    )
    b = np.sum(frames[-1] * (syx @ inputs), axis=0)
    return Alignment(tuple(frames), values, np.sum(inputs * (sxx @ inputs), axis=0), b, active)


def _chain(
    layers: list[np.ndarray], scales: list[float], start: np.ndarray, syx: np.ndarray
) -> list[np.ndarray] | None:
    """Unit vectors from input to output; None if two links are missing, so that nothing moves."""
    tiny = 1e-13
    upward = [start]
    for w, scale in zip(layers, scales, strict=True):
        image = w @ upward[-1]
        size = np.linalg.norm(image)
        if size <= tiny * scale:
            break
        upward.append(image / size)
    if len(upward) == len(layers) + 1:
        return upward
    image = syx @ start
    size = np.linalg.norm(image)
    if size <= tiny * np.linalg.norm(syx):
        return None
    downward = [image / size]
    missing = len(upward)  # the layer (counted from 1) that maps the direction to 0
    for i in reversed(range(missing, len(layers))):
        image = layers[i].T @ downward[-1]
        size = np.linalg.norm(image)
        if size <= tiny * scales[i]:
            return None
        downward.append(image / size)
    return [*upward, *reversed(downward)]


def _coupling(
    layers: list[np.ndarray], sxx: np.ndarray, syx: np.ndarray, found: Alignment
) -> float:
    """The largest gradient out of the modes at random values of the modes, relative."""
    rng = np.random.default_rng(1)
    frames = [f[:, found.active] for f in found.frames]
    worst = 0.0
    for f in frames:
        worst = max(worst, float(np.max(np.abs(f.T @ f - np.eye(f.shape[1])), initial=0.0)))
    pairs = list(itertools.pairwise(frames))
    size_s, size_y = np.linalg.norm(sxx), np.linalg.norm(syx)
    sxx, syx = sxx / (size_s or 1.0), syx / (size_y or 1.0)
    s, b = found.sxx[found.active] / (size_s or 1.0), found.b[found.active] / (size_y or 1.0)
    own = found.values[:, found.active]
    rest = [w - (top * v) @ low.T for w, v, (low, top) in zip(layers, own, pairs, strict=True)]
    rest = [r / (np.linalg.norm(w) or 1.0) for r, w in zip(rest, layers, strict=True)]
    for _ in range(2):
        values = rng.uniform(0.5, 1.0, size=(len(layers), s.size))
        test = [r + (top * v) @ low.T for r, v, (low, top) in zip(rest, values, pairs, strict=True)]
        product = np.prod(values, axis=0)
        p = functools.reduce(lambda below, w: w @ below, test)
        for moment, weight in ((p @ sxx, s * product), (syx, b)):
            for i, (low, top) in enumerate(pairs):
                above = functools.reduce(lambda m, w: w.T @ m, reversed(test[i + 1 :]), moment)
                gradient = functools.reduce(lambda m, w: m @ w.T, test[:i], above)
                others = np.prod(np.delete(values, i, axis=0), axis=0)
                expected = (top * (weight * others)) @ low.T
                worst = max(worst, float(np.max(np.abs(gradient - expected))))
    return worst
