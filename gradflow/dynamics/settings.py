"""Settings that several dynamics share, checked when they are given."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import ArrayLike

from gradflow.backend.tracing import as_floats, float_of, is_traced
from gradflow.backend.types import Scalar, Weights
from gradflow.regularizers.base import as_parameter

MOST_COUNTED = 2**31 - 1
"""Steps and rows are counted in 32 bits."""

Decay = Literal["coupled", "decoupled"]


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
        raise TypeError(f"{owner}.velocity must be a list with one array a layer.") from error
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
