"""Linear systems of Newton's method: small and large ones, against NumPy and an explicit method."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import training

import gradflow as gf
from gradflow.solvers import dense_or_krylov
from gradflow.solvers.dense_or_krylov import LARGEST_DENSE, RTOL, DenseOrKrylov

SIZES = [5, LARGEST_DENSE + 1]


def system(size: int) -> tuple[np.ndarray, np.ndarray]:
    """1 + gamma h H of a Hessian with three clusters of eigenvalues, made unsymmetric."""
    rng = np.random.default_rng(size)
    q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    clusters = np.resize([0.0, 1.0, 300.0], size) * rng.uniform(0.99, 1.01, size)
    skew = rng.normal(size=(size, size)) / size
    return np.eye(size) + (q * clusters) @ q.T + 0.1 * (skew - skew.T), rng.normal(size=size)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("size", SIZES)
def test_solution_of_the_system_and_of_its_transpose(size: int):
    matrix, right = system(size)

    @jax.jit
    def solve(matrix, right):
        operator = lx.MatrixLinearOperator(matrix)
        return lx.linear_solve(operator, right, DenseOrKrylov(), throw=False).value

    found = solve(jnp.asarray(matrix), jnp.asarray(right))
    rest = matrix @ np.asarray(found) - right
    assert np.abs(rest).max() <= 2.0 * RTOL * np.abs(right).max()
    # The derivative of a . A^-1 b with respect to b is A^-T a.
    a = np.random.default_rng(1).normal(size=size)
    slope = jax.grad(lambda b: a @ solve(jnp.asarray(matrix), b))(jnp.asarray(right))
    rest = matrix.T @ np.asarray(slope) - a
    assert np.abs(rest).max() <= 2.0 * RTOL * np.abs(a).max()


def test_a_large_matrix_is_never_formed():
    size = LARGEST_DENSE + 1
    shape = jax.ShapeDtypeStruct((size,), jnp.float64)
    operator = lx.FunctionLinearOperator(lambda x: 2.0 * x, shape)
    program = jax.make_jaxpr(
        lambda b: lx.linear_solve(operator, b, DenseOrKrylov(), throw=False).value
    )(jnp.ones(size))
    assert f"f64[{size},{size}]" not in str(program)


@pytest.mark.slow
def test_stiff_gradient_flow_by_krylov_follows_an_explicit_method(monkeypatch: pytest.MonkeyPatch):
    """Curvatures from 0.3 to 900; 27 weights."""
    monkeypatch.setattr(dense_or_krylov, "LARGEST_DENSE", 20)
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2))
    layers = [(left * [0.5, 4.0, 30.0]) @ right.T, *rng.normal(size=(2, 3, 3)) * 0.7]
    target = np.diag([2.0, 1.0, 0.5])
    times = np.linspace(0.0, 1.0, 4)
    expected = training.flow(layers, np.eye(3), target, times)
    run = gf.simulate(
        gf.Problem(gf.Regression.whitened(target)),
        gf.DeepLinear(layers),
        gf.GradientFlow(1e-7, 1e-9, stiff=True),
        t1=1.0,
        save=times,
    )
    for own, w in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(own, w, atol=2e-5)
