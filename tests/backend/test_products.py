"""Products of small matrices: every form against NumPy, derivatives, and groups of paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.backend.products import (
    FEWEST_LANES,
    MOST_FUSED,
    MOST_SUMMED,
    MOST_SUMMED_ON_ACCELERATORS,
    in_groups,
    paths_together,
    product,
)

# One inner width for each form: fused sum, stored sum, library call.
INNER = [MOST_FUSED, 3, MOST_SUMMED + 1]
AXES = [(1, 0), (0, 0), (1, 1), (0, 1)]
PATHS = 5


def factors(inner, axes, rows=4, columns=3):
    """Two matrices of every path that share the axis of length `inner`."""
    rng = np.random.default_rng(inner)
    first = (rows, inner) if axes[0] else (inner, rows)
    second = (columns, inner) if axes[1] else (inner, columns)
    return (jnp.asarray(rng.normal(size=(*shape, PATHS))) for shape in (first, second))


def in_numpy(a, b, axes):
    """The same product, path by path."""
    return np.stack([np.tensordot(a[..., r], b[..., r], axes) for r in range(PATHS)], axis=-1)


@pytest.mark.few_cases(5)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("inner", INNER)
def test_product_of_one_path_and_of_an_ensemble(inner, axes):
    a, b = factors(inner, axes)
    expected = in_numpy(a, b, axes)

    def multiply(x, y):
        return product(x, y, axes)

    one = multiply(a[..., 0], b[..., 0])
    np.testing.assert_allclose(one, expected[..., 0], rtol=1e-12, atol=1e-13)
    ensemble = jax.jit(jax.vmap(multiply, in_axes=-1, out_axes=-1))(a, b)
    np.testing.assert_allclose(ensemble, expected, rtol=1e-12, atol=1e-13)
    first = jax.jit(jax.vmap(multiply))(jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, -1, 0))
    np.testing.assert_allclose(np.moveaxis(first, 0, -1), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("inner", [MOST_SUMMED_ON_ACCELERATORS, MOST_SUMMED_ON_ACCELERATORS + 1])
def test_the_forms_of_accelerators(inner, axes, monkeypatch):
    monkeypatch.setattr("gradflow.backend.products.on_cpu", lambda: False)
    a, b = factors(inner, axes)
    found = jax.jit(jax.vmap(lambda x, y: product(x, y, axes), -1, -1))(a, b)
    np.testing.assert_allclose(found, in_numpy(a, b, axes), rtol=1e-12, atol=1e-13)
    assert paths_together((inner, 2), 1000) == 1000


@pytest.mark.few_cases(5)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("inner", INNER)
def test_a_factor_may_be_shared_by_all_paths(inner, axes):
    a, b = factors(inner, axes)
    one_a, one_b = (np.repeat(x[..., :1], PATHS, axis=-1) for x in (a, b))

    def multiply(x, y):
        return product(x, y, axes)

    left = jax.vmap(multiply, in_axes=(None, -1), out_axes=-1)(a[..., 0], b)
    right = jax.vmap(multiply, in_axes=(-1, None), out_axes=-1)(a, b[..., 0])
    np.testing.assert_allclose(left, in_numpy(one_a, b, axes), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(right, in_numpy(a, one_b, axes), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("inner", INNER)
def test_derivatives_against_those_of_numpy_products(inner, axes):
    a, b = factors(inner, axes)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, PATHS)))

    def weighted(x, y, w):
        return jnp.sum(w * product(x, y, axes))

    # The gradient of <w, A B> is (w B^T, A^T w), in the orientation of each factor.
    to_a = [np.tensordot(weights[..., r], b[..., r], (1, 1 - axes[1])) for r in range(PATHS)]
    to_b = [np.tensordot(weights[..., r], a[..., r], (0, 1 - axes[0])) for r in range(PATHS)]
    expected_a = np.stack([g if axes[0] else g.T for g in to_a], axis=-1)
    expected_b = np.stack([g if axes[1] else g.T for g in to_b], axis=-1)

    def total(x, y, w):
        return jnp.sum(jax.vmap(weighted, in_axes=-1)(x, y, w))

    of_each = jax.vmap(jax.grad(weighted, argnums=(0, 1)), in_axes=-1, out_axes=-1)
    of_sum = jax.grad(total, argnums=(0, 1))
    for gradients in (of_each(a, b, weights), of_sum(a, b, weights)):
        np.testing.assert_allclose(gradients[0], expected_a, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gradients[1], expected_b, rtol=1e-12, atol=1e-12)


def test_second_derivatives_of_a_chain_inside_two_maps():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2, PATHS)))

    def chain(m):
        return jnp.sum(product(product(m, m), m, (0, 0)) ** 2)

    def plain(m):
        return jnp.sum(((m @ m).T @ m) ** 2)

    def hessians(function):
        inner = jax.vmap(jax.hessian(function), in_axes=-1, out_axes=-1)
        return jax.jit(jax.vmap(inner, in_axes=-1, out_axes=-1))(x)

    np.testing.assert_allclose(hessians(chain), hessians(plain), rtol=1e-10, atol=1e-10)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match=r"shapes \(2, 3\) and \(2, 3\) do not fit"):
        product(jnp.ones((2, 3)), jnp.ones((2, 3)))


def test_a_chain_of_products_forms_every_entry_once():
    """XLA would otherwise compute a factor again for every entry of the next product."""
    d, depth = 6, 5
    layers = tuple(jnp.ones((d, d, 16)) for _ in range(depth))

    def chain(layers):
        total = layers[0]
        for w in layers[1:]:
            total = product(w, total)
        return total

    compiled = jax.jit(jax.vmap(chain, in_axes=-1, out_axes=-1)).lower(layers).compile()
    cost = compiled.cost_analysis()
    assert cost is not None
    needed = (depth - 1) * 2 * d**3 * 16
    assert cost["flops"] < 1.2 * needed


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("paths", [1, 4, 7, 8])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_groups_put_together_are_the_ensemble(size, paths):
    x = jnp.arange(3.0 * paths).reshape(3, paths)
    numbers = jnp.arange(paths, dtype=jnp.uint32)
    seen = []

    def move(group):
        values, of_paths = group
        seen.append(values.shape[-1])
        return {"moved": values**2 + of_paths, "first": values[0] > 2}

    moved = in_groups(move, (x, numbers), size)
    np.testing.assert_array_equal(moved["moved"], np.asarray(x) ** 2 + np.arange(paths))
    np.testing.assert_array_equal(moved["first"], np.arange(paths) > 2)
    assert set(seen) == {min(size, paths)}


def test_paths_together():
    # A layer of 20 paths of width 10 takes 15.6 KB of the 16 KB: 50 groups, of whole vectors.
    assert paths_together((10, 10, 10), 1000) == paths_together((2, 10, 1), 1000) == 24
    # 227 paths of width 3 fit: two groups of 225, or three of 152.
    assert paths_together((3, 3), 450) == 232
    assert paths_together((3, 3), 456) == 152
    assert paths_together((10, 10), 7) == 7
    assert paths_together((MOST_SUMMED, 1), 1000) == FEWEST_LANES
    assert paths_together((MOST_SUMMED + 1, 1), 1000) == 1
    assert paths_together((MOST_FUSED, 1), 10**6) == 10**6
