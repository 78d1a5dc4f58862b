"""Random numbers of training step by step, and of the Brownian path behind them."""

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gradflow.problem import Problem
from gradflow.random.streams import Stream


def shapes_of_one(draw: Callable[[Stream], Any]) -> Any:
    """Shapes of the random numbers that a draw takes for one step of one path."""
    one = jax.ShapeDtypeStruct((1,), jnp.uint32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    drawn = eqx.filter_eval_shape(lambda k, s, p: draw(Stream(k, s, p)), key, one, one)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:-1], leaf.dtype), drawn)


def at_step(noise: Any, step: Array | int) -> Any:
    """The entries of one step of a block."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, step, keepdims=False), noise
    )


def drawn_on_grid(problem: Problem, stream: Stream, widths: tuple[int, ...], fineness: int) -> Any:
    r"""The draws of steps that are `fineness` $= s$ steps of a finer grid each.

    $$\zeta_k = s^{-1/2} \sum_{j=0}^{s-1} \zeta^{\mathrm{fine}}_{k s + j},$$

    the increments of one Brownian path seen on two grids. The draws must be normals.
    """
    if fineness == 1:
        return problem.draw(stream, widths)
    firsts = stream.steps * jnp.uint32(fineness)

    def fine(j: Array) -> Any:
        return problem.draw(stream.at_steps(firsts + j.astype(jnp.uint32)), widths)

    def add(j: Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, fine(j))

    total = jax.lax.fori_loop(1, fineness, add, fine(jnp.zeros((), jnp.uint32)))
    return jax.tree.map(lambda leaf: leaf / math.sqrt(fineness), total)


_Dynamics = TypeVar("_Dynamics", bound=Any)


def with_path_substeps(dynamics: _Dynamics, count: int) -> _Dynamics:
    """A dynamics with another number `path_substeps` of grid steps of its path in a step."""
    if dynamics.path_substeps == count:
        return dynamics
    changed = copy.copy(dynamics)
    object.__setattr__(changed, "path_substeps", count)
    return changed


def check_gaussian(field: str, value: int, problem: Problem) -> None:
    """Raise unless the noise of SGD on the problem is Gaussian, so that a Brownian path drives it.

    **Raises:** `ValueError` naming the regularizers that are not.
    """
    if not problem.is_gaussian:
        names = [type(r).__name__ for r in problem.regularizers if r.is_stochastic]
        raise ValueError(
            f"{field}={value}: a Brownian path drives SGD only where its noise is exactly Gaussian "
            "(LabelNoise on the full batch, GradientNoise), not with "
            f"{' and '.join(names)}; leave it out."
        )
