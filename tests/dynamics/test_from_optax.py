"""optax by name: the same runs as with the functions themselves."""

import functools

import optax
import pytest

import gradflow as gf

PROBLEM = gf.Problem(gf.Regression.whitened([[1.0]]))
NET = gf.DeepLinear([[[2.0]], [[0.1]]])


def losses(dynamics):
    return gf.simulate(PROBLEM, NET, dynamics, steps=40, save=5)["loss"]


def test_an_optimizer_by_name():
    by_name = gf.GradientDescent(0.05, optimizer=gf.FromOptax("adam", b1=0.8))
    by_function = gf.GradientDescent(0.05, optimizer=functools.partial(optax.adam, b1=0.8))
    assert (losses(by_name) == losses(by_function)).all()
    assert not (losses(by_name) == losses(gf.GradientDescent(0.05))).all()


def test_a_schedule_by_name():
    options = {"init_value": 0.1, "transition_steps": 10, "decay_rate": 0.5}
    by_name = gf.GradientDescent(gf.FromOptax("exponential_decay", **options))
    by_function = gf.GradientDescent(optax.exponential_decay(**options))
    assert (losses(by_name) == losses(by_function)).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamm", {}, "optax has no function 'adamm'"),
        ("GradientTransformation", {}, "optax has no function"),
        ("adam", {"beta": 0.9}, "does not take these options: .*'beta'"),
        ("exponential_decay", {"init_value": 0.1}, "does not take these options: missing"),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        gf.FromOptax(name, **options)


def test_a_wrong_option_is_answered_with_the_names_of_the_others():
    with pytest.raises(ValueError) as caught:
        gf.FromOptax("adam", beta=0.9)
    text = str(caught.value)
    assert "; it has b1, b2, eps, " in text and "learning_rate" not in text and len(text) < 200
