"""What assertions are made about: dynamics, functions of time, and the layers they give."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from gradflow.dynamics.base import AbstractDynamics
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.simulation.divergence import no_diverged_warning
from gradflow.simulation.simulate import simulate
from gradflow.testing.showing import message, show_network, show_problem, show_subject

Layers: TypeAlias = list[np.ndarray]

FlowMap: TypeAlias = Callable[[Any, float], Any]
"""The user's own dynamics: (weights at time 0, t) -> weights at time t."""

ROUNDING = 4500
"""Machine epsilons that an algebraic identity may be off by: 1e-12 in double precision."""

MARGIN = 10.0
"""Error of a run over the relative tolerance of its solver (theory: property tests)."""

OWN_ACCURACY = 1e-8
"""Relative accuracy expected of the user's own functions unless they say otherwise."""


def layers_of(value: Any, source: str) -> Layers:
    """The layers of a network, or of a sequence of matrices.

    **Raises:** `TypeError` if it is neither.
    """
    if isinstance(value, DeepLinear):
        value = value.weights
    if isinstance(value, Sequence) and all(np.ndim(w) == 2 for w in value):
        return [np.asarray(w) for w in value]
    raise TypeError(
        f"{source} must give the layers (W_1, ..., W_N) as a sequence of matrices, or a "
        f"DeepLinear; got {type(value).__name__}."
    )


def checked_problem(problem: Any, needed_by: str) -> Problem:
    """A problem, as a dynamics needs it.

    **Raises:** `TypeError` if it is not one.
    """
    if not isinstance(problem, Problem):
        raise TypeError(
            f"problem: {needed_by} runs on a gradflow.Problem(data, regularizers); got "
            f"{type(problem).__name__}."
        )
    return problem


def run_dynamics(
    dynamics: AbstractDynamics,
    problem: Problem,
    net: DeepLinear,
    t1: float,
    points: int,
    key: PRNGKeyArray | None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Times `(T,)` and layers `(T, d_i, d_{i-1})` of one path.

    **Raises:** `AssertionError` that shows the network if the path diverges.
    """
    with no_diverged_warning():
        run = simulate(
            problem,
            net,
            dynamics,
            t1=t1,
            key=key,
            save=points,
            observables=[],
            store_weights=True,
            progress=False,
        )
    if run.diverged.any() or run.incomplete.any():
        ended, cure = "diverged", "use a smaller step size"
        if run.incomplete.any():
            ended, cure = "was given up", "see the warning of simulate, or make the run shorter"
        raise AssertionError(
            message(
                f"{show_subject(dynamics)} {ended} before t = {t1:g}; {cure}.",
                show_network(net),
                show_problem(problem),
            )
        )
    return run.time, list(run.weights)


def path(
    subject: AbstractDynamics | FlowMap,
    problem: Problem | None,
    net: DeepLinear,
    t1: float,
    points: int,
    key: PRNGKeyArray | None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Times `(T,)` and layers `(T, d_i, d_{i-1})` of a dynamics or of the user's own function."""
    if isinstance(subject, AbstractDynamics):
        needed = checked_problem(problem, type(subject).__name__)
        return run_dynamics(subject, needed, net, t1, points, key)
    times = np.linspace(0.0, t1, points)
    source = show_subject(subject)
    networks = [layers_of(net, "net")]
    networks += [layers_of(subject(net.weights, float(t)), source) for t in times[1:]]
    return times, [np.stack(layer) for layer in zip(*networks, strict=True)]


def accuracy(subject: Any) -> float:
    """The relative accuracy to expect: of the solver, of rounding, or of a user's function."""
    if not isinstance(subject, AbstractDynamics):
        return OWN_ACCURACY
    rtol = getattr(subject, "rtol", None)
    return rounding(np.zeros(0)) if rtol is None else MARGIN * float(rtol)


def rounding(array: np.ndarray) -> float:
    """`ROUNDING` machine epsilons of the array's type."""
    eps = np.finfo(array.dtype).eps if array.dtype.kind == "f" else np.finfo(float).eps
    return ROUNDING * float(eps)


def squared_norm(layers: Sequence[Any]) -> float:
    """The largest squared Frobenius norm of a layer (over leading axes too)."""
    return max((float(np.max(np.sum(np.square(w), axis=(-2, -1)))) for w in layers), default=0.0)


def key_of(seed: int) -> PRNGKeyArray:
    """The random key of a seed."""
    return jax.random.key(seed)


def entry_name(name: str, index: Sequence[Any]) -> str:
    """`W_1[0, 1]`; the name itself for a number."""
    return f"{name}[{', '.join(str(int(i)) for i in index)}]" if len(index) else name
