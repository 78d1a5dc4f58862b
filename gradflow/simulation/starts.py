"""Where the paths of a run start."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from gradflow.backend.compiled import compiled
from gradflow.backend.tracing import float_of
from gradflow.backend.types import Weights
from gradflow.checks import check_fit, is_count
from gradflow.dynamics.base import squared_norm
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.regularizers.base import AbstractPenalty

MOST_PATHS = 2**32
"""Paths are numbered with 32 bits."""


def starts_of(
    problem: Problem, net: DeepLinear | Sequence[DeepLinear], replicas: int | None
) -> tuple[list[Weights], int]:
    """The initial weights, of every path or one for all, and the number of paths."""
    if not isinstance(problem, Problem):
        raise TypeError(
            f"problem must be a Problem such as Problem(data, [...]); got {type(problem).__name__}."
        )
    nets = [net] if isinstance(net, DeepLinear) else net
    if not isinstance(nets, Sequence) or not nets or not _are_networks(nets):
        raise TypeError(
            f"net must be a DeepLinear or a non-empty sequence of them; got {type(net).__name__}."
        )
    d_in, d_out = problem.data.d_in, problem.data.d_out
    for n in nets:
        if n.widths != nets[0].widths:
            raise ValueError(
                f"net: all networks need equal widths; got {nets[0].widths} and {n.widths}."
            )
    widths = nets[0].widths
    check_fit("net: widths", widths, d_in, d_out)
    if replicas is not None and not is_count(replicas):
        raise ValueError(f"replicas must be an integer >= 1 or None; got {replicas!r}.")
    if replicas is not None and replicas > MOST_PATHS:
        raise ValueError(
            f"replicas: at most {MOST_PATHS} paths have random numbers of their own; got "
            f"{float_of(replicas):.3g}."
        )
    if isinstance(net, DeepLinear):
        return [net.weights], 1 if replicas is None else int(replicas)
    if replicas is not None and replicas != len(nets):
        raise ValueError(
            f"replicas={replicas} but {len(nets)} networks were given; leave replicas out, the "
            "networks are the replicas."
        )
    return [n.weights for n in nets], len(nets)


def _are_networks(nets: Sequence[Any]) -> bool:
    return all(isinstance(n, DeepLinear) for n in nets)


def stacked(starts: list[Weights], first: int, count: int) -> Weights:
    """The layers of so many paths from number `first` on, path axis last.

    One start serves all paths; where there is none left, the last one is repeated.
    """
    if len(starts) == 1:
        layers = [np.repeat(np.asarray(w)[..., None], count, axis=-1) for w in starts[0]]
    else:
        some = [starts[min(r, len(starts) - 1)] for r in range(first, first + count)]
        layers = [np.stack(copies, axis=-1) for copies in zip(*some, strict=True)]
    return jax.device_put(tuple(layers))


def check_norms(weights: Weights) -> None:
    """Raise a `ValueError` for weights whose squares no float can hold."""
    norms = np.asarray(squared_norm(weights))
    if not np.all(np.isfinite(norms)):
        dtype = weights[0].dtype
        largest = max(float(np.abs(w[..., np.argmin(np.isfinite(norms))]).max()) for w in weights)
        raise ValueError(
            f"net: weights as large as {largest:.3g} overflow when squared, beyond "
            f"{np.finfo(dtype).max:.2g}; rescale the network and the data."
        )


@compiled
def _penalty_at(penalty: AbstractPenalty, weights: Weights) -> tuple[Array, Weights]:
    """The value and the gradient of a penalty on every path."""
    return jax.vmap(lambda w: (penalty.penalty(w), penalty.penalty_gradient(w)), -1, -1)(weights)


def check_penalties(problem: Problem, weights: Weights) -> None:
    """Raise a `ValueError` for a penalty that has no value or gradient at a start."""
    for penalty in problem.other_penalties:  # weight decay is finite where the norms are
        value, slope = _penalty_at(penalty, weights)
        name = getattr(penalty, "name", type(penalty).__name__)
        slopes = np.concatenate([np.asarray(g).reshape(-1, g.shape[-1]) for g in slope])
        finite = {"value": np.isfinite(value), "gradient": np.isfinite(slopes).all(axis=0)}
        for what, there in finite.items():
            if not np.all(there):
                which = "the start" if there.size == 1 else f"start {int(np.argmin(there))}"
                raise ValueError(
                    f"net: the {what} of the penalty {name!r} is not finite at {which}, where "
                    "no run can begin; start elsewhere, or smooth the penalty there (the gradient "
                    "of a norm or a root at 0 is NaN under jax.grad)."
                )
