"""Quantities of the stored weights of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import numpy as np

from gradflow.dynamics import GradientDescent
from gradflow.geometry.imbalance import gram_differences
from gradflow.loss import gradient
from gradflow.network import DeepLinear
from gradflow.regularizers import WeightDecay
from gradflow.study.claims.reading import Values, check_start, stored_weights
from gradflow.study.results import RunResult
from gradflow.study.spec.claim_tables import CLAIMS, Measurement, RunsClaim


class _OfWeights(RunsClaim):
    """A claim about stored weights."""

    of_weights: ClassVar[bool] = True


@CLAIMS.register
class BalancednessChange(_OfWeights):
    """Largest |G_i(t) - G_i(0)| over entries, layers, times and replicas (stored weights)."""

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Look at all saved weights."""
        (run,) = found
        check_start(run)
        return Measurement(
            max(float(np.max(np.abs(g - g[:, :1]))) for g in _balancedness(stored_weights(run)))
        )


@CLAIMS.register
class BalancednessDecay(_OfWeights):
    """Largest |G_i(t) - exp(-2 rate t) G_i(0)| under weight decay (stored weights)."""

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Look at all saved weights."""
        (run,) = found
        check_start(run)
        factor = np.exp(-2 * _weight_decay(run) * run.trajectory.time)[None, :, None, None]
        layers = _balancedness(stored_weights(run))
        return Measurement(max(float(np.max(np.abs(g - factor * g[:, :1]))) for g in layers))


@CLAIMS.register
class GdIdentity(_OfWeights):
    r"""Largest residual of the one-step identity of gradient descent for G_i (stored weights, every
    step saved).

    $$G_i^+ = (1-h\lambda)^2 G_i + h^2 (g_{i+1}^\top g_{i+1} - g_i g_i^\top)$$
    """

    every_step_of: ClassVar[Literal["", "GradientDescent", "plain GradientDescent"]] = (
        "plain GradientDescent"
    )

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Look at all steps.

        The gradients are those of the data loss at the stored weights, so the problem must have no
        noise.
        """
        (run,) = found
        problem, dynamics = run.trajectory.problem, run.spec.dynamics.made
        if not isinstance(dynamics, GradientDescent) or problem.is_stochastic:
            raise ValueError("the one-step identity is checked for gradient descent without noise")
        layers = stored_weights(run)
        flat = tuple(jax.numpy.asarray(w.reshape(-1, *w.shape[2:])) for w in layers)
        gradients = jax.vmap(lambda w: gradient(DeepLinear(w), problem.data))(flat)
        if dynamics.schedule is not None:
            raise ValueError("the one-step identity is checked for a constant step size")
        step, shape = float(dynamics.step_size), layers[0].shape[:2]
        kicks = _balancedness(tuple(np.asarray(g).reshape(*shape, *g.shape[1:]) for g in gradients))
        decay = (1 - step * _weight_decay(run)) ** 2
        return Measurement(
            max(
                float(np.max(np.abs(g[:, 1:] - decay * g[:, :-1] - step**2 * kick[:, :-1])))
                for g, kick in zip(_balancedness(layers), kicks, strict=True)
            )
        )


@CLAIMS.register
class DiagonalChange(_OfWeights):
    """Largest change of a diagonal entry of G_i over layers, times and replicas (stored
    weights).
    """

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Look at all saved weights."""
        (run,) = found
        check_start(run)
        diagonals = [np.diagonal(g, axis1=-2, axis2=-1) for g in _balancedness(stored_weights(run))]
        return Measurement(max(float(np.max(np.abs(d - d[:, :1]))) for d in diagonals))


@CLAIMS.register
class NoetherDecay(_OfWeights):
    r"""Largest residual of J_i(k + 1) = momentum * J_i(k), relative (stored weights, every step
    saved).

    $$J_i^+ = \beta J_i, \qquad
      J_i = \mathrm{skew}(W_{i+1}^\top V_{i+1} + W_i V_i^\top)$$
    """

    every_step_of: ClassVar[Literal["", "GradientDescent", "plain GradientDescent"]] = (
        "GradientDescent"
    )

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Look at all steps.

        The velocity $V$ of a step is read off the weights before and after it; the residual is
        relative to the largest $|J_i|$ at the start.
        """
        (run,) = found
        check_start(run)
        dynamics = run.spec.dynamics.made
        if not isinstance(dynamics, GradientDescent):
            raise ValueError("the Noether charge decays by its momentum under GradientDescent only")
        charges = _charges(stored_weights(run))
        size = max(float(np.max(np.abs(j[:, 0]))) for j in charges)
        if size == 0.0:
            raise ValueError("the Noether charge is 0 at the start; give the run a velocity")
        beta = 0.0 if dynamics.momentum is None else float(dynamics.momentum)
        residual = max(float(np.max(np.abs(j[:, 1:] - beta * j[:, :-1]))) for j in charges)
        detail = f"largest charge {size:.3g} after the first step"
        return Measurement(residual / size, detail=detail)


def _charges(layers: Sequence[Values]) -> list[Values]:
    """The Noether charges `J_i` after every step, for layers with leading axes (replica, time)."""
    if len(layers) < 2:
        raise ValueError("a network of depth 1 has no hidden rotation and no Noether charge")
    steps = [np.diff(w, axis=1) for w in layers]
    charges = []
    for i in range(len(layers) - 1):
        upper = _transposed(layers[i + 1][:, 1:]) @ steps[i + 1]
        full = upper + layers[i][:, 1:] @ _transposed(steps[i])
        charges.append((full - _transposed(full)) / 2)
    return charges


def _transposed(stack: Values) -> Values:
    return np.swapaxes(stack, -1, -2)


def _balancedness(layers: Sequence[Values]) -> list[Values]:
    """`G_i` (or the same difference of gradients) for layers with leading axes (replica, time)."""
    if len(layers) < 2:
        raise ValueError("a network of depth 1 has no layers to balance")
    over_all = jax.vmap(jax.vmap(gram_differences))
    return [np.asarray(g) for g in over_all(tuple(map(jax.numpy.asarray, layers)))]


def _weight_decay(run: RunResult) -> float:
    rates = [r.rate for r in run.trajectory.problem.regularizers if isinstance(r, WeightDecay)]
    return float(sum(rates))
