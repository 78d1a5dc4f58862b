"""Whether training settles: the edge of stability at the start and the minimum that is reached."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from gradflow.data import Regression
from gradflow.dynamics import GradientDescent, SlowFlow
from gradflow.geometry.curvature import sharpness, smallest_positive
from gradflow.geometry.imbalance import imbalance
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.types import Scalar, Weights

RESOLVED = 1e-5
"""Relative accuracy of the largest stable step size."""

HALVINGS = 60
"""Most halvings of a step size in the search for a stable one."""


def beyond_the_edge(
    problem: Problem, net: DeepLinear, training: GradientDescent, reached: float
) -> str:
    """What to know of a start at which descent is not stable; empty for one at which it is.

    **Arguments:** `reached`: the imbalance where descent settles.
    """
    moments = Regression.from_moments(problem.input_moment, problem.data.syx, problem.data.syy)
    top = float(training.step_size) * float(sharpness(net, moments))
    edge = edge_of_stability(training.momentum)
    if top <= edge:
        return ""
    return (
        f"the start is beyond the edge of stability (h lambda_max = {top:.4g}, edge at {edge:g}): "
        f"descent moves D from {float(imbalance(net)):.4g} to {reached:.4g} before it settles, and "
        "where a noisy run lands scatters"
    )


def unstable(
    problem: Problem, minimum: DeepLinear, spectrum: np.ndarray, flow: SlowFlow | None
) -> str:
    """Why training does not stay at a minimum, and with which step size it would.

    **Arguments:** `spectrum`: of the Hessian there; `flow`: the slow flow of the training.
    """
    if flow is None:
        return "training does not settle at the minimum reached"
    h, edge = float(flow.step_size), edge_of_stability(flow.momentum)
    top = h * float(spectrum[-1])
    where = f"at the minimum reached h lambda_max = {top:.4g}"
    if top >= edge:
        return (
            f"{where} is beyond the edge of stability at {edge:g}: training does not settle there, "
            f"and the theory ends. The largest stable step size at this minimum is "
            f"{h * edge / top:.4g}"
        )
    largest = _largest_stable_step(flow, problem, minimum.weights)
    return (
        f"{where} is below the edge of stability at {edge:g}, but the noise grows with the "
        "fluctuation that it makes: SGD is unstable in mean square, and the theory ends. The "
        f"largest stable step size at this minimum is {largest:.4g}"
    )


def optimization_rate(spectrum: np.ndarray, training: GradientDescent | None) -> float:
    """Slowest decay rate of the residual at a minimum with this Hessian spectrum."""
    slowest = float(smallest_positive(jnp.asarray(spectrum)))
    if training is None:
        return slowest
    h = float(training.step_size)
    modes = spectrum[spectrum >= slowest]
    if training.momentum is None:
        factors = np.abs(1.0 - h * modes)
    else:
        beta = float(training.momentum)
        companions = np.array([[[1 + beta - h * m, -beta], [1.0, 0.0]] for m in modes])
        factors = np.abs(np.linalg.eigvals(companions)).max(axis=1)
    with np.errstate(divide="ignore"):
        return float(-np.log(factors.max()) / h)


def edge_of_stability(momentum: Scalar | None) -> float:
    r"""The $h \lambda$ from which on descent is unstable, $2 (1 + \beta)$."""
    return 2.0 if momentum is None else 2.0 * (1.0 + float(momentum))


def _largest_stable_step(flow: SlowFlow, problem: Problem, weights: Weights) -> float:
    """The step size, below the unstable one of a slow flow, up to which it has a velocity."""
    low, high = 0.0, float(flow.step_size)
    for _ in range(HALVINGS):
        if high - low <= RESOLVED * high:
            break
        middle = 0.5 * (low + high)
        stable = bool(_is_stable(flow, problem, weights, jnp.asarray(middle)))
        low, high = (middle, high) if stable else (low, middle)
    return low


@eqx.filter_jit
def _is_stable(
    flow: SlowFlow, problem: Problem, weights: Weights, step_size: Scalar
) -> Bool[Array, ""]:
    at = eqx.tree_at(lambda f: f.step_size, flow, step_size)
    return jnp.all(jnp.isfinite(jnp.stack([jnp.sum(v) for v in at.velocity(problem, weights)])))
