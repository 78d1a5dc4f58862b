"""What no implementation can undercut on this machine: its normals and its matrix products."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradflow.backend.compiled import LONG
from gradflow.backend.products import on_cpu
from gradflow.dynamics.base import ACCELERATOR_BYTES, ACCELERATOR_STEPS
from gradflow.random.streams import Stream

CACHE = 2**21
"""Bytes of noise drawn at once on CPUs."""

COPIED = 2**30
"""Bytes of an array that is copied within the memory of an accelerator."""

GEMM_SIZE = 1024


def over_devices(array: jax.Array, axis: int = 0) -> jax.Array:
    """Lay an array out over all devices along its path axis, if they divide it."""
    devices = jax.devices()
    if array.shape[axis] % len(devices):
        return array
    names = [None] * array.ndim
    names[axis] = "paths"
    mesh = Mesh(np.array(devices), ("paths",))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*names)))


def each_device(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Apply a function of arrays laid out by `over_devices` to the part of every device."""
    mesh = Mesh(np.array(jax.devices()), ("paths",))
    spec = PartitionSpec("paths")
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def noise_alone(shape: tuple[int, ...], paths: int) -> Callable[[int], jax.Array]:
    """Draw and add up the normals of every step and path, in blocks that fit the cache.

    A block is stored and then read step by step, as in training: with a sum over steps XLA draws
    each number several times. The function takes the number of steps and rounds it up to a whole
    block.
    """
    per_step = int(np.prod(shape)) * paths * 8
    most = CACHE if on_cpu() else ACCELERATOR_BYTES
    block = int(2 ** np.clip(np.floor(np.log2(max(most // per_step, 1))), 0, 8))
    numbers = over_devices(jnp.arange(paths, dtype=jnp.uint32))
    key = jax.random.key_data(jax.random.key(0))

    @partial(jax.jit, compiler_options=LONG)
    def total(blocks: jax.Array, numbers: jax.Array) -> jax.Array:
        def one(b: jax.Array, total: jax.Array) -> jax.Array:
            stream = Stream(key, b * block + jnp.arange(block), numbers).substream(0)
            normals = stream.normals(shape)
            unroll = 1 if on_cpu() else min(ACCELERATOR_STEPS, block)
            return jax.lax.fori_loop(
                0, block, lambda j, total: total + normals[j], total, unroll=unroll
            )

        return jax.lax.fori_loop(0, blocks, one, jnp.zeros((*shape, paths)))

    return lambda steps: total(jnp.asarray(-(-steps // block)), numbers).block_until_ready()


def gemm(size: int = GEMM_SIZE) -> tuple[Callable[[], jax.Array], float]:
    """A large product of matrices, and its floating-point operations."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size))
    multiply = jax.jit(partial(jnp.matmul, precision="highest"))
    return lambda: multiply(a, b).block_until_ready(), 2.0 * size**3


def small_products(width: int, paths: int, count: int) -> Callable[[int], jax.Array]:
    """`count` products of square matrices a step and path, path after path, and nothing else.

    The function takes the number of steps. A path's two matrices stay in the cache.
    """
    a, b = (
        over_devices(m)
        for m in jax.random.normal(jax.random.key(1), (2, paths, width, width)) / width**0.5
    )

    @jax.jit
    def run(a: jax.Array, b: jax.Array, products: jax.Array) -> jax.Array:
        def of_path(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            left, right = pair
            return jax.lax.fori_loop(
                0, products, lambda _, c: jnp.matmul(left, c, precision="highest"), right
            )

        return each_device(lambda pair: jax.lax.map(of_path, pair))((a, b))

    return lambda steps: run(a, b, jnp.asarray(count * steps)).block_until_ready()


def copy() -> tuple[Callable[[], jax.Array], float]:
    """A copy within the memory of the device, and the bytes it reads and writes."""
    array = jnp.zeros(COPIED // 8, jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
    again = jax.jit(lambda x: x + 1.0)
    return lambda: again(array).block_until_ready(), 2.0 * array.nbytes


def step_flops(depth: int, width: int) -> float:
    """Operations of the 3 (depth - 1) products in the gradient of a square network, moments given.

    Depth - 1 for the end-to-end matrix and its right factors, twice as many to pull back.
    """
    return 3.0 * (depth - 1) * 2.0 * width**3
