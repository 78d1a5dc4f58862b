"""What two runs are beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field
from scipy.interpolate import PchipInterpolator

from gradflow.analysis.comparison.compare import compare_trajectories
from gradflow.study.claims.rates import phase_window
from gradflow.study.claims.reading import Values, mean, scalar, stored_weights
from gradflow.study.results import RunResult
from gradflow.study.spec.claim_keys import OfComponent, OfObservable, WithWindow
from gradflow.study.spec.claim_tables import CLAIMS, Measurement, RunsClaim
from gradflow.study.spec.tables import NonNegative

ROUNDING = 1e-9
"""Ends of runs that differ by no more than this are the same: one of them may be on a grid."""


@CLAIMS.register
class PathDifference(RunsClaim):
    """Largest difference of the weights of two runs over entries, times and replicas (stored
    weights, the same saved times).
    """

    count: ClassVar[tuple[int, int | None]] = (2, 2)
    of_weights: ClassVar[bool] = True

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Compare all saved weights."""
        first, second = found
        if not np.allclose(first.trajectory.time, second.trajectory.time, rtol=1e-12, atol=0.0):
            raise ValueError("the two runs are saved at different times")
        pairs = zip(stored_weights(first), stored_weights(second), strict=True)
        return Measurement(max(float(np.max(np.abs(a - b))) for a, b in pairs))


@CLAIMS.register
class Difference(OfComponent):
    """Mean of an observable at the end in the first run minus that in the second."""

    count: ClassVar[tuple[int, int | None]] = (2, 2)

    relative: bool = Field(
        default=False, description="true (difference divided by the second run's value) or false"
    )

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Subtract the means; the runs are independent."""
        first, second = (mean(scalar(self, run)[:, -1], run) for run in found)
        both = f"{first.value:.6g} and {second.value:.6g}"
        error = math.hypot(first.error or 0.0, second.error or 0.0)
        has_error = first.error is not None or second.error is not None
        scale = abs(second.value) if self.relative else 1.0
        if scale == 0:
            raise ValueError(f"{self.observable} of the second run is 0, nothing to be relative to")
        return Measurement(
            (first.value - second.value) / scale, error / scale if has_error else None, detail=both
        )


@CLAIMS.register
class DisplacementRatio(WithWindow, OfComponent):
    """Mean change of an observable in the first run over that in the second (default window: the
    regularization phase of the first).
    """

    count: ClassVar[tuple[int, int | None]] = (2, 2)

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        r"""$\langle x(t_1) - x(t_0) \rangle$ of the first run over that of the second.

        The times are the first and the last that the first run saved in the window: the claim's, or
        the regularization phase of the first run. The second run is interpolated there. The runs
        are independent, so their relative errors add in quadrature.
        """
        first, second = found
        ends = self._ends(first, second)
        moved, expected = (mean(self._moved(run, ends), run) for run in found)
        if expected.value == 0:
            raise ValueError(f'{self.observable} does not change in run "{second.name}"')
        ratio = moved.value / expected.value
        error = math.hypot(moved.error or 0.0, ratio * (expected.error or 0.0))
        has_error = moved.error is not None or expected.error is not None
        detail = f"{moved.value:.6g} over {expected.value:.6g}, t in [{ends[0]:.4g}, {ends[1]:.4g}]"
        return Measurement(ratio, error / abs(expected.value) if has_error else None, detail=detail)

    def _ends(self, first: RunResult, second: RunResult) -> Values:
        """The two times between which the changes are taken."""
        own, other = first.trajectory.time, second.trajectory.time
        window = phase_window(self, first)
        if window is None:
            raise ValueError(
                f'run "{first.name}" has no end of its optimization phase; give the claim '
                "window = [t_start, t_stop]"
            )
        low, high = window
        inside = own[(own >= max(low, other[0])) & (own <= min(high, other[-1] * (1 + ROUNDING)))]
        if inside.size < 2:
            raise ValueError(
                f'run "{first.name}" saved fewer than two times in the window [{low:g}, {high:g}] '
                f'that run "{second.name}" covers'
            )
        return inside[[0, -1]]

    def _moved(self, run: RunResult, ends: Values) -> Values:
        """What the claim's observable changes between two times, `(replica,)`."""
        time = run.trajectory.time
        between = PchipInterpolator(time, scalar(self, run), axis=1)
        start, stop = between(np.minimum(ends, time[-1])).T
        return stop - start


@CLAIMS.register
class SpeedUp(RunsClaim):
    """Wall time of the first run over that of the second, both without compilation."""

    count: ClassVar[tuple[int, int | None]] = (2, 2)
    of_wall_time: ClassVar[bool] = True

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Divide the times, all replicas of a run together.

        The runner compiles the runs of such a claim before it times them.
        """
        first, second = (float(run.trajectory.attrs["wall_time_s"]) for run in found)
        return Measurement(first / second, detail=f"{first:.3g} s over {second:.3g} s")


@CLAIMS.register
class Agreement(OfObservable):
    """Whether two runs agree on an observable within `tolerance` (default 0.05) at all times."""

    count: ClassVar[tuple[int, int | None]] = (2, 2)
    words: ClassVar[tuple[str, ...]] = ("agree", "differ")
    takes_arrays: ClassVar[bool] = True

    times: list[NonNegative] | None = Field(
        default=None, min_length=1, description="flow times at which runs are compared"
    )

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Compare the runs; the value is their largest relative difference."""
        first, second = found
        if first.name == second.name:
            raise ValueError(f'runs: "{first.name}" is compared with itself')
        comparison = compare_trajectories(
            {first.name: first.trajectory, second.name: second.trajectory},
            [self.observable],
            self.times,
            **({} if self.tolerance is None else {"tolerance": self.tolerance}),
        )
        (verdict,) = comparison.verdicts
        sizes = [abs(row.relative) for row in comparison.rows if math.isfinite(row.relative)]
        largest = max(sizes, default=math.nan)
        return Measurement(largest, word=verdict.verdict, detail=verdict.reason)
