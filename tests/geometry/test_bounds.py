"""Bounds on the curvature of minima: never above a minimum, and attained."""

import numpy as np
import pytest
from curvature_cases import samples
from scipy.optimize import minimize, minimize_scalar

import gradflow as gf
from gradflow.geometry import sharpness_bound, trace_bound
from gradflow.regularizers import Dropout

RNG = np.random.default_rng(0)


def moment(kind: str, d: int) -> np.ndarray:
    rng = np.random.default_rng(d)
    rows = rng.normal(size=(d - 1 if kind == "singular" else 2 * d, d))
    return {"white": 1.7 * np.eye(d)}.get(kind, rows.T @ rows / d)


def root(s: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(s)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def kernel(layers: list[np.ndarray], half: np.ndarray) -> np.ndarray:
    """K of theory section 1, from explicit products in NumPy."""
    n = len(layers)
    total = 0.0
    for i in range(n):
        above, below = np.eye(layers[-1].shape[0]), half
        for w in layers[:i:-1]:
            above = above @ w
        for w in layers[:i]:
            below = w @ below
        total = total + np.kron(above @ above.T, below.T @ below)
    return np.asarray(total)


def random_minimum(target: np.ndarray, widths: tuple[int, ...], rng) -> list[np.ndarray]:
    """Layers of random scales whose product is the target: the last layer is solved for."""
    pairs = list(zip(widths[1:-1], widths[:-2], strict=True))
    below = [np.exp(rng.normal()) * rng.normal(size=pair) for pair in pairs]
    product = np.eye(widths[0])
    for w in below:
        product = w @ product
    return [*below, target @ np.linalg.pinv(product)]


SHAPES = [(3, 3), (3, 4, 2), (3, 3, 1), (3, 5, 3, 2), (2, 3, 2, 3, 3), (1, 3, 4)]


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("widths", SHAPES)
@pytest.mark.parametrize("kind", ["white", "general", "singular"])
def test_no_minimum_is_below(widths, kind):
    """Random minima: the hidden layers are wide enough to solve for the last one."""
    rng = np.random.default_rng(1)
    if kind == "singular" and widths[0] == 1:
        pytest.skip("one input of no variance has no target")
    s = moment(kind, widths[0])
    half, depth = root(s), len(widths) - 1
    ratios = []
    for _ in range(40):
        target = rng.normal(size=(widths[-1], widths[0]))
        data = gf.Regression.from_moments(s, target @ s)
        layers = random_minimum(target, widths, rng)
        k = kernel(layers, half)
        top, trace = np.linalg.eigvalsh(k)[-1], np.trace(k)
        ratios.append(top / float(sharpness_bound(data, depth)))
        assert trace >= (1 - 1e-10) * float(trace_bound(data, widths))
    assert min(ratios) >= 1 - 1e-10


@pytest.mark.parametrize("widths", [(2, 2, 2), pytest.param((2, 2, 2, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("by", ["sharpness", "trace"])
def test_numerical_minimisation_comes_down_to_the_bounds(widths, by):
    """Over W_N = T (W_{N-1} ... W_1)^{-1}; Nelder-Mead copes with the kinks."""
    s = moment("general", 2)
    half, depth = root(s), len(widths) - 1
    target = np.array([[1.5, 0.2], [-0.3, 0.8]])
    data = gf.Regression.from_moments(s, target @ s)

    def value(x: np.ndarray) -> float:
        below = list(x.reshape(depth - 1, 2, 2))
        product = np.eye(2)
        for w in below:
            product = w @ product
        if abs(np.linalg.det(product)) < 1e-8:
            return 1e8
        k = kernel([*below, target @ np.linalg.inv(product)], half)
        return float(np.trace(k) if by == "trace" else np.linalg.eigvalsh(k)[-1])

    rng = np.random.default_rng(2)
    best = np.inf
    for _ in range(2 if depth == 2 else 4):
        x = (np.eye(2) + 0.3 * rng.normal(size=(depth - 1, 2, 2))).ravel()
        for _ in range(3 if depth == 2 else 6):
            options = {"xatol": 1e-12, "fatol": 1e-14, "maxiter": 1_000 * depth, "adaptive": True}
            x = minimize(value, x, method="Nelder-Mead", options=options).x
        best = min(best, value(x))
    bound = float(sharpness_bound(data, depth) if by == "sharpness" else trace_bound(data, widths))
    assert bound * (1 - 1e-9) <= best <= bound * (1 + 1e-4)


@pytest.mark.parametrize("by", ["sharpness", "trace"])
@pytest.mark.parametrize("widths", [(3, 3), (3, 4, 2), (4, 2, 5, 2), (2, 3, 2, 3, 2)])
@pytest.mark.parametrize("kind", ["general", "singular"])
def test_the_flattest_minimum_attains_them(widths, kind, by):
    """The network that is built elsewhere, its curvature by NumPy."""
    s = moment(kind, widths[0])
    target = np.random.default_rng(4).normal(size=(widths[-1], widths[0]))
    data = gf.Regression.from_moments(s, target @ s)
    net = gf.flattest_minimum(data, widths, by).net
    k = kernel([np.asarray(w) for w in net.weights], root(s))
    if by == "trace":
        np.testing.assert_allclose(float(trace_bound(data, widths)), np.trace(k), rtol=1e-10)
    else:
        bound = float(sharpness_bound(data, len(widths) - 1))
        np.testing.assert_allclose(bound, np.linalg.eigvalsh(k)[-1], rtol=1e-10)


def test_whitened_inputs():
    """Mulayoff and Michaeli: c N s_1^{2 - 2/N} for S = c I, and the nuclear norm of the trace."""
    target = RNG.normal(size=(3, 2))
    singular = np.linalg.svd(target, compute_uv=False)
    for depth in (1, 2, 3, 5):
        data = gf.Regression.from_moments(1.7 * np.eye(2), 1.7 * target)
        expected = 1.7 * depth * singular[0] ** (2 - 2 / depth)
        np.testing.assert_allclose(float(sharpness_bound(data, depth)), expected, rtol=1e-13)
        widths = (2, *[4] * (depth - 1), 3)
        trace = (
            depth * (3 * 2 * 1.7) ** (1 / depth) * (1.7**0.5 * singular.sum()) ** (2 - 2 / depth)
        )
        np.testing.assert_allclose(float(trace_bound(data, widths)), trace, rtol=1e-13)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_one_output(depth):
    """Never below Marion and Chizat, equal to it where the target is an eigenvector with room.

    Their bound N |p|^{2 - 2/N} a, a = p S p' / |p|^2, is attained if lam_max(S) <= N a. Off these
    directions the bound here is larger: the minimum over one number, here without derivatives.
    """
    s = np.diag([1.0, 1.6, 2.5 * depth])
    for p in ([0.0, 1.3, 0.0], [1.0, -0.4, 0.7], [0.7, 0.0, 0.0], [0.0, 0.2, 3.0]):
        p = np.array([p])
        size = np.linalg.norm(p)
        a = (p @ s @ p.T).item() / size**2
        weaker = depth * size ** (2 - 2 / depth) * a
        room = p[0, 1] == 1.3
        s_here = np.diag([1.0, 1.6, 1.6 * depth * 0.99]) if room else s
        bound = float(sharpness_bound(gf.Regression.from_moments(s_here, p @ s_here), depth))
        assert bound >= weaker * (1 - 1e-12)
        if room:
            np.testing.assert_allclose(bound, weaker, rtol=1e-12)
        q = root(s_here) @ p.T @ p @ root(s_here)

        def least(log_a: float, s=s_here, q=q) -> float:
            a = np.exp(log_a)
            return np.linalg.eigvalsh(a * s + (depth - 1) * a ** (-1 / (depth - 1)) * q)[-1]

        # The minimum may be a kink, where the value is only as good as the place, which SciPy knows
        # to 1e-8 of its distance from 0: search again around what was found.
        options = {"xatol": 1e-13}
        about = minimize_scalar(least, bounds=(-6, 6), method="bounded", options=options).x
        found = minimize_scalar(
            lambda x, about=about, least=least: least(about + x),
            bounds=(-1e-6, 1e-6),
            method="bounded",
            options=options,
        ).fun
        np.testing.assert_allclose(bound, found, rtol=1e-12)


def test_any_direction_of_the_outputs_gives_a_weaker_bound():
    """N |T'u|^{-2/N} u'T S T'u of theory section 1 stays below for every u."""
    rng = np.random.default_rng(7)
    s = moment("general", 3)
    target = rng.normal(size=(2, 3))
    data = gf.Regression.from_moments(s, target @ s)
    for depth in (2, 3, 4):
        u = rng.normal(size=(200, 2))
        pulled = u @ target / np.linalg.norm(u, axis=1)[:, None]
        values = depth * np.linalg.norm(pulled, axis=1) ** (-2 / depth)
        values = values * np.einsum("ki,ij,kj->k", pulled, s, pulled)
        assert values.max() <= float(sharpness_bound(data, depth)) * (1 + 1e-12)


def test_noise_on_the_inputs_is_part_of_them():
    data = samples((3, 2), 8)
    noisy = gf.Regression.from_moments(
        np.asarray(data.sxx) + 0.25 * np.eye(3), np.asarray(data.syx)
    )
    problem = gf.Problem(data, [gf.InputNoise(0.5), gf.WeightDecay(0.1), gf.LabelNoise(0.3)])
    for depth in (1, 2, 3):
        np.testing.assert_allclose(
            float(sharpness_bound(problem, depth)), float(sharpness_bound(noisy, depth)), rtol=1e-12
        )
    np.testing.assert_allclose(
        float(trace_bound(problem, (3, 4, 2))), float(trace_bound(noisy, (3, 4, 2))), rtol=1e-12
    )


def test_no_target():
    data = gf.Regression.from_moments(np.diag([1.0, 3.0]), np.zeros((2, 2)))
    np.testing.assert_allclose(float(sharpness_bound(data, 1)), 3.0)
    assert float(sharpness_bound(data, 3)) == 0.0
    assert float(trace_bound(data, (2, 1, 2))) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: sharpness_bound(d, 0), r"depth must be at least 1; got 0\."),
        (lambda d: trace_bound(d, (3, 1, 2)), r"widths: \(3, 1, 2\) let through rank 1, but the"),
        (lambda d: trace_bound(d, (3, 4, 3)), r"widths: \(3, 4, 3\) do not fit the data with 3"),
        (lambda d: trace_bound(d, (3,)), r"widths: \(3,\) do not fit the data"),
        (
            lambda d: sharpness_bound(gf.Problem(d, [Dropout(0.2)]), 2),
            "sharpness_bound: Dropout acts inside the network and moves the minima",
        ),
        (
            lambda d: trace_bound(gf.Problem(d, [Dropout(0.2)]), (3, 4, 2)),
            "trace_bound: Dropout acts inside",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(samples((3, 2), 8))
