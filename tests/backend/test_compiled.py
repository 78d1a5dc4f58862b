"""Compilation with options of our choice; the values are those of the function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.backend import compiled as module
from gradflow.backend.compiled import KERNELS, LITTLE, LONG, ONCE, compiled


def cubes(x: Any, scale: float = 1.0) -> Any:
    """The sum of cubes."""
    return scale * jnp.sum(x**3)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that programs are compiled with."""
    options: list[dict[str, Any]] = []
    filter_jit = module.eqx.filter_jit

    def telling(function: Any, **given: Any) -> Any:
        if "compiler_options" in given:
            options.append(given["compiler_options"])
        return filter_jit(function, **given)

    monkeypatch.setattr(module.eqx, "filter_jit", telling)
    return options


def test_the_values_are_those_of_the_function():
    x = np.array([1.0, 2.0, -3.0])
    np.testing.assert_allclose(compiled(cubes)(jnp.asarray(x), scale=2.0), -36.0, rtol=1e-15)
    assert compiled(cubes).__name__ == "cubes"
    assert compiled(cubes).__doc__ == "The sum of cubes."


def test_transformations_make_it_a_part_of_their_program():
    """XLA takes options of whole programs only; known arguments may be inside of one, too."""
    function, x = compiled(cubes), jnp.array([1.0, 2.0])
    np.testing.assert_allclose(jax.grad(function)(x), [3.0, 12.0], rtol=1e-15)
    np.testing.assert_allclose(jax.hessian(function)(x), np.diag([6.0, 12.0]), rtol=1e-15)
    np.testing.assert_allclose(jax.vmap(function)(x[:, None]), [1.0, 8.0], rtol=1e-15)
    np.testing.assert_allclose(jax.jit(lambda y: y * function(x))(2.0), 18.0, rtol=1e-15)
    np.testing.assert_allclose(jax.jit(function)(x), 9.0, rtol=1e-15)


def test_little_is_not_optimized(told: list[dict[str, Any]]):
    function = compiled(cubes)
    function(jnp.zeros(3))
    function(jnp.zeros(LITTLE + 1))
    compiled(cubes, options=LONG)(jnp.zeros(3))
    assert told == [ONCE, KERNELS, LONG]


def test_options_that_xla_does_not_know_are_left_out(
    told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    """As those of another version would be."""
    monkeypatch.setattr(module, "_unknown", set())
    function = compiled(cubes, options={"xla_of_tomorrow": 1, **KERNELS, "xla_of_yesterday": 2})
    assert float(function(jnp.array([2.0]))) == 8.0
    assert told[-1] == KERNELS
    assert module._unknown == {"xla_of_tomorrow", "xla_of_yesterday"}


def test_other_failures_are_not_hidden():
    def fails(x: Any) -> Any:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        compiled(fails)(jnp.zeros(2))


def test_memory_is_given_away_only_where_asked_for():
    first, second = jnp.arange(4.0), jnp.arange(4.0)
    compiled(lambda a, b: (a + b, b), donate="all-except-first")(first, second)
    assert not first.is_deleted()
    assert second.is_deleted()
    kept = jnp.arange(4.0)
    compiled(lambda a: a + 1.0)(kept)
    assert not kept.is_deleted()
