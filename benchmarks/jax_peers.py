"""The same training written by hand in JAX, and as diffrax documents it."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
from cases import Training
from limits import each_device, over_devices

BLOCK = 50

GROUP = 512
"""Numbers of a vector that stays in the first-level cache."""


def scan_in_blocks(
    training: Training, scales: tuple[float, float], paths: int, block: int = BLOCK
) -> Callable[[int], Any]:
    """A scan over blocks of normals for all paths; scalars path axis last, matrices first."""
    a, b = scales
    target = jnp.asarray(training.target)
    scalar = target.size == 1
    noise_shape = (paths,) if scalar else (paths, *target.shape)
    field = scalar_field if scalar else matrix_field

    @jax.jit
    def run(starts: Any, keys: jax.Array) -> Any:
        def step(weights: Any, normals: jax.Array) -> tuple[Any, None]:
            moved = field(weights, lambda p: a * (p - target.squeeze()) + b * normals)
            return tuple(w - g for w, g in zip(weights, moved, strict=True)), None

        def one_block(weights: Any, key: jax.Array) -> tuple[Any, None]:
            if b == 0.0:
                return jax.lax.scan(step, weights, jnp.zeros((block, *(1 for _ in noise_shape))))
            return jax.lax.scan(step, weights, jax.random.normal(key, (block, *noise_shape)))

        return jax.lax.scan(one_block, starts, keys)[0]

    layers = [w.squeeze() if scalar else w for w in training.layers]
    starts = tuple(over_devices(jnp.repeat(jnp.asarray(w)[None], paths, 0)) for w in layers)

    def start(steps: int) -> Any:
        keys = jax.random.split(jax.random.key(1), -(-steps // block))
        return jax.block_until_ready(run(starts, keys))

    return start


def steps_alone(training: Training, paths: int, block: int = 64) -> Callable[[int], Any]:
    """The steps of a chain of two numbers on one block of normals, again and again.

    One loop a layer over all paths, as XLA writes it, in groups that stay in the first-level cache.
    """
    a, b = training.descent_scales
    target = float(training.target.squeeze())
    devices = len(jax.devices())
    groups = devices * max(paths // (GROUP * devices), 1)
    shape = (groups, paths // groups)
    normals = jax.random.normal(jax.random.key(1), (block, shape[1]))

    @jax.jit
    def run(starts: Any, blocks: jax.Array) -> Any:
        def step(weights: Any, z: jax.Array) -> tuple[Any, None]:
            moved = scalar_field(weights, lambda p: a * (p - target) + b * z)
            return tuple(w - g for w, g in zip(weights, moved, strict=True)), None

        def of_group(weights: Any) -> Any:
            def one_block(_: Any, weights: Any) -> Any:
                return jax.lax.scan(step, weights, normals)[0]

            return jax.lax.fori_loop(0, blocks, one_block, weights)

        return each_device(lambda own: jax.lax.map(of_group, own))(starts)

    starts = tuple(over_devices(jnp.full(shape, w.squeeze())) for w in training.layers)
    return lambda steps: jax.block_until_ready(run(starts, jnp.asarray(-(-steps // block))))


def scalar_field(weights: Any, residual: Callable[[Any], Any]) -> Any:
    """The gradients of a chain of two numbers."""
    first, second = weights
    m = residual(first * second)
    return m * second, m * first


def matrix_field(weights: Any, residual: Callable[[Any], Any]) -> Any:
    """The gradients of three layers with leading batch axes."""
    w1, w2, w3 = weights

    def t(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, -1, -2)

    lower = w2 @ w1
    m = residual(w3 @ lower)
    left = t(w3) @ m
    return t(w2) @ left, left @ t(w1), m @ t(lower)


def diffrax_solves(training: Training, paths: int, tree: bool) -> Callable[[int], Any]:
    """A vmap of solves with Euler, one Brownian motion a path, as in diffrax's documentation.

    The diffusion is a `lineax` operator, so that its columns are never formed.
    """
    target = jnp.asarray(training.target)
    scalar = target.size == 1
    field = scalar_field if scalar else matrix_field
    dt = training.step_size / training.substeps
    scale = float(np.sqrt(training.step_size)) * training.std
    shape = () if scalar else target.shape
    layers = tuple(jnp.asarray(w.squeeze() if scalar else w) for w in training.layers)
    structure = jax.ShapeDtypeStruct(shape, target.dtype)

    def drift(t: Any, y: Any, args: Any) -> Any:
        return tuple(-g for g in field(y, lambda p: p - target.squeeze()))

    def diffusion(t: Any, y: Any, args: Any) -> Any:
        def applied(normals: jax.Array) -> Any:
            return tuple(-g for g in field(y, lambda p: scale * normals))

        return lineax.FunctionLinearOperator(applied, structure)

    def solve(key: jax.Array, steps: jax.Array) -> Any:
        stop = steps * dt
        if tree:
            noise = diffrax.VirtualBrownianTree(0.0, stop, tol=dt / 2, shape=shape, key=key)
        else:
            noise = diffrax.UnsafeBrownianPath(shape=shape, key=key)
        terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, noise))
        solution = diffrax.diffeqsolve(
            terms,
            diffrax.Euler(),
            0.0,
            stop,
            dt0=dt,
            y0=layers,
            saveat=diffrax.SaveAt(t1=True),
            adjoint=diffrax.ForwardMode(),
            max_steps=None,
        )
        return tuple(w[0] for w in solution.ys)

    keys = jax.random.split(jax.random.key(2), paths)
    keys = over_devices(keys)
    run = jax.jit(jax.vmap(solve, in_axes=(0, None)))
    return lambda steps: jax.block_until_ready(run(keys, jnp.asarray(float(steps))))
