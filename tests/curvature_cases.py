"""Problems of every kind for the tests of curvature, and their Hessians by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
from compiled import compiled
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

import gradflow as gf
from gradflow.backend.types import Scalar, Weights
from gradflow.regularizers import DropConnect, Dropout, GradientNoise, WeightNoise
from gradflow.regularizers.base import AbstractPenalty


class Quartic(AbstractPenalty):
    """A penalty of a user: the sum of fourth powers of all weights."""

    @property
    def is_stochastic(self) -> bool:
        return False

    def penalty(self, weights: Weights) -> Scalar:
        return sum((jnp.sum(w**4) for w in weights), start=jnp.zeros(()))

    def penalty_gradient(self, weights: Weights) -> Weights:
        return tuple(4.0 * w**3 for w in weights)


def network(widths: tuple[int, ...], seed: int = 0) -> gf.DeepLinear:
    rng = np.random.default_rng(seed)
    pairs = zip(widths[1:], widths[:-1], strict=True)
    return gf.DeepLinear([rng.normal(size=pair) / np.sqrt(pair[1]) for pair in pairs])


def samples(widths: tuple[int, ...], n: int, seed: int = 1) -> gf.Regression:
    """Data of n rows; fewer rows than inputs make the moment of the inputs singular."""
    rng = np.random.default_rng(seed)
    return gf.Regression.from_samples(
        rng.normal(size=(n, widths[0])), rng.normal(size=(n, widths[-1]))
    )


def minimum(widths: tuple[int, ...], sxx: np.ndarray, seed: int = 0):
    """A network and data of the given input moment whose minima include it."""
    net = network(widths, seed)
    return net, gf.Regression.from_moments(sxx, np.asarray(net.end_to_end) @ sxx)


# Depths 1 to 4, rectangular, singular and regular data, each regularizer and their combinations.
CASES = {
    "one layer": ((3, 2), 7, []),
    "two layers, singular inputs": ((4, 3, 2), 3, []),
    "four layers": ((2, 3, 1, 2, 3), 7, []),
    "noise on the data, decay": (
        (3, 2, 3),
        7,
        [gf.InputNoise(0.6), gf.LabelNoise(0.5), gf.Minibatch(3), gf.WeightDecay(0.3)],
    ),
    "noise on the gradient, penalties": (
        (2, 3, 2),
        7,
        [GradientNoise(0.4), gf.WeightDecay(0.3), Quartic()],
    ),
    "dropout": ((3, 4, 2, 2), 7, [Dropout(0.3), Dropout(0.2, "gaussian", layers=[2])]),
    "noise on one layer": ((3, 2), 2, [DropConnect(0.3), WeightNoise(0.4)]),
    "all noise": (
        (2, 3, 2, 2),
        7,
        [
            Dropout(0.3, layers=[1]),
            DropConnect(0.2, layers=[2, 3]),
            WeightNoise(0.5),
            WeightNoise(0.3, anticorrelated=True, layers=[3]),
            gf.InputNoise(0.4),
            gf.WeightDecay(0.2),
            Quartic(),
        ],
    ),
}


def case(name: str) -> tuple[gf.DeepLinear, gf.Problem]:
    widths, n, regularizers = CASES[name]
    return network(widths), gf.Problem(samples(widths, n), regularizers)


@compiled
def autodiff_hessian(problem: gf.Problem, weights: Weights) -> Array:
    """The Hessian of the averaged loss by nested automatic differentiation of its value."""
    flat, unravel = ravel_pytree(weights)
    return jax.hessian(lambda w: problem.averaged_loss(unravel(w)))(flat)
