"""The rooms of gradflow and who may import whom; docs/design.md draws the same picture.

A file imports only from its own room and from rooms before it in `ROOMS`. No file, and within a
room no folder, imports in a circle. To add a room, edit the list.
"""

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# A room is a file `gradflow/<room>.py` or a folder `gradflow/<room>/`.
ROOMS: tuple[str, ...] = (
    "kinds",
    "backend",
    "random",
    "checks",
    "network",
    "init",
    "data",
    "loss",
    "regularizers",
    "problem",
    "geometry",
    "closed_forms",
    "solvers",
    "theory",
    "dynamics",
    "observables",
    "results",
    "simulation",
    "analysis",
    "plot",
    "study",
    "report",
    "cli",
    "__main__",
)

# Beside the rooms: these may import everything except what is named.
BESIDE: dict[str, tuple[str, ...]] = {
    "testing": ("cli",),
}

# Rooms that users see as programs: they may import the front door `gradflow` and import late.
PROGRAMS = ("cli",)

MAX_LINES = 500

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Import:
    """One imported gradflow module, and where."""

    source: str
    target: str
    line: int
    late: bool

    def complain(self, file: str, why: str) -> str:
        return f"{file}:{self.line} imports {self.target}: {why}"


def module_name(file: str) -> str:
    """`gradflow/geometry/__init__.py` -> `gradflow.geometry`."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def read_package() -> dict[str, str]:
    """Every source file of the package, by its path from the root of the repository."""
    files = sorted((ROOT / "gradflow").rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


@functools.cache
def imports_of(file: str, text: str, modules: frozenset[str]) -> list[Import]:
    """The gradflow modules that a file imports, `from package import module` resolved."""
    source = module_name(file)
    package = source if file.endswith("/__init__.py") else source.rpartition(".")[0]

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                above = ".".join(parents[: len(parents) - node.level + 1])
                base = f"{above}.{base}" if base else above
            full = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in modules else base for name in full]
        for name in dict.fromkeys(names):
            if name.split(".")[0] == "gradflow":
                yield Import(source, name, getattr(node, "lineno", 0), late)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late)

    return list(visit(ast.parse(text, file), late=False))


def all_imports(package: Mapping[str, str]) -> dict[str, list[Import]]:
    modules = frozenset(map(module_name, package))
    return {file: imports_of(file, text, modules) for file, text in package.items()}


def room_of(module: str) -> str:
    """`gradflow.geometry.imbalance` -> `geometry`; the front door is ''."""
    return [*module.split("."), ""][1]


def layering_violations(package: Mapping[str, str]) -> list[str]:
    """One readable line for every import that the list does not allow."""
    floor_of = {room: i for i, room in enumerate(ROOMS)}
    found = []
    for file, imports in all_imports(package).items():
        source = room_of(module_name(file))
        if source == "":
            continue
        if source not in floor_of and source not in BESIDE:
            found.append(f"{file}: name the room {source!r} in ROOMS of tests/test_layering.py")
            continue
        for item in imports:
            target = room_of(item.target)
            if target == "":
                if source not in PROGRAMS and source not in BESIDE:
                    found.append(item.complain(file, "only programs use the front door"))
            elif source in BESIDE:
                if target in BESIDE[source]:
                    found.append(item.complain(file, f"{source} may not use {target}"))
            elif target not in floor_of:
                found.append(item.complain(file, f"{target!r} is not in ROOMS"))
            elif source == target:
                if item.target == f"gradflow.{target}" and not file.endswith("/__init__.py"):
                    found.append(item.complain(file, f"name the file of gradflow/{target}/"))
            elif floor_of[target] > floor_of[source]:
                found.append(item.complain(file, f"{target} stands above {source}"))
    return found


def folder_cycle(package: Mapping[str, str], room: str) -> list[str]:
    """The folders of one import cycle within a room, first and last the same; empty if none is.

    Files that stand in no folder of the room count as one.
    """
    files = [f for f in package if f.startswith(f"gradflow/{room}/") and "__init__" not in f]

    def folder(path: str) -> str:
        return path.removeprefix(f"gradflow/{room}/").rpartition("/")[0]

    of = {module_name(file): folder(file) for file in files}
    graph: dict[str, set[str]] = {name: set() for name in of.values()}
    for file, imports in all_imports(package).items():
        if file in files:
            targets = {of[item.target] for item in imports if item.target in of}
            graph[folder(file)] |= targets - {folder(file)}
    return _cycle(graph)


def late_imports(package: Mapping[str, str]) -> list[str]:
    """Imports of gradflow inside functions: they hide cycles, so only programs may have them."""
    return [
        item.complain(file, "imports of gradflow stand at the top of a file")
        for file, imports in all_imports(package).items()
        for item in imports
        if item.late and room_of(item.source) not in PROGRAMS
    ]


def import_cycle(package: Mapping[str, str]) -> list[str]:
    """The modules of one import cycle, first and last the same; empty if there is none."""
    return _cycle(
        {
            module_name(file): {item.target for item in imports if item.target != item.source}
            for file, imports in all_imports(package).items()
        }
    )


def _cycle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_follow_the_rooms():
    found = layering_violations(read_package())
    assert not found, "\n" + "\n".join(found)


def test_imports_of_gradflow_stand_at_the_top():
    found = late_imports(read_package())
    assert not found, "\n" + "\n".join(found)


def test_no_import_cycle():
    found = import_cycle(read_package())
    assert not found, " -> ".join(found)


@pytest.mark.parametrize("room", ROOMS)
def test_no_folders_of_a_room_import_in_a_circle(room: str):
    found = folder_cycle(read_package(), room)
    assert not found, " -> ".join(found)


def test_files_stay_small():
    counts = {file: text.count("\n") for file, text in read_package().items()}
    found = [f"{file} has {n} lines" for file, n in counts.items() if n > MAX_LINES]
    assert not found, f"\nmore than {MAX_LINES} lines:\n" + "\n".join(found)


def test_each_room_is_named_once_and_exists():
    rooms = [*ROOMS, *BESIDE]
    assert len(rooms) == len(set(rooms))
    assert set(rooms) == {room_of(module_name(file)) for file in read_package()} - {""}


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [
        ("gradflow/loss.py", "from gradflow.problem import Problem", "problem stands above loss"),
        ("gradflow/loss.py", "from gradflow import problem", "gradflow.problem"),
        ("gradflow/loss.py", "from . import problem", "gradflow.problem"),
        ("gradflow/regularizers/base.py", "from ..problem import Problem", "gradflow.problem"),
        ("gradflow/loss.py", "if True:\n    import gradflow.cli as c", "loss.py:2"),
        ("gradflow/loss.py", "import gradflow", "front door"),
        ("gradflow/loss.py", "from gradflow import simulate", "front door"),
        ("gradflow/theory/noise.py", "from gradflow.dynamics import a", "dynamics stands above"),
        ("gradflow/geometry/curvature.py", "from gradflow.geometry import gram", "name the file"),
        ("gradflow/random/streams.py", "from gradflow.network import A", "above random"),
        ("gradflow/testing.py", "from gradflow.cli import main", "testing may not use cli"),
        ("gradflow/utils.py", "", "name the room 'utils'"),
    ],
)
def test_a_wrong_import_is_found(file: str, text: str, part: str):
    package = {"gradflow/problem.py": "", "gradflow/network.py": "", "gradflow/cli.py": ""}
    package |= {"gradflow/geometry/imbalance.py": "", "gradflow/geometry/curvature.py": ""}
    found = layering_violations(package | {file: text})
    assert len(found) == 1
    assert file in found[0]
    assert part in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("gradflow/__init__.py", "from gradflow.cli import main"),
        ("gradflow/cli.py", "def main():\n    import gradflow"),
        ("gradflow/geometry/__init__.py", "from gradflow.geometry.imbalance import gram"),
        ("gradflow/geometry/imbalance.py", "from gradflow.geometry.base import AbstractThing"),
        ("gradflow/geometry/imbalance.py", "from gradflow.loss import loss"),
        ("gradflow/analysis/compare.py", "from gradflow.analysis.rates import Rate"),
        ("gradflow/testing.py", "from gradflow import simulate"),
        ("gradflow/loss.py", "import numpy\nfrom gradflow.network import DeepLinear"),
    ],
)
def test_a_right_import_passes(file: str, text: str):
    package = {file: text}
    assert layering_violations(package) == []
    assert late_imports(package) == []


def test_a_late_import_is_found():
    text = "class A:\n    def f(self):\n        from gradflow.network import DeepLinear"
    (found,) = late_imports({"gradflow/loss.py": text})
    assert "gradflow/loss.py:3" in found


def test_a_circle_of_folders_is_found():
    package = {
        "gradflow/study/spec/a.py": "from gradflow.study.run.b import b",
        "gradflow/study/run/b.py": "",
        "gradflow/study/run/c.py": "from gradflow.study.spec.d import d",
        "gradflow/study/spec/d.py": "",
    }
    assert import_cycle(package) == []
    assert set(folder_cycle(package, "study")) == {"spec", "run"}


def test_a_cycle_is_found():
    package = {
        "gradflow/a.py": "from gradflow.b import b",
        "gradflow/b.py": "from gradflow import c",
        "gradflow/c.py": "import gradflow.a",
    }
    found = import_cycle(package)
    assert found[0] == found[-1]
    assert set(found) == {"gradflow.a", "gradflow.b", "gradflow.c"}
