"""Arithmetic of solvers under strict settings of JAX."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def promoting(function: Function) -> Function:
    """A function in which numbers of any kind meet, whatever the user's settings.

    Coefficients are double precision, states may be single or complex, and stages are added to a
    state: `jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"`, which a user
    sets for code of theirs, would refuse that. diffrax does so for its own solvers.
    """

    @functools.wraps(function)
    def promoted(*arguments: Any, **options: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*arguments, **options)

    return promoted  # pyright: ignore[reportReturnType]
