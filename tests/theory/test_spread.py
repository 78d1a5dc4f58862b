"""Size of the fluctuation and scatter between runs, against SGD written in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled

import gradflow as gf
from gradflow.theory.spread import fluctuation_share, imbalance_variance_rate

share = compiled(fluctuation_share)
variance_rate = compiled(imbalance_variance_rate)

TARGET = np.array([[1.2, 0.3], [-0.2, 0.8]])
FIRST = np.array([[1.1, -0.3], [0.4, 0.7], [-0.5, 0.2]])
MATRIX = (FIRST, np.linalg.lstsq(FIRST.T, TARGET.T, rcond=None)[0].T)  # W_2 W_1 = T
SCALAR = (np.array([[1.8]]), np.array([[1.0 / 1.8]]))

STD = 0.01  # so little noise that SGD stays where it started
REPLICAS, SETTLING, STEPS = 10_000, 60, 200


def sgd(layers, h, momentum=0.0):
    """The replicas of SGD with label noise on whitened data after every step, from a minimum."""
    rng = np.random.default_rng(0)
    target = layers[1] @ layers[0]
    first, second = (np.repeat(w[None], REPLICAS, axis=0) for w in layers)
    speeds = [np.zeros_like(first), np.zeros_like(second)]
    while True:
        m = second @ first - target + STD * rng.normal(size=(REPLICAS, *target.shape))
        gradients = second.transpose(0, 2, 1) @ m, m @ first.transpose(0, 2, 1)
        speeds = [momentum * v - h * g for v, g in zip(speeds, gradients, strict=True)]
        first, second = first + speeds[0], second + speeds[1]
        yield first, second


def after(path, steps):
    """The weights that many steps further on."""
    for _ in range(steps - 1):
        next(path)
    return next(path)


def imbalances(first, second):
    return np.sum(first**2, axis=(1, 2)) - np.sum(second**2, axis=(1, 2))


def prepared(layers):
    data = gf.Regression.whitened(layers[1] @ layers[0])
    return gf.Problem(data, [gf.LabelNoise(STD)]), tuple(map(jnp.asarray, layers))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_fluctuation_has_the_predicted_size(momentum):
    h = 0.3
    first, second = after(sgd(MATRIX, h, momentum), SETTLING)
    x = (second @ first - TARGET).reshape(REPLICAS, -1)
    w1, w2 = MATRIX
    kernel = np.kron(w2 @ w2.T, np.eye(2)) + np.kron(np.eye(2), w1.T @ w1)
    squares = np.einsum("ri,ri->r", x, np.linalg.solve(kernel, x.T).T)
    size = np.sum(w1**2) + np.sum(w2**2)
    found = float(share(*prepared(MATRIX), h, momentum or None))
    error = squares.std() / np.sqrt(REPLICAS)
    assert error < 0.01 * squares.mean()
    assert abs(found * size - squares.mean()) < 4.0 * error


def test_small_steps_have_the_classical_fluctuation():
    h, (w1, w2) = 0.3, MATRIX
    # K X + X K = h v K^2 has the solution X = h v K / 2, so tr(K^{-1} X) = h v d_2 d_0 / 2
    expected = 0.5 * h * STD**2 * 4 / (np.sum(w1**2) + np.sum(w2**2))
    assert float(share(*prepared(MATRIX), h, finite_step=False)) == pytest.approx(expected)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("layers", [SCALAR, MATRIX], ids=["scalar", "matrix"])
@pytest.mark.parametrize("h", [0.1, 0.35])
def test_the_variance_between_runs_grows_at_the_predicted_rate(layers, h):
    path = sgd(layers, h)
    before = imbalances(*after(path, SETTLING))
    moved = imbalances(*after(path, STEPS)) - before
    found = float(variance_rate(*prepared(layers), h))
    measured = moved.var() / (h * STEPS)
    error = np.sqrt(2.0 / REPLICAS) * measured  # of the variance of a normal
    boundary = 0.02 * measured  # correlation time over STEPS, in either direction
    assert abs(found - measured) < 4.0 * error + boundary


def test_noise_that_is_not_isotropic_is_summed_over_its_lags():
    h, std, (w1, w2) = 0.3, 1e-4, MATRIX
    # Input noise at leading order: the gradient M has the covariance s^2 (T T^T (x) I)
    fresh = std**2 * np.kron(TARGET @ TARGET.T, np.eye(2))
    below, above = np.kron(w2 @ w2.T, np.eye(2)), np.kron(np.eye(2), w1.T @ w1)
    kernel, identity = below + above, np.eye(4)
    damped = identity - h * kernel
    kicks = h**2 * kernel @ fresh @ kernel
    x = np.linalg.solve(np.eye(16) - np.kron(damped, damped), kicks.ravel()).reshape(4, 4)
    q = above - below if np.sum(w2**2) > np.sum(w1**2) else below - above
    lagged = damped @ x - h * kernel @ fresh
    total = np.trace(q @ (x + fresh) @ q @ (x + fresh))
    for _ in range(1000):
        total += 2.0 * np.trace(q @ lagged @ q @ lagged.T)
        lagged = damped @ lagged
    problem = gf.Problem(gf.Regression.whitened(TARGET), [gf.InputNoise(std)])
    found = float(variance_rate(problem, tuple(map(jnp.asarray, MATRIX)), h))
    assert found / (2.0 * h**3 * total) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    "noise", [gf.Dropout(0.1), gf.GradientNoise(0.1)], ids=lambda noise: type(noise).__name__
)
def test_noise_elsewhere_is_refused(noise):
    problem = gf.Problem(gf.Regression.whitened(TARGET), [noise])
    with pytest.raises(ValueError, match="take their spread"):
        imbalance_variance_rate(problem, tuple(map(jnp.asarray, MATRIX)), 0.1)
