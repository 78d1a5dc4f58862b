"""Whether a run takes something else than Gaussian normals of full precision."""

import jax
import jax.numpy as jnp

from gradflow.dynamics.base import AbstractDynamics
from gradflow.problem import Problem
from gradflow.random.streams import Normals, Stream


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
    why_not = dynamics.why_not_normals(normals, problem)
    if why_not is not None:
        raise ValueError(f"{given}: {why_not}")
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


def _draws_normals(dynamics: AbstractDynamics, problem: Problem, widths: tuple[int, ...]) -> bool:
    """Whether a step takes normals at all: whether its draw changes with what stands for them."""
    one = jax.ShapeDtypeStruct((1,), jnp.uint32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def program(kind: Normals) -> str:
        traced = jax.make_jaxpr(
            lambda k, s, p: dynamics.draw(problem, Stream(k, s, p, kind), widths)
        )
        return str(traced(key, one, one))

    return program(Normals()) != program(Normals(antithetic=True))
