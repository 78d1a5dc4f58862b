"""Carrying out studies: results, files, interruption, runs that break."""

import json
import signal
import warnings

import jax
import numpy as np
import pytest
import xarray as xr
from specs import HEAD, RUN

import gradflow as gf
from gradflow.study.run import jobs
from gradflow.study.run.build import prepare, run_key
from gradflow.study.run.output import ResultFolder
from gradflow.study.run.progress import Silent
from gradflow.study.run.record import status, write_spec
from gradflow.study.run.runner import run_study

NOISY = """\
[[run]]
name = "noisy"
label = "SGD"
group = "label noise"
dynamics = { kind = "GradientDescent", step_size = 0.05 }
regularizers = [{ kind = "LabelNoise", std = 0.5 }]
replicas = 4
steps = 40
save = { points = 5 }
observables = ["loss", "imbalance"]
"""
CLAIM = """\
[[claim]]
sentence = "The flow conserves the imbalance."
run = "flow"
quantity = "max_change"
observable = "imbalance"
at_most = 1e-6
"""


SLOW = """\
[[run]]
name = "slow"
dynamics = { kind = "SlowFlow", step_size = 0.05 }
regularizers = [{ kind = "LabelNoise", std = 0.5 }]
steps = 40
save = { points = 5 }
observables = ["imbalance", "squared_norms", "end_to_end"]
[[claim]]
sentence = "The slow flow is quick."
runs = ["noisy", "slow"]
quantity = "speed_up"
at_least = 0.0
[[claim]]
sentence = "It conserves the end-to-end matrix."
run = "slow"
quantity = "max_change"
observable = "end_to_end"
at_most = 1e-12
[[claim]]
sentence = "Its rate is that of both theories."
run = "slow"
quantity = "rate"
expected = "predicted"
theory = "leading_order"
tolerance = 0.2
[[claim]]
sentence = "The layers differ in the end."
run = "slow"
quantity = "component_ratio"
observable = "squared_norms"
component = [1]
over = [0]
at_most = 0.5
"""


class Recorder(Silent):
    def __init__(self):
        self.begun, self.ended, self.progress = [], [], []

    def started(self, name):
        self.begun.append(name)

    def advanced(self, name, done, total, message):
        self.progress.append((name, done, total, message))

    def finished(self, result, seconds):
        assert seconds > 0
        self.ended.append(result.name)


def carry_out(load, text, tmp_path, **options):
    study = load(text)
    return run_study(study, prepare(study), tmp_path, **options)


def test_a_study(load, tmp_path):
    reporter = Recorder()
    study = load(HEAD + NOISY + RUN + CLAIM)
    result = run_study(study, prepare(study), tmp_path, reporter=reporter)
    assert result.status == "complete" and result.holds and not result.errors
    assert list(result.runs) == ["noisy", "flow"]
    assert reporter.begun == reporter.ended == ["noisy", "flow"]
    assert {name for name, *_ in reporter.progress} == {"flow", "noisy"}
    noisy = result.runs["noisy"]
    assert (noisy.label, noisy.group, noisy.prediction is not None) == ("SGD", "label noise", True)
    assert any(note.startswith("phases: ") for note in noisy.notes)  # no floor was recorded
    for name, run in result.runs.items():
        with xr.open_dataset(tmp_path / "runs" / f"{name}.nc") as stored:
            assert np.array_equal(stored["imbalance"], run.trajectory["imbalance"])


@pytest.mark.slow
def test_a_run_with_antithetic_normals(load, tmp_path):
    """Replicas go with the normals of the spec, and its claims have errors of pairs."""
    claim = CLAIM.replace('"flow"', '"noisy"').replace('"max_change"', '"final"')
    text = HEAD + NOISY + "normals = { antithetic = true }\n" + claim
    result = carry_out(load, text, tmp_path)
    stored = gf.Trajectory.load(tmp_path / "runs" / "noisy.nc")
    assert stored.normals == gf.Normals(antithetic=True)
    last = stored["imbalance"][:, -1].reshape(2, 2).mean(axis=1)
    np.testing.assert_allclose(result.claims[0].measured_error, abs(last[0] - last[1]) / 2)


@pytest.mark.slow
def test_a_slow_flow_beside_sgd_and_what_they_take_without_compilation(
    load, tmp_path, monkeypatch, caplog
):
    calls = []

    def watched(*args, **keys):
        caplog.clear()
        with jax.log_compiles():
            trajectory = gf.simulate(*args, **keys)
        compilations = sum("XLA compilation" in record.message for record in caplog.records)
        calls.append((keys["steps"], compilations > 0))
        return trajectory

    monkeypatch.setattr(jobs, "simulate", watched)
    # Shapes of its own, so that no other test has compiled these runs.
    head = HEAD.replace("[[2.0]], [[0.1]]", "[[1.5], [0.5]], [[0.2, 0.3]]")
    result = carry_out(load, head + NOISY.replace("replicas = 4", "replicas = 3") + SLOW, tmp_path)
    assert calls == [(1, True), (40, False), (1, True), (40, False)]
    assert result.holds, [(claim.sentence, claim.measured) for claim in result.claims]
    slow = result.runs["slow"]
    assert slow.phases is None and slow.rate is not None and slow.notes == ()
    seconds = [result.runs[name].trajectory.attrs["wall_time_s"] for name in ("noisy", "slow")]
    assert result.claims[0].measured == seconds[0] / seconds[1]


def test_a_run_of_a_study_is_the_same_as_a_call_of_simulate(load, tmp_path):
    study = load(HEAD + RUN + NOISY)
    result = run_study(study, prepare(study), tmp_path)
    net = gf.DeepLinear([np.array([[2.0]]), np.array([[0.1]])])
    alone = gf.simulate(
        gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)]),
        net,
        gf.GradientDescent(0.05),
        steps=40,
        replicas=4,
        key=run_key(study.spec, study.spec.run[1]),
        save=5,
        observables=["loss", "imbalance"],
        progress=False,
    )
    assert np.array_equal(alone["loss"], result.runs["noisy"].trajectory["loss"])


def test_integrating_only(load, tmp_path):
    result = carry_out(load, HEAD + RUN + NOISY + CLAIM, tmp_path, evaluate=False)
    assert result.claims == () and all(run.prediction is None for run in result.runs.values())


def test_what_is_written_about_a_study(load, tmp_path):
    study = load(HEAD + RUN + CLAIM, seed=4)
    folder = ResultFolder(tmp_path / "out")
    write_spec(folder, study)
    result = run_study(study, prepare(study), folder.path)
    out = folder.publish(status(result, study))
    assert (out / "spec.toml").read_text() == HEAD + RUN + CLAIM
    settings = json.loads((out / "spec.json").read_text())
    assert settings["seed"] == 4 and settings["run"][0]["save"]["points"] == 101
    about = json.loads((out / "status.json").read_text())
    assert about["status"] == "complete" and about["seed"] == 4
    assert about["runs"]["flow"] == {"status": "complete", "diverged": 0, "notes": []}


def test_ctrl_c_keeps_what_was_done(load, tmp_path):
    endless = NOISY.replace("noisy", "endless").replace("steps = 40", "steps = 2000000000")

    class CtrlC(Recorder):
        def advanced(self, name, done, total, message):
            if name == "endless":
                signal.raise_signal(signal.SIGINT)  # handled by the main thread

    text = HEAD + RUN + endless + NOISY + CLAIM
    result = carry_out(load, text, tmp_path, reporter=CtrlC())
    assert result.status == "interrupted" and result.claims == ()
    assert list(result.runs) == ["flow", "endless"]
    assert result.runs["endless"].trajectory.interrupted
    assert not result.runs["flow"].trajectory.interrupted
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["endless.nc", "flow.nc"]
    assert gf.Trajectory.load(tmp_path / "runs" / "endless.nc").interrupted


def test_a_run_that_breaks_does_not_stop_the_others(load, tmp_path, monkeypatch):
    def fragile(problem, *arguments, **options):
        if problem.is_stochastic:
            raise ValueError("the machine is on fire")
        return gf.simulate(problem, *arguments, **options)

    monkeypatch.setattr(jobs, "simulate", fragile)
    noisy_claim = CLAIM.replace("flow", "noisy")
    result = carry_out(load, HEAD + NOISY + RUN + CLAIM + noisy_claim, tmp_path)
    assert result.status == "failed" and list(result.runs) == ["flow"]
    assert result.errors == {"noisy": "the machine is on fire"}
    assert [claim.verdict for claim in result.claims] == ["holds", "undecided"]


def test_an_unexpected_error_keeps_its_traceback(load, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "simulate", lambda *_, **__: {}["gone"])
    result = carry_out(load, HEAD + RUN, tmp_path)
    assert "Traceback" in result.errors["flow"] and "KeyError: 'gone'" in result.errors["flow"]


def test_warnings_become_notes_of_their_run(load, tmp_path, monkeypatch):
    def talkative(*arguments, **options):
        warnings.warn("rather coarse", UserWarning, stacklevel=2)
        return gf.simulate(*arguments, **options)

    monkeypatch.setattr(jobs, "simulate", talkative)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = carry_out(load, HEAD + RUN, tmp_path)
    assert result.runs["flow"].notes == ("rather coarse",)


@pytest.mark.slow
def test_diverged_replicas_are_noted(load, tmp_path):
    text = HEAD + NOISY.replace("step_size = 0.05", "step_size = 5.0")
    result = carry_out(load, text, tmp_path, evaluate=False)
    assert "4 of 4 replicas diverged" in result.runs["noisy"].notes
