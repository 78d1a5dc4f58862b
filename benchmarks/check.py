"""Compare fresh measurements with the committed ones.

    python benchmarks/check.py [--quick] [NAME ...]

Runs `bench_NAME.py` for every committed `results/NAME.json` and fails if gradflow has become slower
against anything it is compared with by more than `WORSE`, or a target that was met is missed by
more than that. Ratios within a round carry over to machines of the same kind; seconds do not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import RESULTS

HERE = Path(__file__).parent
WORSE = 1.5
"""Repeats of one measurement differ by up to 1.3."""


def gradflow_ratios(result: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """(table, contestant of gradflow, other one) -> time over the other's time."""
    found = {}
    for table in result["tables"]:
        median = {row["contestant"]: row["median"] for row in table["rows"]}
        for own in (n for n in median if n.startswith("gradflow")):
            for other in (n for n in median if not n.startswith("gradflow")):
                found[table["title"], own, other] = median[own] / median[other]
    return found


def targets_met(result: dict[str, Any]) -> dict[tuple[str, str], tuple[bool, float]]:
    """(table, claim) -> whether it is met, and by which factor it is missed."""
    return {
        (table["title"], target["claim"]): (target["met"], target["measured"] / target["needed"])
        for table in result["tables"]
        for target in table["targets"]
    }


def worsened(committed: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """What has become worse, in words."""
    found = []
    now = gradflow_ratios(fresh)
    for place, before in gradflow_ratios(committed).items():
        if place not in now:
            found.append(f"{' / '.join(place)}: not measured any more")
        elif now[place] > WORSE * before:
            found.append(f"{' / '.join(place)}: {before:.3g} before, {now[place]:.3g} now")
    met_now = targets_met(fresh)
    for place, (met, _) in targets_met(committed).items():
        if met and place in met_now and met_now[place][1] > WORSE:
            found.append(f"{' / '.join(place)}: missed by {met_now[place][1]:.2f}x")
    return found


def main() -> None:
    """Run and compare; exit status 1 if something has become worse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="default: everything that is committed")
    parser.add_argument("--quick", action="store_true", help="only run; compare nothing")
    chosen = parser.parse_args()
    committed = sorted(path.stem for path in RESULTS.glob("*.json"))
    programs = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))
    names = chosen.names or committed
    if not names:
        sys.exit("no committed results; run `make bench` first")
    unknown = [n for n in names if n not in programs or not (chosen.quick or n in committed)]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no such program or no committed result")
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            command = [sys.executable, str(HERE / f"bench_{name}.py"), "--output", folder]
            subprocess.run([*command, *(["--quick"] if chosen.quick else [])], check=True)
            if not chosen.quick:
                before = json.loads((RESULTS / f"{name}.json").read_text())
                after = json.loads((Path(folder) / f"{name}.json").read_text())
                bad += [f"{name}: {line}" for line in worsened(before, after)]
    for line in bad:
        print(f"WORSE {line}")
    if not bad:
        print("quick runs passed" if chosen.quick else f"nothing is worse by more than {WORSE}x")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
