"""What plugs into diffrax works where a user has set strict promotion, for real and complex states.

As diffrax's own solvers do. Linear equations, whose solutions are exponentials.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.solvers import (
    DormandPrince853,
    GridBrownianPath,
    ResumableController,
    SmallNoise,
    Stabilized5,
    Switching,
)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


SOLVERS = {
    "DormandPrince853": DormandPrince853(),
    "Stabilized5": Stabilized5(),
    "Switching": Switching(jnp.asarray(1e-8), jnp.asarray(1e-10)),
    "GaussLegendre": gf.GaussLegendre(),
}
RATES = {
    "real": np.array([-0.5, -1.5]),
    "complex": np.array([-0.5 + 2.0j, -1.5j]),
    "large": np.linspace(-1.0, 0.0, 1200),
}


def end(solver, rates, start, resumable=True):
    """The state at time 1, rounded steps landing on it."""
    rates = jnp.asarray(rates)
    controller = diffrax.PIDController(1e-8, 1e-10)
    if resumable:
        controller = ResumableController(controller, jnp.asarray(0.0))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: {"y": rates * y["y"]}),
        solver,
        t0=0.0,
        t1=1.0,
        dt0=None,
        y0={"y": start * jnp.ones_like(rates)},
        stepsize_controller=controller,
        max_steps=20_000,
    )
    return solution.ys["y"][0]


@pytest.mark.few_cases(1)
@pytest.mark.filterwarnings("ignore:Complex dtype support")
@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("name", ["DormandPrince853", "Stabilized5", "Switching", "GaussLegendre"])
def test_exponentials(name, kind):
    rates = RATES[kind]
    found = end(SOLVERS[name], rates, jnp.asarray(2.0, rates.dtype))
    np.testing.assert_allclose(found, 2.0 * np.exp(rates), rtol=3e-7)


@pytest.mark.filterwarnings("ignore:Complex dtype support")
def test_a_field_of_complex_numbers_need_not_be_holomorphic():
    """z' = -2 Re z - 3i Im z: the two parts decay at rates of their own."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, z, args: jax.lax.complex(-2.0 * z.real, -3.0 * z.imag)),
        gf.GaussLegendre(),
        t0=0.0,
        t1=1.0,
        dt0=0.05,
        y0=jnp.asarray([1.0 + 1.0j]),
    )
    exact = np.exp(-2.0) + 1j * np.exp(-3.0)
    np.testing.assert_allclose(np.asarray(solution.ys)[0], [exact], rtol=1e-7)


@pytest.mark.slow
def test_derivatives_of_the_collocation():
    found = jax.grad(lambda a: end(gf.GaussLegendre(), RATES["real"], a, False).sum())(2.0)
    np.testing.assert_allclose(found, np.exp(RATES["real"]).sum(), rtol=1e-7)


@pytest.mark.parametrize("solver", [SmallNoise()])
def test_the_solvers_of_a_grid(solver):
    """dy = -y dt + s dB with additive noise: the two slopes of each step written out."""
    increments = np.random.default_rng(0).normal(size=(4, 1))
    path = GridBrownianPath(jnp.asarray(increments))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -0.1 * y),
        diffrax.ControlTerm(lambda t, y, args: jnp.full((1, 1), 0.2), path),
    )
    steps = 4 if type(solver) is SmallNoise else 2
    solution = diffrax.diffeqsolve(
        terms, solver, t0=0.0, t1=4.0, dt0=4.0 / steps, y0=jnp.ones(1),
        stepsize_controller=diffrax.ConstantStepSize(),
    )  # fmt: skip
    y = 1.0
    for (b,) in increments:
        f0 = -0.1 * y
        f1 = -0.1 * (y + f0 + 0.2 * b)
        y = y + 0.5 * (f0 + f1) + 0.2 * b
    np.testing.assert_allclose(np.asarray(solution.ys)[0], [y], rtol=1e-13)
