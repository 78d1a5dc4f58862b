"""Loss, gradients and the end-to-end gradient of deep linear regression."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from gradflow.backend.products import product
from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.checks import check_fit
from gradflow.data import Regression
from gradflow.network import DeepLinear, end_to_end


def pull_back(weights: Weights, m: EndToEnd) -> Weights:
    r"""The gradient with respect to every layer of a function of $P$ with gradient $M$.

    $$g_i = A_i^\top M B_i^\top, \quad A_i = W_N \cdots W_{i+1}, \quad B_i = W_{i-1} \cdots W_1.$$

    `m` is `(d_N, d_0)`; $g_i$ has the shape of $W_i$.
    """
    above = [m]  # A_i^T M, last layer first
    for w in reversed(weights[1:]):
        above.append(product(w, above[-1], (0, 0)))
    above.reverse()
    gradients = [above[0]]
    below = None  # B_i, the identity for the first layer is never formed
    for w, left in zip(weights[:-1], above[1:], strict=True):
        below = w if below is None else product(w, below)
        gradients.append(product(left, below, (1, 1)))
    return tuple(gradients)


def push_forward(weights: Weights, tangent: Weights) -> EndToEnd:
    r"""The change of the end-to-end matrix $dP = \sum_i A_i V_i B_i$ under a change $V$."""
    return jax.jvp(end_to_end, (weights,), (tangent,))[1]


def second_moment(data: Regression, variance: ArrayLike) -> Float[Array, "d_in d_in"]:
    r"""$S_{xx} + \sigma^2 I$, that of inputs with noise of the given variance."""
    return data.sxx + variance * jnp.eye(data.d_in, dtype=data.sxx.dtype)


def on_inputs(p: EndToEnd, data: Regression, variance: ArrayLike = 0.0) -> EndToEnd:
    r"""$P (S_{xx} + \sigma^2 I)$, with noise of the given variance on the inputs.

    White inputs cost no product: a seventh of a gradient of depth 3.
    """
    if data.is_white:
        return _on_white(p, data.sxx) + variance * p
    return product(p, second_moment(data, variance))


@jax.custom_jvp
def _on_white(p: EndToEnd, sxx: Float[Array, "d_in d_in"]) -> EndToEnd:
    """$P S_{xx}$ where $S_{xx} = I$, with the derivatives of the product."""
    return p


@_on_white.defjvp
def _on_white_jvp(
    primals: tuple[EndToEnd, Array], tangents: tuple[EndToEnd, Array]
) -> tuple[EndToEnd, EndToEnd]:
    p, _ = primals
    dp, ds = tangents
    return p, dp + product(p, ds)


def moment_loss(
    p: EndToEnd,
    sxx: Float[Array, "d_in d_in"],
    syx: EndToEnd,
    syy: Float[Array, "d_out d_out"],
) -> Scalar:
    r"""$\tfrac12 \mathrm{tr}(P S P^\top) - \langle P, Y\rangle + \tfrac12 \mathrm{tr} S_{yy}$."""
    return 0.5 * jnp.sum(product(p, sxx) * p) - jnp.sum(p * syx) + 0.5 * jnp.trace(syy)


def end_to_end_gradient(net: DeepLinear, data: Regression) -> EndToEnd:
    r"""$M = \partial L / \partial P = P S - Y$, `(d_N, d_0)`, with $S = S_{xx}$, $Y = S_{yx}$."""
    _check_match(net, data)
    return on_inputs(net.end_to_end, data) - data.syx


def loss(net: DeepLinear, data: Regression) -> Scalar:
    r"""The regression loss $L = \tfrac12 E|W_N \cdots W_1 x - y|^2$.

    A mean over the samples of a finite sample, an expectation for population data; a loss without
    the 1/2 is a step size of twice the size.

    **Raises:** `TypeError` for a `Problem`, of which `averaged_loss` is the loss, or anything else
    that is no network or no data; `ValueError` if the widths of network and data differ.
    """
    _check_match(net, data)
    return moment_loss(net.end_to_end, data.sxx, data.syx, data.syy)


def gradient(net: DeepLinear, data: Regression) -> Weights:
    r"""The gradient of `loss` with respect to every layer, $g_i = A_i^\top M B_i^\top$.

    **Raises:** `TypeError` for a `Problem`, of which `averaged_loss` is the loss, or anything else
    that is no network or no data; `ValueError` if the widths of network and data differ.
    """
    m = end_to_end_gradient(net, data)
    return pull_back(net.weights, m)


def per_sample_gradients(net: DeepLinear, data: Regression) -> Weights:
    r"""The gradient of every sample's loss $\tfrac12 |f(x_k) - y_k|^2$, each `(n, d_i, d_{i-1})`.

    $g_i^{(k)} = A_i^\top e_k x_k^\top B_i^\top$ with $e_k = P x_k - y_k$; their mean over $k$ is
    `gradient`.

    **Raises:** `ValueError` for population data, which have no samples.
    """
    _check_match(net, data)
    if data.x is None or data.y is None:
        raise ValueError(
            "data: population data have no samples, so no per-sample gradients; build the data "
            "with Regression.from_samples(x, y)."
        )
    errors = data.x @ net.end_to_end.T - data.y
    outer = errors[:, :, None] * data.x[:, None, :]
    return jax.vmap(pull_back, in_axes=(None, 0))(net.weights, outer)


def _check_match(net: DeepLinear, data: Regression) -> None:
    swapped = (
        " Functions of both take the network first, then the data."
        if isinstance(net, Regression)
        else ""
    )
    if not isinstance(net, DeepLinear):
        raise TypeError(f"net must be a DeepLinear; got {type(net).__name__}.{swapped}")
    if not isinstance(data, Regression):
        fix = ""
        if isinstance(getattr(data, "data", None), Regression):
            fix = (
                " Give problem.data for the loss of the data alone; that with the regularizers is "
                "problem.averaged_loss(net.weights), its gradient problem.averaged_gradient."
            )
        raise TypeError(f"data must be a Regression; got {type(data).__name__}.{fix}")
    check_fit("net: widths", net.widths, data.d_in, data.d_out)
