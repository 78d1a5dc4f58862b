"""Whether contestants compute the same thing; a benchmark stops if they do not."""

from collections.abc import Mapping
from typing import Any

import numpy as np

STANDARD_ERRORS = 5.0


class DisagreementError(AssertionError):
    """Two contestants do different work."""


def same_distribution(samples: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Compare the means of every quantity over independent paths with those of the first one.

    **Arguments:**

    - `samples`: contestant -> quantity -> one number a path.

    **Returns:** the largest distance of each contestant in standard errors of the difference.

    **Raises:** `DisagreementError` beyond `STANDARD_ERRORS`.
    """
    (reference, expected), *others = samples.items()
    found = {}
    for name, quantities in others:
        worst = 0.0
        for quantity, values in quantities.items():
            a, b = np.asarray(values), np.asarray(expected[quantity])
            error = np.sqrt(a.var() / a.size + b.var() / b.size)
            distance = abs(a.mean() - b.mean()) / error
            if not distance < STANDARD_ERRORS:
                raise DisagreementError(
                    f"{name}: mean {quantity} {a.mean():.6g}, {reference}: {b.mean():.6g}, "
                    f"{distance:.1f} standard errors apart"
                )
            worst = max(worst, float(distance))
        found[name] = worst
    return found


def same_values(values: Mapping[str, Any], tolerance: float) -> dict[str, float]:
    """Compare arrays with the first one.

    **Returns:** the largest difference of each contestant.

    **Raises:** `DisagreementError` beyond `tolerance`.
    """
    (reference, expected), *others = values.items()
    found = {}
    for name, value in others:
        difference = float(np.max(np.abs(np.asarray(value) - np.asarray(expected))))
        if not difference <= tolerance:
            raise DisagreementError(f"{name} and {reference} differ by {difference:.3g}")
        found[name] = difference
    return found
