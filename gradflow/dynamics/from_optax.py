"""Optimizers and schedules of optax by name, so that a file or a spec can hold them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from gradflow.checks import first_line
from gradflow.dynamics.optimizers import is_transformation, slope


class FromOptax(eqx.Module):
    """An optimizer or a schedule of optax, known by its name and options.

    `GradientDescent(0.01, optimizer=FromOptax("adam", b1=0.8))` does what
    `GradientDescent(0.01, optimizer=functools.partial(optax.adam, b1=0.8))` does, and
    `GradientDescent(FromOptax("exponential_decay", ...))` what a schedule does; a trajectory that
    was made with it can be saved and repeated.

    **Arguments:**

    - `name`: an optimizer of optax or a schedule. An optimizer without a learning rate, such as
        "polyak_sgd", is used as it is: the step size then only defines flow time.
    - `options`: its other arguments, numbers and text.

    **Raises:** `ValueError` for a name optax does not have, options it does not take, and what is
    neither an optimizer nor a schedule.
    """

    name: str = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, name: str, **options: Any):
        function = getattr(optax, name, None)
        if (
            not callable(function)
            or inspect.isclass(function)
            or not function.__module__.startswith("optax")
        ):
            raise ValueError(f"FromOptax.name: optax has no function {name!r}; try 'adam'.")
        self.name = name
        self.options = tuple(sorted(options.items()))
        takes = inspect.signature(function).parameters
        given = {**({"learning_rate": 0.1} if "learning_rate" in takes else {}), **options}
        try:
            inspect.signature(function).bind(**given)
        except TypeError as error:
            known = [
                key
                for key, parameter in takes.items()
                if key != "learning_rate" and parameter.kind is not parameter.VAR_KEYWORD
            ]
            raise ValueError(
                f"FromOptax: optax.{name} does not take these options: {error}; it has "
                f"{', '.join(known)}."
            ) from error
        for key, value in options.items():
            try:
                hash(value)
            except TypeError as error:
                raise ValueError(
                    f"FromOptax: {key} must be a number or text; got {type(value).__name__}. Give "
                    f"what optax.{name} makes instead of its name; it runs, and cannot be saved."
                ) from error
        _kind(name, self.options)

    @property
    def is_optimizer(self) -> bool:
        """Whether it makes an optimizer; otherwise it is a schedule."""
        return _kind(self.name, self.options) == "optimizer"

    def __call__(self, argument: Any) -> Any:
        """The optimizer with learning rate `argument`, or the schedule's value at that step."""
        function: Callable[..., Any] = getattr(optax, self.name)
        options = dict(self.options)
        if "learning_rate" in inspect.signature(function).parameters:
            return function(learning_rate=argument, **options)
        made = function(**options)
        return made if self.is_optimizer else made(argument)


@functools.lru_cache(maxsize=256)
def _kind(name: str, options: tuple[tuple[str, Any], ...]) -> Literal["optimizer", "schedule"]:
    """What a function of optax makes.

    **Raises:** `ValueError` if it is neither an optimizer nor a schedule.
    """
    function: Callable[..., Any] = getattr(optax, name)
    rate = (
        {"learning_rate": 0.1} if "learning_rate" in inspect.signature(function).parameters else {}
    )
    wrong = f"FromOptax.name: optax.{name}"
    try:
        made = function(**rate, **dict(options))
    except Exception as error:  # whatever optax raises
        raise ValueError(
            f"{wrong} cannot be made of these options ({type(error).__name__}: "
            f"{first_line(error)})."
        ) from error
    if is_transformation(made):
        return _checked_optimizer(wrong, made, bool(rate))
    try:
        value = jax.eval_shape(made, jax.ShapeDtypeStruct((), jnp.int32))
        is_number = value.shape == () and jnp.isdtype(value.dtype, ("real floating", "integral"))
    except Exception:
        is_number = False
    if not is_number:
        raise ValueError(f"{wrong} is neither an optimizer nor a schedule; try 'adam'.")
    return "schedule"


def _checked_optimizer(wrong: str, made: Any, has_rate: bool) -> Literal["optimizer"]:
    """What does not move down the gradient is a part of an optimizer."""
    try:
        direction = slope(made)
    except ValueError as error:  # noise of its own
        raise ValueError(str(error).replace("GradientDescent.optimizer: it", wrong)) from error
    except TypeError as error:
        if has_rate:  # its options may be made for networks of another depth
            return "optimizer"
        cause = first_line(error.__cause__ or error)
        raise ValueError(f"{wrong} cannot be used by its name ({cause}); try 'adam'.") from error
    if direction > 0.0 or not (has_rate or direction < 0.0):
        raise ValueError(
            f"{wrong} is a part of an optimizer and not one: by itself it does not move the "
            "weights down the gradient; give what it makes in optimizer=optax.chain(..., "
            "optax.sgd(h)), which runs and cannot be saved."
        )
    return "optimizer"
