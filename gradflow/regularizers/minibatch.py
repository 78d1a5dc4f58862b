"""Minibatches: the noise of SGD itself."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gradflow.backend.products import product
from gradflow.backend.tracing import float_of
from gradflow.backend.types import EndToEnd
from gradflow.data import Regression
from gradflow.random.streams import Stream
from gradflow.regularizers.base import (
    REGULARIZERS,
    AbstractBatch,
    NoiseMoments,
    population_rows,
    symmetric_normal,
)

MOST_ROWS = 2**31 - 1
"""Rows are counted in 32 bits."""


def _plain_integer(value: Any) -> Any:
    """A NumPy integer, as a sweep over an array gives it, as a Python one."""
    return int(value) if isinstance(value, np.integer) else value


@REGULARIZERS.register
class Minibatch(AbstractBatch):
    r"""Each step uses `batch_size` rows of the data instead of all of them.

    On a finite sample the rows are drawn without replacement within a step (default), with
    replacement, or from a random permutation that is reshuffled every epoch (the $n \bmod b$ rows
    left over at the end of an epoch are skipped in it). On population data each step draws
    `batch_size` fresh Gaussian rows with the given moments: online SGD, and the two flags must
    stay False.

    The gradient noise has end-to-end covariance $f\,\mathrm{Cov}_k[e_k x_k^\top]$ with $f = 1/b$
    with replacement and online, $f = (n - b)/(b (n - 1))$ without.

    **Arguments:**

    - `batch_size`: $b \ge 1$ rows.
    - `replacement`: draw rows with replacement.
    - `reshuffled`: go through a fresh random permutation of the data each epoch.
    """

    batch_size: int = eqx.field(static=True, converter=_plain_integer)
    replacement: bool = eqx.field(static=True, default=False)
    reshuffled: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        integer = isinstance(self.batch_size, int) and not isinstance(self.batch_size, bool)
        if not integer or self.batch_size < 1:
            raise ValueError(
                f"Minibatch.batch_size must be an integer >= 1; got {self.batch_size!r}."
            )
        if self.batch_size > MOST_ROWS:
            raise ValueError(
                f"Minibatch.batch_size must be at most {MOST_ROWS}; got "
                f"{float_of(self.batch_size):.3g}."
            )
        if self.replacement and self.reshuffled:
            raise ValueError(
                "Minibatch.reshuffled: an epoch visits every row once, which contradicts "
                "replacement=True; set only one of the two."
            )

    @property
    def is_stochastic(self) -> bool:
        """True."""
        return True

    def size(self) -> int:
        """`batch_size`."""
        return self.batch_size

    def check(self, data: Regression) -> None:
        """Raise a `ValueError` if the data have too few rows or no rows to choose from."""
        if data.x is None:
            for flag in ("replacement", "reshuffled"):
                if getattr(self, flag):
                    raise ValueError(
                        f"Minibatch.{flag}=True needs a finite sample, but the data are population "
                        f"moments, where every batch is fresh; set {flag}=False."
                    )
        elif self.batch_size > data.x.shape[0] and not self.replacement:
            raise ValueError(
                f"Minibatch.batch_size={self.batch_size} exceeds the {data.x.shape[0]} rows of the "
                "data; choose at most that many or set replacement=True."
            )

    def draw(self, stream: Stream, data: Regression) -> Array:
        """Row numbers `(K, b, R)`, or normals `(K, b, d_0 + d_N, R)` for population data."""
        if data.x is None:
            return stream.normals((self.batch_size, data.d_in + data.d_out))
        n = data.x.shape[0]
        if self.reshuffled:
            return self._epoch_rows(stream, n)
        if self.replacement:
            bounds = jnp.full((self.batch_size,), n)
            return stream.integers(bounds, (self.batch_size,))
        return _distinct(stream, n, self.batch_size)

    def _epoch_rows(self, stream: Stream, n: int) -> Int[Array, "steps batch paths"]:
        steps_per_epoch = n // self.batch_size
        epochs_touched = -(-(stream.steps.size - 1) // steps_per_epoch) + 1
        first_epoch = stream.steps[0] // steps_per_epoch
        epochs = stream.at_steps(first_epoch + jnp.arange(epochs_touched, dtype=jnp.uint32))
        order = epochs.permutations(n)
        which = (stream.steps // steps_per_epoch - first_epoch).astype(jnp.int32)
        start = (stream.steps % steps_per_epoch).astype(jnp.int32) * self.batch_size
        positions = start[:, None] + jnp.arange(self.batch_size)
        return order[which[:, None], positions]

    def rows(
        self, draw: Array, data: Regression, root: Float[Array, "d_in d_in"]
    ) -> tuple[Float[Array, "batch d_in"], Float[Array, "batch d_out"]]:
        """The chosen rows, or fresh rows of the population online."""
        if data.x is None or data.y is None:
            return population_rows(draw, data, root)
        return data.x[draw], data.y[draw]

    def normal_shape(self, data: Regression) -> tuple[int, ...]:
        """One normal per row of a finite sample; `(d_0 + d_N, d_0)` for population data."""
        if data.x is None:
            return (data.d_in + data.d_out, data.d_in)
        return (data.x.shape[0],)

    def increment(self, moments: NoiseMoments, normals: Array) -> EndToEnd:
        r"""The factor of $f\,\mathrm{Cov}[e x^\top]$.

        Finite sample: $\sqrt{f/n} \sum_k \zeta_k (e_k x_k^\top - M)$. Population, by Isserlis:
        $b^{-1/2} ( M S^{-1/2} \tfrac{\Xi + \Xi^\top}{\sqrt 2} S^{1/2}
        + \Sigma_\eta^{1/2} \Xi' S^{1/2} )$.

        **Raises:** `ValueError` for `reshuffled=True`, whose steps are correlated in time.
        """
        self._check_white()
        data = moments.data
        if data.x is None or data.y is None:
            d_in = data.d_in
            whitened = product(moments.m, moments.inverse_root)
            carried = product(whitened, symmetric_normal(normals[:d_in]))
            residual = product(moments.residual_root, normals[d_in:])
            return product(carried + residual, moments.root) / jnp.sqrt(float(self.batch_size))
        n = data.x.shape[0]
        errors = product(data.x, moments.p, (1, 1)) - data.y
        weighted = product(normals[:, None] * errors, data.x, (0, 0))
        weighted = weighted - jnp.sum(normals) * moments.m
        return jnp.sqrt(self._fraction(n) / n) * weighted

    def covariance(self, moments: NoiseMoments) -> Float[Array, "outputs outputs"]:
        r"""$f\,\mathrm{Cov}_k[\mathrm{vec}(e_k x_k^\top)]$ over the samples or the population.

        On a Gaussian population $\tfrac1b \left( (M S^{-1} M^\top + \Sigma_\eta)_{ac} S_{ik}
        + M_{ak} M_{ci} \right)$ for the entries $ai, ck$.

        **Raises:** `ValueError` for `reshuffled=True`, whose steps are correlated in time.
        """
        self._check_white()
        data = moments.data
        if data.x is None or data.y is None:
            m, whitened = moments.m, moments.m @ moments.inverse_root
            errors = whitened @ whitened.T + moments.residual_root @ moments.residual_root.T
            total = jnp.einsum("ac,ik->aick", errors, data.sxx) + jnp.einsum("ak,ci->aick", m, m)
            return total.reshape(m.size, m.size) / self.batch_size
        n = data.x.shape[0]
        if data.fourth_moments is not None:
            total = data.fourth_moments.of_gradient(moments.p - data.best_map)
            return self._fraction(n) * total.reshape(moments.m.size, moments.m.size)
        errors = data.x @ moments.p.T - data.y
        outer = (errors[:, :, None] * data.x[:, None, :]).reshape(n, -1) - moments.m.ravel()
        return self._fraction(n) / n * (outer.T @ outer)

    @property
    def is_multiplicative(self) -> bool:
        """True: the second moment of the inputs differs from batch to batch."""
        return True

    def feedback(
        self, moments: NoiseMoments, spread: Float[Array, "d_out d_in d_out d_in"]
    ) -> Float[Array, "d_out d_in d_out d_in"]:
        r"""$f\,\mathrm{Cov}_k[\rho\, x_k x_k^\top]$ over the rows.

        With $X_{ac} = E[\rho_a \rho_c^\top]$ this is $f (E_k[(x_k^\top X_{ac} x_k)\, x_k x_k^\top]
        - S X_{ac} S)$ on a finite sample and $\tfrac1b (\mathrm{tr}(X_{ac} S)\, S
        + S X_{ac}^\top S)$ on a Gaussian population.

        **Raises:** `ValueError` for `reshuffled=True`, whose steps are correlated in time.
        """
        self._check_white()
        data = moments.data
        s = data.sxx
        if data.x is None:
            traces = jnp.einsum("ajcl,jl->ac", spread, s)
            crossed = jnp.einsum("ij,alcj,lk->aick", s, spread, s)
            return (jnp.einsum("ac,ik->aick", traces, s) + crossed) / self.batch_size
        n = data.x.shape[0]
        if data.fourth_moments is not None:
            return self._fraction(n) * data.fourth_moments.of_spread(spread)
        squares = jnp.einsum("rj,rl->rjl", data.x, data.x)
        forms = jnp.einsum("rjl,ajcl->rac", squares, spread)
        rows = jnp.einsum("rac,rik->aick", forms, squares) / n
        return self._fraction(n) * (rows - jnp.einsum("ij,ajcl,lk->aick", s, spread, s))

    def _check_white(self) -> None:
        if self.reshuffled:
            raise ValueError(
                "Minibatch.reshuffled=True correlates the steps of an epoch, so white noise does "
                "not describe it; use reshuffled=False for stochastic flows and predictions."
            )

    def _fraction(self, n: int) -> float:
        """$f$: the variance of a batch mean over that of one row."""
        b = self.batch_size
        return 1.0 / b if self.replacement else (n - b) / (b * max(n - 1, 1))


def _distinct(stream: Stream, n: int, size: int) -> Int[Array, "steps batch paths"]:
    """Uniform subsets of `size` of `n` rows: Floyd's algorithm, all steps and paths at once."""
    last = jnp.arange(n - size, n)
    candidates = stream.integers(last + 1, (size,))

    def choose(i: Int[Array, ""], chosen: Array) -> Array:
        candidate = jax.lax.dynamic_index_in_dim(candidates, i, axis=1)
        taken = jnp.any(chosen == candidate, axis=1, keepdims=True)
        row = jnp.where(taken, last[i].astype(jnp.int32), candidate)
        return jax.lax.dynamic_update_index_in_dim(chosen, row, i, axis=1)

    nobody = jnp.full_like(candidates, -1)
    return jax.lax.fori_loop(0, size, choose, nobody)
