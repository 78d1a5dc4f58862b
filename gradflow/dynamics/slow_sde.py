"""A stochastic differential equation on a manifold, in cells of the Brownian path."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.dynamics.layers import added
from gradflow.geometry.base import OutputLoss
from gradflow.geometry.manifold import pseudo_inverse
from gradflow.loss import push_forward
from gradflow.random.streams import Source

BRIDGE_TOLERANCE = 2.0**-12
"""Finest division of a cell in which the Brownian path is resolved when a run is saved."""

Drift = Callable[[Weights], Weights]
"""The expected velocity of one path, at weights on the manifold."""

Diffusion = Callable[[Weights, Float[Array, " normals"]], Weights]
"""The diffusion factor at the weights, applied to a Brownian increment."""

Retraction = Callable[[Weights], Weights]
"""Back to the manifold along its normals."""


def advance_in_cells(
    drift: Drift,
    diffusion: Diffusion,
    retraction: Retraction,
    size: int,
    anchor: Weights,
    cell: Scalar,
    first: Int[Array, ""],
    last: Int[Array, ""],
    stop: Scalar,
    source: Source,
) -> tuple[Weights, Weights]:
    r"""One path of $dW = a\, dt + B(W)\, d\beta$ on a manifold, on to flow time `stop`.

    Time is divided into cells of equal length $\Delta$. The path goes from the beginning of one
    cell, its `anchor`, to that of the next, and what is asked for inside a cell is reached from
    there on a side branch: saving a run changes no bit of it. The Brownian increment over a cell is
    addressed by seed, cell and path, and is bridged within the cell.

    **Arguments:**

    - `size`: number of independent Brownian motions.
    - `anchor`: the path at the beginning of cell number `first`, a `cell` being a flow time long.
    - `last`: the number of the cell in which `stop` lies.
    - `source`: the random numbers of this one path.

    **Returns:** the weights at `stop`, and the anchor before it.
    """

    def normals(index: Int[Array, ""]) -> Float[Array, " normals"]:
        return source.at(index[None]).normals((size,))[0, :, 0]

    def whole(index: Int[Array, ""], weights: Weights) -> Weights:
        increment = jnp.sqrt(cell) * normals(index)
        return _step(drift, diffusion, retraction, weights, cell, increment)

    anchor = jax.lax.fori_loop(first, last, whole, anchor)
    rest = jnp.maximum(stop - last * cell, 0.0)
    share = jnp.minimum(rest / cell, 1.0)
    bridge = _bridge(source, last, size, share)
    increment = jnp.sqrt(cell) * (share * normals(last) + bridge)
    return _step(drift, diffusion, retraction, anchor, rest, increment), anchor


def noise_square_rates(
    diffusion: Diffusion, size: int, weights: Weights, loss: OutputLoss
) -> Float[Array, " depth"]:
    r"""What noise along the manifold adds to the expected $d|W_i|^2/dt$ of every layer, `(N,)`.

    $$\sum_c |b_{c,i}|^2 + 2 \langle W_i, n_i \rangle, \qquad
      n = -\tfrac12 \tilde J^+ \sum_c D^2 P[b_c, b_c]\, S^{1/2}$$

    with the columns $b_c$ of the factor and the Ito correction $n$, normal to the manifold.
    """
    columns = jax.vmap(lambda unit: diffusion(weights, unit))(jnp.eye(size, dtype=loss.s.dtype))

    def bend(column: Weights) -> EndToEnd:
        return jax.jvp(lambda w: push_forward(w, column), (weights,), (column,))[1]

    curved = jnp.sum(jax.vmap(bend)(columns), axis=0) @ loss.root
    normal = pseudo_inverse(weights, loss.root)(-0.5 * curved)
    rates = [
        jnp.sum(b * b) + 2.0 * jnp.sum(w * n)
        for b, w, n in zip(columns, weights, normal, strict=True)
    ]
    return jnp.stack(rates)


def _step(
    drift: Drift,
    diffusion: Diffusion,
    retraction: Retraction,
    weights: Weights,
    length: Scalar,
    increment: Float[Array, " normals"],
) -> Weights:
    r"""A step of weak order 1 in its length; its drift alone is integrated to order 2.

    $$W_* = R(W + a(W)\, \Delta + B(W)\, \Delta\beta), \qquad
      W_+ = R\left( W + \tfrac12 (a(W) + a(W_*))\, \Delta + B(W)\, \Delta\beta \right)$$

    with the retraction $R$. The noise is taken at the beginning of the step, as Ito's integral
    does. The Ito correction that keeps a process on the manifold,
    $\tfrac12 \sum_c \mathrm{II}(b_c, b_c)\, \Delta$ with its second fundamental form, is normal,
    and is what the retraction adds: its step is normal up to terms of third order in
    $\Delta\beta$, whose mean is $O(\Delta^2)$.
    """
    velocity = drift(weights)
    noise = diffusion(weights, increment)
    ahead = retraction(_moved(weights, length, velocity, noise))
    mean = tuple(0.5 * (a + b) for a, b in zip(velocity, drift(ahead), strict=True))
    return retraction(_moved(weights, length, mean, noise))


def _moved(weights: Weights, length: Scalar, velocity: Weights, noise: Weights) -> Weights:
    return added(added(weights, tuple(length * v for v in velocity)), noise)


def cells_before(time: Scalar, cell: Scalar) -> Int[Array, ""]:
    """The number of whole cells before a time; rounding does not start a new one too late."""
    return jnp.floor(time / cell * (1.0 + 1e-12)).astype(jnp.int32)


def _bridge(
    source: Source,
    cell: Int[Array, ""],
    size: int,
    share: Scalar,
) -> Float[Array, " normals"]:
    """A Brownian bridge over the unit interval at one point of it, the same for every point."""
    words = jax.random.wrap_key_data(source.key, impl="threefry2x32")
    own = jax.random.fold_in(jax.random.fold_in(words, cell), source.paths[0])
    shape = jax.ShapeDtypeStruct((size,), share.dtype)
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, BRIDGE_TOLERANCE, shape, own)
    now, end = (jnp.asarray(tree.evaluate(t)) for t in (share, jnp.ones_like(share)))
    return now - share * end
