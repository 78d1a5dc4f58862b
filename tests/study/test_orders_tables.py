"""[[orders]] tables from the spec to results, claims, figures and the page."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from specs import HEAD, RUN

import gradflow as gf
from gradflow.analysis.convergence.results import OrderPoints, OrderRow, Orders
from gradflow.report.draw import draw_figures
from gradflow.report.page import write_page
from gradflow.report.tables import order_lines
from gradflow.study.figures.orders import Orders as OrdersFigure
from gradflow.study.results import OrdersResult, StudyResult
from gradflow.study.run.build import prepare
from gradflow.study.run.output import ResultFolder
from gradflow.study.run.record import status, write_spec
from gradflow.study.run.runner import run_study
from gradflow.study.spec.claim_tables import CLAIMS
from gradflow.study.spec.load import SpecError
from gradflow.study.spec.order_tables import OrdersSpec
from gradflow.study.spec.spec import StudySpec

TABLE = """\
[[orders]]
name = "descent_and_flow"
label = "Descent and flow"
first = { kind = "GradientDescent" }
second = { kind = "GradientFlow", rtol = 1e-11, atol = 1e-13 }
step_sizes = [0.1, 0.05, 0.025, 0.0125]
t1 = 1.0
observables = ["weights", "imbalance"]
"""
CLAIM = """\
[[claim]]
sentence = "x"
orders = "descent_and_flow"
quantity = "order"
"""


@pytest.mark.slow
def test_a_table_is_measured_judged_and_drawn(load, tmp_path):
    text = (
        HEAD + TABLE + CLAIM + "expected = 1.0\nabsolute_tolerance = 0.1\n"
        + CLAIM.replace('"order"', '"order_status"')
        + 'observable = "weights"\nexpected = "resolved"\n[[figure]]\nkind = "orders"\n'
    )  # fmt: skip
    study = load(text)
    prepared = prepare(study)
    result = run_study(study, prepared, tmp_path)
    assert result.errors == {} and result.status == "complete"
    assert [claim.verdict for claim in result.claims] == ["holds", "holds"]
    assert result.claims[0].runs == ("descent_and_flow",)
    table = pd.read_csv(tmp_path / "orders" / "descent_and_flow.csv")
    assert set(table["observable"]) == {"weights", "imbalance"} and len(table) == 8
    # the distance at h = 0.1, from the two dynamics themselves
    problem = gf.Problem(gf.Regression.whitened([[1.0]]))
    net = gf.DeepLinear([[[2.0]], [[0.1]]])
    ends = [
        gf.simulate(problem, net, dynamics, t1=1.0, save=2).network(-1).weights
        for dynamics in (gf.GradientDescent(0.1), gf.GradientFlow(1e-11, 1e-13))
    ]
    gap = math.sqrt(sum(float(np.sum((a - b) ** 2)) for a, b in zip(*ends, strict=True)))
    text = (tmp_path / "orders" / "descent_and_flow.json").read_text()
    record = json.loads(text)
    measured = result.orders["descent_and_flow"].orders
    assert (record["distance"], record["first"]) == ("strong", "GradientDescent")
    assert record["overall"]["order"] == measured.order() and record["interrupted"] is False
    for written, row in zip(record["rows"], measured.rows, strict=True):
        assert written["observable"] == row.observable and written["status"] == row.status
        assert written["low"] == row.low and written["asymptotic_range"] == [*row.asymptotic_range]
        assert written["replicas_needed"] is None and written["reason"] == row.reason
    row = table[(table["observable"] == "weights") & np.isclose(table["step_size"], 0.1)]
    assert float(row["error"].iloc[0]) == pytest.approx(gap, rel=1e-7)
    (figure,) = draw_figures(result)
    assert figure.png.stat().st_size > 5000
    page = write_page(result, [figure]).read_text("utf-8")
    assert "<h2>Orders</h2>" in page and "Descent and flow" in page


def test_a_random_table_needs_replicas(load):
    text = HEAD + TABLE + 'regularizers = [{ kind = "LabelNoise", std = 0.5 }]\n'
    with pytest.raises(SpecError, match=r'orders "descent_and_flow": .*give replicas'):
        prepare(load(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace('"imbalance"', '"imbalanc"'), 'observables.1.: got "imbalanc"; did you'),
        (TABLE.replace("t1 = 1.0", "t1 = 0.05"), "step_sizes: got 0.1 above t1 = 0.05"),
        (TABLE.replace("0.0125]", "0.1]"), "step_sizes: .*allowed: different step sizes"),
        (TABLE + TABLE, "name: got .* again; allowed: a name that no other orders has"),
        (TABLE + RUN.replace('"flow"', '"descent_and_flow"'), "the name of a run; choose another"),
        (TABLE + CLAIM, "has no check"),
        (TABLE + CLAIM + 'run = "flow"\nat_most = 1.0\n', "run: unknown key; allowed"),
        (TABLE + CLAIM.replace("_and_", "_or_") + "at_most = 1.0\n", "did you mean"),
        (TABLE + CLAIM + 'observable = "loss"\nat_most = 1.0\n', 'observable: got "loss"'),
        (TABLE + CLAIM.replace('"order"', '"order_status"') + 'expected = "resolved"\n',
         "needs an observable"),
        (TABLE + '[[figure]]\nkind = "orders"\norders = ["other"]\n', r"orders.0.: got \"other\""),
        (RUN + '[[figure]]\nkind = "orders"\n', "the study has none; add one"),
        (RUN + '[[claim]]\nsentence = "x"\nrun = "flow"\norders = "a"\nquantity = "final"\n'
         'observable = "loss"\nat_most = 1.0\n', "orders: unknown key; allowed"),
        ("", r"a study needs at least one \[\[run\]\] or \[\[orders\]\] table"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(load, text, message):
    with pytest.raises(SpecError, match=message):
        prepare(load(HEAD + text))


SECOND = '{ kind = "GradientFlow", rtol = 1e-11, atol = 1e-13 }'


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (TABLE.replace('Descent" }', 'Descent", step_size = 0.1 }'),
         ["11: {}, first.step_size: got 0.1; the step sizes are those of step_sizes; leave it "
          "out"]),
        (TABLE.replace('Descent" }', 'Descent", step_size = "a" }').replace("0.0125]", "-1]"),
         ["11: {}, first.step_size: got \"a\"; the step sizes are those of step_sizes; leave it "
          "out", "13: {}, step_sizes[3]: got -1; allowed: a number > 0"]),
        (TABLE.replace(", 0.025, 0.0125", ""),
         ["13: {}, step_sizes: got [0.1, 0.05]; allowed: a list of at least three step sizes > "
          "0"]),
        (TABLE.replace("0.025, 0.0125", "0.0999"),
         ["13: {}, step_sizes: got 2 that divide t1 = 1 after rounding (0.1, 0.05); an order needs "
          "3"]),
        (TABLE.replace("[0.1, 0.05, 0.025, 0.0125]", '"small"'),
         ['13: {}, step_sizes: got "small"; allowed: a list of at least three step sizes > 0']),
        (TABLE.replace('kind = "GradientDescent"', 'kind = "ExactFlow"'),
         ["12: {}, second: got GradientFlow beside ExactFlow; neither has a step size, so nothing "
          "depends on step_sizes"]),
        (TABLE + 'regularizers = [{ kind = "Dropout", rate = 0.1, layers = [7] }]\n',
         ["16: {}, regularizers: Dropout.layers: 7 is not a hidden layer"]),
        (TABLE.replace(SECOND, '{ kind = "StochasticFlow" }') + "replicas = 10\n"
         'regularizers = [{ kind = "Dropout", rate = 0.1 }]\ndistance = "strong"\n',
         ['18: {}, distance: got "strong"; GradientDescent and StochasticFlow share no noise']),
    ],
)  # fmt: skip
def test_what_is_knowable_before_computing_is_said_before(load, text, messages):
    with pytest.raises(SpecError) as caught:
        prepare(load(HEAD + text))
    said = [line.partition("spec.toml:")[2] for line in str(caught.value).splitlines()]
    table = 'orders "descent_and_flow"'
    assert len(said) == len(messages)
    for line, message in zip(said, messages, strict=True):
        assert line.startswith(message.format(table))


def test_a_misspelled_list_of_step_sizes_is_the_only_error(load):
    with pytest.raises(SpecError) as caught:
        load(HEAD + TABLE.replace("step_sizes", "step_size"))
    missing, unknown = str(caught.value).splitlines()
    assert "step_sizes: is missing" in missing
    assert 'step_size: unknown key; did you mean "step_sizes"?' in unknown


@pytest.mark.slow
def test_the_record_of_what_was_not_reached(load, tmp_path):
    study = load(HEAD + TABLE)
    folder = ResultFolder(tmp_path / "out")
    write_spec(folder, study)
    (table,) = json.loads((folder.path / "spec.json").read_text())["orders"]
    assert "step_size" not in table["first"] and table["step_sizes"][0] == 0.1
    result = run_study(study, prepare(study), folder.path)
    stopped = status(replace(result, orders={}, status="interrupted"), study)
    assert stopped["orders"] == {"descent_and_flow": {"status": "nothing recorded"}}
    broken = replace(result, orders={}, errors={"descent_and_flow": "x"})
    assert status(broken, study)["orders"]["descent_and_flow"] == {"status": "failed"}


def test_the_page_says_what_was_interrupted_and_keeps_the_digits_of_step_sizes():
    row = replace(_row("loss", 1.0), asymptotic_range=(0.025, 0.1))
    spec = _spec()
    for interrupted, said in ((False, "resolved"), (True, "resolved (interrupted)")):
        measured = _orders((row,), None, interrupted=interrupted)
        result = StudyResult(StudySpec(name="s", orders=[spec]), {}, (), Path(), 1.0,
                             orders={"a": OrdersResult("a", "a", spec, measured)})  # fmt: skip
        (line,) = order_lines(result)
        assert line.status == said and line.range == "[0.025, 0.1]"


def test_a_figure_of_strong_and_weak_tables_is_of_neither():
    points = OrderPoints("loss", "loss", "", H, H, 0.01 * H, 0 * H, np.full(3, 9), np.zeros(3, int),
                         np.full(3, True), np.full(3, True))  # fmt: skip
    spec, row = _spec(), replace(_row("loss", 1.0), asymptotic_range=(0.025, 0.1))
    tables = {}
    for kind in ("weak", "strong"):
        measured = replace(_orders((row,), row), kind=kind, points=(points,))
        tables[kind] = OrdersResult(kind, f"table of {kind}", spec, measured)
    result = StudyResult(StudySpec(name="s", orders=[spec]), {}, (), Path(), 1.0, orders=tables)
    both = OrdersFigure(kind="orders").draw(result)
    assert both.figure.axes[0].get_ylabel().startswith("difference")
    assert "table of weak: weak; table of strong: strong" in both.caption
    weak = OrdersFigure(kind="orders", orders=["weak"]).draw(result)
    assert weak.figure.axes[0].get_ylabel().startswith("weak difference")


H = np.array([0.1, 0.05, 0.025])


def _spec():
    return OrdersSpec.model_validate(
        {"name": "a", "first": {"kind": "GradientDescent"}, "second": {"kind": "GradientFlow"},
         "step_sizes": [0.1, 0.05, 0.025], "t1": 1.0}
    )  # fmt: skip


def _orders(rows, overall, *, interrupted=False):
    return Orders(rows, (), overall, "a", "b", "weak", True, "", (1.0,), 0.95, (), interrupted)


def _row(observable, order, status="resolved"):
    resolved = status == "resolved"
    value = order if resolved else math.nan
    return OrderRow(observable, value, value - 0.196, value + 0.196, 0.95, status,
                    (0.01, 0.1) if resolved else None, "because", None)  # fmt: skip


def _measure(quantity, *rows, observable=None, overall=None):
    keys = {"sentence": "x", "orders": "a", "quantity": quantity, "at_most": 1.0}
    claim = CLAIMS[quantity].model_validate({**keys, "observable": observable})
    return claim.measure([OrdersResult("a", "a", _spec(), _orders(rows, overall))])


def test_the_order_of_an_array_is_its_smallest():
    rows = [_row("p[0]", 2.0), _row("p[1]", 1.0), _row("loss", 0.5)]
    found = _measure("order", *rows, observable="p")
    assert found.value == 1.0 and found.error == pytest.approx(0.1, rel=1e-3)
    assert _measure("order", *rows, overall=rows[2]).value == 0.5


def test_what_is_not_an_order_is_not_read_as_one():
    row = _row("loss", 2.0, "not asymptotic")
    with pytest.raises(ValueError, match="loss: not asymptotic, because"):
        _measure("order", row, observable="loss")
    assert _measure("order_status", row, observable="loss").word == "not asymptotic"
