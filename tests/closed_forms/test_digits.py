"""Closed forms against mpmath, where double precision or an integrator would lose its digits."""

from collections.abc import Sequence

import mpmath as mp
import numpy as np
import pytest
from closed_forms import forms
from closed_forms.forms import evaluate, scalar_layers, scalar_problem


def exact_pair(case: Sequence[float], t: float) -> tuple:
    """The logistic formula for (w1 + w2)^2 in 400 digits."""
    mp.mp.dps = 400
    w1, w2, sxx, b = map(mp.mpf, case)
    a, u = w1 + w2, w1**2 - w2**2
    root = mp.sqrt(4 * (b / sxx) ** 2 + u**2)
    high, low = 2 * b / sxx + root, 2 * b / sxx - root
    ratio = (a**2 - high) / (a**2 - low) * mp.exp(-sxx * root * t)
    z = mp.sign(a) * mp.sqrt((high - low * ratio) / (1 - ratio))
    return (z + u / z) / 2, (z - u / z) / 2


EXTREMES = [  # w1, w2, sxx, b
    (1e3, 1e-6, 1.0, 1.0),  # u = 1e6
    (1e-6, -1e3, 2.0, 1.0),
    (1.0, 1.0 + 1e-12, 1.0, 3.0),
    (1e-9, -1e-9 * (1 - 1e-6), 1.0, 1.0),  # starts almost on the way to the saddle
    (1e-40, 3e-40, 0.5, 1.0),
    (1e4, 1e4, 1.0, 1e-6),
]
MARKS = [1e-10, 1e-7, 1e-3, 0.5, 3.0, 20.0, 50.0, 300.0, 1000.0]


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("form", ["channel", "scalar chain"])
def test_opposite_weights_decay_to_the_saddle(form: str):
    """On w2 = -w1 = y: y' = -(1 + y^2) y, solved by y^2 / (1 + y^2) = C e^{-2t}."""
    mp.mp.dps = 50
    marks = [1e-3, 1.0, 30.0, 300.0, 400.0]
    run = evaluate(form, scalar_problem(1.0, 1.0), scalar_layers(-0.5, 0.5), marks)
    for k, t in enumerate(marks):
        fraction = mp.mpf(1) / 5 * mp.exp(-2 * mp.mpf(t))
        exact = mp.sqrt(fraction / (1 - fraction))
        for layer, sign in zip(run, (-1, 1), strict=True):
            assert abs(sign * mp.mpf(float(layer[k, 0, 0])) / exact - 1) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "marks"),
    [
        ((34.0, 34.0 + 3e-9, 0.12, -2.4), [0.6, 3.0, 5.0, 8.0]),  # passes close to the saddle
        ((0.5, 0.7, 1.0, 0.0), [1.0, 30.0, 100.0, 300.0]),  # the smaller weight decays to 0
    ],
)
def test_chains_to_relative_accuracy_near_zero(case: tuple[float, ...], marks: list[float]):
    run = evaluate("scalar chain", scalar_problem(*case[2:]), scalar_layers(*case[:2]), marks)
    for k, t in enumerate(marks):
        for layer, exact in zip(run, exact_pair(case, t), strict=True):
            assert abs(mp.mpf(float(layer[k, 0, 0])) / exact - 1) < 1e-12


@pytest.mark.parametrize("case", EXTREMES)
def test_pairs_to_relative_accuracy_in_every_weight(case: tuple[float, ...]):
    w1, w2, sxx, b = case
    run = evaluate("channel", scalar_problem(sxx, b), scalar_layers(w1, w2), MARKS)
    for k, t in enumerate(MARKS):
        for layer, exact in zip(run, exact_pair(case, t), strict=True):
            assert abs(mp.mpf(float(layer[k, 0, 0])) / exact - 1) < 1e-12


def exact_decaying_pair(case: Sequence[float], t: float) -> tuple:
    """Theory section 4: a Riccati equation for (w1 + w2)^2, Bessel order |b - lam|/(2 lam)."""
    mp.mp.dps = 200
    w1, w2, sxx, b, decay = map(mp.mpf, case)
    a, u = w1 + w2, w1**2 - w2**2
    kappa = b - decay
    order = abs(kappa) / (2 * decay)
    s0 = sxx * abs(u) / (4 * decay)
    s1 = s0 * mp.exp(-2 * decay * t)

    def derivative(f, s):
        step = (f(order - 1, s) + f(order + 1, s)) / 2
        return step if f is mp.besseli else -step

    wanted = (kappa - a**2 * sxx / 2) / (2 * decay * s0)  # v'/v at the start
    first = derivative(mp.besselk, s0) - wanted * mp.besselk(order, s0)
    second = wanted * mp.besseli(order, s0) - derivative(mp.besseli, s0)
    v = first * mp.besseli(order, s1) + second * mp.besselk(order, s1)
    slope = first * derivative(mp.besseli, s1) + second * derivative(mp.besselk, s1)
    z = mp.sqrt(2 / sxx * (kappa - 2 * decay * s1 * slope / v)) * mp.sign(a)
    u = u * mp.exp(-2 * decay * t)
    return (z + u / z) / 2, (z - u / z) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [  # w1, w2, sxx, b, decay
        (2.0, 0.1, 1.0, 1.0, 0.02),
        (1e3, 1e-6, 1.0, 1.0, 0.1),
        (2.0, -0.3, 1.0, 0.5, 2.0),
        (2.0, -0.3, 1.0, 1.0, 1.0),
        (1e-6, 2e-6, 1.3, 1.0, 0.05),
        (1.5, 0.2, 1.0, 1.0, 0.004),
        (1.0, 1.0 + 1e-10, 1.0, 3.0, 0.3),
        (0.5, -0.5 + 2.0**-54, 1.0, 5.0, 2.0),  # faint coupling all the way from a saddle
        (1e-3, 1e-3 + 1e-12, 9.8, 0.03, 2.0),  # order of the Bessel functions below 0
    ],
)
def test_decaying_pairs(case: tuple[float, ...]):
    w1, w2, sxx, b, decay = case
    marks = [1e-10, 1e-3, 0.5, 3.0, 20.0, 50.0, *((100.0, 400.0) if b > decay else ())]
    problem = scalar_problem(sxx, b, decay)
    run = evaluate("decaying channel", problem, scalar_layers(w1, w2), marks)
    for k, t in enumerate(marks):
        exact = exact_decaying_pair(case, t)
        for layer, value in zip(run, exact, strict=True):
            assert abs(mp.mpf(float(layer[k, 0, 0])) / value - 1) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "marks"),
    [  # growth 2bt of 2e4 to 4e5
        ((0.0170879, 0.000564489, 0.311136, 96.116, 0.0320387), [500.0, 1000.0, 2215.66]),
        ((0.9, 0.3, 1.0, 1.0, 0.01), [1e4]),
        ((0.9, 0.3, 1.0, -1.0, 0.01), [1e4]),
    ],
)
def test_decaying_pairs_at_long_times(case: tuple[float, ...], marks: list[float]):
    run = evaluate("decaying channel", scalar_problem(*case[2:]), scalar_layers(*case[:2]), marks)
    for k, t in enumerate(marks):
        for layer, value in zip(run, exact_decaying_pair(case, t), strict=True):
            assert abs(mp.mpf(float(layer[k, 0, 0])) / value - 1) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("form", ["decaying channel", "aligned pairs"])
@pytest.mark.parametrize("b", [1.0, -1.0])
@pytest.mark.parametrize("decay", [1e-2, 1e-4, 1e-6, 1e-8])
def test_decaying_pairs_rest_at_their_fixed_point(form: str, b: float, decay: float):
    """At w1 = |w2| = sqrt(|b| - decay): what is left of w1^2 - w2^2 is e^{-200} of the start."""
    run = evaluate(
        form, scalar_problem(1.0, b, decay), scalar_layers(0.9, 0.3), [1e2 / decay, 1e15]
    )
    root = mp.sqrt(1 - mp.mpf(decay))
    for layer, sign in zip(run, (1.0, b), strict=True):
        for value in layer[:, 0, 0]:
            assert abs(sign * mp.mpf(float(value)) / root - 1) < 1e-14


def test_weak_decay_tends_to_none():
    layers = scalar_layers(2.0, -0.3)
    plain = evaluate("channel", scalar_problem(1.0, 1.0), layers, MARKS[:5])
    faint = evaluate("decaying channel", scalar_problem(1.0, 1.0, 1e-15), layers, MARKS[:5])
    for a, b in zip(plain, faint, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


def time_of(sigma: mp.mpf, depth: int, target: mp.mpf) -> mp.mpf:
    """Theory section 8: the time function of a balanced mode, up to a constant."""
    m = 2 - mp.mpf(2) / depth
    series = mp.hyp2f1(1, 1 - m, 2 - m, sigma / target)
    return mp.re(-(sigma ** (1 - m)) / ((m - 1) * target * depth) * series)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize(("start", "target"), [(1e-12, 1.0), (0.3, 2.0), (30.0, 2.0)])
def test_balanced_modes_reach_their_size_in_time(depth: int, start: float, target: float):
    """The modes solve s' = -N s^{2-2/N} (s - s*): time of arrival by a hypergeometric function."""
    mp.mp.dps = 50
    w = start ** (1.0 / depth)
    start_time = time_of(mp.mpf(w) ** depth, depth, mp.mpf(target))
    shares = [mp.mpf("0.01"), mp.mpf("0.5"), 1 - mp.mpf("1e-6")]
    sizes = [mp.mpf(w) ** depth + (mp.mpf(target) - mp.mpf(w) ** depth) * f for f in shares]
    times = [time_of(size, depth, mp.mpf(target)) - start_time for size in sizes]
    layers = scalar_layers(*(w,) * depth)
    marks = [*(float(t) for t in times), 1e3 * float(times[-1])]
    run = evaluate("scalar chain", scalar_problem(1.0, target), layers, marks)
    for k, (t, size) in enumerate(zip(times, sizes, strict=True)):
        # What rounding the time itself moves the mode by.
        speed = depth * size ** (2 - mp.mpf(2) / depth) * abs(size - target)
        shift = speed * mp.mpf(2) ** -52 * t
        actual = mp.mpf(float(run[0][k, 0, 0])) ** depth
        assert abs(actual - size) < 1e-13 * size + 20 * shift
    np.testing.assert_allclose(run[0][-1], target ** (1.0 / depth), rtol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("t", [10.0, 20.0, 200.0])
def test_riccati_keeps_its_digits_at_long_times(t: float):
    """The unsplit formula is singular in double precision from |F| t of about 40 on."""
    layers, target = forms.near_balanced_case((2, 2, 2), 0.7)
    target = target * 2.0 / np.linalg.norm(target, 2)
    run = evaluate("riccati", forms.problem_of(np.eye(2), target), layers, [t])
    mp.mp.dps = 1000 if t > 100 else 120
    w1, w2 = (mp.matrix(w.tolist()) for w in layers)
    gamma = ((w2.T * w2) - w1 * w1.T)[0, 0]
    f = mp.zeros(4)
    for i in range(2):
        f[i, i], f[i + 2, i + 2] = -gamma / 2, gamma / 2
        for j in range(2):
            f[i + 2, j] = f[j, i + 2] = mp.mpf(float(target[i, j]))
    q = mp.zeros(4, 2)
    for i in range(2):
        for j in range(2):
            q[i, j], q[i + 2, j] = w1[j, i], w2[i, j]
    values, vectors = mp.eigsy(f)
    inner = vectors.T * q
    growth = mp.diag([mp.exp(v * t) for v in values])
    area = mp.diag([mp.expm1(2 * v * t) / (2 * v) for v in values])
    middle = mp.inverse(mp.eye(2) + inner.T * area * inner)
    z = vectors * growth * inner * middle * inner.T * growth * vectors.T
    exact = np.array([[float(z[i + 2, j]) for j in range(2)] for i in range(2)])
    actual = run[1][0] @ run[0][0]
    np.testing.assert_allclose(actual, exact, rtol=0.0, atol=1e-12 * np.max(np.abs(exact)))
