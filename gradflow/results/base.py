"""What every run leaves: a labelled data set that knows how it was made, in memory and on disk."""

import abc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from gradflow.backend.whole_file import whole_file
from gradflow.data import Regression
from gradflow.dynamics.base import AbstractDynamics
from gradflow.dynamics.effective_time import effective_time
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.random.streams import Normals
from gradflow.results.serialize import (
    check_rebuilds,
    describe,
    rebuild_dynamics,
    rebuild_regularizer,
)

FORMAT = 1
"""Version of the file layout."""


Result = TypeVar("Result", bound="AbstractResult")


class AbstractResult(abc.ABC):
    """The data set of a run, its problem, its dynamics and its start.

    `kind` names what it is, in files and in messages.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        dataset: xr.Dataset,
        problem: Problem,
        dynamics: AbstractDynamics,
        start: Sequence[DeepLinear],
    ):
        self._dataset = dataset
        self.problem = problem
        self.dynamics = dynamics
        self.start = tuple(start)

    @property
    @abc.abstractmethod
    def replicas(self) -> int | None:
        """The number of replicas, None for a single path."""

    @property
    def attrs(self) -> dict[str, Any]:
        """Everything needed to repeat the run, and versions, device, dtype and wall time."""
        return dict(self._dataset.attrs)

    @property
    def time(self) -> np.ndarray:
        """Saved flow times, `(T,)`."""
        return self._dataset["time"].values

    @property
    def effective_time(self) -> np.ndarray:
        """Saved times h k / (1 - momentum), on which all momenta keep pace, `(T,)`."""
        return effective_time(self.dynamics, self.time)

    @property
    def step(self) -> np.ndarray | None:
        """Steps of size h at the saved times, `(T,)`; None for an adaptive dynamics."""
        return self._dataset["step"].values if "step" in self._dataset.coords else None

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its end."""
        return self.attrs["status"] == "interrupted"

    @property
    def key(self) -> jax.Array | None:
        """The random key of the run, None for a deterministic one."""
        stored = json.loads(self.attrs["key"])
        if stored is None:
            return None
        data = jnp.asarray(stored, dtype=jnp.uint32)
        return jax.random.wrap_key_data(data, impl="threefry2x32")

    @property
    def normals(self) -> Normals:
        """What stood for the standard normals of the run."""
        return Normals(**json.loads(self.attrs.get("normals", "{}")))  # older files do not say

    def to_xarray(self) -> xr.Dataset:
        """The data set itself."""
        return self._dataset

    def save(self, path: str | Path) -> Path:
        """Write a NetCDF file, whole or not at all; return its path.

        The file holds the results, the data, the initial weights, the seed and the settings:
        `gradflow.repeat` runs what `load` brings back again.

        The folder is made if only it is missing.

        **Raises:** `ValueError` if the run used a dynamics, solver or regularizer from elsewhere,
        which a file cannot bring back; `FileNotFoundError` if more than one folder is missing.
        """
        path = Path(path)
        folder = path.parent
        if not (folder.is_dir() or folder.parent.is_dir()):
            raise FileNotFoundError(
                f"path: there is no folder {folder.parent} to make {folder.name} in; correct the "
                f"path, or make it with Path({str(folder)!r}).mkdir(parents=True)."
            )
        for part in (self.dynamics, *self.problem.regularizers):
            check_rebuilds(part)
        packed = self._dataset.copy()
        for name, array in self.problem.data.to_arrays().items():
            dims = tuple(f"data_{name}_{axis}" for axis in range(array.ndim))
            packed[f"data_{name}"] = (dims, array)
        for i in range(self.start[0].depth):
            stacked = np.stack([np.asarray(net.weights[i]) for net in self.start])
            packed[f"start_W{i + 1}"] = (
                ("start", f"width_{i + 1}", f"width_{i}"),
                stacked,
            )
        packed.attrs["data_labels"] = json.dumps(self.problem.data.attrs())
        packed.attrs["regularizers"] = json.dumps([describe(r) for r in self.problem.regularizers])
        packed.attrs["dynamics"] = json.dumps(describe(self.dynamics))
        packed.attrs["format"] = FORMAT
        packed.attrs["kind"] = self.kind
        with whole_file(path) as aside:
            packed.to_netcdf(aside, engine="h5netcdf")
        return path

    @classmethod
    def check(cls, name: str, value: object) -> None:
        """Raise a `TypeError` that names the argument unless it is such a run."""
        if not isinstance(value, cls):
            raise TypeError(
                f"{name} must be a {cls.__name__}, as simulate and {cls.__name__}.load give it; "
                f"got {value!r}."
            )

    @classmethod
    def load(cls: type[Result], path: str | Path) -> Result:
        """Read what `save` has written.

        **Raises:** `FileNotFoundError` if there is no such file, `ValueError` if it holds
        something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: there is no file {path}.")
        try:
            packed = xr.load_dataset(path, engine="h5netcdf")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"path: {path} is not a readable NetCDF file ({error}).") from error
        # The first files held trajectories and did not say so.
        if (
            packed.attrs.get("format") != FORMAT
            or packed.attrs.pop("kind", "trajectory") != cls.kind
        ):
            raise ValueError(
                f"path: {path} is not a gradflow {cls.kind} of format {FORMAT}; write one with "
                f"{cls.__name__}.save."
            )
        names = [str(v) for v in packed.data_vars]
        arrays = {n.removeprefix("data_"): packed[n].values for n in names if n.startswith("data_")}
        depth = int(packed.attrs["depth"])
        stacks = [packed[f"start_W{i + 1}"].values for i in range(depth)]
        start = [DeepLinear([s[r] for s in stacks]) for r in range(stacks[0].shape[0])]
        labels = json.loads(packed.attrs.pop("data_labels"))
        regularizers = json.loads(packed.attrs.pop("regularizers"))
        dynamics = rebuild_dynamics(json.loads(packed.attrs.pop("dynamics")))
        packed.attrs.pop("format")
        problem = Problem(
            Regression.from_arrays(arrays, labels), [rebuild_regularizer(r) for r in regularizers]
        )
        extra = [n for n in names if n.startswith(("data_", "start_"))]
        return cls(packed.drop_vars(extra), problem, dynamics, start)
