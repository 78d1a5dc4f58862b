"""The optimization phase by itself: a run without noise and penalties, until it has converged."""

import jax.numpy as jnp
import numpy as np

from gradflow.backend.compiled import compiled
from gradflow.dynamics.base import AbstractDynamics
from gradflow.geometry.curvature import minima_spectrum, sharpness, smallest_positive
from gradflow.network import DeepLinear
from gradflow.problem import Problem
from gradflow.results.trajectory import Trajectory
from gradflow.simulation.divergence import no_diverged_warning
from gradflow.simulation.simulate import simulate

CONVERGED = 1e-12
"""Excess loss, relative to its start, at which a noise-free run counts as having converged."""

FIRST_LENGTH = 20.0
"""First attempt at a length of the optimization phase, in units of its slowest time scale."""

ATTEMPTS = 12
"""Each attempt is four times as long as the one before; saddle plateaus need the later ones."""

MOST_POINTS = 801
"""Saved points of a noise-free run, in which the end of the optimization phase is located."""

FEWEST_POINTS = 101
"""The same for large networks, of which `PATH_BYTES` of weights are kept."""

PATH_BYTES = 2**27

MOST_STEPS = 4_000_000
"""Steps of gradient descent after which a noise-free run is given up."""

nonzero_spectrum = compiled(minima_spectrum)


def _output_gradient_norm(net: DeepLinear, problem: Problem):
    """$|M|$, the norm of the end-to-end gradient."""
    return jnp.linalg.norm(net.end_to_end @ problem.data.sxx - problem.data.syx)


def _beyond_edge(clean: Problem, net: DeepLinear, mover: AbstractDynamics) -> str:
    """That steps are not stable at a network; empty if they are."""
    if mover.stability_limit is None:
        return ""
    h, limit = float(mover.step_size), float(mover.stability_limit)
    share = h * float(sharpness(net, clean))
    if share < 0.9 * limit:
        return ""
    return (
        f"it has come to the edge of stability: h lam_max is {share:.4g} there, and steps are "
        f"stable up to {limit:.4g}; use a smaller step size, well below {h:g}"
    )


def noise_free_run(clean: Problem, net: DeepLinear, mover: AbstractDynamics) -> Trajectory:
    """The noise-free run from `net` until it has converged, with its weights."""
    watched = {
        "excess_loss": None,
        "gradient_at_output": _output_gradient_norm,
    }
    h = 0.0 if mover.step_size is None else float(mover.step_size)
    slowest = float(smallest_positive(nonzero_spectrum(net, clean.data.sxx)))
    length = max(FIRST_LENGTH / max(slowest, 1e-12), h)
    room = PATH_BYTES // (8 * net.num_parameters)
    points = int(np.clip(room, FEWEST_POINTS, MOST_POINTS))
    excess, last = np.full(1, np.nan), net
    for _ in range(ATTEMPTS):
        if h and length / h > MOST_STEPS:
            length = MOST_STEPS * h
        with no_diverged_warning():
            run = simulate(
                clean,
                net,
                mover,
                t1=length,
                save=points,
                observables=watched,
                store_weights=True,
                progress=False,
            )
        excess = run["excess_loss"]
        if not np.all(np.isfinite(excess)):
            raise ValueError(
                f"dynamics: noise-free training from this start diverges at t = {length:.3g}; use "
                "a smaller step size."
            )
        if excess[-1] <= CONVERGED * max(excess[0], CONVERGED):
            return run
        last = run.network(-1)
        if h and length >= MOST_STEPS * h:
            break
        length *= 4.0
    if why := _beyond_edge(clean, last, mover):
        raise ValueError(f"dynamics: noise-free training settles at no minimum, since {why}.")
    raise ValueError(
        f"net: noise-free training has not reached a minimum by t = {length:.3g} (excess loss "
        f"{excess[-1]:.3g}, from {excess[0]:.3g}); it may sit at a saddle, or hidden layers may "
        "be narrower than the rank of the target. Start elsewhere."
    )
