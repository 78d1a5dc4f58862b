"""Conditions on a spec that involve more than one key."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from gradflow.dynamics import GradientDescent
from gradflow.observables import BUILT_IN, DEFAULT
from gradflow.study.spec.errors import Fault, not_one_of, shown
from gradflow.study.spec.locate import Path
from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.quantities import QUANTITIES
from gradflow.study.spec.spec import (
    ClaimSpec,
    Conservation,
    Orders,
    RunSpec,
    SaveSpec,
    Scaling,
    StudySpec,
    TimeSeries,
)
from gradflow.study.spec.tables import BalancedInit, UnbalancedInit

WEIGHTS = "weights"
"""What an [[orders]] table calls the distance of the weights themselves."""

_READ_WEIGHTS = {
    "balancedness_change",
    "balancedness_decay",
    "diagonal_change",
    "gd_identity",
    "noether_decay",
    "path_difference",
}
_EVERY_STEP = {"gd_identity", "noether_decay"}
_OPTIONS = ("component", "over", "window", "of", "parameter", "times", "theory")
_SWITCHES = ("relative", "of_mean")
_RUN_OPTIONS = ("run", "runs", *_OPTIONS, *_SWITCHES)


def check(spec: StudySpec) -> list[Fault]:
    """Everything wrong with a spec whose single values are all allowed."""
    return [
        *_something(spec),
        *_duplicates("run", [run.name for run in spec.run]),
        *_duplicates("orders", [orders.name for orders in spec.orders]),
        *_shared_names(spec),
        *_duplicates("figure", [figure.name for figure in spec.figure]),
        *_networks(spec),
        *(fault for i, run in enumerate(spec.run) for fault in _run(spec, run, ("run", i))),
        *(fault for i, o in enumerate(spec.orders) for fault in _orders(spec, o, ("orders", i))),
        *_figures(spec),
        *(fault for i, c in enumerate(spec.claim) for fault in _claim(spec, c, ("claim", i))),
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


# --- figures ------------------------------------------------------------------------------------


def _figures(spec: StudySpec) -> Iterator[Fault]:
    names = [run.name for run in spec.run]
    for i, figure in enumerate(spec.figure):
        if isinstance(figure, Orders):
            yield from _orders_figure(spec, figure, ("figure", i))
            continue
        for j, name in enumerate(figure.runs):
            if name not in names:
                yield Fault(("figure", i, "runs", j), not_one_of(name, names, what="runs"))
        drawn = [run for run in spec.run if not figure.runs or run.name in figure.runs]
        if isinstance(figure, Scaling):
            yield from _scaling(figure, drawn, ("figure", i))
        if not isinstance(figure, TimeSeries | Conservation):
            continue
        scales = getattr(figure, "y_scale", "")
        if isinstance(scales, list) and len(scales) != len(figure.observables):
            message = f"got {len(scales)} scales for {len(figure.observables)} observables"
            yield Fault(("figure", i, "y_scale"), message)
        for j, observable in enumerate(figure.observables):
            at = ("figure", i, "observables", j)
            yield from _recorded(observable, drawn, at)


def _orders_figure(spec: StudySpec, figure: Orders, at: Path) -> Iterator[Fault]:
    known = {orders.name: orders for orders in spec.orders}
    if not known:
        yield Fault(at, "draws [[orders]] tables, and the study has none; add one")
    if figure.runs:
        yield Fault((*at, "runs"), "is not used by this kind; give orders = [...]")
    for j, name in enumerate(figure.orders):
        if name not in known:
            yield Fault((*at, "orders", j), not_one_of(name, known, what="[[orders]]"))
    shown_tables = [known[name] for name in figure.orders or known if name in known]
    measured = {name for orders in shown_tables for name in orders.observables}
    for j, observable in enumerate(figure.observables):
        if observable not in measured:
            yield Fault((*at, "observables", j), not_one_of(observable, sorted(measured)))


def _scaling(figure: Scaling, runs: list[RunSpec], at: Path) -> Iterator[Fault]:
    needs = QUANTITIES[figure.quantity]
    if figure.observable is not None and needs.observable == "unused":
        message = f"{figure.quantity} takes no observable; leave it out"
        yield Fault((*at, "observable"), message)
    elif figure.observable is not None:
        yield from _recorded(figure.observable, runs, (*at, "observable"))
    elif needs.observable == "required":
        yield Fault(at, f"{figure.quantity} needs an observable")
    for run in runs:
        if figure.parameter not in parameters(run):
            has = f'run "{run.name}" has'
            message = not_one_of(figure.parameter, parameters(run), what=has)
            yield Fault((*at, "parameter"), message)
            return


def _recorded(observable: str, runs: list[RunSpec], at: Path) -> Iterator[Fault]:
    if observable not in BUILT_IN:
        yield Fault(at, not_one_of(observable, BUILT_IN))
        return
    for run in runs:
        recorded = run.observables or DEFAULT
        if observable not in recorded:
            has = f'run "{run.name}" records'
            yield Fault(at, not_one_of(observable, recorded, what=has))


# --- claims -------------------------------------------------------------------------------------


def _claim(spec: StudySpec, claim: ClaimSpec, at: Path) -> Iterator[Fault]:
    needs = QUANTITIES[claim.quantity]
    name = claim.quantity
    if needs.orders:
        yield from _order_claim(spec, claim, at)
        yield from _rule(claim, [], at)
        return
    if claim.orders is not None:
        yield Fault((*at, "orders"), f"{name} is about runs; leave it out")
    known = {run.name: run for run in spec.run}
    if (claim.run is None) == (claim.runs is None):
        yield Fault(at, "needs either run or runs")
        return
    key = "run" if claim.run is not None else "runs"
    for j, run_name in enumerate(claim.run_names):
        if run_name not in known:
            path = (*at, key) if key == "run" else (*at, key, j)
            yield Fault(path, not_one_of(run_name, known, what="runs"))
    runs = [known[run_name] for run_name in claim.run_names if run_name in known]
    least, most = needs.runs
    if not least <= len(claim.run_names) <= (most or len(claim.run_names)):
        count = str(least) if least == most else f"at least {least}"
        message = f"got {len(claim.run_names)}; {name} is about {count} run{'s' * (least > 1)}"
        yield Fault((*at, key), message)

    if claim.observable is not None and needs.observable == "unused":
        yield Fault((*at, "observable"), f"{name} takes no observable; leave it out")
    elif claim.observable is not None:
        yield from _recorded(claim.observable, runs, (*at, "observable"))
    elif needs.observable == "required":
        yield Fault(at, f"{name} needs an observable")
    for observable in needs.reads if claim.observable is None else ():
        yield from _recorded(observable, runs, at)
    for option in _OPTIONS:
        given = getattr(claim, option)
        if given is None and option in needs.required:
            yield Fault(at, f"{name} needs {option}")
        elif given is not None and option not in needs.keys:
            yield Fault((*at, option), f"{name} does not use {option}; leave it out")
    for option in _SWITCHES:
        if getattr(claim, option) and option not in needs.keys:
            yield Fault((*at, option), f"{name} does not use {option}; leave it out")
    if claim.window is not None and claim.window[1] <= claim.window[0]:
        yield Fault(
            (*at, "window"), f"got {shown(claim.window)}; allowed: [start, stop], start < stop"
        )
    if claim.of is not None and "of" in needs.keys:
        yield from _inner_quantity(claim, claim.of, at)
    if claim.parameter is not None and "parameter" in needs.keys:
        yield from _parameter(claim.parameter, runs, (*at, "parameter"))
    predicted = claim.quantity == "predicted_ratio" or claim.expected == "predicted"
    if claim.theory is not None and "theory" in needs.keys and not predicted:
        yield Fault((*at, "theory"), 'has a meaning only beside expected = "predicted"')
    yield from _stored(claim, runs, at, key)
    yield from _rule(claim, runs, at)


def _order_claim(spec: StudySpec, claim: ClaimSpec, at: Path) -> Iterator[Fault]:
    known = {orders.name: orders for orders in spec.orders}
    for option in _RUN_OPTIONS:
        if getattr(claim, option) not in (None, False):
            yield Fault((*at, option), f"{claim.quantity} does not use {option}; leave it out")
    if claim.orders is None:
        yield Fault(at, f"{claim.quantity} needs orders, the name of an [[orders]] table")
    elif claim.orders not in known:
        yield Fault((*at, "orders"), not_one_of(claim.orders, known, what="[[orders]]"))
    elif claim.observable is not None:
        measured = known[claim.orders].observables
        if claim.observable not in measured:
            yield Fault((*at, "observable"), not_one_of(claim.observable, measured))
    elif claim.quantity == "order_status" and len(known[claim.orders].observables) > 1:
        yield Fault(at, "needs an observable: the [[orders]] table has several")


def _inner_quantity(claim: ClaimSpec, of: str, at: Path) -> Iterator[Fault]:
    wants_prediction = claim.quantity == "predicted_ratio"
    fitting = [
        name
        for name, quantity in QUANTITIES.items()
        if (quantity.predicted if wants_prediction else quantity.runs == (1, 1))
        and "of" not in quantity.keys
    ]
    if of not in fitting:
        yield Fault((*at, "of"), not_one_of(of, fitting))
    elif QUANTITIES[of].observable == "required" and claim.observable is None:
        yield Fault(at, f"{of} needs an observable")


def parameters(run: RunSpec) -> dict[str, float]:
    """The positive numbers of a run by name: `step_size`, `WeightDecay.rate`, ..."""
    found: dict[str, float] = {}
    for owner in (run.dynamics, *run.regularizers):
        for key, value in owner.model_dump().items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                is_dynamics = owner is run.dynamics
                found[key if is_dynamics else f"{owner.kind}.{key}"] = float(value)
    return found


def _parameter(parameter: str, runs: list[RunSpec], at: Path) -> Iterator[Fault]:
    for run in runs:
        if parameter not in parameters(run):
            yield Fault(at, not_one_of(parameter, parameters(run), what=f'run "{run.name}" has'))
            return
    if len({parameters(run)[parameter] for run in runs}) < 2:
        yield Fault(at, f"{parameter} is the same in all runs; an exponent needs different values")


def _stored(claim: ClaimSpec, runs: list[RunSpec], at: Path, key: str) -> Iterator[Fault]:
    quantities = {claim.quantity, claim.of}
    from_weights = quantities & _READ_WEIGHTS
    for run in runs:
        if from_weights and run.store_weights is False:
            message = f'run "{run.name}" has store_weights = false; {claim.quantity} reads weights'
            yield Fault((*at, key), message)
        if not quantities & _EVERY_STEP:
            continue
        dynamics = run.dynamics.made
        if not isinstance(dynamics, GradientDescent) or (
            "gd_identity" in quantities
            and (dynamics.momentum is not None or dynamics.optimizer is not None)
        ):
            which = "plain GradientDescent" if "gd_identity" in quantities else "GradientDescent"
            message = f'run "{run.name}" is not {which}; {claim.quantity} holds only there'
            yield Fault((*at, key), message)
        elif run.steps is None or run.save.points != run.steps + 1 or run.save.spacing != "lin":
            message = (
                f'run "{run.name}" does not save every step; {claim.quantity} needs steps = K and '
                "save = { points = K + 1 }"
            )
            yield Fault((*at, key), message)


def _rule(claim: ClaimSpec, runs: list[RunSpec], at: Path) -> Iterator[Fault]:
    needs = QUANTITIES[claim.quantity]
    margins = (claim.tolerance, claim.absolute_tolerance, claim.standard_errors)
    has_margin = any(margin is not None for margin in margins)
    has_bound = claim.at_most is not None or claim.at_least is not None
    if needs.words:
        if claim.expected not in needs.words:
            message = f"{claim.quantity} needs expected = {' or '.join(map(shown, needs.words))}"
            yield Fault((*at, "expected"), message)
        for key in ("absolute_tolerance", "standard_errors", "resolution", "at_most", "at_least"):
            if getattr(claim, key) is not None:
                yield Fault((*at, key), f"{claim.quantity} does not use {key}; leave it out")
        return
    if isinstance(claim.expected, str):
        words = ["predicted"] if needs.predicted else []
        if claim.expected not in words:
            yield Fault((*at, "expected"), not_one_of(claim.expected, ["a number", *words]))
    if claim.expected is None and not has_bound:
        yield Fault(at, "has no check; give expected (with a tolerance), at_most or at_least")
    if claim.expected is not None and has_bound:
        yield Fault(
            (*at, "expected"), "stands beside at_most or at_least; give only one kind of check"
        )
    if claim.expected is not None and not has_margin:
        message = "needs tolerance, absolute_tolerance or standard_errors beside it"
        yield Fault((*at, "expected"), message)
    if has_bound and (claim.tolerance is not None or claim.absolute_tolerance is not None):
        yield Fault(at, "has a tolerance, which at_most and at_least do not use; leave it out")
    if claim.at_most is not None and claim.at_least is not None and claim.at_most < claim.at_least:
        yield Fault((*at, "at_most"), f"got {claim.at_most:g} below at_least = {claim.at_least:g}")
    if claim.expected == 0 and claim.standard_errors is not None and claim.resolution is None:
        message = (
            "is 0, so standard_errors alone cannot tell agreement from ignorance; give resolution, "
            "the largest deviation that still counts as a decision"
        )
        yield Fault((*at, "expected"), message)
    if claim.expected == 0 and claim.tolerance is not None:
        yield Fault((*at, "tolerance"), "is relative to expected = 0; give absolute_tolerance")
    if claim.resolution is not None and claim.standard_errors is None:
        yield Fault((*at, "resolution"), "has a meaning only beside standard_errors; leave it out")
    if claim.standard_errors is not None and claim.quantity != "exponent":
        for run in runs:
            least = 4 if run.is_antithetic else 2
            if run.replicas is not None and run.replicas < least:
                has = f'run "{run.name}" has {run.replicas} replica{"s" * (run.replicas != 1)}'
                need = f"{least} antithetic ones" if run.is_antithetic else f"{least}"
                message = f"{has}; standard errors need at least {need}"
                yield Fault((*at, "standard_errors"), message)


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
