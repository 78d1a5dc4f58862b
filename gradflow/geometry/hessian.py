r"""The Hessian of the averaged loss as a linear operator on the weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from gradflow.backend.types import EndToEnd, Weights
from gradflow.data import Regression
from gradflow.geometry.base import as_problem
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.regularizers.averaged import averaged_gradient
from gradflow.regularizers.base import AbstractPenalty


def hessian(net: DeepLinear, data: Regression | Problem) -> lx.AbstractLinearOperator:
    r"""The Hessian of the loss as a symmetric linear operator on the layers.

    `hessian(net, data).mv(V)` is `hessian_vector_product(net, data, V)` for a tuple $V$ of layers,
    with everything that does not depend on $V$ computed once; `.as_matrix()` is the dense matrix,
    rows in the order of the layers. For a `Problem` it is the Hessian of `problem.averaged_loss`,
    penalties and noise included.

    **Arguments:**

    - `net`: the network at which the Hessian is taken.
    - `data`: a `Regression`, or a `Problem`.

    **Returns:** a `lineax.FunctionLinearOperator` tagged as symmetric.

    **Raises:** `ValueError` if the widths of network and data differ.
    """
    problem = as_problem(net, data)
    structure = jax.eval_shape(lambda: net.weights)
    product = _linear_map(problem, net.weights)
    return lx.FunctionLinearOperator(product, structure, lx.symmetric_tag)


def hessian_vector_product(
    net: DeepLinear, data: Regression | Problem, direction: Weights
) -> Weights:
    r"""The product $H V$ of the Hessian of the loss with a change $V$ of the weights.

    $$(H V)_i = A_i^\top\, dP\, S\, B_i^\top + dA_i^\top M B_i^\top + A_i^\top M\, dB_i^\top,$$

    with $M = P S - Y$ and the changes $dA_i$, $dB_i$, $dP$ of the products under $V$
    (docs/theory.md
    section 1). For a `Problem` the noise on the inputs is part of $S$ and penalties are added;
    noise inside the network has no such form and is differentiated automatically, exactly.

    **Arguments:**

    - `net`, `data`: as in `hessian`.
    - `direction`: $V$, one array a layer, $V_i$ of the shape of $W_i$.

    **Returns:** $H V$, one array a layer.

    **Raises:** `ValueError` if the widths of network and data differ.
    """
    return _linear_map(as_problem(net, data), net.weights)(direction)


def flat_hessian(
    net: DeepLinear, data: Regression | Problem
) -> Callable[[Float[Array, " parameters"]], Float[Array, " parameters"]]:
    r"""`hessian` as a function on the weights laid out in one vector, layer by layer."""
    operator = hessian(net, data)
    unravel = ravel_pytree(net.weights)[1]

    def product(vector: Float[Array, " parameters"]) -> Float[Array, " parameters"]:
        return ravel_pytree(operator.mv(unravel(vector)))[0]

    return product


def dense_hessian(
    net: DeepLinear, data: Regression | Problem
) -> Float[Array, "parameters parameters"]:
    """The Hessian as a symmetric matrix, rows in the order of the layers."""
    product = flat_hessian(net, data)
    unit = jnp.eye(net.num_parameters, dtype=net.weights[0].dtype)
    matrix = jax.vmap(product)(unit)
    return 0.5 * (matrix + matrix.T)


def _linear_map(problem: Problem, weights: Weights) -> Callable[[Weights], Weights]:
    r"""$V \mapsto H V$, with what does not depend on $V$ computed once."""
    if problem.layer_noise:
        gradient = jax.linearize(
            lambda w: averaged_gradient(w, problem.data, problem.regularizers, penalties=False),
            weights,
        )[1]
    else:
        gradient = _moment_product(weights, problem.input_moment, problem.data.syx)
    penalties = [_penalty_product(penalty, weights) for penalty in problem.penalties]

    def product(direction: Weights) -> Weights:
        total = gradient(direction)
        for penalty in penalties:
            total = tuple(t + p for t, p in zip(total, penalty(direction), strict=True))
        return total

    return product


def _penalty_product(penalty: AbstractPenalty, weights: Weights) -> Callable[[Weights], Weights]:
    """The Hessian of one penalty; linear in the weights' change, so exact."""
    return jax.linearize(penalty.penalty_gradient, weights)[1]


def _moment_product(
    weights: Weights, s: Float[Array, "d_in d_in"], y: EndToEnd
) -> Callable[[Weights], Weights]:
    r"""The Hessian of $\tfrac12 \mathrm{tr}(P S P^\top) - \langle P, Y \rangle$.

    The layers are passed upwards for $B_i$ and $dB_i$, then downwards for $A_i^\top M$ and
    $d(A_i^\top M)$; identities are never multiplied.
    """
    rights = [weights[0]]  # B_2, ..., B_{N+1} = P
    for w in weights[1:]:
        rights.append(w @ rights[-1])
    lefts = [rights[-1] @ s - y]  # A_N^T M, ..., A_1^T M
    for w in reversed(weights[1:]):
        lefts.append(w.T @ lefts[-1])
    lefts.reverse()

    def product(direction: Weights) -> Weights:
        changes = [direction[0]]
        for w, v, below in zip(weights[1:], direction[1:], rights[:-1], strict=True):
            changes.append(v @ below + w @ changes[-1])
        falling = changes[-1] @ s
        result = []
        for i in range(len(weights) - 1, 0, -1):
            result.append(falling @ rights[i - 1].T + lefts[i] @ changes[i - 1].T)
            falling = direction[i].T @ lefts[i] + weights[i].T @ falling
        result.append(falling)
        return tuple(reversed(result))

    return product
