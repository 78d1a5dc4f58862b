"""What a study leaves on disk beside its trajectories and figures: the spec and the verdicts."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gradflow.study.load import Study
from gradflow.study.output import ResultFolder
from gradflow.study.results import StudyResult

CLAIMS = "claims.json"
SPEC = "spec.toml"


def write_spec(folder: ResultFolder, study: Study) -> None:
    """Write the spec: the text as given, and every setting as run, defaults and options applied."""
    folder.write_text(SPEC, study.text)
    settings = {"short": study.short, **study.spec.model_dump(mode="json", exclude={"short"})}
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
            "claims": [_finite(asdict(claim)) for claim in result.claims],
        },
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
        },
        "orders": {
            name: {
                "status": "interrupted" if table.interrupted else "complete",
                "notes": list(table.notes),
            }
            for name, table in result.orders.items()
        },
        "errors": result.errors,
    }


def own_version() -> str:
    """The version of gradflow that is installed."""
    try:
        return version("gradflow")
    except PackageNotFoundError:
        return "unknown"


def _finite(value: Any) -> Any:
    """JSON has no NaN: replace what is not finite by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
