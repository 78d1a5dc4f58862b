"""Measured orders against what is known: exact moments, exact flows, plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.analysis.convergence.controls import brownian_controls, controlled_mean
from gradflow.analysis.convergence.coupling import BrownianGrid, at_step_size, couple
from gradflow.analysis.convergence.orders import orders
from gradflow.dynamics import SVAG, GradientDescent, GradientFlow, StochasticFlow
from gradflow.dynamics.modified_flow import ModifiedFlow
from gradflow.random.streams import Stream
from gradflow.simulation.simulate import InterruptedWarning

H = [0.1, 0.05, 0.025, 0.0125]
DATA = gf.Regression.whitened(target=[[1.0]])
NET = gf.DeepLinear([np.array([[1.5]]), np.array([[0.2]])])
QUIET = gf.Problem(DATA)
NOISY = gf.Problem(DATA, [gf.LabelNoise(0.8)])
SAMPLES = gf.Problem(
    gf.Regression.from_samples(
        np.random.default_rng(0).standard_normal((8, 1)),
        np.random.default_rng(1).standard_normal((8, 1)),
    ),
    [gf.Minibatch(2)],
)
KEY = jax.random.key(5)
SHARP = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def first_order():
    """SGD against its SDE of order 1, observed through its loss too."""
    watched = {
        "loss": None,
        "end_to_end": None,
        "square": lambda net, problem: net.end_to_end[0, 0] ** 2,
    }
    return orders(
        NOISY,
        NET,
        GradientDescent(0.1),
        StochasticFlow(0.1),
        H,
        t1=1.0,
        observables=watched,
        replicas=2048,
        key=KEY,
    )


# Deterministic dynamics


@pytest.mark.slow
def test_gradient_descent_follows_gradient_flow_to_order_one():
    found = orders(
        QUIET,
        NET,
        GradientDescent(0.1),
        GradientFlow(**SHARP),
        H,
        t1=1.0,
        observables=["imbalance", "squared_norms", "weights"],
    )
    assert [r.observable for r in found.rows] == [
        "imbalance",
        "squared_norms[layer=1]",
        "squared_norms[layer=2]",
        "W1[0, 0]",
        "W2[0, 0]",
    ]
    for row in found.rows:
        assert row.resolved and row.low <= 1.0 <= row.high and row.high - row.low < 0.1
        assert row.asymptotic_range == (0.0125, 0.1)
    assert found.order() == pytest.approx(1.0, abs=0.03)
    assert not found.random and found.coupling == "both are deterministic"
    # Gradient flow conserves w1^2 - w2^2; descent multiplies it by 1 - h^2 r^2 in every step.
    (imbalance, *_) = found.points
    for h, error in zip(H, imbalance.error, strict=True):
        a, b = 1.5, 0.2
        for _ in range(round(1.0 / h)):
            r = a * b - 1.0
            a, b = a - h * r * b, b - h * r * a
        assert error == pytest.approx(a * a - b * b - (1.5**2 - 0.2**2), abs=1e-9)
    assert (imbalance.standard_error == 0.0).all() and (imbalance.replicas == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("order", [2, 3])
def test_modified_flows_have_the_order_they_claim(order):
    flow = ModifiedFlow(0.1, order, **SHARP)
    found = orders(QUIET, NET, GradientDescent(0.1), flow, H, t1=1.0, kind="strong")
    (row,) = found.rows
    assert row.observable == "weights"
    assert row.low <= order <= row.high and row.high - row.low < 0.2
    assert (found.points[0].error > 0.0).all()
    assert f"ModifiedFlow(order={order})" in str(found)


@pytest.mark.slow
def test_differences_below_the_tolerance_are_not_fitted():
    loose = GradientFlow(rtol=1e-3, atol=1e-3)
    found = orders(QUIET, NET, GradientDescent(0.01), loose, H, t1=1.0, observables=["loss"])
    assert {r.status for r in found.rows} == {"below resolution"}
    with pytest.raises(ValueError, match="below the resolution"):
        found.order()


@pytest.mark.slow
def test_different_momenta_do_not_keep_pace_in_flow_time_and_the_table_says_so():
    steps = [0.1, 0.05, 0.025]
    first, second = GradientDescent(0.1, 0.5), gf.HeavyBallFlow(0.1, 0.5)
    apart = orders(QUIET, NET, first, GradientFlow(), steps, t1=0.2, observables=["loss"])
    assert any("keep pace in effective time h k / (1 - momentum)" in note for note in apart.notes)
    together = orders(QUIET, NET, first, second, steps, t1=0.2, observables=["loss"])
    assert not any("momenta" in note for note in together.notes)


@pytest.mark.slow
def test_the_largest_difference_over_times():
    times = [0.5, 1.0, 1.5]
    found = orders(
        QUIET,
        NET,
        GradientDescent(0.1),
        GradientFlow(**SHARP),
        [0.5, 0.25, 0.1],
        t1=1.5,
        times=times,
        observables=["loss"],
    )
    flow = gf.simulate(QUIET, NET, GradientFlow(**SHARP), t1=1.5, save=times)
    for h, error in zip((0.5, 0.25, 0.1), found.points[0].error, strict=True):
        run = gf.simulate(QUIET, NET, GradientDescent(h), t1=1.5, save=times)
        assert error == pytest.approx(np.abs(run["loss"] - flow["loss"]).max(), rel=1e-8)


@pytest.mark.slow
def test_step_sizes_that_diverge_are_left_out():
    net = gf.DeepLinear([np.array([[2.0]]), np.array([[0.1]])])
    found = orders(
        QUIET,
        net,
        GradientDescent(0.1),
        GradientFlow(**SHARP),
        [20.0, 0.1, 0.05, 0.025],
        t1=200.0,
        observables=["imbalance"],
    )
    (points,) = found.points
    assert points.diverged.tolist() == [1, 0, 0, 0] and points.replicas.tolist() == [0, 1, 1, 1]
    assert np.isnan(points.error[0]) and not points.used[0]
    assert found.rows[0].resolved
    assert "1 of 1 at h = 20" in str(found) and "left out: diverged" in str(found)


# Random dynamics


def linear_moments(h, w0, std, substeps):
    """Exact mean and root mean square of SGD minus Euler-Maruyama for a linear scalar network.

    W+ = W - h (W - 1 + s S / sqrt(n)) along n = `substeps` normals a step, with
    S = sum of normals / sqrt(n), against n steps of the SDE with the same normals.
    """
    steps = round(1.0 / h)
    coarse = np.zeros(steps * substeps)
    fine = np.zeros(steps * substeps)
    for k in range(steps):
        here = slice(k * substeps, (k + 1) * substeps)
        coarse[: k * substeps] *= 1.0 - h
        coarse[here] -= h * std / np.sqrt(substeps)
    dt = h / substeps
    for j in range(steps * substeps):
        fine[:j] *= 1.0 - dt
        fine[j] -= np.sqrt(h * dt) * std
    mean = (w0 - 1.0) * ((1.0 - h) ** steps - (1.0 - dt) ** (steps * substeps))
    return mean, np.sqrt(mean**2 + np.sum((coarse - fine) ** 2))


@pytest.mark.slow
def test_linear_network_against_its_exact_moments():
    net, first, second = (
        gf.DeepLinear([np.array([[1.2]])]),
        GradientDescent(0.1),
        StochasticFlow(0.1),
    )
    common = {"t1": 1.0, "replicas": 1024, "key": KEY}
    strong = orders(NOISY, net, first, second, H, kind="strong", **common)
    weak = orders(NOISY, net, first, second, H, observables=["end_to_end"], **common)
    exact = np.array([linear_moments(h, 1.2, 0.8, 8) for h in H])
    for found, expected in ((weak.points[0], exact[:, 0]), (strong.points[0], exact[:, 1])):
        assert (found.standard_error > 0.0).all()
        assert (np.abs(found.error - expected) < 4.0 * found.standard_error).all()
    # Controls take away nearly all noise of a linear response: the spread left is at most a tenth.
    spread = np.sqrt(exact[:, 1] ** 2 - exact[:, 0] ** 2) / np.sqrt(1024)
    assert (weak.points[0].standard_error < 0.1 * spread).all()
    assert weak.rows[0].low <= 1.0 <= weak.rows[0].high
    # h and h^1.5 mix in the strong distance; the exact one is fitted just so
    assert strong.kind == "strong" and strong.coupling == "common Brownian path, 8 substeps"


def test_weak_order_one(first_order):
    assert first_order.order("end_to_end") == pytest.approx(1.0, abs=0.15)
    for row in first_order.rows:
        if row.resolved:
            assert row.low <= 1.0 <= row.high
    assert first_order.overall.resolved and first_order.overall.order < 1.2
    assert first_order.coupling == "common Brownian path, 8 substeps"


def test_a_vanishing_leading_coefficient_is_not_read_as_an_order(first_order):
    # E[loss] looks like order 2 (or more) although the weak order is 1.
    (row,) = [r for r in first_order.rows if r.observable == "loss"]
    assert row.status == "not asymptotic" and np.isnan(row.order)
    with pytest.raises(ValueError, match="not asymptotic"):
        first_order.order("loss")


@pytest.mark.slow
def test_errors_agree_with_unpaired_runs(first_order):
    # Independent ensembles, no controls: the same differences, with larger errors.
    h, (points, *_) = 0.1, [p for p in first_order.points if p.observable == "square"]
    means = []
    for i, one in enumerate((GradientDescent(h), StochasticFlow(h))):
        run = gf.simulate(
            NOISY,
            NET,
            one,
            t1=1.0,
            save=2,
            replicas=2048,
            key=jax.random.key(70 + i),
            observables=["end_to_end"],
        )
        square = run["end_to_end"][:, -1, 0, 0] ** 2
        means.append((square.mean(), square.std(ddof=1) / np.sqrt(2048)))
    error = np.hypot(means[0][1], means[1][1])
    assert abs(points.error[0] - (means[0][0] - means[1][0])) < 4.0 * error
    assert points.standard_error[0] < 0.25 * error


@pytest.mark.slow
def test_witnesses_show_the_order_that_an_observable_hides():
    found = orders(
        NOISY,
        NET,
        GradientDescent(0.1),
        StochasticFlow(0.1),
        H,
        t1=1.0,
        observables=["loss"],
        replicas=2048,
        key=KEY,
    )
    assert [r.observable for r in found.rows] == ["loss", "W2[0, 0]"]
    assert found.rows[0].status == "not asymptotic"
    assert found.overall is found.rows[1] and found.overall.low <= 1.0 <= found.overall.high


@pytest.mark.slow
def test_weak_order_two():
    # with 4096 pairs order 1 is about 10 half widths away
    found = orders(
        NOISY,
        NET,
        GradientDescent(0.1),
        StochasticFlow(0.1, order=2),
        H,
        t1=1.0,
        observables=["end_to_end", "imbalance"],
        replicas=4096,
        key=KEY,
    )
    assert found.overall.low <= 2.0 <= found.overall.high
    assert found.order() > 1.7 and all(r.resolved for r in found.rows)


@pytest.mark.slow
def test_unresolved_orders_ask_for_replicas():
    found = orders(
        NOISY,
        NET,
        GradientDescent(0.1),
        StochasticFlow(0.1, order=2),
        H,
        t1=1.0,
        observables=["end_to_end"],
        replicas=32,
        key=KEY,
    )
    (row,) = found.rows
    assert row.status == "not resolved"
    # 2048 resolve it: the half width is then 0.2 (seen in the figure of the report)
    assert row.replicas_needed is None or 64 <= row.replicas_needed <= 40_000
    assert found.overall is None
    with pytest.raises(ValueError, match="not resolved"):
        found.order()


@pytest.mark.slow
def test_independent_ensembles_and_what_strong_distances_need():
    first, second = GradientDescent(0.2), StochasticFlow(0.2)
    arguments = (SAMPLES, NET, first, second, [0.2, 0.1, 0.05])
    found = orders(*arguments, t1=1.0, replicas=64, key=KEY, observables=["loss"])
    assert found.coupling.startswith("independent ensembles") and "Minibatch" in found.coupling
    with pytest.raises(ValueError, match=r"share no noise.*kind='weak'"):
        orders(*arguments, t1=1.0, replicas=64, key=KEY, kind="strong")


@pytest.mark.slow
def test_one_random_dynamics():
    # SGD stays a distance sqrt(h) from gradient flow: strong order 1/2.
    net = gf.DeepLinear([np.array([[1.2]])])
    found = orders(
        NOISY,
        net,
        GradientFlow(),
        GradientDescent(0.1),
        H,
        t1=1.0,
        kind="strong",
        replicas=1024,
        key=KEY,
    )
    (row,) = found.rows
    assert row.low <= 0.5 <= row.high
    assert "every path of GradientDescent against the one path of GradientFlow" in found.coupling
    for h, error, spread in zip(
        H, found.points[0].error, found.points[0].standard_error, strict=True
    ):
        k = round(1.0 / h)
        bias = 0.2 * ((1.0 - h) ** k - np.exp(-1.0))
        variance = 0.64 * h**2 * (1.0 - (1.0 - h) ** (2 * k)) / (1.0 - (1.0 - h) ** 2)
        assert abs(error - np.sqrt(bias**2 + variance)) < 4.0 * spread


# Coupling and controls


def coupled(first, second, problem=NOISY):
    return couple(problem, NET.widths, first, second)


def test_couplings():
    sgd, sde = GradientDescent(0.1), StochasticFlow(0.1, substeps=6)
    pair = coupled(sgd, sde)
    assert (pair.first.path_substeps, pair.second.substeps) == (6, 6) and pair.paired
    assert sgd.path_substeps == 1
    assert pair.grid.per_step == 6 and pair.grid.tick == pytest.approx(0.1 / 6)
    back = coupled(sde, sgd)
    assert back.second.path_substeps == 6 and back.description == pair.description
    halves = coupled(GradientDescent(0.1), GradientDescent(0.05))
    assert (halves.first.path_substeps, halves.second.path_substeps) == (2, 1)
    svag = coupled(SVAG(0.1, 4), StochasticFlow(0.1, substeps=8))
    assert svag.first.path_substeps == 8 and svag.paired
    assert not coupled(SVAG(0.1, 4), StochasticFlow(0.1, substeps=6)).paired
    alone = coupled(sde, StochasticFlow(0.1, substeps=8))
    assert not alone.paired and "no Brownian path in common" in alone.description
    assert coupled(sde, StochasticFlow(0.1, 2, substeps=6)).paired
    same = coupled(GradientDescent(0.1), GradientDescent(0.1, momentum=0.5), SAMPLES)
    assert same.paired and same.description == "the same random numbers at every step"
    assert same.grid is None


@pytest.mark.slow
def test_halved_steps_share_their_path():
    # The same noise summed: the difference is far below that of independent paths.
    net = gf.DeepLinear([np.array([[1.0]])])
    found = orders(
        NOISY,
        net,
        GradientDescent(0.1),
        lambda h: GradientDescent(h / 2),
        H[:3],
        t1=1.0,
        kind="strong",
        replicas=256,
        key=KEY,
    )
    assert found.coupling == "common Brownian path, 2 substeps"
    # noise of SGD falls with its step: W has variance ~ h s^2 / 2, so half of it is in common
    assert (found.points[0].error < np.sqrt(0.64 * np.array(H[:3]))).all()


def test_restepping():
    assert float(at_step_size(SVAG(0.1, 2), 0.05, "first").step_size) == 0.05
    flow = GradientFlow()
    assert at_step_size(flow, 0.05, "first") is flow
    made = at_step_size(lambda h: GradientDescent(2 * h), 0.05, "first")
    assert float(made.step_size) == pytest.approx(0.1)
    with pytest.raises(
        TypeError, match=r"first: the steps of this GradientDescent are set by its schedule"
    ):
        at_step_size(GradientDescent(lambda k: 0.1 / (1.0 + k)), 0.05, "first")
    with pytest.raises(TypeError, match=r"second must be a dynamics.*got 0\.1"):
        at_step_size(lambda h: 2 * h, 0.05, "second")


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("replicas", [30, 90, 2000])
def test_controls_are_functionals_of_the_path_with_mean_zero(replicas):
    grid = BrownianGrid(0.025, 4)
    controls = brownian_controls(NOISY, (1, 1, 1), grid, 1.0, KEY, replicas)
    assert controls.shape == (replicas, {30: 0, 90: 2, 2000: 9}[replicas])
    z = Stream(KEY, jnp.arange(40), jnp.arange(replicas)).substream(0).normals((1, 1))
    z = np.asarray(z).reshape(10, 4, replicas)
    if replicas == 2000:
        t = (np.arange(10) + 0.5) / 5.0 - 1.0
        basis = np.stack([np.ones(10), t, 1.5 * t * t - 0.5]) / np.sqrt(10.0)
        sums = z.sum(axis=1) / 2.0
        lever = np.einsum("j,kjr->kr", np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(5.0), z)
        expected = np.concatenate([basis @ sums, basis @ lever, basis @ (sums**2 - 1.0)])
        np.testing.assert_allclose(controls, expected.T, atol=1e-12)
        error = controls.std(axis=0, ddof=1) / np.sqrt(replicas)
        assert (np.abs(controls.mean(axis=0)) < 4.0 * error).all()


def test_controlled_means():
    # y = 3 + 2 c + noise: the intercept, with the error of the noise alone, covered as it should.
    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        c = rng.standard_normal((200, 2))
        y = 3.0 + 2.0 * c[:, :1] - c[:, 1:] ** 2 + 1.0 + 0.5 * rng.standard_normal((200, 1))
        mean, error = controlled_mean(y, c)
        missed += abs(mean[0] - 3.0) > 2.0 * error[0]
    assert missed <= 24  # 5 % of 200, plus 4 standard errors
    plain, error = controlled_mean(y, np.zeros((200, 0)))
    assert plain[0] == pytest.approx(y.mean())
    assert error[0] == pytest.approx(y.std(ddof=1) / np.sqrt(200))


# What else a user meets


def test_tables(first_order):
    table = first_order.table()
    assert list(table["observable"])[:3] == ["loss", "end_to_end", "square"]
    assert set(table.columns) >= {"order", "low", "high", "status", "reason", "replicas_needed"}
    points = first_order.point_table()
    assert len(points) == 4 * len(first_order.rows)
    text = str(first_order)
    assert text.startswith("weak order of GradientDescent and StochasticFlow(order=1): ")
    assert "target/input" in text and "common Brownian path" in text
    assert max(map(len, text.splitlines())) < 160


def test_an_interrupted_measurement_keeps_what_was_done():
    def stop(done, total, message):
        if message.startswith("h = 0.0125"):
            raise KeyboardInterrupt

    with pytest.warns(InterruptedWarning, match="3 of 4 step sizes"):
        found = orders(
            QUIET,
            NET,
            GradientDescent(0.1),
            GradientFlow(**SHARP),
            H,
            t1=1.0,
            observables=["loss"],
            progress=stop,
        )
    assert found.interrupted
    assert found.points[0].step_size.tolist() == H[:3]
    assert found.rows[0].resolved and "stopped after 3 of 4" in str(found)

    def at_once(done, total, message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        orders(QUIET, NET, GradientDescent(0.1), GradientFlow(**SHARP), H, t1=1.0, progress=at_once)


def test_progress_goes_from_zero_to_one():
    seen = []
    orders(
        QUIET,
        NET,
        GradientDescent(0.1),
        GradientFlow(**SHARP),
        H[:3],
        t1=1.0,
        observables=["loss"],
        progress=lambda done, total, message: seen.append((done / total, message)),
    )
    done = [d for d, _ in seen]
    assert done == sorted(done) and done[-1] == pytest.approx(1.0)
    assert all(m.startswith("h = ") for _, m in seen)


def test_step_sizes_are_rounded_to_divide_the_time():
    found = orders(
        QUIET,
        NET,
        GradientDescent(0.1),
        GradientFlow(**SHARP),
        [0.03, 0.1, 0.05, 0.05],
        t1=1.0,
        observables=["loss"],
    )
    assert found.points[0].step_size == pytest.approx([0.1, 0.05, 1 / 33])
    assert "0.03 became 0.030303" in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_sizes": [0.1, 0.05]}, "step_sizes: an order needs 3"),
        ({"step_sizes": [0.1, -0.05, 0.2]}, "step_sizes must be finite numbers > 0"),
        ({"t1": -1.0}, "t1 must be a finite flow time > 0"),
        ({"times": [0.33]}, "times: t = 0.33 is no multiple of the step size"),
        ({"times": [2.0]}, "times must be flow times > 0 and <= t1"),
        ({"confidence": 1.5}, "confidence must lie between 0 and 1"),
        ({"observables": ["los"]}, "'los' is not known"),
        ({"problem": NOISY}, "key: this measurement is random"),
        ({"problem": NOISY, "key": KEY, "replicas": 1}, "replicas must be an integer >= 2"),
        ({"first": GradientFlow(rtol=1e-6)}, "neither GradientFlow nor GradientFlow has a step"),
        ({"first": lambda h: GradientDescent(0.7 * h)}, "takes steps of 0.07, which do not divide"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "problem": QUIET,
        "net": NET,
        "first": GradientDescent(0.1),
        "second": GradientFlow(),
        "step_sizes": H,
        "t1": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        orders(**(arguments | change))


@pytest.mark.slow
def test_pairs_of_which_one_diverges_are_counted_and_their_step_size_left_out():
    # At h = 0.5 noise of this size throws about 90 paths of SGD away, at 1/64 none.
    wild = gf.Problem(DATA, [gf.LabelNoise(1.5)])
    h = [0.5, 1 / 64, 1 / 128, 1 / 256]
    found = orders(
        wild,
        NET,
        GradientDescent(0.1),
        GradientDescent(0.1, momentum=0.01),
        h,
        t1=8.0,
        observables=["end_to_end"],
        replicas=256,
        key=KEY,
    )
    points = found.points[0]
    assert 30 < points.diverged[0] < 200 and points.diverged[1:].tolist() == [0, 0, 0]
    assert (points.replicas + points.diverged == 256).all()
    assert np.isnan(points.error[0]) and not points.used[0]
    assert f"{points.diverged[0]} of 256 at h = 0.5" in str(found)


@pytest.mark.slow
def test_errors_of_an_integrator_are_seen_where_they_grow():
    """Near a saddle the error of a loose integrator is several of its tolerances."""
    net = gf.DeepLinear([[[1e-7]], [[1.01e-7]]])
    found = gf.orders(
        gf.Problem(gf.Regression.whitened([[1.0]])),
        net,
        gf.GradientDescent(0.1),
        gf.ModifiedFlow(0.1, 2, 1e-3, 1e-8),
        [0.1, 0.05, 0.025, 0.0125],
        t1=16.0,
        observables=["end_to_end"],
    )
    (points,) = [p for p in found.points if p.observable == "end_to_end"]
    assert points.resolution.min() > 1.2e-3 and points.resolution.max() > 3e-3
    assert not any(row.resolved and row.observable == "end_to_end" for row in found.rows)
