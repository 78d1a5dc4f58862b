"""Values that JAX traces, inside `jit`, `vmap` and derivatives: unknown, so not to be checked."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array


def is_traced(*values: Any) -> bool:
    """Whether any array in the pytrees is traced, so that checks of its value have to be skipped.

    Such a value was checked when it was concrete, or cannot be checked at all.
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def as_floats(values: Any) -> Array:
    """Numbers as an array in the precision JAX computes in; known ones stay known inside `jit`.

    An integer beyond the largest float becomes infinite, which the checks of a value refuse.

    **Raises:** `TypeError` or `ValueError` if they are not real numbers in a rectangular array.
    """
    if is_complex(values):
        raise TypeError("needs real numbers; got complex ones, whose imaginary part would be lost")
    dtype = jnp.result_type(float)
    if is_traced(values):
        return jnp.asarray(values, dtype)
    if isinstance(values, int):
        values = float_of(values)
    with jax.ensure_compile_time_eval():
        return jnp.asarray(values, dtype)


def is_complex(values: Any) -> bool:
    """Whether any of the numbers is complex, even where its imaginary part is 0."""
    if hasattr(values, "to_numpy"):  # a table of pandas
        values = values.to_numpy()
    return any(
        isinstance(leaf, complex) or getattr(getattr(leaf, "dtype", None), "kind", "") == "c"
        for leaf in jax.tree.leaves(values)
    )


def float_of(number: Any) -> float:
    """The nearest float; infinite beyond the largest one."""
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else -float("inf")


def inside_transformation(*values: Any) -> bool:
    """Whether JAX is tracing: any array in the pytrees, or the program that calls."""
    return is_traced(*values) or isinstance(jax.device_put(0.0), Tracer)
