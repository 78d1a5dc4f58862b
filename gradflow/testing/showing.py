"""Networks, data and dynamics as text for failure messages."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradflow.data import Regression
from gradflow.dynamics.base import AbstractDynamics
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.regularizers import AbstractRegularizer
from gradflow.results.serialize import describe

LARGEST_SHOWN = 8
"""Rows and columns of a matrix that are written out."""


def matrix_lines(name: str, matrix: Any, indent: str = "  ") -> str:
    """`name = [[...]]`, a line for every row; of a large matrix only shape and norm."""
    array = np.asarray(matrix)
    if max(array.shape, default=0) > LARGEST_SHOWN:
        return f"{indent}{name}: {' x '.join(map(str, array.shape))}, norm {number(array)}"
    start = f"{indent}{name} = "
    options: dict[str, Any] = {"precision": 8, "floatmode": "maxprec", "suppress_small": False}
    return start + np.array2string(
        array + 0.0, separator=", ", prefix=start, max_line_width=100, **options
    )


def number(array: Any) -> str:
    """The norm of an array with three digits."""
    return f"{float(np.linalg.norm(np.asarray(array))):.3g}"


def show_layers(layers: Sequence[Any], title: str) -> str:
    """Every layer as a matrix, under a title."""
    rows = [matrix_lines(f"W_{i}", w) for i, w in enumerate(layers, start=1)]
    return "\n".join([f"{title}:", *rows])


def show_network(net: DeepLinear) -> str:
    """The widths of a network and its layers, first layer first."""
    return show_layers(net.weights, f"network of widths {net.widths}")


def show_data(data: Regression) -> str:
    """The samples, or the moments of a population."""
    if data.x is not None and data.y is not None:
        n = data.x.shape[0]
        rows = [matrix_lines("x", data.x), matrix_lines("y", data.y)]
        return "\n".join([f"data, {n} samples:", *rows])
    moments = [("Sxx", data.sxx), ("Syx", data.syx), ("Syy", data.syy)]
    rows = [matrix_lines(name, moment) for name, moment in moments]
    return "\n".join([f"data, a population with n = {float(data.n):g}:", *rows])


def show_problem(problem: Problem | Regression | None) -> str:
    """Data and regularizers; nothing for None."""
    if problem is None:
        return ""
    if isinstance(problem, Regression):
        return show_data(problem)
    if not problem.regularizers:
        return show_data(problem.data)
    parts = ", ".join(show_part(r) for r in problem.regularizers)
    return f"{show_data(problem.data)}\nregularizers: {parts}"


def show_part(part: AbstractDynamics | AbstractRegularizer) -> str:
    """A dynamics or regularizer as the call that makes it."""
    fields = describe(part)
    kind = fields.pop("kind")
    settings = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in fields.items())
    return f"{kind}({', '.join(settings)})"


def show_subject(subject: Any) -> str:
    """What is tested: a dynamics with its settings, or the name of a function."""
    if isinstance(subject, AbstractDynamics):
        return show_part(subject)
    return getattr(subject, "__qualname__", None) or repr(subject)


def message(*parts: str) -> str:
    """The parts of a failure message below each other, empty ones left out."""
    return "\n".join(part for part in parts if part)
