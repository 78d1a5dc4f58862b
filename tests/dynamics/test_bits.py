"""The same call gives the same bits, whatever the speed of the machine and the saved times."""

import itertools

import diffrax
import jax
import numpy as np
import pytest

import gradflow as gf
from gradflow.dynamics import base
from gradflow.simulation import slices as runner

SCALAR = gf.DeepLinear([[[0.9]], [[-0.4]]])
MATRIX = gf.init.gaussian((3, 2, 2), key=jax.random.key(1), scale=0.5)
ONE = gf.Regression.whitened([[0.8]])
MANY = gf.Regression.from_samples(
    np.random.default_rng(0).normal(size=(12, 3)), np.random.default_rng(1).normal(size=(12, 2))
)
LABELS = gf.Problem(ONE, [gf.LabelNoise(0.3), gf.WeightDecay(0.01)])
DROPOUT = gf.Problem(ONE, [gf.Dropout(0.2)])
SHIFTED = gf.Problem(ONE, [gf.WeightNoise(0.1, anticorrelated=True)])
ROWS = gf.Problem(MANY, [gf.Minibatch(4)])
STEPS = 67
"""With it the last turn is cut, and the last block of the noise of 203 paths or of its steps."""

CASES = {
    "descent with a schedule": (
        LABELS,
        SCALAR,
        gf.GradientDescent(lambda k: 0.05 / (1.0 + 0.01 * k), momentum=0.5),
    ),
    "descent, noise inside": (DROPOUT, SCALAR, gf.GradientDescent(0.05)),
    "descent, anticorrelated": (SHIFTED, SCALAR, gf.GradientDescent(0.05)),
    "minibatches": (ROWS, MATRIX, gf.GradientDescent(0.05, momentum=0.5)),
    "SVAG": (LABELS, SCALAR, gf.SVAG(0.1, amplification=3)),
    "order 1": (LABELS, SCALAR, gf.StochasticFlow(0.1)),
    "order 1, three substeps": (LABELS, SCALAR, gf.StochasticFlow(0.1, substeps=3)),
    "order 2": (LABELS, SCALAR, gf.StochasticFlow(0.1, order=2)),
    "Stratonovich": (LABELS, SCALAR, gf.StochasticFlow(0.1, order=2, solver=diffrax.Heun())),
    "order 2 of a matrix": (ROWS, MATRIX, gf.StochasticFlow(0.1, order=2, substeps=3)),
}


class Artificial:
    """A pace that does what it is told, whatever the clock says."""

    amounts = (10**6,)

    def __init__(self, amount):
        self._coming = itertools.cycle(self.amounts)
        self.amount = next(self._coming)

    def learn(self, amount, seconds):
        self.amount = next(self._coming)

    def message(self, paths):
        return ""


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("name", CASES)
def test_neither_slices_nor_saved_times_change_a_bit(name, monkeypatch):
    check_cuts(name, monkeypatch)


def test_nor_do_they_with_longer_turns(monkeypatch):
    """Accelerators take 16 steps a turn; a cut may then fall into the same turn twice."""
    monkeypatch.setattr(base, "CPU_STEPS", 4)
    jax.clear_caches()
    check_cuts("descent with a schedule", monkeypatch)
    jax.clear_caches()


def check_cuts(name, monkeypatch):
    problem, net, dynamics = CASES[name]
    monkeypatch.setattr(runner, "SliceSizer", Artificial)

    def run(save, *amounts):
        monkeypatch.setattr(Artificial, "amounts", amounts)
        return gf.simulate(
            problem, net, dynamics, steps=STEPS, replicas=203, key=jax.random.key(3), save=save,
            observables=["loss"], store_weights=True, progress=False,
        )  # fmt: skip

    every = run(STEPS + 1, 10**6)
    for save, amounts in ((2, (10**6,)), (2, (1, 7, 64, 13)), (8, (37,)), (STEPS + 1, (5, 2))):
        one = run(save, *amounts)
        at = one.to_xarray()["step"].values
        for mine, all_ in zip(
            (one["loss"], *one.weights), (every["loss"], *every.weights), strict=True
        ):
            np.testing.assert_array_equal(mine, all_[:, at], err_msg=f"save={save}, {amounts}")


@pytest.mark.slow
def test_what_a_chunk_holds_changes_rounding_at_most():
    problem, net, dynamics = CASES["order 1"]
    whole, parts = (
        gf.simulate(problem, net, dynamics, steps=20, replicas=10, key=jax.random.key(3), save=2,
                    chunk=chunk)
        for chunk in (10, 3)
    )  # fmt: skip
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-11)
