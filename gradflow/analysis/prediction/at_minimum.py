"""The formulas of a prediction at the minimum reached, compiled."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gradflow.backend.compiled import compiled
from gradflow.backend.types import Scalar, Weights
from gradflow.dynamics import SlowFlow
from gradflow.geometry.base import output_loss
from gradflow.geometry.curvature import kernel_of_root
from gradflow.geometry.manifold import is_on_manifold, retract
from gradflow.loss import push_forward
from gradflow.problem import Problem
from gradflow.regularizers.averaged import averaged_gradient
from gradflow.theory.drift import flow_imbalance_drift
from gradflow.theory.end_point import driving_force
from gradflow.theory.slow_drift import slow_drift
from gradflow.theory.slow_noise import NEGLIGIBLE
from gradflow.theory.spread import fluctuation_share, is_skewed
from gradflow.theory.stationary import largest_step_size, stationary_covariance


@compiled
def landed(weights: Weights, problem: Problem) -> Weights:
    """The minimum to rounding, where a converged run is close to one."""
    loss = output_loss(problem)
    on = retract(weights, loss)
    return jax.tree.map(lambda a, b: jnp.where(is_on_manifold(on, loss), a, b), on, weights)


class AtMinimum(eqx.Module):
    """What the formulas say at a minimum.

    - `residual`, `plateau`: $|M|$ and the excess loss to which penalties and noise inside the
        network pull; `noise_floor`: the excess loss that noise keeps up.
    - `relative_error`: `fluctuation_share`, or its root where the noise is skewed.
    - `drift`: $dD/dt$ of the slow flow; `force`: what drives it.
    - `largest_step_size`: below which training is stable in mean square; NaN for a flow.
    """

    residual: Scalar
    plateau: Scalar
    noise_floor: Scalar
    relative_error: Scalar
    drift: Scalar
    force: Scalar
    largest_step_size: Scalar


@compiled
def at_minimum(
    problem: Problem,
    weights: Weights,
    flow: SlowFlow | None,
    law: dict[str, Any],
    fluctuates: bool,
) -> AtMinimum:
    """The formulas of one theory.

    **Arguments:**

    - `flow`: its slow flow; None for gradient flow.
    - `law`: options of `stationary_covariance`; `fluctuates`: whether noise acts.
    """
    if flow is None:
        velocity = slow_drift(problem, weights, 0.0, finite_step=False)
        drift = flow_imbalance_drift(weights, velocity)
    else:
        drift = flow.imbalance_drift(problem, weights)
    share = jnp.ones(())
    if flow is not None and flow.momentum is not None and flow.decay == "decoupled":
        share = 1.0 - flow.momentum
    floor = error = jnp.zeros(())
    largest = jnp.full((), jnp.nan)
    if flow is not None:
        largest = largest_step_size(problem, weights, **law)
    if flow is not None and fluctuates:
        h, beta = flow.step_size, flow.momentum
        floor = 0.5 * jnp.trace(stationary_covariance(problem, weights, h, **law))
        floor = jnp.where(floor <= NEGLIGIBLE * jnp.trace(problem.data.syy), 0.0, floor)
        error = fluctuation_share(problem, weights, h, beta, finite_step=flow.finite_step)
        error = jnp.sqrt(error) if is_skewed(problem) else error
    if flow is None:
        force = driving_force(problem, weights, 0.0, None, False)
    else:
        force = driving_force(problem, weights, flow.step_size, flow.momentum, flow.finite_step)
    return AtMinimum(*_plateau(problem, weights, share), floor, error, drift, force, largest)


def _plateau(problem: Problem, weights: Weights, share: Scalar) -> tuple[Scalar, Scalar]:
    r"""$|M|$ and the excess loss to which penalties and noise inside the network pull.

    At a minimum the data loss has no gradient, and $K x = -\tilde J\,(\nabla R + s \nabla L_2)$
    for $x = \mathrm{vec}(M S^{-1/2})$, where the penalties $L_2$ act with the share $s$ of the
    strength of the gradient (docs/theory.md section 4, for every regularizer).
    """
    loss = output_loss(problem)
    smooth = averaged_gradient(weights, problem.data, problem.regularizers, penalties=False)
    decayed = problem.add_penalties(jax.tree.map(jnp.zeros_like, weights), weights)
    pull = tuple(g + share * d for g, d in zip(smooth, decayed, strict=True))
    pulled = push_forward(weights, pull) @ loss.root
    inverse = jnp.linalg.pinv(kernel_of_root(weights, loss.root), hermitian=True)
    x = (inverse @ pulled.ravel()).reshape(pulled.shape)
    return jnp.linalg.norm(x @ loss.root), 0.5 * jnp.sum(x * x)
