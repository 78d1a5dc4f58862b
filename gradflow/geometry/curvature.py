"""Curvature of the loss: Hessian traces, sharpness, extreme eigenvalues, the kernel at minima."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int
from matfree import decomp

from gradflow.backend.compiled import compiled
from gradflow.backend.types import Scalar, Weights
from gradflow.data import Regression
from gradflow.geometry.base import as_problem, check_data, check_network
from gradflow.geometry.hessian import dense_hessian, flat_hessian
from gradflow.geometry.kernel import kernel_at
from gradflow.network import DeepLinear, left_products, right_products
from gradflow.problem import Problem
from gradflow.regularizers.averaged import layer_noises, output_moment
from gradflow.regularizers.base import AbstractPenalty
from gradflow.regularizers.weight_decay import WeightDecay
from gradflow.regularizers.weight_noise import WeightNoise

LARGEST_DENSE_HESSIAN = 2_000
"""Parameters up to which a whole Hessian is decomposed on request (32 MB in float64)."""

DENSE_SIZE = 256
"""Parameters up to which single eigenvalues come from the whole Hessian too."""

LANCZOS_STEPS = 48
"""Products with the Hessian in one cycle of the Lanczos iteration."""

MOST_CYCLES = 500
"""Cycles after which the iteration ends."""

TOLERANCE = 1e-10
"""Residual of an eigenpair, relative to the spectral norm, at which the iteration ends."""

ACCEPTED = 1e-6
"""Residual relative to the spectral norm, a bound on the error, above which a value is NaN."""

Matvec: TypeAlias = Callable[[Float[Array, " n"]], Float[Array, " n"]]


class ExtremeEigenvalues(NamedTuple):
    """Both ends of the spectrum, each ascending, `(k,)`."""

    smallest: Float[Array, " k"]
    largest: Float[Array, " k"]


class Eigenpair(NamedTuple):
    """An eigenvalue and its unit vector."""

    value: Scalar
    vector: Float[Array, " n"]


def hessian_block_traces(net: DeepLinear, data: Regression | Problem) -> Float[Array, " depth"]:
    r"""Traces of the Hessian's diagonal blocks, one a layer, `(N,)`.

    $$\tau_i = |A_i|^2\, \mathrm{tr}(B_i S B_i^\top).$$

    Exact at every point of weight space: $P$ is affine in each layer, so the residual does not
    enter. For a `Problem` they are those of the averaged loss: noise on the inputs is part of $S$,
    weight decay adds $\lambda\, d_i d_{i-1}$. With noise inside the network the traces come from
    the heat equation: independent noise of variance $v$ on the entries of $W_i$ raises a loss that
    is quadratic in $W_i$ by exactly $v \tau_i / 2$, and the second-moment recursion, affine in $v$,
    gives this expected loss.

    **Arguments:**

    - `net`: the network.
    - `data`: a `Regression`, or a `Problem`.

    **Raises:** `ValueError` if the widths of network and data differ, or for a penalty of your own
    on more than `LARGEST_DENSE_HESSIAN` parameters.
    """
    problem = as_problem(net, data)
    s, weights = problem.input_moment, net.weights
    if problem.layer_noise:
        traces = _noisy_block_traces(problem, weights)
    else:
        pairs = zip(left_products(weights), right_products(weights), strict=True)
        traces = jnp.stack([jnp.sum(a * a) * jnp.sum((b @ s) * b) for a, b in pairs])
    for penalty in problem.penalties:
        traces = traces + _penalty_block_traces(penalty, weights)
    return traces


def hessian_trace(net: DeepLinear, data: Regression | Problem) -> Scalar:
    r"""The trace of the Hessian of the loss, $\mathrm{tr} H = \sum_i \tau_i$; exact everywhere.

    The arguments and errors are those of `hessian_block_traces`.
    """
    return jnp.sum(hessian_block_traces(net, data))


def sharpness(net: DeepLinear, data: Regression | Problem) -> Scalar:
    r"""The largest eigenvalue $\lambda_{\max}$ of the Hessian of the loss, for any size.

    From the dense Hessian up to `DENSE_SIZE` parameters; beyond, restarted Lanczos iterations until
    the residual of the eigenpair, which bounds the error of the eigenvalue, is below `TOLERANCE`
    times the spectral norm; NaN if not even `ACCEPTED` is reached. It can be compiled, mapped over
    ensembles, and differentiated once: $d\lambda = v^\top dH\, v$.

    **Arguments:**

    - `net`: the network.
    - `data`: a `Regression`, or a `Problem`, whose averaged loss is then meant.

    **Raises:** `ValueError` if the widths of network and data differ.
    """
    check_network(net)
    return _sharpness(net, data)


@compiled  # operation by operation, the products take seconds for every new shape
def _sharpness(net: DeepLinear, data: Regression | Problem) -> Scalar:
    data = as_problem(net, data)
    if net.num_parameters <= DENSE_SIZE:
        return jnp.linalg.eigvalsh(dense_hessian(net, data))[-1]
    still = flat_hessian(*jax.lax.stop_gradient((net, data)))
    top = jax.lax.stop_gradient(largest_eigenpair(still, _start(net, 0)))
    vector = jnp.where(jnp.isnan(top.value), jnp.nan, top.vector)
    return jnp.vdot(vector, flat_hessian(net, data)(vector))


def extreme_eigenvalues(
    net: DeepLinear, data: Regression | Problem, k: int = 1
) -> ExtremeEigenvalues:
    r"""The $k$ smallest and the $k$ largest eigenvalues of the Hessian of the loss.

    As `sharpness`, for any size; eigenvalues are counted with their multiplicity, and the smallest
    ones are negative near saddles.

    **Arguments:**

    - `net`, `data`: as in `sharpness`.
    - `k`: how many of each.

    **Returns:** an `ExtremeEigenvalues`.

    **Raises:** `ValueError` unless $1 \le k \le$ the number of parameters.
    """
    check_network(net)
    size = net.num_parameters
    if not isinstance(k, int) or not 1 <= k <= size:
        raise ValueError(f"k must be an integer from 1 to the {size} parameters; got {k!r}.")
    return _extreme_eigenvalues(net, data, k)


@compiled
def _extreme_eigenvalues(net: DeepLinear, data: Regression | Problem, k: int) -> ExtremeEigenvalues:
    data = as_problem(net, data)
    if net.num_parameters <= DENSE_SIZE:
        values = jnp.linalg.eigvalsh(dense_hessian(net, data))
        return ExtremeEigenvalues(values[:k], values[-k:])
    matrix = flat_hessian(net, data)
    starts = jnp.stack([_start(net, i) for i in range(k)])
    signs = jnp.array([-1.0, 1.0], starts.dtype)  # the smallest are the largest of -H
    first = jax.vmap(lambda sign: largest_eigenpair(lambda v: sign * matrix(v), starts[0]))(signs)

    def one_end(sign: Scalar, found: Eigenpair) -> Float[Array, " k"]:
        return _further_eigenvalues(lambda v: sign * matrix(v), starts, found, jnp.abs(first.value))

    lower, upper = jax.vmap(one_end)(signs, first)
    return ExtremeEigenvalues(jnp.sort(-lower), jnp.sort(upper))


class _Search(NamedTuple):
    vector: Float[Array, " n"]
    value: Scalar
    rest: Scalar
    cycles: Int[Array, ""]


def largest_eigenpair(
    matrix: Matvec, start: Float[Array, " n"], size: Scalar | float = 0.0
) -> Eigenpair:
    r"""The largest eigenvalue of a symmetric matrix and its unit vector, by restarted Lanczos.

    Each cycle starts from the best vector so far. Lanczos vectors are not orthogonalised again,
    so a value that has converged appears more than once in the tridiagonal matrix; the projector
    on all its copies, applied to the start, is what stays accurate (Druskin and Knizhnerman). The
    residual that ends the iteration is that of the vector itself.

    **Arguments:**

    - `matrix`: $v \mapsto A v$ on vectors `(n,)`.
    - `start`: a vector with a part along every eigenvector.
    - `size`: a number to which the residual is compared if it exceeds the spectral norm.
    """
    eps = float(jnp.finfo(start.dtype).eps)
    goal = max(TOLERANCE, 100.0 * eps)
    decompose = decomp.tridiag_sym(min(LANCZOS_STEPS, start.size), reortho="none", custom_vjp=False)
    first = start / jnp.linalg.norm(start)
    nudged = never_invariant(matrix, first)

    def unfinished(now: _Search) -> Bool[Array, ""]:
        return (now.rest > goal) & (now.cycles < MOST_CYCLES)  # NaN ends it

    def cycle(now: _Search) -> _Search:
        found = decompose(nudged, now.vector)
        values, vectors = jnp.linalg.eigh(found.J_small)
        norm = jnp.maximum(values[-1], -values[0])
        copies = jnp.where(values >= values[-1] - 0.1 * goal * norm, vectors[0], 0.0)
        seen = jnp.linalg.norm(copies) > eps
        parts = jnp.where(seen, vectors @ copies, vectors[:, -1])
        vector = parts @ jnp.asarray(found.Q_tall)
        vector = vector / jnp.linalg.norm(vector)
        image = matrix(vector)
        value = jnp.vdot(vector, image)
        rest = jnp.linalg.norm(image - value * vector) / jnp.maximum(norm, size)
        return _Search(vector, value, rest, now.cycles + 1)

    infinite = jnp.full((), jnp.inf, start.dtype)
    before = _Search(first, infinite, infinite, jnp.zeros((), int))
    end = jax.lax.while_loop(unfinished, cycle, before)
    # Where eigenvalues crowd, as the tiny ones at a minimum do, not every digit may come in time.
    settled = end.rest <= max(ACCEPTED, goal)
    return Eigenpair(jnp.where(settled, end.value, jnp.nan), end.vector)


def never_invariant(matrix: Matvec, start: Float[Array, " n"]) -> Matvec:
    r"""The matrix plus a diagonal at rounding level, `start` being a unit vector.

    Lanczos divides by zero as soon as its space is invariant, as for multiples of the identity;
    with the diagonal, far below every tolerance, it goes on.
    """
    scale = jnp.linalg.norm(matrix(start))
    scale = jnp.where(scale > 0.0, scale, 1.0)
    eps = float(jnp.finfo(start.dtype).eps)
    diagonal = scale * jnp.linspace(0.0, 30.0 * eps, start.size, dtype=start.dtype)
    return lambda v: matrix(v) + diagonal * v


def _further_eigenvalues(
    matrix: Matvec,
    starts: Float[Array, "k n"],
    first: Eigenpair,
    ends: Float[Array, "2"],
) -> Float[Array, " k"]:
    """The k largest eigenvalues: each one found is moved below all others, its copies remain.

    `ends` are the absolute values of the smallest and the largest eigenvalue.
    """
    k = len(starts)
    values = jnp.zeros(k, starts.dtype).at[0].set(first.value)
    locked = jnp.zeros_like(starts).at[0].set(first.vector)

    def find(
        i: Int[Array, ""], found: tuple[Float[Array, " k"], Float[Array, "k n"]]
    ) -> tuple[Float[Array, " k"], Float[Array, "k n"]]:
        values, locked = found

        def others(v: Float[Array, " n"]) -> Float[Array, " n"]:
            return matrix(v) - jnp.sum(ends) * ((locked @ v) @ locked)

        value, vector = largest_eigenpair(others, starts[i], jnp.max(ends))
        return values.at[i].set(value), locked.at[i].set(vector)

    return jax.lax.fori_loop(1, k, find, (values, locked))[0]


def _start(net: DeepLinear, i: int) -> Float[Array, " parameters"]:
    """A random vector, the same for the same i: another is needed for every copy of a value."""
    shape, dtype = (net.num_parameters,), net.weights[0].dtype
    return jax.random.normal(jax.random.key(i), shape, dtype)


def _noisy_block_traces(problem: Problem, weights: Weights) -> Float[Array, " depth"]:
    """From noise on the weights of one layer before all other noise, affine in its variance."""
    noises = layer_noises(problem.regularizers, len(weights))
    unit = jnp.ones((), weights[0].dtype)

    def trace(layer: int) -> Scalar:
        def second_moment(std: Scalar) -> Scalar:
            first = WeightNoise(std, layers=(layer,))
            return jnp.trace(output_moment(weights, problem.input_moment, [first, *noises]))

        return jax.jvp(second_moment, (unit,), (0.5 * unit,))[1]  # d(std^2) = 1

    return jnp.stack([trace(layer) for layer in range(1, len(weights) + 1)])


def _penalty_block_traces(penalty: AbstractPenalty, weights: Weights) -> Float[Array, " depth"]:
    sizes = [w.size for w in weights]
    if isinstance(penalty, WeightDecay):
        return penalty.rate * jnp.asarray(sizes, weights[0].dtype)
    if sum(sizes) > LARGEST_DENSE_HESSIAN:
        raise ValueError(
            f"regularizers: the trace of the Hessian of {type(penalty).__name__} needs a product "
            f"for each of the {sum(sizes)} parameters (limit {LARGEST_DENSE_HESSIAN}); leave it "
            "out and add its trace yourself, or estimate the whole with spectral_density."
        )
    flat, unravel = ravel_pytree(weights)

    def gradient(w: Float[Array, " parameters"]) -> Float[Array, " parameters"]:
        return ravel_pytree(penalty.penalty_gradient(unravel(w)))[0]

    diagonal = jnp.diag(jax.jacfwd(gradient)(flat))
    return jnp.stack([jnp.sum(part) for part in jnp.split(diagonal, np.cumsum(sizes)[:-1])])


def end_to_end_kernel(
    net: DeepLinear, data: Regression | Problem | Float[Array, "d_in d_in"]
) -> Float[Array, "outputs outputs"]:
    r"""$K = \sum_i A_i A_i^\top \otimes S^{1/2} B_i^\top B_i S^{1/2}$, `(d_N d_0, d_N d_0)`.

    On the minima manifold its spectrum is the nonzero spectrum of the Hessian; row-major vec.
    `data` may also be the second moment $S$ of the inputs.
    """
    check_network(net)
    if isinstance(data, Problem):
        return kernel_of_root(net.weights, data.noisy_root)
    if not eqx.is_array(data):
        check_data(data)
    s = data.sxx if isinstance(data, Regression) else data
    return kernel_of_root(net.weights, _square_root(s))


def kernel_of_root(
    weights: Weights, root: Float[Array, "d_in d_in"]
) -> Float[Array, "outputs outputs"]:
    r"""`end_to_end_kernel` with the root $S^{1/2}$ already taken."""
    return kernel_at(weights, root).matrix()


def minima_sharpness(weights: Weights, root: Float[Array, "d_in d_in"]) -> Scalar:
    r"""The largest eigenvalue of $K$: that of the Hessian at a minimum.

    From the dense kernel up to `LARGEST_DENSE_KERNEL`; beyond, from products with it, as
    `sharpness`.
    """
    kernel = kernel_at(weights, root)
    if not kernel.is_large:
        return jnp.linalg.eigvalsh(kernel.matrix())[-1]
    shape = weights[-1].shape[0], weights[0].shape[1]
    start = jax.random.normal(jax.random.key(0), (kernel.size,), root.dtype)
    return largest_eigenpair(lambda v: kernel(v.reshape(shape)).ravel(), start).value


def minima_spectrum(
    net: DeepLinear, data: Regression | Problem | Float[Array, "d_in d_in"]
) -> Float[Array, " outputs"]:
    r"""The nonzero Hessian spectrum at a minimum, ascending: the eigenvalues of $K$.

    Exact where $P S^{1/2} = T S^{1/2}$, whatever the size of the hidden layers. The residual of the
    optimization phase decays no slower than $e^{-\lambda t}$ with the smallest of them that is not
    zero (docs/theory.md section 9).

    For a `Problem` the noise on the inputs is part of $S$. Penalties are not included: on the
    manifold weight decay adds its rate to each of these eigenvalues and to the zeros.

    **Arguments:**

    - `net`: a network at a minimum.
    - `data`: a `Regression`, a `Problem`, or the second moment $S$ of the inputs.

    **Returns:** `(d_N d_0,)`, zeros among them where there are fewer parameters or directions.

    **Raises:** `ValueError` for noise inside the network, which has other minima.
    """
    check_minima(data, "minima_spectrum", "use hessian_spectrum or extreme_eigenvalues")
    return jnp.linalg.eigvalsh(end_to_end_kernel(net, data))


def check_minima(data: object, what: str, instead: str) -> None:
    """Raise a `ValueError` for noise inside the network, whose minima are not those of the data."""
    if isinstance(data, Problem) and data.layer_noise:
        names = ", ".join(type(r).__name__ for r in data.layer_noise)
        raise ValueError(
            f"{what}: {names} acts inside the network and moves the minima; {instead}."
        )


def _square_root(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.sqrt(jnp.clip(values, min=0.0))) @ vectors.T


@compiled
def smallest_positive(values: Float[Array, " k"]) -> Scalar:
    """The smallest entry above rounding level of the largest; the largest if all are zero."""
    top = jnp.max(values)
    floor = top * values.size * float(np.finfo(values.dtype).eps) * 10.0
    return jnp.min(jnp.where(values > floor, values, top))
