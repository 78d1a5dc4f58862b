"""Drift and noise of the stochastic modified equations, as diffrax takes them."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from gradflow.backend.products import product
from gradflow.backend.types import EndToEnd, Scalar, Weights
from gradflow.dynamics.base import is_alive, over_paths
from gradflow.dynamics.layers import added
from gradflow.dynamics.modified_flow import modified_drift
from gradflow.loss import pull_back
from gradflow.network import end_to_end, widths_of
from gradflow.problem import Problem
from gradflow.solvers.grid_path import GridBrownianPath


class StochasticGradientTerm(diffrax.AbstractTerm):
    r"""Drift and noise of order 1 of an ensemble in one pull-back, on a unit grid.

    Both enter through the end-to-end gradient, so one increment is

    $$\Delta W_i = -A_i^\top \left( \bar M\, \Delta t + \sqrt{h \Delta t}\, Z(\zeta) \right)
      B_i^\top - \lambda W_i \Delta t - \sqrt{h \Delta t}\, \Gamma_i(\zeta'),$$

    with $Z$ the end-to-end diffusion factor applied to normals and $\Gamma$ the noise on the
    gradient itself: a stochastic step costs what a deterministic one does. A diffrax `MultiTerm`
    would form the products of the layers twice. For Euler-Maruyama only.
    """

    problem: Problem
    path: GridBrownianPath
    dt: Scalar
    step_size: Scalar
    limit: Array

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The normals of the grid step that starts at `t0`."""
        return self.path.evaluate(t0, t1)

    def vf(self, t: Any, y: Weights, args: Any) -> Weights:
        """The state at which drift and diffusion are taken."""
        return y

    def prod(self, vf: Weights, control: Any) -> Weights:
        """The increment of every path over one grid step."""
        moved = over_paths(self._increment)(vf, control)
        alive = is_alive(added(vf, moved), self.limit)
        return tuple(jnp.where(alive, m, jnp.nan) for m in moved)

    def _increment(self, weights: Weights, normals: Any) -> Weights:
        of_data, of_gradient = normals
        std = jnp.sqrt(self.step_size * self.dt)
        moment = self.problem.input_moment
        mean: EndToEnd = product(end_to_end(weights), moment) - self.problem.data.syx
        noise = self.problem.end_to_end_increment(weights, of_data)
        rest = self.problem.add_penalties(tuple(jnp.zeros_like(w) for w in weights), weights)
        moved = tuple(
            -g - self.dt * d
            for g, d in zip(pull_back(weights, mean * self.dt + std * noise), rest, strict=True)
        )
        if of_gradient:
            extra = self.problem.gradient_noise(of_gradient)
            moved = tuple(m - std * e for m, e in zip(moved, extra, strict=True))
        return moved


class ClosedNoiseTerm(diffrax.AbstractTerm):
    r"""$-\sqrt{h \Delta t}\, B(W)\, \zeta$ of an ensemble, through the closed diffusion factor."""

    problem: Problem
    path: GridBrownianPath
    scale: Scalar

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The normals of the grid step that starts at `t0`, with what Levy areas there are."""
        return self.path.evaluate(t0, t1, **kwargs)

    def vf(self, t: Any, y: Weights, args: Any) -> tuple[Array, ...]:
        """The columns of the factor, `(channels, d_i, d_{i-1}, R)` a layer."""
        widths = widths_of(y)

        def columns(weights: Weights) -> tuple[Array, ...]:
            shapes = self.problem.normal_shapes(widths)
            if not jax.tree.leaves(shapes):
                return tuple(jnp.zeros((0, *w.shape), w.dtype) for w in weights)
            return jax.vmap(self.problem.noise, in_axes=(None, 0))(weights, _units(shapes))

        return tuple(-self.scale * c for c in over_paths(columns)(y))

    def prod(self, vf: tuple[Array, ...], control: Any) -> Weights:
        """Columns times normals."""
        nothing = jnp.zeros((0, vf[0].shape[-1]), vf[0].dtype)
        leaves = [leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(control)]
        flat = jnp.concatenate([nothing, *leaves])
        return tuple(jnp.einsum("cijr,cr->ijr", columns, flat) for columns in vf)

    def vf_prod(self, t: Any, y: Weights, args: Any, control: Any) -> Weights:
        """The same without forming the columns."""
        noise = over_paths(self.problem.noise)(y, control)
        return tuple(-self.scale * b for b in noise)

    def is_vf_expensive(self, t0: Any, t1: Any, y: Weights, args: Any) -> bool:
        """True: one column costs as much as the product."""
        return True


class SampledNoiseTerm(diffrax.AbstractTerm):
    r"""$-\sqrt{h \Delta t}\, (\tilde g(W) - \nabla \bar L(W))$ of an ensemble, a draw a grid step.

    Only for solvers that ask for the product of field and increment and nothing else, such as
    `diffrax.Euler` and `SmallNoise`.
    """

    problem: Problem
    path: GridBrownianPath
    scale: Scalar

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The draw of the grid step that starts at `t0`."""
        return self.path.evaluate(t0, t1)

    def vf(self, t: Any, y: Weights, args: Any) -> Weights:
        """The state at which the gradient is sampled."""
        return y

    def prod(self, vf: Weights, control: Any) -> Weights:
        """The centred sampled gradient of every path, scaled."""
        centred = over_paths(self.problem.centred_gradient)(vf, control)
        return tuple(-self.scale * c for c in centred)


def drift_term(
    problem: Problem,
    limit: Float[Array, " paths"],
    dt: Scalar,
    step_size: Scalar,
    order: int,
    stratonovich: bool,
) -> diffrax.ODETerm:
    """The drift of an ensemble on a unit grid; NaN for a path that has diverged."""

    def drift(weights: Weights) -> Weights:
        a = modified_drift(problem, weights, step_size, order)
        if stratonovich:
            shift = stratonovich_shift(problem, weights)
            a = tuple(v - step_size * s for v, s in zip(a, shift, strict=True))
        return a

    def field(t: Any, weights: Weights, args: Any) -> Weights:
        del t, args
        scale = jnp.where(is_alive(weights, limit), dt, jnp.nan)
        return tuple(scale * v for v in over_paths(drift)(weights))

    return diffrax.ODETerm(field)


def stratonovich_shift(problem: Problem, weights: Weights) -> Weights:
    r"""$\tfrac12 \sum_c D b_c[b_c]$ over the columns $b_c(W)$ of the diffusion factor.

    Ito noise $b_c\,dB_c$ is Stratonovich noise with this taken from the drift. Columns of noise on
    the gradient itself do not depend on the weights and have no part in it.
    """
    of_data, _ = problem.normal_shapes(widths_of(weights))
    if not jax.tree.leaves(of_data):
        return tuple(jnp.zeros_like(w) for w in weights)

    def of_column(unit: Any) -> Weights:
        def column(at: Weights) -> Weights:
            return pull_back(at, problem.end_to_end_increment(at, unit))

        return jax.jvp(column, (weights,), (column(weights),))[1]

    return tuple(0.5 * jnp.sum(c, axis=0) for c in jax.vmap(of_column)(_units(of_data)))


def _units(shapes: Any) -> Any:
    """All unit vectors of a pytree of shapes, stacked along a new first axis."""
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    flat, unravel = ravel_pytree(zeros)
    return jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))
