r"""The slow drift: how the regularization phase moves along the minima manifold.

Let $\Phi_h(W)$ be the minimum that noise-free training reaches from $W$. It does not change along
noise-free training, so its expected change in one step of training is made by the noise alone: the
second derivative of $\Phi_h$ averaged over the noise (Katzenberger 1991 and Li, Wang, Arora 2022
for $h \to 0$). Exact in the step size, leading order in the noise (docs/theory.md section 7b).
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, ArrayLike, Float

from gradflow.backend.types import Weights
from gradflow.geometry.base import OutputLoss, output_loss
from gradflow.geometry.kernel import kernel_at
from gradflow.geometry.manifold import tangent
from gradflow.loss import pull_back, push_forward
from gradflow.network import left_products, right_products
from gradflow.problem import Problem
from gradflow.regularizers.averaged import averaged_gradient
from gradflow.theory.layer_noise import layer_noise_cross
from gradflow.theory.normal_response import has_inner_noise, normal_response
from gradflow.theory.response import AbstractResponse
from gradflow.theory.stationary import Fluctuation, Law, training_law

Solve: TypeAlias = Callable[[Float[Array, " outputs"]], Float[Array, " outputs"]]


def slow_drift(
    problem: Problem,
    weights: Weights,
    step_size: ArrayLike,
    momentum: ArrayLike | None = None,
    *,
    finite_step: bool = True,
    decay: Literal["coupled", "decoupled"] = "coupled",
) -> Weights:
    r"""The expected velocity along the minima manifold, per unit of flow time $t = h k$.

    $$\dot W = -\frac{1}{1 - \beta} P_T \left( \nabla \bar L(W)
        + \tfrac12 D^3 L[\tilde J^\top K^{-1} X K^{-1} \tilde J] \right) + \dot W_\mathrm{mixed}$$

    with the projector $P_T$ on the tangent space, the averaged loss $\bar L$ (at a minimum only
    penalties and noise inside the network have a gradient), the Jacobian $\tilde J$ of
    $x = \mathrm{vec}(P S^{1/2})$, $K = \tilde J \tilde J^\top$ and the stationary fluctuation $X$
    of $x$ (`gradflow.theory.stationary`). $\dot W_\mathrm{mixed}$ comes from noise that moves the
    point along the manifold and out of it at once.

    For label noise on $n$ samples without momentum this is the projected gradient flow of
    $-\tfrac{s^2}{2 n} \sum_a \log(1 - h \mu_a / 2)$ over the nonzero eigenvalues of the Hessian,
    about $\tfrac{h s^2}{4 n} \mathrm{tr} H$ for small steps: a barrier at the edge of stability.

    **Arguments:**

    - `problem`: data and regularizers.
    - `weights`: layers `(d_i, d_{i-1})` of a minimum.
    - `step_size`: $h$ of the training.
    - `momentum`: its heavy-ball $\beta$; default 0.
    - `finite_step`: False takes $h \mu \to 0$, the classical limit.
    - `decay`: whether penalties are "coupled" to the momentum or "decoupled" from it.

    **Returns:** one array a layer, tangent to the manifold; NaN beyond the edge of stability.
    """
    law = training_law(step_size, finite_step, momentum)
    loss = output_loss(problem)
    response, state = normal_response(problem, weights, law, feedback=finite_step)
    force = bend(weights, response, loss)
    if state is not None and has_inner_noise(problem):
        mixed = layer_noise_cross(problem, weights, _mixed_response(state, law))
        force = _plus(force, mixed)
    if problem.layer_noise:
        plain = averaged_gradient(weights, problem.data, problem.regularizers, penalties=False)
        force = _plus(force, plain)
    decayed = problem.add_penalties(tuple(jnp.zeros_like(w) for w in weights), weights)
    pull = 1.0 if decay == "decoupled" else 1.0 / (1.0 - law.momentum)
    velocity = tuple(
        -f / (1.0 - law.momentum) - pull * d for f, d in zip(force, decayed, strict=True)
    )
    return _along_manifold(weights, velocity, loss, state)


def bend(weights: Weights, response: AbstractResponse, loss: OutputLoss) -> Weights:
    r"""$\sum_m D(\mathrm{pull\_back})[v_m;\, N_m]$: half of $D^3 L$ up to normal directions.

    For $\Psi = \sum_m \xi_m y_m^\top$ the weights move along
    $v_m = \tilde J^\top \xi_m = (A_i^\top \Xi_m S^{1/2} B_i^\top)_i$ while the end-to-end gradient
    is $N_m = \mathrm{mat}(y_m) S^{1/2}$. With $\Psi = K^{-1} X$ the tangential part is
    $\tfrac12 P_T D^3 L[\tilde J^\top K^{-1} X K^{-1} \tilde J]$: at a minimum $D^3 L$ is made of
    $\langle dP\, S, d^2 P \rangle$. The sums over $m$ contract $\Psi$ with a small matrix a layer,

    $$L_j = \sum_m \Xi_m^\top A_j A_j^\top Y_m, \qquad
      R_j = \sum_m Y_m S^{1/2} B_j^\top B_j S^{1/2}\, \Xi_m^\top.$$
    """
    lefts, rights = left_products(weights), right_products(weights)
    below = [b @ loss.root for b in rights]
    inner = [
        half @ response.over_outputs(a @ a.T) @ loss.root
        for a, half in zip(lefts, below, strict=True)
    ]  # B_j S^{1/2} L_j S^{1/2}
    outer = [
        response.over_inputs(half.T @ half) @ a for a, half in zip(lefts, below, strict=True)
    ]  # R_j A_j
    from_above: list[Array | None] = [None]  # sum over j > i of W_{i+1}^T ... W_{j-1}^T inner_j
    for w, term in zip(reversed(weights[1:]), reversed(inner[1:]), strict=True):
        carried = from_above[-1]
        from_above.append(term if carried is None else term + w.T @ carried)
    from_above.reverse()
    total, from_below = [], None  # sum over j < i of outer_j W_{j+1}^T ... W_{i-1}^T
    for i, w in enumerate(weights):
        g = jnp.zeros_like(w)
        if (above := from_above[i]) is not None:
            g = g + above @ rights[i].T
        if from_below is not None:
            g = g + lefts[i].T @ from_below
        total.append(g)
        from_below = outer[i] if from_below is None else outer[i] + from_below @ w.T
    return tuple(total)


def _along_manifold(
    weights: Weights, velocity: Weights, loss: OutputLoss, state: Fluctuation | None
) -> Weights:
    r"""$P_T V = V - \tilde J^\top K^+ \tilde J V$.

    With $K^+$ at hand or a Cholesky factor of a small $K$, faster than the eigendecomposition that
    `tangent` takes of it; taken twice, which removes what rounding leaves the first time.
    """
    kernel = kernel_at(weights, loss.root)
    if state is None and kernel.is_large:
        return tangent(weights, velocity, loss)
    solve = _cholesky_solve(kernel.matrix()) if state is None else state.solve
    for _ in range(2):
        moved = (push_forward(weights, velocity) @ loss.root).ravel()
        normal = pull_back(weights, solve(moved).reshape(loss.target.shape) @ loss.root)
        velocity = tuple(v - n for v, n in zip(velocity, normal, strict=True))
    return velocity


def _cholesky_solve(kernel: Float[Array, "outputs outputs"]) -> Solve:
    r"""$K^+$ on what $\tilde J$ reaches.

    $K$ is shifted by rounding errors, so that its null space, to which $\tilde J^\top$ is blind,
    does no harm.
    """
    shift = 10.0 * float(jnp.finfo(kernel.dtype).eps) * jnp.trace(kernel)
    root = jnp.linalg.cholesky(kernel + shift * jnp.eye(len(kernel), dtype=kernel.dtype))
    return lambda x: cho_solve((root, True), x)


def _mixed_response(state: Fluctuation, law: Law) -> Float[Array, "outputs outputs"]:
    r"""How long a kick of $x$ lasts while the same kick has moved the weights along the manifold.

    $\tfrac{h}{\mu}$ for plain training. With heavy ball the tangential shift builds up over
    $1/(1 - \beta)$ steps: $\tfrac{h^2}{1 - \beta} ( \tfrac{1}{h \mu}
    - \tfrac{\beta}{(1 - \beta)^2 (1 + \beta) + \beta h \mu} )$ in the frame of `slow_drift`, which
    divides by $1 - \beta$ once more.
    """
    h, beta = law.step_size, law.momentum
    lasting = h * state.inverse_values
    if law.discrete:
        rise = (1.0 - beta) ** 2 * (1.0 + beta) + beta * h * state.values
        lasting = lasting - h**2 * beta * state.moving / rise
    return state.of_kernel(lasting / (1.0 - beta))


def _plus(a: Weights, b: Weights) -> Weights:
    return tuple(x + y for x, y in zip(a, b, strict=True))
