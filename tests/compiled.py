"""The functions under test, compiled once a shape and shared by all test modules."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

import gradflow as gf
from gradflow.streams import Stream
from gradflow.theory import expected_balancedness_drift, imbalance_drift, noise_covariance
from gradflow.theory.drift import layer_drifts
from gradflow.types import EndToEnd, Scalar, Weights

# Each program runs a few times on tiny arrays: compiling it fast matters more than fast code.
compiled = functools.partial(eqx.filter_jit, compiler_options={"xla_backend_optimization_level": 0})


class Evaluation(NamedTuple):
    """What gradflow says about a network on data."""

    loss: Scalar
    m: EndToEnd
    gradient: Weights
    balancedness: list[Array]
    imbalance: Scalar
    block_traces: Array


@compiled
def evaluate(net: gf.DeepLinear, data: gf.Regression) -> Evaluation:
    """Loss, gradients and geometry in one compiled program."""
    return Evaluation(
        gf.loss(net, data),
        gf.end_to_end_gradient(net, data),
        gf.gradient(net, data),
        gf.balancedness(net),
        gf.imbalance(net),
        gf.hessian_block_traces(net, data),
    )


per_sample_gradients = compiled(gf.per_sample_gradients)
sharpness = compiled(gf.sharpness)


class Faces(NamedTuple):
    """The averaged and the diffusion face of a problem; gradients as vectors."""

    loss: Scalar
    gradient: Array
    columns: Array
    covariance: Array


@compiled
def faces(problem: gf.Problem, weights: Weights) -> Faces:
    """Averaged loss and gradient, the columns of the diffusion factor, the covariance of M."""
    shapes = problem.normal_shapes()
    sizes = [int(np.prod(s)) for s in shapes]

    def noise(unit: Array) -> Array:
        pieces = zip(jnp.split(unit, np.cumsum(sizes)[:-1]), shapes, strict=True)
        return _flat(problem.noise(weights, tuple(piece.reshape(s) for piece, s in pieces)))

    return Faces(
        problem.averaged_loss(weights),
        _flat(problem.averaged_gradient(weights)),
        jax.vmap(noise)(jnp.eye(sum(sizes))),
        noise_covariance(problem, weights),
    )


@compiled
def sampled_gradients(problem: gf.Problem, weights: Weights, draws: tuple) -> Array:
    """The stochastic gradients of many draws (first axis), as vectors."""
    return jax.vmap(lambda draw: _flat(problem.sampled_gradient(weights, draw)))(draws)


@compiled
def draws(problem: gf.Problem, stream: Stream, widths: tuple[int, ...]) -> tuple:
    """The random numbers of all steps and paths of the stream."""
    return problem.draw(stream, widths)


class Drifts(NamedTuple):
    """Expected drifts per unit of flow time."""

    balancedness: list[Array]
    layers: Array
    imbalance: Scalar


@compiled
def drifts(problem: gf.Problem, weights: Weights, step_size: ArrayLike, discrete: bool) -> Drifts:
    """Everything that the theory says about the drift of imbalance."""
    return Drifts(
        expected_balancedness_drift(problem, weights, step_size, discrete),
        layer_drifts(problem, weights, step_size, discrete),
        imbalance_drift(problem, weights, step_size, discrete),
    )


def _flat(layers: Weights) -> Array:
    return jnp.concatenate([layer.ravel() for layer in layers])
