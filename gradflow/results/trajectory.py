"""The paths that a run leaves."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from gradflow.network import DeepLinear
from gradflow.results.base import AbstractResult


class Trajectory(AbstractResult):
    """The trajectory of one dynamics on one problem, a thin wrapper over an `xarray.Dataset`.

    Dimensions: `replica` (if replicas were asked for), `time`, `layer`, `width_0..width_N`.
    Variables: every observable by name, the layers `W1..WN` if stored, and `diverged_at`, the
    first saved flow time at which a replica had diverged (NaN if it did not). Values of a diverged
    replica are NaN from then on, and those of one that was given up: then there is
    `incomplete_at`, the flow time that it had reached. A run with momentum has the coordinate
    `effective_time`, h k / (1 - momentum), beside `time`.
    """

    kind: ClassVar[str] = "trajectory"

    def __repr__(self) -> str:
        kind = self.attrs["dynamics_kind"]
        replicas = "" if self.replicas is None else f", {self.replicas} replicas"
        status = ", interrupted" if self.interrupted else ""
        if self.incomplete.any():
            status += ", incomplete"
        if self.diverged.any():
            status += f", {self.diverged.sum()} of {self.diverged.size} diverged"
        observables = [v for v in self._dataset.data_vars if not str(v).startswith("W")]
        return (
            f"Trajectory({kind}, {self.time.size} times to t = {self.time[-1]:g}{replicas}{status};"
            f" {', '.join(map(str, observables))})"
        )

    @property
    def replicas(self) -> int | None:
        """The number of replicas, None for a single path."""
        return self._dataset.sizes.get("replica")

    @property
    def diverged(self) -> np.ndarray:
        """Which replicas diverged, boolean `(R,)` (shape `()` for a single path)."""
        return np.asarray(np.isfinite(self._dataset["diverged_at"].values))

    @property
    def incomplete(self) -> np.ndarray:
        """Which replicas were given up before the end, boolean `(R,)` (`()` for a single path)."""
        if "incomplete_at" not in self._dataset:
            return np.zeros_like(self.diverged)
        return np.asarray(np.isfinite(self._dataset["incomplete_at"].values))

    @property
    def weights(self) -> tuple[np.ndarray, ...]:
        """The layers, each `([R,] T, d_i, d_{i-1})`.

        **Raises:** `ValueError` if the weights were not stored.
        """
        depth = int(self.attrs["depth"])
        if "W1" not in self._dataset:
            raise ValueError(
                "weights were not stored in this run (they are large); simulate again with "
                "store_weights=True."
            )
        return tuple(self._dataset[f"W{i}"].values for i in range(1, depth + 1))

    def network(self, index: int, replica: int | None = None) -> DeepLinear:
        """The network at saved time number `index` (negative: from the end).

        **Raises:** `ValueError` if the trajectory has replicas and none is chosen.
        """
        if self.replicas is not None and replica is None:
            raise ValueError(
                f"replica: the trajectory has {self.replicas} replicas; choose one, "
                "e.g. network(-1, replica=0)."
            )
        where = (index,) if self.replicas is None else (replica, index)
        return DeepLinear([w[where] for w in self.weights])

    def __getitem__(self, name: str) -> np.ndarray:
        """Values of an observable, leading axes `(R, T)` or `(T,)`.

        **Raises:** `KeyError` naming the observables that were recorded.
        """
        if name not in self._dataset:
            raise KeyError(
                f"{name!r} was not recorded; this trajectory has "
                f"{', '.join(map(str, self._dataset.data_vars))}. Ask for it with "
                "simulate(..., observables=[...])."
            )
        return self._dataset[name].values

    def __contains__(self, name: object) -> bool:
        return name in self._dataset

    def __iter__(self) -> Iterator[str]:
        """The names that `run[name]` takes: recorded observables, and layers if stored."""
        return (str(name) for name in self._dataset.data_vars)
