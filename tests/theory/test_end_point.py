"""Half-lives and end points of the slow flow against quadrature and minimisation by SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

import gradflow as gf
from gradflow.geometry import flow_projection, hessian_block_traces, imbalance, squared_norms
from gradflow.theory import end_point
from gradflow.theory.end_point import Ending, slow_end


def followed(problem, weights, h, momentum=0.0, **options):
    """`slow_end` with the numbers in their place."""
    return slow_end(problem, weights, jnp.asarray(h), jnp.asarray(momentum), **options)


STD, H = 0.3, 0.4
V = STD**2
SCALAR = gf.DeepLinear([[[1.9]], [[0.4]]])
U0 = 1.9**2 - 0.4**2

TARGET = np.array([[0.8], [0.5], [-0.3]])
NARROW = gf.DeepLinear([np.array([[1.0], [0.3]]), np.array([[0.4, 0.1], [0.3, 0.5], [-0.2, 0.1]])])
SIZE = float(np.linalg.norm(TARGET))


def problem_of(data, std=0.0, decay=0.0):
    """Always both regularizers, so that one program serves all problems of a shape."""
    return gf.Problem(data, [gf.LabelNoise(std), gf.WeightDecay(decay)])


NOISY = problem_of(gf.Regression.whitened([[1.0]]), STD)


def end_of(problem, net, h, momentum=0.0, **options):
    """The slow flow from the minimum that gradient flow reaches, and the network where it ends."""
    found = followed(problem, flow_projection(net, problem).weights, h, momentum, **options)
    return found, gf.DeepLinear(found.weights)


@pytest.mark.slow
def test_half_life_of_the_scalar_network_is_a_quadrature():
    found, net = end_of(NOISY, SCALAR, H)

    def slowness(u):
        return (2.0 - H * np.hypot(u, 2.0)) / (2.0 * H * V * u)

    expected, _ = quad(slowness, 0.5 * U0, U0, epsabs=1e-12)
    assert float(found.half_life) == pytest.approx(expected, rel=1e-7)
    assert bool(found.ending == Ending.still)
    np.testing.assert_allclose([w[0, 0] for w in net.weights], [1.0, 1.0], atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_at_leading_order_the_half_life_is_that_of_an_exponential(momentum):
    found, _ = end_of(NOISY, SCALAR, H, momentum, finite_step=False)
    expected = np.log(2.0) * (1.0 - momentum) ** 2 / (H * V)
    assert float(found.half_life) == pytest.approx(expected, rel=1e-7)


@pytest.mark.slow
def test_weight_decay_ends_at_the_balanced_network():
    rate, h = 0.02, 0.1
    target = np.array([[1.2, 0.3], [-0.2, 0.8]])
    problem = problem_of(gf.Regression.whitened(target), decay=rate)
    net = gf.init.gaussian([2, 3, 2, 2], 0.9, jax.random.key(1))
    found, end = end_of(problem, net, h)
    assert float(found.half_life) == pytest.approx(np.log(2.0) / (2.0 * rate), rel=1e-6)
    least = np.sum(np.linalg.svd(target, compute_uv=False) ** (2.0 / 3.0))
    np.testing.assert_allclose(squared_norms(end), 3 * [least], rtol=1e-6)


def potential(h, decay, noise):
    r"""$-\tfrac{v}{2} \sum_a \log(1 - h \mu_a / 2) + \tfrac{\lambda}{2} |W|^2$ at rank one.

    One unit carries the signal: $|W_1|^2 = a$, $|W_2|^2 = |T|^2 / a$. The Hessian of widths 1-2-3
    then has the eigenvalues $a$ (twice) and $a + |T|^2 / a$.
    """

    def value(a):
        mu = np.array([a, a, a + SIZE**2 / a])
        barrier = -np.sum(np.log1p(-0.5 * h * mu)) / h if h else 0.5 * np.sum(mu)
        return 0.5 * noise * barrier + 0.5 * decay * (a + SIZE**2 / a)

    return minimize_scalar(value, bounds=(0.05, 3.0), method="bounded", options={"xatol": 1e-12}).x


@pytest.mark.slow
@pytest.mark.parametrize(("h", "finite_step"), [(0.8, False), (0.1, True), (0.8, True)])
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_a_rectangular_network_ends_at_the_minimum_of_the_potential(h, finite_step, decay):
    problem = problem_of(gf.Regression.whitened(TARGET), STD, decay)
    found, end = end_of(problem, NARROW, h, finite_step=finite_step)
    # the drift is h times the force of the potential of noise: weight decay counts as decay / h
    a = potential(h if finite_step else 0.0, decay / h, V)
    assert bool(found.ending == Ending.still)
    np.testing.assert_allclose(squared_norms(end), [a, SIZE**2 / a], rtol=2e-6)
    if decay == 0.0 and not finite_step:
        traces = hessian_block_traces(end, problem.data)
        np.testing.assert_allclose(traces, traces[0], rtol=1e-6)


@pytest.mark.slow
def test_the_flow_stops_at_the_edge_of_stability():
    # One output along a flat input direction: decay drives |W_2|^2 = a, which the steep direction
    # sees as its curvature, from 0.2 towards 1 and over the edge at 2 / h = 0.5.
    data = gf.Regression.from_moments([[1.0, 0.0], [0.0, 0.04]], [[0.0, 0.04]])
    net = gf.DeepLinear([[[0.0, 0.2**-0.5]], [[0.2**0.5]]])
    h, rate = 4.0, 0.01
    problem = problem_of(data, decay=rate)
    found = followed(problem, net.weights, h)
    assert bool(found.ending == Ending.edge)
    assert float(h * found.weights[1][0, 0] ** 2) == pytest.approx(2.0, rel=1e-6)
    found = followed(problem, net.weights, 1.0)
    assert bool(found.ending == Ending.still)
    assert float(found.half_life) == pytest.approx(np.log(2.0) / (2.0 * rate), rel=1e-7)


@pytest.mark.slow
def test_a_path_that_does_not_come_to_rest_says_so(monkeypatch):
    monkeypatch.setattr(end_point, "GIVEN_UP", 3)
    found = slow_end(NOISY, flow_projection(SCALAR, NOISY).weights, H)
    assert bool(found.ending == Ending.unfinished)
    assert "come to rest" in Ending[found.ending]


def test_a_balanced_minimum_has_no_half_life():
    net = gf.DeepLinear([[[1.0]], [[1.0]]])
    found = followed(NOISY, net.weights, H)
    assert np.isnan(float(found.half_life))
    assert bool(found.ending == Ending.still)
    assert float(imbalance(gf.DeepLinear(found.weights))) == 0.0


def test_beyond_the_edge_there_is_no_path():
    found = followed(NOISY, flow_projection(SCALAR, NOISY).weights, 0.6)
    assert bool(found.ending == Ending.edge)


def test_hidden_units_may_turn_for_ever_where_everything_else_rests():
    """Batches drive a steady rotation of the hidden units, of which the function knows nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3))
    y = x @ rng.normal(size=(3, 2)) + 0.3 * rng.normal(size=(50, 2))
    net = gf.DeepLinear([0.5 * rng.normal(size=(4, 3)), 0.5 * rng.normal(size=(2, 4))])
    problem = gf.Problem(gf.Regression.from_samples(x, y), [gf.Minibatch(5)])
    start = flow_projection(net, problem)
    found = slow_end(problem, start.weights, 0.05)
    assert bool(found.ending == Ending.still)
    # The slow flow itself, by another solver and its own loop, long before and long after.
    run = gf.simulate(problem, start, gf.SlowFlow(0.05), t1=2e5, save=[1e5, 2e5])
    ended = float(imbalance(gf.DeepLinear(found.weights)))
    np.testing.assert_allclose(run["imbalance"], ended, rtol=1e-6)
    turned = np.asarray(run.weights[0][1] - run.weights[0][0])
    assert np.max(np.abs(turned)) > 0.1  # far from standing still
