"""Set-up of every test process: run-time type checks, double precision, caches, hypothesis."""

import os
import signal
from collections import Counter
from pathlib import Path

# JAX reads these when it is imported, and the programs that tests start inherit them: compiled
# programs are shared by all test processes, and figures are drawn without a screen.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("GRADFLOW_WORKERS", "1")  # the tests themselves keep the cores busy

import equinox as eqx
import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_enable_x64", True)

# A test run in the background of a shell ignores SIGINT, and so would the programs it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Shapes and types of every annotated function are checked as it is called. The hook acts on modules
# imported after it, so nothing above may import gradflow.
jaxtyping.install_import_hook("gradflow", "typecheck.check")

# The same examples at every run, few enough for two cores; HYPOTHESIS_PROFILE=explore draws new
# and many. The first example of a shape compiles, so slow examples say nothing.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, max_examples=20, **_COMMON)
settings.register_profile("explore", max_examples=500, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.hookimpl(tryfirst=True)  # before -m chooses among the marks
def pytest_collection_modifyitems(items):
    """Of a test marked `few_cases(n)` all cases but the first n are slow."""
    seen = Counter()
    for item in items:
        mark = item.get_closest_marker("few_cases")
        if mark is not None:
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


# Every compiled program maps memory a few times, and Linux allows a process 65,530 mappings: one
# more ends it with a segmentation fault. Modules share few programs, so the old ones may go.
MOST_MAPPINGS = 25_000
MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Forget the compiled programs of the modules so far once they have become many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        eqx.clear_caches()
