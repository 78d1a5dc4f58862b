"""What the package says of itself: dependencies, versions and the pinned set agree."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Distributions whose import has another name.
IMPORT_NAMES = {
    "scikit-learn": "sklearn",
    "lazy-loader": "lazy_loader",
    "pydantic-core": "pydantic_core",
}

# Used through another library: xarray writes NetCDF through h5netcdf and h5py, pandas reads Parquet
# through pyarrow.
INDIRECT = {"h5netcdf", "h5py", "pyarrow"}

# Imported only by gradflow.testing, which says what to install where it is missing.
OPTIONAL = {"hypothesis"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = {}
    for line in lines:
        requirement = Requirement(line)
        found[requirement.name.lower().replace("_", "-")] = requirement
    return found


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def third_party_imports() -> dict[str, str]:
    """Every library that the package imports, with one file that does."""
    found = {}
    for file in sorted((ROOT / "gradflow").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                if top != "gradflow" and top not in sys.stdlib_module_names:
                    found.setdefault(top, file.relative_to(ROOT).as_posix())
    return found


def test_every_library_that_is_imported_is_declared():
    declared = {IMPORT_NAMES.get(name, name) for name in requirements(PROJECT["dependencies"])}
    found = third_party_imports()
    missing = {name: file for name, file in found.items() if name not in declared | OPTIONAL}
    assert all(found[name].startswith("gradflow/testing/") for name in OPTIONAL)
    assert not missing, f"imported but not in [project] dependencies: {missing}"
    idle = declared - set(found) - INDIRECT
    assert not idle, f"in [project] dependencies but never imported: {sorted(idle)}"


def extras_but_peers() -> list[str]:
    """What the extras need; the peers of the benchmarks are pinned and are no part of gradflow."""
    extras = PROJECT["optional-dependencies"].items()
    return [line for name, lines in extras for line in lines if name != "bench"]


def test_peers_of_the_benchmarks_are_pinned():
    for requirement in requirements(PROJECT["optional-dependencies"]["bench"]).values():
        assert [clause.operator for clause in requirement.specifier] == ["=="], requirement


def test_every_dependency_has_a_lower_bound():
    for name, requirement in requirements(PROJECT["dependencies"] + extras_but_peers()).items():
        if name != PROJECT["name"]:
            operators = [clause.operator for clause in requirement.specifier]
            assert operators == [">="], f"{requirement}: give one honest lower bound, no more"


def test_constraints_pin_the_declared_set_within_its_bounds():
    declared = requirements(PROJECT["dependencies"] + extras_but_peers())
    del declared[PROJECT["name"]]
    pinned: dict[str, list[str]] = {}
    for pin in pins():
        (clause,) = pin.specifier
        assert clause.operator == "==", f"{pin} is not an exact version"
        pinned.setdefault(pin.name, []).append(clause.version)
    assert set(declared) <= set(pinned), "run `make constraints`"
    for name, requirement in declared.items():
        for version in pinned[name]:
            assert requirement.specifier.contains(version), f"{requirement} forbids {version}"


def test_constraints_name_no_place():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert "@" not in text
    assert not re.search(r"^\s*-", text, re.MULTILINE), "no options such as an index"


def test_citation_and_changelog_know_the_version():
    version = PROJECT["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.few_cases(2)
@pytest.mark.parametrize(("variable", "expected"), [(None, "True"), ("1", "True"), ("0", "False")])
def test_importing_gradflow_switches_jax_to_64_bit(variable: str | None, expected: str):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("JAX_ENABLE_X64", "GRADFLOW_X64")
    }
    if variable is not None:
        environment["GRADFLOW_X64"] = variable
    program = "import gradflow, jax; print(jax.config.jax_enable_x64)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == expected, done.stderr
