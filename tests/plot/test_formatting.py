"""Numbers as people read them."""

import math

import pytest

from gradflow.plot.formatting import duration, interval, number, with_error

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.827, 0.119, "0.83 ± 0.12"),  # these two are the examples of the Particle Data Group
        (0.827, 0.367, "0.8 ± 0.4"),
        (0.827, 0.0974, "0.83 ± 0.10"),  # 950 to 999 round up to 1000 and keep two digits
        (0.0125249, 0.00012, "0.01252 ± 0.00012"),
        (123456.0, 789.0, "123500 ± 800"),
        (-4.2, 0.05, "\u22124.20 ± 0.05"),
        (1.2539e-5, 4.4e-7, "(1.25 ± 0.04)·10⁻⁵"),
        (1.5e9, 2e7, "(1.500 ± 0.020)·10⁹"),
        (0.001, 5.0, "0 ± 5"),
        (-0.001, 5.0, "0 ± 5"),
        (0.0, 0.02, "0.000 ± 0.020"),
        (0.02, 3e-13, "0.02 ± 3·10⁻¹³"),
        (2.5, 0.0, "2.5 ± 0"),
        (0.0125249, None, "0.01252"),
        (0.0125249, NAN, "0.01252"),
        (NAN, 0.1, "\u2013"),
        (None, None, "\u2013"),
    ],
)
def test_with_error(value: float | None, error: float | None, text: str):
    assert with_error(value, error) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.012345, 0.012678, "[0.01235, 0.01268]"),
        (-1.0, 2.0, "[\u22121.0, 2.0]"),
        (1.0e-7, 3.0e-7, "[1.0, 3.0]·10⁻⁷"),
        (0.02, 0.02 + 1e-14, "[0.02, 0.02]"),
        (1.0, 1.0, "[1, 1]"),
        (NAN, 1.0, "\u2013"),
        (None, 1.0, "\u2013"),
    ],
)
def test_interval(low: float | None, high: float | None, text: str):
    assert interval(low, high) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (3.14159265, "3.142"),
        (-0.5, "\u22120.5"),
        (123456.7, "123457"),
        (2.5e-7, "2.5·10⁻⁷"),
        (9.99999e-8, "1·10⁻⁷"),
        (6.02e23, "6.02·10²³"),
        (math.inf, "∞"),
        (-math.inf, "\u2212∞"),
        (NAN, "\u2013"),
    ],
)
def test_number(value: float, text: str):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12 ms"),
        (3.21, "3.2 s"),
        (59.99, "60.0 s"),
        (125.4, "2 min 5 s"),
        (3840.0, "1 h 4 min"),
        (None, "\u2013"),
    ],
)
def test_duration(seconds: float | None, text: str):
    assert duration(seconds) == text
