"""The Hessian operator against complex steps in NumPy and automatic differentiation of the loss."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import reference
from compiled import compiled
from curvature_cases import CASES, autodiff_hessian, case, network, samples
from hypothesis import given
from jaxtyping import Array
from reference import as_numpy, assert_close, scale
from strategies import cases

import gradflow as gf
from gradflow.backend.types import Weights
from gradflow.geometry import hessian, hessian_vector_product
from gradflow.geometry.hessian import dense_hessian

matrix_of = compiled(lambda net, data: hessian(net, data).as_matrix())


@compiled
def dense_and_product(
    net: gf.DeepLinear, problem: gf.Problem, direction: Weights
) -> tuple[Array, Weights]:
    return dense_hessian(net, problem), hessian_vector_product(net, problem, direction)


@pytest.mark.slow
@given(cases())
def test_matrix_of_the_loss(case):
    """Rows and columns of the operator are those of the derivative of the gradient."""
    net, data = case
    full = reference.hessian(as_numpy(net.weights), np.asarray(data.sxx), np.asarray(data.syx))
    assert_close([matrix_of(net, data)], [full], scale(net.weights, [full]))


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("name", CASES)
def test_hessian_of_the_averaged_loss(name):
    net, problem = case(name)
    full = np.asarray(autodiff_hessian(problem, net.weights))
    size = scale([full])
    rng = np.random.default_rng(2)
    direction = tuple(jnp.asarray(rng.normal(size=w.shape)) for w in net.weights)
    dense, moved = dense_and_product(net, problem, direction)
    assert_close([dense], [full], size)
    np.testing.assert_array_equal(dense, dense.T)
    assert [v.shape for v in moved] == [w.shape for w in net.weights]
    expected = full @ reference.flatten(as_numpy(direction))
    assert_close([reference.flatten(as_numpy(moved))], [expected], 10 * size)


def test_operator_says_what_it_is():
    net, problem = case("two layers, singular inputs")
    operator = hessian(net, problem)
    assert lx.is_symmetric(operator)
    assert [s.shape for s in jax.tree.leaves(operator.in_structure())] == [(3, 4), (2, 3)]
    assert operator.in_structure() == operator.out_structure()
    # As a linear operator it can be solved with: here (H + c I) x = b with c above -lambda_min.
    shift = lx.IdentityLinearOperator(operator.in_structure())
    moved = operator + 50.0 * shift
    solution = lx.linear_solve(
        lx.TaggedLinearOperator(moved, lx.positive_semidefinite_tag),
        net.weights,
        lx.CG(rtol=1e-12, atol=1e-12),
    ).value
    full = np.asarray(autodiff_hessian(problem, net.weights))
    expected = np.linalg.solve(
        full + 50.0 * np.eye(len(full)), reference.flatten(as_numpy(net.weights))
    )
    np.testing.assert_allclose(reference.flatten(as_numpy(solution)), expected, rtol=1e-9)


@pytest.mark.parametrize("function", [hessian, gf.sharpness, gf.hessian_trace])
def test_network_that_does_not_fit(function):
    with pytest.raises(ValueError, match=r"net: widths \(3, 2\) do not fit the data with 4 inputs"):
        function(network((3, 2)), samples((4, 2), 5))
