"""Loss floors against stationary points, discrete and continuous Lyapunov equations, and chains."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.linalg
import scipy.optimize
from compiled import compiled, faces
from reference import as_numpy, assert_close, scale

import gradflow as gf
from gradflow.regularizers import Dropout, GradientNoise
from gradflow.regularizers.diffusion import end_to_end_covariance
from gradflow.theory import (
    noise_floor,
    slaved_residual,
    stationary_covariance,
    weight_decay_plateau,
)


@compiled
def floor_and_covariance(problem, weights, h, discrete, momentum=None):
    """Loss floor and stationary covariance in one program."""
    return (
        noise_floor(problem, weights, h, discrete, momentum),
        stationary_covariance(problem, weights, h, discrete, momentum),
    )


SXX = np.array([[1.3, 0.4], [0.4, 0.8]])
TARGET = np.array([[0.7, -1.1], [0.9, 0.6]])
H = 0.1


def network(widths, seed=0):
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(widths)
    return gf.DeepLinear([rng.normal(size=shape[::-1]) for shape in shapes])


def population(residual=0.0, n=1):
    syy = TARGET @ SXX @ TARGET.T + residual * np.eye(2)
    return gf.Regression.from_moments(SXX, TARGET @ SXX, syy, n=n)


# Weight decay


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    ("widths", "sigma"), [((2, 3, 2), 0.0), ((2, 2, 2), 0.5), ((2, 2, 3, 2), 0.0)]
)
def test_slaved_residual_and_plateau_at_a_stationary_point(widths, sigma):
    """There the formulas are exact for every rate: g_i = -rate W_i in all layers."""
    rate = 0.05
    sxx, syx = SXX + sigma**2 * np.eye(2), TARGET @ SXX
    shapes = [pair[::-1] for pair in itertools.pairwise(widths)]
    cuts = np.cumsum([a * b for a, b in shapes])[:-1]

    def layers_of(flat):
        return [p.reshape(s) for p, s in zip(np.split(flat, cuts), shapes, strict=True)]

    def slope(flat):
        return reference.flatten(reference.gradient(layers_of(flat), sxx, syx)) + rate * flat

    def value(flat):
        p = reference.end_to_end(layers_of(flat))
        return 0.5 * np.trace(p @ sxx @ p.T) - np.sum(p * syx) + rate / 2 * flat @ flat

    start = reference.flatten(as_numpy(network(widths).weights))
    near = scipy.optimize.minimize(value, start, jac=slope, method="BFGS", tol=1e-9).x
    for _ in range(3):  # Newton steps; the pseudo-inverse leaves the rotations of layers alone
        hessian = reference.hessian(layers_of(near), sxx, syx) + rate * np.eye(near.size)
        near = near - np.linalg.pinv(hessian, rcond=1e-8, hermitian=True) @ slope(near)
    assert np.abs(slope(near)).max() < 1e-13
    layers = layers_of(near)
    p = reference.end_to_end(layers)
    assert np.linalg.matrix_rank(p, tol=1e-3) == 2
    residual = p @ sxx - syx
    excess = 0.5 * np.trace(residual @ np.linalg.inv(sxx) @ residual.T)

    regularizers = [gf.WeightDecay(0.02), gf.InputNoise(sigma), gf.WeightDecay(rate - 0.02)]
    problem = gf.Problem(population(), regularizers)
    weights = tuple(jnp.asarray(w) for w in layers)
    np.testing.assert_allclose(problem.weight_decay, rate)
    assert_close([slaved_residual(problem, weights)], [residual], 1.0, 1e-11)
    assert_close([weight_decay_plateau(problem, weights)], [excess], 1.0, 1e-11)


def test_weight_decay_on_two_scalar_layers():
    """r = -2 rate p / (w1^2 + w2^2); plateau r^2 / (2 sxx)."""
    w1, w2, sxx, rate = 1.5, -0.4, 1.7, 0.01
    problem = gf.Problem(gf.Regression.from_moments([[sxx]], [[0.6]]), [gf.WeightDecay(rate)])
    weights = (jnp.array([[w1]]), jnp.array([[w2]]))
    r = -2 * rate * w1 * w2 / (w1**2 + w2**2)
    np.testing.assert_allclose(slaved_residual(problem, weights), [[r]], rtol=1e-13)
    np.testing.assert_allclose(weight_decay_plateau(problem, weights), r**2 / (2 * sxx), rtol=1e-13)


def test_no_weight_decay_holds_up_nothing():
    problem = gf.Problem(population(), [gf.LabelNoise(0.3)])
    weights = network((2, 3, 2)).weights
    assert float(problem.weight_decay) == 0.0
    assert not np.any(slaved_residual(problem, weights))
    assert float(weight_decay_plateau(problem, weights)) == 0.0


# Noise


PROBLEMS = {
    "labels": gf.Problem(population(n=3), [gf.LabelNoise(0.5)]),
    "inputs": gf.Problem(population(), [gf.InputNoise(0.4)]),
    "online": gf.Problem(population(residual=0.3), [gf.Minibatch(4), gf.LabelNoise(0.2)]),
    "gradient": gf.Problem(population(), [GradientNoise(0.2)]),
    "gradient, labels": gf.Problem(population(), [GradientNoise(0.2), gf.LabelNoise(0.5)]),
}


def chain(problem, net):
    """Kernel and noise covariance of x -> x - h (K x + z) for x = vec((P - T) S^{1/2}).

    z is the noise on M, pushed to x, K the sum of A_i A_i^T (x) S^{1/2} B_i^T B_i S^{1/2}; the
    covariance of the noise on M comes from gradflow and is checked elsewhere. Noise on the gradient
    moves P weight by weight.
    """
    layers = as_numpy(net.weights)
    root = scipy.linalg.sqrtm(np.asarray(problem.input_moment)).real
    kernel, push = np.zeros((4, 4)), np.zeros((4, 4))
    for i in range(1, len(layers) + 1):
        a, b = reference.above(layers, i), reference.below(layers, i)
        kernel += np.kron(a @ a.T, root @ b.T @ b @ root)
        push += np.kron(a @ a.T, root @ b.T @ b)
    noise = push @ np.asarray(faces(problem, net.weights).covariance) @ push.T
    widen = np.kron(np.eye(2), root)
    level = sum(float(r.std) ** 2 for r in problem.regularizers if isinstance(r, GradientNoise))
    jacobian = widen @ reference.jacobian(layers).T
    return kernel, noise + level * jacobian @ jacobian.T


def noise_feeder(problem, net):
    """A function: what fluctuations of vec((P - T) S^{1/2}) of a covariance add to the noise.

    The covariance of the noise on M is quadratic in P, so shifts of P along unit vectors and sums
    of two of them give its mean exactly.
    """
    layers = as_numpy(net.weights)
    root = scipy.linalg.sqrtm(np.asarray(problem.input_moment)).real
    push = np.zeros((4, 4))
    for i in range(1, len(layers) + 1):
        a, b = reference.above(layers, i), reference.below(layers, i)
        push += np.kron(a @ a.T, root @ b.T @ b)
    moments = problem.noise_moments(net.weights)

    @jax.jit
    def at(p):
        m = p @ problem.data.sxx - problem.data.syx
        there = eqx.tree_at(lambda n: (n.p, n.m), moments, (p, m))
        return end_to_end_covariance(problem.regularizers, there)

    def added(shift):
        p = np.asarray(moments.p)
        rho = shift.reshape(2, 2) @ np.linalg.inv(root)
        return np.asarray(0.5 * (at(p + rho) + at(p - rho)) - at(p))

    one = np.eye(4)
    diagonal = [added(e) for e in one]
    slopes = np.zeros((4, 4, 4, 4))
    for i, j in itertools.product(range(4), repeat=2):
        both = diagonal[i] if i == j else 0.5 * (added(one[i] + one[j]) - diagonal[i] - diagonal[j])
        slopes[i, j] = push @ both @ push.T
    return lambda x: np.einsum("ij,ijkl->kl", x, slopes)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("widths", [(2, 3, 2), (2, 1, 2)], ids=["full rank", "bottleneck"])
def test_stationary_covariance_solves_lyapunov_equations(name, widths):
    """A bottleneck leaves directions that P cannot take: they do not move."""
    problem, net = PROBLEMS[name], network(widths, seed=1)
    kernel, noise = chain(problem, net)
    values, vectors = np.linalg.eigh(kernel)
    moving = vectors[:, values > 1e-10 * values[-1]]
    inner = moving.T @ kernel @ moving
    step = np.eye(moving.shape[1]) - H * inner
    fed_noise = noise_feeder(problem, net)
    size = None
    for is_discrete in (True, False):
        expected = np.zeros((4, 4))
        for _ in range(60 if name in ("inputs", "online") else 1):
            inside = moving.T @ (noise + fed_noise(expected)) @ moving
            if is_discrete:
                x = scipy.linalg.solve_discrete_lyapunov(step, H**2 * inside)
            else:
                x = scipy.linalg.solve_continuous_lyapunov(inner, H * inside)
            before, expected = expected, moving @ x @ moving.T
        if name in ("inputs", "online"):
            assert np.abs(expected - before).max() < 1e-14 * np.abs(expected).max()
        size = size or scale([expected]) * 10
        floor, x = floor_and_covariance(problem, net.weights, H, is_discrete)
        assert_close([x], [expected], size)
        assert_close([floor], [np.trace(expected) / 2], size)


@pytest.mark.parametrize("name", ["labels", "gradient, labels"])
def test_floor_with_momentum_solves_the_lyapunov_equation_of_position_and_velocity(name):
    beta = 0.7
    problem, net = PROBLEMS[name], network((2, 3, 2), seed=1)
    kernel, noise = chain(problem, net)
    one = np.eye(4)
    step = np.block([[one - H * kernel, beta * one], [-H * kernel, beta * one]])
    kick = np.block([[noise, noise], [noise, noise]])
    both = scipy.linalg.solve_discrete_lyapunov(step, H**2 * kick)
    assert np.abs(step @ both @ step.T + H**2 * kick - both).max() < 1e-13 * np.abs(both).max()
    floor = floor_and_covariance(problem, net.weights, H, True, momentum=beta)[0]
    np.testing.assert_allclose(floor, np.trace(both[:4, :4]) / 2, rtol=1e-10)


@pytest.mark.slow
def test_floors_of_svag_and_of_the_order_two_flow_solve_lyapunov_equations():
    """Steps h / l with l times the noise; a flow with the drift -(K + (h/2) K^2) x."""
    problem, net = PROBLEMS["gradient, labels"], network((2, 3, 2), seed=1)
    kernel, noise = chain(problem, net)
    h = H / 4
    svag = scipy.linalg.solve_discrete_lyapunov(np.eye(4) - h * kernel, h**2 * 4 * noise)
    second = scipy.linalg.solve_continuous_lyapunov(kernel + H / 2 * kernel @ kernel, H * noise)
    for options, expected in (
        ({"discrete": True, "amplification": 4}, svag),
        ({"discrete": False, "order": 2}, second),
    ):
        x = stationary_covariance(problem, net.weights, H, **options)
        assert_close([x], [expected], scale([expected]) * 10)
        floor = noise_floor(problem, net.weights, H, **options)
        assert_close([floor], [np.trace(expected) / 2], scale([expected]) * 10)


def test_floor_of_gradient_noise_in_closed_form():
    """(h v / 2) sum_a 1 / (2 - h mu_a) over the directions in which P can move."""
    problem, v = PROBLEMS["gradient"], 0.04
    for widths, rank in (((2, 3, 2), 4), ((2, 1, 2), 3)):
        net = network(widths, seed=1)
        mu = np.linalg.eigvalsh(chain(problem, net)[0])[-rank:]
        floor = floor_and_covariance(problem, net.weights, H, True)[0]
        np.testing.assert_allclose(floor, H * v / 2 * np.sum(1 / (2 - H * mu)), rtol=1e-11)


@pytest.mark.parametrize("quantity", [noise_floor, slaved_residual, weight_decay_plateau])
def test_noise_inside_the_network_moves_the_minima(quantity):
    problem = gf.Problem(population(), [Dropout(0.1), gf.WeightDecay(0.1)])
    steps = () if quantity in (slaved_residual, weight_decay_plateau) else (H, True)
    with pytest.raises(ValueError, match=rf"{quantity.__name__} covers .* not Dropout, .* watch"):
        quantity(problem, network((2, 3, 2)).weights, *steps)


def test_floor_of_label_noise_in_closed_form():
    """(h s^2 / 2n) sum_a mu_a / (2 - h mu_a), and half of tr H in a flow."""
    s, n = 0.5, 3
    problem, net = PROBLEMS["labels"], network((2, 3, 2), seed=1)
    layers = as_numpy(net.weights)
    p = reference.end_to_end(layers)
    mu = np.linalg.eigvalsh(reference.hessian(layers, SXX, p @ SXX))[-4:]
    expected = H * s**2 / (2 * n) * np.sum(mu / (2 - H * mu))
    np.testing.assert_allclose(
        floor_and_covariance(problem, net.weights, H, True)[0], expected, rtol=1e-11
    )
    flow = H * s**2 / (4 * n) * np.sum(mu)
    np.testing.assert_allclose(
        floor_and_covariance(problem, net.weights, H, False)[0], flow, rtol=1e-11
    )


def test_floor_of_two_scalar_layers():
    w1, w2, sxx, s, n, h = 1.5, 0.4, 1.2, 0.5, 2, 0.3
    data = gf.Regression.from_moments([[sxx]], [[sxx * w1 * w2]], n=n)
    problem = gf.Problem(data, [gf.LabelNoise(s)])
    mu = sxx * (w1**2 + w2**2)
    weights = (jnp.array([[w1]]), jnp.array([[w2]]))
    expected = h * s**2 / (2 * n) * mu / (2 - h * mu)
    np.testing.assert_allclose(floor_and_covariance(problem, weights, h, True)[0], expected)


def test_floor_against_a_simulated_chain():
    """The linearised chain in NumPy: time average over 400 paths, within 4 standard errors."""
    problem, net = PROBLEMS["labels"], network((2, 3, 2), seed=1)
    kernel, noise = chain(problem, net)
    root = np.linalg.cholesky(noise)
    rng = np.random.default_rng(5)
    x, total, count = np.zeros((400, 4)), np.zeros(400), 0
    for k in range(1500):
        x = x - H * (x @ kernel + rng.normal(size=x.shape) @ root.T)
        if k >= 300:
            total += 0.5 * np.sum(x**2, axis=1)
            count += 1
    average = total / count
    error = average.std(ddof=1) / np.sqrt(len(average))
    floor = float(floor_and_covariance(problem, net.weights, H, True)[0])
    assert abs(average.mean() - floor) < 4 * error
    assert error < 0.01 * floor


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_beyond_the_edge_of_stability_there_is_no_floor(momentum):
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)])
    weights = (jnp.ones((1, 1)), jnp.ones((1, 1)))  # mu = 2
    edge = 1.0 if momentum is None else 1.0 + momentum
    below = floor_and_covariance(problem, weights, 0.99 * edge, True, momentum)[0]
    above = floor_and_covariance(problem, weights, 1.01 * edge, True, momentum)[0]
    assert np.isfinite(below) and below > 0
    assert np.isnan(above)


def test_no_noise_no_floor():
    problem = gf.Problem(population(), [gf.WeightDecay(0.1)])
    weights = network((2, 3, 2)).weights
    assert float(floor_and_covariance(problem, weights, H, True)[0]) == 0.0
