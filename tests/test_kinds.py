"""A dynamics, a regularizer, an observable, a figure and a quantity of one's own, one line each."""

import json
import math
from collections.abc import Sequence
from functools import partial

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from pydantic import Field
from specs import HEAD
from typer.testing import CliRunner

import gradflow as gf
from gradflow.checks import as_parameter
from gradflow.cli.app import app
from gradflow.dynamics import DYNAMICS
from gradflow.dynamics.ode import AbstractOdeFlow, checked_tolerances
from gradflow.kinds import Kinds, snake_case
from gradflow.observables import BUILT_IN, Observable, register
from gradflow.plot.drawing import Drawing
from gradflow.regularizers import REGULARIZERS, AbstractPenalty
from gradflow.study.results import RunResult, StudyResult
from gradflow.study.spec.claim_keys import OfComponent
from gradflow.study.spec.claim_tables import CLAIMS, Measurement
from gradflow.study.spec.figure_tables import FIGURES, RunsFigure


class ToyPenalty(AbstractPenalty):
    """Half the squared weights times a strength.

    **Arguments:**

    - `strength`: how strong it is, >= 0.
    """

    strength: jnp.ndarray = eqx.field(converter=partial(as_parameter, name="ToyPenalty.strength"))

    @property
    def is_stochastic(self):
        return False

    def penalty(self, weights):
        return 0.5 * self.strength * sum(jnp.sum(w * w) for w in weights)

    def penalty_gradient(self, weights):
        return tuple(self.strength * w for w in weights)


class ToyFlow(AbstractOdeFlow):
    """Gradient flow at another speed.

    **Arguments:**

    - `speed`: how many times faster it is.
    """

    speed: float = eqx.field(static=True)
    rtol: jnp.ndarray
    atol: jnp.ndarray
    solver: diffrax.AbstractSolver
    step_size: None

    def __init__(self, speed: float = 1.0):
        self.speed = speed
        self.rtol, self.atol = checked_tolerances("ToyFlow", 1e-9, 1e-11)
        self.solver = diffrax.Dopri8()
        self.step_size = None

    def check(self, problem, weights):
        """Nothing."""

    def auxiliary(self, problem, weights):
        return ()

    def field(self, t, state, problem):
        return (tuple(-self.speed * g for g in problem.averaged_gradient(state[0])),)


TOY_GAP = Observable(
    "toy_gap",
    "gap of the toy",
    "weight^2",
    lambda net, problem, dynamics: jnp.sum(net.weights[0] ** 2) - jnp.sum(net.weights[1] ** 2),
)


class ToyBars(RunsFigure):
    """A bar a run, as high as an observable at the end."""

    observable: str = Field(description="what the bars show")

    def draw(self, result: StudyResult) -> Drawing:
        """Draws the bars."""
        figure = Figure()
        ends = [run.trajectory[self.observable][..., -1] for run in result.runs.values()]
        figure.subplots().bar(list(result.runs), ends)
        return Drawing(figure, "Bars of a toy.")


class ToyShrinkage(OfComponent):
    """How many times smaller an observable is at the end than at the start."""

    power: int = Field(default=1, ge=1, description="of the factor, a whole number >= 1")

    def measure(self, found: Sequence[RunResult]) -> Measurement:
        """Divide the ends."""
        (run,) = found
        values = np.asarray(run.trajectory[self.observable])
        return Measurement(float(values[0] / values[-1]) ** self.power)


STRENGTH, SPEED, TIME = 0.25, 2.0, 1.5

SPEC = (
    HEAD
    + f"""\
[[run]]
name = "toy"
dynamics = {{ kind = "ToyFlow", speed = {SPEED} }}
regularizers = [{{ kind = "ToyPenalty", strength = {STRENGTH} }}]
t1 = {TIME}
observables = ["toy_gap", "loss"]
[[figure]]
kind = "toy_bars"
name = "bars"
observable = "toy_gap"
[[claim]]
sentence = "The penalty shrinks the gap at twice its strength, times the speed."
run = "toy"
quantity = "toy_shrinkage"
observable = "toy_gap"
power = 2
expected = {math.exp(2 * 2 * STRENGTH * SPEED * TIME)}
tolerance = 1e-6
"""
)


@pytest.fixture(autouse=True)
def registries():
    """Toys of each concept, registered for one test."""
    kinds = (DYNAMICS, REGULARIZERS, FIGURES, CLAIMS)
    before = [(known, dict(known)) for known in (*(kind._kinds for kind in kinds), BUILT_IN)]
    DYNAMICS.register(ToyFlow)
    REGULARIZERS.register(ToyPenalty)
    FIGURES.register(ToyBars)
    CLAIMS.register(ToyShrinkage)
    register(TOY_GAP)
    yield
    for known, kept in before:
        known.clear()
        known.update(kept)


def call(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.slow
def test_a_study_of_toys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(SPEC)
    result = call("study", "toy.toml", "--workers", "1", "--out", "out")
    assert result.exit_code == 0, result.output
    (claim,) = json.loads((tmp_path / "out" / "claims.json").read_text())["claims"]
    # d/dt (w1^2 - w2^2) = -2 strength speed (w1^2 - w2^2): the loss alone conserves it.
    assert claim["verdict"] == "holds"
    assert claim["measured"] == pytest.approx(math.exp(3.0), rel=1e-7)
    assert (tmp_path / "out" / "figures" / "bars.png").stat().st_size > 1000
    (run,) = json.loads((tmp_path / "out" / "spec.json").read_text())["run"]
    assert run["dynamics"] == {"kind": "ToyFlow", "speed": SPEED}

    run = gf.Trajectory.load(tmp_path / "out" / "runs" / "toy.nc")
    assert eqx.tree_equal(run.dynamics, ToyFlow(SPEED))
    assert eqx.tree_equal(run.problem.regularizers, (ToyPenalty(STRENGTH),))
    again = gf.simulate(
        run.problem, run.start[0], run.dynamics, t1=TIME, save=2, observables=["toy_gap"]
    )
    assert again["toy_gap"] == pytest.approx(run["toy_gap"][[0, -1]], rel=1e-6)


def test_wrong_keys_of_toys_are_told_as_those_of_others(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(
        SPEC.replace("speed = ", "sped = ").replace("power = 2", "power = 0")
        .replace('observable = "toy_gap"\n[[claim]]', "[[claim]]")
    )  # fmt: skip
    lines = [line.partition("toml:")[2] for line in call("study", str(path)).stderr.splitlines()]
    assert lines == [
        '10: run "toy", dynamics.sped: unknown key; did you mean "speed"? allowed here: kind, '
        "speed",
        '14: figure "bars", observable: is missing; give what the bars show',
        "22: claim 1, power: got 0; allowed: of the factor, a whole number >= 1",
    ]
    path.write_text(SPEC.replace("toy_bars", "toy_bar").replace("toy_shrinkage", "shrinkage"))
    told = call("study", str(path)).stderr
    assert 'figure "bars", kind: got "toy_bar"; did you mean "toy_bars"? allowed: ' in told
    assert 'claim 1, quantity: got "shrinkage"; did you mean "toy_shrinkage"? allowed: ' in told
    path.write_text(SPEC.replace('"toy_shrinkage"', "[1]"))
    assert 'claim 1, quantity: got "[1]"; allowed: ' in call("study", str(path)).stderr


def test_the_command_kinds_lists_them_with_their_keys(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    listed = [" ".join(line.split()) for line in call("kinds").stdout.splitlines()]
    assert {
        "ToyFlow Gradient flow at another speed",
        "ToyPenalty Half the squared weights times a strength",
        "toy_gap gap of the toy",
        "toy_bars A bar a run, as high as an observable at the end",
        "toy_shrinkage How many times smaller an observable is at the end than at the start",
        "Dynamics", "Regularizers", "Observables", "Figures", "Claim quantities",
    } <= set(listed)  # fmt: skip
    keys = {
        "ToyFlow": "speed number 1.0 how many times faster it is",
        "ToyPenalty": "strength number required how strong it is, >= 0",
        "toy_gap": "Units weight^2",
        "toy_bars": "observable text required what the bars show",
        "toy_shrinkage": "power whole number 1 of the factor, a whole number >= 1",
    }
    together = call("kinds", *keys).stdout.splitlines()
    for name, line in keys.items():
        alone = call("kinds", name).stdout.splitlines()
        assert line in {" ".join(row.split()) for row in alone}, alone
        assert {*alone} <= {*together}
    wrong = call("kinds", "ToyFlaw", "toy_gap")
    assert wrong.exit_code == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith('NAME: got "ToyFlaw"; did you mean "ToyFlow"? known: ')


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="'loss' is built in"):
        register(Observable("loss", "mine", "1", TOY_GAP.evaluate))
    with pytest.raises(ValueError, match="'time' is taken"):
        register(Observable("time", "mine", "1", TOY_GAP.evaluate))
    with pytest.raises(ValueError, match="claim quantities: the name 'rate' is taken by a class"):
        CLAIMS.register(type("Rate", (ToyShrinkage,), {"__module__": __name__}))
    with pytest.raises(TypeError, match=r"figures: Unfinished .* without draw; define"):
        FIGURES.register(type("Unfinished", (RunsFigure,), {"__module__": __name__}))
    assert register(TOY_GAP) is TOY_GAP
    assert CLAIMS.register(ToyShrinkage) is CLAIMS["toy_shrinkage"]


def test_names_in_snake_case():
    names = {"Rate": "rate", "TimeSeries": "time_series", "GdIdentity": "gd_identity"}
    kinds = Kinds("toys", snake_case)
    for name in names:
        kinds.register(type(name, (), {}))
    assert list(kinds) == list(names.values())
