"""10,000 paths times 100,000 steps of scalar SGD with observables: time and memory.

    python benchmarks/bench_long_run.py [--quick]

The time is compared with that of the noise alone in the same process. The peak memory is that of a
process of its own that does nothing but import gradflow and run, once for all steps and once for a
tenth of them.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from agreement import same_distribution
from cases import end_quantities, scalar
from contest import Contestant, contest
from ensembles import rounds_of
from limits import noise_alone
from results import PROSE, Report, Table, Target, options, stated

import gradflow as gf

PATHS = 10_000
SAVES = 101
OBSERVABLES = ("loss", "imbalance", "squared_norms")
MEGABYTE = 2**20
MOST_MEMORY = 500.0


def run(steps: int, keep: str = "statistics") -> Any:
    """The whole ensemble, observed at 101 times."""
    training = scalar()
    return gf.simulate(
        training.problem,
        gf.DeepLinear(list(training.layers)),
        gf.GradientDescent(training.step_size),
        steps=steps,
        replicas=PATHS,
        key=jax.random.key(0),
        save=SAVES,
        observables=OBSERVABLES,
        keep=keep,
        quantiles=(0.05, 0.5, 0.95),
        progress=False,
    )


def peak_memory() -> float:
    """The largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss of a child starts from what its parent held.
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MEGABYTE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MEGABYTE if sys.platform == "darwin" else peak * 1024 / MEGABYTE


def alone(steps: int) -> None:
    """What the process that is watched does; prints its findings as JSON."""
    imported = peak_memory()
    began = time.perf_counter()
    run(steps)
    seconds = time.perf_counter() - began
    print(json.dumps({"steps": steps, "imported": imported, "peak": peak_memory(), "s": seconds}))


def watched(steps: int) -> dict[str, float]:
    """The findings of a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--alone", str(steps)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def first_steps_agree() -> dict[str, float]:
    """Compare the ensemble with the same training in NumPy after 100 steps."""
    training, rng = scalar(), np.random.default_rng(6)
    a, b = training.descent_scales
    first, second = np.full(PATHS, 2.0), np.full(PATHS, 0.1)
    for _ in range(100):
        m = a * (first * second - 1.0) + b * rng.normal(size=PATHS)
        first, second = first - m * second, second - m * first
    by_hand = end_quantities([w.reshape(-1, 1, 1) for w in (first, second)], training.target)
    paths = run(100, keep="paths")
    norms = paths["squared_norms"][:, -1]
    own = {"loss": paths["loss"][:, -1], "tr G_1": norms[:, 1] - norms[:, 0]}
    return same_distribution({"NumPy": by_hand, "gradflow": own})


def main() -> None:
    """Measure and write."""
    parser = options(__doc__)
    parser.add_argument("--alone", type=int, default=None, help="steps of a watched process")
    chosen = parser.parse_args()
    if chosen.alone is not None:
        alone(chosen.alone)
        return
    report = Report("long_run", chosen)
    agreement = first_steps_agree()
    steps = 2_000 if chosen.quick else 100_000
    noise = noise_alone((1, 1), PATHS)
    timings = contest(
        [
            Contestant("noise alone", lambda: noise(steps), steps * PATHS),
            Contestant("gradflow", lambda: run(steps), steps * PATHS),
        ],
        rounds_of(chosen, 5),
        patience=600.0,
    )
    target = Target("within 1.5x of the noise alone", "gradflow", ("noise alone",), 1.5)
    memory = [watched(steps // 10), watched(steps)]
    small = stated(
        "peak memory, everything imported, under 500 MB", memory[-1]["peak"], MOST_MEMORY
    )
    report.add(
        Table(
            f"{PATHS:,} paths, {steps:,} steps, {SAVES} observations", "ns", "step and path",
            "noise alone", timings, [target], agreement, further=[small],
        )
    )  # fmt: skip
    report.further["memory_mb"] = memory
    PROSE.print("| steps | peak memory, MB | after the imports, MB | s with compilation |")
    PROSE.print("|---|---|---|---|")
    for row in memory:
        PROSE.print(
            f"| {row['steps']:,} | {row['peak']:.0f} | {row['imported']:.0f} | {row['s']:.1f} |"
        )
    report.write()


if __name__ == "__main__":
    main()
