"""Mean, variance, covariance and extremes of an ensemble that comes in chunks."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Moments:
    r"""The first two moments and the extremes of some entries over paths.

    - `count`: the number of paths $n$.
    - `mean`: $\bar x$ of every entry, `(E,)`; NaN without paths.
    - `squares`: $\sum (x - \bar x)^2$ of every entry, `(E,)`.
    - `products`: $\sum (x_a - \bar x_a)(x_b - \bar x_b)$ of the first `P` entries, `(P, P)`.
    - `minimum`, `maximum`: of every entry, `(E,)`; inf and -inf without paths.

    An entry that is not a number on some path has no moments: they are NaN.
    """

    count: int
    mean: Float[np.ndarray, " entry"]
    squares: Float[np.ndarray, " entry"]
    products: Float[np.ndarray, "paired paired"]
    minimum: Float[np.ndarray, " entry"]
    maximum: Float[np.ndarray, " entry"]

    @classmethod
    def of(cls, values: Float[np.ndarray, "entry path"], paired: int) -> "Moments":
        """The moments of one chunk, with products of the first `paired` entries."""
        values = np.asarray(values, dtype=np.float64)
        entries, count = values.shape
        if count == 0:
            nothing, extreme = np.zeros(entries), np.full(entries, np.inf)
            products = np.zeros((paired, paired))
            return cls(0, np.full(entries, np.nan), nothing, products, extreme, -extreme)
        mean = values.mean(axis=1)
        deviations = values - mean[:, None]
        return cls(
            count,
            mean,
            np.sum(deviations**2, axis=1),
            deviations[:paired] @ deviations[:paired].T,
            values.min(axis=1),
            values.max(axis=1),
        )

    def merged(self, other: "Moments") -> "Moments":
        r"""The moments of both chunks together.

        $$n = n_1 + n_2, \quad \bar x = \bar x_1 + \tfrac{n_2}{n} \delta, \quad
          S = S_1 + S_2 + \tfrac{n_1 n_2}{n} \delta \delta^\top, \quad
          \delta = \bar x_2 - \bar x_1,$$

        exact for any division into chunks up to rounding.

        **Source:** Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
        """
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        delta = other.mean - self.mean
        shared = self.count * (other.count / count)
        paired = delta[: len(self.products)]
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.squares + other.squares + shared * delta**2,
            self.products + other.products + shared * np.outer(paired, paired),
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
        )

    @property
    def variance(self) -> Float[np.ndarray, " entry"]:
        r"""$\sum (x - \bar x)^2 / (n - 1)$ of every entry; NaN for fewer than two paths."""
        return self.squares / self._degrees

    @property
    def covariance(self) -> Float[np.ndarray, "paired paired"]:
        """The covariance matrix of the first `P` entries; NaN for fewer than two paths."""
        return self.products / self._degrees

    @property
    def standard_error(self) -> Float[np.ndarray, " entry"]:
        r"""$\sqrt{\mathrm{Var} / n}$ of the mean of every entry; NaN for fewer than two paths."""
        return np.sqrt(self.variance / max(self.count, 1))

    @property
    def _degrees(self) -> float:
        return self.count - 1 if self.count > 1 else np.nan
