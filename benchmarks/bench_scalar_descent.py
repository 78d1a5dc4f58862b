"""SGD with label noise, depth 2, one number a layer, 10,000 paths.

python benchmarks/bench_scalar_descent.py [--quick]
"""

import jax_peers
import numba_peers
import numpy as np
from cases import scalar
from ensembles import Method, columns, ensemble_table, gradflow_ensemble, rounds_of
from limits import noise_alone
from results import Report, Target, options

import gradflow as gf

PATHS = 10_000


def main() -> None:
    """Measure and write."""
    chosen = options(__doc__).parse_args()
    report = Report("scalar_descent", chosen)
    training = scalar()
    steps = 256 if chosen.quick else 16_384
    starts = np.repeat(np.array([[2.0], [0.1]]), PATHS, axis=1)
    own = gradflow_ensemble(training, gf.GradientDescent(training.step_size), PATHS)
    single = gradflow_ensemble(
        training,
        gf.GradientDescent(training.step_size),
        PATHS,
        gf.Normals(precision="single"),
    )
    methods = [
        Method("noise alone", noise_alone((1, 1), PATHS), steps, None),
        Method("steps alone, normals given", jax_peers.steps_alone(training, PATHS), steps, None),
        Method("gradflow", own, steps),
        Method("gradflow, single-precision normals", single, steps),
        Method(
            "JAX by hand",
            jax_peers.scan_in_blocks(training, training.descent_scales, PATHS, block=64),
            steps,
            columns,
        ),
        *(
            Method(
                f"numba, {name}",
                lambda n, kernel=kernel: kernel(starts, 1.0, *training.descent_scales, n),
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
        Target("within 1.3x of the noise alone", "gradflow", ("noise alone",), 1.3),
        Target("1.5x faster than the best numba", "gradflow", numba, 1 / 1.5),
        Target(
            "1.5x faster than numba with its own normals",
            "gradflow",
            ("numba, Mersenne twister",),
            1 / 1.5,
        ),
    ]
    report.add(
        ensemble_table(
            "scalar depth 2, SGD", training, methods, PATHS, rounds_of(chosen), "gradflow", targets
        )
    )
    report.write()


if __name__ == "__main__":
    main()
