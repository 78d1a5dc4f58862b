"""Contests between ensembles of label-noise training."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from agreement import same_distribution
from cases import Training, end_quantities
from contest import PATIENCE, Contestant, contest
from results import Table, Target

import gradflow as gf


@dataclass(frozen=True)
class Method:
    """One way to run an ensemble.

    - `run`: takes the number of steps and gives the layers at the end, `(R, d_i, d_{i-1})` each,
        or as `shaped` makes them of what it gives.
    - `steps`: how many steps are timed; fewer where a step is slow.
    - `shaped`: None for something that has no end, such as the noise alone.
    """

    name: str
    run: Callable[[int], Any]
    steps: int
    shaped: Callable[[Any], Sequence[Any]] | None = tuple


def gradflow_ensemble(
    training: Training,
    dynamics: gf.AbstractDynamics,
    paths: int,
    normals: gf.Normals | None = None,
) -> Callable[[int], Any]:
    """`gradflow.simulate`, whose result is the layers at the end."""
    problem, net = training.problem, gf.DeepLinear(list(training.layers))
    ticks = dynamics.ticks_per_step or 1

    def run(steps: int) -> list[np.ndarray]:
        trajectory = gf.simulate(
            problem,
            net,
            dynamics,
            steps=-(-steps // ticks),
            replicas=paths,
            key=jax.random.key(5),
            normals=normals,
            save=2,
            observables=["loss"],
            store_weights=True,
            progress=False,
        )
        return [w[:, -1] for w in trajectory.weights]

    return run


def columns(result: Any) -> list[np.ndarray]:
    """Scalar layers, one array or row of numbers each, as matrices."""
    return [np.asarray(w).reshape(-1, 1, 1) for w in result]


def stacked(result: Any) -> list[np.ndarray]:
    """Layers that are one array, `(R, N, d, d)`."""
    return list(np.moveaxis(np.asarray(result), 1, 0))


def ensemble_table(
    title: str,
    training: Training,
    methods: Sequence[Method],
    paths: int,
    rounds: int,
    reference: str,
    targets: Sequence[Target],
    check_steps: int = 64,
    patience: float = PATIENCE,
) -> Table:
    """Check that all ends have one distribution, then time everything."""
    ends = {
        method.name: end_quantities(method.shaped(method.run(check_steps)), training.target)
        for method in methods
        if method.shaped is not None
    }
    agreement = same_distribution(ends)
    contestants = [
        Contestant(m.name, lambda m=m: m.run(m.steps), m.steps * paths, {"steps": m.steps})
        for m in methods
    ]
    timings = contest(contestants, rounds, patience)
    return Table(title, "ns", "step and path", reference, timings, targets, agreement)


def rounds_of(options: argparse.Namespace, full: int = 9) -> int:
    """The rounds asked for."""
    return options.rounds or (2 if options.quick else full)
