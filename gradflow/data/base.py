"""Tables of samples and the checks that every source of data goes through."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Array, Float

from gradflow.backend.tracing import as_floats, is_complex, is_traced

MatrixLike: TypeAlias = Any
"""Numbers, nested lists, NumPy or JAX arrays, pandas objects; converted to a float64 array."""

Given: TypeAlias = np.ndarray | Array
"""Arrays of data: NumPy's in double precision, or traced by JAX, whose values are not checked."""

Columns: TypeAlias = str | int | Sequence[str | int]
"""One column or several, each by name or by position (negative positions count from the end)."""

MOST_NAMES_SHOWN = 40


@dataclass(frozen=True)
class Table:
    """Samples with the names of their columns, before any preprocessing."""

    x: Float[Given, "n d_in"]
    y: Float[Given, "_ d_out"]
    input_names: tuple[str, ...]
    target_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that every input has its target."""
        if len(self.x) != len(self.y):
            raise ValueError(
                f"data.y: has {len(self.y)} rows but x has {len(self.x)}; give one target row for "
                "each input row."
            )


def as_array(value: MatrixLike, field: str) -> Float[Given, "..."]:
    """Convert `value` to a finite float64 array of at least one entry; a traced one to JAX's.

    **Raises:** `ValueError` naming `field` (and the first bad entry) if `value` is ragged, empty,
    not real numbers, or has an entry that is not finite.
    """
    array = _numbers(value, field)
    if array.size == 0:
        raise ValueError(f"{field}: is empty (shape {array.shape}); give at least one entry.")
    if not is_traced(array) and not np.all(np.isfinite(array)):
        bad = np.argwhere(~np.isfinite(array))
        first = tuple(int(k) for k in bad[0])
        raise ValueError(
            f"{field}: {len(bad)} entries are not finite, the first is {array[first]} at index "
            f"{first}; every entry must be a finite float64 number."
        )
    return array


def as_samples(
    value: MatrixLike,
    field: str,
    prefix: str,
    names: Sequence[str] | None = None,
    vector_is_column: bool = False,
) -> tuple[Float[Given, "n d"], tuple[str, ...]]:
    """Convert `value` to samples `(n, d)` and the names of its columns.

    **Arguments:**

    - `value`: `(n, d)`; a DataFrame brings its own column names, a Series is one column.
    - `field`: what to call it in errors, such as `data.x`.
    - `prefix`: columns without a name are called `prefix1, prefix2, ...`.
    - `names`: overrides the names.
    - `vector_is_column`: whether a vector `(n,)` is taken as one column.

    **Raises:** `ValueError` naming the field, row and column of what is wrong.
    """
    if isinstance(value, pd.Series):
        value = value.to_frame(name=f"{prefix}1" if value.name is None else value.name)
    if isinstance(value, pd.DataFrame):
        names = [str(column) for column in value.columns] if names is None else names
        value = numeric_frame(value, field)
    else:
        value = _numbers(value, field)
        if value.ndim == 1 and vector_is_column:
            value = value[:, None]
    if value.ndim != 2:
        raise ValueError(
            f"{field}: needs shape (samples, columns), got {value.shape}; "
            "for one column use x[:, None]."
        )
    if 0 in value.shape:
        raise ValueError(f"{field}: is empty (shape {value.shape}); give at least one sample.")
    labels = column_names(names, value.shape[1], field, prefix)
    bad = [] if is_traced(value) else np.argwhere(~np.isfinite(value))
    if len(bad):
        row, column = (int(k) for k in bad[0])
        raise ValueError(
            f"{field}: {len(bad)} entries are not finite, the first is {value[row, column]} in row "
            f"{row} (counting from 0), column {column} ('{labels[column]}'); "
            "drop or fill such rows."
        )
    return value, labels


def column_names(
    names: Sequence[str] | None, count: int, field: str, prefix: str
) -> tuple[str, ...]:
    """Check that there are `count` names, or number the columns `prefix1, prefix2, ...`."""
    if names is None:
        return tuple(f"{prefix}{k + 1}" for k in range(count))
    if isinstance(names, str):
        names = [names]
    if len(names) != count:
        raise ValueError(
            f"{field}: has {count} columns but {len(names)} names {list(names)}; "
            "give one name for each column."
        )
    return tuple(str(name) for name in names)


def numeric_frame(frame: pd.DataFrame, field: str) -> Float[np.ndarray, "n d"]:
    """Convert a DataFrame to float64 (missing values become NaN), refusing columns of text."""
    for position, (column, dtype) in enumerate(zip(frame.columns, frame.dtypes, strict=True)):
        if not pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_complex_dtype(dtype):
            values = frame.iloc[:, position]
            numbers = np.asarray(pd.to_numeric(values.astype(str), errors="coerce"), float)
            text = np.isnan(numbers) & values.notna().to_numpy()
            row = int(np.argmax(text)) if text.any() else 0
            example = values.iloc[row] if len(frame) else None
            raise ValueError(
                f"{field}: column '{column}' is not numeric ({dtype}; row {row}, counting from 0, "
                f"holds {example!r}); encode it as numbers or leave it out."
            )
    return np.array(frame.to_numpy(dtype=np.float64, na_value=np.nan), order="C")


def select_columns(names: Sequence[str], chosen: Columns, field: str) -> list[int]:
    """Positions of the `chosen` columns among `names`.

    **Raises:** `ValueError` if a column does not exist (listing those that do), is chosen twice,
    or none is chosen.
    """
    wanted = [chosen] if isinstance(chosen, str | int) else list(chosen)
    available = list_names(names)
    if not wanted:
        raise ValueError(f"{field}: no column is chosen; choose from {available}.")
    positions = []
    for column in wanted:
        if isinstance(column, str):
            matches = [k for k, name in enumerate(names) if name == column]
            if len(matches) > 1:
                raise ValueError(
                    f"{field}: {len(matches)} columns are called '{column}'; choose by position: "
                    f"{matches}."
                )
            if not matches:
                raise ValueError(f"{field}: no column '{column}'; the columns are {available}.")
            positions.append(matches[0])
        elif isinstance(column, int | np.integer) and not isinstance(column, bool):
            if not -len(names) <= column < len(names):
                raise ValueError(
                    f"{field}: no column {column}; the {len(names)} columns are {available}."
                )
            positions.append(int(column) % len(names))
        else:
            raise TypeError(
                f"{field}: choose columns by name or position, got {column!r}; "
                f"the columns are {available}."
            )
    for position in positions:
        if positions.count(position) > 1:
            raise ValueError(
                f"{field}: column '{names[position]}' is chosen twice; choose each column once."
            )
    return positions


def list_names(names: Sequence[str]) -> str:
    """The names as text for an error message, shortened if there are very many."""
    shown = ", ".join(f"'{name}'" for name in names[:MOST_NAMES_SHOWN])
    rest = len(names) - MOST_NAMES_SHOWN
    return shown if rest <= 0 else f"{shown} and {rest} more"


def _numbers(value: MatrixLike, field: str) -> Float[Given, "..."]:
    """Convert to a new float64 array, keeping entries that are not finite."""
    if np.ma.isMaskedArray(value):
        raise ValueError(
            f"{field}: got a masked array, whose mask would be lost; leave out what is masked, or "
            "fill it with value.filled(...)."
        )
    try:
        if is_traced(value):
            if is_complex(value):
                raise TypeError(
                    f"{field}: needs real numbers, got complex entries; give their real part."
                )
            return as_floats(value)
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{field}: rows differ in length; give a rectangular array.") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{field}: needs real numbers, got {array.dtype} entries; convert them to float first."
        )
    return np.array(array, dtype=np.float64, order="C")
