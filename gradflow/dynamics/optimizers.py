"""What an optax optimizer is given in a step, and whether it is an optimizer at all."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradflow.backend.types import Scalar, Weights
from gradflow.checks import first_line

ROWS = ((1.0, 2.0), (3.0, 5.0))
"""A gradient without the symmetries under which some transformations of optax give nothing."""


def is_transformation(value: Any) -> bool:
    """Whether a value is a gradient transformation of optax."""
    return hasattr(value, "init") and hasattr(value, "update")


def takes_learning_rate(optimizer: Any) -> bool:
    """Whether an optimizer is a function of the learning rate, of that name."""
    function = getattr(optimizer, "func", optimizer)  # of functools.partial and eqx.Partial
    return getattr(optimizer, "is_optimizer", False) or (
        callable(function) and "learning_rate" in inspect.signature(function).parameters
    )


def slope(transformation: Any) -> float:
    r"""$\langle u, g\rangle$ of the second update $u$ along a constant gradient $g$ from zero.

    Negative for what moves down the gradient, as an optimizer does. The first update of some is 0.
    """
    with jax.ensure_compile_time_eval():  # it may be asked for inside `jax.jit`
        weights = (jnp.zeros((2, 2)), jnp.zeros((2, 2)))
        gradient = (jnp.asarray(ROWS), jnp.asarray(ROWS).T)

        def loss(at: Weights) -> Scalar:
            return sum(
                (jnp.vdot(g, w) for g, w in zip(gradient, at, strict=True)), start=jnp.asarray(1.0)
            )

        update, state = weights, started(transformation, weights)
        for _ in range(2):
            update, state = updated(transformation, gradient, state, weights, loss)
        return float(sum(jnp.vdot(u, g) for u, g in zip(update, gradient, strict=True)))


def started(transformation: Any, weights: Weights) -> Any:
    """The state of an optimizer at the start.

    **Raises:** `TypeError` if it cannot start, `ValueError` if it holds a random key: one of its
    own, which every replica would share.
    """
    try:
        state = transformation.init(weights)
    except Exception as error:
        raise TypeError(_unusable(error)) from error
    if any(_is_key(leaf) for leaf in jax.tree.leaves(state)):
        raise ValueError(
            "GradientDescent.optimizer: it draws noise of its own, the same for every replica; "
            "leave that noise out and give the problem GradientNoise(std)."
        )
    return state


def updated(
    transformation: Any,
    gradient: Weights,
    state: Any,
    weights: Weights,
    loss: Callable[[Weights], Scalar],
) -> tuple[Weights, Any]:
    """One update of an optimizer and its next state.

    Optimizers such as `optax.polyak_sgd` and `optax.lbfgs` also take the loss of which `gradient`
    is the gradient: its value, that gradient and the function. It is called for these alone.

    **Raises:** `TypeError` naming the argument for a transformation that cannot be used.
    """
    extra: dict[str, Any] = {}
    if _needs_loss(transformation, gradient, state, weights):
        extra = {"value": loss(weights), "grad": gradient, "value_fn": loss}
    try:
        update, following = transformation.update(gradient, state, weights, **extra)
    except Exception as error:
        raise TypeError(_unusable(error)) from error
    for what, before, after in (("update", weights, update), ("state", state, following)):
        if _form(before) != _form(after):
            raise TypeError(
                f"GradientDescent.optimizer: its {what} differs in structure, shape or type from "
                f"{'the weights' if what == 'update' else 'the state before it'}; keep both alike."
            )
    return update, following


def check_descends(optimizer: Any, transformation: Any) -> None:
    """Raise a `ValueError` for a transformation that moves the weights up the gradient.

    Whatever cannot be judged on an example passes: it shows when the run starts.
    """
    try:
        uphill = slope(transformation) > 0.0
    except Exception:
        return
    if uphill:
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise ValueError(
            f"GradientDescent.optimizer: {name} moves the weights up the gradient, so it is a part "
            "of an optimizer and not one; end it with a negative learning rate, as in "
            "optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))."
        )


def _needs_loss(transformation: Any, gradient: Weights, state: Any, weights: Weights) -> bool:
    """Whether an update lacks keyword arguments without the loss."""
    if not isinstance(transformation, optax.GradientTransformationExtraArgs):
        return False
    try:
        jax.eval_shape(transformation.update, gradient, state, weights)
    except TypeError as error:
        return "required keyword-only argument" in str(error)
    except Exception:  # the update itself says what is wrong
        return False
    return False


def _form(tree: Any) -> Any:
    """Structure, shapes and types of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _is_key(leaf: Any) -> bool:
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jax.dtypes.prng_key) or (
        dtype == jnp.uint32 and jnp.shape(leaf) == (2,)
    )


def _unusable(error: Exception) -> str:
    return (
        "GradientDescent.optimizer: the optax transformation cannot be used on a tuple of weight "
        f"matrices ({type(error).__name__}: {first_line(error)}); try optax.adam."
    )
