"""What a spec can name, and the keys of each: `gradflow kinds`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradflow.cli.terminal import BAD_INPUT, HOLDS, console_of
from gradflow.dynamics import DYNAMICS
from gradflow.observables import BUILT_IN, Observable
from gradflow.regularizers import REGULARIZERS
from gradflow.study.spec.claim_tables import CLAIMS
from gradflow.study.spec.errors import not_one_of, shown
from gradflow.study.spec.figure_tables import FIGURES
from gradflow.study.spec.kind_tables import first_sentence, table_of
from gradflow.study.spec.tables import Section

_WORDS = {
    float: "number", int: "whole number", bool: "true or false", str: "text", dict: "table",
    Any: "any value",
}  # fmt: skip


def print_kinds(names: list[str]) -> int:
    """Print what there is, or the keys of what is named.

    **Returns:** the exit status.
    """
    known = [name for _, kinds, _ in _concepts() for name in kinds]
    unknown = [name for name in names if name not in known]
    if unknown:
        faults = [f"NAME: {not_one_of(name, known, what='known')}" for name in unknown]
        typer.echo("\n".join(faults), err=True)
        return BAD_INPUT
    console = console_of()
    for title, kinds, one in _concepts():
        if not names:
            _print_all(console, title, kinds)
        for name in names:
            if name in kinds:
                one(console, name, kinds[name])
    return HOLDS


def _concepts() -> Iterator[tuple[str, Mapping[str, Any], Callable[[Console, str, Any], None]]]:
    """What there are kinds of, the kinds by name, and what prints one of them."""
    yield "Dynamics", DYNAMICS, _print_class
    yield "Regularizers", REGULARIZERS, _print_class
    yield "Observables", BUILT_IN, _print_observable
    yield "Figures", FIGURES, _print_figure
    yield "Claim quantities", CLAIMS, _print_claim


def _print_all(console: Console, title: str, kinds: Mapping[str, Any]) -> None:
    table = _table()
    for name, kind in kinds.items():
        is_observable = isinstance(kind, Observable)
        table.add_row(name, Text(kind.long_name if is_observable else first_sentence(kind)))
    _print(console, title, table)


def _print_class(console: Console, name: str, kind: type) -> None:
    _print_keys(console, name, table_of(kind), besides="kind")


def _print_figure(console: Console, name: str, figure: type[Section]) -> None:
    _print_keys(console, name, figure, besides="kind")


def _print_claim(console: Console, name: str, claim: type[Section]) -> None:
    _print_keys(console, name, claim, besides="quantity")


def _print_keys(console: Console, name: str, model: type[Section], besides: str) -> None:
    """Print the keys of a table besides the one that holds its name."""
    table = _table("Key", "Type", "Default", "Meaning")
    for key, field in model.model_fields.items():
        if key != besides:
            cells = _type(field.annotation), _default(field), field.description or ""
            table.add_row(key, *map(Text, cells))
    _print(console, f"{name}: {first_sentence(model)}", table)


def _print_observable(console: Console, name: str, observable: Observable) -> None:
    table = _table()
    table.add_row("Units", Text(observable.units))
    table.add_row("Axes", Text(", ".join(observable.dims) or "none, it is a number"))
    _print(console, f"{name}: {observable.long_name}", table)


def _print(console: Console, title: str, table: Table) -> None:
    console.print(Text(title, style="bold"))
    console.print(table)


def _table(*columns: str) -> Table:
    """A table whose first column is never cut; without `columns` it has two that have no name."""
    table = Table(
        box=box.SIMPLE_HEAD if columns else box.SIMPLE,
        pad_edge=False,
        show_header=bool(columns),
    )
    for number, column in enumerate(columns or ("", "")):
        table.add_column(column, no_wrap=number == 0)
    return table


def _type(annotation: Any) -> str:
    """A type of a key in words."""
    inner, origin = get_args(annotation), get_origin(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " or ".join(map(shown, inner))
    if origin in (Union, UnionType):
        return " or ".join(_type(option) for option in inner if option is not NoneType)
    if origin is list:
        return f"list of {_type(inner[0])}"
    return _WORDS.get(origin or annotation, "table")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None else shown(value)
