"""The matrix-free forms of the slow drift, forced on small problems, against enumerated noise."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import slow_reference as oracle
from compiled import compiled
from reference import as_numpy, assert_close
from slow_cases import LABELS, OTHERS, as_weights, case

from gradflow.theory.slow_drift import slow_drift


@pytest.fixture
def drift(monkeypatch):
    """The slow drift without any decomposition of a kernel, as a vector."""
    monkeypatch.setattr("gradflow.geometry.kernel.LARGEST_DENSE_KERNEL", 0)

    @compiled
    def forced(*arguments, **options):
        return slow_drift(*arguments, **options)

    def velocity(problem, layers, h, beta=0.0, **options):
        numbers = (jnp.asarray(h), jnp.asarray(beta))
        return reference.flatten(as_numpy(forced(problem, as_weights(layers), *numbers, **options)))

    return velocity


def close(actual, expected, size=0.0, tolerance=1e-9):
    assert_close([actual], [expected], max(np.abs(expected).max(), size), tolerance)


@pytest.mark.parametrize("name", LABELS)
def test_label_noise(name, drift):
    c = case(name)
    for part, beta in ((0.1, 0.0), (1.9, 0.0), (1.0, 0.9)):
        h = part * (1 + beta) / oracle.top_curvature(c.layers, c.s)
        expected = oracle.noise_drift(c.layers, c.s, c.noise, h, beta) / h
        close(drift(c.problem, c.layers, h, beta), expected, size=1e-4)


# BiCGStab divides zero by zero once it is exact, as for a single unknown, which is never large.
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "scalar batches"])
def test_noise_that_depends_on_the_fluctuation(name, drift):
    c = case(name)
    for part, beta in ((0.05, 0.0), (0.9, 0.0), (0.3, 0.5), (0.9, 0.9)):
        h = part * (1 - beta) / oracle.top_curvature(c.layers, c.s)
        got = drift(c.problem, c.layers, h, beta)
        try:
            expected = oracle.noise_drift(c.layers, c.s, c.noise, h, beta) / h
        except oracle.UnstableError:
            assert np.all(np.isnan(got))
            continue
        close(got, expected)


@pytest.mark.parametrize("name", ["2-3-2", "batches", "2-2-2-2"])
def test_classical_limit(name, drift):
    c = case(name)
    columns = oracle.pulled(c.layers, np.sqrt(c.noise.chance)[:, None, None] * c.noise.e)
    for h, beta in ((0.2, 0.0), (0.03, 0.9)):
        expected = oracle.classical_drift(c.layers, c.s, columns, h, beta) / h
        close(drift(c.problem, c.layers, h, beta, finite_step=False), expected)
