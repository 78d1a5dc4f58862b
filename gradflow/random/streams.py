"""Counter-based random streams addressed by step and path."""

from typing import Literal, cast, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from gradflow.random.normal_quantile import double_normals, single_normals

Law = Literal["gaussian", "two-point", "three-point"]
Precision = Literal["double", "single"]

SIXTH = round(2**32 / 6)
"""How many of the 32-bit words are a sixth of them, to a relative 2e-10."""

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
"""Of the rounds of Threefry-2x32, four by four."""

PARITY = 0x1BD11BDA
"""The constant from which the third word of its key schedule is made."""


@jax.jit
def threefry(
    key: UInt32[Array, "2 ..."], first: UInt32[Array, "*s"], second: UInt32[Array, "*s"]
) -> tuple[UInt32[Array, "*s"], UInt32[Array, "*s"]]:
    """Encrypt the counter pairs `(first, second)` under `key` (Threefry-2x32, 20 rounds).

    The words of JAX's own generator, whose rounds are a loop on CPUs; written out, they become one
    loop over the numbers together with all that is made of them.

    **Source:** Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(PARITY))
    a, b = first + schedule[0], second + schedule[1]
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            a = a + b
            b = a ^ (b << np.uint32(distance) | b >> np.uint32(32 - distance))
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


class Normals(eqx.Module):
    r"""What stands for the standard normals of a run.

    **Arguments:**

    - `law`: "gaussian"; or random numbers with as many moments right as a weak order needs:
        "two-point", $\pm 1$, has those up to the third (order 1), "three-point",
        $\pm\sqrt3$ with probability 1/6 each and otherwise 0, those up to the fifth (order 2).
        Means over paths keep their order in the step size; paths and densities mean nothing
        (Kloeden and Platen 1992, chapter 14). For stochastic flows only.
    - `antithetic`: the normals of replicas $2q$ and $2q + 1$ are opposite; everything else that is
        drawn stays independent. Every replica has the same law as without. Replicas of a pair are
        not independent of each other, so that standard errors are those of pairs: much smaller for
        what is nearly odd in the noise, such as mean weights, and up to $\sqrt2$ times larger for
        what is nearly even, such as the loss on its floor, or gradients of fresh Gaussian rows.
    - `precision`: "single" makes the normals from 32 random bits in single precision. They end at
        6.3 instead of 8.2 and are off by $2 \cdot 10^{-6}$ at most; the dynamics stay in double
        precision. It saves little, since the random bits cost the same: on two cores runs of
        10,000 scalar paths took 4 % less time (15 % less with increments of two values).

    **Raises:** `ValueError` naming the argument that makes no sense.
    """

    law: Law = eqx.field(static=True)
    antithetic: bool = eqx.field(static=True)
    precision: Precision = eqx.field(static=True)

    def __init__(
        self,
        law: Law | str = "gaussian",
        antithetic: bool = False,
        precision: Precision | str = "double",
    ):
        for name, given, choices in (("law", law, Law), ("precision", precision, Precision)):
            if given not in get_args(choices):
                raise ValueError(
                    f"Normals.{name} must be one of {', '.join(map(repr, get_args(choices)))}; got "
                    f"{given!r}."
                )
        if not isinstance(antithetic, bool):
            raise ValueError(f"Normals.antithetic must be True or False; got {antithetic!r}.")
        if law != "gaussian" and precision == "single":
            raise ValueError(
                f"Normals.precision='single' has no effect on the {law} law, whose numbers are "
                "exact; leave it out."
            )
        self.law, self.antithetic = cast(Law, law), antithetic
        self.precision = cast(Precision, precision)


class Source(eqx.Module):
    """Where the random numbers of an ensemble come from.

    **Arguments:**

    - `key`: a JAX random key, typed (`jax.random.key`) or raw.
    - `paths`: `(R,)` path numbers.
    - `kind`: what stands for the standard normals.
    """

    key: UInt32[Array, "2"]
    paths: UInt32[Array, " paths"]
    kind: Normals

    def __init__(
        self,
        key: PRNGKeyArray | UInt32[Array, "2"],
        paths: Int[Array, " paths"] | UInt32[Array, " paths"],
        kind: Normals | None = None,
    ):
        self.key = _words_of(key)
        self.paths = paths.astype(jnp.uint32)
        self.kind = Normals() if kind is None else kind

    def at(self, steps: Int[Array, " steps"] | UInt32[Array, " steps"]) -> "Stream":
        """The random numbers of the given steps."""
        return Stream(self.key, steps, self.paths, self.kind)

    def of_path(self, path: UInt32[Array, ""]) -> "Source":
        """The source of one path alone."""
        return Source(self.key, path[None], self.kind)


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
    - `kind`: what `normals` gives; default: normals of full precision.
    """

    key: UInt32[Array, "2"]
    steps: UInt32[Array, " steps"]
    paths: UInt32[Array, " paths"]
    kind: Normals

    def __init__(
        self,
        key: PRNGKeyArray | UInt32[Array, "2"],
        steps: Int[Array, " steps"] | UInt32[Array, " steps"],
        paths: Int[Array, " paths"] | UInt32[Array, " paths"],
        kind: Normals | None = None,
    ):
        self.key = _words_of(key)
        self.steps = steps.astype(jnp.uint32)
        self.paths = paths.astype(jnp.uint32)
        self.kind = Normals() if kind is None else kind

    def substream(self, index: int) -> "Stream":
        """An independent stream with the same steps and paths, e.g. one per regularizer."""
        key = jnp.stack(self._keys(jnp.asarray(index, jnp.uint32)))
        return Stream(key, self.steps, self.paths, self.kind)

    def at_steps(self, steps: Int[Array, " other"] | UInt32[Array, " other"]) -> "Stream":
        """The same stream at other steps (or epochs)."""
        return Stream(self.key, steps, self.paths, self.kind)

    def _keys(self, index: UInt32[Array, "*s"]) -> tuple[UInt32[Array, "*s"], UInt32[Array, "*s"]]:
        """The keys that `jax.random.fold_in` makes of this one."""
        return threefry(self.key, jnp.zeros_like(index), index)

    def _words(
        self, shape: tuple[int, ...], paths: UInt32[Array, " paths"] | None = None
    ) -> tuple[UInt32[Array, "steps *shape paths"], UInt32[Array, "steps *shape paths"]]:
        """Two independent 32-bit words for every step, channel and path."""
        paths = self.paths if paths is None else paths
        channels = int(np.prod(shape, dtype=int))
        block = (self.steps.size, channels, paths.size)
        keys = jnp.stack(self._keys(jnp.arange(channels, dtype=jnp.uint32)))
        words = threefry(
            keys[:, None, :, None],
            jnp.broadcast_to(self.steps[:, None, None], block),
            jnp.broadcast_to(paths, block),
        )
        full = (self.steps.size, *shape, paths.size)
        return words[0].reshape(full), words[1].reshape(full)

    def uniforms(self, shape: tuple[int, ...] = ()) -> Float[Array, "steps *shape paths"]:
        """Uniform numbers in $[0, 1)$ with all mantissa bits random, `(K, *shape, R)`."""
        a, b = self._words(shape)
        if _is_double():
            bits = (a.astype(jnp.uint64) << 32) | b.astype(jnp.uint64)
            one_to_two = (bits >> 12) | jnp.uint64(0x3FF0000000000000)
            return jax.lax.bitcast_convert_type(one_to_two, jnp.float64) - 1.0
        return jax.lax.bitcast_convert_type((a >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0

    def normals(self, shape: tuple[int, ...] = ()) -> Float[Array, "steps *shape paths"]:
        """Standard normals, or what stands for them, `(K, *shape, R)`."""
        kind = self.kind
        pairs = self.paths >> 1 if kind.antithetic else None
        high, low = self._words(shape, pairs)
        if kind.law == "two-point":
            numbers = jnp.where(high >> 31 == 0, 1.0, -1.0)
        elif kind.law == "three-point":
            size = jnp.where(high < np.uint32(SIXTH), np.sqrt(3.0), 0.0)
            numbers = jnp.where(high >= np.uint32(2**32 - SIXTH), -np.sqrt(3.0), size)
        elif kind.precision == "single" or not _is_double():
            numbers = single_normals(high).astype(jnp.result_type(float))
        else:
            numbers = double_normals(high, low)
        if kind.antithetic:
            return jnp.where(self.paths & 1 == 0, numbers, -numbers)
        return numbers

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


def _is_double() -> bool:
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def _multiply_high(a: UInt32[Array, "..."], b: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The upper 32 bits of the 64-bit product, without 64-bit integers (they need x64)."""
    low = jnp.uint32(0xFFFF)
    a_high, a_low = a >> 16, a & low
    b_high, b_low = b >> 16, b & low
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    carry = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> 16) + (carry >> 16)
