"""Hypothesis strategies for networks, data, regularizers and whole problems."""

from gradflow.testing.strategies.data import data as data
from gradflow.testing.strategies.entries import (
    conditioned as conditioned,
    entries as entries,
    invertible as invertible,
    matrices as matrices,
    orthogonal as orthogonal,
)
from gradflow.testing.strategies.networks import networks as networks, shapes as shapes
from gradflow.testing.strategies.problems import (
    problems as problems,
    seeds as seeds,
    stability_limit as stability_limit,
    step_sizes as step_sizes,
)
from gradflow.testing.strategies.regularizers import KINDS as KINDS, regularizers as regularizers
