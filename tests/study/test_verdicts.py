"""Verdicts on claims: holds, fails, undecided, and why."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from specs import HEAD, RUN, make_run

from gradflow.study.claims import judge, rule
from gradflow.study.output import ResultFolder
from gradflow.study.record import write_claims
from gradflow.study.results import StudyResult
from gradflow.study.spec import ClaimSpec, StudySpec


def claim(**keys):
    return ClaimSpec.model_validate(
        {"sentence": "x", "run": "run", "quantity": "final", "observable": "loss", **keys}
    )


def ending_at(value, error=None):
    """A run whose final loss has the given mean and standard error."""
    time = np.array([0.0, 1.0])
    if error is None:
        return {"run": make_run(time=time, loss=np.array([0.0, value]))}
    spread = error * math.sqrt(2) * np.array([-1.0, 1.0]) / math.sqrt(2)
    values = np.stack([np.zeros(2), value + spread], axis=1)
    assert stats.sem(values[:, 1]) == pytest.approx(error)
    return {"run": make_run(time=time, replicas=2, loss=values)}


@pytest.mark.parametrize(
    ("value", "error", "keys", "verdict"),
    [
        (1.04, None, {"expected": 1.0, "tolerance": 0.05}, "holds"),
        (1.06, None, {"expected": 1.0, "tolerance": 0.05}, "fails"),
        (-1.04, None, {"expected": -1.0, "tolerance": 0.05}, "holds"),
        (2e-9, None, {"expected": 0.0, "absolute_tolerance": 1e-8}, "holds"),
        (2e-8, None, {"expected": 0.0, "absolute_tolerance": 1e-8}, "fails"),
        (1.25, 0.1, {"expected": 1.0, "standard_errors": 3}, "holds"),
        (1.35, 0.1, {"expected": 1.0, "standard_errors": 3}, "fails"),
        (1.35, 0.1, {"expected": 1.0, "standard_errors": 3, "tolerance": 0.1}, "holds"),
        # the error is so large that nearly everything would pass
        (1.0, 0.2, {"expected": 1.0, "standard_errors": 3}, "undecided"),
        (1.0, 0.2, {"expected": 1.0, "standard_errors": 3, "resolution": 0.7}, "holds"),
        (1.0, 0.1, {"expected": 1.0, "standard_errors": 3, "resolution": 0.2}, "undecided"),
        (0.0, 0.01, {"expected": 0.0, "standard_errors": 3, "resolution": 0.1}, "holds"),
        (1.0, None, {"expected": 1.0, "standard_errors": 3}, "undecided"),
        (1.0, None, {"at_most": 1.0}, "holds"),
        (1.1, None, {"at_most": 1.0}, "fails"),
        (0.9, None, {"at_least": 1.0}, "fails"),
        (0.5, None, {"at_least": 0.0, "at_most": 1.0}, "holds"),
        (0.8, 0.1, {"at_most": 1.0, "standard_errors": 1}, "holds"),
        (0.95, 0.1, {"at_most": 1.0, "standard_errors": 1}, "undecided"),
        (1.05, 0.1, {"at_most": 1.0, "standard_errors": 1}, "undecided"),
        (1.2, 0.1, {"at_most": 1.0, "standard_errors": 1}, "fails"),
        (math.nan, None, {"expected": 1.0, "tolerance": 0.05}, "fails"),
        (math.inf, None, {"at_least": 1.0}, "fails"),
    ],
)
def test_numbers(value, error, keys, verdict):
    assert judge(claim(**keys), ending_at(value, error)).verdict == verdict


def test_reasons_are_given():
    wide = judge(claim(expected=1.0, standard_errors=3), ending_at(1.0, 0.2))
    assert wide.detail.startswith(
        "3 standard errors are 0.6, more than the resolution 0.5; use more replicas"
    )
    single = judge(claim(expected=1.0, standard_errors=3), ending_at(1.0))
    assert single.detail == "the measured value has no standard error"
    assert "measured value is nan" in judge(claim(at_most=1.0), ending_at(math.nan)).detail
    off = judge(claim(expected=1.0, tolerance=0.01), ending_at(1.5))
    assert off.detail == "off by 0.5, allowed 0.01"


def test_what_cannot_be_measured_fails_with_the_reason():
    result = judge(claim(observable="sharpness", at_most=1.0), ending_at(1.0))
    assert result.verdict == "fails" and math.isnan(result.measured)
    assert "did not record sharpness" in result.detail


def test_a_missing_prediction_is_undecided():
    time = np.linspace(0.0, 1.0, 11)
    runs = {"run": make_run(time=time, imbalance=np.exp(-time))}
    keys = {"quantity": "rate", "observable": None, "window": [0.0, 1.0]}
    result = judge(claim(expected="predicted", tolerance=0.1, **keys), runs)
    assert result.verdict == "undecided" and "no prediction" in result.detail
    assert result.measured == pytest.approx(1.0)


def test_runs_that_did_not_end_are_undecided():
    runs = {"run": make_run(loss=np.ones(11), interrupted=True)}
    assert judge(claim(at_most=2.0), runs).verdict == "undecided"
    assert judge(claim(at_most=2.0), {}).detail == 'run "run" did not reach its end'


def test_agreement_compares_words():
    time = np.linspace(0.0, 1.0, 5)
    runs = {name: make_run(name, time=time, loss=np.ones(5)) for name in ("a", "b")}
    keys = {"quantity": "agreement", "run": None, "runs": ["a", "b"]}
    assert judge(claim(expected="agree", **keys), runs).verdict == "holds"
    assert judge(claim(expected="differ", **keys), runs).verdict == "fails"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"expected": 1.0, "tolerance": 0.05}, "within 5%"),
        ({"expected": 1.0, "standard_errors": 1}, "within 1 standard error"),
        (
            {"expected": 1.0, "tolerance": 0.05, "standard_errors": 3},
            "within 5% + 3 standard errors",
        ),
        ({"expected": 1.0, "absolute_tolerance": 1e-9}, "within 1e-09"),
        ({"at_most": 2.0}, "at most 2"),
        (
            {"at_least": 1.0, "at_most": 2.0, "standard_errors": 2},
            "at least 1 and at most 2, by 2 standard errors",
        ),
    ],
)
def test_rules_in_words(keys, text):
    assert rule(claim(**keys)) == text


def test_claims_are_written_as_strict_json(load, tmp_path: Path):
    spec: StudySpec = load(HEAD + RUN).spec
    claims = (
        judge(claim(at_most=1.0), ending_at(0.5)),
        judge(claim(at_most=1.0), ending_at(math.nan)),
        judge(claim(at_most=1.0), {}),
    )
    folder = ResultFolder(tmp_path / "out")
    write_claims(folder, StudyResult(spec, {}, claims, folder.path, 1.0))
    text = (folder.path / "claims.json").read_text("utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["holds"] is False
    assert found["counts"] == {"holds": 1, "fails": 1, "undecided": 1}
    assert [c["measured"] for c in found["claims"]] == [0.5, None, None]
    assert set(found["claims"][0]) >= {"sentence", "quantity", "rule", "verdict", "detail", "runs"}
