"""What is done to samples before their moments are taken: dropping, standardising, whitening."""

from typing import Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gradflow.backend.tracing import is_traced
from gradflow.data.base import Given, Table, list_names
from gradflow.data.roots import eigenpairs, inverse_root

Standardize: TypeAlias = bool | Literal["inputs", "targets", "both"]

STANDARDIZE_CHOICES = {
    True: ("inputs", "targets"),
    "both": ("inputs", "targets"),
    "inputs": ("inputs",),
    "targets": ("targets",),
    False: (),
}

ROUNDING = 16 * np.finfo(np.float64).eps
"""A column whose spread is below this fraction of its largest entry counts as constant."""

SINGULAR = 1e-12
"""Smallest over largest singular value of the inputs below which they cannot be whitened."""


def preprocess(table: Table, standardize: object, whiten: bool, drop_constant: bool) -> Table:
    """Apply the chosen steps in order: drop constant inputs, standardise, whiten the inputs."""
    if not isinstance(standardize, str | bool) or standardize not in STANDARDIZE_CHOICES:
        raise ValueError(
            f"data.standardize: got {standardize!r}; choose 'inputs', 'targets', 'both' (or True) "
            "or False."
        )
    parts = STANDARDIZE_CHOICES[standardize]
    x, y, input_names = table.x, table.y, table.input_names
    if drop_constant:
        if is_traced(x):
            raise TypeError(
                "data.drop_constant: which columns are constant is not known inside jit, vmap and "
                "grad; drop them before."
            )
        kept = ~constant_columns(x)
        if not kept.any():
            raise ValueError("data.x: every column is constant; there is nothing to learn from.")
        x = x[:, kept]
        input_names = tuple(name for name, keep in zip(input_names, kept, strict=True) if keep)
    if "inputs" in parts:
        x = standardized(x, "data.x", input_names, "drop them (drop_constant=True)")
    if "targets" in parts:
        y = standardized(y, "data.y", table.target_names, "leave them out")
    if whiten:
        x = whitened(x)
    return Table(x, y, input_names, table.target_names)


def constant_columns(x: Float[Given, "n d"]) -> np.ndarray:
    """Which columns are constant up to rounding, boolean `(d,)`; traced ones are taken to vary."""
    if is_traced(x):
        return np.zeros(x.shape[1], bool)
    x = _rescaled(np.asarray(x))
    return np.ptp(x, axis=0) <= ROUNDING * np.abs(x).max(axis=0)


def standardized(
    x: Float[Given, "n d"], field: str, names: tuple[str, ...], fix: str
) -> Float[Given, "n d"]:
    """Every column minus its mean, divided by its population standard deviation.

    **Raises:** `ValueError` listing the constant columns, if there are any.
    """
    constant = np.flatnonzero(constant_columns(x))
    if len(constant):
        listed = list_names([names[k] for k in constant])
        raise ValueError(
            f"{field}: cannot standardise constant columns {listed} ('{names[constant[0]]}' is "
            f"{x[0, constant[0]]} in every row); {fix}, or do not standardise."
        )
    x = x if is_traced(x) else _rescaled(np.asarray(x))
    x = x - x.mean(axis=0)
    return x / x.std(axis=0)


def whitened(x: Float[Given, "n d"]) -> Float[Given, "n d"]:
    r"""Symmetrically whitened inputs $\tilde x = \Sigma_{xx}^{-1/2} x$ with identity second moment.

    Computed as $\sqrt n$ times the polar factor of the sample matrix, which is accurate to
    rounding and keeps every new column as close as possible to the old one.

    **Raises:** `ValueError` if the second moment of the inputs is singular.
    """
    if is_traced(x):
        moment = x.T @ x / x.shape[0]
        return jnp.asarray(x) @ inverse_root(moment, *eigenpairs(moment))
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    rank = int(np.sum(singular > SINGULAR * singular[0]))
    if rank < x.shape[1]:
        raise ValueError(
            f"data.x: cannot be whitened, the covariance of its {x.shape[1]} columns over "
            f"{x.shape[0]} samples is singular (rank {rank}); use more samples, drop columns that "
            "are combinations of others (drop_constant=True drops constant ones), or pass "
            "whiten=False."
        )
    return np.sqrt(x.shape[0]) * (left @ right)


def _rescaled(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Columns scaled by a power of two (exactly) to order one, so that squares cannot overflow."""
    exponent = np.frexp(np.abs(x).max(axis=0))[1]
    return np.ldexp(x, -exponent)
