"""What a study leaves on disk beside its trajectories and figures: the spec and the verdicts."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gradflow.study.results import OrdersResult, StudyResult
from gradflow.study.run.output import ResultFolder
from gradflow.study.spec.load import Study

CLAIMS = "claims.json"
SPEC = "spec.toml"


def write_spec(folder: ResultFolder, study: Study) -> None:
    """Write the spec: the text as given, and every setting as run, defaults and options applied."""
    folder.write_text(SPEC, study.text)
    spec = study.spec
    settings = {"short": study.short, **spec.model_dump(mode="json", exclude={"short"})}
    settings["orders"] = [orders.as_given() for orders in spec.orders]
    folder.write_json("spec.json", settings)


def write_claims(folder: ResultFolder, result: StudyResult) -> None:
    """Write the verdicts with all their numbers; numbers that are not finite become null."""
    verdicts = [claim.verdict for claim in result.claims]
    folder.write_json(
        CLAIMS,
        {
            "study": result.spec.name,
            "holds": result.holds,
            "counts": {v: verdicts.count(v) for v in ("holds", "fails", "undecided")},
            "claims": [finite(asdict(claim)) for claim in result.claims],
        },
    )


def orders_record(result: OrdersResult) -> dict[str, Any]:
    """The fitted orders of an [[orders]] table, what they rest on, and why some have no number."""
    measured = result.orders
    rows = [asdict(row) for row in measured.rows]
    return finite(
        {
            "name": result.name,
            "first": measured.first,
            "second": measured.second,
            "distance": measured.kind,
            "times": measured.times,
            "coupling": measured.coupling,
            "interrupted": measured.interrupted,
            "overall": None if measured.overall is None else asdict(measured.overall),
            "rows": rows,
            "notes": [*measured.notes, *result.notes],
        }
    )


def status(result: StudyResult, study: Study) -> dict[str, Any]:
    """What `status.json` says about a finished study."""
    return {
        "status": result.status,
        "study": result.spec.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_time_s": round(result.wall_time_s, 3),
        "gradflow": own_version(),
        "seed": result.spec.seed,
        "short": study.short,
        "runs": {
            name: {
                "status": "interrupted" if run.trajectory.interrupted else "complete",
                "diverged": int(run.trajectory.diverged.sum()),
                "notes": list(run.notes),
            }
            for name, run in result.runs.items()
        }
        | _missing(result, [run.name for run in result.spec.run]),
        "orders": {
            name: {
                "status": "interrupted" if table.interrupted else "complete",
                "notes": list(table.notes),
            }
            for name, table in result.orders.items()
        }
        | _missing(result, [table.name for table in result.spec.orders]),
        "errors": result.errors,
    }


def _missing(result: StudyResult, names: list[str]) -> dict[str, Any]:
    """Runs or tables that left no result: they broke, or were not reached before Ctrl-C."""
    done = {**result.runs, **result.orders}
    return {
        name: {"status": "failed" if name in result.errors else "nothing recorded"}
        for name in names
        if name not in done
    }


def own_version() -> str:
    """The version of gradflow that is installed."""
    try:
        return version("gradflow")
    except PackageNotFoundError:
        return "unknown"


def finite(value: Any) -> Any:
    """JSON has no NaN: replace what is not finite by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
