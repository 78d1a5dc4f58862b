"""Strategies for regularizers: every kind, in any combination that the data allow."""

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from gradflow.data import Regression
from gradflow.regularizers import (
    AbstractRegularizer,
    DropConnect,
    Dropout,
    GradientNoise,
    InputNoise,
    LabelNoise,
    Minibatch,
    WeightDecay,
    WeightNoise,
)
from gradflow.testing.strategies.building import Draw, composite

LEVELS = st.sampled_from([0.5, 0.2, 0.0])
"""Rates of decay and standard deviations."""

FRACTIONS = st.sampled_from([0.5, 0.2, 0.0])
"""Probabilities of being dropped."""

MASKS = st.sampled_from(["bernoulli", "gaussian"])


def _one(
    kind: Callable[..., AbstractRegularizer], *arguments: st.SearchStrategy
) -> Callable[[Regression], st.SearchStrategy[AbstractRegularizer]]:
    """A line of the table: the kind with drawn arguments, whatever the data."""
    drawn = st.tuples(*arguments).map(lambda values: kind(*values))
    return lambda data: drawn


def _minibatch(data: Regression) -> st.SearchStrategy[AbstractRegularizer]:
    """Batches of one or two rows, as the data allow."""
    choices: list[AbstractRegularizer] = [Minibatch(1)]
    if data.x is None:
        choices += [Minibatch(2)]
    elif data.x.shape[0] > 1:
        choices += [Minibatch(2), Minibatch(2, replacement=True), Minibatch(2, reshuffled=True)]
    return st.sampled_from(choices)


KINDS: dict[str, Callable[[Regression], st.SearchStrategy[AbstractRegularizer]]] = {
    "WeightDecay": _one(WeightDecay, LEVELS),
    "LabelNoise": _one(LabelNoise, LEVELS),
    "InputNoise": _one(InputNoise, LEVELS),
    "Minibatch": _minibatch,
    "Dropout": _one(Dropout, FRACTIONS, MASKS, st.sampled_from([None, (1,)])),
    "DropConnect": _one(DropConnect, FRACTIONS),
    "WeightNoise": _one(WeightNoise, LEVELS, st.booleans()),
    "GradientNoise": _one(GradientNoise, LEVELS),
}
"""How each kind is drawn for given data; a new kind is one line."""

ON_HIDDEN_LAYERS = ("Dropout",)
"""The kinds that need a hidden layer."""


def regularizers(
    data: Regression, kinds: Sequence[str] | None = None, depth: int | None = None
) -> st.SearchStrategy[list[AbstractRegularizer]]:
    """Lists of regularizers, at most one of a kind and in any order; they shrink to none.

    **Arguments:**

    - `data`: what they are to act on.
    - `kinds`: names out of `KINDS`; by default all of them.
    - `depth`: of the network; at depth 1 the kinds that act on hidden layers are left out.

    **Raises:** `ValueError` for an unknown name.
    """
    names = checked_kinds(kinds)
    if depth == 1:
        names = tuple(name for name in names if name not in ON_HIDDEN_LAYERS)
    return _regularizers(data, names)


def checked_kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    """The names of kinds, all of them for None.

    **Raises:** `TypeError` for a single string, `ValueError` for an unknown name.
    """
    if kinds is None:
        return tuple(KINDS)
    if isinstance(kinds, str):
        raise TypeError(f"kinds must be a list of names; write [{kinds!r}].")
    for name in kinds:
        if name not in KINDS:
            raise ValueError(f"kinds: {name!r} is not known; choose from {', '.join(KINDS)}.")
    return tuple(kinds)


@composite
def _regularizers(
    draw: Draw, data: Regression, kinds: tuple[str, ...]
) -> list[AbstractRegularizer]:
    chosen = [draw(KINDS[name](data)) for name in kinds if draw(st.booleans())]
    return draw(st.permutations(chosen))
