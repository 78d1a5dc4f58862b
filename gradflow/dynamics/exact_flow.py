"""Gradient flow by closed forms."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gradflow.backend.types import Weights
from gradflow.closed_forms import CLOSED_FORMS, AbstractClosedForm
from gradflow.dynamics.base import (
    DYNAMICS,
    AbstractDynamics,
    RateTheory,
    State,
    divergence_limit,
    mask_diverged,
    over_paths,
)
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.random.streams import Source


@DYNAMICS.register
class ExactFlow(AbstractDynamics):
    r"""The flow $\dot W = -\nabla \bar L(W)$ of `GradientFlow`, by a closed form instead of steps.

    Accurate to near rounding at every time, however long the run or small the start. There are
    these forms, tried in this order (theory: closed forms):

    - `"linear"`: depth 1;
    - `"channel"`: widths (1, k, 1), any start; `"decaying channel"`: the same with weight decay;
    - `"scalar chain"`: all widths 1, any depth, any start;
    - `"aligned pairs"`: depth 2, layers, input moment and target with common singular directions,
        any imbalance, weight decay;
    - `"aligned chains"`: the same for any depth, without weight decay;
    - `"riccati"`: depth 2, white inputs, $W_2^\top W_2 - W_1 W_1^\top$ a multiple of $I$ (0 under
        weight decay).

    Directions and multiples of the identity are recognised up to $10^{-12}$ relative; a direction
    that a layer maps to less than $10^{-13}$ of its norm counts as mapped to 0, and then never
    leaves a saddle that rounding alone would make `GradientFlow` leave.

    `InputNoise` adds to the input moment; label noise and minibatches do not change the averaged
    loss.

    **Arguments:**

    - `form`: the name of the form to use; default the first that applies.

    **Raises:** `ValueError` for an unknown form; `simulate` raises one with all reasons if no form
    applies.
    """

    form: str | None = eqx.field(static=True, default=None)
    step_size: None

    def __init__(self, form: str | None = None):
        names = [f.name for f in CLOSED_FORMS]
        if form is not None and form not in names:
            raise ValueError(f"ExactFlow.form must be one of {', '.join(names)}; got {form!r}.")
        self.form = form
        self.step_size = None

    @property
    def ticks_per_step(self) -> None:
        """None: it needs no steps."""
        return None

    @property
    def rate_theory(self) -> RateTheory:
        """The slow flow of small steps."""
        return "leading_order"

    def closed_form(self, problem: Problem, net: DeepLinear | Sequence[DeepLinear]) -> str:
        """The name of the closed form that a run from the network(s) uses.

        **Raises:** `ValueError` that says of every form why it does not apply, if none does.
        """
        nets = [net] if isinstance(net, DeepLinear) else list(net)
        return self._chosen(problem, [n.weights for n in nets]).name

    def is_random(self, problem: Problem) -> bool:
        """False: the averaged loss is deterministic."""
        return False

    def check(self, problem: Problem, weights: Weights) -> None:
        """Raise a `ValueError` that says why no form applies, if none does."""
        self._chosen(problem, _starts(weights))

    def init(self, problem: Problem, weights: Weights) -> State:
        """Remember the start; every mark is computed from it."""
        starts = _starts(weights)
        form = self._chosen(problem, starts)
        prepared: dict[int, Any] = {}
        for start in starts:
            if id(start) not in prepared:
                prepared[id(start)] = form.prepare(problem, start)
        memory = jax.tree.map(
            lambda *leaves: jnp.stack(leaves, axis=-1), *(prepared[id(start)] for start in starts)
        )
        return State(weights, (form, memory), (), divergence_limit(weights, problem.data))

    def noise_shapes(self, problem: Problem, widths: tuple[int, ...]) -> Any:
        """None are needed."""
        return ()

    def advance(
        self,
        problem: Problem,
        state: State,
        start: Array,
        stop: Array,
        source: Source,
        block: int,
    ) -> State:
        """Evaluate the closed form at flow time `stop`."""
        form, prepared = state.memory
        known, since = (state.weights, stop - start) if form.continues else (prepared, stop)
        weights = over_paths(lambda p: form.evaluate(problem, p, since))(known)
        weights = mask_diverged(weights, state.limit)
        return State(weights, state.memory, (), state.limit)

    def _chosen(self, problem: Problem, starts: Sequence[Weights]) -> AbstractClosedForm:
        reasons = []
        for form in CLOSED_FORMS:
            if self.form not in (None, form.name):
                continue
            reason = _why_not(form, problem, starts)
            if reason is None:
                return form
            reasons.append(f"{form.name}: {reason}")
        what = "no closed form of the flow is known" if self.form is None else "not applicable"
        raise ValueError(
            f"ExactFlow: {what} here ({'; '.join(reasons)}). Use GradientFlow, or change the "
            "problem or the start."
        )


def _why_not(form: AbstractClosedForm, problem: Problem, starts: Sequence[Weights]) -> str | None:
    """The first reason against the form among all paths; equal starts are asked once."""
    asked = set()
    for path, start in enumerate(starts):
        if id(start) in asked:
            continue
        asked.add(id(start))
        reason = form.why_not(problem, start)
        if reason is not None:
            return reason if len(starts) == 1 else f"path {path}: {reason}"
    return None


def _starts(weights: Weights) -> list[Weights]:
    """The networks of an ensemble; paths that start at the same point share one object."""
    layers = jax.device_get(weights)
    known: dict[bytes, Weights] = {}
    starts = []
    for path in range(layers[0].shape[-1]):
        one = tuple(layer[..., path] for layer in layers)
        word = b"".join(layer.tobytes() for layer in one)
        if word not in known:
            known[word] = tuple(map(jnp.asarray, one))
        starts.append(known[word])
    return starts
