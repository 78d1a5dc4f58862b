"""Deep linear networks and the products of their layers."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.backend.products import product
from gradflow.backend.tracing import as_floats, is_complex, is_traced
from gradflow.backend.types import EndToEnd, Weights


class DeepLinear(eqx.Module):
    r"""A deep linear network $f(x) = W_N \cdots W_1 x$.

    **Arguments:**

    - `weights`: the layers, first layer first, as arrays or nested lists; $W_i$ has shape
        `(d_i, d_{i-1})`. Any depth $N \ge 1$, any widths $\ge 1$.

    **Raises:** `ValueError` if there is no layer, a layer is not a matrix, neighbouring shapes do
    not match, or (for concrete arrays) an entry is not finite; `TypeError` for complex numbers.
    """

    weights: Weights

    def __init__(self, weights: Sequence[Any]):
        if len(weights) == 0:
            raise ValueError("weights: a network needs at least one layer; got an empty list.")
        layers = tuple(_as_layer(i, w) for i, w in enumerate(weights, start=1))
        for i, w in enumerate(layers, start=1):
            if w.ndim != 2:
                raise ValueError(
                    f"weights: W_{i} must be a matrix (d_{i}, d_{i - 1}); got shape {w.shape}."
                )
            if 0 in w.shape:
                raise ValueError(
                    f"weights: W_{i} has shape {w.shape}; every width must be at least 1."
                )
        for i, (below, above) in enumerate(itertools.pairwise(layers), start=1):
            if above.shape[1] != below.shape[0]:
                raise ValueError(
                    f"weights: W_{i + 1} of shape {above.shape} cannot follow W_{i} of shape "
                    f"{below.shape}; W_{i + 1} needs {below.shape[0]} columns (first layer first)."
                )
        for i, w in enumerate(layers, start=1):
            if not is_traced(w) and not np.all(np.isfinite(np.asarray(w))):
                raise ValueError(f"weights: W_{i} has entries that are not finite.")
        self.weights = layers

    @property
    def depth(self) -> int:
        """The number of layers $N$."""
        return len(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths $(d_0, ..., d_N)$, input first."""
        return (self.weights[0].shape[1], *(w.shape[0] for w in self.weights))

    @property
    def num_parameters(self) -> int:
        r"""The number of weights $\sum_i d_i d_{i-1}$."""
        return sum(w.size for w in self.weights)

    @property
    def end_to_end(self) -> EndToEnd:
        r"""The end-to-end matrix $P = W_N \cdots W_1$, `(d_N, d_0)`."""
        return end_to_end(self.weights)

    def __call__(self, x: Float[Array, "*batch d_0"]) -> Float[Array, "*batch d_N"]:
        """Evaluate the network on inputs along the last axis."""
        if x.shape[-1] != self.widths[0]:
            raise ValueError(
                f"x: the last axis must have length d_0 = {self.widths[0]}; got shape {x.shape}."
            )
        for w in self.weights:
            x = x @ w.T
        return x


def _as_layer(i: int, values: Any) -> Float[Array, "..."]:
    if np.ma.isMaskedArray(values):
        raise ValueError(
            f"weights: W_{i} is a masked array, whose mask would be lost; give a full matrix, such "
            "as values.filled(0.0)."
        )
    if is_complex(values):
        raise TypeError(
            f"weights: W_{i} must be a matrix (d_{i}, d_{i - 1}) of real numbers; got complex "
            "ones. Give the real part, such as w.real, if the imaginary one is 0."
        )
    try:
        return as_floats(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"weights: W_{i} must be a matrix (d_{i}, d_{i - 1}) of real numbers with rows of "
            f"equal length; got {values!r}."
        ) from error


def end_to_end(weights: Weights) -> EndToEnd:
    r"""The end-to-end matrix $P = W_N \cdots W_1$, `(d_N, d_0)`."""
    return functools.reduce(lambda below, w: product(w, below), weights)


def left_products(weights: Weights) -> list[Float[Array, "d_N _"]]:
    r"""$A_i = W_N \cdots W_{i+1}$, `(d_N, d_i)` for $i = 1..N$; $A_N$ is the identity."""
    above = jnp.eye(weights[-1].shape[0], dtype=weights[-1].dtype)
    products = [above]
    for w in reversed(weights[1:]):
        above = product(above, w)
        products.append(above)
    return products[::-1]


def right_products(weights: Weights) -> list[Float[Array, "_ d_0"]]:
    r"""$B_i = W_{i-1} \cdots W_1$, `(d_{i-1}, d_0)` for $i = 1..N$; $B_1$ is the identity."""
    below = jnp.eye(weights[0].shape[1], dtype=weights[0].dtype)
    products = [below]
    for w in weights[:-1]:
        below = product(w, below)
        products.append(below)
    return products


def widths_of(weights: Weights) -> tuple[int, ...]:
    """The widths $(d_0, ..., d_N)$ of layers with or without a path axis."""
    return (weights[0].shape[1], *(w.shape[0] for w in weights))
