"""Reading samples from files: .csv, .parquet and .npz."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.csv

from gradflow.data.base import Columns, Table, as_samples, list_names, select_columns

LARGEST_BLOCK = 2**31 - 1


def read_file(
    path: str | Path, inputs: Columns | None, targets: Columns | None, header: bool, separator: str
) -> Table:
    """Read the chosen columns of a file, see [`gradflow.Regression.from_file`][]."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in {".csv", ".parquet", ".npz"}:
        raise ValueError(
            f"data.path: '{path.name}' has extension '{path.suffix}'; "
            "gradflow reads .csv, .parquet and .npz."
        )
    if not path.is_file():
        raise FileNotFoundError(f"data.path: there is no file '{path}'; check the path.")
    if suffix == ".npz":
        return _read_npz(path, inputs, targets)
    frame = _read_csv(path, header, separator) if suffix == ".csv" else _read_parquet(path)
    if frame.empty:
        raise ValueError(f"data.path: '{path.name}' has no rows of data; give at least one sample.")
    return _split(frame, inputs, targets)


def _read_csv(path: Path, header: bool, separator: str) -> pd.DataFrame:
    # Arrow reads every decimal to the nearest float64 and refuses ragged rows. It takes the type of
    # a column from the first block, so there is only one.
    block = min(path.stat().st_size + 1, LARGEST_BLOCK)
    try:
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(
                block_size=block, autogenerate_column_names=not header
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter=separator),
        )
    except (pyarrow.ArrowException, ValueError) as error:
        if path.stat().st_size == 0:
            raise ValueError(
                f"data.path: '{path.name}' is empty; give at least one sample."
            ) from error
        raise ValueError(
            f"data.path: '{path.name}' is not a table separated by {separator!r} "
            f"({str(error).strip()}); pass the right separator=."
        ) from error
    frame = table.to_pandas()
    if not header:
        return _numbered(frame)
    names = [str(name).strip() for name in frame.columns]
    if all(_is_number(name) for name in names):
        raise ValueError(
            f"data.path: the first line of '{path.name}' holds numbers, not column names "
            f"({list_names(names)}); add a line of names or pass header=False."
        )
    return frame.set_axis(names, axis=1)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.path: '{path.name}' is not a readable Parquet file ({error}); write it again, "
            "for instance with pandas.DataFrame.to_parquet."
        ) from error


def _read_npz(path: Path, inputs: Columns | None, targets: Columns | None) -> Table:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"data.path: '{path.name}' is not a readable .npz file of numbers ({error}); write it "
            "with numpy.savez(path, x=x, y=y)."
        ) from error
    if len(arrays) == 1:
        (only,) = arrays.values()
        if only.ndim != 2:
            raise ValueError(
                f"data.path: '{path.name}' holds one array of shape {only.shape}; it must hold "
                "either a table (rows, columns) or two arrays, inputs and targets."
            )
        return _split(_numbered(pd.DataFrame(only)), inputs, targets)
    x, x_name = _npz_array(arrays, "x" if inputs is None else inputs, "data.inputs")
    y, y_name = _npz_array(arrays, "y" if targets is None else targets, "data.targets")
    x, input_names = as_samples(x, "data.x", x_name)
    y, target_names = as_samples(y, "data.y", y_name, vector_is_column=True)
    return Table(x, y, input_names, target_names)


def _npz_array(
    arrays: dict[str, np.ndarray], chosen: Columns, field: str
) -> tuple[np.ndarray, str]:
    """The one chosen array and its name."""
    names = list(arrays)
    positions = select_columns(names, chosen, field)
    if len(positions) > 1:
        raise ValueError(
            f"{field}: choose one array of the .npz file, got {chosen!r}; it holds "
            f"{list_names(names)}."
        )
    return arrays[names[positions[0]]], names[positions[0]]


def _split(frame: pd.DataFrame, inputs: Columns | None, targets: Columns | None) -> Table:
    """Split a table of columns into inputs (by default all but the targets) and targets."""
    names = [str(column) for column in frame.columns]
    hint = "" if len(names) > 1 else " (one column only: is the separator right?)"
    if targets is None:
        raise ValueError(
            f"data.targets: choose the column(s) to predict from {list_names(names)}{hint}."
        )
    target_positions = select_columns(names, targets, "data.targets")
    if inputs is None:
        input_positions = [k for k in range(len(names)) if k not in target_positions]
    else:
        input_positions = select_columns(names, inputs, "data.inputs")
    if not input_positions:
        raise ValueError(
            f"data.inputs: no column is left besides the targets {list_names(names)}{hint}."
        )
    _refuse_overlap(names, input_positions, target_positions)
    x, input_names = as_samples(frame.iloc[:, input_positions], "data.x", "x")
    y, target_names = as_samples(frame.iloc[:, target_positions], "data.y", "y")
    return Table(x, y, input_names, target_names)


def _refuse_overlap(names: Sequence[str], inputs: list[int], targets: list[int]) -> None:
    both = [names[k] for k in inputs if k in targets]
    if both:
        raise ValueError(
            f"data.inputs: {list_names(both)} are inputs and targets at once; "
            "leave them out of one of the two."
        )


def _numbered(frame: pd.DataFrame) -> pd.DataFrame:
    """The same table with columns called `column_0, column_1, ...`."""
    return frame.set_axis([f"column_{k}" for k in range(frame.shape[1])], axis=1)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
