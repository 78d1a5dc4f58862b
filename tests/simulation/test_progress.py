"""Progress of long runs."""

import io
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import gradflow as gf
from gradflow.simulation import progress
from gradflow.simulation.progress import ProgressBar, announced, automatic

PROBLEM = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.3)])
NET = gf.DeepLinear([[[1.0]], [[0.5]]])


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A terminal; called, what it has shown."""
    shown = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=120)
    )
    return lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The bar's clock; called, seconds pass."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_shows_share_rate_and_time_left(screen: Callable[[], str], clock: Callable[[float], None]):
    bar = ProgressBar("GradientDescent", patience=0.0)
    bar(0.25, 1.0, "1e+06 steps/s")
    clock(2.0)
    bar(0.5, 1.0, "2e+06 steps/s")
    bar.close()
    assert "GradientDescent" in screen()
    assert "50 %" in screen()
    assert "2e+06 steps/s" in screen()
    assert re.search(r"time left \d:\d\d:\d\d", screen())


def test_appears_only_after_a_while(screen: Callable[[], str], clock: Callable[[float], None]):
    bar = ProgressBar("run", patience=2.0)
    bar(0.1, 1.0, "fast")
    clock(1.9)
    bar(0.2, 1.0, "fast")
    assert screen() == ""
    clock(0.2)
    bar(0.3, 1.0, "slow")
    bar.close()
    assert "30 %" in screen()


def test_a_run_that_is_already_done_shows_nothing(
    screen: Callable[[], str], clock: Callable[[float], None]
):
    bar = ProgressBar("run", patience=0.0)
    bar(1.0, 1.0, "done")
    bar.close()
    assert screen() == ""


def test_nobody_watches_a_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    assert automatic("run") is None


def test_a_terminal_is_watched(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    assert isinstance(automatic("run"), ProgressBar)


def test_a_run_shows_its_bar_and_takes_it_away(screen: Callable[[], str]):
    options = {"key": jax.random.key(0), "save": 3, "replicas": 2, "observables": ["loss"]}
    gf.simulate(PROBLEM, NET, gf.GradientDescent(0.1), steps=50_000, progress=True, **options)
    assert "GradientDescent" in screen()
    assert "steps/s" in screen()
    before = screen()
    gf.simulate(PROBLEM, NET, gf.GradientDescent(0.1), steps=50_000, progress=False, **options)
    assert screen() == before


def test_the_bar_is_taken_away_when_a_run_fails(
    screen: Callable[[], str], monkeypatch: pytest.MonkeyPatch
):
    module = sys.modules["gradflow.simulation.slices"]
    run_slice, threads = module._run_slice, threading.active_count()

    def fail_once_the_bar_is_there(*arguments: Any) -> Any:
        if threading.active_count() > threads:
            raise RuntimeError("the disk is full")
        return run_slice(*arguments)

    monkeypatch.setattr(module, "_run_slice", fail_once_the_bar_is_there)
    options = {"steps": 1000, "key": jax.random.key(0), "observables": ["loss"]}
    with pytest.raises(RuntimeError, match="the disk is full"):
        gf.simulate(PROBLEM, NET, gf.GradientDescent(0.1), progress=True, **options)
    deadline = time.monotonic() + 10.0
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # the thread that redraws the bar is told to stop, not waited for
    assert threading.active_count() == threads


@pytest.mark.slow
def test_a_callback_hears_of_a_long_run_at_least_twice_a_second():
    heard: list[tuple[float, float, float, str]] = []

    def listen(done: float, total: float, message: str) -> None:
        heard.append((time.monotonic(), done, total, message))
        if heard[-1][0] - heard[0][0] > 3.0:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="stopped at t"):
        gf.simulate(
            PROBLEM,
            NET,
            gf.GradientDescent(0.01),
            steps=1_000_000_000,
            replicas=100,
            key=jax.random.key(0),
            save=2,
            store_weights=True,
            progress=listen,
        )
    when, done, total, messages = zip(*heard, strict=True)
    assert np.median(np.diff(when)) < 0.5
    assert np.all(np.diff(done) > 0)
    assert set(total) == {1.0}
    assert messages[0] == "compiling"
    assert re.fullmatch(r"[\d.e+]+ steps/s", messages[-1])
    replica_steps = done[-1] * 1e9 * 100
    rate = float(messages[-1].split()[0])
    assert rate == pytest.approx(replica_steps / (when[-1] - when[0]), rel=0.5)


def test_chunks_share_the_bar():
    shares: list[float] = []
    gf.simulate(
        PROBLEM,
        NET,
        gf.GradientDescent(0.1),
        steps=20,
        replicas=5,
        chunk=2,
        key=jax.random.key(0),
        save=3,
        progress=lambda done, total, message: shares.append(done / total),
    )
    np.testing.assert_allclose(shares, [0.4, 0.8, 1.0], rtol=1e-12)


def test_what_takes_a_while_is_announced_once(
    screen: Callable[[], str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with announced("outer", patience=0.0), announced("inner", patience=0.0):
        time.sleep(0.3)
    assert "outer" in screen() and "inner" not in screen()
    assert "0:00:00" in screen()


def test_what_is_done_soon_is_not_announced(
    screen: Callable[[], str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with announced("soon", patience=60.0):
        pass
    assert screen() == ""
