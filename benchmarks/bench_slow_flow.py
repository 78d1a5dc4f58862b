"""Ten million steps of SGD: predicted by the slow flow, and simulated.

    python benchmarks/bench_slow_flow.py [steps]

Both start at the same minimum and are compiled first. The slow flow is timed over its whole run,
the optimization phase at its start included, medians over rounds. SGD is run once with the number
of replicas of the table. Prints a Markdown table; the last columns compare where both end.
"""

import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

import gradflow as gf

ROUNDS = 7
MOVE = 1.0
"""Noise is chosen so that label noise would shrink G by about exp(-MOVE) in the run."""


def random_layers(widths: Sequence[int]) -> list[np.ndarray]:
    """Layers near multiples of orthogonal matrices, the first one larger."""
    rng = np.random.default_rng(0)
    layers = []
    for i, (below, above) in enumerate(itertools.pairwise(widths)):
        size = max(below, above)
        frame = np.linalg.qr(rng.normal(size=(size, size)))[0][:above, :below]
        layers.append((1.3 if i == 0 else 0.8) * frame + 0.1 * rng.normal(size=(above, below)))
    return layers


def make_case(widths: Sequence[int], h_lam: float, momentum: float, steps: int) -> "Case":
    """A whitened problem whose minimum the layers are, with label noise, and the step size."""
    layers = random_layers(widths)
    target = layers[0]
    for w in layers[1:]:
        target = w @ target
    net = gf.DeepLinear(layers)
    data = gf.Regression.whitened(target)
    h = h_lam / float(gf.sharpness(net, data))
    std = (1.0 - momentum) * float(np.sqrt(MOVE / steps)) / h
    return Case(gf.Problem(data, [gf.LabelNoise(std)]), net, h, momentum, steps)


CASES = (
    ((1, 1, 1), 0.8, 0.0, 64),
    ((1, 1, 1), 0.8, 0.9, 64),
    ((1, 1, 1, 1), 0.8, 0.0, 64),
    ((2, 3, 2), 0.8, 0.0, 8),
    ((2, 2, 3, 2), 0.8, 0.0, 8),
    ((10, 10, 10, 10), 0.8, 0.0, None),
)
"""Widths, h lam_max, momentum and replicas of SGD (None: 10^4 steps of one path, scaled up)."""

SAMPLE = 10_000


@dataclass(frozen=True)
class Case:
    """One training and the slow flow that describes it."""

    problem: gf.Problem
    net: gf.DeepLinear
    step_size: float
    momentum: float
    steps: int

    def follow(self, finite_step: bool = True) -> np.ndarray:
        """The imbalance at the start and the end of the slow flow."""
        return gf.simulate(
            self.problem,
            self.net,
            gf.SlowFlow(self.step_size, finite_step, self.momentum),
            steps=self.steps,
            save=2,
            observables=["imbalance"],
            progress=False,
        )["imbalance"]

    def train(self, steps: int, replicas: int) -> np.ndarray:
        """The imbalance of every replica of SGD at the end."""
        return gf.simulate(
            self.problem,
            self.net,
            gf.GradientDescent(self.step_size, self.momentum),
            steps=steps,
            save=2,
            replicas=replicas,
            key=jax.random.key(0),
            observables=["imbalance"],
            progress=False,
        )["imbalance"][:, -1]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The wall time of a call and what it gives."""
    began = time.perf_counter()
    value = run()
    return time.perf_counter() - began, value


def main() -> None:
    """Measure and print."""
    steps = int(float(sys.argv[1])) if len(sys.argv) > 1 else 10_000_000
    print(f"{platform.machine()}, jax {version('jax')}, diffrax {version('diffrax')}, f64")
    print(f"{steps:.0e} steps, label noise; imbalance D\n")
    print(
        "| widths | h lam_max | momentum | slow flow, ms (range) | SGD, s (paths) | ratio | "
        "ratio a path | D: start | leading order | slow flow | SGD (standard error) |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for widths, h_lam, momentum, replicas in CASES:
        case = make_case(widths, h_lam, momentum, steps)
        start, end = case.follow()
        leading = case.follow(finite_step=False)[-1]
        times = [timed(case.follow)[0] for _ in range(ROUNDS)]
        median = statistics.median(times)
        paths = replicas or 1
        case.train(SAMPLE, paths)  # compiles
        if replicas is None:
            trained = timed(lambda: case.train(SAMPLE, 1))[0] * steps / SAMPLE  # noqa: B023
            shown, measured = f"{trained:.0f} (1, scaled from {SAMPLE} steps)", "-"
        else:
            trained, values = timed(lambda: case.train(steps, replicas))  # noqa: B023
            shown = f"{trained:.1f} ({replicas})"
            error = np.std(values, ddof=1) / np.sqrt(replicas)
            measured = f"{np.mean(values):.5f} ({error:.5f})"
        print(
            f"| {'-'.join(map(str, widths))} | {h_lam} | {momentum} | {median * 1e3:.1f} "
            f"({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}) | {shown} | "
            f"{trained / median:,.0f} | {trained / median / paths:,.0f} | {start:.5f} | "
            f"{leading:.5f} | {end:.5f} | {measured} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
