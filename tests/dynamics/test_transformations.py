"""Everything that a compiled or differentiated program may build: parts, data, flows, descent."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import gradflow as gf
from gradflow.backend.types import Scalar

RNG = np.random.default_rng(0)
INPUTS, TARGETS = RNG.normal(size=(7, 2)), RNG.normal(size=(7, 1))
MOMENT = np.array([[2.0, 0.3], [0.3, 1.0]])
MAP = np.array([[1.0, -0.5]])
NET = gf.DeepLinear([[[0.5, 0.2], [0.1, -0.4]], [[0.2, 0.6]]])

BUILT: dict[str, Callable[[Scalar], Any]] = {
    "GradientFlow()": lambda s: gf.GradientFlow(),
    "GradientFlow": lambda s: gf.GradientFlow(s, s, stiff=True),
    "ModifiedFlow": lambda s: gf.ModifiedFlow(s, rtol=s),
    "PrincipalFlow": lambda s: gf.PrincipalFlow(s),
    "HeavyBallFlow": lambda s: gf.HeavyBallFlow(s, s, velocity=[s * np.ones((1, 1))]),
    "StochasticFlow": lambda s: gf.StochasticFlow(s, order=2),
    "SlowFlow": lambda s: gf.SlowFlow(s, momentum=s, cell=s),
    "SVAG": lambda s: gf.SVAG(s),
    "GradientDescent": lambda s: gf.GradientDescent(s, s, nesterov=True),
    "adam": lambda s: gf.GradientDescent(s, optimizer=optax.adam),
    "FromOptax": lambda s: gf.GradientDescent(gf.FromOptax("cosine_decay_schedule",
                                                           init_value=0.1, decay_steps=9)),
    "ExactFlow": lambda s: gf.ExactFlow(),
    "WeightDecay": lambda s: gf.WeightDecay(s),
    "LabelNoise": lambda s: gf.LabelNoise(s),
    "InputNoise": lambda s: gf.InputNoise(s),
    "Dropout": lambda s: gf.Dropout(s),
    "DropConnect": lambda s: gf.DropConnect(s),
    "WeightNoise": lambda s: gf.WeightNoise(s),
    "GradientNoise": lambda s: gf.GradientNoise(s),
    "Minibatch": lambda s: gf.Minibatch(2),
    "DeepLinear": lambda s: gf.DeepLinear([[[s]], [[2.0]]]),
}  # fmt: skip

DATA: dict[str, Callable[[Any], gf.Regression]] = {
    "whitened": lambda s: gf.Regression.whitened(MAP * s, residual=0.3),
    "whitened list": lambda s: gf.Regression.whitened([[s, 1.0]]),
    "n": lambda s: gf.Regression.whitened(MAP, n=1.0 + s),
    "moments": lambda s: gf.Regression.from_moments(MOMENT * s, MAP, np.eye(1) * 9.0 * s),
    "equal eigenvalues": lambda s: gf.Regression.from_moments(np.eye(2) + (s - 1.3) * MOMENT, MAP),
    "inputs": lambda s: gf.Regression.from_samples(INPUTS * _first(s), TARGETS),
    "targets": lambda s: gf.Regression.from_samples(INPUTS, TARGETS * s),
    "standardize": lambda s: gf.Regression.from_samples(INPUTS * _first(s), TARGETS, True),
    "whiten": lambda s: gf.Regression.from_samples(INPUTS * _first(s), TARGETS, whiten=True),
}


def _first(s: Any) -> Any:
    """1 everywhere but `s` in the first entry."""
    corner = np.zeros_like(INPUTS)
    corner[0, 0] = 1.0
    return 1.0 + corner * (s - 1.0)


@pytest.mark.parametrize("name", BUILT)
def test_is_built_of_traced_settings(name: str):
    eqx.filter_eval_shape(BUILT[name], jnp.array(0.2))


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: gf.GradientFlow(rtol=-1.0), "GradientFlow.rtol"),
        (lambda: gf.GradientDescent(-0.1), "GradientDescent.step_size"),
        (lambda: gf.LabelNoise(-0.1), "LabelNoise.std"),
        (lambda: gf.HeavyBallFlow(0.1, 1.5), "HeavyBallFlow.momentum"),
        (lambda: gf.SlowFlow(0.1, cell=0.0), "SlowFlow.cell"),
        (lambda: gf.DeepLinear([[[np.inf]]]), "weights: W_1"),
        (lambda: gf.Regression.whitened([[np.nan]]), "data.target"),
    ],
)
def test_known_values_are_checked_inside_jit_too(build: Callable[[], Any], field: str):
    with pytest.raises(ValueError, match=field):
        eqx.filter_eval_shape(lambda s: (build(), s), jnp.array(0.2))


def _of_all_fields(problem: gf.Problem) -> Scalar:
    """A number that depends on all that dynamics use of a problem."""
    mixed = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    roots = problem.root + problem.inverse_root + problem.noisy_root + problem.noisy_inverse_root
    data = problem.data
    return (
        problem.averaged_loss(NET.weights) * data.n
        + jnp.sum(mixed * roots)
        + jnp.sum(data.best_map)
        + data.irreducible_loss
        + jnp.sum(data.sxx_eigenvalues)
    )


@pytest.mark.parametrize("name", DATA)
def test_data_of_a_traced_number_have_its_derivative(name: str):
    """Beside differences of data built of numbers, in NumPy."""

    def value(s: Any) -> Scalar:
        return _of_all_fields(gf.Problem(DATA[name](s), [gf.InputNoise(0.2)]))

    traced, slope = eqx.filter_jit(jax.value_and_grad(value))(1.3)
    np.testing.assert_allclose(traced, value(1.3), rtol=1e-13)
    difference = (value(1.3 + 1e-5) - value(1.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(jax.jacfwd(value)(1.3), slope, rtol=1e-12, atol=1e-12)


def test_columns_cannot_be_dropped_by_what_is_not_known():
    with pytest.raises(TypeError, match="drop_constant"):
        jax.eval_shape(
            lambda x: gf.Regression.from_samples(x, TARGETS, drop_constant=True).sxx, INPUTS
        )


# Flows


def _end_to_end(first: float, target: float) -> float:
    """The product of w1(0) = first, w2(0) = 0.4 at t = 1.

    z = (w1 + w2)^2 is logistic between 2 T +- sqrt(4 T^2 + u^2), u = w1^2 - w2^2.
    """
    u = first**2 - 0.4**2
    spread = np.sqrt(4 * target**2 + u**2)
    high, low = 2 * target + spread, 2 * target - spread
    start = (first + 0.4) ** 2
    ratio = (start - high) / (start - low) * np.exp(-spread)
    z = (high - low * ratio) / (1 - ratio)
    return (z - u**2 / z) / 4


def _flowed(first_and_target: Array, solver: diffrax.AbstractSolver | None) -> Scalar:
    first, target = first_and_target
    problem = gf.Problem(gf.Regression.whitened(target[None, None]))
    net = gf.DeepLinear([first[None, None], [[0.4]]])
    w1, w2 = gf.GradientFlow(1e-11, 1e-13, solver).solve(problem, net, [1.0])
    return w1[-1, 0, 0] * w2[-1, 0, 0]


AT = np.array([1.2, 0.9])


@pytest.fixture(scope="module")
def differences() -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian of the closed form at `AT`, by central differences."""
    d = 1e-4
    steps = d * np.eye(2)
    slope = [(_end_to_end(*(AT + e)) - _end_to_end(*(AT - e))) / (2 * d) for e in steps]
    curvature = [
        [
            (
                _end_to_end(*(AT + e + f))
                - _end_to_end(*(AT + e - f))
                - _end_to_end(*(AT - e + f))
                + _end_to_end(*(AT - e - f))
            )
            / (4 * d**2)
            for f in steps
        ]
        for e in steps
    ]
    return np.array(slope), np.array(curvature)


@pytest.mark.slow
def test_a_flow_is_differentiated_forwards_by_start_and_target(differences):
    slope = jax.jit(jax.jacfwd(lambda at: _flowed(at, None)))(AT)
    np.testing.assert_allclose(slope, differences[0], rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner", [jax.jacrev, pytest.param(jax.jacfwd, marks=pytest.mark.slow)], ids=["rev", "fwd"]
)
def test_a_flow_has_second_derivatives(inner, differences):
    def both(at: Array) -> tuple[Array, Array]:
        slope = inner(lambda at: _flowed(at, diffrax.Tsit5()))(at)
        return slope, slope

    curvature, slope = jax.jit(jax.jacfwd(both, has_aux=True))(AT)
    np.testing.assert_allclose(slope, differences[0], rtol=1e-7)
    np.testing.assert_allclose(curvature, differences[1], rtol=1e-5)


@pytest.mark.slow
def test_directions_and_starts_may_be_batched(differences):
    """Under `vmap` within and around the derivative, with one direction for all starts."""
    starts = jnp.stack([AT, AT + 0.1, AT])

    def along(at: Array) -> Scalar:
        return jax.jvp(lambda at: _flowed(at, diffrax.Tsit5()), (at,), (jnp.array([1.0, 0.0]),))[1]

    forwards = jax.jit(jax.vmap(along))(starts)
    backwards = jax.jit(jax.vmap(jax.grad(lambda at: _flowed(at, diffrax.Tsit5()))))(starts)
    np.testing.assert_allclose(forwards[0], differences[0][0], rtol=1e-7)
    np.testing.assert_allclose(forwards, backwards[:, 0], rtol=1e-8)


FLOWS = [
    gf.HeavyBallFlow(0.1, 0.5),
    *(
        pytest.param(flow, marks=pytest.mark.slow)
        for flow in (gf.GradientFlow(stiff=True), gf.ModifiedFlow(0.1), gf.PrincipalFlow(0.1))
    ),
]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: type(f).__name__)
def test_every_flow_has_both_modes(flow: gf.dynamics.ode.AbstractOdeFlow):
    """By rule; nothing is compiled."""
    problem = gf.Problem(gf.Regression.whitened(MAP))

    def end(scale: Scalar) -> Array:
        net = jax.tree.map(lambda w: scale * w, NET)
        return jnp.sum(flow.solve(problem, net, [0.0, 0.5])[0])

    one = jax.ShapeDtypeStruct((), float)
    for derivative in (jax.jacfwd(end), jax.jacrev(end), jax.hessian(end)):
        assert jax.eval_shape(derivative, one).shape == ()


def test_simulate_says_what_to_use_inside_jit():
    problem = gf.Problem(gf.Regression.whitened(MAP))
    for flow, instead in (
        (gf.GradientFlow(), r"GradientFlow\(...\).solve\(problem, net, times\)"),
        (gf.StochasticFlow(0.1), "StochasticFlow runs outside of them only"),
    ):
        for watched in (
            lambda s, flow=flow: gf.simulate(
                problem, jax.tree.map(lambda w: s * w, NET), flow, t1=1.0
            ),
            lambda s, flow=flow: gf.simulate(problem, NET, flow, t1=1.0),
        ):
            with pytest.raises(TypeError, match=instead):
                jax.eval_shape(watched, 1.0)
