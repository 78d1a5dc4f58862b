"""Second moments: the checks on given ones and the quantities derived from them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gradflow.backend.tracing import is_traced
from gradflow.data.base import Given
from gradflow.data.roots import eigenpairs, matrix_root

ASYMMETRY = 1e-10
"""Largest tolerated asymmetry or negative eigenvalue of a moment matrix, relative to its size."""

SINGLE_PRECISION_ASYMMETRY = 1e-5


class Derived(NamedTuple):
    """What every dynamics needs of the moments, computed once."""

    eigenvalues: Float[Given, " d_in"]
    eigenvectors: Float[Given, "d_in d_in"]
    residual_sqrt: Float[Given, "d_out d_out"]
    best_map: Float[Given, "d_out d_in"]


def derive(
    sxx: Float[Given, "d_in d_in"],
    syx: Float[Given, "d_out d_in"],
    syy: Float[Given, "d_out d_out"],
    x: Float[Given, "n d_in"] | None = None,
    y: Float[Given, "n d_out"] | None = None,
) -> Derived:
    r"""Eigenvectors of $\Sigma_{xx}$, the best linear map and the root of the residual covariance.

    With $B = \Sigma_{yx}\Sigma_{xx}^+$ the residual covariance is $\mathbb E[ee^\top]$ of
    $e = y - Bx$, over the samples if there are any, else from the moments as
    $\Sigma_{yy} - B\Sigma_{xy} - \Sigma_{yx}B^\top + B\Sigma_{xx}B^\top$. Its error is of second
    order in the error of $B$.

    **Raises:** `ValueError` if the map or the residual covariance overflows.
    """
    eigenvalues, eigenvectors = eigh(sxx)
    with np.errstate(over="ignore", invalid="ignore"):
        best_map, residual = _explained(sxx, syx, syy, eigenvalues, eigenvectors, x, y)
    if not is_traced(best_map, residual) and not np.all(np.isfinite(best_map.sum() + residual)):
        raise ValueError(
            "data: the least-squares map of these moments, or what it leaves unexplained, "
            "overflows; rescale inputs and targets to sizes near 1."
        )
    # Noiseless data leave rounding errors of the size of syy, not of the residual.
    residual, scale = symmetrized(residual), abs(syy).max()
    spread, axes = eigh(residual, scale)
    if is_traced(residual, spread):
        return Derived(eigenvalues, eigenvectors, matrix_root(residual, spread, axes), best_map)
    return Derived(eigenvalues, eigenvectors, (axes * np.sqrt(spread)) @ axes.T, best_map)


def _explained(
    sxx: Float[Given, "d_in d_in"],
    syx: Float[Given, "d_out d_in"],
    syy: Float[Given, "d_out d_out"],
    eigenvalues: Float[Given, " d_in"],
    eigenvectors: Float[Given, "d_in d_in"],
    x: Float[Given, "n d_in"] | None,
    y: Float[Given, "n d_out"] | None,
) -> tuple[Float[Given, "d_out d_in"], Float[Given, "d_out d_out"]]:
    """The best map and the covariance of what it leaves unexplained."""
    if is_traced(sxx):
        best_map = _traced_best_map(sxx, syx)
    else:
        kept = eigenvalues > 0
        basis = eigenvectors[:, kept]
        best_map = (syx @ basis / eigenvalues[kept]) @ basis.T
    if x is not None and y is not None:
        error = y - x @ best_map.T
        residual = error.T @ error / len(x)
    else:
        explained = best_map @ syx.T
        residual = syy - explained - explained.T + best_map @ sxx @ best_map.T
    return best_map, residual


def _traced_best_map(
    sxx: Float[Given, "d_in d_in"], syx: Float[Given, "d_out d_in"]
) -> Float[Given, "d_out d_in"]:
    cutoff = 100 * len(sxx) * np.finfo(working_dtype()).eps
    return syx @ jnp.linalg.pinv(sxx, rtol=cutoff, hermitian=True)


def eigh(
    matrix: Float[Given, "d d"], scale: Any = None
) -> tuple[Float[Given, " d"], Float[Given, "d d"]]:
    """Eigenvalues (ascending, those within rounding of zero set to 0) and eigenvectors.

    "Within rounding" is below `100 d eps` times `scale`, by default the largest eigenvalue; `eps`
    is that of the floating-point type JAX computes in.
    """
    share = 100 * len(matrix) * np.finfo(working_dtype()).eps
    if is_traced(matrix, scale):
        eigenvalues, eigenvectors = eigenpairs(jnp.asarray(matrix))
        largest = eigenvalues[-1] if scale is None else scale
        return jnp.where(eigenvalues > share * largest, eigenvalues, 0.0), eigenvectors
    eigenvalues, eigenvectors = np.linalg.eigh(matrix)
    cutoff = share * (eigenvalues[-1] if scale is None else scale)
    return np.where(eigenvalues > max(cutoff, 0.0), eigenvalues, 0.0), eigenvectors


def working_dtype() -> np.dtype:
    """The floating-point type JAX computes in: float64, or float32 with 64-bit switched off."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.float64))


def rounded(array: Float[Given, "..."]) -> Float[Given, "..."]:
    """Double precision with the digits of the type JAX computes in."""
    dtype = working_dtype()
    return array.astype(dtype) if is_traced(array) else array.astype(dtype).astype(np.float64)


def symmetrized(matrix: Float[Given, "d d"]) -> Float[Given, "d d"]:
    """The symmetric part of a matrix."""
    return (matrix + matrix.T) / 2


def check_covariance(matrix: Float[Given, "d d"], field: str, tolerance: float) -> None:
    """Check that a matrix is symmetric and positive semidefinite; traced ones pass, here and below.

    **Raises:** `ValueError` with the worst pair of entries or the negative eigenvalue.
    """
    if is_traced(matrix):
        return
    asymmetry = np.abs(matrix - matrix.T)
    i, j = (int(k) for k in np.unravel_index(asymmetry.argmax(), matrix.shape))
    if asymmetry[i, j] > tolerance * np.abs(matrix).max():
        raise ValueError(
            f"{field}: is not symmetric, entry ({i}, {j}) is {matrix[i, j]} but ({j}, {i}) is "
            f"{matrix[j, i]}; pass ({field} + {field}.T) / 2."
        )
    smallest = np.linalg.eigvalsh(symmetrized(matrix))[0]
    if smallest < -tolerance * np.abs(matrix).max():
        raise ValueError(
            f"{field}: is not a covariance, its smallest eigenvalue is {smallest:.6g}; "
            "second moments E[v v^T] have no negative eigenvalue."
        )


def check_range(
    sxx: Float[Given, "d_in d_in"], syx: Float[Given, "d_out d_in"], tolerance: float
) -> None:
    """Check that targets correlate only with inputs that vary: `syx` lies in the range of `sxx`.

    **Raises:** `ValueError` with the size of the part that does not.
    """
    if is_traced(sxx, syx):
        return
    eigenvalues, eigenvectors = eigh(sxx)
    null = eigenvectors[:, eigenvalues == 0]
    outside = float(np.abs(syx @ null).max(initial=0.0))
    if outside > tolerance * np.abs(syx).max():
        raise ValueError(
            f"data.syx: has a part of size {outside:.6g} outside the range of sxx (rank "
            f"{null.shape[0] - null.shape[1]} of {null.shape[0]}): the targets correlate with "
            "inputs that never occur; correct sxx, project syx onto its range, or rescale inputs "
            "of very different size."
        )


def check_joint(
    sxx: Float[Given, "d_in d_in"],
    syx: Float[Given, "d_out d_in"],
    syy: Float[Given, "d_out d_out"],
    tolerance: float,
) -> None:
    """Check that `[[sxx, sxy], [syx, syy]]` is a possible moment matrix of inputs and targets.

    **Raises:** `ValueError` with the smallest eigenvalue of the joint correlation matrix.
    """
    if is_traced(sxx, syx, syy):
        return
    joint = np.block([[sxx, syx.T], [syx, syy]])
    size = np.sqrt(np.maximum(np.diag(joint), 0.0))
    size[size == 0] = 1.0
    smallest = np.linalg.eigvalsh(joint / size / size[:, None])[0]
    if smallest < -tolerance:
        raise ValueError(
            f"data.syy: the joint moments [[sxx, sxy], [syx, syy]] have a negative eigenvalue "
            f"({smallest:.6g} once scaled to unit diagonal), so no data have them; syy must be at "
            "least syx sxx^-1 sxy. Leave syy out for noiseless targets."
        )
