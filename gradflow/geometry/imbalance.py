"""Layer imbalance: what gradient flow conserves and noise destroys."""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.compiled import compiled
from gradflow.backend.products import product
from gradflow.backend.types import Scalar, Weights
from gradflow.geometry.base import check_network
from gradflow.network import DeepLinear


def balancedness(net: DeepLinear) -> list[Float[Array, "_ _"]]:
    r"""The matrices $G_i = W_{i+1}^\top W_{i+1} - W_i W_i^\top$, $i = 1..N-1$, each `(d_i, d_i)`.

    Gradient flow of any loss of the end-to-end matrix conserves every $G_i$; $\mathrm{tr}\, G_i =
    |W_{i+1}|^2 - |W_i|^2$ (Arora, Cohen, Hazan 2018; Du, Hu, Lee 2018). Empty at depth 1.
    """
    check_network(net)
    return gram_differences(net.weights)


def squared_norms(net: DeepLinear) -> Float[Array, " depth"]:
    r"""The squared Frobenius norms $(|W_1|^2, ..., |W_N|^2)$, `(N,)`."""
    check_network(net)
    return _squared_norms(net.weights)


def imbalance(net: DeepLinear) -> Scalar:
    r"""The layer imbalance $D(W) = \max_{ij} |\,|W_i|^2 - |W_j|^2\,|$ (Ginsburg 2020).

    In units of squared weights; 0 at depth 1.
    """
    check_network(net)
    return _imbalance(net.weights)


def gram_differences(layers: Weights) -> list[Float[Array, "_ _"]]:
    r"""$V_{i+1}^\top V_{i+1} - V_i V_i^\top$ for layer-shaped arrays $V$: weights or gradients.

    With gradients $g$, $h^2$ times this is the change of $G_i$ in one step of gradient descent.
    """
    return [
        product(above, above, (0, 0)) - product(below, below, (1, 1))
        for below, above in itertools.pairwise(layers)
    ]


@compiled
def _squared_norms(weights: Weights) -> Float[Array, " depth"]:
    return jnp.stack([jnp.sum(w * w) for w in weights])


@compiled
def _imbalance(weights: Weights) -> Scalar:
    norms = _squared_norms(weights)
    return jnp.max(norms) - jnp.min(norms)
