"""Tables that name a kind: their keys, types, defaults and help come from the class of that name.

What a value may be is the business of the class: its own error is reported at the key that it
names.
"""

from __future__ import annotations

import collections.abc
import inspect
import re
from collections.abc import Callable, Container
from functools import cache, cached_property
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import Discriminator, Field, Tag, create_model
from pydantic_core import PydanticUndefined

from gradflow.dynamics import DYNAMICS, FromOptax
from gradflow.regularizers import REGULARIZERS
from gradflow.study.spec.chosen import TableOf, located
from gradflow.study.spec.tables import Finite, Section

REFUSED = "refused_by_class"
"""The type of an error that a class itself raised."""

_PLAIN = {
    r"\tfrac{\lambda}{2}": "lambda/2", r"\dot W": "dW/dt", r"\bar L": "L", r"\nabla ": "grad ",
    r"\ge": ">=", r"\le": "<=", r"\to": "->", r"\beta": "beta", r"\lambda": "lambda",
    r"\sigma": "sigma", r"\varepsilon": "epsilon", r"\xi": "xi", r"\sum": "sum", r"\,": " ",
    "$": "", "`": "", "{": "", "}": "",
}  # fmt: skip
"""How the mathematics of a docstring is written in a terminal."""


class KindTable(Section):
    """A table of a spec with the arguments of a registered class."""

    kind: str
    of: ClassVar[type]

    @cached_property
    def made(self) -> Any:
        """The object that the table describes.

        **Raises:** what its class raises.
        """
        keys = [key for key in type(self).model_fields if key != "kind"]
        return self.of(**{key: _argument(getattr(self, key)) for key in keys})

    def __reduce__(self) -> tuple[Callable[..., KindTable], tuple[type, dict[str, Any]]]:
        return _restored, (self.of, self.model_dump())  # another process has no such model


class KindOf(TableOf):
    """Marks a field as a table of one of the classes that are registered when it is read."""

    def table(self, name: str) -> type[KindTable]:
        """The table of the arguments of a class."""
        return table_of(self.kinds[name])

    def checked(self, table: Section, given: dict[str, Any]) -> Section:
        """The table, if an object can be made of it."""
        assert isinstance(table, KindTable)
        try:
            _ = table.made
        except (ValueError, TypeError) as error:
            key, message = _named_key(table.kind, str(error), type(table).model_fields)
            place = (key,) if key else ()
            raise located([(REFUSED, place, given.get(key, given), message, None)]) from error
        return table


DynamicsTable = Annotated[KindTable, KindOf(DYNAMICS)]
RegularizerTable = Annotated[KindTable, KindOf(REGULARIZERS)]


@cache
def table_of(kind: type) -> type[KindTable]:
    """The table of a class: a key for every argument of its constructor that TOML can hold.

    **Raises:** `TypeError` for an argument without a default that TOML cannot hold.
    """
    fields: dict[str, Any] = {"kind": (Literal[kind.__name__], ...)}
    helps = arguments_help(kind)
    for name, parameter in inspect.signature(kind, eval_str=True).parameters.items():
        required = parameter.default is parameter.empty
        key = _key_type(parameter.annotation)
        if key is None and required:
            raise TypeError(
                f"{kind.__name__}.{name}: {parameter.annotation} is nothing that a spec can hold, "
                f"so {kind.__name__} cannot be registered; give the argument a default."
            )
        if key is not None:
            default = PydanticUndefined if required else parameter.default
            description = helps.get(name, f"as {kind.__name__} takes it")
            if key is _NUMBER_OR_TABLE:
                description += ', or { name = "...", ... } for a function of optax'
            fields[name] = (key, Field(default=default, description=description))
    made = create_model(kind.__name__, __base__=KindTable, __doc__=first_sentence(kind), **fields)
    made.of = kind
    return made


def first_sentence(documented: Any) -> str:
    """The first sentence of a docstring, as a terminal shows it, without its full stop."""
    text = inspect.getdoc(documented) or ""
    return _sentence(text.partition("\n\n")[0])


def arguments_help(kind: type) -> dict[str, str]:
    """What the `**Arguments:**` of a class say of each, as a terminal shows it."""
    text = inspect.getdoc(kind) or ""
    arguments = text.partition("**Arguments:**")[2].partition("\n**")[0]
    helps = {}
    for entry in re.split(r"^- ", arguments, flags=re.MULTILINE)[1:]:
        names, _, help_text = entry.partition(":")
        helps |= dict.fromkeys(re.findall(r"`(\w+)`", names), _sentence(help_text))
    return helps


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    for mark, plain in _PLAIN.items():
        text = text.replace(mark, plain)
    return re.split(r"\.(?: |$)", text, maxsplit=1)[0]


_NUMBER_OR_TABLE = Annotated[
    Annotated[Finite, Tag("=number")] | Annotated[dict[str, Any], Tag("=table")],
    Discriminator(lambda value: "=table" if isinstance(value, dict) else "=number"),
]


def _key_type(annotation: Any) -> Any:
    """What a spec checks of an argument with this annotation; None if TOML cannot hold it."""
    options = set(get_args(annotation)) or {annotation}
    origins = {get_origin(option) for option in options}
    one_of = options & {bool, int, str}
    if float in options:
        key: Any = _NUMBER_OR_TABLE if collections.abc.Callable in origins else Finite
    elif len(one_of) == 1:
        key = one_of.pop()
    elif annotation is Any or collections.abc.Sequence in origins:
        return Any
    else:
        return None
    return key | None if NoneType in options else key


def _argument(value: Any) -> Any:
    """A value of a spec as a constructor takes it: a table is a function of optax with options."""
    if isinstance(value, dict):
        options = dict(value)
        return FromOptax(options.pop("name", None), **options)
    return value


def _named_key(kind: str, message: str, keys: Container[str]) -> tuple[str, str]:
    """The key that an error of a class names, "" for none, and the rest of its message."""
    match = re.match(rf"{kind}\.(\w+)(=[^:]*)?:? (.*)", message, flags=re.DOTALL)
    if match is None or match[1] not in keys:
        return "", message.rstrip(".")
    given = f"got {match[2][1:]}; " if match[2] else ""
    return match[1], f"{given}{match[3]}".rstrip(".")


def _restored(kind: type, values: dict[str, Any]) -> KindTable:
    return table_of(kind).model_validate(values)
