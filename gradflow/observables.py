"""What can be watched along a run: named functions of network and problem."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from gradflow.backend.lapack_batches import decomposed_together, traced
from gradflow.backend.products import in_groups, product
from gradflow.backend.types import Weights
from gradflow.checks import first_line
from gradflow.dynamics.base import AbstractDynamics, over_paths
from gradflow.geometry.bounds import sharpness_bound
from gradflow.geometry.curvature import (
    hessian_block_traces,
    hessian_trace,
    minima_sharpness,
    sharpness,
)
from gradflow.geometry.imbalance import gram_differences, imbalance, squared_norms
from gradflow.loss import loss
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.theory.floor import (
    INSTEAD,
    noise_floor,
    slaved_residual,
    weight_decay_plateau,
)
from gradflow.theory.noise import check_outside


class Observable(eqx.Module):
    """A quantity evaluated along a run.

    **Arguments:**

    - `name`: what it is called in trajectories, spec files and figures.
    - `long_name`, `units`: for labels; units in powers of `weight`, `loss`, `time`.
    - `evaluate`: function of (network, problem, dynamics) giving an array.
    - `dims`: names of the array's axes, () for a number. `layer`, `pair`, `width_in` and
        `width_out` are known.
    """

    name: str = eqx.field(static=True)
    long_name: str = eqx.field(static=True)
    units: str = eqx.field(static=True)
    evaluate: Callable[[DeepLinear, Problem, AbstractDynamics], Array] = eqx.field(static=True)
    dims: tuple[str, ...] = eqx.field(static=True, default=())


ObservableSpec: TypeAlias = (
    Sequence[str | Observable] | Mapping[str, Callable[[DeepLinear, Problem], Any] | None]
)


def _excess_loss(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    deviation = product(net.end_to_end, problem.input_moment) - problem.data.syx
    return 0.5 * jnp.sum(product(deviation, problem.noisy_inverse_root) ** 2)


def _loss_floor(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    check_outside(problem, "loss_floor", INSTEAD)
    total, rule = jnp.zeros((), problem.data.sxx.dtype), dynamics.update_rule
    if problem.penalties:
        rule.check_balances_decay("loss_floor")
        total = weight_decay_plateau(problem, net.weights)
    if not dynamics.describes_noise(problem):
        return total
    options = dynamics.theory_options()
    rule.check_plain(type(dynamics).__name__, "loss_floor", heavy_ball=True)
    options["momentum"] = rule.momentum
    return total + noise_floor(problem, net.weights, dynamics.step_size, **options)


def _slaved_residual(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    dynamics.update_rule.check_balances_decay("slaved_residual")
    return jnp.linalg.norm(slaved_residual(problem, net.weights))


def _deviation(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    dynamics.update_rule.check_balances_decay("slaved_deviation")
    m = net.end_to_end @ problem.input_moment - problem.data.syx
    return jnp.linalg.norm(m - slaved_residual(problem, net.weights))


def _gradient_norm(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    return jnp.sqrt(sum(jnp.sum(g * g) for g in problem.averaged_gradient(net.weights)))


def _balancedness_traces(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    return jnp.diff(squared_norms(net))


def _balancedness_norms(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    norms = [jnp.linalg.norm(g) for g in gram_differences(net.weights)]
    return jnp.stack(norms) if norms else jnp.zeros((0,), net.weights[0].dtype)


def _block_trace_spread(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    traces = hessian_block_traces(net, problem.data)
    return jnp.max(traces) / jnp.min(traces) - 1.0


def _minima_sharpness(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    return minima_sharpness(net.weights, problem.noisy_root)


def _sharpness_ratio(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
    return _minima_sharpness(net, problem, dynamics) / sharpness_bound(problem, net.depth)


BUILT_IN: dict[str, Observable] = {
    o.name: o
    for o in (
        Observable("loss", "loss L", "loss", lambda n, p, d: loss(n, p.data)),
        Observable(
            "averaged_loss",
            "averaged loss, penalties included",
            "loss",
            lambda n, p, d: p.averaged_loss(n.weights),
        ),
        Observable("excess_loss", "excess loss over its minimum", "loss", _excess_loss),
        Observable("loss_floor", "loss floor of the regularization phase", "loss", _loss_floor),
        Observable("slaved_deviation", "deviation |M - M_slow|", "loss/weight", _deviation),
        Observable("slaved_residual", "slaved residual |M_slow|", "loss/weight", _slaved_residual),
        Observable("imbalance", "imbalance D(W)", "weight^2", lambda n, p, d: imbalance(n)),
        Observable(
            "imbalance_drift",
            "expected drift dD/dt",
            "weight^2/time",
            lambda n, p, d: d.imbalance_drift(p, n.weights),
        ),
        Observable(
            "squared_norms",
            "squared norm |W_i|^2",
            "weight^2",
            lambda n, p, d: squared_norms(n),
            ("layer",),
        ),
        Observable(
            "balancedness_trace",
            "tr G",
            "weight^2",
            _balancedness_traces,
            ("pair",),
        ),
        Observable("balancedness_norm", "norm of G", "weight^2", _balancedness_norms, ("pair",)),
        Observable(
            "hessian_trace",
            "Hessian trace tr H",
            "loss/weight^2",
            lambda n, p, d: hessian_trace(n, p.data),
        ),
        Observable(
            "sharpness",
            "sharpness, largest Hessian eigenvalue",
            "loss/weight^2",
            lambda n, p, d: sharpness(n, p.data),
        ),
        Observable(
            "hessian_block_traces",
            "trace of the Hessian block of a layer",
            "loss/weight^2",
            lambda n, p, d: hessian_block_traces(n, p.data),
            ("layer",),
        ),
        Observable(
            "block_trace_spread",
            "largest over smallest block trace, minus 1",
            "1",
            _block_trace_spread,
        ),
        Observable(
            "minima_sharpness",
            "sharpness on the minima manifold",
            "loss/weight^2",
            _minima_sharpness,
        ),
        Observable(
            "sharpness_ratio", "sharpness over the flattest minimum's", "1", _sharpness_ratio
        ),
        Observable("gradient_norm", "norm of the averaged gradient", "loss/weight", _gradient_norm),
        Observable(
            "end_to_end",
            "end-to-end matrix P",
            "target/input",
            lambda n, p, d: n.end_to_end,
            ("width_out", "width_in"),
        ),
    )
}
"""The observables known by name."""

_SHIPPED = frozenset(BUILT_IN)

DEFAULT = ("loss", "excess_loss", "imbalance", "squared_norms")
"""What is recorded unless asked otherwise: cheap for every size of network."""

RESERVED = ("time", "effective_time", "step", "replica", "layer", "diverged_at", "incomplete_at")
RESERVED_PREFIXES = ("data_", "start_", "width_")
LAYER_NAME = re.compile(r"W\d+")


def register(observable: Observable) -> Observable:
    """Make an observable known by its name: to specs, `simulate` and the command line.

    **Raises:** `ValueError` if the name is that of one that ships with gradflow.
    """
    _check_name(observable)
    BUILT_IN[observable.name] = observable
    return observable


def resolve(spec: ObservableSpec | None) -> tuple[Observable, ...]:
    """The observables of a specification.

    **Arguments:**

    - `spec`: names of built-in or registered observables and `Observable` objects, or a mapping
        from names to functions of (network, problem) (None for a built-in one), or None for the
        default set.

    **Raises:** `ValueError` for an unknown name, listing the known ones, or a name that is taken;
    `TypeError` for something that is not a function.
    """
    if spec is None:
        spec = DEFAULT
    if isinstance(spec, str):
        raise TypeError(f"observables must be a list of names; got the string {spec!r}.")
    if isinstance(spec, Mapping):
        spec = [_own(name, function) for name, function in spec.items()]
    chosen = []
    for item in spec:
        if isinstance(item, Observable):
            _check_name(item)
            chosen.append(item)
        elif item in BUILT_IN:
            chosen.append(BUILT_IN[item])
        else:
            raise ValueError(
                f"observables: {item!r} is not known; choose from {', '.join(BUILT_IN)}, or give "
                "a mapping {name: function of (network, problem)}."
            )
    names = [o.name for o in chosen]
    doubled = sorted({n for n in names if names.count(n) > 1})
    if doubled:
        raise ValueError(f"observables: {', '.join(doubled)} asked for more than once.")
    return tuple(chosen)


def _own(name: str, function: Callable[[DeepLinear, Problem], Any] | None) -> Observable | str:
    if function is None:
        return name
    if not callable(function):
        raise TypeError(
            f"observables: {name!r} needs a function of (network, problem), or None for the "
            f"built-in one; got {function!r}."
        )
    return Observable(name, name, "1", _of_network_and_problem(function))


def _check_name(observable: Observable) -> None:
    """A name that is taken would be overwritten in the data set, or repeated as something else."""
    name = observable.name
    if name in BUILT_IN and observable is not BUILT_IN[name]:
        raise ValueError(f"observables: {name!r} is built in; give your own another name.")
    if name in RESERVED or name.startswith(RESERVED_PREFIXES) or LAYER_NAME.fullmatch(name):
        raise ValueError(f"observables: {name!r} is taken by the trajectory; choose another name.")


@functools.lru_cache(maxsize=256)  # one wrapper a function, so that a second run does not recompile
def _of_network_and_problem(
    function: Callable[[DeepLinear, Problem], Any],
) -> Callable[[DeepLinear, Problem, AbstractDynamics], Array]:
    def evaluate(net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Array:
        return jnp.asarray(function(net, problem))

    return evaluate


def observe(
    observables: Sequence[Observable],
    weights: Weights,
    problem: Problem,
    dynamics: AbstractDynamics,
) -> dict[str, Array]:
    """Every observable of every path; arrays end in the path axis.

    **Raises:** `TypeError` naming an observable of the user's own that fails.
    """

    def one(w: Weights) -> dict[str, Array]:
        net = DeepLinear(w)
        return {o.name: _evaluated(o, net, problem, dynamics) for o in observables}

    of_path, work = traced(one, tuple(w[..., 0] for w in weights))
    return in_groups(over_paths(of_path), weights, decomposed_together(weights, work))


def _evaluated(
    observable: Observable, net: DeepLinear, problem: Problem, dynamics: AbstractDynamics
) -> Array:
    if observable.name in _SHIPPED:  # these cannot be taken by others
        return observable.evaluate(net, problem, dynamics)
    try:
        value = observable.evaluate(net, problem, dynamics)
        return jnp.asarray(value, jnp.result_type(value, float))
    except Exception as error:  # whatever the user's function raises
        raise TypeError(
            f"observables: {observable.name!r} failed ({type(error).__name__}: "
            f"{first_line(error)}); it is compiled with the run, so write it in jax.numpy, without "
            "float(), if or numpy on what it is given, and return an array of real numbers."
        ) from error
