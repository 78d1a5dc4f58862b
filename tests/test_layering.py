"""The rooms of gradflow and who may import whom; docs/design.md draws the same picture.

A file imports only from rooms above it in `LAYERS`. What is allowed within a layer, and within a
folder, is in the two tables below it. To add a room or a file, edit the tables.
"""

import ast
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# A room is a file `gradflow/<room>.py` or a folder `gradflow/<room>/`.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "types",
        "tracing",
        "gaussian",
        "streams",
        "independence",
        "products",
        "decompositions",
        "jax_settings",
        "devices",
        "memory",
        "accumulators",
    ),
    ("network", "init", "data"),
    ("loss",),
    ("regularizers", "problem"),
    ("geometry",),
    ("theory", "solvers", "closed_forms"),
    ("dynamics",),
    ("observables", "instruments"),
    (
        "describe",
        "progress",
        "schedule",
        "tally",
        "outcome",
        "trajectory",
        "ensemble_statistics",
        "record",
        "divergence",
        "labels",
        "runner",
        "starts",
        "simulate",
    ),
    ("analysis",),
    ("study",),
    ("report",),
    ("command", "cli", "__main__"),
)

# Rooms that may also import these rooms of their own layer.
SAME_LAYER: dict[str, tuple[str, ...]] = {
    "cli": ("command",),
    "__main__": ("cli",),
    "gaussian": ("types",),
    "streams": ("gaussian", "types"),
    "decompositions": ("products", "types"),
    "init": ("network",),
    "data": ("network",),
    "problem": ("regularizers",),
    "outcome": ("describe",),
    "trajectory": ("outcome",),
    "ensemble_statistics": ("outcome",),
    "record": ("tally",),
    "labels": ("record", "schedule", "tally"),
    "divergence": ("record", "schedule"),
    "runner": ("progress", "record", "schedule"),
    "simulate": (
        "describe",
        "divergence",
        "ensemble_statistics",
        "labels",
        "progress",
        "record",
        "runner",
        "schedule",
        "starts",
        "trajectory",
    ),
}

# Within a folder a file imports only from `base.py`; in these also from the files before it.
ORDERED: dict[str, tuple[str, ...]] = {
    "dynamics": (
        "settings",
        "layers",
        "noise",
        "stepwise",
        "integration",
        "ode",
        "optimizers",
        "from_optax",
        "descent",
        "svag",
        "gradient_flow",
        "modified_flow",
        "principal_flow",
        "heavy_ball_flow",
        "sde_terms",
        "stochastic_flow",
        "exact_flow",
        "slow_sde",
        "slow_motion",
        "slow_flow",
        "normals",
    ),
    "geometry": (
        "imbalance",
        "hessian",
        "kernel",
        "curvature",
        "spectrum",
        "bounds",
        "manifold",
        "limit_maps",
        "coordinates",
        "flattest",
    ),
    "solvers": (
        "promotion",
        "relative_errors",
        "rest",
        "grid_path",
        "resumable",
        "small_noise",
        "collocation",
        "krylov",
        "stage_equations",
        "gauss_legendre",
        "stages",
        "dormand_prince",
        "stabilized",
        "switching",
    ),
    "data": (
        "roots",
        "moments",
        "fourth_moments",
        "preprocess",
        "files",
        "bundled",
        "regression",
    ),
    "accumulators": ("moments", "sketch"),
    "regularizers": ("averaged", "diffusion", "sampled"),
    "closed_forms": (
        "linear",
        "channel",
        "bessel",
        "decaying_channel",
        "quadrature",
        "chain_kernel",
        "chain",
        "alignment",
        "aligned",
        "riccati",
    ),
    "theory": (
        "noise",
        "layer_numbers",
        "row_moments",
        "layer_noise",
        "data_noise",
        "self_consistent",
        "mean_square",
        "stationary",
        "response",
        "lyapunov",
        "normal_response",
        "floor",
        "drift",
        "slow_drift",
        "slow_noise",
        "spread",
        "end_point",
        "slow_path",
    ),
    "analysis": (
        "unmeasured",
        "afterwards",
        "statistics",
        "boundary",
        "noise_free_run",
        "edge",
        "overlap",
        "at_minimum",
        "end_point",
        "prediction",
        "predict",
        "local_rates",
        "rates",
        "along",
        "phases",
        "matched_times",
        "agreement",
        "compare",
        "coupling",
        "controls",
        "order_fit",
        "order_results",
        "order_runs",
        "orders",
    ),
    "study": (
        "experiments",
        "output",
        "locate",
        "tables",
        "faults",
        "order_tables",
        "quantities",
        "spec",
        "check",
        "short",
        "part",
        "load",
        "results",
        "record",
        "measurement",
        "weight_measures",
        "measures",
        "order_measures",
        "claims",
        "progress",
        "build",
        "runner",
    ),
    "report": (
        "style",
        "formatting",
        "reading",
        "drawing",
        "bounds",
        "phase_portrait",
        "time_series",
        "sharpness",
        "against_theory",
        "theory_ratios",
        "rates",
        "scaling",
        "conservation",
        "orders",
        "study_orders",
        "draw",
        "theory_table",
        "tables",
        "inline",
        "page",
    ),
}

# Beside the layers: these may import everything except what is named.
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


def imports_of(file: str, text: str, modules: frozenset[str]) -> Iterator[Import]:
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

    return visit(ast.parse(text, file), late=False)


def all_imports(package: Mapping[str, str]) -> dict[str, list[Import]]:
    modules = frozenset(map(module_name, package))
    return {file: list(imports_of(file, text, modules)) for file, text in package.items()}


def room_of(module: str) -> str:
    """`gradflow.geometry.imbalance` -> `geometry`; the front door is ''."""
    return [*module.split("."), ""][1]


def within_room(source: str, target: str, is_folder_init: bool) -> str | None:
    """What is wrong with an import between two files of the same folder."""
    room = room_of(source)
    if is_folder_init:
        return None
    inner_source, inner_target = source.split(".")[2:], target.split(".")[2:]
    if not inner_target:
        return f"a file does not import its own folder; name the file of gradflow/{room}/"
    if inner_target == ["base"]:
        return None
    order = ORDERED.get(room)
    if order is None:
        return f"within gradflow/{room}/ only base.py may be imported"
    for name in (inner_source[0], inner_target[0]):
        if name not in order and name != "base":
            return f"ORDERED[{room!r}] in tests/test_layering.py does not name {name!r}"
    if inner_source == ["base"] or order.index(inner_source[0]) <= order.index(inner_target[0]):
        return f"the order within gradflow/{room}/ is base, {', '.join(order)}"
    return None


def layering_violations(package: Mapping[str, str]) -> list[str]:
    """One readable line for every import that the tables do not allow."""
    layer_of = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
    found = []
    for file, imports in all_imports(package).items():
        source = room_of(module_name(file))
        if source not in layer_of and source not in BESIDE and source != "":
            found.append(f"{file}: name the room {source!r} in LAYERS of tests/test_layering.py")
            continue
        for item in imports:
            target = room_of(item.target)
            if source == "":
                continue
            if target == "":
                if source not in PROGRAMS and source not in BESIDE:
                    found.append(item.complain(file, "only programs use the front door"))
            elif source in BESIDE:
                if target in BESIDE[source]:
                    found.append(item.complain(file, f"{source} may not use {target}"))
            elif target not in layer_of:
                found.append(item.complain(file, f"{target!r} is not in LAYERS"))
            elif source == target:
                why = within_room(item.source, item.target, file.endswith("/__init__.py"))
                if why is not None:
                    found.append(item.complain(file, why))
            elif layer_of[target] > layer_of[source]:
                why = f"layer {layer_of[source]} may not use layer {layer_of[target]}"
                found.append(item.complain(file, why))
            elif layer_of[target] == layer_of[source]:
                allowed = SAME_LAYER.get(source, ())
                if target not in allowed:
                    names = ", ".join(allowed) or "nothing"
                    why = f"of its own layer {source} may use {names}"
                    found.append(item.complain(file, why))
    return found


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
    graph = {
        module_name(file): {item.target for item in imports if item.target != item.source}
        for file, imports in all_imports(package).items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_follow_the_layers():
    found = layering_violations(read_package())
    assert not found, "\n" + "\n".join(found)


def test_imports_of_gradflow_stand_at_the_top():
    found = late_imports(read_package())
    assert not found, "\n" + "\n".join(found)


def test_no_import_cycle():
    found = import_cycle(read_package())
    assert not found, " -> ".join(found)


def test_files_stay_small():
    counts = {file: text.count("\n") for file, text in read_package().items()}
    found = [f"{file} has {n} lines" for file, n in counts.items() if n > MAX_LINES]
    assert not found, f"\nmore than {MAX_LINES} lines:\n" + "\n".join(found)


def test_tables_name_each_room_once():
    rooms = [*itertools.chain(*LAYERS), *BESIDE]
    assert len(rooms) == len(set(rooms))
    assert set(SAME_LAYER) | set(ORDERED) | set(PROGRAMS) <= set(rooms)


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [
        ("gradflow/loss.py", "from gradflow.problem import Problem", "layer 2 may not use layer 3"),
        ("gradflow/loss.py", "from gradflow import problem", "gradflow.problem"),
        ("gradflow/loss.py", "from . import problem", "gradflow.problem"),
        ("gradflow/regularizers/base.py", "from ..problem import Problem", "gradflow.problem"),
        ("gradflow/loss.py", "if True:\n    import gradflow.cli as c", "loss.py:2"),
        ("gradflow/loss.py", "import gradflow", "front door"),
        ("gradflow/loss.py", "from gradflow import simulate", "gradflow.simulate"),
        ("gradflow/data.py", "from gradflow.init import balanced", "data may use network"),
        ("gradflow/theory/noise.py", "from gradflow.solvers import a", "theory may use nothing"),
        ("gradflow/geometry/curvature.py", "from gradflow.geometry import gram", "own folder"),
        ("gradflow/geometry/curvature.py", "from .manifold import gram", "the order within"),
        ("gradflow/analysis/rates.py", "from .compare import compare", "the order within"),
        ("gradflow/analysis/base.py", "from .rates import Rate", "the order within"),
        ("gradflow/analysis/new.py", "from .rates import Rate", "does not name 'new'"),
        ("gradflow/testing.py", "from gradflow.cli import main", "testing may not use cli"),
        ("gradflow/utils.py", "", "name the room 'utils'"),
    ],
)
def test_a_wrong_import_is_found(file: str, text: str, part: str):
    package = {"gradflow/problem.py": "", "gradflow/simulate.py": "", "gradflow/cli.py": ""}
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


def test_a_cycle_is_found():
    package = {
        "gradflow/a.py": "from gradflow.b import b",
        "gradflow/b.py": "from gradflow import c",
        "gradflow/c.py": "import gradflow.a",
    }
    found = import_cycle(package)
    assert found[0] == found[-1]
    assert set(found) == {"gradflow.a", "gradflow.b", "gradflow.c"}
