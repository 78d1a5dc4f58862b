"""Gradient flow against SciPy, closed forms and its conservation laws."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import training

import gradflow as gf
from gradflow.backend.types import Scalar, Weights
from gradflow.regularizers import AbstractPenalty

SHAPES = [(3, 2), (2, 3, 2), (3, 2, 2, 1), (2, 3, 1, 3, 2)]
TIMES = np.array([0.0, 0.01, 0.3, 1.0, 1.7, 4.0])


def problem_of(widths: tuple[int, ...], *regularizers: gf.AbstractRegularizer) -> gf.Problem:
    """General covariance, general target, reachable or not."""
    rng = np.random.default_rng(len(widths))
    x = rng.normal(size=(20, widths[0])) @ rng.normal(size=(widths[0],) * 2)
    y = rng.normal(size=(20, widths[-1])) + x[:, :1]
    return gf.Problem(gf.Regression.from_samples(x, y), regularizers)


def network_of(widths: tuple[int, ...]) -> gf.DeepLinear:
    rng = np.random.default_rng(7)
    pairs = zip(widths[1:], widths[:-1], strict=True)
    return gf.DeepLinear([0.7 * rng.normal(size=pair) for pair in pairs])


def moments_of(problem: gf.Problem) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(problem.data.sxx), np.asarray(problem.data.syx)


@functools.cache
def tight_run(widths: tuple[int, ...]) -> gf.Trajectory:
    dynamics = gf.GradientFlow(rtol=1e-10, atol=1e-12)
    return gf.simulate(
        problem_of(widths), network_of(widths), dynamics, t1=4.0, save=TIMES, observables=["loss"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("widths", SHAPES)
def test_agrees_with_scipy(widths: tuple[int, ...]):
    run = tight_run(widths)
    start = reference.as_numpy(run.start[0].weights)
    expected = training.flow(start, *moments_of(run.problem), TIMES)
    np.testing.assert_array_equal(run.time, TIMES)
    for actual, layer in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(actual, layer, rtol=0.0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("widths", SHAPES[1:])
def test_conserves_every_balancedness(widths: tuple[int, ...]):
    for g in training.gram_path(tight_run(widths).weights):
        np.testing.assert_allclose(g, np.broadcast_to(g[0], g.shape), rtol=0.0, atol=1e-10)


@pytest.mark.slow
def test_conservative_flow_conserves_to_rounding_and_agrees():
    widths = SHAPES[2]
    dynamics = gf.GradientFlow(rtol=1e-9, atol=1e-11, conservative=True)
    run = gf.simulate(
        problem_of(widths),
        [network_of(widths), gf.DeepLinear([1.5 * w for w in network_of(widths).weights])],
        dynamics,
        t1=4.0,
        save=TIMES,
        observables=["loss"],
        progress=False,
    )
    for g in training.gram_path(run.weights):
        np.testing.assert_allclose(g, np.broadcast_to(g[:, :1], g.shape), rtol=0.0, atol=1e-13)
    for actual, explicit in zip(run.weights, tight_run(widths).weights, strict=True):
        np.testing.assert_allclose(actual[0], explicit, rtol=0.0, atol=1e-7)


@pytest.mark.slow
def test_what_the_readme_says_of_conservation_from_a_tiny_start():
    """G_i is 1e-23 at the start, and weights of size 1 at the end round to 2e-16 of |W|^2."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3))
    data = gf.Regression.from_samples(x, x @ rng.normal(size=(3, 2)))
    net = gf.DeepLinear([1e-12 * rng.normal(size=(4, 3)), 1e-12 * rng.normal(size=(2, 4))])

    def moved(**settings: bool) -> tuple[float, float]:
        flow = gf.GradientFlow(**settings)
        run = gf.simulate(gf.Problem(data), net, flow, t1=60.0, save=5, progress=False)
        w1, w2 = run.weights
        grams = np.swapaxes(w2, 1, 2) @ w2 - w1 @ np.swapaxes(w1, 1, 2)
        size = float(np.sum(w1[-1] ** 2) + np.sum(w2[-1] ** 2))
        assert size > 1.0
        return float(np.abs(grams - grams[0]).max()) / size, float(flow.rtol)

    by_default, rtol = moved()
    assert 1e-14 < by_default < rtol
    assert moved(conservative=True)[0] < 1e-14
    assert moved(stiff=True)[0] < 1e-14


def test_composes_in_time():
    whole = tight_run(SHAPES[1])
    middle = whole.network(2)
    again = gf.simulate(
        whole.problem,
        middle,
        whole.dynamics,
        t1=TIMES[-1] - TIMES[2],
        save=6,
        observables=["loss"],
    )
    for w, v in zip(whole.weights, again.weights, strict=True):
        np.testing.assert_allclose(w[-1], v[-1], rtol=0.0, atol=1e-9)


def test_values_do_not_depend_on_where_else_the_run_is_saved():
    fixed = {"t1": 4.0, "observables": ["loss"]}
    run = tight_run(SHAPES[1])
    start = run.start[0]
    lin = gf.simulate(run.problem, start, run.dynamics, save=41, **fixed)
    log = gf.simulate(run.problem, start, run.dynamics, save=9, spacing="log", **fixed)
    for at, other in (("lin", lin), ("log", log)):
        common, mine, theirs = np.intersect1d(run.time, other.time, return_indices=True)
        assert common.size >= 2, at
        np.testing.assert_allclose(run["loss"][mine], other["loss"][theirs], rtol=0.0, atol=1e-9)


def scalar_depth_two(w1: float, w2: float, target: float, t: np.ndarray) -> tuple:
    """Theory section 8: z = (w1 + w2)^2 is logistic between the roots z+-; w = (a +- u/a)/2."""
    u = w1**2 - w2**2
    spread = np.sqrt(4 * target**2 + u**2)
    high, low = 2 * target + spread, 2 * target - spread
    z0 = (w1 + w2) ** 2
    ratio = (z0 - high) / (z0 - low) * np.exp(-spread * t)
    z = (high - low * ratio) / (1 - ratio)
    a = np.sign(w1 + w2) * np.sqrt(z)
    return (a + u / a) / 2, (a - u / a) / 2


def scalar_problem(*regularizers: gf.AbstractRegularizer) -> gf.Problem:
    return gf.Problem(gf.Regression.whitened([[1.0]]), regularizers)


def scalar_network(w1: float, w2: float) -> gf.DeepLinear:
    return gf.DeepLinear([[[w1]], [[w2]]])


@pytest.mark.parametrize(
    ("rtol", "tolerance"), [(1e-4, 1e-3), (1e-7, 1e-6), (1e-10, 1e-9), (1e-13, 2e-13)]
)
def test_agrees_with_the_closed_form_to_its_tolerance(rtol: float, tolerance: float):
    dynamics = gf.GradientFlow(rtol=rtol, atol=rtol / 100)
    problem, net = scalar_problem(), scalar_network(2.0, -0.1)
    run = gf.simulate(problem, net, dynamics, t1=5.0, save=11)
    expected = scalar_depth_two(2.0, -0.1, 1.0, run.time)
    for actual, exact in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(actual.ravel(), exact, rtol=0.0, atol=tolerance)


@pytest.mark.slow
def test_weight_decay_shrinks_every_balancedness_at_twice_its_rate():
    widths, rate = (2, 3, 2), 0.3
    problem = problem_of(widths, gf.WeightDecay(rate))
    dynamics = gf.GradientFlow(rtol=1e-10, atol=1e-12)
    run = gf.simulate(problem, network_of(widths), dynamics, t1=4.0, save=TIMES)
    (g,) = training.gram_path(run.weights)
    decay = np.exp(-2 * rate * TIMES)[:, None, None]
    np.testing.assert_allclose(g, g[0] * decay, rtol=0.0, atol=1e-9)
    start = reference.as_numpy(run.start[0].weights)
    expected = training.flow(start, *moments_of(problem), TIMES, decay=rate)
    for actual, layer in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(actual, layer, rtol=0.0, atol=1e-8)


@pytest.mark.slow
def test_input_noise_conserves_balancedness_and_adds_to_the_input_moment():
    widths, std = (2, 3, 2), 0.6
    problem = problem_of(widths, gf.InputNoise(std), gf.LabelNoise(0.5))
    dynamics = gf.GradientFlow(rtol=1e-10, atol=1e-12)
    run = gf.simulate(problem, network_of(widths), dynamics, t1=4.0, save=TIMES)
    for g in training.gram_path(run.weights):
        np.testing.assert_allclose(g, np.broadcast_to(g[0], g.shape), rtol=0.0, atol=1e-9)
    sxx, syx = moments_of(problem)
    start = reference.as_numpy(run.start[0].weights)
    expected = training.flow(start, sxx + std**2 * np.eye(2), syx, TIMES)
    for actual, layer in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(actual, layer, rtol=0.0, atol=1e-8)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    "solver",
    [diffrax.Tsit5(), diffrax.Kvaerno3(), diffrax.KenCarp4()],
    ids=lambda s: type(s).__name__,
)
def test_takes_any_adaptive_solver(solver: diffrax.AbstractSolver):
    dynamics = gf.GradientFlow(rtol=1e-7, atol=1e-9, solver=solver)
    run = gf.simulate(
        scalar_problem(), scalar_network(2.0, 0.1), dynamics, t1=2.0, save=3, observables=["loss"]
    )
    assert not run.diverged
    expected = scalar_depth_two(2.0, 0.1, 1.0, run.time)
    for actual, exact in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(actual.ravel(), exact, rtol=0.0, atol=1e-5)


class Counter(AbstractPenalty):
    """No penalty at all, but it counts how often the vector field is evaluated."""

    calls = 0

    @property
    def is_stochastic(self) -> bool:
        return False

    def penalty(self, weights: Weights) -> Scalar:
        return jnp.zeros(())

    def penalty_gradient(self, weights: Weights) -> Weights:
        jax.debug.callback(self.count)
        return tuple(jnp.zeros_like(w) for w in weights)

    @staticmethod
    def count() -> None:
        Counter.calls += 1


def evaluations(dynamics: gf.GradientFlow, net: gf.DeepLinear, save: int) -> tuple:
    Counter.calls = 0
    problem = scalar_problem(Counter())
    run = gf.simulate(problem, net, dynamics, t1=5.0, save=save, observables=["loss"])
    jax.effects_barrier()
    return Counter.calls, run


@pytest.mark.slow
def test_saving_costs_few_steps():
    dynamics = gf.GradientFlow(rtol=1e-8, atol=1e-10)
    net = scalar_network(20.0, 0.1)
    (few, _), (many, _) = (evaluations(dynamics, net, save) for save in (2, 41))
    problem = scalar_problem()
    plain = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, w, p: tuple(-g for g in p.averaged_gradient(w))),
        diffrax.Dopri8(),
        0.0,
        5.0,
        None,
        net.weights,
        problem,
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-10),
    )
    stages = 14
    steps = int(plain.stats["num_steps"])
    assert steps > 300  # limited by stability: w_1 = 20 makes the curvature 400
    assert few <= stages * (steps + 2)
    assert many - few <= 40 * (stages + 3)  # one cut step and three evaluations a saved time


@pytest.mark.slow
def test_stiff_starts_take_an_implicit_solver():
    net = scalar_network(100.0, 1e-3)
    tolerances = {"rtol": 1e-7, "atol": 1e-9}
    explicit, _ = evaluations(gf.GradientFlow(**tolerances), net, 2)
    implicit, run = evaluations(gf.GradientFlow(**tolerances, stiff=True), net, 2)
    assert explicit > 20_000  # until it has come to rest
    assert implicit < explicit / 10
    start = reference.as_numpy(net.weights)
    one = np.eye(1)
    expected = training.flow(start, one, one, [0.0, 5.0], method="Radau", rtol=1e-10)
    for actual, layer in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(actual[-1], layer[-1], rtol=1e-6)


@pytest.mark.slow
def test_a_start_that_overflows_is_given_up_and_leaves_the_others_alone():
    tame, wild = scalar_network(2.0, -0.1), scalar_network(1e150, 1e150)
    dynamics = gf.GradientFlow(rtol=1e-10, atol=1e-12)
    with pytest.warns(gf.DivergedWarning):
        run = gf.simulate(scalar_problem(), [wild, tame], dynamics, t1=5.0, save=3)
    assert run.diverged.tolist() == [True, False]
    assert np.isnan(run["loss"][0, 1:]).all()
    assert all(np.isnan(w[0, 1:]).all() for w in run.weights)
    expected = scalar_depth_two(2.0, -0.1, 1.0, run.time)
    for actual, exact in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(actual[1].ravel(), exact, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rtol": 0.0}, ValueError, r"GradientFlow.rtol must lie in \(0, 1\); got 0.0"),
        ({"atol": 2.0}, ValueError, r"GradientFlow.atol must lie in \(0, 1\); got 2.0"),
        ({"rtol": float("nan")}, ValueError, "GradientFlow.rtol .* got nan"),
        (
            {"solver": diffrax.Tsit5(), "stiff": True},
            ValueError,
            "stiff=True .* solver=Tsit5 was given; set only one",
        ),
        (
            {"solver": diffrax.Tsit5(), "conservative": True},
            ValueError,
            "conservative=True .* solver=Tsit5 was given; set only one",
        ),
        (
            {"stiff": True, "conservative": True},
            ValueError,
            "conservative=True .* stiff=True was given; set only one",
        ),
        ({"solver": diffrax.Euler()}, TypeError, r"error estimate, such as .*; got Euler"),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        gf.GradientFlow(**arguments)


@pytest.mark.slow
def test_implicit_solvers_keep_a_root_finder_that_was_chosen():
    chosen = diffrax.Kvaerno5(root_finder=diffrax.VeryChord(rtol=1e-9, atol=1e-9))
    assert gf.GradientFlow(solver=chosen).solver is chosen
    assert gf.GradientFlow(solver=diffrax.Kvaerno5()).solver.root_finder != chosen.root_finder
