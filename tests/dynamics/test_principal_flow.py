"""The principal flow against closed forms of gradient descent, NumPy and mpmath."""

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference
import training
from compiled import compiled

import gradflow as gf
from gradflow.dynamics.modified_flow import ModifiedFlow, modified_drift
from gradflow.dynamics.principal_flow import PrincipalFlow, principal_direction, principal_factor
from gradflow.regularizers import AbstractPenalty

direction = compiled(principal_direction)
drift = compiled(modified_drift)
TIGHT = {"rtol": 1e-11, "atol": 1e-13}


@pytest.mark.parametrize("z", [-40.0, -1.5, -1e-9, 0.0, 1e-15, 1e-12, 0.3, 0.5, 0.9, 1.5, 2.5])
def test_the_factor_of_a_mode(z: float):
    with mpmath.workdps(60):
        exact = complex(mpmath.log(1 - mpmath.mpf(z)) / z) if z else complex(-1.0)
    expected = complex(exact.real, np.pi / z if z > 1 else 0.0)  # log|1 - z| + i pi
    (found,) = principal_factor(jnp.array([z]))
    assert abs(complex(found) - expected) <= 4e-16 * abs(expected)


def test_the_factor_is_finite_where_a_mode_dies_in_one_step():
    (found,) = principal_factor(jnp.array([1.0]))
    assert complex(found) == pytest.approx(np.log(np.finfo(float).eps))


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_passes_through_every_iterate_on_a_quadratic_loss(decay: float):
    """One layer: W_k = W* + (W_0 - W*)(I - h S)^k, h lambda = 0, .3, 1, 1.5, 2 and 2.5.

    It is also saved between the iterates, where it is complex.
    """
    h = 0.5
    curvatures = np.array([0.0 if decay == 0.0 else decay, 0.3, 1.0, 1.5, 2.0, 2.5])
    curvatures[1:] /= h
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    sxx = (basis * (curvatures - decay)) @ basis.T
    best = rng.normal(size=(2, 6))
    # the mode without data keeps its start, or decays by the decay alone
    syx = best @ sxx
    data = gf.Regression.from_moments(sxx, syx, best @ sxx @ best.T)
    start = rng.normal(size=(2, 6))
    times = np.arange(0.0, 6.5) * h
    problem = gf.Problem(data, [gf.WeightDecay(decay)] if decay else [])
    run = gf.simulate(
        problem,
        gf.DeepLinear([start]),
        PrincipalFlow(h, **TIGHT),
        t1=float(times[-1]),
        save=np.sort(np.concatenate([times, times[:-1] + 0.3 * h])),
    )
    (found,) = run.weights
    at_steps = found[np.isin(np.round(run.time / h, 6), np.arange(7))]
    assert at_steps.shape == (7, 2, 6)
    steps = np.eye(6) - h * (sxx + decay * np.eye(6))
    w, expected = start, [start]
    for _ in range(6):
        w = w @ steps + h * syx
        expected.append(w)
    assert np.max(np.abs(expected[-1])) > 5.0  # the mode with h lambda = 2.5 diverges
    np.testing.assert_allclose(at_steps, expected, rtol=0, atol=1e-8)


def _layers(arrays: list[np.ndarray]) -> tuple[jnp.ndarray, ...]:
    return tuple(jnp.asarray(a) for a in arrays)


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("widths", [(3, 2), (2, 3, 2), (3, 2, 4, 1), (2, 3, 1, 3, 2)])
def test_the_direction_in_complex_weights(widths: tuple[int, ...]):
    """Hessian at the real part, gradient continued: both in NumPy, in complex arithmetic."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(12, widths[0]))
    y = rng.normal(size=(12, widths[-1]))
    noise, decay = 0.5, 0.3
    problem = gf.Problem(
        gf.Regression.from_samples(x, y), [gf.InputNoise(noise), gf.WeightDecay(decay)]
    )
    sxx, syx = x.T @ x / 12 + noise**2 * np.eye(widths[0]), y.T @ x / 12
    shapes = [*zip(widths[1:], widths, strict=False)]
    real = [0.8 * rng.normal(size=s) for s in shapes]
    imaginary = [0.8 * rng.normal(size=s) for s in shapes]
    flat = reference.flatten(real)
    hessian = reference.hessian(real, sxx, syx) + decay * np.eye(flat.size)
    values, vectors = np.linalg.eigh(hessian)
    h = 1.7 / values[-1]  # some modes oscillate, and some curvatures are negative
    layers = [a + 1j * b for a, b in zip(real, imaginary, strict=True)]
    g = reference.flatten(reference.gradient(layers, sxx, syx)) + decay * reference.flatten(layers)
    z = h * values
    log = np.log(np.abs(1 - z)) + 1j * np.pi * (z > 1)
    expected = vectors @ (log / z * (vectors.T @ g))
    found = direction(problem, _layers(real), _layers(imaginary), jnp.asarray(h))
    size = 1.0 + float(np.max(np.abs(expected)))
    reference.assert_close(found[0], training.unflatten(expected.real, real), size, 1e-11)
    reference.assert_close(found[1], training.unflatten(expected.imag, real), size, 1e-11)


def test_is_the_modified_flow_to_its_order():
    """-(1 + z/2 + z^2/3 + ...): the directions differ by O(h^2); on a quadratic loss, O(h^3)."""
    rng = np.random.default_rng(2)
    steps = np.array([0.02, 0.01, 0.005])
    for widths, order in (((3, 2), 3), ((3, 2), 2), ((2, 3, 2), 2)):
        x, y = rng.normal(size=(8, widths[0])), rng.normal(size=(8, widths[-1]))
        problem = gf.Problem(gf.Regression.from_samples(x, y))
        shapes = zip(widths[1:], widths, strict=False)
        weights = gf.DeepLinear([rng.normal(size=s) for s in shapes]).weights
        zeros = tuple(jnp.zeros(w.shape) for w in weights)
        gaps = []
        for h in steps:
            real, imaginary = direction(problem, weights, zeros, jnp.asarray(h))
            other = drift(problem, weights, jnp.asarray(h), order)
            assert all(not np.any(w) for w in imaginary)
            pairs = zip(real, other, strict=True)
            gaps.append(max(float(np.max(np.abs(a - b))) for a, b in pairs))
        slope = np.polyfit(np.log(steps), np.log(gaps), 1)[0]
        assert slope == pytest.approx(order, abs=0.1)


@pytest.mark.slow
def test_tracks_oscillation_that_other_flows_cannot():
    """Scalar depth 2 near its minimum with h lambda = 1.5: gradient descent steps over it."""
    h, steps = 0.75, 6
    net = gf.DeepLinear([[[1.03]], [[1.0]]])
    problem = gf.Problem(gf.Regression.whitened([[1.0]]))
    w, path = np.array([1.03, 1.0]), []
    for _ in range(steps + 1):
        path.append(w)
        w = w - h * (w[0] * w[1] - 1.0) * w[::-1]
    assert (path[1].prod() - 1.0) * (path[0].prod() - 1.0) < 0
    errors = {}
    times = h * np.arange(steps + 1)
    for dynamics in (gf.GradientFlow(**TIGHT), ModifiedFlow(h, **TIGHT), PrincipalFlow(h, **TIGHT)):
        run = gf.simulate(problem, net, dynamics, t1=float(times[-1]), save=times)
        found = np.stack([v.ravel() for v in run.weights], axis=1)
        errors[type(dynamics).__name__] = float(np.max(np.abs(found - path)))
    assert errors["PrincipalFlow"] < 0.1 * errors["GradientFlow"]
    assert errors["PrincipalFlow"] < 0.1 * errors["ModifiedFlow"]


class Cubic(AbstractPenalty):
    """|W|^3, whose gradient is no polynomial."""

    @property
    def is_stochastic(self) -> bool:
        return False

    def penalty(self, weights):
        return sum((w * w).sum() for w in weights) ** 1.5

    def penalty_gradient(self, weights):
        norm = sum((w * w).sum() for w in weights) ** 0.5
        return tuple(3.0 * norm * w for w in weights)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"PrincipalFlow.step_size must be a finite number > 0"):
        PrincipalFlow(-1.0)
    with pytest.raises(ValueError, match=r"PrincipalFlow.atol must lie in \(0, 1\)"):
        PrincipalFlow(0.1, atol=2.0)
    data = gf.Regression.whitened(np.eye(40))
    big = gf.DeepLinear([np.eye(40), np.eye(40)])
    with pytest.raises(ValueError, match=r"dense Hessian of 3200 parameters .*use ModifiedFlow"):
        gf.simulate(gf.Problem(data), big, PrincipalFlow(0.1), t1=1.0)
    small = gf.DeepLinear([[[1.0]]])
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [Cubic()])
    with pytest.raises(ValueError, match="polynomial, which Cubic need not be; use ModifiedFlow"):
        gf.simulate(problem, small, PrincipalFlow(0.1), t1=1.0)
