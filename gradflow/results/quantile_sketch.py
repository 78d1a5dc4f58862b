"""Quantiles of an ensemble that comes in chunks."""

import bisect
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int64

MAGNITUDE = np.int64(2**63 - 1)
"""All bits of a double but its sign."""

LARGEST = np.array([np.finfo(np.float64).max]).view(np.int64)[0]
"""The bits of the largest double."""


@dataclass
class Sketch:
    r"""Counts of values in bins that are as fine as a bounded number of them allows.

    A double without its lowest $l$ bits is the bin it falls in: bins of equal relative width,
    $2^{l - 52}$ or less, in the order of the numbers. While all values together fill no more than
    `bins` of them, $l = 0$ and the values themselves are kept; otherwise $l$ is the least level at
    which they do. That depends on the set of values alone, so the sketch, and every quantile taken
    from it, is to the last bit the same for any division into chunks and any order of them.

    **Arguments:** `bins`: most bins that are kept, 16 bytes each.

    **Source:** Epicoco et al. 2020, "UDDSketch: accurate tracking of quantiles in data streams",
    with the bits of the numbers in the place of logarithms.
    """

    bins: int
    level: int = 0
    keys: Int64[np.ndarray, " bin"] = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: Int64[np.ndarray, " bin"] = field(default_factory=lambda: np.zeros(0, np.int64))
    undefined: int = 0

    def add(self, values: Float[np.ndarray, " path"]) -> None:
        """Count some values; those that are not finite are counted apart."""
        defined = values[np.isfinite(values)]
        self.undefined += values.size - defined.size
        keys = np.sort(ordered(defined) >> self.level)
        self._join(keys, np.ones_like(keys))

    def merge(self, other: "Sketch") -> None:
        """Count what another sketch has counted."""
        level = max(self.level, other.level)
        self.keys, self.level = self.keys >> (level - self.level), level
        self.undefined += other.undefined
        self._join(other.keys >> (level - other.level), other.counts)

    def quantiles(
        self, probabilities: Float[np.ndarray, " quantile"]
    ) -> tuple[Float[np.ndarray, " quantile"], Float[np.ndarray, " quantile"]]:
        """Sample quantiles, linear between order statistics, and the most they can be off by.

        The values of a bin are taken as evenly spread over it; the bound is its width (that of the
        wider one where two order statistics lie in different bins). NaN if there is no value, or
        one that is not finite.
        """
        total = int(self.counts.sum())
        if total == 0 or self.undefined:
            return np.full(probabilities.shape, np.nan), np.full(probabilities.shape, np.nan)
        position = probabilities * (total - 1)
        below = np.floor(position).astype(np.int64)
        low, low_width = self._order_statistics(below)
        high, high_width = self._order_statistics(np.minimum(below + 1, total - 1))
        share = position - below
        value = np.where(share > 0.0, (1.0 - share) * low + share * high, low)
        return value, np.where(share > 0.0, np.maximum(low_width, high_width), low_width)

    def _join(self, keys: Int64[np.ndarray, " new"], counts: Int64[np.ndarray, " new"]) -> None:
        """Add to bins of the current level, and make all coarser where they are too many.

        `keys` are ascending; one may come several times.
        """
        if self.keys.size:
            keys = np.concatenate([self.keys, keys])
            counts = np.concatenate([self.counts, counts])
            order = np.argsort(keys, kind="stable")
            keys, counts = keys[order], counts[order]
        apart = keys[1:] ^ keys[:-1]  # neighbours share a bin once all bits of it are dropped

        def fits(drop: int) -> bool:
            return bool(1 + np.count_nonzero(apart >> drop) <= self.bins)

        drop = bisect.bisect_left(range(63), True, key=fits)
        self.level += drop
        keys = keys >> drop
        firsts = np.flatnonzero(np.r_[1, apart >> drop]) if keys.size else np.zeros(0, np.int64)
        self.keys = keys[firsts]
        self.counts = np.add.reduceat(counts, firsts) if firsts.size else counts

    def _order_statistics(
        self, rank: Int64[np.ndarray, " quantile"]
    ) -> tuple[Float[np.ndarray, " quantile"], Float[np.ndarray, " quantile"]]:
        """The values of given ranks (0 is the least), and the widths of their bins."""
        after = np.cumsum(self.counts)
        which = np.searchsorted(after, rank, side="right")
        first = self.keys[which] << self.level
        last = np.minimum(first | (2**self.level - 1), LARGEST)
        low = numbers(np.maximum(first, -LARGEST))
        width = numbers(last) - low
        within = rank - (after - self.counts)[which] + 0.5
        return low + width * (within / self.counts[which]), width


def ordered(values: Float[np.ndarray, " value"]) -> Int64[np.ndarray, " value"]:
    """Integers in the order of the doubles, 0 for both zeros."""
    bits = np.asarray(values, dtype=np.float64).view(np.int64)
    return np.where(bits < 0, -(bits & MAGNITUDE), bits)


def numbers(keys: Int64[np.ndarray, " value"]) -> Float[np.ndarray, " value"]:
    """The doubles of such integers."""
    magnitude = np.abs(keys).view(np.float64)
    return np.where(keys < 0, -magnitude, magnitude)
