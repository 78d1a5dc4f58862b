"""Large weights whose rounding decides the loss are said, others are not."""

import warnings

import numpy as np
import pytest

import gradflow as gf

PROBLEM = gf.Problem(gf.Regression.whitened([[1.0]]))


def net_of(*weights):
    return gf.DeepLinear([[[w]] for w in weights])


@pytest.mark.parametrize(
    ("start", "dynamics"),
    [
        ((1e18, 1.0), gf.ExactFlow()),
        ((1e8, 1.0), gf.GradientFlow(conservative=True)),
        ((1e-300, 1e150), gf.GradientFlow()),
    ],
)
def test_a_loss_that_rounding_decides_is_said(start, dynamics):
    """All of these end at loss 0: the second weight is 1 over the first, which numbers can hold."""
    with pytest.warns(gf.RoundingWarning, match=r"at t = 1 weights of size .* it is not known"):
        run = gf.simulate(PROBLEM, net_of(*start), dynamics, t1=1.0, save=3)
    assert run["loss"][-1] > 1e-5


@pytest.mark.parametrize("size", [1.0, 1e4, 1e6])
@pytest.mark.parametrize(
    "dynamics", [gf.ExactFlow(), gf.GradientFlow(), gf.GradientFlow(conservative=True)]
)
def test_a_loss_that_is_right_is_not_doubted(size, dynamics):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = gf.simulate(PROBLEM, net_of(size, 1.5), dynamics, t1=20.0, save=3)
    np.testing.assert_allclose(run["loss"][-1], 0.0, atol=1e-9)
