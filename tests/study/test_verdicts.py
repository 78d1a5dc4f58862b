"""Verdicts on claims: holds, fails, undecided, and why."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from specs import HEAD, RUN, make_run

import gradflow as gf
from gradflow.analysis import Prediction
from gradflow.study.claims.claims import judge, rule
from gradflow.study.results import StudyResult
from gradflow.study.run.output import ResultFolder
from gradflow.study.run.record import write_claims
from gradflow.study.spec.claim_tables import CLAIMS
from gradflow.study.spec.spec import StudySpec


def claim(**keys):
    table = {"sentence": "x", "run": "run", "quantity": "final", "observable": "loss", **keys}
    return CLAIMS[table["quantity"]].model_validate(table)


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
        # what was not measured says nothing about the claim
        (math.nan, None, {"expected": 1.0, "tolerance": 0.05}, "undecided"),
        (math.inf, None, {"at_least": 1.0}, "undecided"),
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
    nan = judge(claim(at_most=1.0), ending_at(math.nan)).detail
    assert nan.startswith("the measured value is nan; choose an observable or a window")
    off = judge(claim(expected=1.0, tolerance=0.01), ending_at(1.5))
    assert off.detail == "off by 0.5, allowed 0.01"


def test_what_cannot_be_measured_is_undecided_with_the_reason():
    result = judge(claim(observable="sharpness", at_most=1.0), ending_at(1.0))
    assert result.verdict == "undecided" and math.isnan(result.measured)
    assert "did not record sharpness" in result.detail


def rate_claim(**keys):
    return claim(**{"quantity": "rate", "observable": "imbalance", **keys})


@pytest.mark.parametrize(
    ("keys", "values", "hint"),
    [
        # no end of the optimization phase: nothing acts in this run
        ({}, np.exp(-np.linspace(0.0, 1.0, 11)), "give the claim window = [t_start, t_stop]"),
        ({"window": [0.01, 0.02]}, np.ones(11), "give the claim window = [t_start, t_stop] within"),
        ({"window": [0.0, 1.0]}, np.full(11, -0.0), 'quantity = "drift"'),
        ({"window": [0.0, 1.0], "of_mean": True}, np.ones((1, 11)), None),
        ({"window": [0.0, 1.0], "observable": "sharpness"}, np.ones(11), "observables of the run"),
    ],
)
def test_hints_speak_of_keys_of_the_spec(keys, values, hint):
    replicas = None if values.ndim == 1 else len(values)
    runs = {"run": make_run(replicas=replicas, imbalance=values)}
    result = judge(rate_claim(at_least=0.0, **keys), runs)
    if hint is None:  # one path is its own mean
        assert result.verdict == "holds"
        return
    assert result.verdict == "undecided" and hint in result.detail
    for python in ("window=(", "drift()", "of simulate", "observables="):
        assert python not in result.detail


def test_a_single_noisy_path_is_undecided_in_the_words_of_the_spec():
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)])
    runs = {}
    for name in ("a", "b"):
        run = make_run(name, loss=np.ones(11), problem=problem)
        sgd = gf.Trajectory(
            run.trajectory.to_xarray(), problem, gf.GradientDescent(0.1), run.trajectory.start
        )
        runs[name] = replace(run, trajectory=sgd)
    keys = {"quantity": "agreement", "run": None, "runs": ["a", "b"], "expected": "agree"}
    result = judge(claim(**keys), runs)
    assert result.verdict == "undecided"
    assert 'give run "a" replicas = 64 for a start' in result.detail


def bent(early, late, spread=0.0, replicas=None):
    """A run whose imbalance decays at one rate up to t = 1/3 and at another from there on."""
    time = np.linspace(0.0, 1.0, 31)
    lost = late * time + (early - late) * np.minimum(time, 1 / 3)
    values = np.exp(-lost)
    if replicas is not None:
        values = values * np.exp(-spread * np.linspace(-1.0, 1.0, replicas)[:, None] * time)
    return {"run": make_run(time=time, replicas=replicas, imbalance=values)}


@pytest.mark.parametrize(
    ("keys", "verdict"),
    [
        ({"expected": 1.3, "tolerance": 0.1}, "undecided"),  # 1.3 is near the mean of 2 and 1
        ({"at_most": 1.5}, "undecided"),
        ({"at_least": 0.9}, "holds"),  # wherever it is looked at
        ({"at_least": 3.0}, "fails"),
        ({"expected": 5.0, "tolerance": 0.1}, "fails"),
    ],
)
@pytest.mark.parametrize("replicas", [None, 8])
def test_a_rate_that_is_not_constant_is_no_number_to_hold_against_a_claim(keys, verdict, replicas):
    runs = bent(2.0, 1.0, 0.01, replicas)
    result = judge(rate_claim(window=[0.0, 1.0], **keys), runs)
    assert result.verdict == verdict
    assert "not constant: 2 → 1 → 1" in result.detail
    assert result.parts == pytest.approx((2.0, 1.0, 1.0), rel=1e-9)
    assert result.measured_error is None
    if verdict == "undecided":
        assert "rate is not one number but 2 → 1 → 1 over the window" in result.detail
        assert "window = [t_start, t_stop]" in result.detail
    inner = judge(rate_claim(window=[0.4, 1.0], expected=1.0, tolerance=1e-3), bent(2.0, 1.0))
    assert inner.verdict == "holds" and "not constant" not in inner.detail


def test_ratios_to_a_rate_that_is_not_constant_are_undecided_too():
    nan = math.nan
    limit = gf.DeepLinear([np.ones((1, 1)), np.ones((1, 1))])
    predicted = Prediction(nan, nan, nan, 1.3, -1.3, nan, 0.1, limit)
    run = replace(bent(2.0, 1.0)["run"], prediction=predicted)
    keys = {"quantity": "predicted_ratio", "of": "rate", "window": [0.0, 1.0]}
    result = judge(claim(observable=None, expected=1.0, tolerance=0.1, **keys), {"run": run})
    assert result.verdict == "undecided"
    assert "predicted_ratio is not one number but 1.538 → 0.7692 → 0.7692" in result.detail


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
        judge(claim(at_most=1.0), ending_at(1.5)),
        judge(claim(at_most=1.0), ending_at(math.nan)),
        judge(claim(at_most=1.0), {}),
    )
    folder = ResultFolder(tmp_path / "out")
    write_claims(folder, StudyResult(spec, {}, claims, folder.path, 1.0))
    text = (folder.path / "claims.json").read_text("utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["holds"] is False
    assert found["counts"] == {"holds": 1, "fails": 1, "undecided": 2}
    assert [c["measured"] for c in found["claims"]] == [0.5, 1.5, None, None]
    assert found["claims"][2]["verdict"] == "undecided"
    assert "the measured value is nan" in found["claims"][2]["detail"]
    assert set(found["claims"][0]) >= {"sentence", "quantity", "rule", "verdict", "detail", "runs"}
