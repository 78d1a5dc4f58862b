"""Conditions on a spec that involve more than one key."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from gradflow.observables import BUILT_IN
from gradflow.study.spec.checked import Jobs
from gradflow.study.spec.errors import Fault, not_one_of, shown
from gradflow.study.spec.locate import Path
from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.run_tables import RunSpec, SaveSpec
from gradflow.study.spec.spec import StudySpec
from gradflow.study.spec.tables import BalancedInit, UnbalancedInit

WEIGHTS = "weights"
"""What an [[orders]] table calls the distance of the weights themselves."""


def check(spec: StudySpec) -> list[Fault]:
    """Everything wrong with a spec whose single values are all allowed."""
    jobs = Jobs(
        {run.name: run for run in spec.run}, {orders.name: orders for orders in spec.orders}
    )
    return [
        *_something(spec),
        *_duplicates("run", [run.name for run in spec.run]),
        *_duplicates("orders", [orders.name for orders in spec.orders]),
        *_shared_names(spec),
        *_duplicates("figure", [figure.name for figure in spec.figure]),
        *_networks(spec),
        *(fault for i, run in enumerate(spec.run) for fault in _run(spec, run, ("run", i))),
        *(fault for i, o in enumerate(spec.orders) for fault in _orders(spec, o, ("orders", i))),
        *(f for i, figure in enumerate(spec.figure) for f in figure.faults(jobs, ("figure", i))),
        *(f for i, claim in enumerate(spec.claim) for f in claim.faults(jobs, ("claim", i))),
        *_short(spec),
    ]


def _something(spec: StudySpec) -> Iterator[Fault]:
    if not spec.run and not spec.orders:
        yield Fault(("run",), "is missing; a study needs at least one [[run]] or [[orders]] table")


def _duplicates(kind: str, names: list[str | None]) -> Iterator[Fault]:
    for i, name in enumerate(names):
        if name is not None and name in names[:i]:
            message = f"got {shown(name)} again; allowed: a name that no other {kind} has"
            yield Fault((kind, i, "name"), message)


def _shared_names(spec: StudySpec) -> Iterator[Fault]:
    runs = {run.name for run in spec.run}
    for i, orders in enumerate(spec.orders):
        if orders.name in runs:
            message = f"got {shown(orders.name)}, the name of a run; choose another"
            yield Fault(("orders", i, "name"), message)


# --- networks -----------------------------------------------------------------------------------


def _networks(spec: StudySpec) -> Iterator[Fault]:
    tables: list[tuple[Path, object]] = [(("network",), spec.network)]
    tables += [(("networks", name), table) for name, table in spec.networks.items()]
    tables += [(("run", i, "network"), run.network) for i, run in enumerate(spec.run)]
    tables += [(("orders", i, "network"), o.network) for i, o in enumerate(spec.orders)]
    for at, table in tables:
        if not isinstance(table, BalancedInit | UnbalancedInit):
            continue
        if table.target is not None and table.scale is not None:
            yield Fault((*at, "scale"), f"got {table.scale:g} beside a target; give only one")
        elif table.target is None and table.seed is None:
            message = "is missing; without a target the end-to-end matrix is random, so give a seed"
            yield Fault((*at, "seed"), message)


# --- runs ---------------------------------------------------------------------------------------


def _run(spec: StudySpec, run: RunSpec, at: Path) -> Iterator[Fault]:
    yield from _reference(run.data, spec.data is not None, list(spec.datasets), "data", at)
    yield from _reference(run.network, spec.network is not None, list(spec.networks), "network", at)
    if run.t1 is None and run.steps is None:
        yield Fault(at, "has no length; give t1 (flow time) or steps")
    if run.t1 is not None and run.steps is not None:
        yield Fault(
            (*at, "steps"), f"got {run.steps} beside t1 = {run.t1:g}; give only one of them"
        )
    if run.steps is not None and run.dynamics.made.step_size is None:
        kind = run.dynamics.kind
        yield Fault((*at, "steps"), f"got {run.steps}; {kind} has no steps, give t1")
    yield from _save(run.save, run.t1, (*at, "save"))
    for i, name in enumerate(run.observables or ()):
        if name not in BUILT_IN:
            yield Fault((*at, "observables", i), not_one_of(name, BUILT_IN))


def _orders(spec: StudySpec, orders: OrdersSpec, at: Path) -> Iterator[Fault]:
    has_data, has_network = spec.data is not None, spec.network is not None
    yield from _reference(orders.data, has_data, list(spec.datasets), "data", at)
    yield from _reference(orders.network, has_network, list(spec.networks), "network", at)
    if orders.first.made.step_size is None and orders.second.made.step_size is None:
        message = f"got {orders.second.kind} beside {orders.first.kind}; neither has a step size"
        yield Fault((*at, "second"), f"{message}, so nothing depends on step_sizes")
    if len(set(orders.step_sizes)) < len(orders.step_sizes):
        message = f"got {shown(orders.step_sizes)}; allowed: different step sizes"
        yield Fault((*at, "step_sizes"), message)
    if max(orders.step_sizes) > orders.t1:
        message = f"got {max(orders.step_sizes):g} above t1 = {orders.t1:g}"
        yield Fault((*at, "step_sizes"), f"{message}; allowed: step sizes up to t1")
    for i, name in enumerate(orders.observables):
        if name not in (WEIGHTS, *BUILT_IN):
            yield Fault((*at, "observables", i), not_one_of(name, (WEIGHTS, *BUILT_IN)))


def _reference(
    given: object, has_default: bool, names: list[str], key: str, at: Path
) -> Iterator[Fault]:
    tables = "datasets" if key == "data" else "networks"
    if given == "default":
        if not has_default and names:
            yield Fault(at, f"has no {key}; give {key} = one of {', '.join(names)}")
        elif not has_default:
            yield Fault(at, f"has no {key}; add a [{key}] table to the spec")
    elif isinstance(given, str) and given not in names:
        yield Fault((*at, key), not_one_of(given, names, what=f"[{tables}] has"))


def _save(save: SaveSpec, t1: float | None, at: Path) -> Iterator[Fault]:
    if (save.points is None) == (save.times is None):
        yield Fault(at, "needs either points (with spacing) or times")
    times = save.times or []
    if any(b <= a for a, b in pairwise(times)):
        yield Fault((*at, "times"), f"got {shown(times)}; allowed: increasing flow times >= 0")
    if t1 is not None and times and times[-1] > t1:
        yield Fault((*at, "times"), f"got {times[-1]:g} after t1 = {t1:g}; allowed: times up to t1")


# --- short --------------------------------------------------------------------------------------


def _short(spec: StudySpec) -> Iterator[Fault]:
    known = {run.name: run for run in spec.run}
    for name, own in spec.short.runs.items():
        at = ("short", "runs", name)
        if name not in known:
            yield Fault(at, not_one_of(name, known, what="runs"))
            continue
        for key, other in (("t1", "steps"), ("steps", "t1")):
            if getattr(own, key) is not None and getattr(known[name], key) is None:
                yield Fault((*at, key), f'run "{name}" is as long as its {other}; override that')
        if own.save is not None:
            yield from _save(own.save, own.t1 or known[name].t1, (*at, "save"))
