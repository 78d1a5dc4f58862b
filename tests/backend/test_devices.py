"""Ensembles over several devices; results do not depend on their number."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.backend import jax_settings
from gradflow.backend.devices import Devices, along_last, sharers
from gradflow.dynamics.base import initial_state
from gradflow.simulation.slices import state_layout

PROGRAM = """
    import json, sys, jax, numpy as np, gradflow as gf
    assert len(jax.devices()) == int(sys.argv[1]), jax.devices()
    found = {}
    descent, sde = gf.GradientDescent(0.05, 0.5), gf.StochasticFlow(0.05, substeps=2)
    for width, paths, dynamics in ((1, 7, descent), (1, 1000, sde), (3, 7, sde)):
        eye = np.eye(width)
        noise = [gf.LabelNoise(0.3), gf.WeightDecay(0.01)]
        problem = gf.Problem(gf.Regression.whitened(eye), noise)
        net = gf.DeepLinear([2.0 * eye, 0.1 * eye + 0.2])
        run = gf.simulate(problem, net, dynamics, steps=50, save=3, replicas=paths,
                          key=jax.random.key(3), observables=["loss", "squared_norms"])
        assert run.attrs["devices"] == int(sys.argv[1])
        found[f"width {width}, {paths} paths"] = run["loss"].tolist()
    paired = gf.simulate(problem, net, sde, steps=50, save=3, replicas=10, chunk=6,
                         key=jax.random.key(3), observables=["loss"], keep="statistics",
                         normals=gf.Normals(antithetic=True, precision="single"))
    found["pairs"] = [paired.mean("loss").tolist(), paired.standard_error("loss").tolist()]
    nets = [gf.DeepLinear([[[1.0 + 0.1 * r]], [[0.2]]]) for r in range(5)]
    flow = gf.simulate(gf.Problem(gf.Regression.whitened([[1.0]])), nets,
                       gf.GradientFlow(), t1=2.0, save=3, observables=["loss"])
    found["flow"] = flow["loss"].tolist()
    print(json.dumps(found))
"""


def environment(**changes: str) -> dict[str, str]:
    names = ("JAX_NUM_CPU_DEVICES", "GRADFLOW_HOST_DEVICES", "XLA_FLAGS")
    return {k: v for k, v in os.environ.items() if k not in names} | changes


def python(program: str, *arguments: str, **changes: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_devices():
    """The same random numbers; matrix products of another batch may round differently."""
    one, three = (json.loads(python(PROGRAM, n, GRADFLOW_HOST_DEVICES=n)) for n in ("1", "3"))
    assert len(one) == 5
    for name, expected in one.items():
        np.testing.assert_allclose(three[name], expected, rtol=1e-11, err_msg=name)


# How many there are


@pytest.mark.few_cases(2)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, jax_settings.cores()),
        ({"GRADFLOW_HOST_DEVICES": "3"}, 3),
        ({"GRADFLOW_HOST_DEVICES": "3", "JAX_NUM_CPU_DEVICES": "2"}, 3),
        ({"JAX_NUM_CPU_DEVICES": "5"}, 5),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
    ],
    ids=["default", "ours", "ours before JAX's", "JAX's", "XLA's"],
)
@pytest.mark.parametrize("first", ["gradflow", "jax"])
def test_the_number_of_host_devices(first: str, changes: dict[str, str], expected: int):
    program = f"import {first}, gradflow, jax; print(len(jax.devices()))"
    assert int(python(program, **changes)) == expected


@pytest.mark.slow
def test_devices_that_exist_stay_as_they_are():
    program = """
        import jax
        before = jax.devices()
        import gradflow
        print(len(before), jax.devices() == before)
    """
    assert python(program) == "1 True\n"
    program = """
        import jax
        jax.config.update("jax_num_cpu_devices", 4)
        import gradflow
        print(len(jax.devices()))
    """
    assert python(program) == "4\n"


@pytest.mark.parametrize("asked", ["0", "two", "-1", ""])
def test_refuses_a_number_of_devices_that_is_none(asked: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADFLOW_HOST_DEVICES", asked)
    with pytest.raises(ValueError, match="GRADFLOW_HOST_DEVICES must be an integer >= 1; got"):
        jax_settings.host_devices()


def test_refuses_words_for_double_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADFLOW_X64", "false")
    with pytest.raises(ValueError, match="GRADFLOW_X64 must be 1"):
        jax_settings.set_up_jax()


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 6), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), (None, 6)],
)
def test_a_container_has_the_cores_of_its_quota(
    quota: str | None, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
):
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota + "\n")
    monkeypatch.setattr(jax_settings, "QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert jax_settings.cores() == expected


# How paths are divided


@pytest.mark.parametrize(
    ("paths", "devices", "expected"),
    [
        (1, 2, 1),
        (2, 2, 2),
        (3, 2, 2),
        (10, 8, 5),
        (9, 8, 5),
        (1000, 8, 8),
        (3, 64, 3),
        (5, 1, 1),
    ],
)
def test_paths_are_divided_evenly(paths: int, devices: int, expected: int):
    assert sharers(paths, devices) == expected


def test_paths_are_rounded_up_to_equal_parts():
    devices = Devices.sharing(5)
    assert devices.count == min(len(jax.devices()), 5)
    assert devices.padded(5) == -(-5 // devices.count) * devices.count
    assert devices.padded(6 * devices.count) == 6 * devices.count


def test_the_state_is_divided_by_paths():
    """The step sizes of a schedule too, and where a block has as many steps as there are paths."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)])
    dynamics = gf.GradientDescent(lambda k: 0.1 / (1.0 + k), 0.9)
    weights = (jnp.ones((1, 1, 4)), jnp.ones((1, 1, 4)))
    state = initial_state(dynamics, problem, weights, dynamics.noise_shapes(problem, (1, 1, 1)), 4)
    layout = state_layout(state)
    normals, step_sizes = layout.noise
    assert step_sizes == along_last(2)
    assert set(jax.tree.leaves(normals)) == {along_last(4)}
    assert layout.weights == layout.memory.velocity == (along_last(3),) * 2
    assert layout.limit == along_last(1)
    devices = Devices.sharing(4)
    placed = devices.placed(state, layout)
    assert placed.weights[0].sharding.shard_shape((1, 1, 4)) == (1, 1, 4 // devices.count)
    assert placed.noise[1].sharding.shard_shape((4, 4)) == (4, 4 // devices.count)
