r"""The random numbers of a mechanism inside the network, and the directions in which they move $P$.

See `gradflow.theory.layer_noise` for the notation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.backend.types import EndToEnd, Weights
from gradflow.loss import pull_back
from gradflow.network import left_products, right_products, widths_of
from gradflow.regularizers.base import (
    AbstractActivationNoise,
    AbstractLayerNoise,
    AbstractWeightNoise,
)
from gradflow.regularizers.drop_connect import DropConnect
from gradflow.regularizers.dropout import Dropout


class Numbers(NamedTuple):
    r"""The random numbers of one mechanism.

    - `variances`: $v_u$.
    - `directions`: $W \mapsto (d_u(W))_u$, `(d_N, d_0, numbers)`.
    - `is_mask`: $\kappa$.
    """

    variances: Float[Array, " numbers"]
    directions: Callable[[Weights], Array]
    is_mask: bool

    def shifted(
        self, weights: Weights, w: Float[Array, "D d_in columns"]
    ) -> Float[Array, "d_out d_in numbers columns"]:
        r"""$d_u \hat S$ of each $w = (\hat M, \hat S)$."""
        s = w[weights[-1].shape[0] :]
        return jnp.einsum("oju,jic->oiuc", self.directions(weights), s)

    def residual(
        self, weights: Weights, w: Float[Array, "D d_in columns"]
    ) -> Float[Array, "d_out d_in _ columns"]:
        r"""$\hat M - \kappa\, d_u \hat S$ of each $w$; one for all numbers if $\kappa = 0$."""
        m = w[: weights[-1].shape[0], :, None]
        return m - self.shifted(weights, w) if self.is_mask else m

    def pulled(self, weights: Weights, m: Float[Array, "d_out d_in numbers"]) -> Weights:
        r"""$\sum_u \nabla_W \langle d_u, M_u \rangle$."""
        return jax.vjp(self.directions, weights)[1](m)[0]

    def bends(
        self, weights: Weights, root: Float[Array, "d_in d_in"]
    ) -> Float[Array, "outputs d_out d_in numbers"]:
        r"""$\tilde J\, \nabla_W \langle d_u, M \rangle$, by component: what multiplies $M$.

        The derivatives of the directions along the normals $\tilde J^\top e_a$.
        """

        def along(unit: EndToEnd) -> Float[Array, "d_out d_in numbers"]:
            return jax.jvp(self.directions, (weights,), (pull_back(weights, unit @ root),))[1]

        return jax.vmap(along)(unit_matrices(weights))


def is_mask(noise: AbstractLayerNoise) -> bool:
    r"""$\kappa$: whether the noise drops units or entries, where it could move them a little."""
    return isinstance(noise, DropConnect) or (
        isinstance(noise, Dropout) and noise.distribution == "bernoulli"
    )


def numbers_of(noise: AbstractLayerNoise, weights: Weights) -> Numbers:
    """The factors of the hidden units or the entries of the layers, layer by layer, row-major."""
    depth = len(weights)
    if isinstance(noise, AbstractActivationNoise):
        variances = [
            jnp.full((width,), noise.activation_variance(layer, depth))
            for layer, width in enumerate(widths_of(weights)[1:-1], start=1)
        ]
        return Numbers(jnp.concatenate(variances), unit_directions, is_mask(noise))
    if not isinstance(noise, AbstractWeightNoise):
        raise TypeError(f"noise: {type(noise).__name__} acts neither on units nor on weights.")
    masks, variances = is_mask(noise), []
    for layer, w in enumerate(weights, start=1):
        at, zero = jnp.ones_like(w) if masks else w, jnp.zeros_like(w)
        variances.append(noise.weight_variance(layer, depth, at, zero).ravel())
    directions = factor_directions if masks else entry_directions
    return Numbers(jnp.concatenate(variances), directions, masks)


def unit_directions(weights: Weights) -> Float[Array, "d_out d_in units"]:
    r"""$A_l[:, u]\, B_{l+1}[u, :]$ of every hidden unit: $dP$ by its factor."""
    lefts, rights = left_products(weights)[:-1], right_products(weights)[1:]
    pieces = [jnp.einsum("ou,ui->oiu", a, b) for a, b in zip(lefts, rights, strict=True)]
    return jnp.concatenate(pieces, axis=-1)


def entry_directions(weights: Weights) -> Float[Array, "d_out d_in parameters"]:
    r"""$A_l[:, j]\, B_l[k, :]$ of every entry of the layers: $dP$ by the entry."""
    pieces = [
        jnp.einsum("oj,ki->oijk", a, b).reshape(a.shape[0], b.shape[1], -1)
        for a, b in zip(left_products(weights), right_products(weights), strict=True)
    ]
    return jnp.concatenate(pieces, axis=-1)


def factor_directions(weights: Weights) -> Float[Array, "d_out d_in parameters"]:
    r"""$dP$ by a factor of every entry of the layers."""
    return entry_directions(weights) * jnp.concatenate([w.ravel() for w in weights])


def unit_matrices(weights: Weights) -> Float[Array, "outputs d_out d_in"]:
    """The matrices with one entry 1, row by row."""
    d_out, d_in = weights[-1].shape[0], weights[0].shape[1]
    return jnp.eye(d_out * d_in, dtype=weights[0].dtype).reshape(-1, d_out, d_in)
