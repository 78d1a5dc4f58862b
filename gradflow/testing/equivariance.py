"""Do loss, gradient and dynamics follow a change of network and data?"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import equinox as eqx
import numpy as np
from jaxtyping import PRNGKeyArray

from gradflow.data import Regression
from gradflow.dynamics.base import AbstractDynamics
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.testing.running import (
    MARGIN,
    Layers,
    checked_problem,
    entry_name,
    layers_of,
    rounding,
    run_dynamics,
)
from gradflow.testing.showing import message, show_network, show_problem, show_subject
from gradflow.testing.transformations import Transformation, transformation as named

Returns: TypeAlias = Literal["loss", "gradient", "weights"]

Subject: TypeAlias = AbstractDynamics | Callable[[DeepLinear, Any], Any]
"""A dynamics, or a function of network and data (or problem)."""

FLOW_MARGIN = 10.0
"""Two runs of one flow differ by up to this much more than one of them drifts."""


def assert_equivariant(
    subject: Subject,
    transformation: str | Transformation,
    net: DeepLinear,
    data: Regression | Problem,
    *,
    returns: Returns | None = None,
    t1: float | None = None,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
    key: PRNGKeyArray | None = None,
) -> None:
    r"""Assert that a loss, a gradient or a dynamics follows a transformation of network and data.

    A loss must stay (or be multiplied by the transformation's factor), a gradient must change as
    the chain rule says, and training from the changed network must be the change of the training.

    **Arguments:**

    - `subject`: a function of (network, data) that gives a number (a loss), the gradient of every
        layer, or (`returns="weights"`) the layers after some training; or a dynamics, which is run
        to flow time `t1`.
    - `transformation`: a name (see `transformation`), or a `Transformation` of your own.
    - `data`: a `Regression`; or a `Problem`, which then is what a function is called with.
    - `returns`: what a function gives; by default `"loss"` for a number and `"gradient"` for
        layers.
    - `seed`: of the random matrices of a named transformation.
    - `rtol`, `atol`: allowed error relative to $1 + $ the largest squared norm among weights,
        gradients and moments, and absolute. By default rounding ($10^{-12}$ relative in double
        precision), for a dynamics with tolerances a hundred times its own.
    - `key`: for a dynamics that is random on this problem; only transformations that leave the data
        alone can then be followed path by path.

    **Raises:** `AssertionError` that shows the worst entry, what was observed and expected, the
    network and the data; `ValueError` if training does not follow the transformation at all.
    """
    regression = data.data if isinstance(data, Problem) else data
    change = (
        named(transformation, net, regression, seed)
        if isinstance(transformation, str)
        else transformation
    )
    layers = layers_of(net, "net")
    moved = DeepLinear(change.layers(layers))
    moved_data = change.data(regression)
    if isinstance(subject, AbstractDynamics):
        problem = data if isinstance(data, Problem) else Problem(data)
        _check_dynamics(subject, problem, change, moved_data is not regression, t1)
        moved_problem = Problem(moved_data, problem.regularizers)
        before, after = _trained(subject, problem, net, moved_problem, moved, change, t1, key)
        kind: Returns = "weights"
    else:
        moved_argument = (
            Problem(moved_data, data.regularizers) if isinstance(data, Problem) else moved_data
        )
        before, after = subject(net, data), subject(moved, moved_argument)
        kind = _kind(before, returns)
    expected, observed, names = _compared(kind, change, before, after, show_subject(subject))
    moments = [regression.sxx, regression.syy, moved_data.sxx, moved_data.syy]
    size = 1.0 + max(
        float(np.sum(np.square(a)))
        for a in (*layers, *moved.weights, *moments, *expected, *observed)
        if a is not None
    )
    solver = getattr(subject, "rtol", None) if isinstance(subject, AbstractDynamics) else None
    default = max(rounding(o) for o in observed)
    if solver is not None:
        default = max(default, FLOW_MARGIN * MARGIN * float(solver))
    allowed = (0.0 if atol is None else atol) + (default if rtol is None else rtol) * size
    worst = _worst(expected, observed, names)
    if worst is None or worst[0] <= allowed:
        return
    error, name, wanted, found = worst
    raise AssertionError(
        message(
            f"{show_subject(subject)} does not follow {change.name}: {name} is off.",
            f"  expected {wanted:.12g}",
            f"  observed {found:.12g}",
            f"  off by   {error:.3g}, allowed {allowed:.3g}",
            show_network(net),
            f"changed {show_network(moved)}",
            show_problem(data),
        )
    )


def _kind(value: Any, returns: Returns | None) -> Returns:
    scalar = not isinstance(value, DeepLinear | Sequence) and np.ndim(value) == 0
    if returns is None:
        return "loss" if scalar else "gradient"
    if scalar != (returns == "loss"):
        found = "a number" if scalar else "layers"
        raise TypeError(f"returns={returns!r}, but the function gave {found}.")
    return returns


def _compared(
    kind: Returns, change: Transformation, before: Any, after: Any, source: str
) -> tuple[Sequence[np.ndarray | None], Layers, list[str]]:
    """What is expected, what was found, and what it is called."""
    if kind == "loss":
        expected = np.asarray(np.asarray(before) * change.loss_factor)
        return [expected], [np.asarray(after)], ["the loss"]
    wanted = change.gradient if kind == "gradient" else change.layers
    expected, observed = wanted(layers_of(before, source)), layers_of(after, source)
    if [None if e is None else e.shape for e in expected] != [
        None if e is None else o.shape for e, o in zip(expected, observed, strict=False)
    ]:
        raise AssertionError(
            f"{source} gives layers of shapes {[o.shape for o in observed]} at the changed network,"
            f" but {[None if e is None else e.shape for e in expected]} follow from {change.name}."
        )
    symbol = "g" if kind == "gradient" else "W"
    return expected, observed, [f"{symbol}_{i}" for i in range(1, len(observed) + 1)]


def _worst(
    expected: Sequence[np.ndarray | None], observed: Layers, names: list[str]
) -> tuple[float, str, float, float] | None:
    """Error, name, expected and observed value of the worst entry."""
    worst: tuple[float, str, float, float] | None = None
    for wanted, found, name in zip(expected, observed, names, strict=True):
        if wanted is None:
            continue
        error = np.abs(found - wanted)
        error = np.where(np.isnan(error), np.inf, error)
        at = np.unravel_index(int(np.argmax(error)), error.shape)
        if worst is None or error[at] > worst[0]:
            label = entry_name(name, at)
            worst = (float(error[at]), label, float(wanted[at]), float(found[at]))
    return worst


def _check_dynamics(
    dynamics: AbstractDynamics,
    problem: Problem,
    change: Transformation,
    changes_data: bool,
    t1: float | None,
) -> None:
    if t1 is None:
        raise ValueError("t1: a dynamics is run to a flow time; give t1=.")
    if change.clock is None:
        raise ValueError(
            f"transformation: training does not follow {change.name!r}, only loss and gradient do; "
            "test gradflow.loss or gradflow.gradient under it."
        )
    if changes_data and dynamics.is_random(problem):
        raise ValueError(
            f"transformation: {change.name!r} changes the data, but the noise of a path does not "
            "change along; test it with assert_matches_in_distribution."
        )


def _trained(
    dynamics: AbstractDynamics,
    problem: Problem,
    net: DeepLinear,
    moved_problem: Problem,
    moved: DeepLinear,
    change: Transformation,
    t1: float | None,
    key: PRNGKeyArray | None,
) -> tuple[Layers, Layers]:
    """The layers at the end of training from the network, and from the changed one."""
    assert t1 is not None and change.clock is not None
    checked_problem(problem, type(dynamics).__name__)
    other = dynamics
    if change.clock != 1.0 and dynamics.step_size is not None:
        other = eqx.tree_at(lambda d: d.step_size, dynamics, dynamics.step_size * change.clock)
    ends = [
        run_dynamics(dynamics, problem, net, t1, 2, key)[1],
        run_dynamics(other, moved_problem, moved, t1 * change.clock, 2, key)[1],
    ]
    return [w[-1] for w in ends[0]], [w[-1] for w in ends[1]]
