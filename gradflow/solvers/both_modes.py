"""Derivatives in both modes of what only two different programs can differentiate.

A loop of unknown length is differentiated forwards by carrying the tangents along, and backwards by
keeping states on the way. JAX's rules are of one of the two kinds each: a `custom_vjp` has no
forward mode. Here the tangent map is a primitive of its own, linear in the tangents, that is pushed
by one program and transposed by the other one.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Arrays: TypeAlias = list[Array]
Shapes: TypeAlias = tuple[ShapedArray, ...]


@eqx.filter_custom_jvp
def in_both_modes(
    forward: Callable[[Any], Any], reverse: Callable[[Any], Any], argument: Any
) -> Any:
    """`reverse(argument)`, differentiable in forward mode, reverse mode, and forward over either.

    Backwards over a derivative is refused by JAX's loops.

    **Arguments:**

    - `forward`, `reverse`: the same function twice, as a program that forward mode can
        differentiate and one that reverse mode can. It gives a pytree of floating-point arrays.
    - `argument`: a pytree.
    """
    del forward
    return reverse(argument)


@in_both_modes.def_jvp
def _derivative(primals: tuple[Any, Any, Any], tangents: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    forward, reverse, argument = primals
    tangent = tangents[2]
    moves = jax.tree.map(lambda t: t is not None, tangent, is_leaf=lambda t: t is None)
    moving, fixed = eqx.partition(argument, moves)
    arrays, rest = eqx.partition(fixed, eqx.is_array)
    # The program that keeps states runs once; without reverse mode they are not used.
    value, pull = jax.vjp(lambda moving: reverse(eqx.combine(moving, fixed)), moving)
    outputs, of_outputs = jax.tree.flatten(value)
    directions, of_directions = jax.tree.flatten(tangent)
    at, of_at = jax.tree.flatten((moving, arrays))
    kept, of_kept = jax.tree.flatten(pull)

    # Each is traced only where it is used.
    def push(at: Arrays, tangents: Arrays) -> Arrays:
        moving, arrays = jax.tree.unflatten(of_at, at)

        def values(moving: Any) -> Any:
            return forward(eqx.combine(moving, arrays, rest))

        direction = jax.tree.unflatten(of_directions, tangents)
        return jax.tree.leaves(jax.jvp(values, (moving,), (direction,))[1])

    def pull_back(kept: Arrays, cotangents: Arrays) -> Arrays:
        pull = jax.tree.unflatten(of_kept, kept)
        return jax.tree.leaves(pull(jax.tree.unflatten(of_outputs, cotangents))[0])

    pushed = linear_p.bind(
        *at,
        *kept,
        *directions,
        maps=(push, pull_back),
        sizes=(len(at), len(kept)),
        shapes=(_shapes_of(outputs), _shapes_of(directions)),
    )
    return value, jax.tree.unflatten(of_outputs, pushed)


def _shapes_of(arrays: Arrays) -> Shapes:
    return tuple(ShapedArray(x.shape, x.dtype) for x in arrays)


# The primitive. Its arguments are the constants of the map, those of its transpose, and tangents.
# Its parameters, first for the map and then for the transpose: the functions (`maps`), how many
# constants they have (`sizes`) and what they give (`shapes`).

linear_p = Primitive("linear_map_with_transpose")
linear_p.multiple_results = True


def _parts(arguments: Any, sizes: tuple[int, int]) -> tuple[list[Any], list[Any], list[Any]]:
    first, second = sizes
    some = list(arguments)
    return some[:first], some[first : first + second], some[first + second :]


def _value(*arguments: Any, maps: Any, sizes: tuple[int, int], shapes: Any) -> Arrays:
    del shapes
    constants, _, tangents = _parts(arguments, sizes)
    return maps[0](constants, tangents)


def _jvp(
    primals: Any, tangents: Any, *, maps: Any, sizes: tuple[int, int], shapes: Any
) -> tuple[Arrays, Arrays]:
    constants, others, linear = _parts(primals, sizes)
    of_constants, _, of_linear = _parts(tangents, sizes)

    def bound(linear: list[Any]) -> Arrays:
        return linear_p.bind(*constants, *others, *linear, maps=maps, sizes=sizes, shapes=shapes)

    value = bound(linear)
    total = [jnp.zeros_like(v) for v in value]
    if not all(isinstance(t, ad.Zero) for t in of_linear):
        total = bound([ad.instantiate_zeros(t) for t in of_linear])
    moved = [i for i, t in enumerate(of_constants) if not isinstance(t, ad.Zero)]
    if moved:

        def at(some: Arrays) -> Arrays:
            every = list(constants)
            for i, constant in zip(moved, some, strict=True):
                every[i] = constant
            return maps[0](every, linear)

        start, direction = ([of[i] for i in moved] for of in (constants, of_constants))
        change = jax.jvp(at, (start,), (direction,))[1]
        total = [a + b for a, b in zip(total, change, strict=True)]
    return value, total


def _transposed(
    cotangents: Any, *arguments: Any, maps: Any, sizes: tuple[int, int], shapes: Any
) -> list[Any]:
    constants, others, _ = _parts(arguments, sizes)
    given = [ad.instantiate_zeros(c) for c in cotangents]
    swapped = {"maps": maps[::-1], "sizes": sizes[::-1], "shapes": shapes[::-1]}
    return [None] * sum(sizes) + list(linear_p.bind(*others, *constants, *given, **swapped))


def _batched(
    arguments: Any, axes: Any, *, maps: Any, sizes: tuple[int, int], shapes: Any
) -> tuple[Arrays, list[int]]:
    size = next(x.shape[a] for x, a in zip(arguments, axes, strict=True) if a is not None)
    constants, others, linear = _parts(arguments, sizes)
    *of_constants, of_linear = _parts(axes, sizes)
    linear = [
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(linear, of_linear, strict=True)
    ]
    values = linear_p.bind(
        *constants,
        *others,
        *linear,
        maps=tuple(
            jax.vmap(f, in_axes=(of, 0), axis_size=size)
            for f, of in zip(maps, of_constants, strict=True)
        ),
        sizes=sizes,
        shapes=tuple(
            tuple(ShapedArray((size, *x.shape), x.dtype) for x in some) for some in shapes
        ),
    )
    return values, [0] * len(values)


linear_p.def_impl(_value)
linear_p.def_abstract_eval(lambda *arguments, maps, sizes, shapes: list(shapes[0]))
ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transposed
batching.primitive_batchers[linear_p] = _batched
mlir.register_lowering(linear_p, mlir.lower_fun(_value, multiple_results=True))
