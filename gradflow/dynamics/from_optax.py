"""Optimizers and schedules of optax by name, so that a file or a spec can hold them."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import optax


class FromOptax(eqx.Module):
    """An optimizer or a schedule of optax, known by its name and options.

    `GradientDescent(0.01, optimizer=FromOptax("adam", b1=0.8))` does what
    `GradientDescent(0.01, optimizer=functools.partial(optax.adam, b1=0.8))` does, and
    `GradientDescent(FromOptax("exponential_decay", ...))` what a schedule does; a trajectory that
    was made with it can be saved and repeated.

    **Arguments:**

    - `name`: an optimizer of optax (its first argument is the learning rate) or a schedule.
    - `options`: its other arguments, numbers and text.

    **Raises:** `ValueError` for a name optax does not have, or options it does not take.
    """

    name: str = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, name: str, **options: Any):
        function = getattr(optax, name, None)
        if not callable(function) or inspect.isclass(function):
            raise ValueError(f"FromOptax.name: optax has no function {name!r}; try 'adam'.")
        self.name = name
        self.options = tuple(sorted(options.items()))
        takes = inspect.signature(function)
        given = {**({"learning_rate": 0.1} if self.is_optimizer else {}), **options}
        try:
            takes.bind(**given)
        except TypeError as error:
            known = [
                key
                for key, parameter in takes.parameters.items()
                if key != "learning_rate" and parameter.kind is not parameter.VAR_KEYWORD
            ]
            raise ValueError(
                f"FromOptax: optax.{name} does not take these options: {error}; it has "
                f"{', '.join(known)}."
            ) from error

    @property
    def is_optimizer(self) -> bool:
        """Whether it makes an optimizer from a learning rate; otherwise it is a schedule."""
        return "learning_rate" in inspect.signature(getattr(optax, self.name)).parameters

    def __call__(self, argument: Any) -> Any:
        """The optimizer with learning rate `argument`, or the schedule's value at that step."""
        function: Callable[..., Any] = getattr(optax, self.name)
        options = dict(self.options)
        if self.is_optimizer:
            return function(learning_rate=argument, **options)
        return function(**options)(argument)
