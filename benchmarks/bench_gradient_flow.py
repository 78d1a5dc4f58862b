"""Gradient flow to a loss of about 1e-12 with 51 saved points, beside SciPy and torchdiffeq.

    python benchmarks/bench_gradient_flow.py [--quick] [--cases scalar-2 small ...]

Everybody is given rtol 1e-8 and atol 1e-10. Errors are the largest over the saved points, of the
loss against an integration to near rounding, and of the entries of every G_i, which the flow keeps.
A peer that takes more than a minute for one solve is stopped, and the table says so.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from agreement import same_values
from contest import Contestant, contest
from ensembles import rounds_of
from flow_cases import CASES, SAVES, FlowCase
from ode_peers import (
    ATOL,
    RTOL,
    TooSlowError,
    errors,
    loss_of,
    reference,
    scipy_solve,
    torchdiffeq_solve,
    unflat,
)
from results import Report, Table, Target, options, stated

import gradflow as gf

STIFF = ("unbalanced", "small")
LARGEST_JACOBIAN = 400
ROUNDING = 1e-14
MOST_SECONDS = 60.0
"""Time for one solve after which a peer is stopped."""

AGREEMENT = 1e-4
"""Distance in the loss at which two solves have different problems."""


def own_solve(case: FlowCase, flow: gf.GradientFlow) -> Callable[[], np.ndarray]:
    """`gradflow.simulate` with stored weights; gives `(SAVES, weights)`."""
    problem = gf.Problem(gf.Regression.whitened(case.target))
    net = gf.DeepLinear(list(case.layers))

    def run() -> np.ndarray:
        trajectory = gf.simulate(
            problem,
            net,
            flow,
            t1=case.stop,
            save=SAVES,
            observables=["loss"],
            store_weights=True,
            progress=False,
        )
        return np.concatenate([w.reshape(SAVES, -1) for w in trajectory.weights], axis=1)

    return run


def own_core(case: FlowCase, flow: gf.GradientFlow) -> Callable[[], np.ndarray]:
    """`GradientFlow.solve`, compiled, as inside a sweep; gives `(SAVES, weights)`."""
    problem = gf.Problem(gf.Regression.whitened(case.target))
    start = tuple(jnp.asarray(w) for w in case.layers)
    times = jnp.asarray(case.times)

    @jax.jit
    def solve(layers: tuple[jax.Array, ...], times: jax.Array) -> jax.Array:
        saved = flow.solve(problem, gf.DeepLinear(layers), times)
        return jnp.concatenate([w.reshape(SAVES, -1) for w in saved], axis=1)

    def run() -> np.ndarray:
        return np.asarray(solve(start, times))

    return run


def own_solves(name: str, case: FlowCase) -> dict[str, Callable[[], np.ndarray]]:
    """The ways in which gradflow takes part in a case."""
    flow = gf.GradientFlow(RTOL, ATOL)
    found = {"gradflow": own_solve(case, flow), "gradflow, compiled solve": own_core(case, flow)}
    if name in STIFF:
        found["gradflow, stiff"] = own_solve(case, gf.GradientFlow(RTOL, ATOL, stiff=True))
    return found


def peer_solves(name: str, case: FlowCase) -> dict[str, Callable[..., np.ndarray]]:
    """The others; each takes the seconds after which it is stopped."""
    dense = case.size <= LARGEST_JACOBIAN
    methods = ("RK45", "DOP853", *(("LSODA",) if dense else ()))
    if name in STIFF:
        methods = (*methods, "Radau", "BDF")
    found = {f"SciPy, {m}": scipy_solve(case, m) for m in methods}
    return found | {f"torchdiffeq, {m}": torchdiffeq_solve(case, m) for m in ("dopri5", "dopri8")}


def flow_table(name: str, rounds: int, patience: float) -> Table:
    """Check, measure errors, time."""
    case = CASES[name]()
    exact = reference(case, name in STIFF)
    runs: dict[str, Callable[..., np.ndarray]] = dict(own_solves(name, case))
    points, absent = {who: run() for who, run in runs.items()}, {}
    for who, run in peer_solves(name, case).items():
        try:
            points[who], runs[who] = run(MOST_SECONDS), run
        except TooSlowError as reason:
            absent[who] = str(reason)
    losses = {"reference": loss_of(unflat(case, exact), case.target)}
    contestants = []
    for who, saved in points.items():
        losses[who] = loss_of(unflat(case, saved), case.target)
        of_loss, of_g = errors(case, saved, exact)
        facts = {"error of the loss": of_loss, "error of G": of_g}
        contestants.append(Contestant(who, runs[who], facts=facts))
    agreement = same_values(losses, AGREEMENT)
    timings = contest(contestants, rounds, patience)
    factor = 10.0 if case.is_scalar else 1.5
    own = min((t for n, t in timings.items() if n.startswith("gradflow")), key=lambda t: t.median)
    peers = {n: t for n, t in timings.items() if not n.startswith("gradflow")}
    best = min(peers.values(), key=lambda t: t.median)
    no_worse = [
        stated(
            f"{fact} no larger than that of {best.name}",
            own.facts[fact] / max(best.facts[fact], ROUNDING),
            1.0,
        )
        for fact in ("error of the loss", "error of G")
    ]
    target = Target(
        f"{factor:g}x faster than the best of SciPy and torchdiffeq",
        own.name,
        tuple(peers),
        1 / factor,
    )
    return Table(
        f"{case.title}, to t = {case.stop:g}", "ms", "solve", "gradflow", timings, [target],
        agreement, "largest difference of the loss", no_worse, absent,
    )  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=None)
    chosen = parser.parse_args()
    report = Report("gradient_flow", chosen)
    names = chosen.cases or (("scalar-2", "width-10") if chosen.quick else list(CASES))
    for name in names:
        patience = 5.0 if chosen.quick else 60.0
        report.add(flow_table(name, rounds_of(chosen), patience))
    report.write()


if __name__ == "__main__":
    main()
