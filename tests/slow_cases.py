"""Problems at a minimum with their noise enumerated, for the theory of the slow flow."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import reference
import slow_reference as oracle

import gradflow as gf

SXX = {1: np.array([[1.3]]), 2: np.array([[1.3, 0.4], [0.4, 0.8]])}
SINGULAR = np.array([[1.0, 0.5], [0.5, 0.25]])


def as_weights(layers):
    return tuple(jnp.asarray(w) for w in layers)


class Case(NamedTuple):
    """A problem whose minima hold the layers, with its noise enumerated."""

    problem: gf.Problem
    layers: list[np.ndarray]
    s: np.ndarray
    noise: oracle.Noise


def labels(widths, s=None, std=0.5, n=3, seed=0):
    layers = oracle.network(widths, seed)
    s = SXX[widths[0]] if s is None else s
    p = reference.end_to_end(layers)
    problem = gf.Problem(gf.Regression.from_moments(s, p @ s, n=n), [gf.LabelNoise(std)])
    return Case(problem, layers, s, oracle.label_noise(s, widths[-1], std**2 / n))


def sample(widths, n, size=None, replacement=False, inputs=0.0, std=0.0, seed=0, singular=False):
    """A finite sample with a residual; the whole of it unless a batch size is given."""
    layers, x, y, s = oracle.fitted_sample(widths, n, inputs, seed=seed, singular=singular)
    rows = [range(n)] if size is None else list(reference.batches(n, size, replacement))
    regularizers = []
    if inputs:
        regularizers.append(gf.InputNoise(inputs))
    if size is not None:
        regularizers.append(gf.Minibatch(size, replacement))
    if std:
        regularizers.append(gf.LabelNoise(std))
    return Case(
        gf.Problem(gf.Regression.from_samples(x, y), regularizers),
        layers,
        s,
        oracle.sample_noise(x, y, reference.end_to_end(layers), rows, inputs, std),
    )


def population(widths, n=2, size=None, inputs=0.0, std=0.0, residual=0.3, seed=0):
    """A Gaussian population: online minibatches, or `n` fixed rows with noise on their inputs."""
    layers = oracle.network(widths, seed)
    p, s = reference.end_to_end(layers), SXX[widths[0]]
    noisy = s + inputs**2 * np.eye(widths[0])
    syx = p @ noisy
    syy = syx @ np.linalg.solve(s, syx.T) + residual * np.eye(widths[-1])
    regularizers = [gf.Minibatch(size)] if size else []
    if inputs:
        regularizers.append(gf.InputNoise(inputs))
    if std:
        regularizers.append(gf.LabelNoise(std))
    data = gf.Regression.from_moments(s, syx, syy, n=n)
    noise = oracle.population_noise(s, p, residual, size or n, bool(size), inputs, std)
    return Case(gf.Problem(data, regularizers), layers, noisy, noise)


LABELS = {
    "one layer": lambda: labels((2, 2)),
    "scalar, depth 2": lambda: labels((1, 1, 1)),
    "scalar, depth 3": lambda: labels((1, 1, 1, 1)),
    "scalar, depth 4": lambda: labels((1, 1, 1, 1, 1)),
    "2-3-2": lambda: labels((2, 3, 2)),
    "2-3-2, whitened": lambda: labels((2, 3, 2), np.eye(2), seed=1),
    "2-3-2, singular": lambda: labels((2, 3, 2), SINGULAR),
    "one layer, singular": lambda: labels((2, 2), SINGULAR),
    "1-2-3": lambda: labels((1, 2, 3)),
    "2-2-1": lambda: labels((2, 2, 1)),
    "2-2-2-2": lambda: labels((2, 2, 2, 2)),
    "2-1-2": lambda: labels((2, 1, 2)),
}

OTHERS = {
    "inputs, labels": lambda: population((2, 3, 2), inputs=0.4, std=0.3),
    "online": lambda: population((2, 3, 2), size=8),
    "online, inputs, labels": lambda: population((2, 2, 1), size=6, inputs=0.3, std=0.2),
    "batches": lambda: sample((2, 3, 2), 4, 2),
    "batches, singular": lambda: sample((2, 3, 2), 4, 2, singular=True),
    "replacement, depth 3": lambda: sample((2, 2, 2, 2), 4, 3, replacement=True),
    "scalar batches": lambda: sample((1, 1, 1), 4, 2),
    "batches, inputs, labels": lambda: sample((2, 3, 2), 3, 2, inputs=0.2, std=0.3),
    "sample, inputs": lambda: sample((1, 2, 3), 3, inputs=0.3),
}


@functools.cache
def case(name):
    return (LABELS | OTHERS)[name]()
