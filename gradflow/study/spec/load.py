"""Reading a spec: TOML text to a validated study, or every error at once, each with its line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from gradflow.study.spec.check import check
from gradflow.study.spec.chosen import TableOf
from gradflow.study.spec.errors import Fault, not_one_of, shown, suggestion
from gradflow.study.spec.kind_tables import REFUSED
from gradflow.study.spec.locate import Lines, Path as KeyPath, syntax_error_line
from gradflow.study.spec.order_tables import given_step_sizes
from gradflow.study.spec.part import Part, take_part
from gradflow.study.spec.short import shorten
from gradflow.study.spec.spec import StudySpec
from gradflow.study.spec.tables import NAME

_ELEMENTS = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "finite_number": "a finite number",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "too_short": "at least {min_length} entries",
    "string_too_short": "some text",
    "string_pattern_mismatch": NAME,
}


class SpecError(ValueError):
    """A spec that cannot be run; the message has one line an error, with file and line number."""


@dataclass(frozen=True)
class Study:
    """A validated spec together with where it came from."""

    spec: StudySpec
    path: Path
    text: str
    lines: Lines
    table: dict[str, Any]
    short: bool = False

    def error(self, faults: Iterable[Fault]) -> SpecError:
        """The error that reports `faults` with their lines."""
        return SpecError(_render(self.path, self.lines, self.table, faults))


def load_study(
    path: Path, *, short: bool = False, seed: int | None = None, part: Part = "study"
) -> Study:
    """Read and validate a spec.

    **Arguments:**

    - `path`: a TOML file.
    - `short`: apply the overrides of `[short]`.
    - `seed`: use this seed in place of the spec's.
    - `part`: keep the whole study, its runs or its [[orders]] tables.

    **Raises:** `SpecError` with one line an error: file, line, key, what was given, what is
    allowed.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    text = text.replace("\r\n", "\n")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = syntax_error_line(str(error), text)
        raise SpecError(f"{path}:{line}: not valid TOML: {error}") from error
    lines = Lines(text)
    try:
        spec = StudySpec.model_validate(table)
    except ValidationError as error:
        faults = [*_faults(error), *given_step_sizes(table)]
        raise SpecError(_render(path, lines, table, faults)) from error
    if faults := [*check(spec), *given_step_sizes(table)]:
        raise SpecError(_render(path, lines, table, faults))
    if short:
        spec = shorten(spec)
    if seed is not None:
        spec = spec.model_copy(update={"seed": seed})
    spec = take_part(spec, part)
    if not spec.run and not spec.orders:
        missing = "[[orders]]" if part == "orders" else "[[run]]"
        raise SpecError(f"{path}: has no {missing} tables; add one, or use gradflow study")
    return Study(spec, path, text, lines, table, short)


def _render(path: Path, lines: Lines, table: dict[str, Any], faults: Iterable[Fault]) -> str:
    placed = [(lines.of(fault.path), _key(table, fault.path) + fault.message) for fault in faults]
    placed = sorted(dict.fromkeys(placed), key=lambda pair: pair[0])
    return "\n".join(f"{path}:{line}: {text}" for line, text in placed)


def _key(table: Any, path: KeyPath) -> str:
    """`run "fast", dynamics.step_size: ` for the path `("run", 0, "dynamics", "step_size")`."""
    owner, rest = "", ""
    here: Any = table
    for number, part in enumerate(path):
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            here = None
        if number == 0 and len(path) > 1 and isinstance(path[1], int):
            owner = str(part)
        elif number == 1 and owner:
            name = here.get("name") if isinstance(here, dict) else None
            owner += f' "{name}"' if isinstance(name, str) else f" {int(part) + 1}"
        elif isinstance(part, int):
            rest += f"[{part}]"
        else:
            rest += f".{part}" if rest else part
    text = ", ".join(part for part in (owner, rest) if part)
    return f"{text}: " if text else ""


def _faults(error: ValidationError) -> Iterator[Fault]:
    for item in error.errors(include_url=False):
        loc = item["loc"]
        path = tuple(part for part in loc if not _is_tag(part))
        context = item.get("ctx", {})
        given = f"got {shown(item['input'])}; "
        field, model = _field(loc)
        match item["type"]:
            case kind if kind == REFUSED:
                message = item["msg"]
            case "extra_forbidden":
                allowed = [*model.model_fields] if model else []
                close = suggestion(path[-1], allowed)
                message = f"unknown key; {close}allowed here: {', '.join(allowed)}"
            case "missing":
                message = f"is missing; give {_described(field)}"
            case "union_tag_not_found":
                key, choices = _choices(field)
                path = (*path, key) if isinstance(item["input"], dict) else path
                message = f"is missing; allowed: {', '.join(choices)}"
                if not isinstance(item["input"], dict):
                    message = f"{given}allowed: a table with the key {key}"
            case "union_tag_invalid":
                key, choices = _choices(field)
                path = (*path, key)
                message = not_one_of(str(context["tag"]).partition("=")[2], choices)
            case "literal_error" if field is not None and get_origin(field.annotation) is not None:
                message = not_one_of(item["input"], dict.fromkeys(_words(field.annotation)))
            case kind if field is None or isinstance(path[-1], int):
                text = _ELEMENTS.get(kind, item["msg"])
                message = f"{given}allowed: {text.format(**context)}"
            case _:
                message = f"{given}allowed: {_described(field)}"
        yield Fault(path, message)


def _described(field: FieldInfo | None) -> str:
    return (field.description if field else None) or "a value"


def _is_tag(part: str | int) -> bool:
    """Whether a part of a pydantic location is not a key: a union tag or the mark of a bad key."""
    return isinstance(part, str) and ("=" in part or part == "[key]")


def _field(loc: tuple[str | int, ...]) -> tuple[FieldInfo | None, type[BaseModel] | None]:
    """The field that a location ends in and the model it belongs to."""
    candidates: list[tuple[str, type[BaseModel]]] = [("", StudySpec)]
    field: FieldInfo | None = None
    owner: type[BaseModel] | None = None
    in_names = False  # inside a dict field, whose keys are free names
    for part in loc:
        if isinstance(part, int) or part == "[key]":
            continue
        if "=" in part:
            candidates = [pair for pair in candidates if pair[0] == part] or candidates
        elif in_names:
            in_names = False
        elif len(candidates) == 1:
            owner = candidates[0][1]
            field = owner.model_fields.get(part)
            candidates = list(_tables(field)) if field else []
            in_names = field is not None and get_origin(field.annotation) is dict
    return field, owner


def _tables(field: FieldInfo) -> Iterator[tuple[str, type[BaseModel]]]:
    """The tables that a field may hold, with their tags."""
    marks = [mark for mark in field.metadata if isinstance(mark, TableOf)]
    if marks:
        yield from marks[0].tables()
    else:
        yield from _models(field.annotation)


def _models(annotation: Any, tag: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The models inside an annotation with their tags."""
    marks = getattr(annotation, "__metadata__", ())
    if chosen := [mark for mark in marks if isinstance(mark, TableOf)]:
        yield from chosen[0].tables()
        return
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield tag, annotation
    for inner in get_args(annotation):
        tags = [mark.tag for mark in marks if isinstance(mark, Tag)]
        yield from _models(inner, tags[0] if tags else tag)


def _words(annotation: Any) -> Iterator[str]:
    """The values that the literals inside an annotation take."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for inner in get_args(annotation):
            yield from _words(inner)


def _choices(field: FieldInfo | None) -> tuple[str, list[str]]:
    """The key that chooses between the tables of a field and the values it takes."""
    tags = [tag for tag, _ in _tables(field)] if field else []
    key = tags[0].partition("=")[0] if tags else ""
    return key, [tag.partition("=")[2] for tag in tags]
