"""A penalty of the user's own."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gradflow.backend.types import Scalar, Weights
from gradflow.checks import first_line
from gradflow.regularizers.base import AbstractPenalty


class Penalty(AbstractPenalty):
    r"""A penalty $R(W)$ given as a function; its gradient is that of `jax.grad`.

    `Penalty(lambda weights: 0.1 * sum(jnp.sum(jnp.abs(w)) for w in weights), name="l1")` adds
    $\tfrac{1}{10} \sum_i |W_i|_1$ to the loss. Where $R$ has a kink, `jax.grad` gives one of its
    subgradients: `GradientDescent` can step over it, while the adaptive steps of a flow cannot.

    The function is compiled with the run. Give the same function object to several problems rather
    than a new `lambda` each time: a new one is compiled anew. A rate that is swept belongs into a
    subclass of `AbstractPenalty`, where it is an array (docs/regularizers.md).

    **Arguments:**

    - `function`: takes the layers, a tuple of `(d_i, d_{i-1})` arrays, first layer first, and gives
        one real number, written in `jax.numpy`. In units of the loss.
    - `name`: what messages call it.

    **Raises:** `TypeError` for something that is not a function or a name; when a run starts, for a
    function that fails, or gives anything but one real number.
    """

    function: Callable[[Weights], Any]
    name: str = eqx.field(static=True)

    def __init__(self, function: Callable[[Weights], Any], name: str = "penalty"):
        if not callable(function):
            raise TypeError(
                f"Penalty.function must be a function of the layers, a tuple of arrays; got "
                f"{function!r}."
            )
        if not isinstance(name, str) or not name:
            raise TypeError(f"Penalty.name must be a text such as 'l1'; got {name!r}.")
        if isinstance(function, functools.partial):
            # Two partials of equal contents are the same program to this one, not to functools'.
            function = eqx.Partial(function.func, *function.args, **function.keywords)
        self.function = function
        self.name = name

    @property
    def is_stochastic(self) -> bool:
        """False: a penalty is deterministic."""
        return False

    def penalty(self, weights: Weights) -> Scalar:
        """$R(W)$. **Raises:** `TypeError` unless the function gives one real number."""
        try:
            value = jnp.asarray(self.function(weights))
        except Exception as error:  # whatever the user's function raises
            raise TypeError(
                f"Penalty.function: {self.name!r} failed on layers of shapes "
                f"{[w.shape for w in weights]} ({type(error).__name__}: {first_line(error)}); it "
                "is compiled with the run, so write it in jax.numpy, without float(), if or numpy "
                "on the layers."
            ) from error
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"Penalty.function: {self.name!r} must give one real number, such as "
                f"jnp.sum(...); it gave {value.dtype} of shape {value.shape}."
            )
        return value.astype(weights[0].dtype)

    def penalty_gradient(self, weights: Weights) -> Weights:
        r"""$\nabla R(W)$, one array a layer."""
        return jax.grad(self.penalty)(weights)
