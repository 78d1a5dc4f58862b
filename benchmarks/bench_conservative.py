"""The conservative solver beside an explicit and an implicit one: time and conservation.

    python benchmarks/bench_conservative.py [case ...]

Cases: scalar-2, scalar-5, width-10, width-64, width-256. One process, solvers alternated within a
round, medians over rounds; a time counts as a ratio to Dopri8 in the same round. Prints a Markdown
table. Kvaerno5 forms the Jacobian and is left out where that has more than 300 rows, and
the hundreds of small steps of order 2 at width 256.
"""

import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import gradflow as gf
from gradflow.backend.types import Weights
from gradflow.dynamics.ode import chosen_solver
from gradflow.solvers import GaussLegendre

RTOL = 1e-8
ROUNDS = {"scalar-2": 9, "scalar-5": 9, "width-10": 5, "width-64": 3, "width-256": 1}
LARGEST_JACOBIAN = 300
LARGEST_ORDER_2 = 20_000


def scalar(target: float, *layers: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """A scalar target and a scalar network."""
    return np.array([[target]]), [np.array([[w]]) for w in layers]


def square(depth: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A positive target with eigenvalues 0.2 to 2, and layers near orthogonal matrices."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(width, width)))[0]
    target = (q * np.linspace(0.2, 2.0, width)) @ q.T
    layers = [
        0.8 * np.linalg.qr(rng.normal(size=(width, width)))[0]
        + 0.3 / np.sqrt(width) * rng.normal(size=(width, width))
        for _ in range(depth)
    ]
    return target, layers


CASES: dict[str, tuple[str, float, Callable[[], tuple[np.ndarray, list[np.ndarray]]]]] = {
    "scalar-2": ("scalar, depth 2", 10.0, lambda: scalar(1.0, 2.0, 0.1)),
    "scalar-5": ("scalar, depth 5", 20.0, lambda: scalar(1.0, 1.2, 0.5, 0.8, 0.3, 1.0)),
    "width-10": ("depth 3, width 10", 20.0, lambda: square(3, 10)),
    "width-64": ("depth 4, width 64", 20.0, lambda: square(4, 64)),
    "width-256": ("depth 3, width 256", 5.0, lambda: square(3, 256)),
}


def descent(t: Any, weights: Weights, problem: gf.Problem) -> Weights:
    """Gradient flow."""
    del t
    return tuple(-g for g in problem.averaged_gradient(weights))


def solver_runs(weights: Weights, problem: gf.Problem, stop: float) -> dict[str, Callable]:
    """A compiled solve for every solver."""
    solvers = {
        "Dopri8": chosen_solver("bench", None, False),
        "GaussLegendre(2)": GaussLegendre(2),
        "GaussLegendre(4)": GaussLegendre(4),
        "GaussLegendre(6)": GaussLegendre(6),
        "Kvaerno5": chosen_solver("bench", None, True),
    }
    size = sum(w.size for w in weights)
    if size > LARGEST_JACOBIAN:
        del solvers["Kvaerno5"]
    if size > LARGEST_ORDER_2:
        del solvers["GaussLegendre(2)"]

    def run(solver: diffrax.AbstractSolver) -> Callable:
        @jax.jit
        def solve(weights: Weights, problem: gf.Problem) -> tuple[Weights, Any]:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(descent),
                solver,
                0.0,
                stop,
                None,
                weights,
                problem,
                stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=RTOL / 100.0),
                max_steps=100_000,
            )
            assert solution.ys is not None
            return tuple(w[0] for w in solution.ys), solution.stats["num_steps"]

        return lambda: jax.block_until_ready(solve(weights, problem))

    return {name: run(solver) for name, solver in solvers.items()}


def moved(start: Weights, end: Weights) -> float:
    """The largest change of an entry of any G_i."""

    def grams(layers: Weights) -> list[np.ndarray]:
        arrays = [np.asarray(w) for w in layers]
        return [b.T @ b - a @ a.T for a, b in itertools.pairwise(arrays)]

    pairs = zip(grams(start), grams(end), strict=True)
    return max(float(np.max(np.abs(b - a))) for a, b in pairs)


def main() -> None:
    """Measure and print."""
    console = Console(highlight=False, width=120)
    console.print(f"{platform.machine()}, jax {version('jax')}, diffrax {version('diffrax')}, f64")
    console.print(f"rtol {RTOL}, weights at t1 only\n")
    console.print("| case | solver | steps | ms | ratio to Dopri8 (range) | max change of G |")
    console.print("|---|---|---|---|---|---|")
    for case in sys.argv[1:] or CASES:
        title, stop, make = CASES[case]
        target, layers = make()
        problem = gf.Problem(gf.Regression.whitened(target))
        weights = tuple(jnp.asarray(w) for w in layers)
        runs = solver_runs(weights, problem, stop)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        ends = {name: run() for name, run in runs.items()}  # compiles
        for _ in range(ROUNDS[case]):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        for name, times in seconds.items():
            ratios = [t / d for t, d in zip(times, seconds["Dopri8"], strict=True)]
            end, steps = ends[name]
            console.print(
                f"| {title} | {name} | {int(steps)} | {statistics.median(times) * 1e3:.3g} | "
                f"{statistics.median(ratios):.2g} ({min(ratios):.2g} to {max(ratios):.2g}) | "
                f"{moved(weights, end):.1e} |"
            )


if __name__ == "__main__":
    main()
