"""What can be watched along a run."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import scipy.linalg
from scipy.optimize import minimize_scalar

import gradflow as gf
from gradflow.backend.types import Weights
from gradflow.dynamics import SVAG
from gradflow.dynamics.heavy_ball_flow import HeavyBallFlow
from gradflow.dynamics.modified_flow import ModifiedFlow
from gradflow.geometry import flattest_minimum
from gradflow.observables import BUILT_IN, DEFAULT, observe, resolve
from gradflow.regularizers import Dropout, GradientNoise, WeightNoise

INPUT_STD, DECAY = 0.4, 0.05
WIDTHS = (2, 3, 2)


def problem_of(*regularizers: gf.AbstractRegularizer) -> gf.Problem:
    rng = np.random.default_rng(0)
    return gf.Problem(
        gf.Regression.from_samples(rng.normal(size=(8, 2)), rng.normal(size=(8, 2))), regularizers
    )


def ensemble(replicas: int = 3) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(1)
    pairs = list(zip(WIDTHS[1:], WIDTHS[:-1], strict=True))
    return [[0.5 * rng.normal(size=pair) for pair in pairs] for _ in range(replicas)]


def stacked(nets: list[list[np.ndarray]]) -> Weights:
    return tuple(jnp.stack([jnp.asarray(w) for w in ws], -1) for ws in zip(*nets, strict=True))


observe_all = eqx.filter_jit(observe)


def least_sharpness_by_search(target: np.ndarray, s: np.ndarray, depth: int) -> float:
    """The smallest top eigenvalue of a S + (N-1) a^(-1/(N-1)) Q over a grid of a, refined."""
    root = scipy.linalg.sqrtm(s)
    q = root @ target.T @ target @ root

    def top(log_a: float) -> float:
        a = np.exp(log_a)
        return np.linalg.eigvalsh(a * s + (depth - 1) * a ** (-1 / (depth - 1)) * q)[-1]

    grid = np.linspace(-10.0, 10.0, 401)
    best = grid[np.argmin([top(x) for x in grid])]
    bounds = (best - 0.05, best + 0.05)
    return minimize_scalar(top, bounds=bounds, method="bounded", options={"xatol": 1e-13}).fun


def values(
    names: list[str], problem: gf.Problem, dynamics: gf.AbstractDynamics
) -> dict[str, np.ndarray]:
    """Observables of the ensemble, replica axis last."""
    seen = observe_all(resolve(names), stacked(ensemble()), problem, dynamics)
    return {name: np.asarray(value) for name, value in seen.items()}


@pytest.mark.slow
def test_every_path_is_observed_by_itself():
    problem = problem_of(gf.InputNoise(INPUT_STD), gf.WeightDecay(DECAY))
    simple = [
        "loss",
        "averaged_loss",
        "excess_loss",
        "imbalance",
        "squared_norms",
        "balancedness_trace",
        "balancedness_norm",
        "gradient_norm",
        "hessian_trace",
        "sharpness",
        "end_to_end",
        "hessian_block_traces",
        "block_trace_spread",
        "minima_sharpness",
        "sharpness_ratio",
    ]
    seen = values(simple, problem, gf.GradientFlow())
    data = problem.data
    sxx, syx, syy = (np.asarray(m) for m in (data.sxx, data.syx, data.syy))
    noisy = sxx + INPUT_STD**2 * np.eye(2)
    least = syx @ np.linalg.inv(noisy)
    flattest = least_sharpness_by_search(least, noisy, depth=2)
    for r, net in enumerate(ensemble()):
        p = reference.end_to_end(net)
        norms = [np.sum(w**2) for w in net]
        g = reference.balancedness(net)[0]
        hessian = reference.hessian(net, sxx, syx)
        pull = reference.gradient(net, noisy, syx)
        decayed = reference.flatten(pull) + DECAY * reference.flatten(net)
        clean = np.real(reference.loss(net, sxx, syx, syy))
        of_layers = np.split(np.diag(hessian), [net[0].size])
        traces = [np.sum(block) for block in of_layers]
        at_zero_residual = reference.hessian(net, noisy, p @ noisy)
        top = np.linalg.eigvalsh(at_zero_residual)[-1]
        expected: dict[str, Any] = {
            "loss": clean,
            "averaged_loss": clean + 0.5 * INPUT_STD**2 * np.sum(p**2) + 0.5 * DECAY * sum(norms),
            "excess_loss": 0.5 * np.trace((p - least) @ noisy @ (p - least).T),
            "imbalance": abs(norms[1] - norms[0]),
            "squared_norms": norms,
            "balancedness_trace": [np.trace(g)],
            "balancedness_norm": [np.linalg.norm(g)],
            "gradient_norm": np.linalg.norm(decayed),
            "hessian_trace": np.trace(hessian),
            "sharpness": np.linalg.eigvalsh(hessian)[-1],
            "end_to_end": p,
            "hessian_block_traces": traces,
            "block_trace_spread": max(traces) / min(traces) - 1,
            "minima_sharpness": top,
            "sharpness_ratio": top / flattest,
        }
        for name in simple:
            np.testing.assert_allclose(seen[name][..., r], expected[name], rtol=1e-10, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 2])
def test_the_sharpness_ratio_of_the_flattest_minimum_is_one(rank: int):
    """Also where the second moment of the inputs is singular."""
    rng = np.random.default_rng(3)
    factor = rng.normal(size=(3, rank))
    data = gf.Regression.from_moments(factor @ factor.T, rng.normal(size=(2, rank)) @ factor.T)
    for depth in (2, 3):
        widths = (3, *[3] * (depth - 1), 2)
        found = flattest_minimum(data, widths)
        layers = tuple(w[..., None] for w in found.net.weights)
        seen = observe_all(
            resolve(["sharpness_ratio"]), layers, gf.Problem(data), gf.GradientFlow()
        )
        assert seen["sharpness_ratio"].item() == pytest.approx(1.0, abs=1e-10)


def scalar(
    name: str,
    weights: tuple[float, float],
    dynamics: gf.AbstractDynamics,
    *regularizers: gf.AbstractRegularizer,
) -> float:
    problem = gf.Problem(gf.Regression.whitened([[1.5]]), regularizers)
    layers = tuple(jnp.full((1, 1, 1), w) for w in weights)
    return observe_all(resolve([name]), layers, problem, dynamics)[name].item()


S, H, BETA = 0.3, 0.2, 0.5
W1, W2 = 1.5, 1.0  # a minimum of T = 1.5, curvature 1.5^2 + 1^2
CURVATURE = W1**2 + W2**2


@pytest.mark.parametrize(
    ("dynamics", "expected"),
    [
        (gf.GradientDescent(H), H * S**2 / 2 * CURVATURE / (2 - H * CURVATURE)),
        (
            gf.GradientDescent(H, BETA),
            (H * S**2 / 2 * CURVATURE * (1 + BETA))
            / ((1 - BETA) * (2 * (1 + BETA) - H * CURVATURE)),
        ),
        (gf.StochasticFlow(H), H * S**2 / 4 * CURVATURE),
        (
            gf.StochasticFlow(H, order=2),
            H * S**2 / 4 * CURVATURE / (1 + H * CURVATURE / 2),
        ),
        (SVAG(H, 4), H * S**2 / 2 * CURVATURE / (2 - H / 4 * CURVATURE)),
        (gf.GradientFlow(), 0.0),
        (ModifiedFlow(H), 0.0),
    ],
    ids=["descent", "momentum", "stochastic flow", "order 2", "SVAG", "flow", "modified flow"],
)
def test_the_loss_floor_is_that_of_the_dynamics(dynamics: gf.AbstractDynamics, expected: float):
    """Label noise at a minimum (theory section 9); heavy ball by its stationary covariance (7b)."""
    seen = scalar("loss_floor", (W1, W2), dynamics, gf.LabelNoise(S))
    assert seen == pytest.approx(expected, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize(
    ("dynamics", "factor"),
    [(gf.GradientDescent(H), 1.0), (gf.StochasticFlow(H), 1.0), (gf.GradientFlow(), 0.0)],
    ids=["descent", "stochastic flow", "flow"],
)
def test_the_imbalance_drift_is_that_of_the_dynamics(dynamics: gf.AbstractDynamics, factor: float):
    """At a minimum the mean gradient is zero: dD/dt = -h s^2 D - 2 lambda D."""
    penalties = gf.LabelNoise(S), gf.WeightDecay(0.0)
    imbalance = W1**2 - W2**2
    seen = scalar("imbalance_drift", (W1, W2), dynamics, *penalties)
    assert seen == pytest.approx(-factor * H * S**2 * imbalance, rel=1e-10, abs=1e-15)
    seen = scalar("imbalance_drift", (W1, W2), gf.GradientFlow(), gf.WeightDecay(0.1))
    assert seen == pytest.approx(-0.2 * imbalance, rel=1e-12)


def test_away_from_a_minimum_descent_drifts_by_its_mean_gradient_too():
    """u+ = u (1 - h^2 r^2) per step without noise, so dD/dt = -h r^2 D."""
    imbalance, residual = 4.0 - 0.25, 2.0 * 0.5 - 1.5
    seen = scalar("imbalance_drift", (2.0, 0.5), gf.GradientDescent(H))
    assert seen == pytest.approx(-H * residual**2 * imbalance, rel=1e-12)
    seen = scalar("imbalance_drift", (2.0, 0.5), gf.StochasticFlow(H), gf.LabelNoise(S))
    assert seen == pytest.approx(-H * S**2 * imbalance, rel=1e-12)


def test_weight_decay_slaves_the_residual():
    """r = -2 lambda p / (w_1^2 + w_2^2) (theory section 4)."""
    slaved = -2 * DECAY * 1.5 / CURVATURE
    seen = scalar("slaved_residual", (W1, W2), gf.GradientFlow(), gf.WeightDecay(DECAY))
    assert seen == pytest.approx(abs(slaved), rel=1e-10)
    seen = scalar("slaved_deviation", (W1, W2), gf.GradientFlow(), gf.WeightDecay(DECAY))
    assert seen == pytest.approx(abs(slaved), rel=1e-10)  # M = 0 at the minimum of the loss
    seen = scalar("loss_floor", (W1, W2), gf.GradientFlow(), gf.WeightDecay(DECAY))
    assert seen == pytest.approx(slaved**2 / 2, rel=1e-10)


def test_the_loss_floor_and_drift_of_gradient_noise():
    """(h s^2 / 2) / (2 - h mu), and no drift where all widths are equal."""
    noise = GradientNoise(S)
    seen = scalar("loss_floor", (W1, W2), gf.GradientDescent(H), noise)
    assert seen == pytest.approx(H * S**2 / 2 / (2 - H * CURVATURE), rel=1e-10)
    seen = scalar("imbalance_drift", (W1, W2), gf.GradientDescent(H), noise)
    assert seen == pytest.approx(0.0, abs=1e-14)


def test_flows_drift_by_what_moves_them():
    """Weight noise: dD/dt = -2 s^2 D; the modified flow: -h r^2 D; dropout conserves D."""
    at, imbalance, residual = (2.0, 0.5), 4.0 - 0.25, 2.0 * 0.5 - 1.5
    seen = scalar("imbalance_drift", at, gf.GradientFlow(), WeightNoise(S))
    assert seen == pytest.approx(-2 * S**2 * imbalance, rel=1e-12)
    seen = scalar("imbalance_drift", at, gf.GradientFlow(), Dropout(0.3))
    assert seen == pytest.approx(0.0, abs=1e-14)
    for dynamics in (ModifiedFlow(H), gf.StochasticFlow(H, order=2)):
        seen = scalar("imbalance_drift", at, dynamics)
        assert seen == pytest.approx(-H * residual**2 * imbalance, rel=1e-10)
    seen = scalar("imbalance_drift", at, SVAG(H, 4), gf.LabelNoise(S))
    assert seen == pytest.approx(-H * (residual**2 / 4 + S**2) * imbalance, rel=1e-10)


NESTEROV = gf.GradientDescent(H, BETA, nesterov=True)
SCHEDULE = gf.GradientDescent(lambda k: 0.1 / (1 + k))
ADAM = gf.GradientDescent(H, optimizer=optax.adam)
DECOUPLED = gf.GradientDescent(H, BETA, decay="decoupled")


@pytest.mark.parametrize(
    ("name", "dynamics", "message"),
    [
        ("imbalance_drift", gf.GradientDescent(H, BETA), "momentum; .* momentum=0.0"),
        ("imbalance_drift", SCHEDULE, "a schedule of step sizes; .* a constant step_size"),
        ("imbalance_drift", ADAM, "an optimizer; .* optimizer=None"),
        ("loss_floor", NESTEROV, "Nesterov momentum; .* nesterov=False"),
        ("loss_floor", SCHEDULE, "a schedule of step sizes; .* a constant step_size"),
        ("loss_floor", ADAM, "an optimizer; leave it out"),
        ("loss_floor", DECOUPLED, "momentum and decoupled decay; leave it out"),
        ("slaved_residual", ADAM, "an optimizer; leave it out"),
        ("slaved_deviation", DECOUPLED, "momentum and decoupled decay; leave it out"),
        ("slaved_deviation", HeavyBallFlow(H, BETA, decay="decoupled"), "momentum and decoupled"),
    ],
)
def test_formulas_are_not_offered_where_they_do_not_hold(name: str, dynamics: Any, message: str):
    with pytest.raises(ValueError, match=rf"observables: {name} .* does not hold with {message}"):
        scalar(name, (W1, W2), dynamics, gf.LabelNoise(S), gf.WeightDecay(DECAY))


def test_flows_with_a_memory_have_no_formula_of_the_drift():
    with pytest.raises(ValueError, match=r"no imbalance_drift for HeavyBallFlow; leave them out"):
        scalar("imbalance_drift", (W1, W2), HeavyBallFlow(H, BETA))


@pytest.mark.parametrize("name", ["loss_floor", "slaved_residual", "slaved_deviation"])
def test_noise_inside_the_network_has_no_floor(name: str):
    with pytest.raises(ValueError, match=r" covers noise on the data and the gradient, not Drop"):
        scalar(name, (W1, W2), gf.GradientFlow(), Dropout(0.1))
    with pytest.raises(ValueError, match=r"imbalance_drift covers .* not Dropout"):
        scalar("imbalance_drift", (W1, W2), gf.GradientDescent(H), Dropout(0.1))


def test_the_drift_of_momentum_is_not_offered():
    with pytest.raises(ValueError, match=r"imbalance_drift .* does not hold with momentum"):
        scalar("imbalance_drift", (W1, W2), gf.GradientDescent(H, BETA), gf.LabelNoise(S))


# Specifications


def test_the_default_and_names_and_objects():
    assert tuple(o.name for o in resolve(None)) == DEFAULT
    assert resolve(["imbalance", BUILT_IN["loss"]]) == (BUILT_IN["imbalance"], BUILT_IN["loss"])
    assert resolve([]) == ()
    for name, observable in BUILT_IN.items():
        assert observable.name == name
        assert observable.long_name
        assert observable.units


def test_functions_keep_their_identity():
    """The same function gives the same observable, so that a second run does not compile."""

    def total(net: gf.DeepLinear, problem: gf.Problem) -> Any:
        return net.end_to_end.sum()

    first, second = resolve({"total": total}), resolve({"total": total, "loss": None})
    assert first[0] == second[0]
    assert second[1] is BUILT_IN["loss"]
    assert (first[0].name, first[0].long_name, first[0].units) == ("total", "total", "1")
    mine = gf.Observable("mine", "my total", "target/input", first[0].evaluate)
    assert resolve([mine, "loss"]) == (mine, BUILT_IN["loss"])


def zero(net: gf.DeepLinear, problem: gf.Problem) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["los"], "'los' is not known; choose from loss, averaged_loss, .* a mapping"),
        ({"los": None}, "'los' is not known"),
        (["loss", "imbalance", "loss"], "loss asked for more than once"),
        ({"loss": zero}, "'loss' is built in; give your own another name"),
        ({"W1": zero}, "'W1' is taken by the trajectory"),
        ({"time": zero}, "'time' is taken by the trajectory"),
        ({"diverged_at": zero}, "'diverged_at' is taken"),
        ({"data_x": zero}, "'data_x' is taken"),
        ({"start_W1": zero}, "'start_W1' is taken"),
    ],
)
def test_refuses_names_that_make_no_sense(spec: Any, message: str):
    with pytest.raises(ValueError, match=message):
        resolve(spec)


def test_names_that_only_look_like_layers_are_free():
    assert resolve({"W_total": zero})[0].name == "W_total"


def as_float(net: gf.DeepLinear, problem: gf.Problem) -> Any:
    return float(net.end_to_end[0, 0])


def of_numpy(net: gf.DeepLinear, problem: gf.Problem) -> Any:
    return np.linalg.norm(np.asarray(net.end_to_end))


def with_if(net: gf.DeepLinear, problem: gf.Problem) -> Any:
    return net.end_to_end if net.end_to_end[0, 0] > 0 else 0.0


def of_three(net: gf.DeepLinear, problem: gf.Problem, dynamics: Any) -> Any:
    return 0.0


def nothing(net: gf.DeepLinear, problem: gf.Problem) -> Any:
    return None


def text(net: gf.DeepLinear, problem: gf.Problem) -> Any:
    return "loss"


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (as_float, "ConcretizationTypeError"),
        (of_numpy, "TracerArrayConversionError"),
        (with_if, "TracerBoolConversionError"),
        (of_three, "TypeError: .*missing 1 required positional argument"),
        (nothing, "(TypeError|ValueError)"),
        (text, "TypeError"),
    ],
)
@pytest.mark.parametrize("as_object", [False, True])
def test_an_observable_that_fails_is_named(function: Any, cause: str, as_object: bool):
    problem, net = gf.Problem(gf.Regression.whitened([[1.0]])), gf.DeepLinear([[[2.0]], [[0.1]]])
    own: Any = {"loss": None, "mine": function}
    if as_object:
        own = ["loss", gf.Observable("mine", "mine", "1", lambda n, p, d: function(n, p))]
    message = rf"^observables: 'mine' failed \({cause}.*\); .* write it in jax.numpy"
    with pytest.raises(TypeError, match=message) as caught:
        gf.simulate(problem, net, gf.GradientDescent(0.1), steps=2, observables=own)
    assert "\n" not in str(caught.value)


def test_own_numbers_of_every_kind_are_real_numbers():
    problem, net = gf.Problem(gf.Regression.whitened([[1.0]])), gf.DeepLinear([[[2.0]], [[0.1]]])
    own = {
        "truth": lambda n, p: n.end_to_end[0, 0] > 0.0,
        "count": lambda n, p: 3,
        "constant": lambda n, p: np.array([1.0, 2.0]),
    }
    run = gf.simulate(problem, net, gf.GradientDescent(0.1), steps=2, observables=own)
    for name, value in (("truth", 1.0), ("count", 3.0), ("constant", [1.0, 2.0])):
        np.testing.assert_array_equal(run[name], np.broadcast_to(value, run[name].shape))
        assert run[name].dtype == np.float64
