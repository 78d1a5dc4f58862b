"""One thing wrong with a spec, and the words to say it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from gradflow.study.spec.locate import Path

_LONGEST_SHOWN = 60

_EVERYDAY = {
    "gd": "GradientDescent",
    "sgd": "GradientDescent",
    "heavyball": "GradientDescent",
    "momentum": "GradientDescent",
    "nesterov": "GradientDescent",
    "adam": "GradientDescent",
    "gf": "GradientFlow",
    "flow": "GradientFlow",
    "ode": "GradientFlow",
    "sde": "StochasticFlow",
    "langevin": "StochasticFlow",
    "sme": "StochasticFlow",
    "l2": "WeightDecay",
    "ridge": "WeightDecay",
    "decay": "WeightDecay",
    "targetnoise": "LabelNoise",
    "datanoise": "InputNoise",
    "batch": "Minibatch",
    "minibatches": "Minibatch",
    "antipgd": "WeightNoise",
    "normal": "gaussian",
}
"""What people call things elsewhere, without case and underscores."""


@dataclass(frozen=True)
class Fault:
    """Something wrong at one key of a spec.

    Attributes:
        path: where, such as `("run", 0, "dynamics", "step_size")`.
        message: what was given and what is allowed.
    """

    path: Path
    message: str


def shown(value: object) -> str:
    """A value as it would be written in TOML, shortened if it is long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 4] + " ..."


def not_one_of(given: object, allowed: Iterable[str], *, what: str = "allowed") -> str:
    """`got "x"; did you mean "y"? allowed: y, z`."""
    choices = list(allowed)
    return f"got {shown(given)}; {suggestion(given, choices)}{what}: {', '.join(choices) or 'none'}"


def suggestion(given: object, allowed: Iterable[str]) -> str:
    """`did you mean "x"? ` if an allowed word is close to the given one, else nothing."""
    words = {_plain(word): word for word in allowed}
    word = _plain(str(given))
    if (other := _plain(_EVERYDAY.get(word, ""))) in words:
        word = other
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f'did you mean "{words[close[0]]}"? ' if close else ""


def _plain(word: str) -> str:
    """Without case, underscores and hyphens."""
    return word.lower().replace("_", "").replace("-", "")
