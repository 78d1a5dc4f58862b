"""The flow by closed forms: which form is chosen, and runs against SciPy."""

import numpy as np
import pytest
import training

import gradflow as gf

rng = np.random.default_rng(3)
GENERAL = [rng.normal(size=(3, 2)), rng.normal(size=(2, 3))]
TARGET = np.array([[2.0, 0.3], [-0.1, 1.0]])
W1, W2 = 0.5 * np.eye(2), np.array([[0.0, -0.5], [0.5, 0.0]])


def scalar(*values: float) -> gf.DeepLinear:
    return gf.DeepLinear([[[value]] for value in values])


def white(target: object, *regularizers: gf.AbstractRegularizer) -> gf.Problem:
    return gf.Problem(gf.Regression.whitened(target), regularizers)


CHOICES = [
    (white(TARGET, gf.WeightDecay(0.1), gf.InputNoise(0.4)), gf.DeepLinear([W1]), "linear"),
    (white([[1.0]], gf.LabelNoise(0.3)), scalar(2.0, -0.1), "channel"),
    (white([[1.0]], gf.WeightDecay(0.1)), scalar(2.0, -0.1), "decaying channel"),
    (white([[1.0]], gf.WeightDecay(0.0)), scalar(2.0, -0.1), "channel"),
    (white([[1.0]], gf.InputNoise(0.5)), scalar(0.5, 0.3, 1.0), "scalar chain"),
    (white(np.diag([2.0, 1.0])), gf.DeepLinear([W1, np.eye(2)]), "aligned pairs"),
    (
        white(np.diag([2.0, 1.0]), gf.WeightDecay(0.1), gf.Minibatch(3)),
        gf.DeepLinear([W1, np.eye(2)]),
        "aligned pairs",
    ),
    (white(np.diag([2.0, 1.0])), gf.DeepLinear([W1, W1, np.eye(2)]), "aligned chains"),
    (white(TARGET, gf.InputNoise(0.4)), gf.DeepLinear([W1, W2]), "riccati"),
    (white(TARGET, gf.WeightDecay(0.1)), gf.DeepLinear([W1, W2]), "riccati"),
]


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("problem", "net", "form"), CHOICES)
def test_chooses_a_form_and_agrees_with_scipy(problem: gf.Problem, net: gf.DeepLinear, form: str):
    assert gf.ExactFlow().closed_form(problem, net) == form
    times = [0.0, 0.01, 0.5, 2.0, 5.0]
    run = gf.simulate(problem, net, gf.ExactFlow(), t1=5.0, save=times, observables=["loss"])
    decay = float(problem.weight_decay)
    start = [np.asarray(w) for w in net.weights]
    sxx, syx = np.asarray(problem.input_moment), np.asarray(problem.data.syx)
    expected = training.flow(start, sxx, syx, times, decay=decay, rtol=1e-13)
    for actual, exact in zip(run.weights, expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=0.0, atol=2e-12)


def test_marks_do_not_change_the_answer():
    problem, net = CHOICES[-1][:2]
    few = gf.simulate(problem, net, gf.ExactFlow(), t1=5.0, save=2, observables=["loss"])
    many = gf.simulate(problem, net, gf.ExactFlow(), t1=5.0, save=41, observables=["loss"])
    for a, b in zip(few.weights, many.weights, strict=True):
        np.testing.assert_allclose(a[-1], b[-1], rtol=0.0, atol=1e-14)


@pytest.mark.slow
def test_replicas_share_a_form_and_run_from_their_own_starts():
    problem = white([[1.0]])
    nets = [scalar(2.0, -0.1), scalar(0.3, 0.4), scalar(1e10, 1e10)]
    run = gf.simulate(problem, nets, gf.ExactFlow(), t1=3.0, save=4, observables=["loss"])
    assert not run.diverged.any()
    for k in range(3):
        alone = gf.simulate(problem, nets[k], gf.ExactFlow(), t1=3.0, save=4, observables=["loss"])
        for a, b in zip(run.weights, alone.weights, strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-14)


@pytest.mark.slow
def test_a_form_can_be_asked_for():
    problem, net = white([[1.0]]), scalar(2.0, -0.1)
    runs = [
        gf.simulate(problem, net, gf.ExactFlow(form=form), t1=3.0, save=4, observables=["loss"])
        for form in ("channel", "scalar chain", "aligned pairs", "riccati")
    ]
    for run in runs[1:]:
        for a, b in zip(run.weights, runs[0].weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=0.0, atol=1e-13)


def test_says_of_every_form_why_it_does_not_apply():
    with pytest.raises(ValueError) as caught:
        gf.ExactFlow().closed_form(white(TARGET), gf.DeepLinear(GENERAL))
    for part in (
        "linear: depth is 2, not 1",
        r"channel: widths are (2, 3, 2), not (1, k, 1)",
        "scalar chain: widths are (2, 3, 2)",
        "aligned pairs: layers, input moment and target share no singular directions",
        "riccati: W_2^T W_2 - W_1 W_1^T is not a multiple of the identity",
        "Use GradientFlow",
    ):
        assert part in str(caught.value)


UNEVEN = gf.Problem(gf.Regression.from_moments(sxx=np.diag([1.0, 2.0]), syx=TARGET))
EMPTY = gf.Problem(gf.Regression.from_moments(sxx=[[0.0]], syx=[[0.0]]))


@pytest.mark.parametrize(
    ("form", "problem", "net", "reason"),
    [
        ("channel", white([[1.0]], gf.WeightDecay(0.1)), scalar(1.0, 2.0), "weight decay 0.1"),
        ("decaying channel", white([[1.0]]), scalar(1.0, 2.0), "weight decay is 0"),
        ("scalar chain", EMPTY, scalar(1.0, 2.0), "the inputs are all 0"),
        ("scalar chain", white([[1.0]]), scalar(1.0), "depth 2 or more"),
        ("aligned chains", white([[1.0]]), scalar(1.0), "depth is 1"),
        ("riccati", UNEVEN, gf.DeepLinear([W1, W2]), "input moment is not a positive multiple"),
        (
            "riccati",
            white(TARGET, gf.WeightDecay(0.1)),
            gf.DeepLinear([W1, 2.0 * W2]),
            r"weight decay 0.1 needs a balanced start, but .* is 0.75 I",
        ),
        ("linear", white(TARGET, gf.WeightNoise(0.1)), gf.DeepLinear([W1]), "WeightNoise changes"),
    ],
)
def test_reasons(form: str, problem: gf.Problem, net: gf.DeepLinear, reason: str):
    with pytest.raises(ValueError, match=f"not applicable here .{form}: .*{reason}"):
        gf.simulate(problem, net, gf.ExactFlow(form=form), t1=1.0)


def test_names_the_path_that_a_form_does_not_fit():
    nets = [gf.DeepLinear([W1, W2]), gf.DeepLinear([W1, 2.0 * W2 + np.diag([1.0, 0.0])])]
    with pytest.raises(ValueError, match="riccati: path 1: W_2"):
        gf.simulate(white(TARGET), nets, gf.ExactFlow(), t1=1.0)


def test_refuses_an_unknown_form():
    with pytest.raises(ValueError, match=r"ExactFlow.form must be one of linear, .*; got 'magic'"):
        gf.ExactFlow(form="magic")
