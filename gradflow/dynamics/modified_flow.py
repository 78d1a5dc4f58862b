"""The modified flow of gradient descent: backward error analysis."""

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.checks import checked_step_size
from gradflow.dynamics.base import DYNAMICS
from gradflow.dynamics.ode import AbstractOdeFlow, checked_tolerances, chosen_solver
from gradflow.loss import pull_back
from gradflow.network import end_to_end
from gradflow.problem import Problem
from gradflow.regularizers.averaged import averaged_gradient
from gradflow.regularizers.minibatch import Minibatch
from gradflow.theory.drift import flow_imbalance_drift

ROWS_AT_ONCE = 64
"""Rows of the data whose gradients are formed together where noise acts inside the network."""


@DYNAMICS.register
class ModifiedFlow(AbstractOdeFlow):
    r"""The ODE that gradient descent with step $h$ follows to higher order in $h$.

    $$\dot W = -\nabla \bar L - \tfrac h2 H \nabla \bar L
      - h^2 \left( \tfrac13 H^2 \nabla \bar L
      + \tfrac1{12} D^3 \bar L[\nabla \bar L, \nabla \bar L] \right)$$

    with the averaged loss $\bar L$ of the problem, penalties included, and its Hessian $H$. Order 2
    stops after the term in $h$, where the flow is that of $\bar L + \tfrac h4 |\nabla \bar L|^2$
    and changes the balancedness by
    $\dot G_i = h (\bar g_{i+1}^\top \bar g_{i+1} - \bar g_i \bar g_i^\top)$ exactly (where there is
    no penalty). At a fixed flow time it is a distance $O(h^2)$ from gradient descent (order 3:
    $O(h^3)$), where gradient flow is $O(h)$ away. The derivatives are products with vectors: no
    Hessian is formed.

    On a problem with noise that is fresh at every step this is the drift of the order-2 stochastic
    modified equation. With `Minibatch(reshuffled=True)` every row is visited once an epoch, and
    order 2 is the mean over an epoch of $m$ steps from given weights,

    $$\dot W = -\nabla \left( \bar L + \tfrac h4 \left( |\nabla \bar L|^2
      + \tfrac{m - 1}{n - 1} \mathrm{tr}\,\mathrm{Cov}_k[g_k] \right) \right)$$

    with the $n$ gradients $g_k$ of single rows: $|\nabla\bar L|^2$ becomes the mean square of the
    minibatch gradient when the batch size divides $n$.

    **Arguments:**

    - `step_size`: $h > 0$ of the training that it describes.
    - `order`: 2 or 3.
    - `rtol`, `atol`, `solver`, `stiff`: as in `GradientFlow`.

    Sources: Barrett & Dherin 2021; Smith, Dherin, Barrett & De 2021 (epochs); Hairer, Lubich &
    Wanner, *Geometric Numerical Integration*, IX.1 (order 3).
    """

    step_size: Scalar
    order: int = eqx.field(static=True)
    rtol: Scalar
    atol: Scalar
    solver: diffrax.AbstractSolver
    stiff: bool = eqx.field(static=True)

    def __init__(
        self,
        step_size: ArrayLike,
        order: int = 2,
        rtol: ArrayLike = 1e-8,
        atol: ArrayLike = 1e-10,
        solver: diffrax.AbstractSolver | None = None,
        stiff: bool = False,
    ):
        self.step_size = checked_step_size("ModifiedFlow", step_size)
        if order not in (2, 3) or isinstance(order, bool):
            raise ValueError(
                f"ModifiedFlow.order must be 2 or 3; got {order!r}. Order 1 is GradientFlow."
            )
        self.order = int(order)
        self.rtol, self.atol = checked_tolerances("ModifiedFlow", rtol, atol)
        self.solver = chosen_solver("ModifiedFlow", solver, stiff)
        self.stiff = stiff

    @property
    def has_default_solver(self) -> bool:
        """Whether it is the explicit one, named or not."""
        return isinstance(self.solver, diffrax.Dopri8)

    def imbalance_drift(self, problem: Problem, weights: Weights) -> Scalar:
        """That of its field."""
        velocity = modified_drift(problem, weights, self.step_size, self.order)
        return flow_imbalance_drift(weights, velocity)

    def check(self, problem: Problem, weights: Weights) -> None:
        """Raise a `ValueError` for order 3 with batches that visit every row once an epoch."""
        if self.order > 2 and is_reshuffled(problem):
            raise ValueError(
                f"ModifiedFlow.order={self.order}: the mean motion under Minibatch(reshuffled="
                "True) is known to order 2 only; use order=2, or reshuffled=False."
            )

    def auxiliary(self, problem: Problem, weights: Weights) -> tuple[Weights, ...]:
        """None."""
        return ()

    def field(self, t: Any, state: tuple[Weights, ...], problem: Problem) -> tuple[Weights, ...]:
        """The drift of backward error analysis."""
        del t
        return (modified_drift(problem, state[0], self.step_size, self.order),)


def is_reshuffled(problem: Problem) -> bool:
    """Whether the batches of a problem go through a permutation of the rows every epoch."""
    rule = problem.minibatch
    return isinstance(rule, Minibatch) and rule.reshuffled


def modified_drift(problem: Problem, weights: Weights, step_size: Scalar, order: int) -> Weights:
    r"""The drift $-g$ of order 1 and its corrections up to `order` (1, 2 or 3) at the weights.

    $$-g - \tfrac h2 H g - h^2 \left(\tfrac13 H^2 g + \tfrac1{12} D^3 \bar L[g, g]\right),
      \qquad g = \nabla \bar L(W),$$

    and for batches that are reshuffled every epoch the correction for their correlation.
    """
    h = step_size

    def hessian_times(at: Weights, direction: Weights) -> Weights:
        return jax.jvp(problem.averaged_gradient, (at,), (direction,))[1]

    g = problem.averaged_gradient(weights)
    if order == 1:
        return tuple(-a for a in g)
    if order == 2:
        hg = hessian_times(weights, g)
        drift = tuple(-a - 0.5 * h * b for a, b in zip(g, hg, strict=True))
    else:
        hg, third = jax.jvp(lambda at: hessian_times(at, g), (weights,), (g,))
        hhg = hessian_times(weights, hg)
        drift = tuple(
            -a - 0.5 * h * b - h**2 * (c / 3.0 + d / 12.0)
            for a, b, c, d in zip(g, hg, hhg, third, strict=True)
        )
    if is_reshuffled(problem):
        spread = jax.grad(_row_spread)(weights, problem)
        drift = tuple(d - 0.25 * h * s for d, s in zip(drift, spread, strict=True))
    return drift


def _row_spread(weights: Weights, problem: Problem) -> Scalar:
    r"""$\tfrac{m - 1}{n - 1} \mathrm{tr}\,\mathrm{Cov}_k[g_k]$ over the rows, $m$ steps an epoch.

    In an epoch the mean of $H_j g_k$ over $j \ne k$ is $H g - C/(n - 1)$, with
    $C = E_k[H_k g_k] - H g = \tfrac12 \nabla \mathrm{tr}\,\mathrm{Cov}_k[g_k]$; of the
    $m (m - 1)/2$ ordered pairs of steps each contributes $h^2$ times that.
    """
    x, y = problem.data.x, problem.data.y
    rule = problem.minibatch
    if x is None or y is None or rule is None:
        raise ValueError("data: reshuffled batches need a finite sample.")
    n = x.shape[0]
    share = (n // rule.size() - 1) / max(n - 1, 1)
    if problem.layer_noise:
        return share * _spread_of_layers(weights, problem, x, y)
    return share * _spread_of_products(weights, x, y)


def _spread_of_products(
    weights: Weights, x: Float[Array, "n d_in"], y: Float[Array, "n d_out"]
) -> Scalar:
    r"""$\sum_i E_k |A_i^\top e_k|^2 |B_i x_k|^2 - |A_i^\top M B_i^\top|^2$.

    No row's gradient is formed. Noise on inputs and penalties add the same to every row and drop
    out.
    """
    n = x.shape[0]
    errors = x @ end_to_end(weights).T - y
    mean: EndToEnd = errors.T @ x / n
    above = [jnp.sum(errors**2, axis=1)]  # |A_i^T e_k|^2, last layer first
    carried = errors
    for w in reversed(weights[1:]):
        carried = carried @ w
        above.append(jnp.sum(carried**2, axis=1))
    total = -sum((jnp.sum(g * g) for g in pull_back(weights, mean)), start=jnp.zeros(()))
    features = x
    for w, a in zip(weights, reversed(above), strict=True):
        total = total + jnp.mean(a * jnp.sum(features**2, axis=1))
        features = features @ w.T
    return total


def _spread_of_layers(
    weights: Weights, problem: Problem, x: Float[Array, "n d_in"], y: Float[Array, "n d_out"]
) -> Scalar:
    """The same with noise inside the network, from the averaged gradient of every row."""

    def of_row(row: tuple[Array, Array]) -> tuple[Scalar, Weights]:
        sxx, syx = (jnp.outer(a, b) for a, b in ((row[0], row[0]), (row[1], row[0])))
        alone = dataclasses.replace(problem.data, sxx=sxx, syx=syx, is_white=False)
        g = averaged_gradient(weights, alone, problem.regularizers, penalties=False)
        return sum((jnp.sum(v * v) for v in g), start=jnp.zeros(())), g

    squares, gradients = jax.lax.map(of_row, (x, y), batch_size=ROWS_AT_ONCE)
    means = [jnp.mean(g, axis=0) for g in gradients]
    return jnp.mean(squares) - sum((jnp.sum(g * g) for g in means), start=jnp.zeros(()))
