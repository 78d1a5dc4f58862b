"""Kinds: the classes of one concept by the names that specs, files and the command line use."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar, cast

T = TypeVar("T", bound=type)
One = TypeVar("One", bound=type)


def class_name(kind: type) -> str:
    """`WeightDecay` for the class `WeightDecay`."""
    return kind.__name__


def snake_case(kind: type) -> str:
    """`time_series` for the class `TimeSeries`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()


class Kinds(Mapping[str, T], Generic[T]):
    """The classes of one concept, by name, in the order in which they were registered.

    **Arguments:**

    - `concept`: what they are kinds of, in the plural: "dynamics", "regularizers".
    - `named`: the name of a class.
    """

    def __init__(self, concept: str, named: Callable[[type], str] = class_name) -> None:
        self.concept = concept
        self.named = named
        self._kinds: dict[str, T] = {}

    def register(self, kind: One) -> One:
        """Enter a class under its name; also as a decorator. A class defined anew replaces itself.

        **Raises:** `ValueError` if another class has the name, `TypeError` if the class lacks a
        method that its base asks for.
        """
        if missing := sorted(getattr(kind, "__abstractmethods__", ())):
            raise TypeError(
                f"{self.concept}: {kind.__name__} cannot be registered without "
                f"{', '.join(missing)}; define what is missing."
            )
        name = self.named(kind)
        known = self._kinds.get(name)
        if known is not None and known.__module__ != kind.__module__:
            raise ValueError(
                f"{self.concept}: the name {name!r} is taken by a class of {known.__module__}; "
                "choose another."
            )
        self._kinds[name] = cast(T, kind)
        return kind

    def __getitem__(self, name: str) -> T:
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)
