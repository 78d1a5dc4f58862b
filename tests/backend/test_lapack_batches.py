"""No batch of decompositions is large enough to be handed to the threads that wait for it."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr

import gradflow as gf
from gradflow.backend.lapack_batches import (
    CHEAPER,
    COST,
    LAPACK,
    POOLED,
    decomposed_together,
    decomposes,
    traced,
)
from gradflow.observables import observe, resolve
from gradflow.random.streams import Source

MATRIX = jax.ShapeDtypeStruct((4, 4), float)
RNG = np.random.default_rng(5)
PATHS = 300


def ensemble(*widths):
    """Random layers of many paths."""
    shapes = zip(widths[1:], widths[:-1], strict=True)
    return tuple(jnp.asarray(RNG.normal(size=(*shape, PATHS))) for shape in shapes)


@pytest.mark.parametrize(
    "function",
    [
        jnp.linalg.eigh,
        jnp.linalg.qr,
        lambda a: jax.lax.fori_loop(0, 3, lambda _, b: jnp.linalg.inv(b), a),
        lambda a: jax.lax.cond(a[0, 0] > 0.0, jnp.linalg.cholesky, jnp.negative, a),
        lambda a: lx.linear_solve(lx.MatrixLinearOperator(a), a[0]).value,
    ],
)
def test_decompositions_are_found_wherever_they_are(function):
    assert decomposes(function, MATRIX)


def test_products_are_no_decompositions():
    assert not decomposes(lambda a: jnp.sum(a @ a.T), MATRIX)


@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 3, 2), (10, 1, 10), (30, 30, 30)])
def test_groups_are_small_or_of_one_path(widths, monkeypatch):
    weights = ensemble(*widths)
    rows = max(sum(w[..., 0].size for w in weights), widths[0] * widths[-1])
    few = decomposed_together(weights)
    assert few == 1 or few * COST * rows**3 < POOLED
    assert few == PATHS or (few + 1) * COST * rows**3 >= POOLED
    monkeypatch.setattr("gradflow.backend.lapack_batches.on_cpu", lambda: False)
    assert decomposed_together(weights) == PATHS


def batches(jaxpr):
    """(matrices in the batch, operations) of every LAPACK operation of a program."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in LAPACK:
            for shape in (v.aval.shape for v in equation.invars if getattr(v.aval, "ndim", 0) > 1):
                count = int(np.prod(shape[:-2]))
                yield count, count * CHEAPER.get(name, COST) * max(shape[-2:]) ** 3
        inner = [p for p in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)
        ) if isinstance(p, ClosedJaxpr)]  # fmt: skip
        for parameter in inner:
            yield from batches(parameter.jaxpr)


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        (
            lambda a: jnp.linalg.qr(a[:2, :2])[1][0, 0] + jnp.linalg.eigvalsh(a),
            CHEAPER["eigh"] * 64,
        ),
        (lambda a: jax.lax.map(jnp.linalg.inv, a[None])[0], COST * 64),
        (lambda a: jnp.linalg.svd(a[:2])[1], COST * 64),
        (lambda a: jnp.linalg.cholesky(jnp.stack([a, a, a])), 3 * CHEAPER["cholesky"] * 64),
        (lambda a: a @ a, 0),
        (lambda a: lx.linear_solve(lx.MatrixLinearOperator(a), a[0]).value, np.inf),
    ],
)
def test_the_largest_decomposition_of_a_path_counts(function, operations):
    """Not the size of the network, unless lineax hides the matrix."""
    assert traced(function, MATRIX)[1] == operations
    weights = ensemble(20, 20, 20)
    few = decomposed_together(weights, operations)
    assert few == (PATHS if operations == 0 else max(min((POOLED - 1) // operations, PATHS), 1))


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 3, 2)])
def test_observables_of_an_ensemble(widths):
    weights = ensemble(*widths)
    problem = gf.Problem(gf.Regression.whitened(RNG.normal(size=(widths[-1], widths[0]))))
    watched, dynamics = resolve(["sharpness", "loss"]), gf.GradientDescent(0.1)

    def watch(w):
        return observe(watched, w, problem, dynamics)

    found = list(batches(jax.make_jaxpr(watch)(weights).jaxpr))
    assert found
    assert all(count == 1 or work < POOLED for count, work in found)
    together = jax.jit(watch)(weights)
    for path in (0, 7, PATHS - 1):
        alone = watch(tuple(w[..., path : path + 1] for w in weights))
        np.testing.assert_allclose(together["sharpness"][path], alone["sharpness"][0], rtol=1e-10)


@pytest.mark.slow
def test_the_velocities_of_a_slow_flow():
    weights = ensemble(2, 3, 2)
    problem = gf.Problem(gf.Regression.whitened(RNG.normal(size=(2, 2))), [gf.InputNoise(0.1)])
    flow = gf.SlowFlow(0.01)
    start = flow.init(problem, tuple(w[..., :1] for w in weights))
    many = jax.tree.map(lambda leaf: jnp.repeat(leaf, PATHS, axis=-1), start)
    source = Source(jax.random.key(0), jnp.arange(PATHS))

    def go(state):
        return flow.advance(problem, state, jnp.asarray(0.0), jnp.asarray(1.0), source, 1)

    found = list(batches(jax.make_jaxpr(go)(many).jaxpr))
    assert found
    assert all(count == 1 or work < POOLED for count, work in found)
