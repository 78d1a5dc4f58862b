"""What the program waits for before it works: imports, and programs compiled once and kept."""

import os
import subprocess
import sys
from pathlib import Path

from specs import HEAD

ROOT = Path(__file__).resolve().parents[2]

HEAVY = {"diffrax", "equinox", "jax", "matplotlib", "numpy", "pandas", "scipy", "sklearn", "xarray"}
"""Libraries that take tenths of a second and more to import."""

TALK = """
import sys
from typer.testing import CliRunner
from gradflow.cli import app as cli
helps = [f"{name} --help" for name in ("", "study", "run", "orders", "predict", "kinds")]
for line in (*helps, "list"):
    result = CliRunner().invoke(cli.app, line.split())
    assert result.exit_code == 0, (line, result.output)
print(*{name.split(".")[0] for name in sys.modules})
"""

LOOK = """
import sys
import gradflow
assert "simulate" in dir(gradflow)
print(*{name.split(".")[0] for name in sys.modules})
"""

SDE = """
[[run]]
name = "sde"
dynamics = { kind = "StochasticFlow", step_size = 0.1 }
regularizers = [{ kind = "LabelNoise", std = 0.3 }]
steps = 10
"""
"""A solve of diffrax whose error check, a host callback, would keep it out of the cache."""

MISS, HIT = "PERSISTENT COMPILATION CACHE MISS", "Persistent compilation cache hit"
"""What JAX says of a program that it compiles, and of one that it has kept."""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user would, without the settings of the tests."""
    ours = ("EQX_ON_ERROR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=kept | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_help_and_the_list_of_experiments_import_nothing_heavy():
    assert not HEAVY & set(python("-c", TALK).stdout.split())


def test_importing_gradflow_and_looking_around_imports_nothing_heavy():
    assert not HEAVY & set(python("-c", LOOK).stdout.split())


def test_a_second_process_compiles_nothing(tmp_path: Path):
    spec = tmp_path / "sde.toml"
    spec.write_text(HEAD + SDE)
    found = []
    for name in ("first", "second"):
        done = python(
            *("-m", "gradflow", "run", "--quiet", "--out", str(tmp_path / name), str(spec)),
            JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),
            JAX_EXPLAIN_CACHE_MISSES="1",
            JAX_LOG_COMPILES="1",
        )
        found.append((done.stderr.count(MISS), done.stderr.count(HIT)))
    (compiled, none), (missed, kept) = found
    # A small program may be needed twice, inside and outside of a trace.
    assert none <= 2 and missed == 0 and kept == compiled + none and compiled > 10
