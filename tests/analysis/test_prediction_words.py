"""What a prediction says: rows, notes and errors. Numbers come from NumPy or a closed form."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import gradflow as gf

DATA = gf.Regression.whitened([[1.0]])
NET = gf.DeepLinear([[[2.0]], [[0.1]]])
NOISY = gf.Problem(DATA, [gf.LabelNoise(0.01)])


def row(text, name):
    line = next(line for line in text.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


@pytest.mark.slow
def test_a_start_beyond_the_edge_is_noted():
    """h lambda_max from the 2 x 2 Hessian by hand; descent by NumPy says where D goes."""
    h, w1, w2 = 0.6, 2.0, 0.1
    p = w1 * w2
    top = h * np.linalg.eigvalsh([[w2**2, 2 * p - 1.0], [2 * p - 1.0, w1**2]])[-1]
    for _ in range(2000):
        r = w1 * w2 - 1.0
        w1, w2 = w1 - h * r * w2, w2 - h * r * w1
    found = gf.predict(NOISY, NET, h)
    assert top > 2.0 and f"h lambda_max = {top:.4g}, edge at 2" in found.start_note
    assert "descent moves D from 3.99 to " in found.start_note
    assert found.leading_order is not None
    assert found.leading_order.imbalance == pytest.approx(abs(w1**2 - w2**2), rel=0.01)
    assert gf.predict(NOISY, NET, 0.1).start_note == ""


def test_every_theory_has_its_own_optimization_rate():
    h = 0.1
    found = gf.predict(NOISY, NET, h)
    assert found.leading_order is not None and found.finite_step is not None
    lam = found.leading_order.sharpness
    assert found.leading_order.optimization_rate == pytest.approx(lam, rel=1e-9)
    expected = -math.log(1.0 - h * lam) / h
    assert found.finite_step.optimization_rate == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_training_that_does_not_settle_has_no_rate():
    """The flattest minimum of diag(2, 1) has lambda_max = 4: h = 0.51 is beyond, 0.5 the edge."""
    data = gf.Regression.whitened([[2.0, 0.0], [0.0, 1.0]])
    net = gf.flattest_minimum(data, [2, 3, 2]).net
    found = gf.predict(gf.Problem(data, [gf.LabelNoise(0.01)]), net, 0.51)
    assert math.isnan(found.optimization_rate) and math.isnan(found.optimization_end)
    assert "2.04 is beyond the edge of stability at 2" in found.reason
    assert "largest stable step size at this minimum is 0.5" in found.reason


@pytest.mark.slow
def test_mean_square_instability_names_the_largest_step():
    """Below the edge, but one row of four is far: the variance of the residual must not grow.

    With batches of one row x_k and y = T x at the minimum the deviation of p obeys
    p+ = p (1 - h a x_k^2), a = |w|^2: stable while E (1 - h a x^2)^2 < 1.
    """
    x = np.array([[0.1], [0.1], [0.1], [2.0]])
    data = gf.Regression.from_samples(x, x + np.array([[0.3], [-0.3], [0.0], [0.0]]))
    found = gf.predict(gf.Problem(data, [gf.Minibatch(1)]), NET, 0.35)
    a = sum(float((w**2).sum()) for w in found.limit.weights)
    largest = 2.0 * np.mean(x**2) / (a * np.mean(x**4))
    assert found.stability < 1.0 and "unstable in mean square" in found.reason
    assert f"minimum is {largest:.3g}" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize("h", [0.33, 0.44])
def test_data_that_are_fitted_exactly(h):
    """No noise at the minimum, but what there is grows: h_c = 2 S / (a Q) for batches of one row.

    By enumeration of the nonlinear training: E r^2 of the smallest residual over all paths.
    """
    x = np.array([0.5, 1.0, 1.5, 2.0])
    problem = gf.Problem(
        gf.Regression.from_samples(x[:, None], x[:, None]), [gf.Minibatch(1, replacement=True)]
    )
    net = gf.DeepLinear([[[1.0]], [[1.0]]])
    found = gf.predict(problem, net, h)
    limit = 2.0 * np.mean(x**2) / (2.0 * np.mean(x**4))
    assert limit == pytest.approx(0.3390, abs=5e-5)
    assert found.largest_step_size == pytest.approx(limit, rel=1e-12)
    finite = row(str(found), "largest step size, mean square")[1]
    assert finite == "0.3390"
    w1, w2 = np.array([1.0 + 1e-9]), np.array([1.0])
    sizes = []
    for _ in range(6):
        m = np.repeat(x**2, w1.size)
        w1, w2 = np.tile(w1, 4), np.tile(w2, 4)
        r = w1 * w2 - 1.0
        w1, w2 = w1 - h * m * r * w2, w2 - h * m * r * w1
        sizes.append(np.mean((w1 * w2 - 1.0) ** 2))
    growth = sizes[-1] / sizes[-2]
    assert (growth > 1.0) == (h > limit)
    if h > limit:
        assert growth == pytest.approx(1.983, abs=1e-3)
        assert "unstable in mean square" in found.reason
        assert "largest stable step size at this minimum is 0.339" in found.reason
        assert math.isnan(found.imbalance_drift) and math.isnan(found.loss_floor)
    else:
        assert "unstable" not in str(found)
        assert found.loss_floor == 0.0 and found.imbalance_drift == 0.0


@pytest.mark.slow
def test_residuals_that_are_zero_up_to_rounding():
    x = np.array([[0.3], [0.8], [1.1], [1.9]])
    problem = gf.Problem(gf.Regression.from_samples(x, 1.2 * x), [gf.Minibatch(1)])
    net = gf.DeepLinear([[[np.sqrt(1.2)]], [[np.sqrt(1.2)]]])
    found = gf.predict(problem, net, 0.2)
    expected = 2.0 * np.mean(x**2) / (2.4 * np.mean(x**4))
    assert found.largest_step_size == pytest.approx(expected, rel=1e-12)
    assert "unstable" not in str(found)
    assert found.loss_floor == 0.0 and found.end_imbalance == 0.0
    beyond = gf.predict(problem, net, 0.35)
    assert "largest stable step size at this minimum is 0.3101" in beyond.reason


@pytest.mark.slow
def test_an_sde_that_is_unstable_in_mean_square_says_why_it_has_no_floor():
    """dx = -a S x dt + sqrt(h V) a x dB: E x^2 grows from h = 2 S / (a V) on, V = Var x^2."""
    x = np.array([[0.1], [0.1], [0.1], [2.0]])
    data = gf.Regression.from_samples(x, x + np.array([[0.3], [-0.3], [0.0], [0.0]]))
    h = 0.8
    found = gf.predict(gf.Problem(data, [gf.Minibatch(1)]), NET, gf.StochasticFlow(h))
    a = sum(float((w**2).sum()) for w in found.limit.weights)
    limit = 2.0 * np.mean(x**2) / (a * np.var(x**2))
    assert found.largest_step_size == pytest.approx(limit, rel=1e-9) and limit < h
    assert math.isnan(found.loss_floor) and "unstable in mean square" in found.reason
    assert f"is {limit:.4g}" in found.reason


def test_the_largest_step_size_of_other_noise_and_of_none():
    """Label noise: the edge of stability 2 (1 + beta) / lambda_max; a flow has no step size."""
    found = gf.predict(NOISY, NET, 0.1, momentum=0.5)
    assert found.stability == pytest.approx(0.1 / found.largest_step_size, rel=1e-12)
    assert found.leading_order is not None and found.leading_order.largest_step_size == math.inf
    assert math.isnan(gf.predict(NOISY, NET, gf.GradientFlow()).largest_step_size)


@pytest.mark.slow
def test_noise_that_is_zero_at_the_minimum_leaves_it_there():
    """The gradient of Bernoulli dropout vanishes at a scalar network's minimum."""
    found = gf.predict(gf.Problem(DATA, [gf.Dropout(0.01)]), NET, 0.1)
    there = found.at(steps=10**6)
    for after, before in zip(there.net.weights, found.limit.weights, strict=True):
        np.testing.assert_array_equal(after, before)
    assert found.end is not None and "random" not in str(found)


def test_a_flow_has_dashes_and_zeros():
    text = str(gf.predict(NOISY, NET, gf.GradientFlow()))
    assert row(text, "h lambda_max at the minimum reached") == ["\u2013", "\u2013"]
    assert row(text, "loss floor") == ["0", "\u2013"]


@pytest.mark.slow
def test_numerical_zeros_are_zeros_and_digits_are_equal():
    text = str(gf.predict(gf.Problem(DATA, [gf.LabelNoise(0.1)]), NET, 0.2))
    assert row(text, "end point: imbalance D") == ["0", "0"]
    assert row(text, "  |W_i+1|^2/|W_i|^2") == ["1.000", "1.000"]


@pytest.mark.slow
def test_wrong_arguments():
    program = """
        import gradflow as gf
        data, net = gf.Regression.whitened([[1.0]]), gf.DeepLinear([[[2.0]], [[0.1]]])
        problem = gf.Problem(data, [gf.LabelNoise(0.01)])
        wide = gf.DeepLinear([[[2.0, 1.0]], [[0.1]]])
        found = gf.predict(problem, net, 0.1)
        for call in [
            lambda: gf.predict(net, problem, 0.1), lambda: gf.predict(problem, problem, 0.1),
            lambda: gf.predict(problem, wide, 0.1), lambda: gf.predict(problem, net, "0.1"),
            lambda: found.at(steps="10"), lambda: found.at(steps=-5),
            lambda: found.at(1.0, steps=3),
        ]:
            try:
                call()
            except (TypeError, ValueError) as error:
                print(f"{type(error).__name__}: {error}")
            else:
                print("nothing")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    expected = [
        "TypeError: problem must be a Problem such as Problem(data, [...]); got DeepLinear.",
        "TypeError: net must be a DeepLinear; got Problem.",
        "ValueError: net: widths (2, 1, 1) do not fit the data with 1 inputs and 1 targets",
        "TypeError: dynamics must be a step size or a dynamics such as GradientDescent(0.1); got",
        "TypeError: at: steps must be a number; got '10'.",
        "ValueError: at: steps must be finite and >= 0; got -5.",
        "ValueError: at: time=1.0 and steps=3: give only one of them.",
    ]
    for line, start in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.startswith(start), (line, done.stderr)
