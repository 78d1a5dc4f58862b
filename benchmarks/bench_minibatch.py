"""Minibatch SGD of 256 networks of depth 3 and width 64 on 512 rows, 64 rows a step.

    python benchmarks/bench_minibatch.py [--quick]

With batch and width equal, the shortest ways to the gradient take the same number of operations:
the rows through the network and back, or the end-to-end gradient pulled back: eight products of
64 x 64 matrices. The limit is the time of that number at the rate of a large product of matrices;
beside it stand eight such products alone, two matrices that stay in the cache.
"""

from typing import Any

import jax
import numpy as np
from agreement import same_distribution
from cases import near_orthogonal, positive_target
from contest import Contestant, contest
from ensembles import rounds_of
from limits import gemm, small_products, step_flops
from results import Report, Table, Target, options
from torch_peers import minibatch_loop

import gradflow as gf

PATHS, DEPTH, WIDTH, ROWS, BATCH = 256, 3, 64, 512, 64
STEP_SIZE = 0.02
LIMIT = "limit: the operations at the GEMM rate"
ALONE = "products of 64 x 64 matrices alone"


def flops() -> float:
    """Operations of a step of one network: pull back, and the end-to-end gradient of the rows."""
    return step_flops(DEPTH, WIDTH) + 4.0 * BATCH * WIDTH**2


def main() -> None:
    """Measure and write."""
    chosen = options(__doc__).parse_args()
    report = Report("minibatch", chosen)
    steps = 4 if chosen.quick else 128
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, WIDTH))
    target = positive_target(WIDTH)
    y = x @ target.T + 0.1 * rng.normal(size=(ROWS, WIDTH))
    layers = near_orthogonal((WIDTH,) * (DEPTH + 1))
    problem = gf.Problem(gf.Regression.from_samples(x, y), [gf.Minibatch(BATCH, replacement=True)])
    net = gf.DeepLinear(list(layers))

    def own(steps: int) -> list[np.ndarray]:
        trajectory = gf.simulate(
            problem,
            net,
            gf.GradientDescent(STEP_SIZE),
            steps=steps,
            replicas=PATHS,
            key=jax.random.key(0),
            save=2,
            observables=["loss"],
            store_weights=False,
            progress=False,
        )
        return trajectory["loss"][:, -1]

    loop = minibatch_loop(x, y, layers, STEP_SIZE, BATCH, PATHS)

    def final_loss(weights: Any) -> np.ndarray:
        product = np.asarray(weights[2] @ weights[1] @ weights[0])
        return 0.5 / ROWS * np.sum((np.einsum("rij,nj->rni", product, x) - y) ** 2, axis=(1, 2))

    few = 16
    agreement = same_distribution(
        {"gradflow": {"loss": own(few)}, "PyTorch": {"loss": final_loss(loop(few))}}
    )
    product, work = gemm()
    products = small_products(WIDTH, PATHS, round(flops() / (2.0 * WIDTH**3)))
    timings = contest(
        [
            Contestant("gradflow", lambda: own(steps), steps * PATHS),
            Contestant("PyTorch", lambda: loop(steps), steps * PATHS),
            Contestant(ALONE, lambda: products(steps), steps * PATHS),
            Contestant(LIMIT, product, work / flops()),
        ],
        rounds_of(chosen, 7),
    )
    for timing in timings.values():
        timing.facts["GFLOP/s"] = flops() / timing.median / 1e9
    targets = [
        Target("60 % of the GEMM rate", "gradflow", (LIMIT,), 1 / 0.6),
        Target("5x faster than a PyTorch loop", "gradflow", ("PyTorch",), 1 / 5),
    ]
    report.add(
        Table(
            f"depth {DEPTH}, width {WIDTH}, batch {BATCH}, {PATHS} paths", "us", "step and path",
            "gradflow", timings, targets, agreement,
        )
    )  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
