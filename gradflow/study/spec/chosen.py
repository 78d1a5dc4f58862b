"""Tables whose model is chosen by the value of one of their keys among those registered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from gradflow.kinds import Kinds
from gradflow.study.spec.tables import Section


class TableOf:
    """Marks a field of a spec as a table of one of the kinds that are registered when it is read.

    Errors are those of a tagged union of the tables, so a place in a spec reads the same for both.

    **Arguments:**

    - `kinds`: a model for each value of the key.
    - `key`: the key that chooses.
    """

    def __init__(self, kinds: Kinds[Any], key: str = "kind") -> None:
        self.kinds = kinds
        self.key = key

    def tables(self) -> Iterator[tuple[str, type[Section]]]:
        """The table of every kind, with the tag by which errors name it."""
        for name in self.kinds:
            yield f"{self.key}={name}", self.table(name)

    def table(self, name: str) -> type[Section]:
        """The table of one kind."""
        return self.kinds[name]

    def checked(self, table: Section, given: dict[str, Any]) -> Section:
        """The table, if what its values say together is allowed.

        **Raises:** `ValidationError`.
        """
        return table

    def validate(self, given: Any) -> Section:
        """The table that is written."""
        if isinstance(given, Section):
            return given
        if not isinstance(given, dict) or self.key not in given:
            raise PydanticCustomError("union_tag_not_found", "a table that says what it is")
        name = given[self.key]
        tag = f"{self.key}={name}"
        if not isinstance(name, str) or name not in self.kinds:
            raise PydanticCustomError("union_tag_invalid", "unknown kind {tag}", {"tag": tag})
        try:
            return self.checked(self.table(name).model_validate(given), given)
        except ValidationError as error:
            found = error.errors(include_url=False)
            raise located([(e["type"], (tag, *e["loc"]), e["input"], e["msg"], e.get("ctx"))
                           for e in found]) from error  # fmt: skip

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validate)


def located(
    found: Iterable[tuple[str, tuple[str | int, ...], Any, str, dict[str, Any] | None]],
) -> ValidationError:
    """Errors inside a table, which pydantic reports at the place of the table."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError(kind, message, context),  # pyright: ignore[reportArgumentType]
            loc=place,
            input=given,
        )
        for kind, place, given, message, context in found
    ]
    return ValidationError.from_exception_data("table", details)
