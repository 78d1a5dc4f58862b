"""Kinds: the classes of one concept by the names that specs, files and the command line use."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, cast

T = TypeVar("T", bound=type)
One = TypeVar("One", bound=type)


class Kinds(Mapping[str, T], Generic[T]):
    """The classes of one concept, by name, in the order in which they were registered.

    **Arguments:**

    - `concept`: what they are kinds of, in the plural: "dynamics", "regularizers".
    """

    def __init__(self, concept: str) -> None:
        self.concept = concept
        self._kinds: dict[str, T] = {}

    def register(self, kind: One) -> One:
        """Enter a class under its name; also as a decorator. A class defined anew replaces itself.

        **Raises:** `ValueError` if another class has the name.
        """
        known = self._kinds.get(kind.__name__)
        if known is not None and known.__module__ != kind.__module__:
            raise ValueError(
                f"{self.concept}: the name {kind.__name__!r} is taken by a class of "
                f"{known.__module__}; choose another."
            )
        self._kinds[kind.__name__] = cast(T, kind)
        return kind

    def __getitem__(self, name: str) -> T:
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)
