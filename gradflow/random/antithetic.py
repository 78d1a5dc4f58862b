"""Which replicas of an ensemble are independent of each other."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True)
class IndependentSamples:
    r"""The independent samples of an ensemble: its replicas, or their antithetic pairs.

    With opposite normals (`Normals.antithetic`) replicas $2q$ and $2q + 1$ depend on each other,
    and the mean over replicas has the variance of the mean over pairs. Whatever is said about its
    error takes the means over samples, `means`, as the independent numbers. A pair of which one
    replica is left out has another spread than a whole one, so it is no unit.

    - `kept`: which of all replicas there are values of, `(R,)`.
    - `antithetic`: whether they come in such pairs; then their number is even.
    """

    kept: Bool[np.ndarray, " replica"]
    antithetic: bool = False

    @property
    def count(self) -> int:
        """The number of samples $m$."""
        return int((self._whole if self.antithetic else self.kept).sum())

    def means(self, values: Float[np.ndarray, "kept *shape"]) -> Float[np.ndarray, "unit *shape"]:
        """The mean over each unit of values of the replicas that are kept."""
        if not self.antithetic:
            return values
        paired = values[np.repeat(self._whole, 2)[self.kept]]
        return paired.reshape(-1, 2, *values.shape[1:]).mean(axis=1)

    def standard_error(
        self, values: Float[np.ndarray, "kept *shape"]
    ) -> Float[np.ndarray, "*shape"]:
        r"""$s / \sqrt m$ of the mean over replicas, $s$ over $m - 1$; NaN for fewer than two.

        **Arguments:** `values` of the replicas that are kept.
        """
        means = self.means(values)
        if len(means) < 2:
            return np.full(values.shape[1:], np.nan)
        return np.asarray(np.std(means, axis=0, ddof=1) / np.sqrt(len(means)))

    @property
    def _whole(self) -> Bool[np.ndarray, " pair"]:
        """Which pairs have both of their replicas."""
        return np.asarray(self.kept.reshape(-1, 2).all(axis=1))
