"""Does a distance fall with the claimed power of the step size?"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import PRNGKeyArray

from gradflow.dynamics.base import AbstractDynamics
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.testing.running import layers_of, rounding, run_dynamics
from gradflow.testing.showing import message, show_network, show_problem, show_subject

Contestant: TypeAlias = AbstractDynamics | Callable[[float], Any]
"""A dynamics, or a function of the step size that gives a dynamics or layers at time t1."""


def assert_order(
    first: Contestant,
    second: Contestant,
    order: float,
    problem: Problem | None,
    net: DeepLinear,
    step_sizes: Sequence[float],
    *,
    t1: float,
    observable: Callable[[DeepLinear], Any] | None = None,
    tolerance: float = 0.2,
    at_least: bool = False,
    key: PRNGKeyArray | None = None,
) -> list[float]:
    r"""Assert that the distance between two ways to train falls as $h^p$ with the step size.

    $$e(h) = |Q(W^{(1)}_h(t_1)) - Q(W^{(2)}_h(t_1))|, \qquad
      p(h_j) = \frac{\log(e(h_j)/e(h_{j+1}))}{\log(h_j/h_{j+1})}.$$

    The local slope $p$ of the two smallest step sizes is the one that is judged; a power law shows
    itself in slopes that settle.

    **Arguments:**

    - `first`, `second`: functions of the step size $h$ that give a dynamics or the layers at
        $t_1$; or a dynamics that is the same for every step size, such as `GradientFlow()`.
    - `order`: the claimed power $p$.
    - `problem`: what a dynamics runs on; None if both functions give layers.
    - `step_sizes`: two or more, of which $t_1$ is a multiple for a dynamics that takes steps.
    - `observable`: the quantity $Q$, a function of a network that gives an array; by default all
        weights.
    - `tolerance`: how far the slope may be from the order.
    - `at_least`: allow slopes above the order too; a distance at rounding level then passes.
    - `key`: for a dynamics that is random on this problem; both take the same one.

    **Returns:** the local slopes, from the largest step sizes to the smallest.

    **Raises:** `AssertionError` with the table of step sizes, distances and local slopes;
    `ValueError` for fewer than two different step sizes or ones that do not divide `t1`.
    """
    steps = _checked_steps(step_sizes)
    sizes, distances = [], []
    for h in steps:
        one = _quantity(_end(first, h, problem, net, t1, key), observable)
        two = _quantity(_end(second, h, problem, net, t1, key), observable)
        distances.append(float(np.linalg.norm(one - two)))
        sizes.append(rounding(two) * (1.0 + float(np.linalg.norm(two))))
    slopes = [
        _slope(e, f, h, k)
        for e, f, h, k in zip(distances, distances[1:], steps, steps[1:], strict=False)
    ]
    lost = distances[-1] <= sizes[-1]
    if lost and at_least:
        return slopes
    slope = slopes[-1]
    right = slope >= order - tolerance and (at_least or slope <= order + tolerance)
    if right and not lost:
        return slopes
    table = ["         h      distance   local slope"]
    for h, e, p in zip(steps, distances, [math.nan, *slopes], strict=True):
        table.append(f"  {h:8.4g}  {e:12.5g}" + ("" if math.isnan(p) else f"  {p:12.3f}"))
    claim = f"{'at least ' if at_least else ''}{order:g} to within {tolerance:g}"
    names = f"{show_subject(first)} and {show_subject(second)}"
    found = (
        f"their distance at h = {steps[-1]:g} is rounding (below {sizes[-1]:.2g}), so that no "
        "order can be seen; give larger step sizes"
        if lost
        else f"observed {slope:.3f} between the two smallest step sizes, expected {claim}"
    )
    raise AssertionError(
        message(
            f"order of the distance between {names} at t = {t1:g}:",
            f"{found}.",
            *table,
            show_network(net),
            show_problem(problem),
        )
    )


def _checked_steps(step_sizes: Sequence[float]) -> list[float]:
    steps = sorted({float(h) for h in step_sizes}, reverse=True)
    if len(steps) < 2 or steps[-1] <= 0:
        raise ValueError(
            f"step_sizes must be two or more different numbers > 0; got {list(step_sizes)}."
        )
    return steps


def _end(
    contestant: Contestant,
    h: float,
    problem: Problem | None,
    net: DeepLinear,
    t1: float,
    key: PRNGKeyArray | None,
) -> DeepLinear:
    """The network at time t1."""
    given = contestant if isinstance(contestant, AbstractDynamics) else contestant(h)
    if not isinstance(given, AbstractDynamics):
        return DeepLinear(layers_of(given, show_subject(contestant)))
    if problem is None:
        raise TypeError(
            f"problem: {type(given).__name__} runs on a gradflow.Problem(data, regularizers); got "
            "None."
        )
    if given.step_size is not None:
        count = t1 / float(given.step_size)
        if abs(count - round(count)) > 1e-6 * max(count, 1.0):
            raise ValueError(
                f"step_sizes: t1 = {t1:g} is not a multiple of h = {float(given.step_size):g}, so "
                f"that the run ends elsewhere; choose step sizes t1/k, such as "
                f"{t1 / max(round(count), 1):g}."
            )
    layers = run_dynamics(given, problem, net, t1, 2, key)[1]
    return DeepLinear([w[-1] for w in layers])


def _quantity(net: DeepLinear, observable: Callable[[DeepLinear], Any] | None) -> np.ndarray:
    """The observable as a vector."""
    values = net.weights if observable is None else observable(net)
    parts = values if isinstance(values, list | tuple) else [values]
    return np.concatenate([np.ravel(np.asarray(part)) for part in parts])


def _slope(coarse: float, fine: float, h: float, smaller: float) -> float:
    if coarse == 0.0 or fine == 0.0:
        return math.inf if fine == 0.0 and coarse > 0.0 else math.nan
    return math.log(coarse / fine) / math.log(h / smaller)
