"""Steps of scalar ensembles beside their floor, the generation of the noise alone.

    python benchmarks/bench_ensembles.py

One process, alternated, medians over rounds; a figure counts as a ratio to the noise measured in
the same round. Prints a Markdown table.
"""

import platform
import statistics
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
from rich.console import Console

import gradflow as gf
from gradflow.streams import Stream

PATHS = 10_000
STEPS = 2_048
BLOCK = 32
ROUNDS = 5


@jax.jit
def noise_alone(key: jax.Array) -> jax.Array:
    """The sum of the normals that `PATHS` paths take in `STEPS` steps."""
    paths = jnp.arange(PATHS)

    def block(b: jax.Array, total: jax.Array) -> jax.Array:
        stream = Stream(key, b * BLOCK + jnp.arange(BLOCK), paths)
        return total + stream.normals((1, 1)).sum(axis=0)[0, 0]

    return jax.lax.fori_loop(0, STEPS // BLOCK, block, jnp.zeros(PATHS))


def main() -> None:
    """Measure and print."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)])
    net = gf.DeepLinear([[[2.0]], [[0.1]]])
    key = jax.random.key(0)

    def simulated(dynamics: gf.AbstractDynamics, ticks: int) -> None:
        gf.simulate(
            problem, net, dynamics, steps=STEPS // ticks, replicas=PATHS, key=key, save=2,
            observables=["loss"], progress=False,
        )  # fmt: skip

    work = {
        "noise alone": lambda: noise_alone(jax.random.key_data(key)).block_until_ready(),
        "SGD with label noise": lambda: simulated(gf.GradientDescent(0.05), 1),
        "SDE with label noise": lambda: simulated(gf.StochasticFlow(0.05, substeps=8), 8),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(ROUNDS + 1):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            if round_number:  # the first round compiles
                seconds[name].append(time.perf_counter() - began)
    console = Console(highlight=False)
    console.print(f"{platform.machine()}, jax {version('jax')}, diffrax {version('diffrax')}, f64")
    console.print(f"{PATHS} paths, {STEPS} steps, median of {ROUNDS} rounds\n")
    console.print("| scalar depth 2 | ns a step and path | ratio to the noise alone (range) |")
    console.print("|---|---|---|")
    for name, times in seconds.items():
        ratios = [t / n for t, n in zip(times, seconds["noise alone"], strict=True)]
        console.print(
            f"| {name} | {statistics.median(times) / (PATHS * STEPS) * 1e9:.1f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
