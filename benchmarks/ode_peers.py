"""Gradient flow as SciPy and torchdiffeq users write it, and a reference to measure errors by."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchdiffeq
from flow_cases import FlowCase
from scipy.integrate import solve_ivp

RTOL, ATOL = 1e-8, 1e-10


class TooSlowError(Exception):
    """A solve has taken longer than it may."""


def limited(field: Callable[..., Any], most: float) -> Callable[..., Any]:
    """A right-hand side that stops the solve which calls it after `most` seconds."""
    deadline = time.monotonic() + most

    def watched(t: Any, y: Any) -> Any:
        if time.monotonic() > deadline:
            raise TooSlowError(f"stopped after {most:g} s")
        return field(t, y)

    return watched


def flat(layers: Sequence[Any]) -> np.ndarray:
    """All weights in one vector."""
    return np.concatenate([np.asarray(w).ravel() for w in layers])


def unflat(case: FlowCase, y: np.ndarray) -> list[np.ndarray]:
    """The layers of a vector; `y` may have leading axes."""
    ends = np.cumsum([w.size for w in case.layers])
    parts = np.split(y, ends[:-1], axis=-1)
    return [
        part.reshape(*y.shape[:-1], *w.shape) for part, w in zip(parts, case.layers, strict=True)
    ]


def numpy_field(case: FlowCase) -> Callable[[float, np.ndarray], Any]:
    """The right-hand side: plain numbers for a chain of numbers, matrix products otherwise."""
    if case.is_scalar:
        return chain_field(float(case.target.item()))
    target, count = case.target, len(case.layers)
    shapes = [w.shape for w in case.layers]
    ends = np.cumsum([0, *(w.size for w in case.layers)])

    def field(t: float, y: np.ndarray) -> np.ndarray:
        w = [y[ends[i] : ends[i + 1]].reshape(shapes[i]) for i in range(count)]
        rights = [w[0]]
        for layer in w[1:]:
            rights.append(layer @ rights[-1])
        m = target - rights.pop()
        out = np.empty_like(y)
        for i in reversed(range(count)):
            g = m @ rights[i - 1].T if i else m
            out[ends[i] : ends[i + 1]] = g.ravel()
            if i:
                m = w[i].T @ m
        return out

    return field


def chain_field(target: float) -> Callable[[float, np.ndarray], list[float]]:
    """The right-hand side of a chain of numbers, in plain Python."""

    def field(t: float, y: np.ndarray) -> list[float]:
        w = y.tolist()
        rights = [1.0]
        for value in w:
            rights.append(rights[-1] * value)
        m = target - rights.pop()
        out = [0.0] * len(w)
        for i in reversed(range(len(w))):
            out[i] = m * rights[i]
            m *= w[i]
        return out

    return field


def scipy_solve(case: FlowCase, method: str) -> Callable[..., np.ndarray]:
    """`solve_ivp` with saved times; gives `(SAVES, weights)`; takes the most seconds."""
    field, start, times = numpy_field(case), flat(case.layers), case.times

    def run(most: float = math.inf) -> np.ndarray:
        solution = solve_ivp(
            limited(field, most),
            (0.0, case.stop),
            start,
            method=method,
            t_eval=times,
            rtol=RTOL,
            atol=ATOL,
        )
        return solution.y.T

    return run


def torchdiffeq_solve(case: FlowCase, method: str) -> Callable[..., np.ndarray]:
    """`odeint` on a tuple of layers, without gradients; takes the most seconds."""
    target = torch.as_tensor(case.target)
    start = tuple(torch.as_tensor(w) for w in case.layers)
    times = torch.as_tensor(case.times)

    def field(t: Any, w: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        rights = [w[0]]
        for layer in w[1:]:
            rights.append(layer @ rights[-1])
        m = target - rights.pop()
        out = []
        for i in reversed(range(len(w))):
            out.append(m @ rights[i - 1].mT if i else m)
            if i:
                m = w[i].mT @ m
        return tuple(reversed(out))

    def run(most: float = math.inf) -> np.ndarray:
        with torch.no_grad():
            ends = torchdiffeq.odeint(
                limited(field, most), start, times, method=method, rtol=RTOL, atol=ATOL
            )
        return torch.cat([w.flatten(1) for w in ends], dim=1).numpy()

    return run


def reference(case: FlowCase, stiff: bool) -> np.ndarray:
    """The saved points to near rounding: LSODA where curvatures differ much, else DOP853."""
    solution = solve_ivp(
        numpy_field(case),
        (0.0, case.stop),
        flat(case.layers),
        method="LSODA" if stiff else "DOP853",
        t_eval=case.times,
        rtol=3e-14,
        atol=1e-15,
    )
    return solution.y.T


def loss_of(layers: Sequence[np.ndarray], target: np.ndarray) -> Any:
    """Half the squared distance of the end-to-end matrix; leading axes stay."""
    product = layers[0]
    for w in layers[1:]:
        product = w @ product
    return 0.5 * np.sum((product - target) ** 2, axis=(-2, -1))


def balancedness(layers: Sequence[np.ndarray]) -> np.ndarray:
    """All entries of all G_i in one vector; leading axes stay."""
    grams = [
        np.swapaxes(b, -1, -2) @ b - a @ np.swapaxes(a, -1, -2)
        for a, b in itertools.pairwise(layers)
    ]
    return np.concatenate([g.reshape(*g.shape[:-2], -1) for g in grams], axis=-1)


def errors(case: FlowCase, saved: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """The largest errors of the loss and of an entry of a G_i over the saved points.

    The flow keeps every G_i, so that its exact value is that of the start.
    """
    layers, true = unflat(case, saved), unflat(case, exact)
    loss = np.max(np.abs(loss_of(layers, case.target) - loss_of(true, case.target)))
    kept = balancedness([w[:1] for w in unflat(case, flat(case.layers)[None])])
    return float(loss), float(np.max(np.abs(balancedness(layers) - kept)))
