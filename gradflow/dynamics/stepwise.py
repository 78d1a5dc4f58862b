"""Steps of one network as a pure function that JAX can differentiate."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from gradflow.backend.tracing import is_complex, is_traced
from gradflow.backend.types import Scalar, Weights
from gradflow.checks import MOST_COUNTED

Carry: TypeAlias = tuple[Weights, Any]
"""The weights of an ensemble of one, and what a dynamics remembers beside them."""


def step_numbers(
    owner: str,
    step_size: Scalar | None,
    times: ArrayLike | Sequence[float] | None,
    steps: ArrayLike | Sequence[int] | None,
) -> Int[np.ndarray, " T"]:
    """The numbers of steps at which the weights are asked for, as they are or nearest to times.

    **Arguments:** `step_size`: None if it varies, so that times are not known beforehand.

    **Raises:** `TypeError` or `ValueError` unless one of the two is given, with known increasing
    numbers >= 0, and times only with a step size that is known.
    """
    if (times is None) == (steps is None):
        given = "neither" if times is None else "both"
        raise ValueError(f"times and steps: give one of them; got {given}.")
    name, values = ("times", times) if steps is None else ("steps", steps)
    if is_traced(values):
        raise TypeError(
            f"{name} of {owner}.solve must be known outside jit, vmap and grad: they fix the "
            "number of steps, and with it the program."
        )
    if steps is None and (step_size is None or is_traced(step_size)):
        raise TypeError(
            f"times: the step size of {owner} is a schedule or traced, so that the number of steps "
            "to a time is not known; give steps=[...]."
        )
    try:
        if is_complex(values):
            raise TypeError("complex numbers")
        numbers = np.atleast_1d(np.asarray(values, dtype=float))
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be a list of numbers; got {values!r}.") from error
    if numbers.ndim != 1 or numbers.size == 0 or not np.all(np.isfinite(numbers)):
        raise ValueError(f"{name} must be a non-empty list of finite numbers; got {values!r}.")
    if numbers[0] < 0 or np.any(np.diff(numbers) < 0):
        raise ValueError(f"{name} must be >= 0 and increasing; got {values!r}.")
    if steps is None:
        with np.errstate(over="ignore"):
            numbers = np.round(numbers / float(step_size))  # pyright: ignore[reportArgumentType]
    elif np.any(numbers != np.round(numbers)):
        raise ValueError(f"steps must be whole numbers; got {values!r}.")
    if numbers[-1] > MOST_COUNTED:
        raise ValueError(
            f"{name}: at most {MOST_COUNTED} steps can be addressed, and the last one is number "
            f"{numbers[-1]:.3g}; make the run shorter or the steps larger."
        )
    return numbers.astype(int)


def stepped(
    step: Callable[[Int[Array, ""], Carry], Carry], start: Carry, numbers: Int[np.ndarray, " T"]
) -> Weights:
    """The weights after the given numbers of steps, one `(T, d_i, d_{i-1})` array a layer.

    Reverse mode keeps the states between stretches of steps, which are as long as divides all the
    numbers, and computes the others again.
    """
    stride = max(int(np.gcd.reduce(numbers)), 1)

    @jax.checkpoint
    def stretch(carry: Carry, first: Int[Array, ""]) -> tuple[Carry, Weights]:
        def one(carry: Carry, k: Int[Array, ""]) -> tuple[Carry, None]:
            return step(k, carry), None

        carry, _ = jax.lax.scan(one, carry, first + jnp.arange(stride))
        return carry, carry[0]

    firsts = jnp.arange(int(numbers[-1]) // stride) * stride
    _, after = jax.lax.scan(stretch, start, firsts)
    return tuple(
        jnp.concatenate([before[None], later])[numbers // stride, ..., 0]
        for before, later in zip(start[0], after, strict=True)
    )
