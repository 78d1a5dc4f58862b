"""The result folder: whole or not there, and never a mixture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradflow.study.run.output import OutputError, ResultFolder, abandoned_folders, read_status


def finished(out: Path, name: str = "data.txt", status: str = "complete") -> Path:
    folder = ResultFolder(out)
    folder.write_text(name, "x")
    return folder.publish({"status": status})


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


def test_nothing_shows_until_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    folder = ResultFolder(out)
    folder.write_text("data.txt", "x")
    assert not out.exists()
    assert read_status(folder.path) == "running"
    assert folder.publish({"status": "complete"}) == out
    assert sorted(path.name for path in out.iterdir()) == ["data.txt", "status.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert json.loads((out / "status.json").read_text())["made_by"] == "gradflow"


@pytest.mark.parametrize("status", ["complete", "interrupted", "failed", "running"])
def test_a_result_is_refused_and_can_be_replaced(tmp_path, status):
    out = finished(tmp_path / "out", status=status)
    with pytest.raises(OutputError, match="--overwrite or choose another --out") as caught:
        ResultFolder(out)
    what = "a complete result" if status == "complete" else f"a result with status '{status}'"
    assert what in str(caught.value)
    folder = ResultFolder(out, overwrite=True)
    assert (out / "data.txt").exists()  # until the new one is whole
    folder.write_text("new.txt", "y")
    folder.publish({"status": "complete"})
    assert sorted(path.name for path in out.iterdir()) == ["new.txt", "status.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("status", [None, "{", "[]", '{"status": "complete"}'])
def test_folders_of_others_are_never_replaced(tmp_path, status):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("all of it")
    if status is not None:
        (out / "status.json").write_text(status)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not a gradflow result"):
            ResultFolder(out, overwrite=overwrite)
    assert (out / "chapter.tex").read_text() == "all of it"


def test_files_are_refused_and_empty_folders_taken(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        ResultFolder(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert finished(tmp_path / "empty") == tmp_path / "empty"


def test_a_name_taken_meanwhile_keeps_both_results(tmp_path):
    first = ResultFolder(tmp_path / "out")
    first.write_text("first.txt", "x")
    other = tmp_path / "out"
    other.mkdir()
    (other / "other.txt").write_text("y")
    with pytest.raises(OutputError, match="the new results are in"):
        first.publish({"status": "complete"})
    assert (first.path / "first.txt").exists() and (other / "other.txt").exists()


def test_what_a_killed_process_left_is_removed_only_when_overwriting(tmp_path):
    out = tmp_path / "out"
    left = tmp_path / f"out.partial-{dead_pid()}"
    running = tmp_path / f"out.partial-{os.getppid()}"
    for folder in (left, running):
        folder.mkdir()
    assert abandoned_folders(out) == [left]
    finished(out)
    assert left.exists()
    ResultFolder(out, overwrite=True).discard()
    assert not left.exists() and running.exists() and out.exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be created"):
        ResultFolder(tmp_path / "file" / "out")
