"""The closed forms, compiled once a shape, and problems to try them on."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from compiled import compiled
from jaxtyping import Array
from numpy.typing import ArrayLike

import gradflow as gf
from gradflow.backend.types import Weights
from gradflow.closed_forms import CLOSED_FORMS, AbstractClosedForm

MOST_TIMES = 9

FORMS = {form.name: form for form in CLOSED_FORMS}


@compiled
def _evaluate(form: AbstractClosedForm, problem: gf.Problem, prepared: object, t: Array) -> Weights:
    return jax.vmap(lambda one: form.evaluate(problem, prepared, one))(t)


def evaluate(
    name: str, problem: gf.Problem, layers: Sequence[np.ndarray], times: ArrayLike
) -> list[np.ndarray]:
    """The layers at all times, `(time, d_i, d_{i-1})`, after checking that the form applies."""
    form, weights = FORMS[name], gf.DeepLinear(layers).weights
    assert form.why_not(problem, weights) is None
    prepared = form.prepare(problem, weights)
    wanted = np.asarray(times, float)
    padded = np.pad(wanted, (0, MOST_TIMES - wanted.size))  # one program for any number of times
    layers = _evaluate(form, problem, prepared, jnp.asarray(padded))
    return [np.asarray(w)[: wanted.size] for w in layers]


def scalar_layers(*values: float) -> list[np.ndarray]:
    return [np.array([[value]]) for value in values]


def scalar_problem(sxx: float, b: float, decay: float | None = None) -> gf.Problem:
    data = gf.Regression.from_moments(sxx=[[sxx]], syx=[[b]])
    return gf.Problem(data, [] if decay is None else [gf.WeightDecay(decay)])


def problem_of(sxx: np.ndarray, syx: np.ndarray, decay: float | None = None) -> gf.Problem:
    data = gf.Regression.from_moments(sxx=sxx, syx=syx)
    return gf.Problem(data, [] if decay is None else [gf.WeightDecay(decay)])


def rotation(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def diagonal(rows: int, columns: int, values: Sequence[float]) -> np.ndarray:
    matrix = np.zeros((rows, columns))
    n = min(rows, columns, len(values))
    matrix[range(n), range(n)] = values[:n]
    return matrix


def aligned_case(
    widths: tuple[int, ...],
    modes: Sequence[Sequence[float]],
    s: Sequence[float],
    b: Sequence[float],
    turned: bool = True,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Layers, input moment and Y with common singular directions; `modes[i]` are those of W_i."""
    rng = np.random.default_rng(sum(widths))
    turns = [rotation(rng, d) if turned else np.eye(d) for d in widths]
    layers = [
        turns[i + 1] @ diagonal(widths[i + 1], widths[i], values) @ turns[i].T
        for i, values in enumerate(modes)
    ]
    sxx = turns[0] @ np.diag(s) @ turns[0].T
    return layers, sxx, turns[-1] @ diagonal(widths[-1], widths[0], b) @ turns[0].T


def near_balanced_case(
    widths: tuple[int, int, int], gamma: float
) -> tuple[list[np.ndarray], np.ndarray]:
    """Layers with W_2^T W_2 - W_1 W_1^T = gamma I, and a target of no relation to them."""
    rng = np.random.default_rng(sum(widths))
    w1 = rng.normal(size=(widths[1], widths[0]))
    values, vectors = np.linalg.eigh(w1 @ w1.T + gamma * np.eye(widths[1]))
    kept = values > 1e-9
    root = (vectors[:, kept] * np.sqrt(values[kept])).T
    w2 = rotation(rng, widths[2])[:, : len(root)] @ root
    return [w1, w2], rng.normal(size=(widths[2], widths[0]))
