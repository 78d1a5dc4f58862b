"""The slow flow against closed forms, SciPy and NumPy; where it starts and where it ends."""

import itertools
import json
import warnings

import equinox as eqx
import jax
import numpy as np
import pytest
import reference
import training
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.dynamics.slow_flow import EdgeOfStabilityWarning, SlowFlow
from gradflow.results.serialize import check_rebuilds, describe, rebuild_dynamics

WHITE = gf.Regression.whitened(target=[[1.0]])
CHAIN = gf.DeepLinear([[[1.5]], [[1 / 1.5]]])


def label(std=0.5, data=WHITE):
    return gf.Problem(data, [gf.LabelNoise(std)])


def traces(run):
    """tr G_1 at the saved times."""
    return run["balancedness_trace"][..., 0]


def run(problem, net, dynamics, t1, save=9, **options):
    watch = ["balancedness_trace", "end_to_end", "squared_norms"]
    return gf.simulate(problem, net, dynamics, t1=t1, save=save, observables=watch, **options)


# Closed forms


@pytest.mark.slow
@pytest.mark.parametrize(("finite_step", "momentum"), [(True, 0.0), (True, 0.9), (False, 0.9)])
def test_scalar_depth_two_follows_its_closed_form(finite_step, momentum):
    """du/dt = -h v u 2(1+b)/((1-b)^2 (2(1+b) - h lam(u))), lam = sqrt(u^2 + 4), by SciPy."""
    h, v = 0.7, 0.25
    edge = 2.0 * (1.0 + momentum)

    def rate(t, u):
        lam = np.sqrt(u * u + 4.0) if finite_step else 0.0
        return -h * v * u * edge / ((1.0 - momentum) ** 2 * (edge - h * lam))

    t1 = 8.0 * (1.0 - momentum) ** 2
    u0 = 1.5**2 - 1.5**-2
    got = run(label(), CHAIN, SlowFlow(h, finite_step, momentum), t1)
    expected = solve_ivp(rate, (0, t1), [u0], t_eval=got.time, rtol=1e-12, atol=1e-13).y[0]
    np.testing.assert_allclose(-traces(got), expected, rtol=0.0, atol=1e-8)
    np.testing.assert_allclose(got["end_to_end"], 1.0, rtol=0.0, atol=1e-14)


@pytest.mark.slow
def test_scalar_chains_follow_theirs_in_the_classical_limit():
    """a_i' = T^2 (1/a_i - sum a^-2 / sum a^-1) in the time h v t."""
    h, v, target = 0.1, 0.25, 1.7
    start = np.array([0.6, 1.4, 0.9, 1.2])
    start[-1] *= target / np.prod(start)
    data = gf.Regression.whitened(target=[[target]])

    def field(t, a):
        return h * v * target**2 * (1.0 / a - np.sum(a**-2) / np.sum(1.0 / a))

    got = run(label(data=data), gf.DeepLinear([[[w]] for w in start]), SlowFlow(h, False), 20.0)
    a = solve_ivp(field, (0, 20.0), start**2, t_eval=got.time, rtol=1e-12, atol=1e-13).y.T
    assert np.max(np.abs(a[-1] - a[0])) > 0.3
    np.testing.assert_allclose(got["squared_norms"], a, rtol=0.0, atol=1e-7)


@pytest.mark.slow
def test_whitened_square_depth_two_decays_exponentially():
    """G = G_0 exp(-d c h s^2 t / n) in the classical limit, whatever the target."""
    rng = np.random.default_rng(1)
    d, c, n, s, h = 2, 1.5, 3.0, 0.4, 0.2
    layers = [rng.standard_normal((3, d)), rng.standard_normal((d, 3))]
    syx = c * layers[1] @ layers[0]
    data = gf.Regression.from_moments(c * np.eye(d), syx, syx @ syx.T / c, n=n)
    got = gf.simulate(label(s, data), gf.DeepLinear(layers), SlowFlow(h, False), t1=60.0, save=7)
    (g,) = training.gram_path(got.weights)
    decayed = np.exp(-d * c * h * s**2 / n * got.time)[:, None, None] * g[0]
    assert decayed[-1].max() < 0.6 * g[0].max()
    np.testing.assert_allclose(g, decayed, rtol=0.0, atol=1e-7)
    p = got.weights[1] @ got.weights[0]
    np.testing.assert_allclose(p, np.broadcast_to(p[0], p.shape), rtol=0.0, atol=1e-13)


def test_label_noise_ends_where_block_traces_are_equal():
    """Widths 1-2-3, whitened: |W_2|^2 / |W_1|^2 -> d_2 / d_0 = 3, not 1."""
    rng = np.random.default_rng(2)
    layers = [rng.standard_normal((2, 1)), rng.standard_normal((3, 2))]
    data = gf.Regression.whitened(target=layers[1] @ layers[0])
    watch = {"blocks": lambda net, problem: gf.hessian_block_traces(net, problem.data)}
    got = gf.simulate(
        label(data=data),
        gf.DeepLinear(layers),
        SlowFlow(0.1, False),
        t1=2_000.0,
        save=3,
        observables={"squared_norms": None, "end_to_end": None, **watch},
    )
    norms, blocks = got["squared_norms"], got["blocks"]
    assert abs(norms[0, 1] / norms[0, 0] - 3.0) > 0.5
    assert norms[-1, 1] / norms[-1, 0] == pytest.approx(3.0, abs=1e-6)
    assert blocks[-1, 1] / blocks[-1, 0] == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(got["end_to_end"][-1], got["end_to_end"][0], rtol=0.0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("momentum", "decay", "factor"),
    [(0.75, "coupled", 4.0), (0.75, "decoupled", 1.0)],
)
def test_weight_decay_shrinks_the_balancedness(momentum, decay, factor):
    """G = G_0 exp(-2 lam t / (1 - b)); decoupled decay does not pass through the velocity."""
    rng = np.random.default_rng(3)
    layers = [rng.standard_normal((2, 2)) for _ in range(3)]
    x = rng.standard_normal((12, 2))
    data = gf.Regression.from_samples(x, x @ reference.end_to_end(layers).T)
    problem = gf.Problem(data, [gf.WeightDecay(0.02)])
    dynamics = SlowFlow(0.01, momentum=momentum, decay=decay)
    got = gf.simulate(problem, gf.DeepLinear(layers), dynamics, t1=20.0, save=5)
    decayed = np.exp(-2.0 * 0.02 * factor * got.time)[:, None, None]
    for g in training.gram_path(got.weights):
        np.testing.assert_allclose(g, decayed * g[0], rtol=0.0, atol=1e-7)


# Where it starts


@pytest.mark.slow
def test_it_starts_where_heavy_ball_descent_arrives():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((20, 2)), rng.standard_normal((20, 2))
    problem = label(0.1, gf.Regression.from_samples(x, y))
    layers = [rng.standard_normal((3, 2)), rng.standard_normal((2, 3))]
    sxx, syx = x.T @ x / 20, y.T @ x / 20
    h, beta = 0.05, 0.8
    path = training.descend(layers, lambda w, k: reference.gradient(w, sxx, syx), h, 2_000, beta)
    net = gf.DeepLinear(layers)
    got = gf.simulate(problem, net, SlowFlow(h, momentum=beta), t1=1e-3, save=2)
    arrived = [w[0] for w in got.weights]
    reference.assert_close(arrived, [w[-1] for w in path], 1.0, 1e-9)
    assert (
        np.abs(reference.balancedness(arrived)[0] - reference.balancedness(layers)[0]).max() > 0.01
    )
    # Gradient flow, that of the classical limit, keeps G.
    limit = gf.simulate(problem, net, SlowFlow(h, False, beta), t1=1e-3, save=2)
    (g,) = training.gram_path(limit.weights)
    np.testing.assert_allclose(g[0], reference.balancedness(layers)[0], rtol=0.0, atol=1e-9)


@pytest.mark.slow
def test_replicas_and_several_starts_are_single_runs_side_by_side():
    nets = [CHAIN, gf.DeepLinear([[[0.4]], [[2.0]]]), CHAIN]
    dynamics = SlowFlow(0.3)
    together = run(label(), nets, dynamics, 5.0)
    assert np.array_equal(traces(together)[0], traces(together)[2])
    for path in (0, 1):
        alone = run(label(), nets[path], dynamics, 5.0)
        np.testing.assert_allclose(traces(together)[path], traces(alone), rtol=0.0, atol=1e-9)
    copies = run(label(), CHAIN, dynamics, 5.0, replicas=2)
    np.testing.assert_allclose(traces(copies)[1], traces(together)[0], rtol=0.0, atol=1e-9)


@pytest.mark.slow
def test_length_in_steps_is_flow_time():
    by_steps = gf.simulate(label(), CHAIN, SlowFlow(0.25), steps=40, save=3)
    assert by_steps.time[-1] == pytest.approx(10.0)


@pytest.mark.slow
def test_a_start_beyond_the_edge_of_stability_is_an_error():
    lam = 1.5**2 + 1.5**-2
    with pytest.raises(ValueError, match=r"h lam_max = 2\.2.*edge of stability at 2.*0\.7423"):
        run(label(), CHAIN, SlowFlow(2.2 / lam), 1.0)
    with pytest.raises(ValueError, match=r"at 3\.8"):
        run(label(), CHAIN, SlowFlow(3.9 / lam, momentum=0.9), 1.0)
    off = gf.DeepLinear([[[1.5]], [[0.6]]])
    with pytest.raises(ValueError, match=r"optimization phase.*largest step size is 0\.7"):
        run(label(), off, SlowFlow(4.0 / lam), 1.0)
    with pytest.warns(EdgeOfStabilityWarning, match="h lam_max = 1.96"):
        run(label(), CHAIN, SlowFlow(1.96 / lam), 0.1)
    run(label(), CHAIN, SlowFlow(2.2 / lam, finite_step=False), 1.0)


@pytest.mark.slow
def test_noise_that_grows_with_its_fluctuation_ends_the_theory_earlier():
    """Online SGD, batch 1, x ~ N(0, 1): r -> r (1 - h lam x^2), stable for 3 h lam < 2 only."""
    data = gf.Regression.from_moments([[1.0]], [[1.0]], [[1.0]])
    problem = gf.Problem(data, [gf.Minibatch(1), gf.LabelNoise(0.1)])
    lam = 1.5**2 + 1.5**-2
    run(problem, CHAIN, SlowFlow(0.6 / lam), 0.1)
    with pytest.raises(ValueError, match=r"no stationary fluctuation.*0\.2474"):
        assert 2.0 / 3.0 / lam == pytest.approx(0.2474, abs=1e-4)
        run(problem, CHAIN, SlowFlow(0.8 / lam), 0.1)


def fitted(x, target):
    """Rows y = T x, batches of one of them, and the balanced network that fits them."""
    rows = np.asarray(x)[:, None]
    data = gf.Regression.from_samples(rows, target * rows)
    net = gf.DeepLinear([[[np.sqrt(target)]], [[np.sqrt(target)]]])
    return gf.Problem(data, [gf.Minibatch(1, replacement=True)]), net


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x", "target", "limit"),
    [([0.5, 1.0, 1.5, 2.0], 1.0, "0.339"), ([0.3, 0.8, 1.1, 1.9], 1.2, "0.3101")],
)
def test_stability_needs_no_noise_to_show(x, target, limit):
    """Data that are fitted exactly, or up to rounding: stable up to 2 S / (a Q), Q = E x^4."""
    problem, net = fitted(x, target)
    x2 = np.square(x)
    largest = 2.0 * x2.mean() / (2.0 * target * np.mean(x2**2))
    assert f"{largest:.4g}" == limit
    got = run(problem, net, SlowFlow(0.9 * largest), 1.0)
    np.testing.assert_allclose(traces(got), 0.0, rtol=0.0, atol=1e-12)
    with pytest.raises(ValueError, match=f"no stationary fluctuation.*is {limit};"):
        run(problem, net, SlowFlow(1.3 * largest), 1.0)
    with pytest.warns(EdgeOfStabilityWarning, match="within 5 %"):
        run(problem, net, SlowFlow(0.97 * largest), 1.0)


@pytest.mark.slow
def test_starts_that_reach_no_minimum_are_errors():
    with pytest.raises(ValueError, match=r"optimization phase.*plateau"):
        run(label(), gf.DeepLinear([[[0.0]], [[0.0]]]), SlowFlow(0.1), 1.0)
    with pytest.raises(ValueError, match=r"optimization phase.*diverges"):
        run(label(), gf.DeepLinear([[[9.0]], [[9.0]]]), SlowFlow(0.5), 1.0)
    low = gf.Regression.whitened(target=[[1.0, 0.0], [0.0, 0.0]])
    idle = gf.DeepLinear([np.diag([1.0, 0.0]), np.diag([1.0, 0.0])])
    with pytest.raises(ValueError, match="singular point"):
        run(label(data=low), idle, SlowFlow(0.1), 1.0)


# Where it ends


def sharpening():
    """Weight decay that takes a network from its flattest minimum to one of less norm."""
    sxx = np.diag([1.0, 0.05])
    p = np.array([[0.3, 2.0]])
    root = np.sqrt(sxx)
    alphas = np.geomspace(0.1, 30.0, 400)
    lams = [np.linalg.eigvalsh(root @ (a * np.eye(2) + p.T @ p / a) @ root)[-1] for a in alphas]
    a = alphas[np.argmin(lams)]
    scale = np.sqrt(a)
    layers = [p / scale, np.array([[scale]])]
    balanced = np.linalg.norm(p)
    end = np.linalg.eigvalsh(root @ (balanced * np.eye(2) + p.T @ p / balanced) @ root)[-1]
    data = gf.Regression.from_moments(sxx, p @ sxx, p @ sxx @ p.T)
    return gf.Problem(data, [gf.WeightDecay(0.1)]), gf.DeepLinear(layers), min(lams), end


@pytest.mark.slow
def test_a_path_that_gets_to_the_edge_stops_there_and_says_so():
    problem, net, low, high = sharpening()
    assert high > 1.1 * low
    h = 2.0 / (0.6 * low + 0.4 * high)
    with pytest.warns(RuntimeWarning, match="edge of stability") as caught:
        got = run(problem, net, SlowFlow(h), 40.0)
    assert got.diverged
    said = str(caught[0].message)
    when = float(said.split("t = ")[2].split(",")[0])
    # |W_2|^2 - |W_1|^2 = u e^{-2 lam t}, and lam_max along it is known.
    u0 = -np.diff([float(np.sum(np.square(w))) for w in net.weights])[0]
    p2 = float(np.sum(np.square(net.end_to_end)))

    def sharpness(t):
        u = -u0 * np.exp(-0.2 * t)
        a = 0.5 * (u + np.sqrt(u * u + 4.0 * p2))
        root, p = np.sqrt(np.asarray(problem.data.sxx)), np.asarray(net.end_to_end)
        return np.linalg.eigvalsh(root @ (a * np.eye(2) + p.T @ p / a) @ root)[-1]

    assert h * sharpness(when) == pytest.approx(2.0, abs=1e-4)
    assert np.isfinite(traces(got)[got.time < when]).all()
    assert np.isnan(traces(got)[got.time > when]).all()


# Files, descriptions, observables


@pytest.mark.slow
def test_it_comes_back_from_a_file_and_repeats(tmp_path):
    dynamics = SlowFlow(0.2, momentum=0.5, decay="decoupled", rtol=1e-7)
    got = run(gf.Problem(WHITE, [gf.LabelNoise(0.3), gf.WeightDecay(1e-3)]), CHAIN, dynamics, 3.0)
    again = gf.Trajectory.load(got.save(tmp_path / "slow.nc"))
    assert eqx.tree_equal(again.dynamics, dynamics)
    assert np.array_equal(traces(gf.repeat(again)), traces(got))


@pytest.mark.parametrize("dynamics", [SlowFlow(0.1), SlowFlow(0.1, False, 0.9, cell=0.5)])
def test_it_can_be_described(dynamics):
    check_rebuilds(dynamics)
    again = rebuild_dynamics(json.loads(json.dumps(describe(dynamics))))
    assert eqx.tree_equal(again, dynamics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "SlowFlow.step_size"),
        ({"step_size": 0.1, "momentum": 1.0}, "SlowFlow.momentum"),
        ({"step_size": 0.1, "decay": "both"}, "SlowFlow.decay"),
        ({"step_size": 0.1, "rtol": 2.0}, "SlowFlow.rtol"),
        ({"step_size": 0.1, "cell": 0.0}, "SlowFlow.cell"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SlowFlow(**options)


def test_reshuffled_batches_are_refused():
    x = np.random.default_rng(5).standard_normal((6, 1))
    data = gf.Regression.from_samples(x, x)
    problem = gf.Problem(data, [gf.Minibatch(2, reshuffled=True)])
    with pytest.raises(ValueError, match="reshuffled=False"):
        run(problem, CHAIN, SlowFlow(0.1), 1.0)


@pytest.mark.slow
def test_observables_are_those_of_the_training_it_describes():
    """Floor h v lam (1 + b) / (2 (1 - b) (2 (1 + b) - h lam)); dD/dt as along the run."""
    h, v, momentum = 0.5, 0.25, 0.5
    watch = ["loss_floor", "imbalance", "imbalance_drift", "excess_loss", "sharpness"]
    dynamics = SlowFlow(h, momentum=momentum)
    got = gf.simulate(label(), CHAIN, dynamics, t1=1.0, save=301, observables=watch)
    lam = got["sharpness"]
    floor = h * v * lam * (1 + momentum) / (1 - momentum) / (2 * (1 + momentum) - h * lam) / 2
    np.testing.assert_allclose(got["loss_floor"], floor, rtol=1e-9)
    assert np.max(got["excess_loss"]) < 1e-28
    moved = np.gradient(got["imbalance"], got.time, edge_order=2)
    np.testing.assert_allclose(got["imbalance_drift"], moved, rtol=0.0, atol=1e-4)


# Random motion


def gradient_noise(widths, std=0.1, seed=6):
    rng = np.random.default_rng(seed)
    layers = [rng.standard_normal((b, a)) for a, b in itertools.pairwise(widths)]
    data = gf.Regression.whitened(target=reference.end_to_end(layers))
    return gf.Problem(data, [gf.GradientNoise(std)]), gf.DeepLinear(layers)


@pytest.mark.slow
def test_when_a_random_run_is_saved_changes_no_bit_of_it():
    problem, net = gradient_noise((1, 1, 1))
    options = {"replicas": 3, "key": jax.random.key(7)}
    dynamics = SlowFlow(0.3, cell=0.7)
    often = run(problem, net, dynamics, 10.0, [0.3, 0.5, 1.4, 3.1, 7.0, 10.0], **options)
    seldom = run(problem, net, dynamics, 10.0, [3.1, 10.0], **options)
    for i, j in ((3, 0), (5, 1)):
        assert np.array_equal(traces(often)[:, i], traces(seldom)[:, j])
    chunks = run(problem, net, dynamics, 10.0, [3.1, 10.0], chunk=2, **options)
    np.testing.assert_allclose(traces(chunks), traces(seldom), rtol=0.0, atol=1e-12)
    np.testing.assert_allclose(often["end_to_end"], float(net.end_to_end[0, 0]), rtol=1e-12)


@pytest.mark.slow
def test_points_within_a_cell_lie_on_one_brownian_path():
    """Over a fraction f of a cell, steps from its start have the variance f and covariance min."""
    problem, net = gradient_noise((1, 1, 1), std=0.01)
    times = [0.25, 0.5, 1.0]
    saved = [0.0, *times]
    got = run(
        problem, net, SlowFlow(0.3, cell=1.0), 1.0, saved, replicas=4_000, key=jax.random.key(8)
    )
    moved = (traces(got) - traces(got)[:, :1])[:, 1:]
    c = np.cov(moved.T)
    expected = np.minimum.outer(times, times)
    # A covariance estimate of R paths has the standard error sqrt((c_ii c_jj + c_ij^2) / R).
    error = np.sqrt((np.outer(times, times) + expected**2) / 4_000)
    assert np.all(np.abs(c / c[2, 2] - expected) < 4.0 * error + 1e-12)


@pytest.mark.slow
def test_gradient_noise_drives_tr_g_and_spreads_it():
    """E dG_i/dt = h v (d_{i+1} - d_{i-1}) I on the manifold in the classical limit."""
    problem, net = gradient_noise((1, 2, 3), std=np.sqrt(0.05))
    h, v, t1, paths = 0.2, 0.05, 40.0, 2_000
    dynamics = SlowFlow(h, finite_step=False)
    got = run(problem, net, dynamics, t1, 2, replicas=paths, key=jax.random.key(9))
    moved = traces(got)[:, 1] - traces(got)[:, 0]
    error = moved.std() / np.sqrt(paths)
    expected = h * v * (3 - 1) * 2 * t1
    assert expected > 10.0 * error
    assert abs(moved.mean() - expected) < 3.0 * error


@pytest.mark.slow
def test_scalar_gradient_noise_is_the_diffusion_of_its_imbalance():
    """du = 2 sqrt(h v) (u^2 + 4 T^2)^(1/4) dB: variance against a fine NumPy simulation."""
    problem, net = gradient_noise((1, 1, 1), std=0.2)
    target = float(net.end_to_end[0, 0])
    h, v, t1, paths = 0.2, 0.04, 20.0, 2_000
    got = run(
        problem, net, SlowFlow(h, finite_step=False), t1, 2, replicas=paths, key=jax.random.key(10)
    )
    u = -traces(got)
    rng = np.random.default_rng(11)
    steps, many = 400, 40_000
    x = np.full(many, u[0, 0])
    for _ in range(steps):
        spread = 2.0 * np.sqrt(h * v * np.sqrt(x**2 + 4.0 * target**2))
        x = x + spread * np.sqrt(t1 / steps) * rng.standard_normal(many)
    error = u[:, 1].std() / np.sqrt(paths)
    assert abs(u[:, 1].mean() - u[0, 0]) < 3.0 * error
    # A variance estimate of R nearly normal numbers has the relative standard error sqrt(2 / R).
    assert u[:, 1].var() / x.var() == pytest.approx(1.0, abs=3.0 * np.sqrt(2.0 / paths))


@pytest.mark.slow
def test_random_motion_needs_a_key_and_has_the_drift_of_its_mean():
    problem, net = gradient_noise((1, 2, 3))
    dynamics = SlowFlow(0.2)
    with pytest.raises(ValueError, match="key"):
        run(problem, net, dynamics, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = gf.simulate(
            problem,
            net,
            SlowFlow(0.2, finite_step=False),
            t1=1.0,
            save=2,
            key=jax.random.key(0),
            observables=["imbalance_drift", "squared_norms"],
        )
    norms = got["squared_norms"][0]
    sign = np.sign(norms[1] - norms[0])
    expected = sign * 0.2 * 0.01 * (3 - 1) * 2
    assert got["imbalance_drift"][0] == pytest.approx(expected, rel=1e-9)
