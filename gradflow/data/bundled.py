"""The small tables that come inside scikit-learn; nothing is downloaded."""

import numpy as np

from gradflow.data.base import Columns, Table, as_samples, list_names, select_columns

TABLES = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")


def bundled_table(name: str, targets: Columns | None) -> Table:
    """One of the bundled tables, see [`gradflow.Regression.from_sklearn`][].

    Class labels become one target a class, 1 for its members and 0 for the others.
    """
    # scikit-learn takes a second to import and only this function needs it.
    import sklearn.datasets

    if name not in TABLES:
        raise ValueError(
            f"data.name: no bundled table '{name}'; choose from {list_names(TABLES)} "
            "(others would have to be downloaded: save them to a file and use from_file)."
        )
    bunch = getattr(sklearn.datasets, f"load_{name}")()
    if name == "diabetes":
        y, target_names = bunch.target[:, None], ["progression"]
    elif name == "linnerud":
        y, target_names = bunch.target, list(bunch.target_names)
    else:
        target_names = [str(label) for label in bunch.target_names]
        y = (bunch.target[:, None] == np.arange(len(target_names))).astype(np.float64)
    if targets is not None:
        chosen = select_columns(target_names, targets, "data.targets")
        y, target_names = y[:, chosen], [target_names[k] for k in chosen]
    x, input_names = as_samples(
        bunch.data, "data.x", "x", [str(feature) for feature in bunch.feature_names]
    )
    y, target_names = as_samples(y, "data.y", "y", target_names)
    return Table(x, y, input_names, target_names)
