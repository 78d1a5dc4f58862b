"""Predictions on the scalar network of depth 2, where every one of them is a short formula.

With noise of variance v on the gradient with respect to p = w1 w2 the imbalance u obeys
u+ = u (1 - h^2 E[m^2]), and the residual m is an autoregression with the variance of its steps.
"""

import numpy as np
import pytest

import gradflow as gf

H, STD, DECAY = 0.05, 0.4, 0.01
V = STD**2
NET = gf.DeepLinear([[[2.0]], [[0.1]]])
DATA = gf.Regression.whitened([[1.0]])
NOISY = gf.Problem(DATA, [gf.LabelNoise(STD)])


def minimum(h):
    """Imbalance and sharpness where descent without noise ends; h = 0 is the flow."""
    w1, w2 = 2.0, 0.1
    if h > 0:
        for _ in range(5000):
            r = w1 * w2 - 1.0
            w1, w2 = w1 - h * r * w2, w2 - h * r * w1
    u = w1**2 - w2**2
    return u, np.sqrt(u**2 + 4.0)


def test_sgd_under_label_noise():
    u, sharpness = minimum(H)
    found = gf.predict(NOISY, NET, gf.GradientDescent(H))
    second = 2.0 * V / (2.0 - H * sharpness)
    assert found.imbalance_drift == pytest.approx(-H * second * u, rel=1e-8)
    assert found.imbalance_rate == pytest.approx(-np.log(1.0 - H**2 * second) / H, rel=1e-8)
    assert found.optimization_rate == pytest.approx(-np.log(1.0 - H * sharpness) / H, rel=1e-6)
    floor = 0.5 * H * V * sharpness / (2.0 - H * sharpness)
    assert found.loss_floor == pytest.approx(floor, rel=1e-6)


@pytest.mark.parametrize("amplification", [1, 4])
def test_svag_under_label_noise(amplification):
    eta = H / amplification
    u, sharpness = minimum(eta)
    found = gf.predict(NOISY, NET, gf.SVAG(H, amplification))
    second = 2.0 * amplification * V / (2.0 - eta * sharpness)
    assert found.imbalance_drift == pytest.approx(-eta * second * u, rel=1e-8)
    assert found.imbalance_rate == pytest.approx(-np.log(1.0 - eta**2 * second) / eta, rel=1e-8)


@pytest.mark.parametrize("order", [1, 2])
def test_stochastic_flows_under_label_noise(order):
    u, sharpness = minimum(0.0)
    found = gf.predict(NOISY, NET, gf.StochasticFlow(H, order=order))
    residual = 0.0 if order == 1 else H * sharpness * V / (2.0 + H * sharpness)
    assert found.imbalance_rate == pytest.approx(H * (V + residual), rel=1e-6)
    assert found.imbalance_drift == pytest.approx(-H * (V + residual) * u, rel=1e-6)
    assert found.optimization_rate == pytest.approx(sharpness, rel=1e-6)


@pytest.mark.parametrize("flow", [gf.GradientFlow(), gf.ExactFlow()])
def test_flows_under_weight_decay(flow):
    found = gf.predict(gf.Problem(DATA, [gf.WeightDecay(DECAY)]), NET, flow)
    assert found.imbalance_rate == pytest.approx(2.0 * DECAY, rel=1e-10)


def test_descent_under_weight_decay():
    problem = gf.Problem(DATA, [gf.WeightDecay(DECAY)])
    found = gf.predict(problem, NET, gf.GradientDescent(H))
    assert found.imbalance_rate == pytest.approx(-2.0 * np.log(1.0 - H * DECAY) / H, rel=1e-8)


@pytest.mark.parametrize(
    ("dynamics", "message"),
    [
        (gf.ModifiedFlow(H), "predictions cover .*; got ModifiedFlow"),
        (gf.HeavyBallFlow(H, 0.5), "predictions cover .*; got HeavyBallFlow"),
        (gf.GradientDescent(H, 0.5, nesterov=True), "does not hold with Nesterov momentum"),
        (gf.GradientDescent(H, optimizer=gf.FromOptax("adam")), "with an optimizer"),
    ],
)
def test_what_is_not_covered_is_refused(dynamics, message):
    with pytest.raises(ValueError, match=message):
        gf.predict(NOISY, NET, dynamics)


def test_noise_inside_the_network_is_refused():
    with pytest.raises(ValueError, match="not Dropout"):
        gf.predict(gf.Problem(DATA, [gf.Dropout(0.2)]), NET, gf.GradientDescent(H))
