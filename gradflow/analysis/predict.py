"""What theory says of a run before it is made: phases, floor and rate of decay."""

from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from gradflow.data import Regression
from gradflow.dynamics import (
    SVAG,
    ExactFlow,
    GradientDescent,
    GradientFlow,
    StochasticFlow,
)
from gradflow.dynamics.base import AbstractDynamics
from gradflow.geometry.curvature import minima_spectrum, smallest_positive
from gradflow.geometry.imbalance import imbalance
from gradflow.network import DeepLinear
from gradflow.observables import BUILT_IN, check_plain, theory_options
from gradflow.problem import Problem
from gradflow.regularizers.base import AbstractLayerNoise
from gradflow.simulate import simulate
from gradflow.theory.drift import imbalance_drift
from gradflow.theory.floor import stationary_covariance
from gradflow.trajectory import Trajectory
from gradflow.types import Scalar

CONVERGED = 1e-12
"""Excess loss, relative to its start, at which a noise-free run counts as having converged."""

FIRST_LENGTH = 20.0
"""First attempt at a length of the optimization phase, in units of its slowest time scale."""

ATTEMPTS = 12
"""Each attempt is four times as long as the one before; saddle plateaus need the later ones."""

POINTS = 801
"""Saved points of the noise-free run in which the end of the optimization phase is located."""

MOST_STEPS = 4_000_000
"""Steps of gradient descent after which a noise-free run is given up."""


@dataclass(frozen=True)
class Prediction:
    r"""What theory predicts for a dynamics on a problem from a network.

    - `optimization_rate`: rate at which the residual $|M|$ dies at the minimum reached, the
        smallest eigenvalue of the end-to-end kernel (for gradient descent per unit of flow time,
        $-\log|1 - h\lambda|/h$); per flow time.
    - `optimization_end`: end of the optimization phase, flow time: the noise-free residual has come
        within `eps` of the floor.
    - `loss_floor`: excess loss in the regularization phase.
    - `imbalance_rate`: $-d \log D / dt$ at the start of the regularization phase, per flow time;
        negative if imbalance grows. `imbalance_drift`: $dD/dt$ there.
    - `separation`: `optimization_rate / imbalance_rate`, the ratio of the two time scales.
    - `limit`: the minimum at which noise-free training ends and the regularization phase starts.
    - `reason`: why a field is NaN, empty if none is.
    """

    optimization_rate: float
    optimization_end: float
    loss_floor: float
    imbalance_rate: float
    imbalance_drift: float
    separation: float
    eps: float
    limit: DeepLinear
    reason: str = ""


def predict(
    problem: Problem, net: DeepLinear, dynamics: AbstractDynamics, eps: float = 0.1
) -> Prediction:
    r"""Predict the two phases of a run from the start `net`.

    The optimization phase is run without noise and penalties (gradient flow, or gradient descent
    for a discrete dynamics) to the minimum it reaches; the rest are formulas evaluated there. The
    imbalance drift is the exact expected one-step drift with the stationary covariance of the
    residual added, hence exact in the step size at leading order in the noise: for label noise on a
    scalar network of depth 2 it is $h v \cdot 2/(2 - h \lambda)$ (theory sections 4, 5, 7b and 9).

    **Arguments:**

    - `problem`, `net`, `dynamics`: the run.
    - `eps`: relative distance to the floor at which the optimization phase ends.

    **Raises:** `ValueError` for noise inside the network, for a dynamics that theory does not
    cover, or if noise-free training does not converge to a minimum.
    """
    _check_covered(dynamics)
    inside = [type(r).__name__ for r in problem.regularizers if isinstance(r, AbstractLayerNoise)]
    if inside:
        raise ValueError(
            f"problem: predictions cover noise on the data and weight decay, not {inside[0]}."
        )
    clean = Problem(
        Regression.from_moments(problem.input_moment, problem.data.syx, problem.data.syy)
    )
    path = _noise_free(clean, net, dynamics)
    limit = path.network(-1)
    spectrum = np.asarray(_spectrum(limit, problem.input_moment))
    rate = _optimization_rate(spectrum, dynamics)
    random = dynamics.is_random(problem)
    decays = bool(problem.penalties)
    floor = float(_evaluate("loss_floor", limit, problem, dynamics))

    reasons = []
    if not random and not decays:
        end, floor = float("nan"), 0.0
        reasons.append("no regularizer acts in this dynamics: there is no regularization phase")
    elif random:
        end = _crossing(path.time, path["excess_loss"], eps * floor)
    else:
        residual = float(_evaluate("slaved_residual", limit, problem, dynamics))
        end = _crossing(path.time, path["gradient_at_output"], eps * residual)

    if isinstance(dynamics, GradientDescent) and dynamics.momentum is not None:
        drift = decay = float("nan")
        reasons.append("the imbalance drift under momentum is not covered")
    else:
        drift = _drift_at(problem, limit, dynamics, random)
        start = float(imbalance(limit))
        decay = _decay_rate(drift, start, dynamics)
        if start == 0.0:
            reasons.append("the minimum is balanced: there is no imbalance to decay")
        elif decay < 0.0:
            reasons.append("imbalance grows at the minimum: no separation of time scales")
    separation = rate / decay if decay > 0.0 else float("nan")
    return Prediction(
        optimization_rate=rate,
        optimization_end=end,
        loss_floor=floor,
        imbalance_rate=decay,
        imbalance_drift=drift,
        separation=separation,
        eps=eps,
        limit=limit,
        reason="; ".join(reasons),
    )


_spectrum = eqx.filter_jit(minima_spectrum)
_imbalance_drift = eqx.filter_jit(imbalance_drift)


@eqx.filter_jit
def _evaluate(name: str, net: DeepLinear, problem: Problem, dynamics: AbstractDynamics) -> Scalar:
    """A built-in observable, compiled."""
    return BUILT_IN[name].evaluate(net, problem, dynamics)


def _check_covered(dynamics: AbstractDynamics) -> None:
    """Raise a `ValueError` for a dynamics of which theory predicts nothing here."""
    covered = (GradientFlow, ExactFlow, GradientDescent, SVAG, StochasticFlow)
    if not isinstance(dynamics, covered):
        names = ", ".join(kind.__name__ for kind in covered)
        raise ValueError(
            f"dynamics: predictions cover {names}; got {type(dynamics).__name__}. Predict for "
            "GradientDescent of the same step size instead."
        )
    check_plain(dynamics, "a prediction", heavy_ball=True)


def _training(dynamics: AbstractDynamics) -> GradientDescent | None:
    """The training step by step that a dynamics is without noise; None for a flow."""
    if isinstance(dynamics, SVAG):
        return GradientDescent(dynamics.step_size / dynamics.amplification)
    return dynamics if isinstance(dynamics, GradientDescent) else None


def _output_gradient_norm(net: DeepLinear, problem: Problem):
    """$|M|$, the norm of the end-to-end gradient."""
    return jnp.linalg.norm(net.end_to_end @ problem.data.sxx - problem.data.syx)


def _noise_free(clean: Problem, net: DeepLinear, dynamics: AbstractDynamics) -> Trajectory:
    """The noise-free run from `net` until it has converged."""
    watched = {
        "excess_loss": None,
        "gradient_at_output": _output_gradient_norm,
    }
    mover = _training(dynamics) or GradientFlow(1e-10, 1e-12)
    h = 0.0 if mover.step_size is None else float(mover.step_size)
    slowest = float(smallest_positive(_spectrum(net, clean.data.sxx)))
    length = FIRST_LENGTH / max(slowest, 1e-12)
    excess = np.full(1, np.nan)
    for _ in range(ATTEMPTS):
        if h and length / h > MOST_STEPS:
            length = MOST_STEPS * h
        run = simulate(
            clean, net, mover, t1=length, save=POINTS, observables=watched, progress=False
        )
        excess = run["excess_loss"]
        if not np.all(np.isfinite(excess)):
            raise ValueError(
                f"dynamics: noise-free training from this start diverges at t = {length:.3g}; use "
                "a smaller step size."
            )
        if excess[-1] <= CONVERGED * max(excess[0], CONVERGED):
            return run
        if h and length >= MOST_STEPS * h:
            break
        length *= 4.0
    raise ValueError(
        f"net: noise-free training has not reached a minimum by t = {length:.3g} (excess loss "
        f"{excess[-1]:.3g}, from {excess[0]:.3g}); it may sit at a saddle, or hidden layers may "
        "be narrower than the rank of the target. Start elsewhere."
    )


def _optimization_rate(spectrum: np.ndarray, dynamics: AbstractDynamics) -> float:
    """Slowest decay rate of the residual at a minimum with this Hessian spectrum."""
    slowest = float(smallest_positive(jnp.asarray(spectrum)))
    training = _training(dynamics)
    if training is None:
        return slowest
    h = float(training.step_size)
    modes = spectrum[spectrum >= slowest]
    if training.momentum is None:
        factors = np.abs(1.0 - h * modes)
    else:
        beta = float(training.momentum)
        companions = np.array([[[1 + beta - h * m, -beta], [1.0, 0.0]] for m in modes])
        factors = np.abs(np.linalg.eigvals(companions)).max(axis=1)
    with np.errstate(divide="ignore"):
        return float(-np.log(factors.max()) / h)


def _crossing(time: np.ndarray, values: np.ndarray, level: float) -> float:
    """First time at which `values` falls to `level`, interpolated in its logarithm."""
    below = np.nonzero(values <= level)[0]
    if below.size == 0 or level <= 0.0:
        return float("nan")
    k = int(below[0])
    if k == 0:
        return 0.0
    upper, lower = np.log(values[k - 1]), np.log(max(values[k], np.finfo(float).tiny))
    share = (upper - np.log(level)) / (upper - lower)
    return float(time[k - 1] + share * (time[k] - time[k - 1]))


def _drift_at(
    problem: Problem, limit: DeepLinear, dynamics: AbstractDynamics, random: bool
) -> float:
    """Expected $dD/dt$ in the regularization phase at a minimum."""
    if isinstance(dynamics, GradientFlow | ExactFlow):
        return float(_imbalance_drift(problem, limit.weights, 0.0, discrete=False))
    options = theory_options(dynamics)
    h, extra = dynamics.step_size, None
    sees_mean = options["discrete"] or options.get("order") == 2
    if random and sees_mean:
        widen = jnp.kron(jnp.eye(problem.data.d_out), problem.noisy_root)
        fluctuation = stationary_covariance(problem, limit.weights, h, **options)
        extra = widen @ fluctuation @ widen / options.get("amplification", 1)
    elif not random and not options["discrete"]:
        h = 0.0 if options["order"] == 1 else h
    return float(_imbalance_drift(problem, limit.weights, h, extra=extra, **options))


def _decay_rate(drift: float, start: float, dynamics: AbstractDynamics) -> float:
    """The exponential rate per flow time of which `drift` is the expected change."""
    if start == 0.0:
        return float("nan")
    relative = drift / start
    if (training := _training(dynamics)) is not None:
        h = float(training.step_size)
        return float(-np.log1p(h * relative) / h) if h * relative > -1.0 else float("nan")
    return -relative
