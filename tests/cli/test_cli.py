"""The program `gradflow`: exit statuses, folders, messages, Ctrl-C."""

import json
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from specs import HEAD, RUN
from typer.testing import CliRunner

from gradflow.cli import app as cli, commands as command
from gradflow.study.spec.load import load_study

PROGRAM = [sys.executable, "-m", "gradflow"]

GOOD = (
    HEAD
    + RUN
    + """\
regularizers = [{ kind = "WeightDecay", rate = 0.1 }]
observables = ["loss", "imbalance"]
[[figure]]
kind = "time_series"
name = "losses"
observables = ["loss"]
[[claim]]
sentence = "Weight decay removes the imbalance at twice its rate."
run = "flow"
quantity = "rate"
window = [0.0, 1.0]
expected = 0.2
tolerance = 1e-4
"""
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "good.toml").write_text(GOOD)
    (tmp_path / "false.toml").write_text(GOOD.replace("expected = 0.2", "expected = 0.3"))
    (tmp_path / "bad.toml").write_text(GOOD.replace("rate = 0.1", "rate = -0.1"))
    return tmp_path


def call(*arguments: str):
    """Call the program inside this process."""
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def status(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["status"]


@pytest.mark.slow
def test_the_program_runs_a_study_and_repeats_it(folder):
    run = subprocess.run(
        [*PROGRAM, "study", "good.toml"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    out = folder / "results" / "test"
    assert {path.name for path in out.iterdir()} == {
        "claims.json", "figures", "report.html", "runs", "spec.json", "spec.toml", "status.json",
    }  # fmt: skip
    assert {path.name for path in (out / "figures").iterdir()} == {"losses.png", "losses.svg"}
    assert status(out) == "complete" and (out / "spec.toml").read_text() == GOOD
    (claim,) = json.loads((out / "claims.json").read_text())["claims"]
    assert claim["verdict"] == "holds" and claim["measured"] == pytest.approx(0.2, rel=1e-6)
    assert re.search(r"\[1/1\] flow: done \(\d", run.stdout)
    assert "Weight decay removes the imbalance" in run.stdout and "holds" in run.stdout
    assert run.stdout.rstrip().endswith(f"Report: {out / 'report.html'}")

    # a result is refused unless it is to be replaced, and can itself be run again
    refused = call("study", "good.toml")
    assert refused.exit_code == 2
    assert refused.stderr == (
        "results/test: holds a complete result; replace it with --overwrite or choose another "
        "--out\n"
    )
    again = call("study", "results/test", "--overwrite", "--quiet")
    assert again.exit_code == 0 and again.output == ""
    assert [path.name for path in (folder / "results").iterdir()] == ["test"]


def test_a_claim_that_fails(folder):
    result = call("study", "false.toml", "--out", "here")
    assert result.exit_code == 1
    assert "fails" in result.stdout and "0 of 1 claims hold, 1 fails" in result.stdout
    assert "off by 0.1" in result.stdout
    assert (folder / "here" / "report.html").exists()


@pytest.mark.slow
def test_a_claim_that_cannot_be_measured_is_undecided_everywhere(folder):
    """No regularizer, so no end of the optimization phase, and no rate after it."""
    text = GOOD.replace('regularizers = [{ kind = "WeightDecay", rate = 0.1 }]\n', "")
    (folder / "open.toml").write_text(text.replace("window = [0.0, 1.0]\n", ""))
    result = call("study", "open.toml", "--out", "here")
    assert result.exit_code == 1
    assert "0 of 1 claims hold, 1 is undecided." in result.stdout
    told = " ".join(result.stdout.split())
    assert "? undecided" in told and "give the claim window = [t_start, t_stop]" in told
    found = json.loads((folder / "here" / "claims.json").read_text())
    assert found["counts"] == {"holds": 0, "fails": 0, "undecided": 1}
    assert "give the claim window = [t_start, t_stop]" in found["claims"][0]["detail"]
    page = (folder / "here" / "report.html").read_text(encoding="utf-8")
    assert "0 of 1 claims hold, 1 is undecided." in page
    assert "give the claim window = [t_start, t_stop]" in page
    assert "window=(" not in page + result.stdout


def test_values_over_thirds_of_the_window_are_explained(folder):
    """The imbalance falls as exp(-0.2 t), so its slope does, and is not one number."""
    text = GOOD.replace("expected = 0.2\ntolerance = 1e-4", "at_most = 0.0")
    (folder / "slope.toml").write_text(text.replace('quantity = "rate"', 'quantity = "drift"'))
    told = call("study", "slope.toml", "--out", "here").stdout
    assert re.search(r"0\.\d+ → .?0\.\d+ → .?0\.\d+", told)
    assert "→: not one number, but over the thirds of the window" in told
    assert "→" not in call("study", "good.toml", "--out", "there").stdout


def test_bad_input(folder):
    result = call("study", "bad.toml", "good.toml", "nowhere")
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert (
        first
        == 'bad.toml:12: run "flow", regularizers[0].rate: must be a finite number >= 0; got -0.1'
    )
    assert second.startswith('"nowhere" is neither a file nor a shipped experiment; shipped: ')
    assert not (folder / "results").exists()


def test_nothing_is_run_when_a_folder_cannot_be_used(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("x")
    result = call("study", "good.toml", "--out", "mine", "--overwrite")
    assert result.exit_code == 2 and "not a gradflow result" in result.stderr
    both = call("study", "good.toml", "false.toml")
    assert both.exit_code == 2
    assert both.stderr == ("results/test: two of the SPECs are to write here; rename one of them\n")
    assert not (folder / "results").exists()


def test_several_studies_and_integrating_only(folder):
    (folder / "other.toml").write_text(GOOD.replace('"test"', '"other"'))
    result = call("run", "good.toml", "other.toml", "--out", "all", "--seed", "3")
    assert result.exit_code == 0
    for name in ("test", "other"):
        out = folder / "all" / name
        assert {path.name for path in out.iterdir()} == {
            "runs", "spec.json", "spec.toml", "status.json",
        }  # fmt: skip
        assert json.loads((out / "spec.json").read_text())["seed"] == 3


@pytest.mark.slow
def test_a_figure_that_cannot_be_drawn_is_bad_input_but_loses_nothing(folder):
    text = GOOD.replace("t1 = 1.0", "t1 = 1.0\nstore_weights = false")
    (folder / "good.toml").write_text(text + '[[figure]]\nkind = "phase_portrait"\n')
    result = call("study", "good.toml")
    assert result.exit_code == 2 and "stored no weights" in result.stderr
    assert (folder / "results/test/figures/losses.png").exists()
    assert (folder / "results/test/report.html").exists()
    assert status(folder / "results/test") == "complete"


def test_ctrl_c(folder):
    endless = (
        RUN.replace('"flow"', '"endless"')
        .replace('{ kind = "GradientFlow" }', '{ kind = "GradientDescent", step_size = 1e-9 }')
    )  # fmt: skip
    (folder / "long.toml").write_text(HEAD + RUN + endless)
    with subprocess.Popen(
        [*PROGRAM, "study", "long.toml"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[1/2]"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 130
    out = folder / "results" / "test"
    assert status(out) == "interrupted" and (out / "runs" / "flow.nc").exists()
    assert "Ctrl-C: stopping" in rest and "Interrupted: 1 of 2 runs reached their end." in rest
    assert [path.name for path in out.parent.iterdir()] == ["test"]
    refused = call("study", "good.toml")
    assert refused.exit_code == 2 and "a result with status 'interrupted'" in refused.stderr


def test_an_unexpected_error_is_not_mistaken_for_a_failing_claim(folder, monkeypatch, capfd):
    monkeypatch.setattr(command, "_integrate", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gradflow", "study", "good.toml"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 3
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert status(folder / "results" / "test") == "failed"


def test_help_teaches():
    text = call("study", "--help").stdout
    for word in (
        "gradflow kinds",
        "report.html",
        "claims.json",
        "Exit status",
        "--overwrite",
        "--short",
    ):
        assert word in text


def test_the_help_about_orders_is_consistent():
    text = " ".join(call("orders", "--help").stdout.split())
    assert text.count("default: discretization") == 2 and "two_phases" not in text
    assert "TABLE.json" in text and "JSON" in call("study", "--help").stdout


def test_the_spec_in_the_help_is_valid(tmp_path):
    text = cli.STUDY_HELP.partition("\b\n  name =")[2].rpartition("\n")[0]
    path = tmp_path / "mine.toml"
    path.write_text("name =" + text)
    assert tomllib.loads(path.read_text())["name"] == load_study(path).spec.name == "mine"


def test_the_orders_table_in_the_help_is_valid(tmp_path):
    start = cli.STUDY_HELP.partition("\b\n  name =")[2].partition("  [[run]]")[0]
    table = cli.ORDERS_HELP.partition("\b\n")[2].partition("\n\nExit")[0]
    path = tmp_path / "mine.toml"
    path.write_text("name =" + start + table)
    (orders,) = load_study(path, part="orders").spec.orders
    assert orders.first.step_size == orders.step_sizes[0]


@pytest.mark.slow
def test_predict(folder):
    """Weight decay under gradient flow: rate and half-life in closed form, balanced at the end."""
    second = RUN.replace('"flow"', '"noisy"').replace(
        '{ kind = "GradientFlow" }', '{ kind = "GradientDescent", step_size = 0.05 }'
    )
    first, figure, rest = GOOD.partition("[[figure]]")
    noise = 'regularizers = [{ kind = "GradientNoise", std = 0.1 }]\n'
    (folder / "both.toml").write_text(first + second + noise + figure + rest)
    result = call("predict", "both.toml")
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    row = next(line for line in lines if line.startswith("flow"))
    assert row.split()[2:5] == ["0.2", "0.2", f"{np.log(2.0) / 0.2:.4g}"]
    (note,) = [line for line in lines if line.startswith("noisy: ")]
    assert "makes the motion random" in note
    assert not (folder / "results").exists()
    only = call("predict", "both.toml", "--run", "noisy").stdout
    assert "noisy" in only and "flow" not in only.split()


def test_a_run_without_a_prediction_says_why_and_shows_in_the_exit_status(folder):
    text = GOOD.replace('{ kind = "GradientFlow" }', '{ kind = "ModifiedFlow", step_size = 0.05 }')
    (folder / "other.toml").write_text(text)
    result = call("predict", "other.toml")
    assert result.exit_code == 1, result.output
    assert "see below" in result.stdout and "got ModifiedFlow" in result.stdout
    assert "1 of 1 run without a prediction" in result.stdout
    assert "run 1 of 1: flow" in result.stderr


def test_predict_refuses_bad_input(folder):
    unknown = call("predict", "good.toml", "--run", "flaw")
    assert unknown.exit_code == 2
    assert unknown.stderr == ('good.toml: --run: got "flaw"; did you mean "flow"? runs: flow\n')
    bad = call("predict", "bad.toml")
    assert bad.exit_code == 2 and "regularizers[0].rate: must be" in bad.stderr


def test_the_help_of_predict_teaches():
    text = call("predict", "--help").stdout
    for word in ("h -> 0", "exact in the step size", "--run", "Half-life", "steps=10**7"):
        assert word in text


def test_list_and_version():
    listed = call("list").stdout.splitlines()
    names = [line.split()[0] for line in listed]
    assert names == sorted(names) and {"conservation", "diabetes", "two_phases"} <= set(names)
    assert re.fullmatch(r"gradflow \d+\.\d+\S*\n", call("--version").stdout)
