"""The spectrum of the Hessian: whole when it is small, its density when it is large."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from matfree import decomp

from gradflow.backend.compiled import compiled
from gradflow.backend.types import Scalar
from gradflow.data import Regression
from gradflow.geometry.base import as_problem
from gradflow.geometry.curvature import LARGEST_DENSE_HESSIAN, never_invariant
from gradflow.geometry.hessian import dense_hessian, flat_hessian
from gradflow.network import DeepLinear
from gradflow.problem import Problem


class SpectralDensity(eqx.Module):
    r"""The distribution of the eigenvalues of a Hessian, as a quadrature rule.

    $$\frac1n \sum_j f(\lambda_j) \approx \frac1q \sum_{p=1}^q \sum_{k=1}^m \omega_{pk}
      f(\theta_{pk}), \qquad \sum_k \omega_{pk} = 1.$$

    For one random vector with $m$ nodes the rule is exact for polynomials of degree $2m - 1$; what
    is left is the spread over the vectors, which `mean` reports.

    - `nodes`: $\theta$, `(q, m)`, in units of the Hessian; each row ascending.
    - `weights`: $\omega$, `(q, m)`.
    """

    nodes: Float[Array, "probes steps"]
    weights: Float[Array, "probes steps"]

    @property
    def resolution(self) -> Scalar:
        r"""The range of the spectrum over $m$: finer structure is not resolved in its bulk."""
        return (jnp.max(self.nodes) - jnp.min(self.nodes)) / self.nodes.shape[1]

    def mean(
        self, function: Callable[[Float[Array, "probes steps"]], Float[Array, "probes steps"]]
    ) -> tuple[Scalar, Scalar]:
        r"""The mean of $f$ over the eigenvalues, $\mathrm{tr} f(H) / n$, and its standard error."""
        each = jnp.sum(self.weights * function(self.nodes), axis=1)
        return jnp.mean(each), jnp.std(each, ddof=1) / jnp.sqrt(len(each))

    def on_grid(
        self, points: Float[Array, " points"], width: ArrayLike | None = None
    ) -> Float[Array, " points"]:
        r"""The density at given points, each node smoothed by a normal of the given width.

        Its integral over the whole line is 1.

        **Arguments:**

        - `points`: where, in units of the Hessian.
        - `width`: standard deviation of the normal; by default `resolution`.
        """
        sigma = self.resolution if width is None else jnp.asarray(width)
        nodes, weights = self.nodes.ravel(), self.weights.ravel() / len(self.nodes)
        z = (points[:, None] - nodes) / sigma
        return jnp.exp(-0.5 * z**2) @ weights / (sigma * jnp.sqrt(2.0 * jnp.pi))


def hessian_spectrum(net: DeepLinear, data: Regression | Problem) -> Float[Array, " parameters"]:
    r"""All eigenvalues of the Hessian of the loss, ascending, from the dense Hessian.

    **Arguments:**

    - `net`: the network.
    - `data`: a `Regression`, or a `Problem`, whose averaged loss is then meant.

    **Raises:** `ValueError` if the widths of network and data differ, or beyond
    `LARGEST_DENSE_HESSIAN` parameters.
    """
    data = as_problem(net, data)
    if net.num_parameters > LARGEST_DENSE_HESSIAN:
        raise ValueError(
            f"net: the dense Hessian of {net.num_parameters} parameters is too large (limit "
            f"{LARGEST_DENSE_HESSIAN}); use extreme_eigenvalues for the ends of the spectrum, "
            "spectral_density for its shape, or minima_spectrum at a minimum."
        )
    return _dense_spectrum(net, data)


@compiled
def _dense_spectrum(net: DeepLinear, data: Regression | Problem) -> Float[Array, " parameters"]:
    return jnp.linalg.eigvalsh(dense_hessian(net, data))


@compiled
def spectral_density(
    net: DeepLinear,
    data: Regression | Problem,
    *,
    key: PRNGKeyArray,
    probes: int = 16,
    steps: int = 64,
) -> SpectralDensity:
    r"""The density of the Hessian's eigenvalues, for any size, by stochastic Lanczos quadrature.

    $m$ Lanczos steps from a random vector of signs give the nodes $\theta_k$, eigenvalues of the
    tridiagonal matrix, and the weights $\omega_k$, squares of the first entries of its
    eigenvectors.

    **Arguments:**

    - `net`, `data`: as in `hessian_spectrum`.
    - `key`: of the random vectors; the same key gives the same density.
    - `probes`: $q \ge 2$, random vectors; the error falls as $1/\sqrt q$.
    - `steps`: $m \ge 1$, nodes for each; at most the number of parameters are used. Structure
        narrower than the range of the spectrum over $m$ is not resolved.

    **Returns:** a `SpectralDensity`.

    **Raises:** `ValueError` if the widths of network and data differ, `probes < 2` or `steps < 1`.

    **Source:** Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature",
    SIAM J. Matrix Anal. Appl. 38 (2017) 1075.
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, to give a standard error; got {probes}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}.")
    matrix = flat_hessian(net, data)
    size, dtype = net.num_parameters, net.weights[0].dtype
    decompose = decomp.tridiag_sym(min(steps, size), reortho="full", custom_vjp=False)
    signs = jax.random.rademacher(key, (probes, size), dtype)
    nudged = never_invariant(matrix, signs[0] / jnp.sqrt(size))

    def rule(
        start: Float[Array, " parameters"],
    ) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
        found = decompose(nudged, start)
        values, vectors = jnp.linalg.eigh(found.J_small)
        return values, vectors[0] ** 2

    return SpectralDensity(*jax.lax.map(rule, signs))
