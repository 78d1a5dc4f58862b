"""Rates and phases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from gradflow.analysis.rates import Rate as Fitted, decay_rate, drift
from gradflow.study.claims.reading import claim_window, known
from gradflow.study.results import RunResult
from gradflow.study.spec.claim_keys import WithObservable, WithTheory, WithWindow
from gradflow.study.spec.claim_tables import CLAIMS, Measurement


class _Slope(WithTheory, WithWindow, WithObservable):
    """How fast an observable changes in the regularization phase."""

    predicts: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("imbalance",)

    def fitted(self, measured: Fitted, run: RunResult, predicted: str) -> Measurement:
        """What was fitted, beside what theory says of the imbalance."""
        of_imbalance = self.observable in (None, "imbalance")
        return Measurement(
            measured.value,
            known(measured.standard_error),
            prediction_of(self, run, predicted) if of_imbalance else None,
            detail=_window_text(measured),
            parts=() if measured.constant else measured.local,
        )


@CLAIMS.register
class Rate(_Slope):
    """Exponential decay rate of an observable (default: imbalance) in the regularization phase."""

    of_mean: bool = Field(
        default=False,
        description="true (rate of the mean over replicas) or false (mean of the rates)",
    )

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Fit it in the phase or the window."""
        (run,) = found
        observable, of = self.observable or "imbalance", "mean" if self.of_mean else "replica"
        window = phase_window(self, run)
        measured = decay_rate(run.trajectory, observable, window=window, of=of)
        return self.fitted(measured, run, "imbalance_rate")


@CLAIMS.register
class Drift(_Slope):
    """Linear slope of an observable (default: imbalance) in the regularization phase."""

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Fit it in the phase or the window."""
        (run,) = found
        observable = self.observable or "imbalance"
        measured = drift(run.trajectory, observable, window=phase_window(self, run))
        return self.fitted(measured, run, "imbalance_drift")


def phase_window(claim: WithWindow, run: RunResult) -> tuple[float, float] | None:
    """The claim's window, or the regularization phase; None leaves the choice to the fit."""
    time = run.trajectory.time
    if claim.window is None and run.is_slow:
        return float(time[0]), float(time[-1])
    if claim.window is None and run.phases and math.isfinite(run.phases.optimization_end):
        return run.phases.optimization_end, float(time[-1])
    return claim_window(claim)


def prediction_of(claim: WithTheory, run: RunResult, field: str) -> float | None:
    """What the theory that the claim names says, None where it says nothing."""
    source = run.prediction
    if source is not None and claim.theory is not None:
        source = source.laws.get(claim.theory)
    return None if source is None else float(getattr(source, field))


def _window_text(measured: Fitted) -> str:
    window = f"t in [{measured.window[0]:.4g}, {measured.window[1]:.4g}]"
    return f"{window}; {measured.note}" if measured.note else window


# --- the two phases -----------------------------------------------------------------------------


class _Phases(WithTheory):
    """A number of the two phases."""

    predicts: ClassVar[bool] = True

    def read(self, run: RunResult, value: str, error: str) -> Measurement:
        """A field of the phases, with its error."""
        if run.phases is None:
            raise ValueError("; ".join(run.notes) or "the run has no phases")
        return Measurement(
            float(getattr(run.phases, value)),
            known(getattr(run.phases, error)),
            prediction_of(self, run, value),
            detail=run.phases.reason or run.phases.note,
        )


@CLAIMS.register
class OptimizationEnd(_Phases):
    """Flow time at which the optimization phase ends."""

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Read it off the phases."""
        return self.read(found[0], "optimization_end", "standard_error")


@CLAIMS.register
class OptimizationRate(_Phases):
    """Exponential rate of the optimization phase."""

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Read it off the phases; in parts where it is not constant."""
        measured = self.read(found[0], "optimization_rate", "optimization_rate_error")
        phases = found[0].phases
        if phases is None or phases.optimization_rate_constant:
            return measured
        return replace(measured, parts=phases.optimization_rate_local)


@CLAIMS.register
class Separation(_Phases):
    """Optimization rate over regularization rate."""

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Read it off the phases; in parts where one of the rates is not constant."""
        (run,) = found
        measured = self.read(run, "separation", "separation_error")
        phases = run.phases
        rate = None if phases is None else phases.regularization_rate
        if phases is None or rate is None or not phases.changing:
            return measured
        bends = not phases.optimization_rate_constant
        fast = phases.optimization_rate_local if bends else (phases.optimization_rate,)
        slow = (rate.value,) if rate.constant else rate.local
        if 0.0 in slow:
            return measured
        ratios = tuple(one / other for one in fast for other in slow)
        if len(fast) > 1 and len(slow) > 1:
            ratios = min(ratios), max(ratios)
        detail = measured.detail or rate.note or f"{phases.changing} not constant"
        return replace(measured, detail=detail, parts=ratios)
