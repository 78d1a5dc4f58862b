"""Every closed form against power series in extended precision."""

import numpy as np
import pytest
from closed_forms import forms, long_double
from closed_forms.forms import evaluate, scalar_layers, scalar_problem

TIMES = np.array([0.0, 1e-6, 0.01, 0.3, 1.0, 3.0, 8.0])

extended = pytest.mark.skipif(
    not long_double.HAS_EXTENDED, reason="this machine has no extended precision"
)


def assert_equal(actual: list, expected: list, tolerance: float = 3e-14):
    """Equal at every time, relative to the largest weight at that time."""
    for k in range(len(expected[0])):
        size = max(np.max(np.abs(layer[k])) for layer in expected)
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a[k], e[k], rtol=0.0, atol=tolerance * size)


PAIRS = [  # w1, w2, sxx, b
    (2.0, -0.1, 1.0, 1.0),
    (1e-5, 2e-5, 1.3, 0.8),
    (8.0, 1e-3, 0.7, 1.0),
    (-0.5, 0.4, 1.0, 1.0),
    (0.5, -0.5, 1.0, 1.0),
    (2.0, 1.0, 1.5, -0.7),
    (2.0, 1.0, 1.5, 0.0),
    (0.3, 0.3, 1.0, 1.0),
    (3.0, 3.0, 1.0, 0.1),
]


@pytest.mark.few_cases(2)
@extended
@pytest.mark.parametrize("case", PAIRS)
def test_scalar_pairs(case: tuple[float, ...]):
    w1, w2, sxx, b = case
    layers = scalar_layers(w1, w2)
    expected = long_double.flow(layers, np.array([[sxx]]), np.array([[b]]), TIMES)
    for form in ("channel", "scalar chain"):
        assert_equal(evaluate(form, scalar_problem(sxx, b), layers, TIMES), expected)
    for decay in (0.05, 2.0):
        expected = long_double.flow(layers, np.array([[sxx]]), np.array([[b]]), TIMES, decay)
        problem = scalar_problem(sxx, b, decay)
        assert_equal(evaluate("decaying channel", problem, layers, TIMES), expected)


@pytest.mark.few_cases(1)
@extended
@pytest.mark.parametrize("decay", [None, 0.2])
def test_any_hidden_width(decay: float | None):
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(3, 1)), rng.normal(size=(1, 3))]
    one = np.ones((1, 1))
    expected = long_double.flow(layers, 1.2 * one, 0.8 * one, TIMES, decay or 0.0)
    form = "channel" if decay is None else "decaying channel"
    assert_equal(evaluate(form, scalar_problem(1.2, 0.8, decay), layers, TIMES), expected)


CHAINS = [
    ((0.5, 0.8, -0.3), 1.0, 1.0),
    ((0.5, 0.8, -0.3), 1.0, -1.0),
    ((0.5, -0.8, -0.3), 1.2, -1.0),
    ((0.5, 0.5, 1.0), 1.0, 1.0),
    ((0.5, -0.5, 1.0), 1.0, 1.0),
    ((0.5, -0.5, 0.5), 1.0, 1.0),
    ((0.5, 0.7, 1.0), 1.0, 0.0),
    ((0.5, 0.5, 1.0), 1.0, 0.0),
    ((0.0, 0.4, 0.9), 1.0, 1.0),
    ((0.0, 0.0, 0.9), 1.0, 1.0),
    ((0.2, 0.2, 0.2, 0.2), 1.0, 1.0),
    ((1.5, 1.5, 1.5, 1.5), 1.0, 0.1),
    ((0.1, -0.2, 0.3, 1.0), 0.7, 0.6),
]


@pytest.mark.slow
@extended
@pytest.mark.parametrize("case", CHAINS)
def test_scalar_chains(case: tuple[tuple[float, ...], float, float]):
    values, sxx, b = case
    layers = scalar_layers(*values)
    expected = long_double.flow(layers, np.array([[sxx]]), np.array([[b]]), TIMES)
    actual = evaluate("scalar chain", scalar_problem(sxx, b), layers, TIMES)
    assert_equal(actual, expected)


def test_a_chain_crosses_zero():
    run = evaluate("scalar chain", scalar_problem(1.0, 1.0), scalar_layers(0.5, 0.8, -0.3), TIMES)
    assert run[2][0] < 0.0 < run[2][-1]


ALIGNED = [
    forms.aligned_case((2, 3, 2), [(0.7, -1.2), (0.4, 0.9)], (1.0, 2.0), (1.5, 0.6)),
    forms.aligned_case((3, 2, 2), [(0.7, 1.2), (0.4, -0.1)], (1.0, 2.0, 0.5), (1.5, -0.6)),
    forms.aligned_case((2, 2, 3), [(0.5, 0.5), (0.5, 0.5)], (1.0, 1.0), (1.5, 1.5)),
    forms.aligned_case((2, 3, 2), [(0.0, 0.5), (0.3, 0.2)], (1.0, 1.0), (1.5, 0.8)),
    forms.aligned_case((2, 3, 2), [(0.0, 0.5), (0.0, 0.2)], (1.0, 1.0), (1.5, 0.8), turned=False),
]


@pytest.mark.slow
@extended
@pytest.mark.parametrize("case", ALIGNED)
def test_aligned_modes(case: tuple):
    layers, sxx, syx = case
    expected = long_double.flow(layers, sxx, syx, TIMES)
    problem = forms.problem_of(sxx, syx)
    chains = ("aligned chains",) if layers[0].shape == (3, 2) else ()
    for form in ("aligned pairs", *chains):
        assert_equal(evaluate(form, problem, layers, TIMES), expected, 1e-13)
    expected = long_double.flow(layers, sxx, syx, TIMES, 0.3)
    problem = forms.problem_of(sxx, syx, 0.3)
    assert_equal(evaluate("aligned pairs", problem, layers, TIMES), expected, 1e-13)


@pytest.mark.slow
@extended
def test_aligned_modes_of_depth_three():
    modes = [(0.4, 0.9), (0.4, 0.2), (0.4, -0.5)]
    layers, sxx, syx = forms.aligned_case((2, 3, 2, 2), modes, (1.0, 1.5), (2.0, 0.7))
    expected = long_double.flow(layers, sxx, syx, TIMES)
    problem = forms.problem_of(sxx, syx)
    assert_equal(evaluate("aligned chains", problem, layers, TIMES), expected, 1e-13)


@pytest.mark.few_cases(1)
@extended
@pytest.mark.parametrize(
    ("widths", "gamma", "c"),
    [
        ((2, 2, 2), 0.0, 1.0),
        ((2, 2, 2), 0.7, 1.0),
        ((3, 2, 2), -0.0, 1.5),
        ((2, 3, 4), 0.7, 0.6),
        ((2, 3, 2), 0.0, 1.0),
    ],
)
def test_riccati_gives_the_weights_themselves(widths: tuple, gamma: float, c: float):
    layers, target = forms.near_balanced_case(widths, gamma)
    sxx = c * np.eye(widths[0])
    expected = long_double.flow(layers, sxx, target, TIMES)
    actual = evaluate("riccati", forms.problem_of(sxx, target), layers, TIMES)
    # Where the hidden layer is wide a direction of Z is almost unstable: 1e-19 of the reference
    # has grown to 1e-14 at the last time.
    assert_equal(actual, expected, 1e-13)
    if gamma == 0.0:
        expected = long_double.flow(layers, sxx, target, TIMES, 0.2)
        actual = evaluate("riccati", forms.problem_of(sxx, target, 0.2), layers, TIMES)
        assert_equal(actual, expected, 1e-13)


@extended
@pytest.mark.parametrize("decay", [None, 0.3])
def test_depth_one(decay: float | None):
    rng = np.random.default_rng(4)
    half = rng.normal(size=(3, 2))
    sxx, target = half @ half.T, rng.normal(size=(2, 3))  # rank 2 of 3
    layers = [rng.normal(size=(2, 3))]
    problem = forms.problem_of(sxx, target @ sxx, decay)
    expected = long_double.flow(layers, sxx, target @ sxx, TIMES, decay or 0.0)
    assert_equal(evaluate("linear", problem, layers, TIMES), expected)
