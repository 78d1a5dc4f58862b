"""The functions under test, compiled once a shape and shared by all test modules."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

import gradflow as gf
from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.random.streams import Stream
from gradflow.theory import expected_balancedness_drift, imbalance_drift, noise_covariance
from gradflow.theory.drift import layer_drifts

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


def normal_leaves(problem: gf.Problem, weights: Weights) -> list[jax.ShapeDtypeStruct]:
    """The arrays of normals that the diffusion factor takes, in order."""
    widths = (weights[0].shape[1], *(w.shape[0] for w in weights))
    return jax.tree.leaves(problem.normal_shapes(widths))


def as_normals(problem: gf.Problem, weights: Weights, pieces: Sequence[Array]) -> tuple:
    """Flat arrays, one for each of `normal_leaves`, as the diffusion factor takes them."""
    widths = (weights[0].shape[1], *(w.shape[0] for w in weights))
    shapes, tree = jax.tree.flatten(problem.normal_shapes(widths))
    shaped = [piece.reshape(s.shape) for piece, s in zip(pieces, shapes, strict=True)]
    return jax.tree.unflatten(tree, shaped)


@compiled
def faces(problem: gf.Problem, weights: Weights) -> Faces:
    """Averaged loss and gradient, the columns of the diffusion factor, the covariance of M."""
    sizes = [leaf.size for leaf in normal_leaves(problem, weights)]

    def noise(unit: Array) -> Array:
        pieces = jnp.split(unit, np.cumsum(sizes)[:-1])
        return _flat(problem.noise(weights, as_normals(problem, weights, pieces)))

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


class InnerFaces(NamedTuple):
    """The averaged and the sampled face of noise inside the network; gradients as vectors."""

    loss: Scalar
    gradient: Array
    gradients: Array
    centred: Array


@compiled
def inner_faces(problem: gf.Problem, weights: Weights, draws: tuple) -> InnerFaces:
    """Averages, and the gradients of many draws (first axis) at the weights that noise stays in."""

    def one(draw: tuple) -> tuple[Array, Array]:
        shift = problem.weight_shift(weights, draw)
        at = tuple(w + s for w, s in zip(weights, shift, strict=True))
        centred = _flat(problem.centred_gradient(weights, draw))
        return _flat(problem.sampled_gradient(at, draw)), centred

    loss, gradient = problem.averaged_loss(weights), problem.averaged_gradient(weights)
    return InnerFaces(loss, _flat(gradient), *jax.vmap(one)(draws))


@compiled
def centred_statistics(
    problem: gf.Problem, weights: Weights, stream: Stream, widths: tuple[int, ...]
) -> tuple[Array, Array]:
    """Mean and standard error of the centred gradient over the draws of a stream."""
    drawn = problem.draw(stream, widths)
    flat = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, -1, 1).reshape(-1, *leaf.shape[1:-1]), drawn
    )
    g = jax.vmap(lambda draw: _flat(problem.centred_gradient(weights, draw)))(flat)
    return g.mean(axis=0), g.std(axis=0) / np.sqrt(len(g))


@compiled
def averages(problem: gf.Problem, weights: Weights) -> tuple[Scalar, Array]:
    """Averaged loss and gradient, the latter as a vector."""
    return problem.averaged_loss(weights), _flat(problem.averaged_gradient(weights))


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
