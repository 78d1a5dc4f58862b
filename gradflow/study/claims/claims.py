"""Verdicts: what was measured against what the claim says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gradflow.analysis.unmeasured import in_spec
from gradflow.study.results import ClaimResult, ClaimVerdict, OrdersResult, RunResult
from gradflow.study.spec.claim_tables import Claim, Measurement

RESOLUTION = 0.5
"""A deviation this large, relative to the expected value, must not pass for agreement."""


def judge_all(
    claims: Sequence[Claim],
    runs: Mapping[str, RunResult],
    orders: Mapping[str, OrdersResult],
) -> tuple[ClaimResult, ...]:
    """The verdict on every claim, in order."""
    return tuple(judge(claim, runs, orders) for claim in claims)


def judge(
    claim: Claim,
    runs: Mapping[str, RunResult],
    orders: Mapping[str, OrdersResult] | None = None,
) -> ClaimResult:
    """Measure what a claim is about and compare it with what the claim says.

    A claim is undecided when the value cannot be measured (an observable that is missing or not
    finite, a phase that is not reached, a run that diverged or did not end, a rate that is not
    constant), and when the comparison cannot tell: an expected value that theory does not give, a
    missing standard error, or one so large that nearly every outcome would pass.
    """
    results: dict[str, RunResult | OrdersResult] = {**runs, **(orders or {})}
    lost = [name for name in claim.names if name not in results or results[name].interrupted]
    if lost:
        what = f'{claim.about} "{lost[0]}" did not reach its end'
        return _result(claim, Measurement(math.nan), claim.expected, "undecided", what)
    try:
        measurement = claim.measure([results[name] for name in claim.names])
    except ValueError as error:
        # What was not measured says nothing about what is claimed.
        return _result(claim, Measurement(math.nan), claim.expected, "undecided", in_spec(error))
    if claim.words:
        return _judge_word(claim, measurement)
    if claim.expected == "predicted":
        if measurement.predicted is None or not math.isfinite(measurement.predicted):
            notes = [note for name in claim.names for note in _why(runs[name])]
            reason = "; ".join(["theory gives no prediction", *notes])
            return _result(claim, measurement, math.nan, "undecided", reason)
        return _judge_parts(claim, measurement, measurement.predicted)
    expected = None if claim.expected is None else float(claim.expected)
    return _judge_parts(claim, measurement, expected)


def rule(claim: Claim) -> str:
    """The check of a claim in words."""
    if claim.words:
        if claim.about == "orders":
            return f'"{claim.expected}"'
        tolerance = 0.05 if claim.tolerance is None else claim.tolerance
        return f'verdict "{claim.expected}" at {100 * tolerance:g}%'
    errors = "" if claim.standard_errors is None else _errors(claim.standard_errors)
    if claim.expected is None:
        bounds = []
        if claim.at_least is not None:
            bounds.append(f"at least {claim.at_least:.6g}")
        if claim.at_most is not None:
            bounds.append(f"at most {claim.at_most:.6g}")
        return " and ".join(bounds) + (f", by {errors}" if errors else "")
    parts = []
    if claim.tolerance is not None:
        parts.append(f"{100 * claim.tolerance:g}%")
    if claim.absolute_tolerance is not None:
        parts.append(f"{claim.absolute_tolerance:g}")
    return "within " + " + ".join([*parts, *([errors] if errors else [])])


def _errors(count: float) -> str:
    return f"{count:g} standard error{'s' * (count != 1)}"


def _judge_word(claim: Claim, measurement: Measurement) -> ClaimResult:
    word = measurement.word
    if word not in claim.words:
        return _result(claim, measurement, claim.expected, "undecided", word)
    verdict: ClaimVerdict = "holds" if word == claim.expected else "fails"
    return _result(claim, measurement, claim.expected, verdict, "")


def _why(run: RunResult) -> list[str]:
    """Why theory predicts nothing for a run."""
    if run.prediction is not None:
        return [run.prediction.reason] if run.prediction.reason else []
    return [note for note in run.notes if note.startswith("prediction:")]


def _judge_parts(claim: Claim, measurement: Measurement, expected: float | None) -> ClaimResult:
    """The verdict on a number, undecided if it is none: if its parts deserve different ones."""
    whole = _judge_number(claim, measurement, expected)
    apart = [replace(measurement, value=value, parts=()) for value in measurement.parts]
    if all(_judge_number(claim, part, expected).verdict == whole.verdict for part in apart):
        return whole
    listed = " → ".join(f"{value:.4g}" for value in measurement.parts)
    advice = (
        "narrow it with window = [t_start, t_stop], or compare with a run of kind SlowFlow, which "
        'follows the change (quantity = "displacement_ratio")'
    )
    if "window" not in type(claim).model_fields:
        advice = "claim bounds that all of it obeys, with at_least and at_most"
    reason = f"{claim.quantity} is not one number but {listed} over the window; {advice}"
    return _result(claim, measurement, expected, "undecided", reason)


def _judge_number(claim: Claim, measurement: Measurement, expected: float | None) -> ClaimResult:
    value, error = measurement.value, measurement.error
    if not math.isfinite(value):
        hint = "" if measurement.detail else "; choose an observable or a window with finite values"
        reason = f"the measured value is {value}{hint}"
        return _result(claim, measurement, expected, "undecided", reason)
    noise = 0.0
    if claim.standard_errors is not None:
        if error is None or not math.isfinite(error):
            reason = "the measured value has no standard error"
            return _result(claim, measurement, expected, "undecided", reason)
        noise = claim.standard_errors * error
    if expected is None:
        return _judge_bounds(claim, measurement, noise)
    resolution = claim.resolution
    if resolution is None:
        resolution = RESOLUTION * abs(expected)
    if claim.standard_errors is not None and noise > resolution:
        reason = (
            f"{_errors(claim.standard_errors)} are {noise:.3g}, more than the resolution "
            f"{resolution:.3g}; use more replicas or a longer run"
        )
        return _result(claim, measurement, expected, "undecided", reason)
    margin = (claim.tolerance or 0.0) * abs(expected) + (claim.absolute_tolerance or 0.0) + noise
    deviation = abs(value - expected)
    detail = f"off by {deviation:.3g}, allowed {margin:.3g}"
    verdict: ClaimVerdict = "holds" if deviation <= margin else "fails"
    return _result(claim, measurement, expected, verdict, detail)


def _judge_bounds(claim: Claim, measurement: Measurement, noise: float) -> ClaimResult:
    """A bound holds when the value stays inside it by `noise`, fails when it is outside by it."""
    low = -math.inf if claim.at_least is None else claim.at_least
    high = math.inf if claim.at_most is None else claim.at_most
    value = measurement.value
    if low + noise <= value <= high - noise:
        return _result(claim, measurement, None, "holds", "")
    if value < low - noise or value > high + noise or noise == 0:
        return _result(claim, measurement, None, "fails", "")
    reason = f"the bound is closer than {noise:.3g}; use more replicas or a longer run"
    return _result(claim, measurement, None, "undecided", reason)


def _result(
    claim: Claim,
    measurement: Measurement,
    expected: float | str | None,
    verdict: ClaimVerdict,
    reason: str,
) -> ClaimResult:
    return ClaimResult(
        sentence=claim.sentence,
        quantity=claim.quantity,
        runs=claim.names,
        measured=measurement.value,
        measured_error=None if measurement.parts else measurement.error,
        expected=expected,
        rule=rule(claim),
        verdict=verdict,
        detail="; ".join(part for part in (reason, measurement.detail) if part),
        parts=measurement.parts,
    )
