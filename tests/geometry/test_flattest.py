"""The flattest minima against SciPy searches, formulas of the literature and small cases."""

import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import assume, given
from reference import as_numpy
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import ortho_group
from strategies import cases

import gradflow as gf
from gradflow.geometry import flatness_gap, flattest_minimum

DIAGONAL = ([[4.0, 0.0], [0.0, 0.5]], [[0.3, 0.0], [0.0, 2.0]])
"""S and T for which two branches of the spectrum cross at the flattest point."""

ORDERS = 2.0 ** np.arange(2, 15)
"""Norms of the spectrum, each minimised from where the one before has its minimum."""


def moments(seed, d_in, d_out, rank=None, zero_inputs=0):
    """S and T with random directions; S with that many zero eigenvalues, T of that rank."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(d_in - zero_inputs, d_in))
    s = x.T @ x / d_in + (0.1 * np.eye(d_in) if zero_inputs == 0 else 0.0)
    rank = min(d_in, d_out) if rank is None else rank
    return s, draw.normal(size=(d_out, rank)) @ draw.normal(size=(rank, d_in))


def population(s, t):
    return gf.Regression.from_moments(np.asarray(s), np.asarray(t) @ np.asarray(s))


def curvature(net, data):
    """Sharpness and trace of the complex-step Hessian."""
    full = reference.hessian(as_numpy(net.weights), np.asarray(data.sxx), np.asarray(data.syx))
    return {"sharpness": np.linalg.eigvalsh((full + full.T) / 2)[-1], "trace": np.trace(full)}


CASES = {
    "one layer": ((3, 2), moments(0, 3, 2)),
    "two layers": ((2, 3, 2), moments(1, 2, 2)),
    "three layers": ((3, 2, 4, 2), moments(2, 3, 2)),
    "five layers": ((2, 2, 3, 2, 2, 3), moments(3, 2, 3)),
    "scalar": ((1, 1, 1, 1), ([[1.7]], [[-2.0]])),
    "one output": ((4, 1, 2, 1), moments(4, 4, 1)),
    "one input": ((1, 2, 3), moments(5, 1, 3)),
    "a zero target": ((2, 3, 1, 2), ([[2.0, 0.3], [0.3, 1.0]], [[0.0, 0.0], [0.0, 0.0]])),
    "a target of rank one": ((3, 1, 2, 3), moments(6, 3, 3, rank=1)),
    "idle units": ((3, 4, 4, 3), moments(7, 3, 3, rank=2)),
    "singular inputs": ((4, 2, 3), moments(8, 4, 3, zero_inputs=2)),
    "whitened inputs": ((3, 3, 3, 2), (0.6 * np.eye(3), moments(9, 3, 2)[1])),
    "a crossing": ((2, 2, 2, 2), DIAGONAL),
    "a scale of 1e-6": ((3, 2, 2), (1e-6 * moments(10, 3, 2)[0], 1e3 * moments(10, 3, 2)[1])),
}


@pytest.mark.few_cases(14)
@pytest.mark.parametrize("by", ["sharpness", "trace"])
@pytest.mark.parametrize("name", CASES)
def test_the_flattest_minimum_is_a_minimum_with_the_value_and_the_bound_it_claims(name, by):
    widths, (s, t) = CASES[name]
    data = population(s, t)
    found = flattest_minimum(data, widths, by)
    assert found.net.widths == widths
    p = reference.end_to_end(as_numpy(found.net.weights))
    size = np.linalg.norm(t, 2) * np.linalg.norm(s, 2)
    np.testing.assert_allclose(p @ s, np.asarray(t) @ s, rtol=0, atol=1e-13 * size)
    np.testing.assert_allclose(found.value, curvature(found.net, data)[by], rtol=1e-13)
    np.testing.assert_allclose(found.bound, found.value, rtol=1e-13)


def on_the_manifold(theta, widths, t):
    """Layers with end-to-end matrix T: W_1 solves W_N ... W_2 W_1 = T and is free beyond that."""
    sizes = [above * below for below, above in itertools.pairwise(widths)]
    parts = jnp.split(theta, np.cumsum(sizes)[:-1])
    shapes = zip(widths[1:], widths, strict=False)
    layers = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    a = jnp.eye(widths[-1])
    for w in reversed(layers[1:]):
        a = a @ w
    inverse = a.T @ jnp.linalg.inv(a @ a.T)
    return [inverse @ t + layers[0] - inverse @ (a @ layers[0]), *layers[1:]]


def end_to_end_kernel(layers, root):
    kernel = 0.0
    for i in range(len(layers)):
        a, b = jnp.eye(layers[-1].shape[0]), root
        for w in reversed(layers[i + 1 :]):
            a = a @ w
        for w in layers[:i]:
            b = w @ b
        kernel += jnp.kron(a @ a.T, b.T @ b)
    return kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "s_and_t"),
    [
        ((3, 2, 2), moments(12, 3, 2)),
        ((2, 2, 2, 2), DIAGONAL),
        ((2, 3, 2, 2), moments(13, 2, 2)),
        ((2, 2, 2, 2, 1), moments(14, 2, 1)),
    ],
)
def test_free_searches_over_the_minima_find_nothing_flatter(widths, s_and_t):
    """BFGS on the trace, and on norms of the spectrum that approach the largest eigenvalue.

    With n eigenvalues, the network of least q-norm is at most n^{1/q} times as sharp as the least.
    """
    s, t = (np.asarray(m) for m in s_and_t)
    values, vectors = np.linalg.eigh(s)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    spectrum = jax.jit(
        lambda theta: jnp.linalg.eigvalsh(
            end_to_end_kernel(on_the_manifold(theta, widths, t), root)
        )
    )

    @jax.jit
    @jax.value_and_grad
    def norm(theta, order):
        mu = spectrum(theta)
        return mu[-1] * jnp.sum((mu / mu[-1]) ** order) ** (1 / order)

    def search(theta, order):
        return minimize(
            lambda x: [np.asarray(v) for v in norm(x, order)], theta, jac=True, method="BFGS"
        ).x

    draw = np.random.default_rng(len(widths))
    parameters = sum(a * b for a, b in itertools.pairwise(widths))
    starts = [draw.normal(size=parameters) for _ in range(3)]
    data = population(s, t)
    least_trace = flattest_minimum(data, widths, "trace").value
    least_sharpness = flattest_minimum(data, widths).value
    for start in starts:
        trace = float(np.sum(spectrum(search(start, 1.0))))
        assert -1e-12 < trace / least_trace - 1 < 1e-9
        theta = start
        for order in ORDERS:
            theta = search(theta, order)
        largest = float(spectrum(theta)[-1])
        slack = (widths[0] * widths[-1]) ** (1 / ORDERS[-1]) - 1
        assert -1e-12 < largest / least_sharpness - 1 < slack + 1e-9


@pytest.mark.slow
@given(cases())
def test_no_network_is_flatter_than_the_flattest_of_its_widths(case):
    net, data = case
    p = reference.end_to_end(as_numpy(net.weights))
    assume(np.linalg.norm(p) > 1e-3)
    data = gf.Regression.from_moments(data.sxx, p @ np.asarray(data.sxx))
    assume(np.linalg.norm(np.asarray(data.syx)) > 1e-3)
    here = curvature(net, data)
    for by in ("sharpness", "trace"):
        assert here[by] >= flattest_minimum(data, net.widths, by).value * (1 - 1e-10)


# Formulas of the literature


def test_whitened_inputs_give_the_balanced_network_and_the_known_sharpness():
    t = moments(15, 3, 2)[1]
    found = flattest_minimum(gf.Regression.whitened(t), (3, 2, 4, 2))
    np.testing.assert_allclose(found.value, 3 * np.linalg.norm(t, 2) ** (4 / 3), rtol=1e-14)
    for g in reference.balancedness(as_numpy(found.net.weights)):
        np.testing.assert_allclose(g, np.zeros_like(g), atol=1e-14)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_one_output_is_at_or_above_the_bound_of_marion_and_chizat(depth):
    """N |p|^{2-2/N} a, a = p S p^T / |p|^2; attained if p is an eigenvector and |S| <= N a."""
    widths = (3, *(2 for _ in range(depth - 1)), 1)
    directions = ortho_group.rvs(3, random_state=1)
    p = 1.4 * directions[:, :1].T

    def ratio(eigenvalues):
        s = directions @ np.diag(eigenvalues) @ directions.T
        a = float((p @ s @ p.T)[0, 0]) / 1.4**2
        found = flattest_minimum(population(s, p), widths).value
        return found / (depth * 1.4 ** (2 - 2 / depth) * a)

    np.testing.assert_allclose(ratio([1.0, 0.9 * depth, 0.2]), 1.0, rtol=1e-13)
    assert ratio([1.0, 1.1 * depth, 0.2]) > 1.0 + 1e-3


def test_sharpness_of_depth_two_solves_a_problem_in_one_number():
    s, t = moments(16, 3, 2)
    values, vectors = np.linalg.eigh(s)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T

    def largest(log_a):
        inner = np.exp(log_a) * np.eye(3) + np.exp(-log_a) * t.T @ t
        return np.linalg.eigvalsh(root @ inner @ root)[-1]

    least = minimize_scalar(largest, bounds=(-5, 5), method="bounded", options={"xatol": 1e-10})
    found = flattest_minimum(population(s, t), (3, 4, 2)).value
    np.testing.assert_allclose(found, least.fun, rtol=1e-9)


def test_flat_is_not_balanced():
    """Three ways: outputs and inputs in unequal number, depth three, room below the top."""
    thin = flattest_minimum(gf.Regression.whitened([[1.0], [0.5], [0.2]]), (1, 2, 3), "trace")
    below, above = (float(np.sum(np.square(w))) for w in thin.net.weights)
    np.testing.assert_allclose(above / below, 3.0, rtol=1e-14)
    target = np.diag([4.0, 1.0])
    deep = flattest_minimum(gf.Regression.whitened(target), (2, 2, 2, 2), "trace").net
    singular = [np.linalg.svd(w, compute_uv=False) for w in as_numpy(deep.weights)]
    ratios = [values[0] / values[1] for values in singular]
    np.testing.assert_allclose(ratios, [2.0, 1.0, 2.0], rtol=1e-13)
    for c in (0.5, 1.3, 2.0):
        net = gf.DeepLinear([np.diag([2.0, c]), np.diag([2.0, 1 / c])])
        gap = flatness_gap(net, gf.Regression.whitened(target))
        np.testing.assert_allclose(gap.ratio, 1.0, rtol=1e-13)


@pytest.mark.few_cases(2)
@pytest.mark.parametrize(
    ("target", "widths", "expected"),
    [
        (2.0 * ortho_group.rvs(3, random_state=2), (3, 3, 4, 3), 1.0),
        (np.diag([4.0, 1.0]), (2, 2, 2), 1.0),
        # tau = 2500^{1/3}: 4 tau / 10 + 16 tau / 25 + 4 tau / 10 over 3 4^{4/3}
        (np.diag([4.0, 1.0]), (2, 2, 2, 2), 2500 ** (1 / 3) * 1.44 / (3 * 4 ** (4 / 3))),
        (np.array([[1.0], [0.5], [0.2]]), (1, 2, 3), (np.sqrt(3) + 1 / np.sqrt(3)) / 2),
    ],
)
def test_the_sharpness_of_the_flattest_by_trace(target, widths, expected):
    data = gf.Regression.whitened(target)
    gap = flatness_gap(flattest_minimum(data, widths, "trace").net, data)
    np.testing.assert_allclose(gap.ratio, expected, rtol=1e-12)


# How far


def test_gap_of_two_scalar_layers():
    """Off the manifold it is that of the Gauss-Newton minimum; both signs are equally near."""
    data = gf.Regression.from_moments([[1.5]], [[1.5]])
    for sign in (1.0, -1.0):
        gap = flatness_gap(gf.DeepLinear([[[sign * 2.0]], [[sign * 0.5]]]), data)
        np.testing.assert_allclose(gap.value, 1.5 * 4.25, rtol=1e-13)
        np.testing.assert_allclose(gap.ratio, 4.25 / 2, rtol=1e-13)
        np.testing.assert_allclose(gap.excess, 1.5 * 2.25, rtol=1e-13)
        np.testing.assert_allclose(gap.distance, np.sqrt(1.25), rtol=1e-13)
    gap = flatness_gap(gf.DeepLinear([[[2.0]], [[0.6]]]), data)
    w1, w2 = 2.0, 0.6
    for _ in range(6):
        step = (w1 * w2 - 1) / (w1**2 + w2**2)
        w1, w2 = w1 - step * w2, w2 - step * w1
    np.testing.assert_allclose(gap.value, 1.5 * (w1**2 + w2**2), rtol=1e-12)


@pytest.mark.parametrize("widths", [(3, 3, 2), (3, 2, 3, 2)])
def test_rotated_hidden_units_are_no_distance(widths):
    data = population(*moments(17, 3, 2))
    layers = as_numpy(flattest_minimum(data, widths, "trace").net.weights)
    for i, d in enumerate(widths[1:-1]):
        turn = ortho_group.rvs(d, random_state=i)
        layers[i], layers[i + 1] = turn @ layers[i], layers[i + 1] @ turn.T
    gap = flatness_gap(gf.DeepLinear(layers), data, "trace")
    np.testing.assert_allclose(gap.ratio, 1.0, rtol=1e-13)
    assert gap.distance < 1e-12


def test_distance_is_the_least_over_rotations_and_reflections():
    target = moments(18, 2, 2)[1]
    data = gf.Regression.whitened(target)
    w1 = np.array([[1.0, 0.4], [-0.3, 0.8]])
    net = gf.DeepLinear([w1, target @ np.linalg.inv(w1)])
    best = as_numpy(flattest_minimum(data, (2, 2, 2)).net.weights)

    def distance(angle, mirror):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.array([[c, -s], [s, c]]) @ np.diag([1.0, mirror])
        apart = [net.weights[0] - turn @ best[0], net.weights[1] - best[1] @ turn.T]
        return np.linalg.norm(reference.flatten([np.asarray(a) for a in apart]))

    expected = min(
        minimize_scalar(distance, bounds=(a, a + 1), method="bounded", args=(mirror,)).fun
        for a in range(7)
        for mirror in (1.0, -1.0)
    )
    gap = flatness_gap(net, data)
    np.testing.assert_allclose(gap.distance, expected, rtol=1e-9)
    apart = [a - b for a, b in zip(net.weights, gap.flattest.net.weights, strict=True)]
    np.testing.assert_allclose(
        np.linalg.norm(reference.flatten([np.asarray(a) for a in apart])), expected, rtol=1e-9
    )


def test_distance_at_depth_three_is_the_least_of_searches_over_two_rotations():
    data = population(*moments(21, 2, 2))
    draw = np.random.default_rng(22)
    best = as_numpy(flattest_minimum(data, (2, 2, 2, 2)).net.weights)
    x, y = draw.normal(size=(2, 2, 2)) + np.eye(2)
    moved = [x @ best[0], y @ best[1] @ np.linalg.inv(x), best[2] @ np.linalg.inv(y)]

    def distance(angles, mirrors):
        c, s = np.cos(angles), np.sin(angles)
        q, r = (
            np.array([[c[i], -s[i]], [s[i], c[i]]]) @ np.diag([1.0, mirrors[i]]) for i in range(2)
        )
        turned = [q @ best[0], r @ best[1] @ q.T, best[2] @ r.T]
        return np.linalg.norm(reference.flatten(moved) - reference.flatten(turned))

    expected = min(
        minimize(distance, draw.uniform(-4, 4, size=2), args=(mirrors,), tol=1e-12).fun
        for mirrors in itertools.product((1.0, -1.0), repeat=2)
        for _ in range(6)
    )
    gap = flatness_gap(gf.DeepLinear(moved), data)
    np.testing.assert_allclose(gap.distance, expected, rtol=1e-8)


def test_noise_on_the_inputs_is_part_of_the_loss_and_other_regularizers_are_not():
    s, t = moments(19, 2, 2)
    data = population(s, t)
    noise = [gf.InputNoise(0.5), gf.LabelNoise(1.0), gf.WeightDecay(0.1), gf.Dropout(0.2)]
    noisy = s + 0.25 * np.eye(2)
    expected = flattest_minimum(population(noisy, t @ s @ np.linalg.inv(noisy)), (2, 2, 2))
    found = flattest_minimum(gf.Problem(data, noise), (2, 2, 2))
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-13)


def test_gap_of_a_zero_target_has_no_ratio():
    data = gf.Regression.whitened([[0.0]])
    gap = flatness_gap(gf.DeepLinear([[[2.0]], [[0.0]]]), data)
    assert (gap.value, gap.ratio, gap.excess) == (4.0, np.inf, 4.0)
    assert flatness_gap(flattest_minimum(data, (1, 1, 1)).net, data).ratio == 1.0


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 1, 2), "trace"), "widths: (2, 1, 2) let through rank 1, but the target has rank 2"),
        (((2, 2, 3), "trace"), "widths: (2, 2, 3) do not fit the data with 2 inputs and 2 targets"),
        (((2, 0, 2), "trace"), "widths must be positive; got (2, 0, 2)"),
        (
            ((2, 3, 2), "trace", gf.DeepLinear([np.eye(2), np.eye(2)])),
            "start: widths (2, 2, 2) differ from widths (2, 3, 2).",
        ),
    ],
)
def test_refusals(arguments, message):
    data = gf.Regression.whitened(np.diag([2.0, 1.0]))
    with pytest.raises(ValueError, match=re.escape(message)):
        flattest_minimum(data, *arguments)


def test_refuses_an_unknown_criterion():
    unchecked = inspect.unwrap(flattest_minimum)  # users have no type checks at run time
    with pytest.raises(ValueError, match='by: must be "sharpness" or "trace"; got \'norm\''):
        unchecked(gf.Regression.whitened([[1.0]]), (1, 1, 1), "norm")


def test_gap_refuses_a_saddle_and_a_bottleneck():
    data = gf.Regression.whitened(np.diag([2.0, 1.0]))
    with pytest.raises(ValueError, match="do not reach a minimum"):
        flatness_gap(gf.DeepLinear([np.zeros((2, 2)), np.zeros((2, 2))]), data)
    with pytest.raises(ValueError, match="let through rank 1"):
        flatness_gap(gf.DeepLinear([np.ones((1, 2)), np.ones((2, 1))]), data)
