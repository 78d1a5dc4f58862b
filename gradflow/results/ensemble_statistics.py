"""The statistics that a run leaves when it keeps no paths."""

from typing import ClassVar

import numpy as np

from gradflow.results.base import AbstractResult

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles taken unless asked otherwise."""


class EnsembleStatistics(AbstractResult):
    r"""Statistics of the observables of an ensemble at every saved time, without its paths.

    At each time they are taken over the paths that have not diverged by then: `count` of them, with
    `diverged` left out. Memory depends neither on the number of paths nor on that of steps.

    Antithetic paths (`Normals.antithetic`) are independent in pairs only: standard errors are those
    of the means over pairs, and a pair with a diverged path has no part in them. Everything else is
    over paths as ever. With the correlation $\rho$ inside pairs the variance over $n - 1$, $n$ the
    `count` of paths, has the expectation $1 - \rho / (n - 1)$ times what it estimates.

    Dimensions: `time`, `quantile`, `layer` and other axes of observables, `entry`. For an
    observable `x`, variables `x_mean`, `x_variance` (over $n - 1$), `x_standard_error` of the
    mean, `x_minimum`, `x_maximum`, `x_quantiles`, and `x_quantile_error`, the most by which a
    quantile can differ from that of the paths; `covariance` of all observables that are numbers or
    vectors, entry by entry.
    """

    kind: ClassVar[str] = "ensemble of statistics"

    def __repr__(self) -> str:
        status = ", interrupted" if self.interrupted else ""
        if self.diverged[-1]:
            status += f", {self.diverged[-1]} of {self.replicas} diverged"
        return (
            f"EnsembleStatistics({self.attrs['dynamics_kind']}, {self.time.size} times to t = "
            f"{self.time[-1]:g}, {self.replicas} replicas{status}; {', '.join(self.observables)})"
        )

    @property
    def replicas(self) -> int:
        """The number of replicas, diverged ones included."""
        return int(self.count[0] + self.diverged[0])

    @property
    def observables(self) -> tuple[str, ...]:
        """The names of the observables."""
        names = map(str, self._dataset.data_vars)
        return tuple(n.removesuffix("_mean") for n in names if n.endswith("_mean"))

    @property
    def count(self) -> np.ndarray:
        """The number of paths that the statistics are taken over, `(T,)`."""
        return self._dataset["count"].values

    @property
    def diverged(self) -> np.ndarray:
        """The number of paths that have diverged by then and are left out, `(T,)`."""
        return self._dataset["diverged"].values

    def mean(self, name: str) -> np.ndarray:
        """The mean of an observable over paths, `(T, ...)`."""
        return self._of(name, "mean")

    def variance(self, name: str) -> np.ndarray:
        """The variance of an observable over paths (over $n - 1$), `(T, ...)`."""
        return self._of(name, "variance")

    def standard_error(self, name: str) -> np.ndarray:
        """The standard error of the mean of an observable, `(T, ...)`; over antithetic pairs."""
        return self._of(name, "standard_error")

    def minimum(self, name: str) -> np.ndarray:
        """The least value of an observable on any path, `(T, ...)`."""
        return self._of(name, "minimum")

    def maximum(self, name: str) -> np.ndarray:
        """The greatest value of an observable on any path, `(T, ...)`."""
        return self._of(name, "maximum")

    def quantiles(self, name: str) -> np.ndarray:
        """The quantiles of an observable over paths, `(T, Q, ...)`."""
        return self._of(name, "quantiles")

    def covariance(self, first: str, second: str) -> np.ndarray:
        """The covariance of two entries over paths, `(T,)`.

        **Arguments:** the names of observables that are numbers, or with an index in brackets, such
        as `squared_norms[0]`.

        **Raises:** `KeyError` naming the entries that there are.
        """
        entries = self._dataset["entry"].values.tolist()
        for name in (first, second):
            if name not in entries:
                raise KeyError(f"{name!r} has no covariance here; choose from {entries}.")
        rows, columns = entries.index(first), entries.index(second)
        return self._dataset["covariance"].values[:, rows, columns]

    def _of(self, name: str, what: str) -> np.ndarray:
        if f"{name}_{what}" not in self._dataset:
            raise KeyError(
                f"{name!r} was not recorded; there are {', '.join(self.observables)}. Ask for it "
                "with simulate(..., observables=[...])."
            )
        return self._dataset[f"{name}_{what}"].values
