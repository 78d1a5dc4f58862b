"""Flows that have reached their limit, flows that cannot go on, and starts below the tolerance."""

import warnings
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import gradflow as gf
from gradflow.backend.types import Scalar, Weights
from gradflow.dynamics import base, integration
from gradflow.regularizers.base import AbstractPenalty
from gradflow.simulation import slices

SCALAR = gf.Problem(gf.Regression.whitened([[1.0]]))
WATCH = ["loss", "imbalance", "end_to_end"]


def scalars(*weights: float) -> gf.DeepLinear:
    return gf.DeepLinear([[[w]] for w in weights])


def end(run: gf.Trajectory, name: str) -> float:
    return float(run[name].ravel()[-1])


class AbsoluteValue(AbstractPenalty):
    """The sum of all |W_ij|, which has a kink."""

    rate: float

    @property
    def is_stochastic(self) -> bool:
        return False

    def penalty(self, weights: Weights) -> Scalar:
        return self.rate * sum((jnp.sum(jnp.abs(w)) for w in weights), start=jnp.zeros(()))

    def penalty_gradient(self, weights: Weights) -> Weights:
        return tuple(self.rate * jnp.sign(w) for w in weights)


# Limits


@pytest.mark.few_cases(3)
@pytest.mark.parametrize("save", [2, 101])
@pytest.mark.parametrize(
    ("w1", "w2", "t1"), [(30.0, 0.01, 1e4), (30.0, 0.01, 1e12), (2.0, 0.1, 1e7), (2.0, 0.1, 1e12)]
)
def test_a_flow_at_rest_stays_there(w1: float, w2: float, t1: float, save: int):
    """Loss 0 and the imbalance of the start, however long the run and however often it is saved."""
    run = gf.simulate(SCALAR, scalars(w1, w2), gf.GradientFlow(), t1=t1, save=save)
    assert not run.diverged
    assert not run.incomplete
    assert end(run, "loss") < 1e-16
    np.testing.assert_allclose(end(run, "imbalance"), w1**2 - w2**2, rtol=1e-8)


@pytest.mark.parametrize("t1", [1e3, 1e4, 1e12])
def test_a_slow_drift_is_followed_to_its_end(t1: float):
    """Weight decay: the imbalance falls by exp(-2 lam t), to a balanced minimum at T - lam."""
    rate = 1e-3
    problem = gf.Problem(SCALAR.data, [gf.WeightDecay(rate)])
    run = gf.simulate(
        problem, scalars(2.0, 0.1), gf.GradientFlow(), t1=t1, save=2, observables=WATCH
    )
    expected = 3.99 * np.exp(-2.0 * rate * t1)
    np.testing.assert_allclose(end(run, "imbalance"), expected, rtol=1e-5, atol=1e-8)
    if t1 == 1e12:
        np.testing.assert_allclose(end(run, "end_to_end"), 1.0 - rate, rtol=1e-12)


def test_rest_waits_for_what_leaves_a_saddle():
    """A mode of 1e-30 beside one that is at rest has not come to rest, but waits."""
    data = gf.Regression.whitened(np.diag([2.0, 0.5]))
    net = gf.DeepLinear([np.diag([1.0, 1e-30])] * 2)
    half = np.log(0.5 / 1e-60 - 1.0) / (2.0 * 0.5)  # of the second mode's own 1/2
    run = gf.simulate(
        gf.Problem(data), net, gf.GradientFlow(), t1=1e9, save=[half, 1e9], observables=WATCH
    )
    modes = run["end_to_end"][-2:, [0, 1], [0, 1]]
    np.testing.assert_allclose(modes, [[2.0, 0.25], [2.0, 0.5]], rtol=1e-5)


# Starts below the tolerance


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("start", [1e-8, 1e-12, 1e-16, 1e-22, 1e-100])
def test_leaving_a_saddle_takes_its_time(start: float):
    """The end-to-end weight is 1/2 at t = ln((1 - a^2)/a^2)/2."""
    half = 0.5 * (np.log1p(-(start**2)) - 2.0 * np.log(start))
    run = gf.simulate(
        SCALAR, scalars(start, start), gf.GradientFlow(), t1=half, save=2, observables=WATCH
    )
    np.testing.assert_allclose(end(run, "end_to_end"), 0.5, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flow",
    [
        gf.GradientFlow(solver=gf.solvers.DormandPrince853()),
        gf.GradientFlow(stiff=True),
        gf.ModifiedFlow(1e-9),
        gf.PrincipalFlow(1e-9),
    ],
    ids=lambda f: f"{type(f).__name__}-{type(f.solver).__name__}",
)
def test_every_adaptive_dynamics_does(flow: Any):
    """From e^-150 with target 2 the end-to-end weight is 1 at t = 75.173287."""
    problem = gf.Problem(gf.Regression.whitened([[2.0]]))
    start = float(np.exp(-150.0))
    run = gf.simulate(problem, scalars(start, start), flow, t1=75.173287, save=2, observables=WATCH)
    np.testing.assert_allclose(end(run, "end_to_end"), 1.0, rtol=2e-6)


@pytest.mark.slow
def test_depth_three_leaves_its_saddle_in_time():
    """t = int dw / (w^2 (T - w^3)), by SciPy; an error at the start grows like w^2."""
    start, stop = 1e-4, 0.8
    time = quad(lambda s: np.exp(s) / (np.exp(2 * s) * (1.0 - np.exp(3 * s))), np.log(start),
                np.log(stop), epsabs=0.0, epsrel=1e-12)[0]  # fmt: skip
    run = gf.simulate(
        SCALAR, scalars(*[start] * 3), gf.GradientFlow(), t1=time, save=2, observables=WATCH
    )
    np.testing.assert_allclose(end(run, "end_to_end"), stop**3, rtol=1e-8 * stop / start)


@pytest.mark.slow
@pytest.mark.parametrize("save", [2, 31])
def test_the_stages_of_a_matrix_come_in_time(save: int):
    check_stages(gf.GradientFlow(), np.array([2.0, 1.0]), save)


def test_long_steps_leave_the_saddle_between_two_stages_in_time():
    """Implicit steps are as long as their error allows, which no stability shortens."""
    check_stages(gf.GradientFlow(stiff=True), np.array([2.0, 0.3]), 2)


def check_stages(flow: gf.GradientFlow, strengths: np.ndarray, save: int):
    """A target of rank 2 in no special basis, from 1e-12: its modes are logistic curves."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    v, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    hidden, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    start = 1e-12
    target = u[:, :2] * strengths @ v[:, :2].T
    net = gf.DeepLinear([start * hidden[:, :2] @ v[:, :2].T, start * u[:, :2] @ hidden[:, :2].T])
    halves = np.log(strengths / start**2 - 1.0) / (2.0 * strengths)
    for time in halves:
        run = gf.simulate(
            gf.Problem(gf.Regression.whitened(target)),
            net,
            flow,
            t1=time,
            save=save,
            observables=["end_to_end"],
        )
        growth = start**2 * np.exp(2.0 * strengths * time)
        expected = growth * strengths / (strengths - start**2 + growth)
        modes = np.diag(u[:, :2].T @ run["end_to_end"][-1] @ v[:, :2])
        rounding = 1e-14  # of the product, in which small modes stand beside large ones
        np.testing.assert_allclose(modes, expected, rtol=2e-4, atol=rounding)


# What cannot go on


def test_a_kink_is_named():
    """w' = T - w - lam sign(w) from 1 reaches 0 at ln 21 for T = .05 and lam = .1."""
    problem = gf.Problem(gf.Regression.whitened([[0.05]]), [AbsoluteValue(0.1)])
    with pytest.warns(
        gf.IncompleteWarning, match=r"not smooth.*GradientDescent handles it"
    ) as seen:
        run = gf.simulate(problem, scalars(1.0), gf.GradientFlow(), t1=30.0, save=31)
    assert run.incomplete
    assert not run.diverged
    assert "incomplete" in repr(run)
    stopped = float(run.to_xarray()["incomplete_at"])
    np.testing.assert_allclose(stopped, np.log(21.0), rtol=1e-5)
    assert f"t = {stopped:.6g} of 30" in str(seen[0].message)
    # What was reached is right, and nothing is said of the rest.
    weight = 1.05 * np.exp(-run.time) - 0.05
    expected = np.where(run.time < stopped, 0.5 * (weight - 0.05) ** 2, np.nan)
    np.testing.assert_allclose(run["loss"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_an_explosion_is_no_kink():
    """A penalty -w^6/6 drives the weight to infinity at a finite time, with ever shorter steps."""

    class Explosive(AbstractPenalty):
        @property
        def is_stochastic(self) -> bool:
            return False

        def penalty(self, weights: Weights) -> Scalar:
            return -sum((jnp.sum(w**6) for w in weights), start=jnp.zeros(())) / 6.0

        def penalty_gradient(self, weights: Weights) -> Weights:
            return tuple(-(w**5) for w in weights)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = gf.simulate(
            gf.Problem(SCALAR.data, [Explosive()]), scalars(2.0), gf.GradientFlow(), t1=1.0, save=11
        )
    assert run.diverged
    assert not run.incomplete


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("keep", ["paths", "statistics"])
def test_a_step_limit_is_no_divergence(keep: Any, monkeypatch: pytest.MonkeyPatch):
    """With a limit of 500 steps a stiff flow with a slow drift is given up, and says so."""
    monkeypatch.setattr(integration, "MAX_STEPS", 500)
    jax.clear_caches()
    eqx.clear_caches()
    problem = gf.Problem(SCALAR.data, [gf.WeightDecay(1e-3)])
    starts = [scalars(2.0, 0.1), scalars(30.0, 0.01)]
    with pytest.warns(gf.IncompleteWarning, match=r"1 of 2 paths.*steps, the limit.*stiff=True"):
        run = gf.simulate(problem, starts, gf.GradientFlow(), t1=100.0, save=11, keep=keep)
    jax.clear_caches()
    eqx.clear_caches()
    if keep == "paths":
        assert run.incomplete.tolist() == [False, True]
        assert not run.diverged.any()
        reached = float(run.to_xarray()["incomplete_at"][1])
        before = run.time <= reached
        # Curvature is 900, steps are stable up to h lambda = 6.4, and a call may take 64 too many.
        assert 300 * 5.0 < 900.0 * reached < (500 + 64) * 6.4
        expected = 899.9999 * np.exp(-2e-3 * run.time)
        np.testing.assert_allclose(run["imbalance"][1, before], expected[before], rtol=1e-7)
        assert np.all(np.isnan(run["imbalance"][1, ~before]))
    else:
        data = run.to_xarray()
        assert data["diverged"].values.tolist() == [0] * 11
        assert data["incomplete"].values[-1] == 1
        assert data["count"].values.tolist() == [2 - n for n in data["incomplete"].values]


# Slow drifts


@pytest.mark.slow
@pytest.mark.parametrize("save", [2, 5])
def test_a_drift_of_a_hundred_million_units_of_time_is_followed(save: int):
    """Weight decay of rate r has D(t) = D(0) exp(-2 r t); explicit steps would be 10^8."""
    problem = gf.Problem(SCALAR.data, [gf.WeightDecay(1e-8)])
    run = gf.simulate(problem, scalars(2.0, 0.1), gf.GradientFlow(), t1=1e8, save=save)
    assert not run.incomplete
    np.testing.assert_allclose(run["imbalance"], 3.99 * np.exp(-2e-8 * run.time), rtol=1e-6)


@pytest.mark.parametrize(
    "dynamics",
    [gf.GradientFlow(), gf.HeavyBallFlow(0.01, 0.5), gf.ModifiedFlow(0.01)],
    ids=lambda d: type(d).__name__,
)
def test_the_implicit_solver_takes_over_path_by_path(
    dynamics: Any, monkeypatch: pytest.MonkeyPatch
):
    """After 200 steps: every path at its own time, and none is bent.

    Against the explicit solver alone, one path at a time.
    """
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.WeightDecay(1e-2)])
    starts = [scalars(1.0, 1.0), scalars(2.0, 0.1), scalars(9.0, 0.01)]
    options: dict[str, Any] = {"t1": 60.0, "save": 7, "observables": WATCH}
    alone = [gf.simulate(problem, start, dynamics, **options) for start in starts]
    for module in (base, slices):
        monkeypatch.setattr(module, "HANDOVER", 200)
    taken: list[Any] = []
    run_slice = slices._run_slice

    def counted(fixed: Any, moved: Any) -> Any:
        state, *saved = run_slice(fixed, moved)
        assert state.progress is not None
        taken.append((fixed[0].first_step, np.array(state.progress.steps)))
        return state, *saved

    monkeypatch.setattr(slices, "_run_slice", counted)
    together = gf.simulate(problem, starts, dynamics, **options)
    assert not together.incomplete.any()
    assert {first for first, _ in taken} == {0, 200}
    steps = np.stack([np.zeros_like(taken[0][1]), *(after for _, after in taken)])
    for (first, _), before, after in zip(taken, steps, steps[1:], strict=False):
        assert np.all((before >= 200) == (first == 200), where=after > before)
    assert steps[-1, 2] > 200
    for name in WATCH:
        expected = np.stack([run[name] for run in alone])
        np.testing.assert_allclose(together[name], expected, rtol=1e-6, atol=1e-9)


def test_another_solver_than_the_default_stays():
    """Nothing goes on for it, nor for the implicit default."""
    for flow in (
        gf.GradientFlow(stiff=True),
        gf.GradientFlow(solver=diffrax.Tsit5()),
        gf.PrincipalFlow(0.1),
        gf.GradientDescent(0.1),
    ):
        assert flow.successor is None
    successor = gf.GradientFlow().successor
    assert successor is not None
    assert isinstance(successor.solver, gf.GaussLegendre)


# Short calls


@pytest.mark.slow
def test_the_host_is_asked_often():
    """A flow that takes 10^6 steps between two saved times can be stopped, and keeps its start."""
    problem = gf.Problem(SCALAR.data, [gf.WeightDecay(1e-7)])
    told: list[str] = []

    def report(done: float, total: float, message: str) -> None:
        told.append(message)
        if len(told) > 5:
            raise KeyboardInterrupt

    with pytest.warns(gf.InterruptedWarning):
        run = gf.simulate(
            problem, scalars(300.0, 0.01), gf.GradientFlow(), t1=1e6, save=3, progress=report
        )
    assert run.time.size == 1
    times = [float(message.removeprefix("t = ")) for message in told]
    assert times == sorted(times)
    assert times[-1] > 0.0


@pytest.mark.slow
def test_a_large_start_of_the_principal_flow_ends():
    """From (0, 1e8) gradient descent multiplies its error by 1 - h lam = -1e15: it diverges."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = gf.simulate(SCALAR, scalars(0.0, 1e8), gf.PrincipalFlow(0.1), t1=1.0, save=3)
    assert run.diverged
    assert not run.incomplete


def test_how_long_a_call_is_changes_no_bit(monkeypatch: pytest.MonkeyPatch):
    """Of two paths with their own steps, on two devices where there are two."""
    starts = [scalars(2.0, 0.1), scalars(30.0, 0.01)]
    problem = gf.Problem(SCALAR.data, [gf.WeightDecay(1e-2)])

    def run() -> gf.Trajectory:
        return gf.simulate(problem, starts, gf.GradientFlow(), t1=100.0, save=5)

    quick = run()
    monkeypatch.setattr("gradflow.simulation.slices.SLICE_SECONDS", 0.0)  # few steps a call
    slow = run()
    for name in ("loss", "imbalance"):
        np.testing.assert_array_equal(quick[name], slow[name])
