"""The equation of SGD with label noise, depth 2, one number a layer, 10,000 paths.

    python benchmarks/bench_scalar_sde.py [--quick]

Everybody takes Euler-Maruyama steps of h / 8 with one Brownian motion a path.
"""

import jax_peers
import numba_peers
import numpy as np
from cases import scalar
from ensembles import Method, columns, ensemble_table, gradflow_ensemble, rounds_of
from limits import noise_alone
from results import Report, Target, options
from torch_peers import torchsde_euler

import gradflow as gf

PATHS = 10_000


def main() -> None:
    """Measure and write."""
    chosen = options(__doc__).parse_args()
    report = Report("scalar_sde", chosen)
    training = scalar()
    steps, fewer = (256, 256) if chosen.quick else (16_384, 2_048)
    slow = 64 if chosen.quick else 256
    few = 16 if chosen.quick else 64
    starts = np.repeat(np.array([[2.0], [0.1]]), PATHS, axis=1)
    flow = gf.StochasticFlow(training.step_size, substeps=training.substeps)
    methods = [
        Method("noise alone", noise_alone((1, 1), PATHS), steps, None),
        Method("gradflow", gradflow_ensemble(training, flow, PATHS), steps),
        Method(
            "gradflow, two-point increments",
            gradflow_ensemble(training, flow, PATHS, gf.Normals(law="two-point")),
            steps,
        ),
        Method(
            "JAX by hand",
            jax_peers.scan_in_blocks(training, training.flow_scales, PATHS, block=64),
            steps,
            columns,
        ),
        Method(
            "diffrax, UnsafeBrownianPath",
            jax_peers.diffrax_solves(training, PATHS, tree=False),
            fewer,
            columns,
        ),
        Method(
            "diffrax, VirtualBrownianTree",
            jax_peers.diffrax_solves(training, PATHS, tree=True),
            few,
            columns,
        ),
        Method("torchsde, Euler", torchsde_euler(training, PATHS), slow),
        *(
            Method(
                f"numba, {name}",
                lambda n, kernel=kernel: kernel(starts, 1.0, *training.flow_scales, n),
                steps,
                columns,
            )
            for name, kernel in (
                ("Mersenne twister", numba_peers.scalar_mersenne),
                ("Box-Muller", numba_peers.scalar_box_muller),
                ("ziggurat", numba_peers.scalar_ziggurat),
            )
        ),
    ]
    numba = tuple(m.name for m in methods if m.name.startswith("numba"))
    targets = [
        Target(
            "100x faster than diffrax with VirtualBrownianTree",
            "gradflow",
            ("diffrax, VirtualBrownianTree",),
            1 / 100,
        ),
        Target(
            "3x faster than diffrax with UnsafeBrownianPath",
            "gradflow",
            ("diffrax, UnsafeBrownianPath",),
            1 / 3,
        ),
        Target("25x faster than torchsde", "gradflow", ("torchsde, Euler",), 1 / 25),
        Target("1.5x faster than the best numba", "gradflow", numba, 1 / 1.5),
        Target(
            "1.5x faster than numba with its own normals",
            "gradflow",
            ("numba, Mersenne twister",),
            1 / 1.5,
        ),
        Target("within 1.2x of a hand-written scan", "gradflow", ("JAX by hand",), 1.2),
    ]
    report.add(
        ensemble_table(
            "scalar depth 2, SDE", training, methods, PATHS, rounds_of(chosen), "gradflow", targets
        )
    )
    report.write()


if __name__ == "__main__":
    main()
