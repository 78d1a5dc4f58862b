"""Observables of one run at its start and its end, and along it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from gradflow.study.claims.reading import (
    check_start,
    entry,
    finite,
    inside_window,
    mean,
    observable_values,
    scalar,
)
from gradflow.study.results import RunResult
from gradflow.study.spec.checked import Shapes
from gradflow.study.spec.claim_keys import OfComponent, OfObservable, WithWindow
from gradflow.study.spec.claim_tables import CLAIMS, Measurement
from gradflow.study.spec.errors import Fault
from gradflow.study.spec.locate import Path


@CLAIMS.register
class Final(OfComponent):
    """Mean of an observable over replicas, at the end."""

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Average the last saved values."""
        (run,) = found
        return mean(scalar(self, run)[:, -1], run)


@CLAIMS.register
class Change(OfComponent):
    """Mean over replicas of the final minus the initial value."""

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Average what each replica gained."""
        (run,) = found
        check_start(run)
        values = scalar(self, run)
        return mean(values[:, -1] - values[:, 0], run)


@CLAIMS.register
class ChangeRatio(OfComponent):
    """Mean over replicas of the final over the initial value."""

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Average the factor of each replica."""
        (run,) = found
        check_start(run)
        values = scalar(self, run)
        if np.any(values[:, 0] == 0):
            raise ValueError(f"{self.observable} is 0 at the start")
        return mean(values[:, -1] / values[:, 0], run)


@CLAIMS.register
class ComponentRatio(OfObservable):
    """Mean over replicas of the entry `component` over that of the entry `over`, at the end."""

    component: list[int] = Field(description="indices of one entry of the observable")
    over: list[int] = Field(description="indices of the entry of the observable to divide by")

    def shape_faults(self, shapes: Shapes, at: Path) -> Iterator[Fault]:
        """Indices that do not choose one number."""
        yield from self.entry_faults("component", self.component, shapes, at)
        yield from self.entry_faults("over", self.over, shapes, at)

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Divide the means; the error is that of a ratio of correlated means (delta method)."""
        (run,) = found
        above, below = (entry(self, run, key)[:, -1] for key in ("component", "over"))
        if np.mean(below) == 0:
            raise ValueError(f"{self.observable} {self.over} is 0 at the end")
        ratio = float(np.mean(above) / np.mean(below))
        return Measurement(ratio, mean((above - ratio * below) / np.mean(below), run).error)


@CLAIMS.register
class MaxChange(OfComponent):
    """Largest |x(t) - x(0)| over times, entries and replicas."""

    takes_arrays: ClassVar[bool] = True

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Look at all saved values."""
        (run,) = found
        check_start(run)
        values = observable_values(self, run)
        return Measurement(float(np.max(np.abs(values - values[:, :1]))))


@CLAIMS.register
class DriftRatio(WithWindow):
    """Measured change of the imbalance over the time integral of its exact expected drift."""

    reads: ClassVar[tuple[str, ...]] = ("imbalance", "imbalance_drift")

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        r"""$\langle D(t_1) - D(t_0) \rangle / \int \langle \text{expected drift} \rangle dt$.

        The integral is the exact sum of one-step drifts where every step was saved, and the
        trapezoid rule otherwise. The error is that of a ratio of correlated means (delta method).
        """
        (run,) = found
        inside = inside_window(self, run)
        time = run.trajectory.time[inside]
        moved = finite(run, "imbalance")[:, inside]
        expected = finite(run, "imbalance_drift")[:, inside]
        steps = run.trajectory.step
        if steps is not None and np.all(np.diff(steps[inside]) == 1):
            integral = np.sum(expected[:, :-1] * np.diff(time), axis=1)
        else:
            integral = np.trapezoid(expected, time, axis=1)
        change = moved[:, -1] - moved[:, 0]
        ratio = float(np.mean(change) / np.mean(integral))
        scatter = mean((change - ratio * integral) / np.mean(integral), run)
        return Measurement(ratio, scatter.error, detail=f"t in [{time[0]:.4g}, {time[-1]:.4g}]")
