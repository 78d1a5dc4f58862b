"""Ensembles on one accelerator: scalar, width 10 and width 64, from 10^4 to 10^7 paths.

    python benchmarks/bench_accelerator.py [--quick]                  # double precision
    GRADFLOW_X64=0 python benchmarks/bench_accelerator.py [--quick]   # single precision

Times are of whole calls of `gradflow.simulate`: with the start, two saved times and the way of
10^7 numbers from and to the host.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax_peers
from agreement import same_distribution
from cases import Training, end_quantities, near_orthogonal, positive_target, scalar, width_ten
from contest import Contestant, contest
from ensembles import columns, rounds_of
from limits import copy, gemm, noise_alone, step_flops
from results import Report, Table, options

import gradflow as gf

CHECKED = 64
"""Steps after which the ends of all contestants are compared."""

WIDE = 64
LIMIT = "limit: the products at the GEMM rate"


def ends_of(training: Training, dynamics: gf.AbstractDynamics, paths: int, steps: int) -> Any:
    """The trajectory of an ensemble, with the weights at its end."""
    return gf.simulate(
        training.problem, gf.DeepLinear(list(training.layers)), dynamics,
        steps=-(-steps // (dynamics.ticks_per_step or 1)), replicas=paths, key=jax.random.key(5),
        save=2, observables=["loss"], store_weights=steps == CHECKED, progress=False,
    )  # fmt: skip


def table(
    title: str,
    training: Training,
    dynamics: gf.AbstractDynamics,
    paths: int,
    steps: int,
    others: dict[str, tuple[Callable[[int], Any], int, Callable[[Any], Any] | None]],
    rounds: int,
) -> Table:
    """A contest; `others` have a function of the number of steps, that number, and their shape."""
    own = [w[:, -1] for w in ends_of(training, dynamics, paths, CHECKED).weights]
    found = {"gradflow": end_quantities(own, training.target)}
    for name, (run, _, shaped) in others.items():
        if shaped is not None:
            found[name] = end_quantities(shaped(run(CHECKED)), training.target)
    agreement = same_distribution(found)
    contestants = [
        Contestant(
            "gradflow",
            lambda: ends_of(training, dynamics, paths, steps),
            steps * paths,
            {"us a step": None},
        )
    ]
    for name, (run, count, _) in others.items():
        contestants.append(
            Contestant(name, lambda run=run, count=count: run(count), count * paths, {})
        )
    timings = contest(contestants, rounds, patience=3.0)
    for timing in timings.values():
        timing.facts["us a step"] = timing.median * paths * 1e6
    return Table(
        f"{title}, {paths:,} paths", "ns", "step and path", "gradflow", timings, (), agreement
    )


def main() -> None:
    """Measure and write."""
    chosen = options(__doc__).parse_args()
    if jax.default_backend() == "cpu":
        print("JAX sees no accelerator here; nothing is measured.")
        return
    double = bool(jax.config.jax_enable_x64)
    dtype = "float64" if double else "float32"
    report = Report(f"accelerator_{dtype}", chosen)
    try:
        measure(report, chosen, dtype)
    finally:  # Ctrl-C keeps the tables that are done
        report.write()


def measure(report: Report, chosen: argparse.Namespace, dtype: str) -> None:
    """Add all tables."""
    import torch_accelerator

    rounds = rounds_of(chosen, 3)
    limits = contest([Contestant("copy", *copy()), Contestant("GEMM", *gemm(8192))], rounds)
    report.further = {
        "copy, GB/s": 1e-9 / limits["copy"].median,
        "GEMM, TFLOP/s": 1e-12 / limits["GEMM"].median,
    }
    print(report.further, flush=True)

    def peers(training: Training, paths: int, steps: int, slow: int) -> dict[str, Any]:
        shaped = columns if training.target.size == 1 else list
        found = {
            "JAX by hand": (
                jax_peers.scan_in_blocks(training, training.descent_scales, paths, block=64),
                slow, shaped,
            )
        }  # fmt: skip
        for name, graph in (("PyTorch", False), ("PyTorch, CUDA graph", True)):
            run = torch_accelerator.descent(training, paths, dtype, graph)
            found[name] = run, slow if graph else slow // 4, shaped
        del steps
        return found

    few = 64 if chosen.quick else 1
    one = scalar()
    for paths, steps, slow in (
        (10**4, 131_072, 8_192), (10**5, 65_536, 8_192), (10**6, 16_384, 1_024),
        (10**7, 4_096, 256),
    ):  # fmt: skip
        steps, slow = max(steps // few, 64), max(slow // few, 64)
        noise = {"noise alone": (noise_alone((1, 1), paths), steps, None)}
        report.add(
            table(
                "scalar depth 2, SGD", one, gf.GradientDescent(one.step_size), paths, steps,
                {**noise, **peers(one, paths, steps, slow)}, rounds,
            )
        )  # fmt: skip
    for paths, steps in ((10**5, 32_768), (10**6, 16_384)):
        steps = max(steps // few, 64)
        report.add(
            table(
                "scalar depth 2, SDE", one, gf.StochasticFlow(one.step_size), paths, steps,
                {
                    "noise alone": (noise_alone((1, 1), paths), steps, None),
                    "diffrax, UnsafeBrownianPath": (
                        jax_peers.diffrax_solves(one, paths, tree=False), max(steps // 16, 64),
                        columns,
                    ),
                },
                rounds,
            )
        )  # fmt: skip
    ten = width_ten()
    for paths, steps, slow in ((10**4, 2_048, 512), (10**5, 512, 128)):
        steps, slow = max(steps // few, 64), max(slow // few, 64)
        report.add(
            table(
                "depth 3, width 10, SGD", ten, gf.GradientDescent(ten.step_size), paths, steps,
                peers(ten, paths, steps, slow), rounds,
            )
        )  # fmt: skip
    wide = Training(positive_target(WIDE), near_orthogonal((WIDE,) * 4), 0.02, 0.2)
    product, work = gemm(8192)
    paths, steps = 2_560, max(256 // few, 64)
    others = peers(wide, paths, steps, steps)
    count = work / step_flops(3, WIDE)
    others[LIMIT] = (lambda n: product(), round(count / paths), None)
    report.add(
        table(
            f"depth 3, width {WIDE}, SGD", wide, gf.GradientDescent(wide.step_size), paths, steps,
            others, rounds,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
