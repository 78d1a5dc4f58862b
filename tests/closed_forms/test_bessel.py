"""Ratios of Bessel functions against mpmath."""

import jax
import mpmath as mp
import numpy as np
import pytest

from gradflow.closed_forms.bessel import bessel_ratios, log_first_kind_growth

ratios, growth = jax.jit(bessel_ratios), jax.jit(log_first_kind_growth)


def cases() -> list[tuple[float, float, float]]:
    """mu from 0 to 300, s from 1e-16 to 1e3, more of them where methods change."""
    rng = np.random.default_rng(0)
    found = [
        (m, s, 1.0) for m in (0.0, 0.5, 1.0, 1e-12, 29.4, 30.5) for s in (1e-16, 0.3, 29.9, 31.0)
    ]
    for _ in range(40):
        found.append(
            (10 ** rng.uniform(-6, 2.5), 10 ** rng.uniform(-16, 3), 10 ** rng.uniform(-3, 1))
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_ratios(case: tuple[float, float, float]):
    mp.mp.dps = 40
    mu, s, x = map(mp.mpf, case)
    half = mp.mpf(1) / 2
    first = mp.besseli(mu + half, s) / mp.besseli(mu - half, s)
    second = mp.besselk(mu - half, s) / mp.besselk(mu + half, s)
    expected = [first, second, 1 - second]
    for actual, exact in zip(ratios(case[0], case[1]), expected, strict=True):
        assert abs(mp.mpf(float(actual)) - exact) <= 5e-14 * exact
    log = mp.log(mp.besseli(mu - half, s) / mp.besseli(mu - half, s * mp.exp(-x)))
    assert abs(mp.mpf(float(growth(*case))) - log) <= 1e-14 * (1 + abs(log))


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("mu", "s"), [(1880.25, 1e4), (2000.5, 700.0), (3000.0, 40.0)])
def test_large_orders(mu: float, s: float):
    """The first kind by its continued fraction, the second by its recurrence upwards."""
    mp.mp.dps = 30
    argument, half = mp.mpf(s), mp.mpf(1) / 2
    first = mp.mpf(0)
    for k in reversed(range(1, 40_000)):
        first = 1 / (2 * (mu - half + k) / argument + first)
    start = mu - int(mu)
    second = mp.besselk(start - half, argument) / mp.besselk(start + half, argument)
    for k in range(int(mu)):
        second = 1 / (second + 2 * (start + half + k) / argument)
    for actual, exact in zip(ratios(mu, s), (first, second, 1 - second), strict=True):
        assert abs(mp.mpf(float(actual)) - exact) <= 5e-14 * exact
