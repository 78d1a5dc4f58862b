"""Which noise two dynamics can share, so that their difference can be seen path by path."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp

from gradflow.dynamics.base import AbstractDynamics
from gradflow.problem import Problem

DynamicsOfStep: TypeAlias = AbstractDynamics | Callable[[float], AbstractDynamics]
"""A dynamics, or a function from step sizes to dynamics."""

FINEST = 1024
"""Most grid steps of a common Brownian path within a common multiple of both step sizes."""

SAME = 1e-9
"""Relative difference below which two step sizes are the same."""


@dataclass(frozen=True)
class BrownianGrid:
    """The grid of a Brownian path: `tick` flow time apart, `per_step` ticks in the longer step."""

    tick: float
    per_step: int


@dataclass(frozen=True)
class Coupling:
    """Two dynamics made to share what noise they can.

    - `first`, `second`: the dynamics, set to the same Brownian path where one drives both.
    - `random`: whether each of them is random.
    - `paired`: whether path r of one belongs to path r of the other; only then is there a strong
      distance. Otherwise they take keys of their own.
    - `grid`: of the normals that drive all that is random, None if none do.
    - `description`: what is shared, for people.
    """

    first: AbstractDynamics = field(repr=False)
    second: AbstractDynamics = field(repr=False)
    random: tuple[bool, bool]
    paired: bool
    grid: BrownianGrid | None
    description: str


def at_step_size(dynamics: DynamicsOfStep, step_size: float, name: str) -> AbstractDynamics:
    """The dynamics with another step size; one that has none is returned as it is.

    **Arguments:** `name` of the argument, for errors.

    **Raises:** `TypeError` for something else than a dynamics, or one whose step size also sits
    elsewhere (a schedule, a finished optimizer).
    """
    if isinstance(dynamics, AbstractDynamics):
        if dynamics.step_size is None:
            return dynamics
        rule = dynamics.update_rule
        fixed = rule.schedule is not None
        if fixed or hasattr(rule.optimizer, "update"):
            raise TypeError(
                f"{name}: the steps of this {type(dynamics).__name__} are set by its "
                f"{'schedule' if fixed else 'optimizer'}, not by step_size alone; give a function "
                "of the step size that makes the dynamics, such as lambda h: GradientDescent(h)."
            )
        new = jnp.asarray(step_size, dynamics.step_size.dtype)
        return eqx.tree_at(lambda d: d.step_size, dynamics, new)
    made = dynamics(step_size) if callable(dynamics) else dynamics
    if not isinstance(made, AbstractDynamics):
        raise TypeError(
            f"{name} must be a dynamics such as GradientDescent(0.1), or a function from step "
            f"sizes to dynamics; got {made!r}."
        )
    return made


def couple(
    problem: Problem,
    widths: tuple[int, ...],
    first: AbstractDynamics,
    second: AbstractDynamics,
) -> Coupling:
    """Make two dynamics share their noise on a problem as far as it goes.

    With Gaussian noise descent (`path_substeps`) and the stochastic flow follow one Brownian path.
    Otherwise dynamics that take the same draws at the same times share these, and what is left is
    independent.
    """
    random = first.is_random(problem), second.is_random(problem)
    if not any(random):
        return Coupling(first, second, random, True, None, "both are deterministic")
    if not all(random):
        moving, still = (first, second) if random[0] else (second, first)
        description = f"every path of {_name(moving)} against the one path of {_name(still)}"
        grid = _grid(problem, (moving,))
        return Coupling(first, second, random, True, grid, description)
    found = _common_path(problem, first, second) if problem.is_gaussian else None
    if found is not None:
        first, second, substeps = found
        grid = _grid(problem, (first, second))
        description = f"common Brownian path, {substeps} substeps"
        return Coupling(first, second, random, True, grid, description)
    if _same_draws(problem, widths, first, second):
        grid = _grid(problem, (first, second))
        description = "the same random numbers at every step"
        return Coupling(first, second, random, True, grid, description)
    return Coupling(first, second, random, False, None, f"independent ensembles: {_why(problem)}")


def _common_path(
    problem: Problem, first: AbstractDynamics, second: AbstractDynamics
) -> tuple[AbstractDynamics, AbstractDynamics, int] | None:
    """Both on one Brownian path, and its grid steps in the longer step; None if they cannot."""
    if not (first.follows_path(problem) and second.follows_path(problem)):
        return None
    steps = [float(d.step_size) for d in (first, second)]
    ratio = Fraction(steps[0] / steps[1]).limit_denominator(64)
    if abs(float(ratio) * steps[1] / steps[0] - 1.0) > SAME:
        return None
    for finer in range(1, FINEST // max(ratio.numerator, ratio.denominator) + 1):
        counts = ratio.numerator * finer, ratio.denominator * finer
        one, other = first.on_grid(counts[0]), second.on_grid(counts[1])
        if one is not None and other is not None:
            return one, other, max(counts)
    return None


def _grid(problem: Problem, dynamics: tuple[AbstractDynamics, ...]) -> BrownianGrid | None:
    """The grid of the normals that are all the noise of the dynamics; None if it is more."""
    ticks = dynamics[0].grid_steps
    if ticks is None or not all(one.follows_path(problem) for one in dynamics):
        return None
    longest = max(float(one.step_size) for one in dynamics)
    tick = float(dynamics[0].step_size) / ticks
    return BrownianGrid(tick, round(longest / tick))


def _same_draws(
    problem: Problem,
    widths: tuple[int, ...],
    first: AbstractDynamics,
    second: AbstractDynamics,
) -> bool:
    """Whether both take draws of the same shapes at the same times."""

    def spacing(one: AbstractDynamics) -> float:
        return float(one.step_size) / (one.ticks_per_step or 1) / getattr(one, "path_substeps", 1)

    if None in (first.step_size, second.step_size):
        return False
    if None in (first.ticks_per_step, second.ticks_per_step):
        return False
    if abs(spacing(first) / spacing(second) - 1.0) > SAME:
        return False
    shapes: list[Any] = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one.noise_shapes(problem, widths))
        for one in (first, second)
    ]
    return shapes[0] == shapes[1]


def _why(problem: Problem) -> str:
    """What keeps two dynamics from sharing their noise."""
    if problem.is_gaussian:
        return "their step sizes and substeps have no Brownian path in common"
    names = [type(r).__name__ for r in problem.regularizers if r.is_stochastic]
    return f"draws of {' and '.join(names)} have no Brownian path"


def _name(dynamics: AbstractDynamics) -> str:
    return type(dynamics).__name__
