"""[[orders]] tables from the spec to results, claims, figures and the page."""

import math

import numpy as np
import pandas as pd
import pytest
from specs import HEAD, RUN

import gradflow as gf
from gradflow.analysis.order_results import OrderRow, Orders
from gradflow.report.draw import draw_figures
from gradflow.report.page import write_page
from gradflow.study.build import prepare
from gradflow.study.load import SpecError
from gradflow.study.order_measures import measure_order
from gradflow.study.order_tables import OrdersSpec
from gradflow.study.results import OrdersResult
from gradflow.study.runner import run_study
from gradflow.study.spec import ClaimSpec

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
        (TABLE + CLAIM + 'run = "flow"\nat_most = 1.0\n', "run: order does not use run"),
        (TABLE + CLAIM.replace("_and_", "_or_") + "at_most = 1.0\n", "did you mean"),
        (TABLE + CLAIM + 'observable = "loss"\nat_most = 1.0\n', 'observable: got "loss"'),
        (TABLE + CLAIM.replace('"order"', '"order_status"') + 'expected = "resolved"\n',
         "needs an observable"),
        (TABLE + '[[figure]]\nkind = "orders"\norders = ["other"]\n', r"orders.0.: got \"other\""),
        (RUN + '[[figure]]\nkind = "orders"\n', "the study has none; add one"),
        (RUN + '[[claim]]\nsentence = "x"\nrun = "flow"\norders = "a"\nquantity = "final"\n'
         'observable = "loss"\nat_most = 1.0\n', "final is about runs; leave it out"),
        ("", r"a study needs at least one \[\[run\]\] or \[\[orders\]\] table"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(load, text, message):
    with pytest.raises(SpecError, match=message):
        prepare(load(HEAD + text))


def _row(observable, order, status="resolved"):
    resolved = status == "resolved"
    value = order if resolved else math.nan
    return OrderRow(observable, value, value - 0.196, value + 0.196, 0.95, status,
                    (0.01, 0.1) if resolved else None, "because", None)  # fmt: skip


def _measure(quantity, *rows, observable=None, overall=None):
    keys = {"sentence": "x", "orders": "a", "quantity": quantity, "at_most": 1.0}
    claim = ClaimSpec.model_validate({**keys, "observable": observable})
    spec = OrdersSpec.model_validate(
        {"name": "a", "first": {"kind": "GradientDescent"}, "second": {"kind": "GradientFlow"},
         "step_sizes": [0.1, 0.05], "t1": 1.0}
    )  # fmt: skip
    measured = Orders(rows, (), overall, "a", "b", "weak", True, "", (1.0,), 0.95, (), False)
    return measure_order(claim, OrdersResult("a", "a", spec, measured))


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
