"""What is given to the functions of the geometry: swapped or missing arguments are named.

Users have no run-time type checker, so the functions are called in a program without one.
"""

import subprocess
import sys
import textwrap

import equinox as eqx
import numpy as np
import pytest

import gradflow as gf

PROGRAM = """
    import gradflow as gf

    data = gf.Regression.whitened([[1.0, 0.5], [0.0, 2.0]])
    net = gf.DeepLinear([[[1.0, 0.0], [0.0, 1.0]]] * 2)
    narrow = gf.DeepLinear([[[1.0]], [[2.0]]])
    of_both = [
        gf.sharpness, gf.hessian_trace, gf.hessian_block_traces, gf.hessian, gf.extreme_eigenvalues,
        gf.hessian_spectrum, gf.minima_spectrum, gf.flow_projection, gf.nearest_minimum,
        gf.distance_to_manifold, gf.flatness_gap,
    ]
    calls = [(f, (data, net)) for f in of_both]
    calls += [(gf.spectral_density, (data, net)), (gf.descent_projection, (data, net, 0.1))]
    calls += [(gf.sharpness, (net, [[1.0]])), (gf.sharpness, (narrow, data))]
    calls += [(gf.minima_spectrum, (net, "data")), (gf.imbalance, (data,))]
    calls += [(gf.sharpness_bound, (net, 2)), (gf.sharpness_bound, (data, "2"))]
    calls += [(gf.sharpness_bound, (data, [2, 3])), (gf.sharpness_bound, (data, [2, 1, 2]))]
    calls += [(gf.trace_bound, (data, 2)), (gf.flattest_minimum, (data, 2))]
    calls += [(gf.flattest_minimum, (net, [2, 2, 2]))]
    calls += [(gf.sharpness, (gf.flattest_minimum(data, [2, 2, 2]), data))]
    calls += [(gf.extreme_eigenvalues, (net, data, 1.5))]
    calls += [(gf.GradientDescent, ([0.1, 0.2],)), (gf.GradientDescent, ("0.1",))]
    of_data = [gf.loss, gf.gradient, gf.end_to_end_gradient, gf.per_sample_gradients]
    problem = gf.Problem(data, [gf.WeightDecay(0.1)])
    calls += [(f, (data, net)) for f in of_data] + [(f, (net, problem)) for f in of_data]
    calls += [(gf.loss, (net, [[1.0]]))]
    for function, arguments in calls:
        try:
            options = {"key": None} if function is gf.spectral_density else {}
            function(*arguments, **options)
        except (TypeError, ValueError) as error:
            print(f"{function.__name__}: {type(error).__name__}: {error}")
        else:
            print(f"{function.__name__}: nothing")
"""

SWAPPED = (
    "TypeError: net must be a DeepLinear; got Regression. Functions of both take the network first"
)
EXPECTED = [SWAPPED] * 13 + [
    "TypeError: data must be a Regression or a Problem; got list.",
    "ValueError: net: widths (1, 1, 1) do not fit the data with 2 inputs and 2 targets",
    "TypeError: data must be a Regression or a Problem; got str.",
    SWAPPED,
    "TypeError: data must be a Regression or a Problem; got DeepLinear.",
    "TypeError: depth must be a number of layers, or widths (d_0, ..., d_N); got '2'.",
    "ValueError: widths: (2, 3) do not fit the data with 2 inputs and 2 targets",
    "ValueError: widths: (2, 1, 2) let through rank 1, but the target has rank 2",
    "TypeError: widths must be those of all layers, input first, such as [2, 3, 2]",
    "TypeError: widths must be those of all layers, input first, such as [2, 3, 2]; got 2.",
    "TypeError: data must be a Regression or a Problem; got DeepLinear.",
    "TypeError: net must be a DeepLinear; got FlattestMinimum.",
    "ValueError: k must be an integer from 1 to the 8 parameters; got 1.5.",
    "ValueError: GradientDescent.step_size must be a single number; got [0.1, 0.2].",
    "TypeError: GradientDescent.step_size must be a number; got '0.1'.",
    *[SWAPPED] * 4,
    *["TypeError: data must be a Regression; got Problem. Give problem.data for the loss of"] * 4,
    "TypeError: data must be a Regression; got list.",
]


def test_wrong_arguments_are_named():
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if ": " in line]
    assert len(lines) == len(EXPECTED), done.stderr
    for line, start in zip(lines, EXPECTED, strict=True):
        assert line.startswith(start), line


@pytest.mark.parametrize("widths", [(2, 3, 2), [2, 2, 5, 2]])
def test_the_least_sharpness_takes_widths_as_the_least_trace_does(widths):
    """Whitened: N |T|_2^(2 - 2/N), whatever the hidden widths."""
    data = gf.Regression.whitened([[3.0, 0.0], [0.0, 2.0]])
    depth = len(widths) - 1
    assert float(gf.sharpness_bound(data, widths)) == pytest.approx(depth * 3.0 ** (2 - 2 / depth))
    assert gf.sharpness_bound(data, widths) == gf.sharpness_bound(data, depth)


def test_single_precision_is_refused_where_it_cannot_reach_the_manifold():
    data = gf.Regression.whitened([[1.0, 0.5], [0.0, 2.0]])
    net = gf.DeepLinear([[[1.0, 0.0], [0.0, 1.0]]] * 2)
    weights = tuple(w.astype(np.float32) for w in net.weights)
    single = eqx.tree_at(lambda n: n.weights, net, weights)
    problem = gf.Problem(data, [gf.LabelNoise(0.1)])
    for ask in (
        lambda: gf.predict(problem, single, 0.1),
        lambda: gf.flow_projection(single, data),
        lambda: gf.flatness_gap(single, data),
        lambda: gf.SlowFlow(0.1).check(problem, tuple(w[..., None] for w in weights)),
    ):
        with pytest.raises(ValueError, match="needs double precision, but the weights are float32"):
            ask()
