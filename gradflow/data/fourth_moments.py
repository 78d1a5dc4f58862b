r"""Fourth moments of a finite sample: how rows differ in what they say of the gradient.

With the best map $B$ and the residual $r_k = B x_k - y_k$ of a row, the end-to-end gradient of the
row is

$$e_k x_k^\top = (P - B)\, x_k x_k^\top + r_k x_k^\top,$$

linear in $w_k = (x_k x_k^\top, r_k x_k^\top)$. So all that noise of minibatches depends on is the
covariance of $w$ over the rows, at every $P$. Splitting off $B$ keeps what is left of data that are
fitted almost exactly: no large numbers cancel.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.backend.types import EndToEnd

MOST_WORK = 5_000_000_000
"""Multiplications that forming them may cost when data are made: a tenth of a second or two."""


class FourthMoments(eqx.Module):
    r"""Covariances over the rows of a sample, of the entries of $x x^\top$ and $r x^\top$.

    - `inputs`: $\mathrm{Cov}[x_j x_i, x_l x_k]$ at $jlik$, `(d_0, d_0, d_0, d_0)`.
    - `mixed`: $\mathrm{Cov}[x_j x_i, r_c x_k]$ at $jcik$, `(d_0, d_N, d_0, d_0)`.
    - `residuals`: $\mathrm{Cov}[r_a x_i, r_c x_k]$ at $acik$, `(d_N, d_N, d_0, d_0)`.
    """

    inputs: Float[Array, "d_in d_in d_in d_in"]
    mixed: Float[Array, "d_in d_out d_in d_in"]
    residuals: Float[Array, "d_out d_out d_in d_in"]

    def of_gradient(self, off: EndToEnd) -> Float[Array, "d_out d_in d_out d_in"]:
        r"""$\mathrm{Cov}_k[e_k x_k^\top]$ for the entries $ai, ck$, where `off` is $P - B$."""
        crossed = jnp.einsum("aj,jcik->aick", off, self.mixed)
        carried = self.of_spread(jnp.einsum("aj,cl->ajcl", off, off))
        own = jnp.einsum("acik->aick", self.residuals)
        return carried + crossed + jnp.einsum("aick->ckai", crossed) + own

    def of_spread(
        self, spread: Float[Array, "d_out d_in d_out d_in"]
    ) -> Float[Array, "d_out d_in d_out d_in"]:
        r"""$\mathrm{Cov}_k[\rho\, x_k x_k^\top]$ for random $\rho$ of mean square `spread`."""
        return jnp.einsum("ajcl,jlik->aick", spread, self.inputs)


def fourth_moments(
    x: Float[np.ndarray, "n d_in"],
    y: Float[np.ndarray, "n d_out"],
    best_map: Float[np.ndarray, "d_out d_in"],
    dtype: np.dtype,
) -> FourthMoments | None:
    """The fourth moments of a sample; None where the rows themselves are the shorter way.

    That is where the moments have more entries than the products of which they are moments, cost
    more than `MOST_WORK`, or overflow.

    **Arguments:**

    - `x`, `y`: the rows.
    - `best_map`: $B$.
    - `dtype`: of the result; sums are in double precision.
    """
    (n, d_in), d_out = x.shape, y.shape[1]
    size = (d_in + d_out) * d_in
    if size > n or n * size**2 > MOST_WORK:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        u = np.concatenate([x, x @ best_map.T - y], axis=1)
        w = (u[:, :, None] * x[:, None, :]).reshape(n, size)
        w = w - w.mean(axis=0)
        shape = (d_in + d_out, d_in) * 2
        moments = (w.T @ w / n).reshape(shape).transpose(0, 2, 1, 3).astype(dtype)
    if not np.all(np.isfinite(moments)):
        return None
    of_x, of_r = slice(d_in), slice(d_in, None)
    return FourthMoments(
        jnp.asarray(moments[of_x, of_x]),
        jnp.asarray(moments[of_x, of_r]),
        jnp.asarray(moments[of_r, of_r]),
    )
