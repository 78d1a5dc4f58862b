"""Which runs take something else than Gaussian normals of full precision, and which cannot."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp

from gradflow.dynamics.base import AbstractDynamics
from gradflow.dynamics.slow_flow import SlowFlow
from gradflow.dynamics.stochastic_flow import StochasticFlow
from gradflow.problem import Problem
from gradflow.random.streams import Normals, Stream
from gradflow.solvers.small_noise import SmallNoise


def check_normals(
    normals: Normals | None, dynamics: AbstractDynamics, problem: Problem, widths: tuple[int, ...]
) -> None:
    """Raise unless what stands for the normals of a run serves it.

    **Raises:** `ValueError` naming the option, and why the run cannot take it.
    """
    if not isinstance(normals, Normals | None):
        raise TypeError(
            f"normals must be Normals such as gf.Normals(antithetic=True); got {normals!r}."
        )
    if normals is None or normals == Normals():
        return
    given = _given(normals)
    kind = type(dynamics).__name__
    if not dynamics.is_random(problem):
        raise ValueError(f"{given}: this {kind} draws no random numbers; leave normals out.")
    if isinstance(dynamics, SlowFlow):
        raise ValueError(
            f"{given}: SlowFlow reaches saved times by a Brownian bridge inside its cells, whose "
            "random numbers have a key of their own that normals does not change; leave it out."
        )
    if normals.law != "gaussian":
        _check_law(normals, dynamics, problem)
    if not _draws_normals(dynamics, problem, widths):
        names = " and ".join(type(r).__name__ for r in problem.regularizers if r.is_stochastic)
        raise ValueError(
            f"{given}: {kind} draws no normals here, since {names} takes other random numbers; "
            "leave normals out."
        )


def check_pairs(normals: Normals | None, replicas: int | None) -> None:
    """Raise unless antithetic replicas come in pairs.

    **Raises:** `ValueError` for antithetic normals and an odd number of replicas, or none.
    """
    if normals is not None and normals.antithetic and (replicas is None or replicas % 2):
        raise ValueError(
            f"replicas={replicas}: {_given(normals)} takes replicas in pairs, 0 and 1, 2 and 3, "
            "...; give an even number of them."
        )


def _given(normals: Normals) -> str:
    """What was asked for beside the default, in words."""
    default = vars(Normals())
    asked = [f"{name}={value!r}" for name, value in vars(normals).items() if value != default[name]]
    return f"normals=Normals({', '.join(asked)})"


def _check_law(normals: Normals, dynamics: AbstractDynamics, problem: Problem) -> None:
    """Raise unless random numbers with a few right moments keep the weak order of the run."""
    given = _given(normals)
    fix = "use law='gaussian'."
    if not isinstance(dynamics, StochasticFlow):
        raise ValueError(
            f"{given}: the normals of {type(dynamics).__name__} are the noise of training itself "
            "and not increments of a Brownian motion, so another law is another model; law is for "
            f"StochasticFlow, here {fix}"
        )
    if dynamics.is_sampled(problem):
        raise ValueError(
            f"{given}: StochasticFlow takes centred sampled gradients as increments here, and "
            "their normals are the noise of training itself; use diffusion='closed' where there "
            f"is a closed factor, or {fix}"
        )
    if not isinstance(dynamics.solver, diffrax.Euler | SmallNoise | None):
        raise ValueError(
            f"{given}: StochasticFlow.solver={type(dynamics.solver).__name__} is not known to keep "
            f"its order with increments of another law; leave solver out, or {fix}"
        )
    if dynamics.order == 2 and normals.law == "two-point":
        raise ValueError(
            f"{given}: its moments are right up to the third, and StochasticFlow.order=2 needs "
            "them up to the fifth; use law='three-point'."
        )


def _draws_normals(dynamics: AbstractDynamics, problem: Problem, widths: tuple[int, ...]) -> bool:
    """Whether a step takes normals at all: whether its draw changes with what stands for them."""
    closed = isinstance(dynamics, StochasticFlow) and not dynamics.is_sampled(problem)
    draw: Callable[[Stream, tuple[int, ...]], Any]
    draw = problem.draw_normals if closed else problem.draw
    one = jax.ShapeDtypeStruct((1,), jnp.uint32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def program(kind: Normals) -> str:
        traced = jax.make_jaxpr(lambda k, s, p: draw(Stream(k, s, p, kind), widths))
        return str(traced(key, one, one))

    return program(Normals()) != program(Normals(antithetic=True))
