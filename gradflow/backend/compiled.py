"""Compilation with options that fit what a program is for.

XLA's compiler for CPUs takes seconds where the programs themselves take milliseconds, and most of
that is per kernel, of which a program of small matrices has hundreds. Its older emitter of kernels
is about half of that and gives code that is no slower (benchmarks/README.md, "First calls").
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import equinox as eqx
import jax

from gradflow.backend.tracing import inside_transformation

P = ParamSpec("P")
R = TypeVar("R")
Options = dict[str, bool | int]
Donated = Literal["none", "all-except-first"]

KERNELS: Options = {"xla_cpu_use_fusion_emitters": False}
"""The older emitter of kernels."""

LONG: Options = {**KERNELS, "xla_cpu_prefer_vector_width": 512}
"""Of programs that run for long. A loop over random numbers has words of 32 and of 64 bits, and as
many lanes as fit of the wider: with XLA's 256 bits half of each vector of narrow ones is empty.
Processors without such vectors take two."""

ONCE: Options = {**KERNELS, "xla_backend_optimization_level": 0}
"""Of programs that run once, on little."""

LITTLE = 2**15
"""Numbers that a program may be given so that optimizing it costs more time than it saves."""

_unknown: set[str] = set()  # options that this version of XLA does not have


def compiled(
    function: Callable[P, R], *, options: Options | None = None, donate: Donated = "none"
) -> Callable[P, R]:
    """A function compiled as `equinox.filter_jit` does, and faster.

    Inside a transformation it becomes part of the program that is traced there. Options that XLA
    does not know, in another version than the one this was written for, are left out.

    **Arguments:**

    - `options`: of XLA; default: `ONCE` for up to `LITTLE` numbers, `KERNELS` beyond.
    - `donate`: the arguments whose memory the results may take.
    """
    part = eqx.filter_jit(function)

    @functools.cache
    def program(options: tuple[tuple[str, bool | int], ...]) -> Callable[P, R]:
        return eqx.filter_jit(  # pyright: ignore[reportCallIssue]
            function, donate=donate, compiler_options=dict(options)
        )

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if inside_transformation(args, kwargs):
            return part(*args, **kwargs)
        wanted = options
        if wanted is None:
            wanted = ONCE if _numbers(args, kwargs) <= LITTLE else KERNELS
        while True:
            known = {name: value for name, value in wanted.items() if name not in _unknown}
            try:
                return program(tuple(known.items()))(*args, **kwargs)
            except jax.errors.JaxRuntimeError as error:
                refused = re.search(r"No such compile option: '(\w+)'", str(error))
                if refused is None or refused[1] not in known:
                    raise
                _unknown.add(refused[1])

    return call


def _numbers(*values: Any) -> int:
    """How many numbers the arrays in some pytrees have."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(values) if eqx.is_array(leaf))
