"""Whether training settles: the edge of stability at the start and the minimum that is reached."""

import jax.numpy as jnp
import numpy as np

from gradflow.backend.types import Scalar
from gradflow.data import Regression
from gradflow.dynamics.base import AbstractDynamics
from gradflow.geometry.curvature import sharpness, smallest_positive
from gradflow.geometry.imbalance import imbalance
from gradflow.network import DeepLinear
from gradflow.problem import Problem


def beyond_the_edge(
    problem: Problem, net: DeepLinear, training: AbstractDynamics, reached: float
) -> str:
    """What to know of a start at which descent is not stable; empty for one at which it is.

    **Arguments:** `reached`: the imbalance where descent settles.
    """
    moments = Regression.from_moments(problem.input_moment, problem.data.syx, problem.data.syy)
    top = float(training.step_size) * float(sharpness(net, moments))
    edge = edge_of_stability(training.update_rule.momentum)
    if top <= edge:
        return ""
    return (
        f"the start is beyond the edge of stability (h lambda_max = {top:.4g}, edge at {edge:g}): "
        f"descent moves D from {float(imbalance(net)):.4g} to {reached:.4g} before it settles, and "
        "where a noisy run lands scatters"
    )


def unstable(
    step_size: float, momentum: Scalar | None, spectrum: np.ndarray, largest: float
) -> str:
    """Why training does not stay at a minimum, and with which step size it would.

    **Arguments:** `spectrum`: of the Hessian there; `largest`: the largest stable step size.
    """
    if step_size == 0.0:
        return "training does not settle at the minimum reached"
    top, edge = step_size * float(spectrum[-1]), edge_of_stability(momentum)
    where = f"at the minimum reached h lambda_max = {top:.4g}"
    if top >= edge:
        return (
            f"{where} is beyond the edge of stability at {edge:g}: training does not settle there, "
            f"and the theory ends. The largest stable step size at this minimum is {largest:.4g}"
        )
    return (
        f"{where} is below the edge of stability at {edge:g}, but the noise grows with the "
        "fluctuation that it makes: SGD is unstable in mean square, and the theory ends. The "
        f"largest stable step size at this minimum is {largest:.4g}"
    )


def optimization_rate(spectrum: np.ndarray, training: AbstractDynamics | None) -> float:
    """Slowest decay rate of the residual at a minimum with this Hessian spectrum."""
    slowest = float(smallest_positive(jnp.asarray(spectrum)))
    if training is None:
        return slowest
    h = float(training.step_size)
    modes = spectrum[spectrum >= slowest]
    momentum = training.update_rule.momentum
    if momentum is None:
        factors = np.abs(1.0 - h * modes)
    else:
        beta = float(momentum)
        companions = np.array([[[1 + beta - h * m, -beta], [1.0, 0.0]] for m in modes])
        factors = np.abs(np.linalg.eigvals(companions)).max(axis=1)
    with np.errstate(divide="ignore"):
        return float(-np.log(factors.max()) / h)


def edge_of_stability(momentum: Scalar | None) -> float:
    r"""The $h \lambda$ from which on descent is unstable, $2 (1 + \beta)$."""
    return 2.0 if momentum is None else 2.0 * (1.0 + float(momentum))
