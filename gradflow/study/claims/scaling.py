"""Quantities of other quantities: over what theory predicts, and over many runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from gradflow.study.results import RunResult
from gradflow.study.spec.checked import Jobs
from gradflow.study.spec.claim_keys import OfQuantity, WithTheory, WithWindow
from gradflow.study.spec.claim_tables import CLAIMS, Measurement
from gradflow.study.spec.errors import Fault, not_one_of
from gradflow.study.spec.locate import Path
from gradflow.study.spec.run_tables import parameters

_OF_MEAN = Field(
    default=False, description="true (rate of the mean over replicas) or false (mean of the rates)"
)


@CLAIMS.register
class PredictedRatio(WithTheory, WithWindow, OfQuantity):
    """Measured over predicted value of the quantity named by `of`."""

    of_mean: bool = _OF_MEAN

    @property
    def needs_prediction(self) -> bool:
        """Always."""
        return True

    @classmethod
    def fitting(cls) -> list[str]:
        """The quantities that theory predicts."""
        return [name for name in super().fitting() if CLAIMS[name].predicts]

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Divide what is measured by what is predicted."""
        (run,) = found
        inner = self.inner(run.name).measure(found)
        if inner.predicted is None or not math.isfinite(inner.predicted) or inner.predicted == 0:
            raise ValueError(f"theory gives no prediction of {self.of} for this run")
        error = None if inner.error is None else inner.error / abs(inner.predicted)
        detail = f"{inner.value:.6g} over {inner.predicted:.6g}"
        parts = tuple(value / inner.predicted for value in inner.parts)
        if parts:
            detail = f"{detail}; {inner.detail}"
        return Measurement(inner.value / inner.predicted, error, detail=detail, parts=parts)


@CLAIMS.register
class Exponent(WithWindow, OfQuantity):
    """Slope of the log of |quantity named by `of`| against the log of `parameter` over runs."""

    count: ClassVar[tuple[int, int | None]] = (2, None)
    pools_runs: ClassVar[bool] = True

    parameter: str = Field(
        description="a parameter of the runs, such as 'step_size' or 'LabelNoise.std'"
    )
    component: list[int] | None = Field(
        default=None, description="indices of one entry of the observable"
    )
    of_mean: bool = _OF_MEAN

    def faults(self, jobs: Jobs, at: Path) -> Iterator[Fault]:
        """Also a parameter that a run does not have, or that is the same in all."""
        yield from super().faults(jobs, at)
        runs, parameter = jobs.named(self.names), self.parameter
        for run in runs:
            if parameter not in (known := parameters(run)):
                has = f'run "{run.name}" has'
                yield Fault((*at, "parameter"), not_one_of(parameter, known, what=has))
                return
        if len({parameters(run)[parameter] for run in runs}) < 2:
            message = f"{parameter} is the same in all runs; an exponent needs different values"
            yield Fault((*at, "parameter"), message)

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Least-squares slope of log|quantity| against log(parameter) over runs.

        The error is the larger of the scatter about the line (three runs or more) and what the
        errors of the points carry over to the slope.
        """
        points = [self.inner(run.name).measure([run]) for run in found]
        values = np.array([point.value for point in points])
        if not np.all(np.isfinite(values)) or np.any(values == 0):
            raise ValueError(
                f"{self.of} is {', '.join(f'{v:.3g}' for v in values)}; its log is needed"
            )
        x = np.log([parameters(run.spec)[self.parameter] for run in found])
        y = np.log(np.abs(values))
        leverage = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
        value = float(np.sum(leverage * y))
        errors = np.array([(point.error or 0.0) / abs(point.value) for point in points])
        carried = float(np.sqrt(np.sum((leverage * errors) ** 2)))
        scatter = 0.0
        if len(found) > 2:
            residual = y - y.mean() - value * (x - x.mean())
            variance = np.sum(residual**2) / (len(found) - 2)
            scatter = float(np.sqrt(variance * np.sum(leverage**2)))
        error = max(carried, scatter)
        detail = ", ".join(f"{v:.4g}" for v in values)
        return Measurement(value, error if error > 0 else None, detail=f"{self.of}: {detail}")
