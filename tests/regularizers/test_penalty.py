"""A penalty of the user's own: its gradient, its company, and what is said about it."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.theory import expected_balancedness_drift, imbalance_drift, slaved_residual

DATA = gf.Regression.whitened([[1.0]])
NET = gf.DeepLinear([[[1.2], [0.3]], [[0.8, -0.4]]])
RATE = 0.1


def squares(weights):
    return 0.5 * RATE * sum(jnp.sum(w * w) for w in weights)


def absolute(weights):
    return RATE * sum(jnp.sum(jnp.abs(w)) for w in weights)


OWN, DECAY = gf.Penalty(squares, name="squares"), gf.WeightDecay(RATE)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_function():
    def uneven(weights):
        first, second = weights
        return jnp.log1p(jnp.sum(first**2)) * jnp.sum(second**4) + jnp.sum((second @ first) ** 3)

    penalty = gf.Penalty(uneven, name="uneven")
    problem = gf.Problem(DATA, [penalty])
    plain = gf.Problem(DATA)
    found = penalty.penalty_gradient(NET.weights)
    total, alone = problem.averaged_gradient(NET.weights), plain.averaged_gradient(NET.weights)
    loss = problem.averaged_loss(NET.weights) - plain.averaged_loss(NET.weights)
    assert float(loss) == pytest.approx(float(uneven(NET.weights)), rel=1e-14)
    eps = 1e-6
    for i, layer in enumerate(NET.weights):
        for entry in np.ndindex(layer.shape):

            def at(shift, i=i, entry=entry):
                return uneven(
                    [w.at[entry].add(shift) if j == i else w for j, w in enumerate(NET.weights)]
                )

            slope = float(at(eps) - at(-eps)) / (2 * eps)
            assert float(found[i][entry]) == pytest.approx(slope, rel=1e-8)
            assert float(total[i][entry] - alone[i][entry]) == pytest.approx(slope, rel=1e-8)


NOISE = gf.LabelNoise(0.05)
DYNAMICS = {
    "GradientFlow": (gf.GradientFlow(), {"t1": 2.0}),
    "stiff": (gf.GradientFlow(stiff=True), {"t1": 2.0}),
    "ModifiedFlow": (gf.ModifiedFlow(0.1), {"t1": 2.0}),
    "HeavyBallFlow": (gf.HeavyBallFlow(0.1, 0.5), {"t1": 2.0}),
    "descent": (gf.GradientDescent(0.1, 0.5, decay="decoupled"), {"steps": 9}),
    "SVAG": (gf.SVAG(0.1, amplification=2), {"steps": 9}),
    "StochasticFlow": (gf.StochasticFlow(0.1, order=2), {"steps": 9}),
    "SlowFlow": (gf.SlowFlow(0.1), {"t1": 2.0}),
}


QUICK = ("descent", "HeavyBallFlow")


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    "kind",
    [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in DYNAMICS],
)
def test_every_dynamics_takes_it_as_it_takes_weight_decay(kind: str):
    """Half the squares times a rate are weight decay, whose gradient is written out."""
    dynamics, length = DYNAMICS[kind]
    watch = ["averaged_loss", "imbalance", "squared_norms"]
    if dynamics.is_random(gf.Problem(DATA, [NOISE])):
        length = {**length, "replicas": 2, "key": jax.random.key(1)}
    runs = [
        gf.simulate(
            gf.Problem(DATA, [NOISE, r]), NET, dynamics, save=3, observables=watch, **length
        )
        for r in (OWN, DECAY)
    ]
    for name in watch:
        np.testing.assert_allclose(runs[0][name], runs[1][name], rtol=1e-9, atol=1e-12)


def test_gradient_flow_of_a_quartic_penalty_against_scipy():
    def quartic(weights):
        return 0.25 * RATE * sum(jnp.sum(w**4) for w in weights)

    def field(t, w):
        residual = w[0] * w[1] - 1.0
        return -residual * w[::-1] - RATE * w**3

    run = gf.simulate(
        gf.Problem(DATA, [gf.Penalty(quartic)]),
        gf.DeepLinear([[[2.0]], [[0.1]]]),
        gf.GradientFlow(rtol=1e-10, atol=1e-12),
        t1=5.0,
        save=6,
    )
    exact = solve_ivp(field, (0.0, 5.0), [2.0, 0.1], "DOP853", run.time, rtol=1e-12, atol=1e-14)
    for layer, values in zip(run.weights, exact.y, strict=True):
        np.testing.assert_allclose(layer[:, 0, 0], values, rtol=1e-8)


def test_descent_steps_over_the_kinks_of_l1():
    problem = gf.Problem(DATA, [gf.Penalty(absolute, name="l1")])
    net = gf.DeepLinear([[[0.02]], [[0.9]]])
    run = gf.simulate(problem, net, gf.GradientDescent(0.5), steps=40, save=41)
    w = np.array([0.02, 0.9])
    for k in range(41):
        np.testing.assert_allclose([v[k, 0, 0] for v in run.weights], w, rtol=1e-12)
        w = w - 0.5 * ((w[0] * w[1] - 1.0) * w[::-1] + RATE * np.sign(w))
    assert np.isfinite(run["loss"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("discrete", [False, True])
def test_theory_takes_it_as_it_takes_weight_decay(discrete: bool):
    own, decay = gf.Problem(DATA, [NOISE, OWN]), gf.Problem(DATA, [NOISE, DECAY])
    both = gf.Problem(DATA, [NOISE, gf.WeightDecay(RATE / 2), gf.Penalty(lambda w: squares(w) / 2)])
    for problem in (own, both):
        for ask in (
            lambda p: slaved_residual(p, NET.weights),
            lambda p: expected_balancedness_drift(p, NET.weights, 0.1, discrete)[0],
            lambda p: imbalance_drift(p, NET.weights, 0.1, discrete),
            lambda p: gf.hessian_block_traces(NET, p),
        ):
            np.testing.assert_allclose(ask(problem), ask(decay), rtol=1e-12, atol=1e-14)


def test_an_order_that_is_not_known_is_refused():
    problem = gf.Problem(DATA, [NOISE, OWN])
    with pytest.raises(ValueError, match="SDE of order 2 is known for WeightDecay alone"):
        expected_balancedness_drift(problem, NET.weights, 0.1, False, order=2)
    with pytest.raises(ValueError, match="SDE of order 2 is known for WeightDecay alone"):
        imbalance_drift(problem, NET.weights, 0.1, False, order=2)
    with pytest.raises(ValueError, match="predictions cover WeightDecay alone, not Penalty"):
        gf.predict(problem, NET, 0.1)
    for dynamics, why in (
        (gf.ExactFlow(), "Penalty adds a penalty other than weight decay"),
        (gf.PrincipalFlow(0.1), "as a polynomial, which Penalty need not be"),
    ):
        with pytest.raises(ValueError, match=why):
            gf.simulate(gf.Problem(DATA, [OWN]), NET, dynamics, t1=1.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda w: w[0] * 1.0, r"'mine' must give one real number, .* it gave float64 of shape"),
        (lambda w: 1, "it gave int"),
        (lambda w: jnp.sum(w[0]) * 1j, "it gave complex128"),
        (lambda w: None, "'mine' failed on layers of shapes"),
        (lambda w: float(w[0][0, 0]), r"failed .*\(ConcretizationTypeError: .* jax.numpy"),
        (lambda w: np.linalg.norm(np.asarray(w[0])), r"failed .*\(TracerArrayConversionError"),
        (lambda w: jnp.sum(w[2]), r"shapes \[\(2, 1\), \(1, 2\)\] \(IndexError: tuple index"),
    ],
)
@pytest.mark.parametrize("dynamics", [gf.GradientDescent(0.1), gf.GradientFlow()])
def test_a_function_that_gives_no_number_is_refused(function: Any, message: str, dynamics: Any):
    problem = gf.Problem(DATA, [gf.Penalty(function, name="mine")])
    with pytest.raises(TypeError, match=f"^Penalty.function: .*{message}"):
        gf.simulate(problem, NET, dynamics, t1=0.2, save=2)


@pytest.mark.parametrize(
    ("function", "start", "message"),
    [
        (lambda w: jnp.sqrt(w[0][0, 0] ** 2), 0.0, "gradient of the penalty 'own' .* at the start"),
        (lambda w: jnp.sqrt(w[0][0, 0]), -1.0, "value of the penalty 'own' is not finite"),
    ],
)
def test_a_start_without_a_value_is_refused(function: Any, start: float, message: str):
    net = gf.DeepLinear([[[start], [0.3]], [[0.8, -0.4]]])
    problem = gf.Problem(DATA, [gf.Penalty(function, name="own")])
    with pytest.raises(ValueError, match=message):
        gf.simulate(problem, net, gf.GradientDescent(0.1), steps=1)
    with pytest.raises(ValueError, match="at start 1"):
        gf.simulate(problem, [NET, net], gf.GradientDescent(0.1), steps=1)


def test_a_penalty_has_a_name():
    with pytest.raises(TypeError, match=r"Penalty\.name must be a text such as 'l1'; got ''"):
        gf.Penalty(squares, name="")


def test_a_file_cannot_hold_it_and_says_so(tmp_path):
    run = gf.simulate(gf.Problem(DATA, [OWN]), NET, gf.GradientDescent(0.1), steps=3, save=2)
    with pytest.raises(ValueError) as caught:
        run.save(tmp_path / "run.nc")
    text = str(caught.value)
    assert text.startswith("Penalty.function of 'squares' is a function of your own, which no file")
    assert "to_netcdf" in text and not list(tmp_path.iterdir())
    assert np.array_equal(gf.repeat(run)["loss"], run["loss"])


class Scaled(eqx.Module):
    """A penalty whose rate is an array."""

    rate: jax.Array

    def __call__(self, weights):
        return self.rate * sum(jnp.sum(w * w) for w in weights)


def test_rates_that_are_arrays_compile_once():
    traces = []

    def counting(weights, rate):
        traces.append(rate)
        return rate * sum(jnp.sum(w * w) for w in weights)

    losses = []
    for rate in (0.05, 0.2):
        for function in (
            functools.partial(counting, rate=jnp.asarray(rate)),
            Scaled(jnp.asarray(rate)),
        ):
            problem = gf.Problem(DATA, [gf.Penalty(function)])
            run = gf.simulate(problem, NET, gf.GradientDescent(0.1), steps=3, save=2)
            losses.append(run["loss"][-1])
        count = len(traces) if rate == 0.05 else count
    assert losses[0] == losses[1] != losses[2] == losses[3]
    assert len(traces) == count
