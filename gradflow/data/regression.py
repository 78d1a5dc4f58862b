"""Linear regression data, reduced to their second moments."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, ArrayLike, Float

from gradflow.backend.tracing import is_traced
from gradflow.data import moments
from gradflow.data.base import (
    Columns,
    Given,
    MatrixLike,
    Table,
    as_array,
    as_samples,
    column_names,
)
from gradflow.data.bundled import bundled_table
from gradflow.data.files import read_file
from gradflow.data.fourth_moments import FourthMoments, fourth_moments
from gradflow.data.preprocess import Standardize, preprocess


class Regression(eqx.Module):
    r"""Inputs $x$ and targets $y$ of the loss $L(P) = \tfrac12 \mathbb E|Px - y|^2$.

    $$L(P) = \tfrac12\,\mathrm{tr}(P \Sigma_{xx} P^\top) - \langle P, \Sigma_{yx}\rangle
             + \tfrac12\,\mathrm{tr}\,\Sigma_{yy}$$

    The second moments $\Sigma_{xx} = \mathbb E[xx^\top]$, $\Sigma_{yx} = \mathbb E[yx^\top]$,
    $\Sigma_{yy} = \mathbb E[yy^\top]$ are raw (no mean is subtracted unless the data are
    standardised). They are those of a population, taken to be Gaussian, or of a finite sample.
    Build one with `whitened`, `from_moments`, `from_samples`, `from_file` or `from_sklearn`.

    **Fields:**

    - `sxx` `(d_0, d_0)`, `syx` `(d_N, d_0)`, `syy` `(d_N, d_N)`: the second moments.
    - `sxx_eigenvalues` `(d_0,)`, `sxx_eigenvectors` `(d_0, d_0)`: of `sxx`, ascending; eigenvalues
        below `100 d_0 eps` times the largest are exactly 0, so that the rank is their count > 0.
    - `residual_sqrt` `(d_N, d_N)`: symmetric root of the covariance
        $\Sigma_{yy} - \Sigma_{yx}\Sigma_{xx}^+\Sigma_{xy}$ of what no linear map can explain.
    - `best_map` `(d_N, d_0)`: $\Sigma_{yx}\Sigma_{xx}^+$, the least-squares map of smallest norm.
    - `x` `(n, d_0)`, `y` `(n, d_N)`: the finite sample, or `None` for a population.
    - `fourth_moments`: those of the sample, from which the noise of minibatches follows at every
        network; `None` for a population, or where the rows are the shorter way.
    - `n`: number of samples whose noise is averaged in one step.
    - `name`, `input_names`, `target_names`: labels.
    - `is_white`: whether `sxx` is exactly the identity, so that products with it can be spared.
    """

    sxx: Float[Array, "d_in d_in"]
    syx: Float[Array, "d_out d_in"]
    syy: Float[Array, "d_out d_out"]
    sxx_eigenvalues: Float[Array, " d_in"]
    sxx_eigenvectors: Float[Array, "d_in d_in"]
    residual_sqrt: Float[Array, "d_out d_out"]
    best_map: Float[Array, "d_out d_in"]
    x: Float[Array, "samples d_in"] | None
    y: Float[Array, "samples d_out"] | None
    fourth_moments: FourthMoments | None
    n: Float[Array, ""]
    name: str = eqx.field(static=True)
    input_names: tuple[str, ...] = eqx.field(static=True)
    target_names: tuple[str, ...] = eqx.field(static=True)
    is_white: bool = eqx.field(static=True)

    @classmethod
    def whitened(
        cls,
        target: MatrixLike,
        n: ArrayLike = 1,
        residual: MatrixLike | None = None,
        name: str = "whitened",
        input_names: Sequence[str] | None = None,
        target_names: Sequence[str] | None = None,
    ) -> "Regression":
        r"""Population with $\Sigma_{xx} = I$, $\Sigma_{yx} = T$, $\Sigma_{yy} = TT^\top + R$.

        **Arguments:**

        - `target`: $T$, `(d_N, d_0)`; a number is a `(1, 1)` matrix.
        - `n`: number of samples whose noise is averaged in one step, at least 1.
        - `residual`: covariance $R$ of $y - Tx$, `(d_N, d_N)`, or a number $r$ for $R = rI$; none
            by default.
        - `name`, `input_names`, `target_names`: labels.

        **Raises:** `ValueError` if the target is not a matrix or the residual not a covariance.
        """
        matrix = as_array(target, "data.target")
        if matrix.ndim == 0:
            matrix = matrix[None, None]
        if matrix.ndim != 2:
            raise ValueError(
                f"data.target: needs shape (d_N, d_0), got {matrix.shape}; "
                "one target of many inputs is [[...]], many targets of one input [[.], [.]]."
            )
        d_out, d_in = matrix.shape
        with np.errstate(over="ignore"):
            syy = matrix @ matrix.T
        if not is_traced(syy) and not np.all(np.isfinite(syy)):
            raise ValueError(
                f"data.target: entries as large as {np.abs(matrix).max():.3g} overflow when "
                "squared; rescale the targets."
            )
        if residual is not None:
            covariance = as_array(residual, "data.residual")
            if covariance.ndim == 0:
                covariance = covariance * np.eye(d_out)
            _check_shape(covariance, (d_out, d_out), "data.residual", "target")
            moments.check_covariance(covariance, "data.residual", _tolerance(residual))
            syy = syy + covariance
        return cls._build(np.eye(d_in), matrix, syy, n, None, None, name, input_names, target_names)

    @classmethod
    def from_moments(
        cls,
        sxx: MatrixLike,
        syx: MatrixLike,
        syy: MatrixLike | None = None,
        n: ArrayLike = 1,
        name: str = "moments",
        input_names: Sequence[str] | None = None,
        target_names: Sequence[str] | None = None,
    ) -> "Regression":
        r"""Gaussian population with the given second moments.

        **Arguments:**

        - `sxx`: $\Sigma_{xx}$, `(d_0, d_0)`.
        - `syx`: $\Sigma_{yx}$, `(d_N, d_0)`, in the range of `sxx`.
        - `syy`: $\Sigma_{yy}$, `(d_N, d_N)`; by default $\Sigma_{yx}\Sigma_{xx}^+\Sigma_{xy}$, that
            is targets without noise.
        - `n`: number of samples whose noise is averaged in one step, at least 1.
        - `name`, `input_names`, `target_names`: labels.

        **Raises:** `ValueError` if the shapes do not match or no data have these moments.
        """
        tolerance = max(_tolerance(sxx), _tolerance(syx), _tolerance(syy))
        inputs = as_array(sxx, "data.sxx")
        cross = as_array(syx, "data.syx")
        if inputs.ndim != 2 or inputs.shape[0] != inputs.shape[1]:
            raise ValueError(f"data.sxx: needs shape (d_0, d_0), got {inputs.shape}.")
        if cross.ndim != 2 or cross.shape[1] != inputs.shape[1]:
            raise ValueError(
                f"data.syx: needs shape (d_N, d_0) = (d_N, {inputs.shape[1]}) to match sxx, got "
                f"{cross.shape}; it is E[y x^T], not its transpose."
            )
        moments.check_covariance(inputs, "data.sxx", tolerance)
        inputs = moments.symmetrized(inputs)
        moments.check_range(inputs, cross, tolerance)
        if syy is None:
            outputs = moments.symmetrized(
                moments.derive(inputs, cross, np.zeros((len(cross),) * 2)).best_map @ cross.T
            )
        else:
            outputs = as_array(syy, "data.syy")
            _check_shape(outputs, (len(cross),) * 2, "data.syy", "syx")
            moments.check_covariance(outputs, "data.syy", tolerance)
            moments.check_joint(inputs, cross, moments.symmetrized(outputs), tolerance)
        return cls._build(inputs, cross, outputs, n, None, None, name, input_names, target_names)

    @classmethod
    def from_samples(
        cls,
        x: MatrixLike,
        y: MatrixLike,
        standardize: Standardize = False,
        whiten: bool = False,
        drop_constant: bool = False,
        name: str = "samples",
        input_names: Sequence[str] | None = None,
        target_names: Sequence[str] | None = None,
    ) -> "Regression":
        r"""A finite sample, loss $\tfrac1{2n}\sum_k |P x_k - y_k|^2$.

        **Arguments:**

        - `x`: inputs `(n, d_0)`; a DataFrame brings its column names.
        - `y`: targets `(n, d_N)`, or `(n,)` for one target.
        - `standardize`: subtract the mean of each column and divide by its population standard
            deviation, for `"inputs"`, `"targets"`, `"both"` (or `True`) or neither (`False`).
        - `whiten`: then replace $x$ by $\Sigma_{xx}^{-1/2}x$, so that `sxx` is exactly the
            identity.
        - `drop_constant`: first drop the inputs that are constant (and their names).
        - `name`, `input_names`, `target_names`: labels.

        **Raises:** `ValueError` if shapes do not match, an entry is not a finite number, a column
        to standardise is constant, or inputs to whiten have a singular covariance.
        """
        labelled = pd.DataFrame | pd.Series
        if isinstance(x, labelled) and isinstance(y, labelled) and not x.index.equals(y.index):
            raise ValueError(
                "data.y: its row labels differ from those of x; align the two frames first, or "
                "pass x.to_numpy() and y.to_numpy() to pair rows by position."
            )
        inputs, input_names = as_samples(x, "data.x", "x", input_names)
        outputs, target_names = as_samples(y, "data.y", "y", target_names, vector_is_column=True)
        table = Table(inputs, outputs, input_names, target_names)
        return cls._from_table(table, name, standardize, whiten, drop_constant)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        inputs: Columns | None = None,
        targets: Columns | None = None,
        standardize: Standardize = True,
        whiten: bool = False,
        drop_constant: bool = False,
        header: bool = True,
        separator: str = ",",
        name: str | None = None,
    ) -> "Regression":
        """Read samples from a `.csv`, `.parquet` or `.npz` file.

        **Arguments:**

        - `path`: the file.
        - `inputs`, `targets`: columns by name or position. Inputs default to all columns but the
            targets; targets must be chosen. An `.npz` file holds one table `(rows, columns)`
            whose columns are chosen by position, or arrays that are chosen by name, by default
            `x` and `y`.
        - `standardize`, `whiten`, `drop_constant`: see `from_samples`.
        - `header`: whether the first line of a `.csv` file names the columns; otherwise they are
            called `column_0, column_1, ...`.
        - `separator`: what separates the columns of a `.csv` file.
        - `name`: label, by default the file's name without extension.

        **Raises:** `FileNotFoundError` if there is no such file; `ValueError` if it cannot be
        read, a column is missing (listing those that exist), is not numeric or has a gap, or as
        `from_samples` does.
        """
        table = read_file(path, inputs, targets, header, separator)
        label = Path(path).stem if name is None else name
        return cls._from_table(table, label, standardize, whiten, drop_constant)

    @classmethod
    def from_sklearn(
        cls,
        name: Literal["breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine"],
        standardize: Standardize = True,
        whiten: bool = False,
        targets: Columns | None = None,
        drop_constant: bool | None = None,
    ) -> "Regression":
        """One of the tables that come with scikit-learn; nothing is downloaded.

        **Arguments:**

        - `name`: `diabetes` (10 inputs, 1 target), `linnerud` (3, 3), or a classification table as
            regression onto one-hot classes: `iris` (4, 3), `wine` (13, 3), `breast_cancer` (30, 2),
            `digits` (64 pixels of which 3 are constant, 10).
        - `standardize`, `whiten`: see `from_samples`.
        - `targets`: which targets (or classes) to keep, by name or position; all by default.
        - `drop_constant`: drop constant inputs; by default only for `digits`. `input_names` tells
            which are left.

        **Raises:** `ValueError` if there is no such table or target, or as `from_samples` does.
        """
        drop = name == "digits" if drop_constant is None else drop_constant
        return cls._from_table(bundled_table(name, targets), name, standardize, whiten, drop)

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any] | None = None
    ) -> "Regression":
        """Rebuild data from `to_arrays()` and `attrs()`, bit for bit.

        **Raises:** `ValueError` if an array is missing.
        """
        needed = ("sxx", "syx", "syy", "n", *(("x", "y") if {"x", "y"} & set(arrays) else ()))
        missing = [name for name in needed if name not in arrays]
        if missing:
            raise ValueError(
                f"data: arrays {missing} are missing, there are {sorted(arrays)}; pass what "
                "to_arrays() returned (x and y both or neither)."
            )
        checked = {name: as_array(arrays[name], f"data.{name}") for name in arrays}
        labels = {} if attrs is None else attrs
        return cls._build(
            checked["sxx"],
            checked["syx"],
            checked["syy"],
            checked["n"],
            checked.get("x"),
            checked.get("y"),
            str(labels.get("name", "data")),
            *(
                [str(name) for name in np.atleast_1d(labels[key])] if key in labels else None
                for key in ("input_names", "target_names")
            ),
        )

    @classmethod
    def _from_table(
        cls, table: Table, name: str, standardize: object, whiten: bool, drop_constant: bool
    ) -> "Regression":
        table = preprocess(table, standardize, whiten, drop_constant)
        x, y, n = table.x, table.y, len(table.x)
        with np.errstate(over="ignore", invalid="ignore"):
            sxx = np.eye(x.shape[1]) if whiten else x.T @ x / n
            syx, syy = y.T @ x / n, y.T @ y / n
        for moment, field, part in ((sxx, "x", "inputs"), (syy, "y", "targets")):
            if not is_traced(moment) and not np.all(np.isfinite(moment)):
                raise ValueError(
                    f"data.{field}: entries as large as {np.abs(getattr(table, field)).max():.3g} "
                    f'overflow when squared; rescale them or pass standardize="{part}".'
                )
        return cls._build(sxx, syx, syy, n, x, y, name, table.input_names, table.target_names)

    @classmethod
    def _build(
        cls,
        sxx: Float[Given, "d_in d_in"],
        syx: Float[Given, "d_out d_in"],
        syy: Float[Given, "d_out d_out"],
        n: MatrixLike,
        x: Float[Given, "samples d_in"] | None,
        y: Float[Given, "samples d_out"] | None,
        name: str,
        input_names: Sequence[str] | None,
        target_names: Sequence[str] | None,
    ) -> "Regression":
        """Derive everything from checked moments, rounded to the type JAX computes in."""
        count = as_array(n, "data.n")
        if count.size != 1 or (not is_traced(count) and count.item() < 1):
            raise ValueError(
                f"data.n: got {n}; it counts the samples whose noise is averaged in one step and "
                "must be a number of at least 1."
            )
        dtype = moments.working_dtype()
        sxx, syx, syy = map(
            moments.rounded, (moments.symmetrized(sxx), syx, moments.symmetrized(syy))
        )
        if x is not None and y is not None:
            x, y = moments.rounded(x), moments.rounded(y)
        derived = moments.derive(sxx, syx, syy, x, y)
        fourth = None
        if x is not None and y is not None and not is_traced(x, y):
            best = np.asarray(derived.best_map)
            fourth = fourth_moments(np.asarray(x), np.asarray(y), best, dtype)
        return cls(
            sxx=jnp.asarray(sxx, dtype),
            syx=jnp.asarray(syx, dtype),
            syy=jnp.asarray(syy, dtype),
            sxx_eigenvalues=jnp.asarray(derived.eigenvalues, dtype),
            sxx_eigenvectors=jnp.asarray(derived.eigenvectors, dtype),
            residual_sqrt=jnp.asarray(derived.residual_sqrt, dtype),
            best_map=jnp.asarray(derived.best_map, dtype),
            x=None if x is None else jnp.asarray(x, dtype),
            y=None if y is None else jnp.asarray(y, dtype),
            fourth_moments=fourth,
            n=jnp.asarray(count.reshape(()), dtype),
            name=name,
            input_names=column_names(input_names, len(sxx), "data.input_names", "x"),
            target_names=column_names(target_names, len(syy), "data.target_names", "y"),
            is_white=not is_traced(sxx) and np.array_equal(sxx, np.eye(len(sxx))),
        )

    def __repr__(self) -> str:
        if getattr(self.syx, "ndim", None) != 2:  # a stack of data, or what JAX makes of its fields
            return super().__repr__()
        rows = "Gaussian population" if self.x is None else _count(self.x.shape[0], "row")
        sizes = f"{_count(self.d_in, 'input')}, {_count(self.d_out, 'target')}"
        root, least = self.residual_sqrt, "traced"
        if isinstance(root, jax.Array | np.ndarray) and not is_traced(root):
            least = f"{0.5 * float(np.sum(np.asarray(root) ** 2)):.4g}"
        return f"Regression({rows}, {sizes}, least loss {least})"

    @property
    def d_in(self) -> int:
        """Number of inputs $d_0$."""
        return self.syx.shape[-1]

    @property
    def d_out(self) -> int:
        """Number of targets $d_N$."""
        return self.syx.shape[-2]

    @property
    def is_population(self) -> bool:
        """Whether the data are a Gaussian population rather than a finite sample."""
        return self.x is None

    @property
    def target(self) -> Float[Array, "d_out d_in"]:
        r"""The end-to-end matrix of every minimum, $T = \Sigma_{yx}\Sigma_{xx}^{-1}$.

        **Raises:** `ValueError` if `sxx` is singular (inside `jit` an error at run time): then
        minima have many end-to-end matrices and `best_map` is the one of smallest norm.
        """
        message = (
            "data.target: sxx is singular, so the minima have many end-to-end matrices; use "
            "data.best_map for the one of smallest norm."
        )
        singular = self.sxx_eigenvalues[0] == 0
        if is_traced(singular):
            return eqx.error_if(self.best_map, singular, message)
        if singular:
            rank = int(jnp.sum(self.sxx_eigenvalues > 0))
            raise ValueError(message.replace("singular", f"singular (rank {rank} of {self.d_in})"))
        return self.best_map

    @property
    def irreducible_loss(self) -> Float[Array, ""]:
        r"""The loss no linear map can avoid: half the trace of the residual covariance."""
        return 0.5 * jnp.sum(self.residual_sqrt**2)

    def turned(
        self, outputs: Float[Array, "d_out d_out"], inputs: Float[Array, "d_in d_in"]
    ) -> "Regression":
        r"""The same data in other orthonormal coordinates, $y = U y'$ and $x = V x'$.

        Without their fourth moments: this is done where those would be too large.

        **Arguments:**

        - `outputs`: $U$. `inputs`: $V$; orthogonal, new axes in their columns.
        """
        u, v = outputs, inputs
        arrays = {
            "sxx": v.T @ self.sxx @ v,
            "syx": u.T @ self.syx @ v,
            "syy": u.T @ self.syy @ u,
            "sxx_eigenvectors": v.T @ self.sxx_eigenvectors,
            "residual_sqrt": u.T @ self.residual_sqrt @ u,
            "best_map": u.T @ self.best_map @ v,
            "x": None if self.x is None else self.x @ v,
            "y": None if self.y is None else self.y @ u,
            "fourth_moments": None,
        }
        return dataclasses.replace(self, **arrays)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The defining arrays `sxx, syx, syy, n` (and `x, y` of a finite sample), to be saved."""
        arrays = {"sxx": self.sxx, "syx": self.syx, "syy": self.syy, "n": self.n}
        if self.x is not None and self.y is not None:
            arrays |= {"x": self.x, "y": self.y}
        return {name: np.asarray(array) for name, array in arrays.items()}

    def attrs(self) -> dict[str, Any]:
        """The labels `name, input_names, target_names`, to be saved beside the arrays."""
        return {
            "name": self.name,
            "input_names": list(self.input_names),
            "target_names": list(self.target_names),
        }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _check_shape(matrix: Given, shape: tuple[int, ...], field: str, other: str) -> None:
    if matrix.shape != shape:
        raise ValueError(f"{field}: needs shape {shape} to match {other}, got {matrix.shape}.")


def _tolerance(value: MatrixLike) -> float:
    """Moments computed in single precision are symmetric only to that precision."""
    dtype = getattr(value, "dtype", None)
    if dtype in (np.float16, np.float32):
        return moments.SINGLE_PRECISION_ASYMMETRY
    return moments.ASYMMETRY
