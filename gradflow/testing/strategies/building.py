"""How strategies are built from functions, and arguments that may be values or strategies."""

import functools
import random
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")
P = ParamSpec("P")

Draw: TypeAlias = Callable[..., Any]
"""What a composite strategy draws with; hypothesis' own `DrawFn` cannot be checked at run time."""

ValueOrStrategy: TypeAlias = T | st.SearchStrategy[T]
"""A fixed value, or a strategy that draws one."""


def as_strategy(value: ValueOrStrategy[T]) -> st.SearchStrategy[T]:
    """A strategy as it is, anything else as the strategy that always gives it."""
    return value if isinstance(value, st.SearchStrategy) else st.just(value)


def composite(
    function: Callable[Concatenate[Draw, P], T],
) -> Callable[P, st.SearchStrategy[T]]:
    """`hypothesis.strategies.composite` that leaves the global random state as it was.

    Run-time type checkers look at random entries of sequences, and hypothesis refuses strategies
    that use the `random` module.
    """

    @functools.wraps(function)
    def steady(draw: Draw, *args: P.args, **options: P.kwargs) -> T:
        state = random.getstate()
        try:
            return function(draw, *args, **options)
        finally:
            random.setstate(state)

    return st.composite(steady)
