"""Extreme but legal numbers: right, refused in a sentence, or flagged; on the smallest network."""

import re
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import gradflow as gf

DYNAMICS: dict[str, Callable[[], gf.AbstractDynamics]] = {
    "GradientDescent": lambda: gf.GradientDescent(0.1),
    "momentum": lambda: gf.GradientDescent(0.1, momentum=0.9),
    "adam": lambda: gf.GradientDescent(0.1, optimizer=gf.FromOptax("adam")),
    "schedule": lambda: gf.GradientDescent(
        gf.FromOptax("exponential_decay", init_value=0.1, transition_steps=5, decay_rate=0.5)
    ),
    "SVAG": lambda: gf.SVAG(0.1, amplification=2),
    "StochasticFlow": lambda: gf.StochasticFlow(0.1, diffusion="auto"),
    "StochasticFlow 2": lambda: gf.StochasticFlow(0.1, order=2),
    "ExactFlow": lambda: gf.ExactFlow(),
    "GradientFlow": lambda: gf.GradientFlow(),
    "conservative": lambda: gf.GradientFlow(conservative=True),
    "ModifiedFlow": lambda: gf.ModifiedFlow(0.1),
    "PrincipalFlow": lambda: gf.PrincipalFlow(0.1),
    "HeavyBallFlow": lambda: gf.HeavyBallFlow(0.1, 0.5),
    "SlowFlow": lambda: gf.SlowFlow(0.1),
}
REGULARIZERS: dict[str, list[Any]] = {
    "none": [],
    "weight decay": [gf.WeightDecay(0.1)],
    "labels": [gf.LabelNoise(0.1)],
    "inputs": [gf.InputNoise(0.1)],
    "dropout": [gf.Dropout(0.1)],
    "weight noise": [gf.WeightNoise(0.1)],
    "gradient noise": [gf.GradientNoise(0.1)],
    "rows": [gf.Minibatch(1)],
}
STARTS = [
    *((w, w) for w in (1e-300, 1e-160, 1e-100, 1e-20, 1.0, 1e8, 1e20, 1e80, 1e120, 1e150)),
    (1e-300, 1.0), (1.0, 1e-160), (30.0, 0.01), (1e-160, 1e20), (1e-300, 1e150),
    (1e150, 1e-150), (1e200, 0.1), (0.1, 1e160), (0.0, 0.0), (0.0, 1e8),
]  # fmt: skip

LARGEST_OSCILLATING = 1e3
"""The heavy ball's flow oscillates about the minima; from far beyond, its runs end at the limit of
steps, which takes minutes."""

# The quick part.
QUICK = [
    ("GradientDescent", "labels"), ("momentum", "weight decay"), ("adam", "none"),
    ("SVAG", "rows"), ("StochasticFlow", "labels"), ("ExactFlow", "weight decay"),
    ("GradientFlow", "none"),
]  # fmt: skip


def is_own(error: Exception) -> bool:
    """Whether an error is a sentence of gradflow's own."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError | TypeError | MemoryError) and "/gradflow/" in last


def check(dynamics: gf.AbstractDynamics, regularizers: list[Any], start: tuple[float, float]):
    """Run it, and look at every number that comes back."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), regularizers)
    net = gf.DeepLinear([[[start[0]]], [[start[1]]]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = gf.simulate(problem, net, dynamics, t1=1.0, save=3, key=jax.random.key(0))
        except Exception as error:
            assert is_own(error), (start, error)
            return
    said = " ".join(str(w.message) for w in caught)
    assert " encountered in " not in said, (start, said)  # NumPy's words
    flagged = bool(run.diverged) or bool(np.any(getattr(run, "incomplete", False)))
    for name, variable in run.to_xarray().data_vars.items():
        if name == "diverged_at" or variable.dtype.kind != "f":
            continue
        assert flagged or not np.isnan(variable).any(), (start, name, variable.values)
        told = flagged or f"{name} is infinite" in said
        assert told or not np.isinf(variable).any(), (start, name)


def check_all(dynamics: str, regularizer: str):
    for start in STARTS:
        if dynamics == "HeavyBallFlow" and max(start) > LARGEST_OSCILLATING:
            continue
        check(DYNAMICS[dynamics](), REGULARIZERS[regularizer], start)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("dynamics", "regularizer"), QUICK)
def test_nothing_is_silently_wrong(dynamics: str, regularizer: str):
    check_all(dynamics, regularizer)


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_nothing_is_silently_wrong_in_any_pair(dynamics: str, regularizer: str):
    if (dynamics, regularizer) not in QUICK:
        check_all(dynamics, regularizer)


HUGE = 10**400


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: gf.WeightDecay(HUGE), "WeightDecay.rate"),
        (lambda: gf.LabelNoise(HUGE), "LabelNoise.std"),
        (lambda: gf.LabelNoise(-HUGE), "LabelNoise.std"),
        (lambda: gf.LabelNoise(1e200), "LabelNoise.std must be at most 1.3e+154"),
        (lambda: gf.InputNoise(1e200), "InputNoise.std"),
        (lambda: gf.WeightNoise(1e200), "WeightNoise.std"),
        (lambda: gf.GradientNoise(1e200), "GradientNoise.std"),
        (lambda: gf.Dropout(HUGE), "Dropout.rate"),
        (lambda: gf.DropConnect(HUGE), "DropConnect.rate"),
        (lambda: gf.Minibatch(HUGE), "Minibatch.batch_size must be at most 2147483647"),
        (lambda: gf.GradientFlow(HUGE), "GradientFlow.rtol"),
        (lambda: gf.HeavyBallFlow(0.1, HUGE), "HeavyBallFlow.momentum"),
        (lambda: gf.ModifiedFlow(HUGE), "ModifiedFlow.step_size"),
        (lambda: gf.PrincipalFlow(HUGE), "PrincipalFlow.step_size"),
        (lambda: gf.StochasticFlow(HUGE), "StochasticFlow.step_size"),
        (lambda: gf.StochasticFlow(0.1, substeps=HUGE), "StochasticFlow.substeps must be at most"),
        (lambda: gf.SlowFlow(0.1, cell=HUGE), "SlowFlow.cell"),
        (lambda: gf.SVAG(0.1, HUGE), "SVAG.amplification must be at most"),
        (lambda: gf.GradientDescent(HUGE), "GradientDescent.step_size"),
        (lambda: gf.GradientDescent(0.1, path_substeps=HUGE), "GradientDescent.path_substeps"),
        (lambda: gf.DeepLinear([[[HUGE]]]), "weights: W_1"),
        (lambda: gf.Regression.whitened([[HUGE]]), "data.target"),
        (lambda: gf.Regression.whitened([[1.0]], n=HUGE), "data.n"),
        (lambda: gf.Regression.whitened([[1e200]]), "data.target: entries as large as 1e+200"),
        (lambda: gf.Regression.from_moments([[1e-300]], [[1e10]]), "data: the least-squares map"),
    ],
)  # fmt: skip
def test_what_is_too_large_is_refused_by_name(make: Callable[[], Any], field: str):
    with pytest.raises((TypeError, ValueError), match=re.escape(field)) as caught:
        make()
    assert len(str(caught.value)) < 600


PROBLEM = gf.Problem(gf.Regression.whitened([[1.0]]))
SMALL = gf.DeepLinear([[[1.0]], [[0.5]]])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"t1": HUGE}, "t1 must be a finite flow time > 0; got inf"),
        ({"t1": 1e300}, "at most 2147483647 steps"),
        ({"steps": HUGE}, "at most 2147483647 steps"),
        ({"steps": 3, "save": HUGE}, "save: at most"),
        ({"steps": 3, "save": [0, HUGE]}, "save must be"),
        ({"steps": 3, "replicas": HUGE}, "replicas: at most 4294967296"),
        ({"steps": 3, "replicas": 2**33}, "replicas: at most 4294967296"),
    ],
)
def test_a_run_of_too_much_is_refused_by_name(asked: dict[str, Any], message: str):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        gf.simulate(PROBLEM, SMALL, gf.GradientDescent(0.1), **asked)


def test_flow_times_that_overflow():
    with pytest.raises(ValueError, match="beyond the largest flow time"):
        gf.simulate(PROBLEM, SMALL, gf.GradientDescent(1e308), steps=3)
    with pytest.raises(ValueError, match="at most 2147483647 steps"):
        gf.simulate(PROBLEM, SMALL, gf.GradientDescent(1e-300), t1=1e10)
    with pytest.raises(ValueError, match="beyond the largest flow time"):
        gf.simulate(PROBLEM, SMALL, gf.HeavyBallFlow(1e308, 0.5), steps=3)


def test_weights_whose_squares_overflow_are_refused():
    with pytest.raises(ValueError, match=r"net: weights as large as 1e\+200 overflow when squared"):
        gf.simulate(PROBLEM, gf.DeepLinear([[[1e200]], [[0.1]]]), gf.StochasticFlow(0.1), t1=1.0)


def test_a_batch_that_no_memory_holds():
    sample = gf.Regression.from_samples([[1.0], [2.0]], [[1.0], [2.0]])
    problem = gf.Problem(sample, [gf.Minibatch(2**31 - 1, replacement=True)])
    with pytest.raises(MemoryError, match="use a smaller batch"):
        gf.simulate(problem, SMALL, gf.GradientDescent(0.1), steps=2, key=jax.random.key(0))


def test_what_is_infinite_is_said():
    r"""From (1e80, 1e80) the loss is 1e320 / 2, and gradient flow forgets it by t = 1/2.

    For equal weights $p = w^2$ obeys $p' = 2 p (1 - p)$: $p = 1 / (1 - (1 - 1/p_0) e^{-2 t})$.
    """
    net = gf.DeepLinear([[[1e80]], [[1e80]]])
    with pytest.warns(RuntimeWarning) as caught:
        run = gf.simulate(PROBLEM, net, gf.ExactFlow(), t1=0.5, save=[0.0, 0.5])
    said = sorted(str(w.message).split(" ")[0] for w in caught)
    assert said == ["excess_loss", "loss"]
    assert "infinite at t = 0" in str(caught[0].message)
    product = 1.0 / (1.0 - np.exp(-1.0))
    np.testing.assert_allclose(run["loss"][-1], 0.5 * (product - 1.0) ** 2, rtol=1e-12)


def test_a_batch_beyond_memory_is_refused():
    data = gf.Regression.from_samples([[0.5], [1.0]], [[0.5], [1.0]])
    problem = gf.Problem(data, [gf.Minibatch(10**9, replacement=True)])
    net = gf.DeepLinear([[[1.0]], [[0.5]]])
    with pytest.raises(MemoryError, match="use a smaller batch"):
        gf.simulate(problem, net, gf.GradientDescent(0.1), steps=1, save=2, key=jax.random.key(0))


def test_a_scale_beyond_the_floats_is_refused():
    with pytest.raises(ValueError, match=r"init\.scale: got inf"):
        gf.init.gaussian.__wrapped__((1, 1, 1), 10**400, jax.random.key(0))


@pytest.mark.slow
def test_what_diverges_is_not_said_to_overflow(recwarn: pytest.WarningsRecorder):
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.1)])
    net = gf.DeepLinear([[[2.0]], [[0.1]]])
    gf.simulate(problem, net, gf.GradientDescent(5.0), steps=50, replicas=4,
                key=jax.random.key(0), keep="statistics")  # fmt: skip
    assert {w.category for w in recwarn} == {gf.DivergedWarning}


@pytest.mark.parametrize("target", [1e50, 1e150])
def test_a_target_far_beyond_the_start_is_no_divergence(target: float):
    r"""$w_1 w_2 = T$ on white inputs: within $1 / T$ of the flow time the product is there."""
    problem = gf.Problem(gf.Regression.whitened([[target]]))
    run = gf.simulate(problem, gf.DeepLinear([[[1.0]], [[0.1]]]), gf.ExactFlow(), t1=1.0, save=2,
                      observables=["end_to_end"])  # fmt: skip
    assert not run.diverged
    np.testing.assert_allclose(run["end_to_end"][-1], [[target]], rtol=1e-12)


@pytest.mark.slow
def test_a_slow_flow_takes_few_paths_at_once():
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)])
    run = gf.simulate(problem, SMALL, gf.SlowFlow(0.01), t1=0.1, save=2, replicas=5000)
    assert run.attrs["chunk"] == 2500
