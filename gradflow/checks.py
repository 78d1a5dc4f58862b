"""Checks of arguments, and the sentences that name the field, the value and the fix."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, ArrayLike

from gradflow.backend.tracing import as_floats, float_of, is_traced
from gradflow.backend.types import Scalar, Weights

MOST_COUNTED = 2**31 - 1
"""Steps and rows are counted in 32 bits."""

Decay = Literal["coupled", "decoupled"]


def first_line(error: BaseException) -> str:
    """What an error of other code says, in one line and without the full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def is_number(given: object) -> bool:
    """Whether something is a real number, or an array that holds one."""
    if isinstance(given, str):
        return False
    try:
        array = np.asarray(given)
    except (TypeError, ValueError):
        return False
    return array.ndim == 0 and array.dtype.kind in "iuf"


def is_count(value: Any) -> bool:
    """Whether a value is an integer >= 1."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def as_parameter(value: ArrayLike, name: str = "a step size, rate, level or tolerance") -> Scalar:
    """A rate or level as an array, so that a sweep over it does not recompile.

    **Raises:** `TypeError` with the name of the field if it is not a number.
    """
    wrong = TypeError(f"{name} must be a number; got {value!r}.")
    if isinstance(value, str):  # NumPy would read the number in it
        raise wrong
    try:
        return as_floats(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error


def check_nonnegative(name: str, value: Array) -> None:
    """Raise a `ValueError` that names the field unless `value` is a finite number >= 0.

    Traced values pass.
    """
    if value.ndim != 0:
        raise ValueError(f"{name} must be a single number; got shape {value.shape}.")
    if is_traced(value):
        return
    number = float(value)
    if not (np.isfinite(number) and number >= 0.0):
        raise ValueError(f"{name} must be a finite number >= 0; got {number}.")


def check_std(name: str, value: Array) -> None:
    """Raise a `ValueError` unless `value` is a standard deviation >= 0 whose square is finite."""
    check_nonnegative(name, value)
    largest = float(np.sqrt(np.finfo(value.dtype).max))
    if not is_traced(value) and float(value) > largest:
        raise ValueError(
            f"{name} must be at most {largest:.2g}, where the variance overflows; got "
            f"{float(value):.3g}."
        )


def check_rate(name: str, value: Array) -> None:
    """Raise a `ValueError` that names the field unless `value` is a number in [0, 1).

    Traced values pass.
    """
    check_nonnegative(name, value)
    if not is_traced(value) and float(value) >= 1.0:
        raise ValueError(
            f"{name} is the probability to drop and must lie in [0, 1); got {float(value)}."
        )


def as_layers(value: Any) -> Any:
    """Layer numbers as an ascending tuple of integers; anything else unchanged."""
    if isinstance(value, list | tuple | range | np.ndarray):
        numbers = [int(v) if isinstance(v, np.integer) else v for v in value]
        if all(isinstance(v, int) for v in numbers):
            return tuple(sorted(numbers))
        return tuple(numbers)
    return value


def check_layers(name: str, layers: Any) -> None:
    """Raise a `ValueError` that names the field unless `layers` are layer numbers or None."""
    if layers is None:
        return
    numbers = isinstance(layers, tuple) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in layers
    )
    if not numbers or not layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"{name} must be a list of distinct layer numbers >= 1 such as [1, 2], or None for "
            f"all layers; got {layers!r}."
        )


def check_within(name: str, layers: tuple[int, ...] | None, depth: int) -> None:
    """Raise a `ValueError` if a network of the given depth lacks one of the layers."""
    if layers is not None and layers[-1] > depth:
        raise ValueError(
            f"{name}: there is no layer {layers[-1]} in a network of depth {depth}; choose from 1 "
            f"to {depth}."
        )


def check_fit(field: str, widths: Sequence[int], d_in: int, d_out: int) -> None:
    """Raise a `ValueError` unless widths, input first, are those of a network for the data."""
    sizes = tuple(widths)
    if len(sizes) < 2 or (sizes[0], sizes[-1]) != (d_in, d_out):
        raise ValueError(
            f"{field} {sizes} do not fit the data with {d_in} inputs and {d_out} targets; the "
            f"first width must be {d_in} and the last {d_out}."
        )


def check_confidence(confidence: float) -> None:
    """Raise a `ValueError` unless the confidence is strictly between 0 and 1."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, for example 0.95; got {confidence}")


def checked_step_size(owner: str, value: ArrayLike) -> Scalar:
    """A step size as an array.

    **Raises:** `TypeError` unless it is a number, `ValueError` unless it is finite and > 0.
    """
    if callable(value):
        raise TypeError(
            f"{owner}.step_size must be a number; got {value!r} (a schedule of step sizes is for "
            "GradientDescent alone)."
        )
    step_size = as_parameter(value, f"{owner}.step_size")
    if step_size.ndim != 0:
        raise ValueError(f"{owner}.step_size must be a single number; got {value!r}.")
    if is_traced(step_size):
        return step_size
    h = float(step_size)
    if not (0.0 < h < float("inf")):
        raise ValueError(f"{owner}.step_size must be a finite number > 0; got {h}.")
    return step_size


def checked_momentum(owner: str, value: ArrayLike) -> Scalar:
    """A momentum as an array. **Raises:** `ValueError` unless it lies in [0, 1)."""
    momentum = as_parameter(value, f"{owner}.momentum")
    if momentum.ndim != 0:
        raise ValueError(f"{owner}.momentum must be a single number; got {value!r}.")
    if is_traced(momentum):
        return momentum
    beta = float(momentum)
    if not (0.0 <= beta < 1.0):
        raise ValueError(f"{owner}.momentum must lie in [0, 1); got {beta}.")
    return momentum


def checked_decay(owner: str, value: Any) -> Decay:
    """How penalties act. **Raises:** `ValueError` for anything but the two words."""
    if value not in ("coupled", "decoupled"):
        raise ValueError(f"{owner}.decay must be 'coupled' or 'decoupled'; got {value!r}.")
    return value


def remembered(momentum: Scalar) -> Scalar | None:
    """The momentum, or None if it is known to be 0: then no velocity is carried along."""
    return momentum if is_traced(momentum) or float(momentum) > 0.0 else None


def checked_count(field: str, value: Any) -> int:
    """A whole number. **Raises:** `ValueError` unless it is an integer from 1 to 2^31 - 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} must be an integer >= 1; got {value!r}.")
    if value > MOST_COUNTED:
        raise ValueError(f"{field} must be at most {MOST_COUNTED}; got {float_of(value):.3g}.")
    return value


def checked_velocity(owner: str, velocity: Sequence[Any] | None) -> Weights | None:
    """A velocity as arrays. **Raises:** `ValueError` unless it is one finite matrix a layer."""
    if velocity is None:
        return None
    try:
        layers = tuple(as_floats(v) for v in velocity)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"{owner}.velocity must be a list with one array of real numbers a layer."
        ) from error
    for i, layer in enumerate(layers, start=1):
        if layer.ndim != 2 or not (is_traced(layer) or np.all(np.isfinite(layer))):
            raise ValueError(
                f"{owner}.velocity: entry {i} must be a matrix of finite numbers, shaped like "
                f"layer {i} of the network; got shape {layer.shape}."
            )
    return layers


def check_velocity(owner: str, velocity: Weights | None, weights: Weights) -> None:
    """Raise a `ValueError` if the shapes of a velocity are not those of the layers."""
    if velocity is None:
        return
    given, needed = [v.shape for v in velocity], [w.shape[:-1] for w in weights]
    if given != needed:
        raise ValueError(
            f"{owner}.velocity has layers of shapes {given}, but the network has {needed}; give "
            "one array a layer, first layer first."
        )
