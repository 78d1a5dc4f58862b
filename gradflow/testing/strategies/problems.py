"""Strategies for whole problems: network and data that fit, step sizes that are stable, seeds."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from gradflow.backend.compiled import compiled
from gradflow.backend.types import Scalar, Weights
from gradflow.geometry import sharpness
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.testing.strategies.building import Draw, ValueOrStrategy, composite
from gradflow.testing.strategies.data import data
from gradflow.testing.strategies.networks import networks
from gradflow.testing.strategies.regularizers import checked_kinds, regularizers as _regularizers

SHARES = (1.0, 0.5, 0.1, 0.01)
"""Step sizes relative to the largest one allowed."""

PATH_POINTS = 16
"""Points of the descent at which the sharpness is taken."""

STEPS_BETWEEN = 4
"""Steps of descent from one of these points to the next."""

MOST_TRIALS = 60
"""Step sizes tried before the search for a stable one is given up."""


@composite
def problems(
    draw: Draw,
    depth: ValueOrStrategy[int] | None = None,
    widths: ValueOrStrategy[tuple[int, ...]] | None = None,
    imbalance: ValueOrStrategy[float] | None = None,
    conditioning: float | None = None,
    *,
    population: bool | None = None,
    n: ValueOrStrategy[int] | None = None,
    whitened: bool | None = None,
    data_conditioning: float | None = None,
    regularizers: Sequence[str] | None = (),
    min_depth: int = 1,
    max_depth: int = 4,
    max_width: int = 4,
) -> tuple[Problem, DeepLinear]:
    """A problem and a network that fits it.

    **Arguments:**

    - `depth`, `widths`, `imbalance`, `conditioning`, `min_depth`, `max_depth`, `max_width`: of the
        network, as in `networks`.
    - `population`, `n`, `whitened`, `data_conditioning`: of the data, as in `data`.
    - `regularizers`: the kinds to draw from, as in `regularizers`; none by default, None for
        every kind.

    **Returns:** a strategy for pairs (problem, net).
    """
    kinds = checked_kinds(regularizers)
    net = draw(
        networks(
            depth,
            widths,
            imbalance,
            conditioning,
            min_depth=min_depth,
            max_depth=max_depth,
            max_width=max_width,
        )
    )
    drawn = draw(
        data(net.widths[0], net.widths[-1], population, n, data_conditioning, whitened=whitened)
    )
    chosen = draw(_regularizers(drawn, kinds, net.depth)) if kinds else []
    return Problem(drawn, chosen), net


def seeds() -> st.SearchStrategy[int]:
    """Seeds for `jax.random.key`; they shrink to 0."""
    return st.integers(0, 2**31 - 1)


def step_sizes(
    problem: Problem, net: DeepLinear, fraction: float = 0.5
) -> st.SearchStrategy[float]:
    r"""Round step sizes at which descent is stable; they shrink to the largest one.

    At most `fraction` times `stability_limit(problem, net)`, rounded down to one digit; also a
    half, a tenth and a hundredth of that.

    **Arguments:**

    - `fraction`: between 0 and 1, by default half of the limit.

    **Raises:** `ValueError` for a fraction outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1]; got {fraction}.")
    largest = fraction * stability_limit(problem, net, fraction)
    return st.sampled_from([_rounded_down(share * largest) for share in SHARES])


def stability_limit(problem: Problem, net: DeepLinear, fraction: float = 0.5) -> float:
    r"""A step size of at most $2/\lambda_{\max}$, below which descent is stable along its path.

    $\lambda_{\max}$ is the largest eigenvalue of the Hessian of the averaged loss, at the network
    and at points along 64 steps of descent with step size `fraction` times the result. Larger steps
    that were tried first and met larger eigenvalues make the result smaller; it is at most 1.
    """
    top = float(sharpness(net, problem.data)) if not problem.regularizers else 0.0
    limit = 1.0
    for _ in range(MOST_TRIALS):
        limit = min(1.0, 2.0 / top) if top > 0.0 else 1.0
        along = float(_path_sharpness(problem, net.weights, jnp.asarray(fraction * limit)))
        if along <= 1.01 * max(top, 2.0):
            return min(limit, 2.0 / along) if along > 2.0 else limit
        top = along if math.isfinite(along) and along < 4.0 * top else max(4.0 * top, 4.0)
    raise ValueError(
        f"problem: descent from this network is unstable at every step size down to {limit}; give "
        "networks and data of smaller entries."
    )


@compiled
def _path_sharpness(problem: Problem, weights: Weights, step_size: Scalar) -> Scalar:
    """The largest eigenvalue of the Hessian along a descent."""
    start, unravel = ravel_pytree(weights)

    def loss(w: Float[Array, " parameters"]) -> Scalar:
        return problem.averaged_loss(unravel(w))

    def stretch(
        w: Float[Array, " parameters"], _: None
    ) -> tuple[Float[Array, " parameters"], Scalar]:
        top = jnp.linalg.eigvalsh(jax.hessian(loss)(w))[-1]
        w = jax.lax.fori_loop(0, STEPS_BETWEEN, lambda _, v: v - step_size * jax.grad(loss)(v), w)
        return w, jnp.where(jnp.all(jnp.isfinite(w)), top, jnp.inf)

    _, tops = jax.lax.scan(stretch, start, None, length=PATH_POINTS)
    return jnp.max(tops)


def _rounded_down(number: float) -> float:
    """The number with one digit, not larger."""
    unit = 10.0 ** math.floor(math.log10(number))
    digit = math.floor(number / unit * (1 + 1e-12))
    return float(f"{digit}e{round(math.log10(unit))}")
