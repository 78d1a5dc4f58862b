"""The table of rates: predictions, slow flow, SDE and SGD of every regularizer, with verdicts."""

import math
from dataclasses import dataclass, replace

from gradflow.analysis.comparison.against_theory import (
    CHANGES,
    Compared,
    Judgement,
    Measured,
    TheoryRow,
    theory_rows,
)
from gradflow.plot.formatting import arrows, not_constant, number, with_error
from gradflow.study.figures.views import run_views
from gradflow.study.results import StudyResult


@dataclass(frozen=True)
class TheoryEntry:
    """A number beside SGD: its name where there are several, and what SGD says of it."""

    name: str
    value: str
    verdict: str = ""
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class TheoryLine:
    """One line of the table of rates: the numbers of every column."""

    regularizer: str
    colour: str
    below: tuple[str, ...]
    cells: tuple[tuple[TheoryEntry, ...], ...]


THEORY_COLUMNS = (
    ("Predicted, leading order", "h \u2192 0"),
    ("Predicted, finite step", "exact in h"),
    ("Slow flow", "theory along the run"),
    ("SDE", "measured"),
    ("SGD", "measured"),
)


def theory_lines(result: StudyResult) -> list[TheoryLine]:
    """Returns the table of rates: theory, slow flow, SDE and SGD of every regularizer."""
    rows = theory_rows(list(result.runs.values()))
    colours = {view.name: view.colour for view in run_views(result, ())}
    labels = [row.label for row in rows]
    return [_theory_line(row, colours[row.run.name], labels.count(row.label) > 1) for row in rows]


def _theory_line(row: TheoryRow, colour: str, is_shared: bool) -> TheoryLine:
    """Writes a row; groups with several rows are told apart by their runs."""
    sizes = [
        f"{name}\u00a0=\u00a0{number(value, 3)}"
        for name, value in (("h", row.step_size), ("h\u00a0\u03bb", row.h_lambda))
        if math.isfinite(value) and value > 0.0
    ]
    run = row.run.label if is_shared and row.run.label != row.label else ""
    measured = () if row.measured is None else (_entry(row.measured),)
    cells = (
        _entries(row.leading_order),
        _entries(row.finite_step),
        _followed(row.slow_flow, row.classical_flow),
        _entries(*row.stochastic_flows),
        measured,
    )
    below = tuple(text for text in (run, ", ".join(sizes)) if text)
    return TheoryLine(row.label, colour, below, cells)


def _entries(*found: Compared | None) -> tuple[TheoryEntry, ...]:
    return tuple(_entry(one.number, one.name, one.verdict) for one in found if one is not None)


def _followed(*found: Compared | None) -> tuple[TheoryEntry, ...]:
    """Writes slow flows: their rates over the run, and below how these change along it."""
    entries = []
    for one in (one for one in found if one is not None):
        entry = _entry(replace(one.number, local=()), one.name, one.verdict)
        along = arrows(one.number.local)
        entries.append(replace(entry, said=tuple(filter(None, (along, *entry.said)))))
    return tuple(entries)


def _entry(value: Measured, name: str = "", verdict: Judgement | None = None) -> TheoryEntry:
    text = with_error(value.value, value.error) if value.error > 0.0 else number(value.value)
    text = not_constant(value.local) if value.local else text
    if verdict is None:
        return TheoryEntry(name, text)
    if verdict.reason == CHANGES:
        return TheoryEntry(name, text, verdict.word, (f"not compared: {CHANGES}",))
    size = f"SGD {_signed(100 * verdict.relative)}\u00a0%"
    if math.isfinite(verdict.sigmas):
        size += f", {_signed(verdict.sigmas)}\u00a0s.e."
    return TheoryEntry(name, text, verdict.word, tuple(filter(None, (size, verdict.reason))))


def _signed(value: float) -> str:
    """Writes a difference with its sign, in tenths where it is small."""
    text = f"{value:+.1f}" if abs(value) < 9.95 else f"{value:+.0f}"
    return text.replace("-", "\u2212") if float(text) else "0.0"
