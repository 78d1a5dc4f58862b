"""The short variant of a study: the same runs, fewer replicas, shorter."""

from __future__ import annotations

from typing import Any

from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.run_tables import RunSpec, SaveSpec
from gradflow.study.spec.spec import ShortSpec, StudySpec


def shorten(spec: StudySpec) -> StudySpec:
    """Apply the overrides of `[short]`; claims with `short = false` are left out."""
    runs = [_shortened(run, spec.short) for run in spec.run]
    orders = [_fewer_replicas(table, spec.short) for table in spec.orders]
    claims = [claim for claim in spec.claim if claim.short]
    return spec.model_copy(update={"run": runs, "orders": orders, "claim": claims})


def _fewer_replicas(orders: OrdersSpec, short: ShortSpec) -> OrdersSpec:
    if short.replicas is None or orders.replicas is None:
        return orders
    return orders.model_copy(update={"replicas": min(orders.replicas, max(short.replicas, 2))})


def _shortened(run: RunSpec, short: ShortSpec) -> RunSpec:
    changes: dict[str, Any] = {}
    if short.replicas is not None and run.replicas is not None:
        most = short.replicas
        most += most % 2 if run.is_antithetic else 0  # whole pairs
        changes["replicas"] = min(run.replicas, most)
    if short.duration is not None:
        if run.t1 is not None:
            changes["t1"] = run.t1 * short.duration
        if run.steps is not None:
            changes["steps"] = max(1, round(run.steps * short.duration))
        if run.save.times is not None:
            times = [time * short.duration for time in run.save.times]
            changes["save"] = run.save.model_copy(update={"times": times})
    if short.points is not None and run.save.points is not None:
        points = min(run.save.points, short.points)
        changes["save"] = SaveSpec(points=points, spacing=run.save.spacing)
    own = short.runs.get(run.name)
    if own is not None:
        changes |= {key: getattr(own, key) for key in own.model_fields_set}
    return run.model_copy(update=changes)
