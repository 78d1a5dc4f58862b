"""What is no number is refused with the name of the argument.

Users have no run-time type checker, so the constructors are called in a program without one.
"""

import subprocess
import sys
import textwrap

import jax.numpy as jnp
import pytest

import gradflow as gf

PROGRAM = """
    import gradflow as gf

    def schedule(step):
        return 0.1 / (1.0 + step)

    calls = {
        "SVAG.step_size": lambda v: gf.SVAG(v, amplification=2),
        "HeavyBallFlow.step_size": lambda v: gf.HeavyBallFlow(v, 0.5),
        "ModifiedFlow.step_size": gf.ModifiedFlow,
        "PrincipalFlow.step_size": gf.PrincipalFlow,
        "StochasticFlow.step_size": gf.StochasticFlow,
        "SlowFlow.step_size": gf.SlowFlow,
        "GradientDescent.momentum": lambda v: gf.GradientDescent(0.1, momentum=v),
        "HeavyBallFlow.momentum": lambda v: gf.HeavyBallFlow(0.1, v),
        "GradientFlow.rtol": lambda v: gf.GradientFlow(rtol=v),
        "GradientFlow.atol": lambda v: gf.GradientFlow(atol=v),
        "SlowFlow.cell": lambda v: gf.SlowFlow(0.1, cell=v),
        "LabelNoise.std": gf.LabelNoise,
        "InputNoise.std": gf.InputNoise,
        "WeightNoise.std": gf.WeightNoise,
        "GradientNoise.std": gf.GradientNoise,
        "WeightDecay.rate": gf.WeightDecay,
        "Dropout.rate": gf.Dropout,
        "DropConnect.rate": gf.DropConnect,
    }
    for field, make in calls.items():
        for value in (schedule, "0.1"):
            try:
                make(value)
            except TypeError as error:
                print(field, error, sep="|")
"""


@pytest.mark.slow
def test_a_function_or_a_text_where_a_number_is_needed_is_named():
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == 36, done.stderr
    for i, (field, message) in enumerate(lines):
        got = "<function schedule" if i % 2 == 0 else "'0.1'"
        assert message.startswith(f"{field} must be a number; got {got}"), message
        pointed = "(a schedule of step sizes is for GradientDescent alone)" in message
        assert pointed == (field.endswith("step_size") and i % 2 == 0)


def test_numbers_of_every_kind_are_taken():
    for value in (0.5, jnp.asarray(0.5), jnp.float32(0.5)):
        assert float(gf.LabelNoise(value).std) == 0.5
        assert float(gf.StochasticFlow(value).step_size) == 0.5
