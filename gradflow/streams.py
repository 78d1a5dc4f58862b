"""Counter-based random streams addressed by step and path."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

Law = Literal["gaussian", "two-point", "three-point"]
Precision = Literal["double", "single"]


def _threefry(
    key: UInt32[Array, "2"], first: UInt32[Array, "*s"], second: UInt32[Array, "*s"]
) -> tuple[UInt32[Array, "*s"], UInt32[Array, "*s"]]:
    """Encrypt the counter pairs ``(first, second)`` under ``key`` (Threefry-2x32, 20 rounds)."""
    k0 = jnp.broadcast_to(key[0], first.shape)
    k1 = jnp.broadcast_to(key[1], first.shape)
    a, b = threefry2x32_p.bind(k0, k1, first, second)
    return a, b


class Normals(eqx.Module):
    r"""What stands for the standard normals of a run."""

    law: Law = eqx.field(static=True, default="gaussian")
    antithetic: bool = eqx.field(static=True, default=False)
    precision: Precision = eqx.field(static=True, default="double")


class Source(eqx.Module):
    """Where the random numbers of an ensemble come from.

    **Arguments:**

    - `key`: a JAX random key, typed (`jax.random.key`) or raw.
    - `paths`: `(R,)` path numbers.
    - `normals`: what stands for the standard normals.
    """

    key: UInt32[Array, "2"]
    paths: UInt32[Array, " paths"]
    normals: Normals

    def __init__(
        self,
        key: PRNGKeyArray | UInt32[Array, "2"],
        paths: Int[Array, " paths"] | UInt32[Array, " paths"],
        normals: Normals | None = None,
    ):
        self.key = _words_of(key)
        self.paths = paths.astype(jnp.uint32)
        self.normals = Normals() if normals is None else normals

    def at(self, steps: Int[Array, " steps"] | UInt32[Array, " steps"]) -> "Stream":
        """The random numbers of the given steps."""
        return Stream(self.key, steps, self.paths)

    def of_path(self, path: UInt32[Array, ""]) -> "Source":
        """The source of one path alone."""
        return Source(self.key, path[None], self.normals)


class Stream(eqx.Module):
    r"""Random numbers that depend on the seed, the step and the path, and on nothing else.

    The draw for step $k$, path $p$ and channel $c$ is
    $\mathrm{Threefry}_{\mathrm{key}_c}(k, p)$ (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"). Drawing steps in blocks, splitting an ensemble into chunks or adding paths
    to it therefore changes no number. Steps and paths are 32-bit counters.

    **Arguments:**

    - `key`: a JAX random key, typed (`jax.random.key`) or raw.
    - `steps`: `(K,)` step numbers of the block.
    - `paths`: `(R,)` path numbers.
    """

    key: UInt32[Array, "2"]
    steps: UInt32[Array, " steps"]
    paths: UInt32[Array, " paths"]

    def __init__(
        self,
        key: PRNGKeyArray | UInt32[Array, "2"],
        steps: Int[Array, " steps"] | UInt32[Array, " steps"],
        paths: Int[Array, " paths"] | UInt32[Array, " paths"],
    ):
        self.key = _words_of(key)
        self.steps = steps.astype(jnp.uint32)
        self.paths = paths.astype(jnp.uint32)

    def substream(self, index: int) -> "Stream":
        """An independent stream with the same steps and paths, e.g. one per regularizer."""
        return Stream(jax.random.key_data(self._fold(index)), self.steps, self.paths)

    def at_steps(self, steps: Int[Array, " other"] | UInt32[Array, " other"]) -> "Stream":
        """The same stream at other steps (or epochs)."""
        return Stream(self.key, steps, self.paths)

    def _fold(self, index: int | UInt32[Array, ""]) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.wrap_key_data(self.key, impl="threefry2x32"), index)

    def _words(
        self, shape: tuple[int, ...]
    ) -> tuple[UInt32[Array, "steps *shape paths"], UInt32[Array, "steps *shape paths"]]:
        """Two independent 32-bit words for every step, channel and path."""
        channels = int(np.prod(shape, dtype=int))
        block = (self.steps.size, channels, self.paths.size)
        keys = jax.random.key_data(
            jax.vmap(self._fold)(jnp.arange(channels, dtype=jnp.uint32))
        ).reshape(channels, 2)
        words = jax.vmap(_threefry, in_axes=(0, 1, 1), out_axes=1)(
            keys,
            jnp.broadcast_to(self.steps[:, None, None], block),
            jnp.broadcast_to(self.paths[None, None, :], block),
        )
        full = (self.steps.size, *shape, self.paths.size)
        return words[0].reshape(full), words[1].reshape(full)

    def uniforms(self, shape: tuple[int, ...] = ()) -> Float[Array, "steps *shape paths"]:
        """Uniform numbers in $[0, 1)$ with all mantissa bits random, `(K, *shape, R)`."""
        a, b = self._words(shape)
        if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            bits = (a.astype(jnp.uint64) << 32) | b.astype(jnp.uint64)
            one_to_two = (bits >> 12) | jnp.uint64(0x3FF0000000000000)
            return jax.lax.bitcast_convert_type(one_to_two, jnp.float64) - 1.0
        return jax.lax.bitcast_convert_type((a >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0

    def normals(self, shape: tuple[int, ...] = ()) -> Float[Array, "steps *shape paths"]:
        r"""Standard normals $\sqrt2\,\mathrm{erf}^{-1}(2u - 1)$, `(K, *shape, R)`."""
        u = self.uniforms(shape)
        lowest = jnp.nextafter(jnp.asarray(-1.0, u.dtype), jnp.asarray(0.0, u.dtype))
        symmetric = jnp.maximum(lowest, u * (1.0 - lowest) + lowest)
        return jnp.sqrt(jnp.asarray(2.0, u.dtype)) * jax.lax.erf_inv(symmetric)

    def integers(
        self, bounds: Int[Array, "*shape"], shape: tuple[int, ...]
    ) -> Int[Array, "steps *shape paths"]:
        r"""Integers uniform on $\{0, ..., m - 1\}$ for `bounds` $m$ (shape `shape`).

        Multiply-high on 32 random bits: the probabilities differ from $1/m$ by less than
        $2^{-32}$.
        """
        word, _ = self._words(shape)
        m = bounds.astype(jnp.uint32)[None, ..., None]
        return _multiply_high(word, m).astype(jnp.int32)

    def booleans(self, probability: Float[Array, ""], shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """True with the given probability, `(K, *shape, R)`."""
        return self.uniforms(shape) < probability

    def permutations(self, n: int) -> Int[Array, "steps {n} paths"]:
        """Uniform random permutations of $0..n-1$, one per step and path: sorted random keys.

        Keys are 64 bits wide (32 without x64): a tie has probability below $n^2 2^{-53}$.
        """
        return jnp.argsort(self.uniforms((n,)), axis=1).astype(jnp.int32)


def _words_of(key: PRNGKeyArray | UInt32[Array, "2"]) -> UInt32[Array, "2"]:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(key) if typed else key


def _multiply_high(a: UInt32[Array, "..."], b: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The upper 32 bits of the 64-bit product, without 64-bit integers (they need x64)."""
    low = jnp.uint32(0xFFFF)
    a_high, a_low = a >> 16, a & low
    b_high, b_low = b >> 16, b & low
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    carry = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> 16) + (carry >> 16)
