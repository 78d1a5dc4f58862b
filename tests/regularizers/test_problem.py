"""Problems and regularizers: what they report and what they refuse."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from compiled import draws

import gradflow as gf
from gradflow.random.streams import Stream

DATA = gf.Regression.whitened([[1.0, 0.5]], n=4)


def test_parts_of_a_problem():
    labels, inputs = gf.LabelNoise(0.5), gf.InputNoise(0.2)
    decay, batch = gf.WeightDecay(0.1), gf.Minibatch(3)
    problem = gf.Problem(DATA, [labels, decay, batch, inputs])
    assert problem.regularizers == (labels, decay, batch, inputs)
    assert problem.data_noise == (labels, inputs)
    assert problem.penalties == (decay,)
    assert problem.minibatch is batch
    assert problem.layer_noise == ()
    assert float(problem.batch) == 3.0
    assert float(gf.Problem(DATA).batch) == 4.0
    np.testing.assert_allclose(problem.input_variance, 0.04)
    np.testing.assert_allclose(problem.input_moment, 1.04 * np.eye(2))


@pytest.mark.parametrize(
    ("regularizer", "field"),
    [
        (gf.LabelNoise, "LabelNoise.std"),
        (gf.InputNoise, "InputNoise.std"),
        (gf.WeightDecay, "WeightDecay.rate"),
    ],
)
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_refused_strengths(regularizer, field, value):
    message = f"{field} must be a finite number >= 0; got {value}."
    with pytest.raises(ValueError, match=re.escape(message)):
        regularizer(value)


@pytest.fixture
def without_type_checks():
    """As a user calls gradflow, whose own messages then speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checks")
def test_refused_types():
    with pytest.raises(TypeError, match=r"Problem\.data must be a Regression; got DeepLinear\."):
        gf.Problem(gf.DeepLinear([[[1.0]]]))
    with pytest.raises(TypeError, match=r"must hold regularizers such as.*got float\."):
        gf.Problem(DATA, [0.1])
    with pytest.raises(TypeError, match=r"Problem\.regularizers must be a list.*\[LabelNoise"):
        gf.Problem(DATA, gf.LabelNoise(0.1))


@pytest.mark.usefixtures("without_type_checks")
def test_a_strength_is_one_number():
    with pytest.raises(ValueError, match=r"LabelNoise\.std must be a single number; got shape"):
        gf.LabelNoise(np.ones(2))


def test_strengths_are_traced():
    """A sweep over a strength neither recompiles nor checks inside of jit."""
    traces = []

    @jax.jit
    def variance(std):
        traces.append(std)
        return gf.Problem(DATA, [gf.InputNoise(std)]).input_variance

    np.testing.assert_allclose([variance(0.1), variance(0.2)], [0.01, 0.04])
    assert len(traces) == 1


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("rows", [False, True], ids=["Gaussian", "rows"])
def test_every_noise_has_numbers_of_its_own(rows):
    """And they depend on its place alone: the noises after it change nothing."""
    if rows:
        data = gf.Regression.from_samples(np.eye(2), np.eye(2))
        noises = [gf.InputNoise(0.1), gf.LabelNoise(0.2), gf.LabelNoise(0.3)]
    else:
        data, noises = DATA, [gf.LabelNoise(0.1), gf.LabelNoise(0.2), gf.LabelNoise(0.3)]
    stream = Stream(jax.random.key(2), jnp.arange(20), jnp.arange(50))
    widths = (data.d_in, data.d_out)
    drawn = [np.asarray(d).ravel() for d in draws(gf.Problem(data, noises), stream, widths)]
    correlations = np.corrcoef(drawn) - np.eye(3)
    assert np.abs(correlations).max() < 4 / np.sqrt(drawn[0].size)
    (first,) = draws(gf.Problem(data, noises[:1]), stream, widths)
    assert np.array_equal(np.asarray(first).ravel(), drawn[0])


@pytest.mark.parametrize(
    ("regularizers", "message"),
    [
        ([gf.Minibatch(1), gf.Minibatch(2)], "2 x Minibatch given; choose one batch size."),
        (
            [gf.InputNoise(0.1), gf.LabelNoise(0.2), gf.InputNoise(0.1)],
            "2 x InputNoise given; give one with std = sqrt(std_1^2 + std_2^2).",
        ),
    ],
)
def test_refused_combinations(regularizers, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gf.Problem(DATA, regularizers)


def test_several_weight_decays_and_label_noises_add_up():
    net = gf.DeepLinear([jnp.ones((1, 2))])
    several = gf.Problem(DATA, [gf.WeightDecay(0.1), gf.WeightDecay(0.2)])
    one = gf.Problem(DATA, [gf.WeightDecay(0.1 + 0.2)])
    for a, b in zip(
        several.averaged_gradient(net.weights), one.averaged_gradient(net.weights), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-14)


def test_it_is_printed_with_its_data_and_the_numbers_of_its_regularizers():
    data = gf.Regression.whitened([[1.0]])
    noises = [gf.LabelNoise(0.5), gf.Dropout(0.25, layers=[1]), gf.WeightDecay(1e-3)]
    inner = "Regression(Gaussian population, 1 input, 1 target, least loss 0)"
    words = "LabelNoise(std=0.5), Dropout(rate=0.25, layers=(1,)), WeightDecay(rate=0.001)"
    assert repr(gf.Problem(data, noises)) == f"Problem({inner}, [{words}])"
    assert repr(gf.Problem(data)) == f"Problem({inner}, [])"
    penalty = gf.Penalty(lambda weights: 0.0 * weights[0].sum(), name="none")
    assert repr(penalty) == "Penalty(function=<lambda>, name='none')"
    seen = []
    jax.jit(lambda s: seen.append(repr(gf.Problem(data, [gf.LabelNoise(s)]))) or s)(0.1)
    assert seen == [f"Problem({inner}, [LabelNoise(std=traced)])"]
