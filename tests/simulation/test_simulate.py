"""The one way in: replicas, chunks, saving, divergence, interruption, bad input."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

import gradflow as gf
from gradflow.backend.devices import Devices, along_last
from gradflow.dynamics import base
from gradflow.random.streams import Source
from gradflow.simulation.simulate import InterruptedWarning

MODULE = sys.modules["gradflow.simulation.simulate"]  # the front door has a function of that name
RUNNER = sys.modules["gradflow.simulation.slices"]
KEY = jax.random.key(3)


def problem_of(*regularizers: gf.AbstractRegularizer) -> gf.Problem:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    return gf.Problem(gf.Regression.from_samples(x, y), regularizers)


NOISY = problem_of(gf.LabelNoise(0.5), gf.Minibatch(3, replacement=True))
NOISY_LABELS = problem_of(gf.LabelNoise(0.5))
NET = gf.DeepLinear([[[0.5, 0.2], [0.1, -0.4], [0.3, 0.3]], [[0.2, 0.6, -0.1], [0.4, 0.0, 0.5]]])
DYNAMICS = [gf.GradientDescent(0.05), gf.StochasticFlow(0.05, substeps=2)]
by_kind = pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)


def simulate(dynamics: gf.AbstractDynamics = DYNAMICS[0], **options: Any) -> gf.Trajectory:
    chosen = {"steps": 300, "key": KEY, "save": 4, "observables": ["loss", "squared_norms"]}
    chosen |= options
    usual = NOISY if isinstance(dynamics, gf.GradientDescent) else NOISY_LABELS
    return gf.simulate(chosen.pop("problem", usual), chosen.pop("net", NET), dynamics, **chosen)


def assert_same(run: gf.Trajectory, other: gf.Trajectory, replicas: Any = slice(None)) -> None:
    """The same random numbers and the same paths; another program may round differently."""
    for name in ("loss", "squared_norms", "W1", "W2"):
        np.testing.assert_allclose(run[name][replicas], other[name], rtol=1e-11)


# Replicas


@pytest.mark.slow
@by_kind
def test_replicas_differ_and_do_not_depend_on_how_many_there_are(dynamics: gf.AbstractDynamics):
    ten = simulate(dynamics, replicas=10)
    assert ten.replicas == 10
    assert ten["loss"].shape == (10, 4)
    assert ten["squared_norms"].shape == (10, 4, 2)
    assert [w.shape for w in ten.weights] == [(10, 4, 3, 2), (10, 4, 2, 3)]
    assert np.unique(ten["loss"][:, -1]).size == 10
    assert np.unique(ten["loss"][:, 0]).size == 1
    three = simulate(dynamics, replicas=3)
    assert_same(ten, three, slice(0, 3))
    single = simulate(dynamics)
    assert single.replicas is None
    assert_same(ten, single, 0)
    chunked = simulate(dynamics, replicas=10, chunk=3)
    assert chunked.replicas == 10
    assert_same(ten, chunked)


@pytest.mark.slow
@by_kind
def test_blocks_of_noise_do_not_matter(
    dynamics: gf.AbstractDynamics, monkeypatch: pytest.MonkeyPatch
):
    usual = simulate(dynamics, replicas=3)
    monkeypatch.setattr(base, "BLOCK_BYTES", 500)
    monkeypatch.setattr(base, "FEWEST_STEPS", 1)
    shapes = dynamics.noise_shapes(NOISY, (2, 3, 2))
    assert base.block_length(shapes, 3) < 4
    assert_same(usual, simulate(dynamics, replicas=3))


def test_blocks_fit_the_cache():
    shapes = DYNAMICS[0].noise_shapes(problem_of(gf.LabelNoise(0.5)), (2, 3, 2))
    per_step = 4 * 8  # normals of a 2 x 2 end-to-end gradient
    assert base.block_length(shapes, 1) == 256
    for paths in (1000, 3000):
        block = base.block_length(shapes, paths)
        assert base.BLOCK_BYTES / 2 < block * per_step * paths <= base.BLOCK_BYTES
    assert base.block_length(shapes, 100_000) == base.FEWEST_STEPS
    assert base.block_length(shapes, 10**6) * per_step * 10**6 <= base.MOST_BYTES
    assert base.block_length(shapes, 10**9) == 1


@by_kind
def test_when_a_run_is_saved_changes_no_bit(dynamics: gf.AbstractDynamics):
    often = simulate(dynamics, replicas=3, save=301)
    rarely = simulate(dynamics, replicas=3, save=2)
    for name in ("loss", "W1", "W2"):
        np.testing.assert_array_equal(often[name][:, [0, -1]], rarely[name])
    odd = simulate(dynamics, replicas=3, save=[0.05, 0.15, 12.85])
    assert odd.step is not None and odd.step.tolist() == [1, 3, 257]
    np.testing.assert_array_equal(odd["W1"], often["W1"][:, odd.step])


def test_seeds_differ():
    assert np.all(simulate(key=jax.random.key(4))["loss"][1:] != simulate()["loss"][1:])


def test_networks_as_replicas():
    nets = [NET, gf.DeepLinear([2 * w for w in NET.weights]), NET]
    run = simulate(net=nets)
    assert run.replicas == 3
    np.testing.assert_allclose(run["W1"][:, 0], [n.weights[0] for n in nets], rtol=0.0)
    usual = simulate(replicas=3)
    for r in (0, 2):
        np.testing.assert_array_equal(run["W1"][r], usual["W1"][r])
    assert simulate(net=[NET]).replicas == 1


@pytest.mark.slow
@by_kind
def test_a_run_that_has_diverged_altogether_ends_early(dynamics: gf.AbstractDynamics):
    """A billion steps would take minutes even if each cost nothing but the loop."""
    net = gf.DeepLinear([100 * w for w in NET.weights])
    steps = 10**9
    began = time.monotonic()
    if isinstance(dynamics, gf.StochasticFlow):
        with pytest.warns(gf.DivergedWarning), pytest.warns(UserWarning, match="Hessian trace"):
            run = simulate(dynamics, net=net, steps=steps, replicas=2, save=3)
    else:
        with pytest.warns(gf.DivergedWarning):
            run = simulate(dynamics, net=net, steps=steps, replicas=2, save=3)
    assert time.monotonic() - began < 60
    assert run.diverged.all()
    assert run.to_xarray()["diverged_at"].values.tolist() == [run.time[1]] * 2
    for name in ("loss", "squared_norms", "W1", "W2"):
        assert np.isnan(run[name][:, 1:]).all()


# Memory


def test_memory_does_not_grow_with_the_number_of_steps():
    held: list[int] = []

    def look(done: float, total: float, message: str) -> None:
        held.append(sum(a.nbytes for a in jax.live_arrays()))

    run = simulate(steps=40_000, save=3, progress=look)
    assert len(held) > 3
    assert held[-1] <= held[1]
    assert run["loss"].shape == (3,)


@pytest.mark.slow
def test_the_state_is_given_back_to_the_next_step():
    dynamics = DYNAMICS[0]
    weights = tuple(jnp.stack([w, w], axis=-1) for w in NET.weights)
    devices = Devices.sharing(2)
    state = base.initial_state(
        dynamics, NOISY, weights, dynamics.noise_shapes(NOISY, NET.widths), 4
    )
    layout = RUNNER.state_layout(state)
    state = devices.placed(state, layout)
    before = [*state.weights, *jax.tree.leaves(state.noise)]
    words = jax.random.key_data(KEY)
    paths = devices.placed(jnp.arange(2, dtype=jnp.uint32), along_last(1))
    ensemble = RUNNER.Ensemble(dynamics, NOISY, Source(words, paths), (), False, 4, devices, layout)
    fixed = ensemble, np.arange(0, 3 * 257, 3), np.asarray(2), np.asarray(16)
    after, *_ = RUNNER._run_slice(fixed, (state, np.zeros(2, np.int32)))
    assert all(array.is_deleted() for array in before)
    assert np.isfinite(np.asarray(after.weights[0])).all()


@pytest.mark.slow
def test_weights_are_stored_if_asked_for_or_small(monkeypatch: pytest.MonkeyPatch):
    assert "W1" in simulate()
    assert "W1" not in simulate(store_weights=False)
    monkeypatch.setattr(MODULE, "STORED_BY_DEFAULT", 4 * 12 * 8 - 1)
    assert "W1" not in simulate()
    assert "W1" in simulate(save=3)
    assert "W1" in simulate(store_weights=True)


# Interruption


class StopAt:
    """Progress that presses Ctrl-C once enough is done."""

    def __init__(self, share: float):
        self.share = share

    def __call__(self, done: float, total: float, message: str) -> None:
        if done / total >= self.share:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_is_returned():
    whole = simulate(replicas=2, save=301)
    with pytest.warns(InterruptedWarning, match="stopped at t = .* of 15 with 2 of 2 replicas"):
        part = simulate(replicas=2, save=301, progress=StopAt(0.5))
    assert part.interrupted
    assert not whole.interrupted
    assert part.attrs["status"] == "interrupted"
    first_slice = RUNNER.MOST_ROWS
    assert part.time.size == first_slice < 301
    for name in ("loss", "W1", "W2"):
        np.testing.assert_array_equal(part[name], whole[name][:, :first_slice])
    np.testing.assert_array_equal(part.network(-1, 0).weights[0], part["W1"][0, -1])
    again = gf.repeat(part)
    np.testing.assert_array_equal(again["W1"], whole["W1"])


def test_an_interrupted_run_in_chunks_keeps_the_finished_chunks():
    nets = [gf.DeepLinear([(1 + 0.1 * r) * w for w in NET.weights]) for r in range(7)]
    whole = simulate(net=nets, chunk=2)
    with pytest.warns(InterruptedWarning, match="of 15 with 4 of 7 replicas"):
        part = simulate(net=nets, chunk=2, progress=StopAt(0.7))
    assert part.replicas == 4
    assert part.time.size == 4
    np.testing.assert_array_equal(part["W1"], whole["W1"][:4])
    np.testing.assert_array_equal(gf.repeat(part)["W1"], whole["W1"])
    with pytest.warns(InterruptedWarning, match="with 4 of 7 replicas"):
        part = simulate(replicas=7, chunk=2, progress=StopAt(0.7))
    np.testing.assert_array_equal(gf.repeat(part)["W1"], simulate(replicas=7, chunk=2)["W1"])


def test_an_interrupt_before_anything_was_saved_is_passed_on(monkeypatch: pytest.MonkeyPatch):
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RUNNER, "_run_slice", interrupt)
    with pytest.raises(KeyboardInterrupt):
        simulate()


def test_ctrl_c_at_the_keyboard():
    program = """
        import jax, gradflow as gf, warnings
        warnings.simplefilter("ignore")
        problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)])
        net = gf.DeepLinear([[[2.0]], [[0.1]]])
        run = gf.simulate(
            problem, net, gf.GradientDescent(1e-6), steps=2_000_000_000, key=jax.random.key(0),
            save=100_001, observables=["loss"], progress=lambda *what: print("going", flush=True),
        )
        print("kept", run.interrupted, run.time.size > 1, run["loss"].shape == run.time.shape)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            assert process.stdout.readline() == "going\n"
        os.kill(process.pid, signal.SIGINT)
        *_, last = process.stdout
        assert last == "kept True True True\n"
    assert process.returncode == 0


# Observables


@pytest.mark.slow
def test_observables_of_the_user():
    calls = []

    def flatness(net: gf.DeepLinear, problem: gf.Problem) -> Any:
        calls.append(1)
        return jnp.stack([w.sum() for w in net.weights])

    functions = {"sums": flatness, "loss": None, "depth": lambda net, problem: net.depth}
    run = simulate(replicas=3, observables=functions)
    expected = np.stack([w.sum((-1, -2)) for w in run.weights], axis=-1)
    np.testing.assert_allclose(run["sums"], expected, rtol=1e-12)
    assert run["depth"].tolist() == [[2] * 4] * 3
    data = run.to_xarray()
    assert data["sums"].dims == ("replica", "time", "sums_0")
    assert data["sums"].attrs == {"long_name": "sums", "units": "1"}
    assert data["loss"].attrs["units"] == "loss"
    assert len(calls) == 1
    simulate(replicas=3, observables=functions, steps=200)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="sums, depth were functions given to simulate"):
        gf.repeat(run)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": None}, r"key: this run is random; pass key=jax.random.key\(seed\)"),
        ({"key": jax.random.key(0, impl="rbg")}, r"single threefry key .* shape \(4,\)"),
        ({"replicas": 0}, "replicas must be an integer >= 1 or None; got 0"),
        ({"replicas": True}, "replicas must be an integer >= 1 or None; got True"),
        ({"chunk": 0, "replicas": 3}, "chunk must be an integer >= 1 or None; got 0"),
        ({"t1": 1.0}, "t1 and steps: .* got both"),
        ({"steps": None}, "t1 and steps: .* got neither"),
        ({"net": [NET, NET], "replicas": 3}, "replicas=3 but 2 networks were given; leave"),
        (
            {"net": [NET, gf.DeepLinear([np.eye(2)])]},
            r"all networks need equal widths; got \(2, 3, 2\) and \(2, 2\)",
        ),
        (
            {"net": gf.DeepLinear([np.ones((2, 3))])},
            r"widths \(3, 2\) do not fit the data with 2 inputs and 2 targets; .* must be 2",
        ),
        ({"observables": ["los"]}, "observables: 'los' is not known; choose from loss, "),
    ],
)
def test_refuses_values_that_make_no_sense(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        simulate(**options)


@pytest.mark.slow
def test_refuses_things_of_the_wrong_kind():
    """In a process without run-time type checks, which would refuse them first."""
    program = """
        import jax, numpy as np, gradflow as gf
        data = gf.Regression.whitened([[1.0]])
        problem, net = gf.Problem(data), gf.DeepLinear([[[1.0]]])
        descent = gf.GradientDescent(0.1)
        for arguments, options in [
            ((data, net, descent), {}),
            ((problem, [], descent), {}),
            ((problem, [[[1.0]]], descent), {}),
            ((problem, descent, net), {}),
            ((problem, net, descent), {"normals": {"antithetic": True}}),
            ((problem, net, gf.GradientDescent), {}),
            ((problem, net, descent), {"key": 0}),
            ((problem, net, descent), {"key": jax.random.split(jax.random.key(0), 3)}),
            ((problem, net, descent), {"replicas": 2.5}),
            ((problem, net, descent), {"chunk": 2.5}),
            ((problem, net, descent), {"steps": 2.5}),
            ((problem, net, descent), {"spacing": "sqrt"}),
            ((problem, net, descent), {"observables": "loss"}),
            ((problem, net, descent), {"observables": {"mine": 3}}),
            ((problem, net, descent), {"keep": "mean"}),
            ((problem, net, descent), {"progress": "yes"}),
        ]:
            try:
                gf.simulate(*arguments, **{"steps": 3} | options)
            except (TypeError, ValueError) as error:
                print(f"{type(error).__name__}: {error}")
            else:
                print("nothing")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = [
        "TypeError: problem must be a Problem such as Problem(data, [...]); got Regression.",
        "TypeError: net must be a DeepLinear or a non-empty sequence of them; got list.",
        "TypeError: net must be a DeepLinear or a non-empty sequence of them; got list.",
        "TypeError: net must be a DeepLinear or a non-empty sequence of them; got GradientDescent.",
        "TypeError: normals must be Normals such as gf.Normals(antithetic=True); got {'anti",
        "TypeError: dynamics must be a dynamics such as GradientDescent(0.1); got <class",
        "TypeError: key must be a random key such as jax.random.key(0); got 0.",
        "ValueError: key must be a single threefry key such as jax.random.key(0); got key data of",
        "ValueError: replicas must be an integer >= 1 or None; got 2.5.",
        "ValueError: chunk must be an integer >= 1 or None; got 2.5.",
        "ValueError: steps must be an integer >= 1; got 2.5.",
        "ValueError: spacing must be 'lin' or 'log'; got 'sqrt'.",
        "TypeError: observables must be a list of names; got the string 'loss'.",
        "TypeError: observables: 'mine' needs a function of (network, problem), or None",
        "ValueError: keep must be 'paths' or 'statistics'; got 'mean'.",
        "TypeError: progress must be None, True, False or a function of (done, total, message)",
    ]
    for line, start in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.startswith(start), line


# Single precision


@pytest.mark.slow
def test_single_precision():
    program = """
        import jax, numpy as np, gradflow as gf
        x = np.random.default_rng(0).normal(size=(12, 2))
        data = gf.Regression.from_samples(x, x @ [[1.0, 0.5], [-0.2, 0.8]])
        net = gf.DeepLinear([[[0.5, 0.2], [0.1, 0.4]], [[0.2, 0.6], [0.4, 0.5]]])
        flow, descent, sde = gf.GradientFlow(), gf.GradientDescent(0.1, 0.5), gf.StochasticFlow(0.1)
        noisy = [gf.Minibatch(3), gf.InputNoise(0.1), gf.LabelNoise(0.1), gf.WeightDecay(0.01)]
        names = ["loss", "excess_loss", "imbalance", "squared_norms", "end_to_end"]
        for regularizers, dynamics in [([], flow), (noisy, descent), (noisy, sde)]:
            run = gf.simulate(
                gf.Problem(data, regularizers), net, dynamics, t1=20.0, save=5,
                replicas=3, key=jax.random.key(0), observables=names,
            )
            assert run.attrs["dtype"] == "float32"
            assert {str(run[n].dtype) for n in [*names, "W1", "W2"]} == {"float32"}
            assert not run.diverged.any()
            assert (run["loss"][:, -1] < 0.1).all(), run["loss"]
        leaks = {str(a.dtype) for a in jax.live_arrays()} & {"float64", "int64", "uint64"}
        assert not leaks, leaks
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    environment = os.environ | {"GRADFLOW_X64": "0"}
    environment.pop("JAX_ENABLE_X64", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_saved_weights_belong_to_the_record():
    """Saved arrays must not be views of buffers that later steps overwrite."""
    run = simulate(problem=problem_of(), steps=50, save=51)
    data = run.problem.data
    sxx, syx = np.asarray(data.sxx), np.asarray(data.syx)

    def gradient(weights: Any, k: int) -> Any:
        return training.reference.gradient(weights, sxx, syx)

    expected = training.descend([np.asarray(w) for w in NET.weights], gradient, 0.05, 50)
    for actual, layer in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(actual, layer, rtol=0.0, atol=1e-13)
