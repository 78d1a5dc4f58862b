"""What is said of a run in which paths diverged."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from gradflow.backend.types import Weights
from gradflow.dynamics.base import AbstractDynamics
from gradflow.geometry.curvature import sharpness
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.results.recording import AbstractRecord
from gradflow.simulation.schedule import Schedule


class DivergedWarning(UserWarning):
    """Paths of a run diverged; what is saved of them from then on is NaN."""


@contextmanager
def no_diverged_warning() -> Iterator[None]:
    """For runs whose caller says itself that paths diverged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergedWarning)
        yield


def divergence(
    problem: Problem,
    starts: Sequence[Weights],
    dynamics: AbstractDynamics,
    plan: Schedule,
    record: AbstractRecord,
) -> str:
    r"""How many paths diverged, when the first did, and what to do.

    $h \lambda_\mathrm{max}$ is that of the averaged loss at the start of that path; `starts` are
    those of all paths, or one for all.
    """
    first, path = record.first_lost
    lost = record.lost - len(record.incomplete)
    when = f"t = {plan.time[first]:g}"
    if plan.step is not None:
        when += f" (step {plan.step[first]})"
    text = (
        f"{type(dynamics).__name__}: {lost} of {record.paths} paths diverged, the first by "
        f"{when}; from then on they are NaN."
    )
    if dynamics.step_size is None:
        return text
    h, limit = float(dynamics.step_size), dynamics.stability_limit
    if limit is None:
        return f"{text} Use a step size smaller than {h:g}."
    curvature = float(sharpness(DeepLinear(starts[min(path, len(starts) - 1)]), problem))
    if not (np.isfinite(curvature) and curvature > 0.0):
        return f"{text} Use a step size smaller than {h:g}."
    share = h * curvature / float(limit)
    cure = f"use a step size smaller than {h / share:.4g}"
    if share < 1.0:
        cure = f"it grew beyond that, or noise did the rest: use a step size smaller than {h:.4g}"
    return (
        f"{text} At its start h lam_max is {h * curvature:.4g}, and steps are stable up to "
        f"{float(limit):.4g}: {cure}."
    )
