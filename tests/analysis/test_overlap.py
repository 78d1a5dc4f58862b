"""What noise does to the imbalance while the residual decays."""

import jax
import numpy as np
import pytest

import gradflow as gf

H, STD = 0.002, 0.05
TARGET = np.array([[1.2, 0.0]])
W1, W2 = np.array([[0.3, 0.4]]), np.array([[0.9]])


def label_noise_sum(momentum: float) -> float:
    """The sum over descent, in NumPy: labels give E|g_1|^2 = 2 s^2 W_2^2, E g_2^2 = s^2 |W_1|^2."""
    w1, w2 = W1.copy(), W2.copy()
    v1, v2 = 0.0 * w1, 0.0 * w2
    rates = []
    for _ in range(20_000):
        rates.append(STD**2 * (np.sum(w1 * w1) - 2.0 * np.sum(w2 * w2)))
        m = w2 @ w1 - TARGET
        v1, v2 = momentum * v1 - H * w2.T @ m, momentum * v2 - H * m @ w1.T
        w1, w2 = w1 + v1, w2 + v2
    gained = H * np.sum(np.array(rates) - rates[-1]) * H / (1.0 - momentum) ** 2
    return gained if w2.item() ** 2 > np.sum(w1 * w1) else -gained


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_label_noise_on_two_inputs(momentum: float):
    """The integral over 801 points of the path is the sum over all steps to within a percent."""
    problem = gf.Problem(gf.Regression.whitened(TARGET), [gf.LabelNoise(STD)])
    found = gf.predict(problem, gf.DeepLinear([W1, W2]), H, momentum=momentum).overlap
    assert found == pytest.approx(label_noise_sum(momentum), rel=0.01)


def test_a_scalar_network_keeps_what_label_noise_sees():
    """With one input and output the noise moves D at a rate of D, which descent hardly changes."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(STD)])
    prediction = gf.predict(problem, gf.DeepLinear([[[2.0]], [[0.1]]]), 1e-3)
    assert abs(prediction.overlap) < 1e-8
    assert "overlap" not in str(prediction)


@pytest.mark.slow
def test_batches_of_large_residuals_are_noted():
    """SGD itself: the prediction is off by many standard errors, and by the overlap."""
    rng = np.random.default_rng(0)
    x, rest = rng.normal(size=(4, 1)), np.array([[2.0], [-1.0], [0.5], [1.5]])
    data = gf.Regression.from_samples(x, 3.0 * x + 0.01 * rest)
    problem, net = gf.Problem(data, [gf.Minibatch(1)]), gf.DeepLinear([[[0.3]], [[0.6]]])
    prediction = gf.predict(problem, net, 0.03)
    assert "the phases overlap" in str(prediction)
    run = gf.simulate(
        problem,
        net,
        gf.GradientDescent(0.03),
        steps=1000,
        replicas=3000,
        key=jax.random.key(0),
        save=2,
        observables=["imbalance"],
    )
    seen = run["imbalance"][:, -1]
    mean, error = seen.mean(), seen.std() / np.sqrt(seen.size)
    missed = mean - prediction.at(steps=1000).imbalance
    assert abs(missed) > 5.0 * error
    assert missed == pytest.approx(prediction.overlap, abs=0.3 * abs(missed))
