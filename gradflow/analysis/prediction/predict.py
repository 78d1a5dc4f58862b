"""What theory says of a run before it is made: phases, floor, rates and where it ends."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from gradflow.analysis.boundary import first_crossing
from gradflow.analysis.prediction.at_minimum import at_minimum, landed
from gradflow.analysis.prediction.edge import beyond_the_edge, optimization_rate, unstable
from gradflow.analysis.prediction.noise_free_run import noise_free_run, nonzero_spectrum
from gradflow.analysis.prediction.overlap import overlap
from gradflow.analysis.prediction.prediction import Prediction
from gradflow.analysis.prediction.rate_law import RateLaw, Theory, rounded_speed
from gradflow.backend.compiled import compiled
from gradflow.checks import Decay, is_number
from gradflow.data import Regression
from gradflow.dynamics import GradientDescent, GradientFlow, SlowFlow
from gradflow.dynamics.base import AbstractDynamics
from gradflow.geometry.base import (
    check_double,
    check_network,
    check_problem,
    check_widths,
)
from gradflow.geometry.imbalance import imbalance, squared_norms
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.results.trajectory import Trajectory
from gradflow.simulation.progress import announced
from gradflow.theory.drift import imbalance_drift
from gradflow.theory.stationary import stationary_covariance

OVERLAPPING = 0.01
"""Change of the imbalance in the optimization phase, relative to it, that is worth a note."""

APART = 0.1
"""Rate at which penalties act on the slow motion, relative to that of the residual, from which on
their leading order is so rough that it is worth a note."""

BALANCED = 1e-12
"""Imbalance, relative to |W|^2, that is rounding."""


def predict(
    problem: Problem,
    net: DeepLinear,
    dynamics: AbstractDynamics | ArrayLike,
    *,
    momentum: ArrayLike = 0.0,
    decay: Decay = "coupled",
    eps: float = 0.1,
) -> Prediction:
    r"""Predict the two phases of a run from the start `net`, for every regularizer.

    The optimization phase is run without noise and penalties (gradient flow, or gradient descent
    for a discrete dynamics) to the minimum it reaches. Rates are those of `slow_drift` there, at
    leading order ($h \to 0$) and exact in the step size; half-life, end point and the network
    after any number of steps follow the slow flow from there. For label noise on a scalar network
    of depth 2 the imbalance decays at $h v$ and $h v \cdot 2/(2 - h \lambda)$ (docs/theory.md
    sections 4, 5, 7b and 9).

    *The error.* Both are of leading order in the noise. What they neglect, relative to what they
    keep, is of the size of `relative_error`: the share $\epsilon = E|\delta W|^2 / |W|^2$ of the
    fast fluctuation, and its root where the noise is skewed (batches of a finite sample, masks). In
    simulated scalar networks of depth 2 under label noise, at $h \lambda_\mathrm{max}$ = 0.1 to
    1.3 and $\epsilon$ = 0.003 to 0.03, the change of the imbalance differed from that at finite
    step by 0 to 0.9 times that; with batches of one of four rows at depth 3 by 0.4 to 0.6
    $\sqrt\epsilon$. Penalties and noise inside the network add the ratio of the rate at which they
    act to that of the residual (for weight decay $2 \lambda$ over `optimization_rate`): a note
    says so from a tenth on. `overlap` is what they neglect of the optimization phase.

    Rates of gradient descent without momentum are those of $D_{k+1} = D_k (1 - h r)$,
    $-\log(1 - h r)/h$. SVAG and the SDE of order 2 have no slow flow of their own: their rates are
    the exact expected drift of one step with the stationary covariance of the residual added.

    **Arguments:**

    - `problem`, `net`: the run.
    - `dynamics`: how the weights move; a number is the step size of `GradientDescent`.
    - `momentum`, `decay`: of `GradientDescent`, beside a step size.
    - `eps`: relative distance to the floor at which the optimization phase ends.

    **Returns:** a `Prediction`; `print` shows it as a table.

    **Raises:** `ValueError` for a dynamics that theory does not cover, widths that do not fit the
    data, or if noise-free training does not converge to a minimum; `TypeError` for an argument that
    is not a problem, a network or a dynamics.
    """
    check_problem(problem)
    check_network(net)
    check_widths(net, problem)
    check_double(net.weights, "predict")
    _check_penalties(problem)
    dynamics = _as_dynamics(dynamics, momentum, decay)
    with announced("predicting (compiled at the first call)"):
        return _predicted(_Run(problem, net, dynamics, eps))


def _predicted(run: "_Run") -> Prediction:
    """The laws of a run, and those of its dynamics among them."""
    dynamics, training = run.dynamics, run.dynamics.discrete_training
    start = run.optimization_phase(training)
    leading = run.law("leading_order", start)
    finite = run.law("finite_step", start) if dynamics.rate_theory == "finite_step" else None
    own, slow = finite or leading, finite or leading
    if dynamics.rate_theory == "one_step":
        own, slow = run.law("leading_order", start, exact=True), None
    notes = []
    if training is not None and np.isfinite(own.optimization_rate):
        notes.append(beyond_the_edge(run.problem, run.net, training, own.imbalance))
    if abs(start.overlap) > OVERLAPPING * own.imbalance:
        notes.append(
            f"the phases overlap: while the residual decays, noise changes D by about "
            f"{start.overlap:+.2g} beyond what the slow flow from the minimum reached says"
        )
    share = run.share_of_penalties(own.optimization_rate, own.imbalance_rate)
    if share > APART:
        notes.append(
            f"penalties are not weak: they act at {share:.2g} times the rate at which the residual "
            "decays, and everything here is of leading order in that; simulate to know more"
        )
    note = "; ".join(text for text in notes if text)
    return _summary(training, own, leading, finite, slow, run.eps, note, start.overlap)


def _check_penalties(problem: Problem) -> None:
    """Raise a `ValueError` for a penalty whose second order in the step size is not known."""
    others = [type(r).__name__ for r in problem.other_penalties]
    if others:
        raise ValueError(
            f"regularizers: of all penalties predictions cover WeightDecay alone, not "
            f"{', '.join(others)}; simulate SlowFlow, which covers them to leading order."
        )


def _as_dynamics(
    given: AbstractDynamics | ArrayLike, momentum: ArrayLike, decay: Decay
) -> AbstractDynamics:
    """The dynamics asked about, if theory covers it."""
    if not isinstance(given, AbstractDynamics):
        if not is_number(given):
            raise TypeError(
                "dynamics must be a step size or a dynamics such as GradientDescent(0.1); got "
                f"{given!r}."
            )
        return GradientDescent(given, momentum, decay=decay)
    if decay != "coupled" or bool(np.any(np.asarray(momentum) != 0.0)):
        raise ValueError(
            "momentum and decay stand beside a step size; a dynamics has its own: give "
            f"{type(given).__name__}(..., momentum=..., decay=...)."
        )
    kind = type(given).__name__
    if given.rate_theory is None:
        raise ValueError(
            "dynamics: predictions cover GradientFlow, ExactFlow, GradientDescent, SVAG, "
            f"StochasticFlow, SlowFlow; got {kind}. Predict for GradientDescent of the same step "
            "size instead."
        )
    beyond = given.update_rule.beyond_plain(heavy_ball=True)
    if beyond is not None:
        raise ValueError(
            f"dynamics: predictions cover plain SGD and heavy ball; this {kind} has {beyond[0]}. "
            f"Predict for {kind} with {beyond[1]}."
        )
    return given


@dataclass(frozen=True)
class _Start:
    """A noise-free run, the minimum it ends at, and the Hessian's nonzero spectrum there.

    `overlap` is what noise does meanwhile.
    """

    path: Trajectory
    limit: DeepLinear
    spectrum: np.ndarray
    training: AbstractDynamics | None
    overlap: float


class _Run:
    """One question: a problem, a start, a dynamics, and what its laws have in common."""

    def __init__(
        self,
        problem: Problem,
        net: DeepLinear,
        dynamics: AbstractDynamics,
        eps: float,
    ) -> None:
        self.problem, self.net, self.dynamics, self.eps = problem, net, dynamics, eps
        self.h = 0.0 if dynamics.step_size is None else float(dynamics.step_size)
        rule = dynamics.update_rule
        self.momentum = rule.momentum
        self.decay: Decay = rule.decay
        self.random = dynamics.describes_noise(problem)
        self.pulled = bool(problem.penalties or problem.layer_noise)

    def optimization_phase(self, training: AbstractDynamics | None) -> _Start:
        """The optimization phase without noise and penalties; for None that of gradient flow."""
        data = self.problem.data
        moments = Regression.from_moments(self.problem.input_moment, data.syx, data.syy)
        mover = training or GradientFlow(1e-10, 1e-12)
        path = noise_free_run(Problem(moments), self.net, mover)
        limit = DeepLinear(landed(path.network(-1).weights, self.problem))
        spectrum = np.asarray(nonzero_spectrum(limit, self.problem.input_moment))
        beta = 0.0 if self.momentum is None else float(self.momentum)
        shared = overlap(self.problem, path, limit, self.h, beta) if self.random else 0.0
        return _Start(path, limit, spectrum, training, shared)

    def law(self, theory: Theory, start: _Start, exact: bool = False) -> RateLaw:
        """Every number of a theory at a minimum; with `exact` by the drift of one step."""
        options: dict[str, Any] = {"discrete": False, "momentum": self.momentum}
        if exact:
            options = self.dynamics.theory_options()
        elif theory == "finite_step":
            options = {"discrete": True, "momentum": self.momentum}
        found = at_minimum(
            self.problem,
            start.limit.weights,
            self._slow_flow(theory),
            options,
            self.random,
        )
        largest = float(found.largest_step_size)
        plateau = float(found.plateau) if self.pulled else 0.0
        floor, end = plateau + float(found.noise_floor), float("nan")
        if self.random:
            end = _crossing(start.path, "excess_loss", self.eps * floor)
        elif self.pulled:
            level = self.eps * float(found.residual)
            end = _crossing(start.path, "gradient_at_output", level)

        rate = self._optimization_rate(start, stepwise=exact or theory == "finite_step")
        settles = rate > 0.0
        if not settles:
            rate = end = float("nan")
        distance, drift = float(imbalance(start.limit)), float(found.drift)
        compounded = None
        if exact:
            drift, compounded = self._exact_drift(start.limit), start.training
        if theory == "finite_step" and not self.dynamics.is_slow and self.momentum is None:
            compounded = start.training
            drift += self.h * float(self.problem.weight_decay) ** 2 * distance
        size = float(jnp.sqrt(jnp.sum(squared_norms(start.limit))))
        rounding = float(size * rounded_speed(found.force, start.spectrum[-1], size))
        if abs(drift) <= rounding:
            drift = 0.0
        decay = _decay_rate(drift, distance, compounded)
        return RateLaw(
            theory=theory,
            problem=self.problem,
            step_size=self.h,
            momentum=0.0 if self.momentum is None else float(self.momentum),
            decay=self.decay,
            limit=start.limit,
            optimization_end=end,
            optimization_rate=rate,
            loss_floor=floor,
            imbalance=distance,
            imbalance_drift=drift,
            imbalance_rate=decay,
            separation=rate / decay if decay > 0.0 else float("nan"),
            sharpness=float(start.spectrum[-1]),
            relative_error=float(found.relative_error) + self.share_of_penalties(rate, decay),
            has_noise=self.random,
            largest_step_size=largest,
            reason="; ".join(
                self._reasons(
                    start, settles, distance, drift, rounding, decay, exact, floor, largest
                )
            ),
        )

    def share_of_penalties(self, fast: float, slow: float) -> float:
        r"""The rate of penalties and noise inside the network over that of the residual; or 0.

        The numbers at the minimum reached are of leading order in it: weight decay shrinks an
        imbalance at $2 \lambda$.
        """
        if not (self.pulled and fast > 0.0):
            return 0.0
        beta = 0.0 if self.momentum is None else float(self.momentum)
        decay = 2.0 * float(self.problem.weight_decay) / (1.0 - beta)
        return max(decay, abs(slow) if np.isfinite(slow) else 0.0) / fast

    def _optimization_rate(self, start: _Start, stepwise: bool) -> float:
        r"""Step by step, or for small steps, where momentum makes it $1/(1 - \beta)$ as fast."""
        if stepwise:
            return optimization_rate(start.spectrum, start.training)
        beta = 0.0 if self.momentum is None else float(self.momentum)
        return optimization_rate(start.spectrum, None) / (1.0 - beta)

    def _slow_flow(self, theory: Theory) -> SlowFlow | None:
        """The slow flow of a training or its SDE; None for a flow, which has no step size."""
        if self.h == 0.0:
            return None
        beta = 0.0 if self.momentum is None else self.momentum
        return SlowFlow(self.h, theory == "finite_step", beta, decay=self.decay)

    def _exact_drift(self, limit: DeepLinear) -> float:
        if self.problem.layer_noise:
            return float("nan")
        return _exact_drift(self.problem, limit, self.dynamics, self.random)

    def _reasons(
        self,
        start: _Start,
        settles: bool,
        distance: float,
        drift: float,
        rounding: float,
        decay: float,
        exact: bool,
        floor: float,
        largest: float,
    ) -> list[str]:
        """Why numbers of a law are missing."""
        if not settles:
            return [unstable(self.h, self.momentum, start.spectrum, largest)]
        if self.h >= largest and np.isfinite(drift) and not np.isfinite(floor):
            return [
                "the noise of the SDE grows with the fluctuation that it makes: it is unstable in "
                "mean square, and has no loss floor. The largest stable step size at this minimum "
                f"is {largest:.4g}"
            ]
        if not self.random and not self.pulled:
            return ["no regularizer acts in this dynamics: there is no regularization phase"]
        if not np.isfinite(drift) and exact and self.problem.layer_noise:
            kind = type(self.dynamics).__name__
            return [
                f"{kind} has no rate law for noise inside the network; that of small steps stands "
                "under leading order"
            ]
        if not np.isfinite(drift):
            return [unstable(self.h, self.momentum, start.spectrum, largest)]
        if distance <= BALANCED * float(jnp.sum(squared_norms(start.limit))):
            return ["the minimum is balanced: there is no imbalance to decay"]
        if drift == 0.0:
            return [f"the imbalance stands still: |dD/dt| is below {rounding:.1g}, its rounding"]
        if decay < 0.0:
            return ["imbalance grows at the minimum: no separation of time scales"]
        if not np.isfinite(decay):
            return ["the noise is so strong that the imbalance would change sign within one step"]
        return []


def _summary(
    training: AbstractDynamics | None,
    own: RateLaw,
    leading: RateLaw,
    finite: RateLaw | None,
    slow: RateLaw | None,
    eps: float,
    start_note: str,
    overlap: float,
) -> Prediction:
    """The prediction whose numbers are those of the law of the dynamics itself."""
    h = float(training.step_size) if training is not None else own.step_size or float("nan")
    return Prediction(
        optimization_rate=own.optimization_rate,
        optimization_end=own.optimization_end,
        loss_floor=own.loss_floor,
        imbalance_rate=own.imbalance_rate,
        imbalance_drift=own.imbalance_drift,
        separation=own.separation,
        eps=eps,
        limit=own.limit,
        reason=own.reason,
        optimization_steps=own.optimization_steps,
        leading_rate=leading.imbalance_rate,
        leading_drift=leading.imbalance_drift,
        relative_error=own.relative_error,
        sharpness=h * own.sharpness,
        largest_step_size=own.largest_step_size,
        stability=h * own.sharpness / (2.0 * (1.0 + own.momentum)),
        leading_order=leading,
        finite_step=finite,
        slow=slow,
        start_note=start_note,
        overlap=overlap,
    )


_imbalance_drift = compiled(imbalance_drift)


def _exact_drift(
    problem: Problem, limit: DeepLinear, dynamics: AbstractDynamics, random: bool
) -> float:
    """Expected $dD/dt$ of one step in the regularization phase, or of the SDE."""
    options = dynamics.theory_options()
    h, extra = dynamics.step_size, None
    sees_mean = options["discrete"] or options.get("order") == 2
    if random and sees_mean:
        widen = jnp.kron(jnp.eye(problem.data.d_out), problem.noisy_root)
        fluctuation = stationary_covariance(problem, limit.weights, h, **options)
        extra = widen @ fluctuation @ widen / options.get("amplification", 1)
    elif not random and not options["discrete"]:
        h = 0.0 if options["order"] == 1 else h
    return float(_imbalance_drift(problem, limit.weights, h, extra=extra, **options))


def _decay_rate(drift: float, start: float, training: AbstractDynamics | None) -> float:
    """The exponential rate per flow time of which `drift` is the expected change."""
    if start == 0.0:
        return float("nan")
    relative = drift / start
    if training is not None:
        h = float(training.step_size)
        return float(-np.log1p(h * relative) / h) + 0.0 if h * relative > -1.0 else float("nan")
    return 0.0 - relative


def _crossing(path: Trajectory, name: str, level: float) -> float:
    """First time at which an observable of a run falls to `level`; NaN if it does not."""
    if level <= 0.0:
        return float("nan")
    times, _ = first_crossing(path.time, np.asarray(path[name])[None] / level, 1.0)
    return float(times[0])
