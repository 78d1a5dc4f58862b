"""Statistics of observables at every saved time, gathered chunk by chunk."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from gradflow.random.antithetic import IndependentSamples
from gradflow.results.moments import Moments
from gradflow.results.quantile_sketch import Sketch

SKETCH_BYTES = 2**25
"""Memory that the sketches of all observables at all times may fill."""

FEWEST_BINS, MOST_BINS = 64, 2048


@dataclass
class RunningStatistics:
    """What is known of the observables of an ensemble, without its paths.

    A path counts at a time if it has not diverged by then.

    - `shapes`: the shape of every observable of one path.
    - `times`: the number of saved times.
    - `antithetic`: whether paths $2q$ and $2q + 1$ depend on each other (`IndependentSamples`).
    """

    shapes: Mapping[str, tuple[int, ...]]
    times: int
    antithetic: bool = False
    lost: list[int] = field(init=False)
    moments: list[Moments] = field(init=False)
    of_pairs: list[Moments] = field(init=False)
    sketches: list[list[Sketch]] = field(init=False)

    def __post_init__(self) -> None:
        entries = sum(self.sizes.values())
        nothing = Moments.of(np.zeros((entries, 0)), len(self.paired))
        room = SKETCH_BYTES // (16 * max(entries * self.times, 1))
        bins = int(np.clip(room, FEWEST_BINS, MOST_BINS))
        self.lost = [0] * self.times
        self.moments = [nothing] * self.times
        self.of_pairs = [Moments.of(np.zeros((entries, 0)), 0)] * self.times
        self.sketches = [[Sketch(bins) for _ in range(entries)] for _ in range(self.times)]

    @property
    def names(self) -> list[str]:
        """The observables in the order of their entries: matrices come last."""
        return sorted(self.shapes, key=lambda name: len(self.shapes[name]) > 1)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of entries of every observable."""
        return {name: int(np.prod(self.shapes[name], dtype=int)) for name in self.names}

    @property
    def paired(self) -> list[str]:
        """The entries whose covariance is kept: those of numbers and vectors."""
        return [
            name + "".join(f"[{i}]" for i in index)
            for name in self.names
            if len(self.shapes[name]) <= 1
            for index in np.ndindex(self.shapes[name])
        ]

    @property
    def seen(self) -> int:
        """The number of saved times that any path has reached."""
        return sum(m.count + lost > 0 for m, lost in zip(self.moments, self.lost, strict=True))

    def add(
        self, index: int, observed: Mapping[str, np.ndarray], alive: Bool[np.ndarray, " path"]
    ) -> None:
        """Count some paths at saved time number `index`; arrays start with the path axis.

        Of antithetic paths both of every pair must be among them.
        """
        rows = [observed[name].reshape(alive.size, -1) for name in self.names]
        values = np.ascontiguousarray(np.concatenate(rows, axis=1, dtype=np.float64).T)
        values = values if alive.all() else values[:, alive]
        self.lost[index] += alive.size - values.shape[1]
        chunk = Moments.of(values, len(self.paired))
        self.moments[index] = self.moments[index].merged(chunk)
        if self.antithetic:
            pairs = Moments.of(IndependentSamples(alive, antithetic=True).means(values.T).T, 0)
            self.of_pairs[index] = self.of_pairs[index].merged(pairs)
        for sketch, entry in zip(self.sketches[index], values, strict=True):
            sketch.add(entry)

    @property
    def standard_errors(self) -> Float[np.ndarray, "time entry"]:
        """Standard errors of the means at the times seen, over what is independent."""
        independent = self.of_pairs if self.antithetic else self.moments
        return np.stack([moments.standard_error for moments in independent[: self.seen]])

    def of_observables(
        self, entries: Float[np.ndarray, "*lead entry"]
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """Arrays over entries (last axis), cut into one array an observable."""
        ends = np.cumsum([0, *self.sizes.values()])
        return {
            name: entries[..., first:last].reshape((*entries.shape[:-1], *self.shapes[name]))
            for name, (first, last) in zip(self.names, itertools.pairwise(ends), strict=True)
        }

    def quantiles(
        self, probabilities: Sequence[float]
    ) -> tuple[Float[np.ndarray, "time quantile entry"], Float[np.ndarray, "time quantile entry"]]:
        """Quantiles of every entry at the times seen, and the most they can be off by."""
        p = np.asarray(probabilities, dtype=np.float64)
        entries = sum(self.sizes.values())
        found = np.zeros((2, self.seen, p.size, entries))
        for time, entry in np.ndindex(self.seen, entries):
            found[:, time, :, entry] = self.sketches[time][entry].quantiles(p)
        return found[0], found[1]
