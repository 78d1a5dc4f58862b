"""What the page says in words and tables: verdicts, phases and rates, set-up, provenance."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradflow.analysis.comparison.against_theory import compared_rates
from gradflow.analysis.convergence.results import OrderRow
from gradflow.analysis.rates import Rate
from gradflow.plot.formatting import (
    MISSING,
    arrows,
    duration,
    interval,
    not_constant,
    number,
    with_error,
)
from gradflow.plot.reading import RunView, on_common_clock
from gradflow.study.figures.views import run_views
from gradflow.study.results import ClaimResult, OrdersResult, StudyResult


@dataclass(frozen=True)
class Cell:
    """A value, and what stands below it in small type."""

    value: str
    below: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClaimRow:
    """One line of the table of claims."""

    verdict: str
    sentence: str
    measured: str
    expected: str
    rule: str
    runs: str
    detail: str


@dataclass(frozen=True)
class PhaseRow:
    """One line of the table of phases and rates."""

    run: str
    colour: str
    cells: tuple[Cell, ...]


PHASE_COLUMNS = (
    ("Optimization phase ends at", "flow time"),
    ("Optimization rate", "1/flow time"),
    ("Imbalance decay rate", "1/flow time"),
    ("Separation of the phases", "ratio of the two rates"),
    ("Replicas diverged", ""),
)


def summary(result: StudyResult) -> str:
    """Returns the study in one sentence: how many of its claims hold, and rates agree."""
    counts = {
        v: sum(c.verdict == v for c in result.claims) for v in ("holds", "fails", "undecided")
    }
    total = len(result.claims)
    if result.status != "complete":
        broken = f"The study was {_STATUS[result.status]}"
        if total == 0:
            return f"{broken}; no claim was judged."
        return f"{broken}; {counts['holds']} of {total} claims {_verb('holds', counts['holds'])}."
    rates = _rates(result)
    if total == 0:
        return f"The study makes no claims{rates}."
    if counts["holds"] == total:
        claims = "The one claim holds" if total == 1 else f"All {total} claims hold"
        return f"{claims}{rates}."
    parts = [f"{counts['holds']} of {total} claims {_verb('holds', counts['holds'])}"]
    if counts["fails"]:
        parts.append(f"{counts['fails']} {_verb('fails', counts['fails'])}")
    if counts["undecided"]:
        verb = "is" if counts["undecided"] == 1 else "are"
        parts.append(f"{counts['undecided']} {verb} undecided")
    return f"{', '.join(parts)}{rates}."


def _rates(result: StudyResult) -> str:
    """Returns what became of the rates that theory predicts, as the second half of a sentence."""
    counts = compared_rates(result.runs.values())
    total = counts.total()
    if total == 0:
        return ""
    parts = [f"{counts['agrees']} {_verb('agrees', counts['agrees'])}"]
    if counts["misses"]:
        parts.append(f"{counts['misses']} {'misses' if counts['misses'] == 1 else 'miss'}")
    for word in ("not constant", "undecided"):
        if counts[word]:
            parts.append(f"{counts[word]} {'is' if counts[word] == 1 else 'are'} {word}")
    return f"; of {total} rate{'s' * (total > 1)} compared with theory {', '.join(parts)}"


def _verb(singular: str, count: int) -> str:
    return singular if count == 1 else singular.removesuffix("s")


_STATUS = {"interrupted": "interrupted", "failed": "broken off by an error"}


def tone(result: StudyResult) -> str:
    """Returns the colour class of the summary; only a complete study without a miss is green."""
    verdicts = {claim.verdict for claim in result.claims}
    if result.status != "complete" or "fails" in verdicts:
        return "fails"
    if "undecided" in verdicts or compared_rates(result.runs.values())["misses"]:
        return "undecided"
    return "holds" if verdicts else "plain"


def claim_rows(result: StudyResult) -> list[ClaimRow]:
    """Returns the table of claims."""
    return [_claim_row(claim, result) for claim in result.claims]


def _claim_row(claim: ClaimResult, result: StudyResult) -> ClaimRow:
    known = {**result.runs, **result.orders}
    labels = [known[name].label or name for name in claim.runs if name in known]
    expected = claim.expected
    if claim.quantity == "order_status":
        measured = MISSING if math.isnan(claim.measured) else f"order {number(claim.measured)}"
    elif isinstance(expected, str):
        # an agreement is measured by the largest relative difference of the two runs
        measured = f"{number(100 * claim.measured, 2)}\u00a0% apart"
    else:
        measured = arrows(claim.parts) or with_error(claim.measured, claim.measured_error)
    if math.isnan(claim.measured):
        measured = MISSING
    return ClaimRow(
        verdict=claim.verdict,
        sentence=claim.sentence,
        measured=measured,
        expected=number(expected) if isinstance(expected, float | int) else expected or MISSING,
        rule=claim.rule,
        runs=", ".join(labels),
        detail=claim.detail,
    )


def phase_rows(result: StudyResult) -> list[PhaseRow]:
    """Returns the table of phases and rates: measured values, and predictions below them."""
    rows = []
    for view in on_common_clock(run_views(result, ())):
        run = view.run
        known = (run.phases, run.rate, run.prediction)
        if all(part is None for part in known) and not view.diverged.any():
            continue
        cells = (_end(view), _optimization_rate(view), _decay(view), _separation(view))
        lost = int(view.diverged.sum())
        rows.append(PhaseRow(view.label, view.colour, (*cells, Cell(f"{lost} of {view.replicas}"))))
    return rows


def _predicted(value: float | None) -> str:
    missing = value is None or math.isnan(value)
    return "" if missing else f"predicted {number(value)}"


def _effective(view: RunView, value: float) -> str:
    """Returns a number of a run with momentum on the clock that it shares with the others."""
    return f"in effective time {number(value)}" if view.pace != 1.0 else ""


def _cell(value: str, *below: str) -> Cell:
    return Cell(value, tuple(line for line in below if line))


def _end(view: RunView) -> Cell:
    phases, prediction = view.run.phases, view.run.prediction
    predicted = _predicted(None if prediction is None else prediction.optimization_end)
    if phases is None:
        return _cell(MISSING, predicted)
    bracket = ""
    if not math.isfinite(phases.standard_error):
        bracket = interval(phases.low, phases.high)
        bracket = "" if bracket == MISSING else f"in {bracket}"
    end = with_error(phases.optimization_end, phases.standard_error)
    return _cell(end, bracket, predicted, _effective(view, phases.optimization_end / view.pace))


def _optimization_rate(view: RunView) -> Cell:
    phases, prediction = view.run.phases, view.run.prediction
    predicted = _predicted(None if prediction is None else prediction.optimization_rate)
    if phases is None:
        return _cell(MISSING, predicted)
    rate = phases.optimization_rate
    effective = _effective(view, rate * view.pace)
    if not phases.optimization_rate_constant:
        local = not_constant(phases.optimization_rate_local)
        return _cell(local, f"mean {number(rate)}", predicted, effective)
    measured = with_error(rate, phases.optimization_rate_error)
    return _cell(measured, predicted, effective)


def _decay(view: RunView) -> Cell:
    rate, prediction = view.run.rate, view.run.prediction
    predicted = _predicted(None if prediction is None else prediction.imbalance_rate)
    if rate is None:
        return _cell(MISSING, predicted)
    if not rate.constant:
        along = view.run.along
        followed = "" if along is None else f"slow flow along the run {number(along.value)}"
        mean = f"mean {number(rate.value)}"
        at_start = f"{predicted} at its start" if predicted else ""
        below = mean, followed, at_start, _effective(view, rate.value * view.pace)
        return _cell(not_constant(rate.local), *below)
    bounds = _bounds(rate)
    measured = with_error(rate.value, rate.standard_error)
    return _cell(measured, bounds, predicted, _effective(view, rate.value * view.pace))


def _bounds(rate: Rate) -> str:
    """The interval of a rate; of one path, which has none, how far its thirds differ if they do."""
    bounds = interval(rate.low, rate.high)
    if bounds == MISSING:
        return ""
    if math.isfinite(rate.standard_error):
        return f"{100 * rate.confidence:g}\u00a0% {bounds}"
    same = number(rate.low) == number(rate.high)
    return "" if same else f"{bounds} over thirds of the window"


def _separation(view: RunView) -> Cell:
    phases, prediction = view.run.phases, view.run.prediction
    predicted = _predicted(None if prediction is None else prediction.separation)
    if phases is None:
        return _cell(MISSING, predicted)
    if phases.changing:
        about = number(float(f"{phases.separation:.2g}"))  # number() keeps all digits of 2288
        return _cell(f"about {about}", "of a rate that is not constant", predicted)
    return _cell(with_error(phases.separation, phases.separation_error), predicted)


def remarks(result: StudyResult) -> list[tuple[str, str]]:
    """Returns what people should know about single runs: (run, remark)."""
    found = []
    for view in run_views(result, ()):
        phases, rate = view.run.phases, view.run.rate
        texts = list(view.run.notes)
        if phases is not None:
            texts += [phases.reason, phases.note]
        if rate is not None:
            texts.append(rate.note)
        if view.run.trajectory.interrupted:
            texts.append(f"interrupted at t = {number(float(view.run.trajectory.time[-1]))}")
        found += [(view.label, text) for text in dict.fromkeys(texts) if text]
    return found


@dataclass(frozen=True)
class OrderLine:
    """One line of the table of orders."""

    pair: str
    observable: str
    distance: str
    order: Cell
    range: str
    status: str
    reason: str


def order_lines(result: StudyResult) -> list[OrderLine]:
    """Returns the table of orders: one line for each observable of each [[orders]] table."""
    return [
        _order_line(table, row) for table in result.orders.values() for row in table.orders.rows
    ]


def _order_line(table: OrdersResult, row: OrderRow) -> OrderLine:
    pair, distance = table.label, table.orders.kind
    status = f"{row.status} (interrupted)" if table.interrupted else row.status
    if not row.resolved:
        return OrderLine(pair, row.observable, distance, Cell(MISSING), "", status, row.reason)
    bounds = f"{100 * row.confidence:g}\u00a0% {interval(row.low, row.high)}"
    sizes = ""
    if row.asymptotic_range is not None:  # not measured numbers: they keep their digits
        sizes = f"[{', '.join(number(h) for h in row.asymptotic_range)}]"
    order = Cell(number(row.order), (bounds,))
    return OrderLine(pair, row.observable, distance, order, sizes, status, row.reason)


def order_remarks(result: StudyResult) -> list[tuple[str, str]]:
    """Returns what people should know about single [[orders]] tables: (label, remark)."""
    found = []
    for table in result.orders.values():
        texts = (table.orders.coupling, *table.orders.notes, *table.notes)
        found += [(table.label, text) for text in dict.fromkeys(texts) if text]
    return found


def setup_rows(result: StudyResult) -> list[dict[str, Any]]:
    """Returns one line for each run: regularizers, dynamics, replicas, length, seed, wall time."""
    rows = []
    for view in run_views(result, ()):
        spec, attrs = result.runs[view.name].spec, view.dataset.attrs
        seconds = attrs.get("wall_time_s")
        rows.append(
            {
                "run": view.label,
                "group": view.run.group,
                "regularizers": [in_code(r, "kind") for r in spec.regularizers],
                "dynamics": in_code(spec.dynamics, "kind"),
                "replicas": str(view.replicas),
                "length": f"t = {number(float(view.dataset['time'].values[-1]))}",
                "saved": _saved(view),
                "seed": str(result.spec.seed if spec.seed is None else spec.seed),
                "wall_time": duration(None if seconds is None else float(seconds)),
            }
        )
    return rows


def _saved(view: RunView) -> str:
    times = f"{view.dataset.sizes['time']} times saved"
    if "step" not in view.dataset.coords:
        return times
    return f"{int(view.dataset['step'].values[-1])} steps, {times}"


def problems(result: StudyResult) -> list[dict[str, str]]:
    """Returns the data and networks of the study in words, each with the runs that use it."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for view in run_views(result, ()):
        data = view.run.trajectory.problem.data
        spec = result.runs[view.name].spec
        data_spec = in_code(result.spec.data_of(spec), "source")
        network_spec = in_code(result.spec.network_of(spec), "init")
        key = (data_spec, network_spec)
        if key in found:
            found[key]["runs"] += f", {view.label}"
            continue
        widths = json.loads(view.dataset.attrs["widths"])
        sample = "population moments" if data.x is None else f"{data.x.shape[0]} samples"
        found[key] = {
            "runs": view.label,
            "data": f"{_count(data.d_in, 'input')}, {_count(data.d_out, 'target')}, {sample}",
            "data_spec": data_spec,
            "network": f"depth {len(widths) - 1}, widths {' → '.join(map(str, widths))}",
            "network_spec": network_spec,
        }
    if len(found) == 1:
        next(iter(found.values()))["runs"] = "all runs"
    return list(found.values())


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def in_code(section: Any, kind: str) -> str:
    """Writes a table of the spec as a call, keys at their defaults left out."""
    fields = section.model_dump(exclude_defaults=True)
    name = str(getattr(section, kind))
    fields.pop(kind, None)
    return f"{name}({', '.join(f'{key}={_shown(value)}' for key, value in fields.items())})"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def provenance(result: StudyResult) -> list[tuple[str, str]]:
    """Returns versions, device, precision and times of the study: (what, value)."""
    attrs = [view.dataset.attrs for view in run_views(result, ())]
    versions: dict[str, set[str]] = {}
    for one in attrs:
        for package, version in json.loads(one.get("versions", "{}")).items():
            versions.setdefault(package, set()).add(str(version))
    rows = [(package, ", ".join(sorted(found))) for package, found in versions.items()]
    rows += [("device", _distinct(attrs, "device")), ("numbers", _distinct(attrs, "dtype"))]
    rows.append(("seed of the study", str(result.spec.seed)))
    rows.append(("wall time", duration(result.wall_time_s)))
    return [(what, value) for what, value in rows if value]


def _distinct(attrs: Sequence[Mapping[str, Any]], key: str) -> str:
    return ", ".join(dict.fromkeys(str(one[key]) for one in attrs if key in one))
