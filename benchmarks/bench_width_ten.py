"""Label-noise SGD, its equation and the drift alone: depth 3, width 10, 1,000 paths.

    python benchmarks/bench_width_ten.py [--quick]

The drift alone is gradient descent without noise. Its limit is the rate of a large product of
matrices, measured in the same rounds, at which the six products of a gradient would take that time.
"""

from collections.abc import Callable
from typing import Any

import jax_peers
import numba_peers
import numpy as np
from agreement import same_values
from cases import Training, width_ten
from contest import Contestant, contest
from ensembles import (
    Method,
    ensemble_table,
    gradflow_ensemble,
    rounds_of,
    stacked,
)
from limits import gemm, noise_alone, step_flops
from results import Report, Table, Target, options
from torch_peers import torchsde_euler

import gradflow as gf

PATHS = 1_000
WIDTH = 10
LIMIT = "limit: six products at the GEMM rate"


def numba_methods(training: Training, scales: tuple[float, float], steps: int) -> list[Method]:
    """The two kernels."""
    starts = np.repeat(np.stack(training.layers)[None], PATHS, axis=0)

    def run(kernel: Callable[..., Any]) -> Callable[[int], Any]:
        return lambda n: kernel(starts, training.target, *scales, n)

    return [
        Method("numba, path by path", run(numba_peers.matrix_by_path), steps, stacked),
        Method("numba, paths in lanes", run(numba_peers.matrix_in_lanes), steps, stacked),
    ]


def against_others(*further: Target) -> list[Target]:
    """What SGD and SDE have to beat."""
    return [
        Target("1.5x faster than numba", "gradflow", ("numba, path by path",), 1 / 1.5),
        Target(
            "1.5x faster than the best numba",
            "gradflow",
            ("numba, path by path", "numba, paths in lanes"),
            1 / 1.5,
        ),
        *further,
    ]


def drift_table(steps: int, rounds: int) -> Table:
    """Gradient descent without noise."""
    training = width_ten(std=0.0)
    scales = training.descent_scales
    methods = [
        Method(
            "gradflow",
            gradflow_ensemble(training, gf.GradientDescent(training.step_size), PATHS),
            steps,
        ),
        Method(
            "JAX, batched products",
            jax_peers.scan_in_blocks(training, scales, PATHS, block=32),
            steps,
        ),
        *numba_methods(training, scales, steps),
    ]
    ends = {
        m.name: np.stack([np.asarray(w) for w in m.shaped(m.run(64))])
        for m in methods
        if m.shaped is not None
    }
    agreement = same_values(ends, 1e-12)
    product, flops = gemm()
    contestants = [Contestant(m.name, lambda m=m: m.run(m.steps), m.steps * PATHS) for m in methods]
    contestants.append(Contestant(LIMIT, product, flops / step_flops(3, WIDTH)))
    timings = contest(contestants, rounds)
    for timing in timings.values():
        timing.facts["GFLOP/s"] = step_flops(3, WIDTH) / timing.median / 1e9
    targets = [
        Target("1.5x faster than numba", "gradflow", ("numba, path by path",), 1 / 1.5),
        Target("2x faster than batched products", "gradflow", ("JAX, batched products",), 0.5),
    ]
    return Table(
        "depth 3, width 10, drift alone", "ns", "step and path", "gradflow", timings, targets,
        agreement, "largest difference",
    )  # fmt: skip


def main() -> None:
    """Measure and write."""
    chosen = options(__doc__).parse_args()
    report = Report("width_ten", chosen)
    rounds = rounds_of(chosen)
    steps, few = (32, 4) if chosen.quick else (512, 64)
    training = width_ten()
    noise = Method("noise alone", noise_alone((WIDTH, WIDTH), PATHS), steps, None)
    descent = [
        noise,
        Method(
            "gradflow",
            gradflow_ensemble(training, gf.GradientDescent(training.step_size), PATHS),
            steps,
        ),
        Method(
            "JAX by hand",
            jax_peers.scan_in_blocks(training, training.descent_scales, PATHS, block=4),
            steps,
        ),
        *numba_methods(training, training.descent_scales, steps),
    ]
    report.add(
        ensemble_table(
            "depth 3, width 10, SGD", training, descent, PATHS, rounds, "gradflow",
            against_others(), check_steps=32,
        )
    )  # fmt: skip
    flow = gf.StochasticFlow(training.step_size, substeps=training.substeps)
    equation = [
        noise,
        Method("gradflow", gradflow_ensemble(training, flow, PATHS), steps),
        Method(
            "JAX by hand",
            jax_peers.scan_in_blocks(training, training.flow_scales, PATHS, block=4),
            steps,
        ),
        Method(
            "diffrax, UnsafeBrownianPath",
            jax_peers.diffrax_solves(training, PATHS, tree=False),
            steps,
        ),
        Method(
            "diffrax, VirtualBrownianTree",
            jax_peers.diffrax_solves(training, PATHS, tree=True),
            few,
        ),
        Method("torchsde, Euler", torchsde_euler(training, PATHS), few),
        *numba_methods(training, training.flow_scales, steps),
    ]
    targets = against_others(
        Target(
            "3x faster than diffrax with UnsafeBrownianPath",
            "gradflow",
            ("diffrax, UnsafeBrownianPath",),
            1 / 3,
        ),
        Target("5x faster than torchsde", "gradflow", ("torchsde, Euler",), 1 / 5),
        Target("within 1.2x of a hand-written scan", "gradflow", ("JAX by hand",), 1.2),
    )
    report.add(
        ensemble_table(
            "depth 3, width 10, SDE", training, equation, PATHS, rounds, "gradflow", targets,
            check_steps=32,
        )
    )  # fmt: skip
    report.add(drift_table(steps, rounds))
    report.write()


if __name__ == "__main__":
    main()
