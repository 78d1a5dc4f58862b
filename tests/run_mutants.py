"""Break the code on purpose and see a test fail: the entries of `mutants.toml`, in a copy.

    python tests/run_mutants.py [PART OF A FILE NAME ...]

A test that fails kills a mutant. The exit status is the number of those that survive.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".pytest_cache", "__pycache__")
FAILED = 1
"""pytest's exit status when tests ran and failed; others mean that they did not run."""


def killed(mutant: dict[str, str], tree: Path) -> bool:
    """Whether a test fails with the mutant in a copy of the tree, which is left as it was."""
    file = tree / mutant["file"]
    right = file.read_text()
    times = right.count(mutant["find"])
    if times != 1:
        raise SystemExit(f"{mutant['file']}: {mutant['find']!r} occurs {times} times, not once.")
    file.write_text(right.replace(mutant["find"], mutant["replace"]))
    cache = str(ROOT / ".pytest_cache" / "jax")
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, **os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *mutant["tests"].split()],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    file.write_text(right)
    if run.returncode not in (0, FAILED):
        print(run.stdout[-2000:] + run.stderr[-2000:])
    return run.returncode == FAILED


def left_out(folder: str, names: list[str]) -> set[str]:
    """What a copy of the tree does without: the results of studies stand at its root."""
    return set(LEFT_OUT(folder, names)) | ({"results"} if Path(folder) == ROOT else set())


def main() -> int:
    """Run the mutants whose file names contain one of the arguments, or all of them."""
    mutants = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    chosen = [m for m in mutants if not sys.argv[1:] or any(a in m["file"] for a in sys.argv[1:])]
    survivors, workers = 0, os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for worker in range(workers):
            tree = Path(folder) / str(worker)
            shutil.copytree(ROOT, tree, ignore=left_out)
            trees.put(tree)

        def judge(mutant: dict[str, str]) -> bool:
            tree = trees.get()
            try:
                return killed(mutant, tree)
            finally:
                trees.put(tree)

        verdicts = zip(chosen, pool.map(judge, chosen), strict=True)
        for number, (mutant, dead) in enumerate(verdicts, start=1):
            survivors += not dead
            word = "killed" if dead else "SURVIVED"
            print(f"{number}/{len(chosen)} {word}: {mutant['file']}: {mutant['why']}", flush=True)
    print(f"{len(chosen) - survivors} killed, {survivors} survived")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
