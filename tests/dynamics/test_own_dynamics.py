"""A dynamics of one's own is one class: what the package knows of it stands there."""

from typing import Any, ClassVar

import jax
import numpy as np
import pytest

import gradflow as gf
from gradflow.analysis.convergence.coupling import couple
from gradflow.dynamics.base import AbstractDynamics, Role
from gradflow.dynamics.normals import check_normals
from gradflow.observables import observe, resolve

H = 0.1
SGD = gf.GradientDescent(H)
NET = gf.DeepLinear([[[2.0]], [[0.5]]])
PROBLEM = gf.Problem(gf.Regression.whitened([[1.5]]), [gf.LabelNoise(0.3)])


class Bare(AbstractDynamics):
    """SGD that says nothing beyond how it moves."""

    step_size: Any
    mover: gf.GradientDescent

    @property
    def ticks_per_step(self) -> int:
        return 1

    def is_random(self, problem: Any) -> bool:
        return problem.is_stochastic

    def check(self, problem: Any, weights: Any) -> None: ...

    def init(self, problem: Any, weights: Any) -> Any:
        return self.mover.init(problem, weights)

    def noise_shapes(self, problem: Any, widths: Any) -> Any:
        return self.mover.noise_shapes(problem, widths)

    def advance(
        self, problem: Any, state: Any, start: Any, stop: Any, source: Any, block: int
    ) -> Any:
        return self.mover.advance(problem, state, start, stop, source, block)


class Own(Bare):
    """The same with everything that `GradientDescent` says of itself."""

    role: ClassVar[Role | None] = Role.TRAINING

    @property
    def discrete_training(self) -> Any:
        return self

    @property
    def rate_theory(self) -> Any:
        return "finite_step"

    def theory_options(self) -> dict[str, Any]:
        return {"discrete": True}

    @property
    def grid_steps(self) -> int:
        return self.mover.path_substeps

    def follows_path(self, problem: Any) -> bool:
        return problem.is_gaussian

    def on_grid(self, steps: int) -> Any:
        return Own(self.step_size, self.mover.on_grid(steps))


BARE, OWN = (kind(SGD.step_size, SGD) for kind in (Bare, Own))


def seen(name: str, dynamics: Any) -> float:
    weights = tuple(w[..., None] for w in NET.weights)
    return observe(resolve([name]), weights, PROBLEM, dynamics)[name].item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss_floor", "imbalance_drift"])
def test_observables_take_its_theory(name: str):
    assert seen(name, OWN) == seen(name, SGD) != 0.0
    with pytest.raises(ValueError, match="no imbalance_drift for Bare; leave them out"):
        seen(name, BARE)


def test_it_is_predicted():
    own, known = (gf.predict(PROBLEM, NET, d) for d in (OWN, SGD))
    assert own.imbalance_rate == known.imbalance_rate > 0.0
    assert own.loss_floor == known.loss_floor
    with pytest.raises(ValueError, match=r"predictions cover .*; got Bare"):
        gf.predict(PROBLEM, NET, BARE)


def test_it_shares_a_brownian_path():
    flow = gf.StochasticFlow(H, substeps=4)
    pair = couple(PROBLEM, NET.widths, OWN, flow)
    assert pair.paired and pair.description == "common Brownian path, 4 substeps"
    assert pair.first.grid_steps == 4
    assert not couple(PROBLEM, NET.widths, BARE, flow).paired


def test_normals_are_the_noise_of_training_unless_it_says_otherwise():
    check_normals(gf.Normals(antithetic=True), BARE, PROBLEM, NET.widths)
    with pytest.raises(ValueError, match="the normals of Bare are the noise of training itself"):
        check_normals(gf.Normals(law="two-point"), BARE, PROBLEM, NET.widths)


def test_it_runs_as_what_it_is():
    options: dict[str, Any] = {"steps": 20, "replicas": 3, "key": jax.random.key(0)}
    own, known = (gf.simulate(PROBLEM, NET, d, **options) for d in (OWN, SGD))
    np.testing.assert_array_equal(own["imbalance"], known["imbalance"])
