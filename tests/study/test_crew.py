"""Jobs of a study in processes of their own: same results, Ctrl-C, killed processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pickle import PicklingError

import numpy as np
import pytest
from specs import HEAD, RUN

from gradflow.study.run import crew as crew_module
from gradflow.study.run.build import prepare
from gradflow.study.run.crew import OneThread, Processes, crew_of, workers_for
from gradflow.study.run.progress import Silent
from gradflow.study.run.runner import run_study

NOISY = """
[[run]]
name = "noisy"
dynamics = { kind = "GradientDescent", step_size = 0.05 }
regularizers = [ { kind = "LabelNoise", std = 0.5 } ]
steps = 40
replicas = 4
"""

ENDLESS = NOISY.replace("noisy", "endless").replace("steps = 40", "steps = 2000000000")

CLAIM = """
[[claim]]
sentence = "The noisy run is so many times the flow's."
runs = ["noisy", "flow"]
quantity = "speed_up"
at_least = 0.0
"""


def small(load, *tables):
    study = load(HEAD + "".join(tables))
    return study, prepare(study)


class Watching(Silent):
    """Does something whenever the endless run reports its progress, and remembers the rest."""

    def __init__(self, act=lambda: None):
        self.act, self.begun, self.ended, self.stops = act, [], [], 0

    def started(self, name):
        self.begun.append(name)

    def advanced(self, name, done, total, message):
        if name == "endless":
            self.act()

    def finished(self, result, seconds):
        self.ended.append(result.name)

    def stopping(self):
        self.stops += 1


def test_processes_find_what_a_thread_finds(load, tmp_path):
    """Bit for bit, in the order of the spec; runs that are timed come last, one at a time."""
    study, prepared = small(load, NOISY, RUN, RUN.replace("flow", "untimed"), CLAIM)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    alone = run_study(study, prepared, tmp_path / "a")
    reporter = Watching()
    with closing(Processes(2)) as crew:
        together = run_study(study, prepared, tmp_path / "b", reporter=reporter, crew=crew)
    assert together.status == "complete" and list(together.runs) == ["noisy", "flow", "untimed"]
    assert reporter.begun == reporter.ended == ["untimed", "noisy", "flow"]
    for name, run in alone.runs.items():
        other = together.runs[name]
        assert np.array_equal(run.trajectory["imbalance"], other.trajectory["imbalance"])
        assert (tmp_path / "b" / "runs" / f"{name}.nc").is_file()
        assert run.notes == other.notes and repr(run.phases) == repr(other.phases)
    assert together.claims[0].verdict == "holds"


@pytest.mark.slow
def test_ctrl_c_stops_processes_and_keeps_what_they_have(load, tmp_path):
    study, prepared = small(load, ENDLESS, NOISY)
    reporter = Watching(lambda: os.kill(os.getpid(), signal.SIGINT))
    with closing(Processes(1)) as crew:
        result = run_study(study, prepared, tmp_path, reporter=reporter, crew=crew)
    assert result.status == "interrupted" and reporter.stops == 1
    assert list(result.runs) == ["endless"] and result.runs["endless"].trajectory.interrupted
    assert (tmp_path / "runs" / "endless.nc").is_file()


def test_a_process_that_is_killed_costs_its_own_job_only(load, tmp_path):
    """Killed twice, the second time alone, the job is given up; the others are carried out."""

    def kill():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    study, prepared = small(load, ENDLESS, NOISY)
    reporter = Watching(kill)
    with closing(Processes(1)) as crew:
        result = run_study(study, prepared, tmp_path, reporter=reporter, crew=crew)
    assert reporter.begun == ["endless", "noisy", "endless"]
    assert result.status == "failed" and list(result.runs) == ["noisy"]
    assert list(result.errors) == ["endless"] and "--workers 1" in result.errors["endless"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_processes_end_with_the_one_that_started_them():
    program = (
        "import multiprocessing, time\n"
        "from gradflow.study.run.crew import Processes\n"
        "if __name__ == '__main__':\n"
        "    crew = Processes(1)\n"
        "    crew._pool.submit(int).result()\n"
        "    print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("a process outlived the one that started it")


def test_as_many_processes_as_jobs_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(crew_module.os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr(crew_module, "host_memory", lambda: 9 * 2**30)
    assert [workers_for(jobs) for jobs in (0, 1, 3, 20)] == [1, 1, 3, 4]
    monkeypatch.setattr(crew_module, "host_memory", lambda: 2**40)
    assert workers_for(20) == 6
    with closing(crew_of(1)) as one:
        assert isinstance(one, OneThread)
    monkeypatch.setattr(crew_module.jax, "default_backend", lambda: "gpu")
    assert workers_for(20) == 1


class Failing(OneThread):
    """Nothing comes back from its processes but an error."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def submit(self, plan, job):
        lost = Future()
        lost.set_exception(self.error)
        return lost


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenProcessPool(), "no process could be started to carry it out; try --workers 1"),
        (PicklingError("it cannot be sent"), "it cannot be sent"),
    ],
)
def test_processes_that_cannot_work_are_said(load, tmp_path, error, said):
    """A study ends with a reason for every run where no process comes up, or none can be told."""
    study, prepared = small(load, NOISY, RUN)
    with closing(Failing(error)) as crew:
        result = run_study(study, prepared, tmp_path, crew=crew)
    assert result.status == "failed" and not result.runs
    assert list(result.errors) == ["noisy", "flow"]
    assert all(said in reason for reason in result.errors.values())
