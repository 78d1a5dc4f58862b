"""What a benchmark leaves behind: a Markdown table, a JSON file and a figure of ratios."""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from contest import Timing
from rich.console import Console

RESULTS = Path(__file__).parent / "results"

UNITS = {"ns": 1e9, "us": 1e6, "ms": 1e3, "s": 1.0}

PROSE = Console(highlight=False, width=140)


@dataclass(frozen=True)
class Target:
    """The time of `subject` over that of the fastest of `against` shall be at most `most`."""

    claim: str
    subject: str
    against: tuple[str, ...]
    most: float

    def measured(self, timings: dict[str, Timing]) -> float | None:
        """The median ratio over the rounds; None if a contestant is missing."""
        present = [timings[name] for name in self.against if name in timings]
        if self.subject not in timings or not present:
            return None
        best = min(present, key=lambda t: t.median)
        return statistics.median(timings[self.subject].ratios(best))


def stated(claim: str, measured: float, most: float) -> dict[str, Any]:
    """A target that is no ratio of times: an error, or memory."""
    return {"claim": claim, "needed": most, "measured": measured, "met": bool(measured <= most)}


@dataclass
class Table:
    """One contest: its timings, what they are compared with and what was asked.

    `further` are targets that are no ratios of times, as `stated` makes them; `absent` says of
    contestants that did not finish why.
    """

    title: str
    unit: str
    per: str
    reference: str
    timings: dict[str, Timing]
    targets: Sequence[Target] = ()
    agreement: dict[str, float] = field(default_factory=dict)
    agreement_unit: str = "standard errors"
    further: Sequence[dict[str, Any]] = ()
    absent: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row a contestant."""
        scale = UNITS[self.unit]
        reference = self.timings[self.reference]
        rows = []
        for name, timing in self.timings.items():
            ratios = timing.ratios(reference)
            rows.append(
                {
                    "contestant": name,
                    "median": timing.median * scale,
                    "least": min(timing.seconds) * scale,
                    "most": max(timing.seconds) * scale,
                    "ratio": statistics.median(ratios),
                    "ratio_least": min(ratios),
                    "ratio_most": max(ratios),
                    "rounds": len(timing.seconds),
                    "first_call_s": timing.first_call,
                    "agreement": self.agreement.get(name),
                    **timing.facts,
                }
            )
        return rows

    def judged(self) -> list[dict[str, Any]]:
        """One row a target."""
        rows = []
        for target in self.targets:
            ratio = target.measured(self.timings)
            if ratio is not None:
                rows.append(stated(target.claim, ratio, target.most))
        return [*rows, *self.further]

    def markdown(self) -> str:
        """The table as text."""
        extra = list(dict.fromkeys(k for t in self.timings.values() for k in t.facts))
        head = [self.title, f"{self.unit} a {self.per} (range)", f"over {self.reference} (range)"]
        lines = ["| " + " | ".join([*head, *extra]) + " |", "|---" * (3 + len(extra)) + "|"]
        for row in self.rows():
            cells = [
                row["contestant"],
                f"{row['median']:.3g} ({row['least']:.3g} to {row['most']:.3g})",
                f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})",
                *(_cell(row.get(key)) for key in extra),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [f"\n{name}: {reason}" for name, reason in self.absent.items()]
        for target in self.judged():
            word = "met" if target["met"] else "missed"
            lines.append(
                f"\n{word}: {target['claim']}: {target['measured']:.3g}, "
                f"at most {target['needed']:.3g}"
            )
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Report:
    """Collects the tables of one program and writes them."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name = name
        self.quick = options.quick
        self.folder = options.output
        self.machine = machine.describe()
        self.tables: list[Table] = []
        self.further: dict[str, Any] = {}
        found = ", ".join(f"{k} {v}" for k, v in machine.versions().items())
        PROSE.print(
            f"# {name}{' (quick: numbers mean nothing)' if self.quick else ''}\n\n"
            f"{self.machine['processor']}, {self.machine['cores']} cores, devices "
            f"{self.machine['devices']}, load {self.machine['load_before']}\n{found}\n"
        )

    def add(self, table: Table) -> None:
        """Print a table and keep it."""
        self.tables.append(table)
        PROSE.print(table.markdown(), soft_wrap=True)

    def write(self) -> None:
        """Write `NAME.json` and the figure of the ratios; a quick run writes only where told to."""
        folder = self.folder or (None if self.quick else RESULTS)
        if folder is None:
            return
        content = {
            "name": self.name,
            "quick": self.quick,
            "machine": self.machine,
            "tables": [
                {
                    "title": t.title,
                    "unit": t.unit,
                    "per": t.per,
                    "reference": t.reference,
                    "agreement_unit": t.agreement_unit,
                    "rows": t.rows(),
                    "targets": t.judged(),
                    "absent": t.absent,
                }
                for t in self.tables
            ],
            "further": self.further,
        }
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, allow_nan=True) + "\n"
        (folder / f"{self.name}.json").write_text(text)
        if self.tables:
            # Not before: a process whose memory is watched shall not hold matplotlib.
            from ratio_figure import draw_ratios

            draw_ratios(self.tables, folder / self.name)


def options(description: str) -> argparse.ArgumentParser:
    """The command line that all programs share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke run, no measurement")
    parser.add_argument("--rounds", type=int, default=None, help="how often everything is timed")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    return parser
