"""Does a dynamics conserve a quantity?"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from gradflow.dynamics.base import AbstractDynamics
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.testing.running import (
    FlowMap,
    accuracy,
    entry_name,
    path,
    rounding,
    squared_norm,
)
from gradflow.testing.showing import message, show_layers, show_network, show_problem, show_subject

Quantity = Callable[[DeepLinear], Any]
"""A function of a network that gives a number, an array, or a list of arrays."""


def assert_conserves(
    dynamics: AbstractDynamics | FlowMap,
    quantity: Quantity | None,
    problem: Problem | None,
    net: DeepLinear,
    *,
    t1: float,
    points: int = 11,
    decay: float = 0.0,
    rtol: float | None = None,
    atol: float = 1e-12,
    key: PRNGKeyArray | None = None,
) -> None:
    r"""Assert that a quantity $Q(W(t))$ stays what it was at the start.

    $$|Q(t) - e^{-\kappa t} Q(0)| \le \mathrm{atol} + \mathrm{rtol} \cdot
      \max\bigl(\max_{i,t} |W_i(t)|_F^2, |Q(0)|\bigr)$$

    in every entry, at `points` times between 0 and $t_1$.

    **Arguments:**

    - `dynamics`: a gradflow dynamics (your own subclass of `AbstractDynamics` too), or a function
        of (weights at time 0, t) that gives the weights at time t.
    - `quantity`: a function of a network giving a number, an array or a list of arrays; None for
        the matrices $G_i = W_{i+1}^\top W_{i+1} - W_i W_i^\top$, which every gradient flow of a
        loss of the end-to-end matrix conserves.
    - `problem`: what the dynamics runs on; a function may know its own and take None.
    - `t1`: flow time of the run.
    - `decay`: the rate $\kappa$ at which the quantity shrinks instead; $G_i$ has twice the rate of
        weight decay.
    - `rtol`: by default ten times the tolerance of the dynamics' solver, rounding ($10^{-12}$) for
        a dynamics without tolerance, and $10^{-8}$ for a function.
    - `key`: for a dynamics that is random on this problem.

    **Raises:** `AssertionError` that shows the worst entry, what was observed and allowed, the
    network and the data; `TypeError` if a dynamics has no problem or a function gives no layers.

    Source: Du, Hu, Lee 2018, "Algorithmic regularization in learning deep homogeneous models".
    """
    times, layers = path(dynamics, problem, net, t1, points, key)
    weight = squared_norm(layers)
    values = _values(quantity, times, layers)
    relative = accuracy(dynamics) if rtol is None else rtol
    worst: tuple[float, str, int, float, float, float] | None = None
    for name, series in values:
        expected = np.exp(-decay * times).reshape(-1, *[1] * (series.ndim - 1)) * series[0]
        size = max(weight, float(np.max(np.abs(series[0]), initial=0.0)))
        allowed = atol + max(relative, rounding(series)) * size
        error = np.abs(series - expected)
        error = np.where(np.isnan(error), np.inf, error)
        if error.size == 0:
            continue
        at = np.unravel_index(int(np.argmax(error)), error.shape)
        excess = float(error[at]) / allowed
        if worst is None or excess > worst[0]:
            label = entry_name(name, at[1:])
            worst = (excess, label, int(at[0]), float(series[at]), float(expected[at]), allowed)
    if worst is None or worst[0] <= 1.0:
        return
    excess, label, at_time, observed, expected_value, allowed = worst
    at_end = [w[at_time] for w in layers]
    claim = "is not conserved" if decay == 0 else f"does not decay as exp(-{decay:g} t)"
    raise AssertionError(
        message(
            f"{label} {claim} by {show_subject(dynamics)}; worst at t = {times[at_time]:.6g}:",
            f"  expected {expected_value:.12g}",
            f"  observed {observed:.12g}",
            f"  off by   {abs(observed - expected_value):.3g}, allowed {allowed:.3g}"
            f" (atol {atol:.3g} + rtol {relative:.3g} of the largest squared norm {weight:.3g})",
            f"start, {show_network(net)}",
            show_layers(at_end, f"layers at t = {times[at_time]:.6g}"),
            show_problem(problem),
        )
    )


def _values(
    quantity: Quantity | None, times: np.ndarray, layers: list[np.ndarray]
) -> list[tuple[str, np.ndarray]]:
    """Name and values `(T, ...)` of every array of the quantity."""
    if quantity is None:
        grams = []
        for i, (below, above) in enumerate(itertools.pairwise(layers), start=1):
            difference = np.swapaxes(above, -1, -2) @ above - below @ np.swapaxes(below, -1, -2)
            grams.append((f"G_{i} = W_{i + 1}^T W_{i + 1} - W_{i} W_{i}^T, entry ", difference))
        return grams
    name = getattr(quantity, "__name__", "quantity")
    each = [_arrays(quantity(DeepLinear([w[j] for w in layers]))) for j in range(times.size)]
    if len(each[0]) == 1:
        return [(name, np.stack([arrays[0] for arrays in each]))]
    return [
        (f"{name}[{i}]", np.stack(series))
        for i, series in enumerate(zip(*each, strict=True), start=0)
    ]


def _arrays(value: Any) -> list[np.ndarray]:
    return (
        [np.asarray(v) for v in value] if isinstance(value, list | tuple) else [np.asarray(value)]
    )
