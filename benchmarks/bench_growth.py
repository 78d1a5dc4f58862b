"""How the cost of label-noise SGD grows with steps, paths, depth and width.

    python benchmarks/bench_growth.py [--quick]

Draws `growth.png`: time a step and path, and what a run costs beside its steps.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from cases import near_orthogonal
from contest import Contestant, contest
from ensembles import rounds_of
from limits import gemm, step_flops
from results import PROSE, RESULTS, Report, options

import gradflow as gf
from gradflow.plot.style import OKABE_ITO, drawing_style, log_axis, new_figure, save_figure

DEPTHS = (2, 3, 4, 6, 8, 12, 16)
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PATHS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
STEPS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)
NUMBERS = 300_000
"""Weights held at once where depth or width grows: it sets the number of paths."""


def descent(depth: int, width: int, paths: int) -> Callable[[int], Any]:
    """Runs some steps of the ensemble."""
    layers = near_orthogonal((width,) * (depth + 1))
    target = layers[0]
    for w in layers[1:]:
        target = w @ target
    problem = gf.Problem(gf.Regression.whitened(target), [gf.LabelNoise(0.1 / width)])
    net = gf.DeepLinear(list(layers))
    dynamics = gf.GradientDescent(0.02)

    def run(steps: int) -> gf.Trajectory:
        return gf.simulate(
            problem,
            net,
            dynamics,
            steps=steps,
            replicas=paths,
            key=jax.random.key(0),
            save=2,
            observables=["loss"],
            store_weights=False,
            progress=False,
        )

    return run


def cost(depth: int, width: int, paths: int, steps: int, rounds: int) -> dict[str, float]:
    """Nanoseconds a step and path, from the difference of two lengths, and the rest in ms."""
    run = descent(depth, width, paths)
    timings = contest(
        [
            Contestant("short", lambda: run(max(steps // 4, 1))),
            Contestant("long", lambda: run(steps)),
        ],
        rounds,
    )
    long, short = timings["long"].median, timings["short"].median
    slope = (long - short) / (steps - max(steps // 4, 1))
    return {
        "depth": depth,
        "width": width,
        "paths": paths,
        "steps": steps,
        "ns_per_step_and_path": slope / paths * 1e9,
        "overhead_ms": (long - slope * steps) * 1e3,
        "compile_s": timings["short"].first_call,
    }


def enough_steps(numbers: float, seconds: float) -> int:
    """Steps that take about the given time at 10 ns a number and 50 ns a step."""
    return int(np.clip(seconds / (1e-8 * numbers + 5e-8), 8, 2_000_000))


def growth(quick: bool, rounds: int) -> dict[str, list[dict[str, float]]]:
    """All sweeps."""
    seconds = 0.05 if quick else 1.0

    def swept(sizes: Sequence[tuple[int, int, int]]) -> list[dict[str, float]]:
        rows = []
        for depth, width, paths in sizes:
            work = paths * depth * width**2 * max(1.0, width / 16)
            rows.append(cost(depth, width, paths, enough_steps(work, seconds), rounds))
            row = rows[-1]
            PROSE.print(
                f"| {depth} | {width} | {paths:,} | {row['ns_per_step_and_path']:.4g} | "
                f"{row['overhead_ms']:.3g} | {row['compile_s']:.2g} |"
            )
        return rows

    depths = DEPTHS[::3] if quick else DEPTHS
    widths = WIDTHS[:6:2] if quick else WIDTHS
    paths = PATHS[1:5:2] if quick else PATHS
    PROSE.print("| depth | width | paths | ns a step and path | overhead, ms | compile, s |")
    PROSE.print("|---|---|---|---|---|---|")
    return {
        "depth": swept([(n, 8, NUMBERS // (64 * n)) for n in depths]),
        "width": swept([(3, d, max(NUMBERS // (3 * d * d), 1)) for d in widths]),
        "paths": swept([(2, 1, p) for p in paths]),
    }


def by_steps(quick: bool, rounds: int) -> list[dict[str, float]]:
    """Seconds of a scalar run of 1,000 paths."""
    run = descent(2, 1, 1_000)
    counts = STEPS[:3] if quick else STEPS
    timings = contest([Contestant(str(n), lambda n=n: run(n)) for n in counts], rounds)
    return [{"steps": float(n), "s": timings[str(n)].median} for n in counts]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x in the upper half, where overheads are small."""
    half = len(x) // 2
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0]) if len(x) > 3 else np.nan


def draw(found: dict[str, list[dict[str, float]]], rate: float, stem: Path) -> None:
    """Four panels."""
    with drawing_style():
        figure = new_figure(5.2, "Cost of label-noise SGD", width=7.5)
        panels = figure.subplots(2, 2).ravel()
        for axes, name in zip(panels, ("depth", "width", "paths"), strict=False):
            x = [row[name] for row in found[name]]
            y = [row["ns_per_step_and_path"] for row in found[name]]
            axes.plot(x, y, "o-", color=OKABE_ITO[0], ms=4, label="gradflow")
            if name != "paths":
                limit = [
                    step_flops(int(row["depth"]), int(row["width"])) / rate * 1e9
                    for row in found[name]
                ]
                axes.plot(x, limit, "--", color=OKABE_ITO[1], label="products at the GEMM rate")
                axes.legend()
            axes.set_xlabel(name)
            axes.set_ylabel("ns a step and path")
        panels[3].plot(
            [r["steps"] for r in found["steps"]], [r["s"] for r in found["steps"]], "o-",
            color=OKABE_ITO[0], ms=4,
        )  # fmt: skip
        panels[3].set_xlabel("steps, 1,000 scalar paths")
        panels[3].set_ylabel("s")
        for axes in panels:
            axes.set_xscale("log")
            axes.set_yscale("log")
            log_axis(axes, "x")
            log_axis(axes, "y")
    save_figure(figure, stem)


def main() -> None:
    """Measure and write."""
    chosen = options(__doc__).parse_args()
    report = Report("growth", chosen)
    rounds = rounds_of(chosen, 5)
    product, work = gemm()
    rate = work / contest([Contestant("GEMM", product)], rounds)["GEMM"].median
    found = growth(chosen.quick, rounds)
    found["steps"] = by_steps(chosen.quick, rounds)
    report.further = {
        "gemm_gflops": rate / 1e9,
        "sweeps": found,
        "overhead_ms": statistics.median(row["overhead_ms"] for row in found["paths"]),
        "exponents": {
            "steps": exponent(
                [r["steps"] for r in found["steps"]], [r["s"] for r in found["steps"]]
            ),
            "paths": exponent(
                [r["paths"] for r in found["paths"]],
                [r["paths"] * r["ns_per_step_and_path"] for r in found["paths"]],
            ),
        },
    }
    PROSE.print(f"\nexponents of the time: {report.further['exponents']}")
    report.write()
    folder = chosen.output or (None if chosen.quick else RESULTS)
    if folder is not None:
        draw(found, rate, folder / "growth")


if __name__ == "__main__":
    main()
