"""Rates of SGD beside theory: which runs belong together, verdicts, table and automatic figures."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.text import Text

import gradflow as gf
from gradflow.analysis.comparison.against_theory import CHANGES, Measured, judged, theory_rows
from gradflow.plot.drawing import Drawing
from gradflow.plot.formatting import number as written
from gradflow.plot.style import drawing_style
from gradflow.plot.time_series import draw_time_series
from gradflow.report import draw_figures, write_page
from gradflow.report.draw import AUTOMATIC
from gradflow.report.theory_table import theory_lines
from gradflow.results.trajectory import Trajectory
from gradflow.study.figures.views import run_views
from gradflow.study.results import StudyResult

MakeStudy = Callable[..., StudyResult]

SPREAD = 1e-4
"""Standard deviation of the rates of the 16 replicas, so their mean is known to SPREAD / 4."""

_, ratios = AUTOMATIC["theory_ratios"]
_, sharpness = AUTOMATIC["sharpness"]


def table(kind: str, name: str, step_size: float, **dynamics: Any) -> dict[str, Any]:
    """A [[run]] table with label noise."""
    run = {
        "name": name,
        "label": f"Label noise, {name}",
        "group": "label noise",
        "dynamics": {"kind": kind, "step_size": step_size, **dynamics},
        "regularizers": [{"kind": "LabelNoise", "std": 0.5}],
        "t1": 100.0,
    }
    return run if kind == "SlowFlow" else run | {"replicas": 16}


def study(
    make_study: MakeStudy,
    runs: list[dict[str, Any]],
    rates: dict[str, float],
    predictions: Mapping[str, dict[str, float]] | None = None,
    *figures: dict[str, Any],
    bend: float = 0.0,
) -> StudyResult:
    """Runs whose imbalance decays at chosen rates; `bend` is added to them up to t = 10.

    Slow flows save only some of the times.
    """
    z = np.linspace(-1.0, 1.0, 16)
    spread = SPREAD * z / z.std(ddof=1)

    def change(name: str, dataset: xr.Dataset) -> xr.Dataset:
        time = dataset["time"].values
        lost = rates[name] * time + bend * np.minimum(time, 10.0)
        if "replica" in dataset.dims:
            lost = lost + spread[:, None] * time
        kept = dataset["imbalance"]
        dataset["imbalance"] = (kept.dims, 3.0 * np.exp(-lost), kept.attrs)
        sharp = 2.0 * np.exp(-0.001 * time) * np.ones(kept.shape)
        dataset["sharpness"] = (kept.dims, sharp + 1.0, {"long_name": "sharpness", "units": "1"})
        return dataset.isel(time=slice(None, None, 4)) if "slow" in name else dataset

    result = make_study(*figures, run=runs, change=change, claims=())
    known = dict(result.runs)
    for name, fields in (predictions or {}).items():
        prediction = known[name].prediction
        assert prediction is not None
        known[name] = replace(known[name], prediction=replace(prediction, **fields))
    return replace(result, runs=known)


LADDER = [table("GradientDescent", f"sgd_{i}", h) for i, h in enumerate((0.1, 0.2, 0.4))]
RATES = {"sgd_0": 0.011, "sgd_1": 0.024, "sgd_2": 0.06}
LAWS = {
    f"sgd_{i}": {"leading_rate": 0.01 * 2**i, "imbalance_rate": rate, "sharpness": 0.3 * 2**i}
    for i, rate in enumerate((0.011, 0.025, 0.06))
}

LAWS_OF_ONE = {"sgd_0": LAWS["sgd_0"]}
LAWS_OF_TWO = {name: LAWS[name] for name in ("sgd_0", "sgd_1")}


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (Measured(1.04), Measured(1.0), "agree"),
        (Measured(1.06), Measured(1.0), "differ"),
        (Measured(0.94), Measured(1.0), "differ"),
        (Measured(-1.0), Measured(-1.02), "agree"),
        # Student's t at 2.5 % with 15 degrees of freedom is 2.131.
        (Measured(1.01, 0.04 / 2.14, 16, 16), Measured(1.0), "agree"),
        (Measured(1.01, 0.04 / 2.12, 16, 16), Measured(1.0), "undecided"),
        (Measured(1.09, 0.04 / 2.12, 16, 16), Measured(1.0), "undecided"),
        (Measured(1.09, 0.04 / 2.14, 16, 16), Measured(1.0), "differ"),
        (Measured(1.0, float("nan")), Measured(1.0), "undecided"),
    ],
)
def test_verdicts_are_two_one_sided_tests_of_five_percent(
    first: Measured, second: Measured, word: str
):
    found = judged(first, second)
    assert found.word == word
    assert found.relative == pytest.approx((first.value - second.value) / abs(second.value))
    if first.error > 0.0:
        assert found.sigmas == pytest.approx((first.value - 1.0) / first.error)


def test_two_measured_rates_share_their_errors():
    # Welch: 0.003 and 0.004 make 0.005, with (25^2)/(9^2/15 + 16^2/15) = 27.8 degrees, t = 2.049.
    assert judged(Measured(1.0, 0.003, 16, 16), Measured(1.0, 0.004, 16, 16)).word == "agree"
    shifted = Measured(1.0 + 0.05 - 2.06 * 0.005, 0.003, 16, 16)
    assert judged(shifted, Measured(1.0, 0.004, 16, 16)).word == "agree"
    shifted = Measured(1.0 + 0.05 - 2.04 * 0.005, 0.003, 16, 16)
    assert judged(shifted, Measured(1.0, 0.004, 16, 16)).word == "undecided"


# --- the table ------------------------------------------------------------------------------------


def test_runs_of_the_same_training_share_a_row(make_study: MakeStudy):
    runs = [
        table("GradientDescent", "sgd_0", 0.1),
        table("StochasticFlow", "sde_0", 0.1),
        table("StochasticFlow", "sde_1", 0.1, order=2),
        table("SlowFlow", "slow_0", 0.1),
        table("SlowFlow", "slow_1", 0.1, finite_step=False),
        table("SlowFlow", "slow_2", 0.2),
        table("SlowFlow", "slow_3", 0.1, momentum=0.5),
    ]
    rates = {
        "sgd_0": 0.011, "sde_0": 0.0105, "sde_1": 0.011, "slow_0": 0.0111, "slow_1": 0.01,
        "slow_2": 0.03, "slow_3": 0.02,
    }  # fmt: skip
    law = {"leading_rate": 0.01, "imbalance_rate": 0.0112, "sharpness": 0.3}
    result = study(make_study, runs, rates, {"sgd_0": law})
    first, *others = theory_rows(list(result.runs.values()))

    assert [row.run.name for row in others] == ["slow_2", "slow_3"]
    assert all(row.measured is None and row.slow_flow is not None for row in others)
    assert first.measured is not None
    assert first.measured.value == pytest.approx(0.011, rel=1e-9)
    assert first.measured.error == pytest.approx(SPREAD / 4, rel=1e-9)
    assert (first.step_size, first.h_lambda) == (0.1, 0.3)

    # in per mille of the number, measured 0.011: 100, -18, -9 and 100
    said = [first.leading_order, first.finite_step, first.slow_flow, first.classical_flow]
    for one, number, word in zip(
        said, (0.01, 0.0112, 0.0111, 0.01), ("differ", "agree", "agree", "differ"), strict=True
    ):
        assert one is not None
        assert one.verdict is not None
        assert one.number.value == pytest.approx(number, rel=1e-6)
        assert one.verdict.word == word
        assert one.verdict.relative == pytest.approx(0.011 / number - 1, rel=1e-4)
        assert one.verdict.sigmas == pytest.approx((0.011 - number) / (SPREAD / 4), rel=1e-4)
    assert [one.name for one in first.stochastic_flows] == ["", "order 2"]


@pytest.mark.parametrize(
    ("noise", "weight"), [(0.5, 2.0), (0.6, 2.0), (0.5, 2.1)], ids=["same", "problem", "start"]
)
def test_runs_of_another_problem_or_start_have_a_row_of_their_own(
    make_study: MakeStudy, noise: float, weight: float
):
    runs = [LADDER[0], table("SlowFlow", "slow_0", 0.1)]
    result = study(make_study, runs, {"sgd_0": 0.011, "slow_0": 0.011}, LAWS_OF_ONE)
    sgd, slow = result.runs.values()
    problem = gf.Problem(gf.Regression.whitened(target=[[1.0]]), [gf.LabelNoise(std=noise)])
    start = gf.DeepLinear([np.array([[weight]]), np.array([[0.1]])])
    dynamics = slow.trajectory.dynamics
    moved = Trajectory(slow.trajectory.to_xarray(), problem, dynamics, [start])
    rows = theory_rows([sgd, replace(slow, trajectory=moved)])
    is_same = (noise, weight) == (0.5, 2.0)
    assert [row.run.name for row in rows] == (["sgd_0"] if is_same else ["sgd_0", "slow_0"])
    assert (rows[0].slow_flow is not None) == is_same


def test_a_rate_that_changes_is_not_held_against_its_start(make_study: MakeStudy):
    runs = [LADDER[0], table("SlowFlow", "slow_0", 0.1)]
    rates = {"sgd_0": 0.01, "slow_0": 0.01}
    result = study(make_study, runs, rates, LAWS_OF_ONE, bend=0.05)
    row, *_ = theory_rows(list(result.runs.values()))
    assert row.changes
    assert row.leading_order is not None
    assert row.leading_order.verdict is not None
    assert (row.leading_order.verdict.word, row.leading_order.verdict.reason) == (
        "undecided",
        CHANGES,
    )
    # the slow flow bends as well, and was fitted at the same times
    assert row.slow_flow is not None
    assert row.slow_flow.verdict is not None
    assert row.slow_flow.verdict.word == "agree"
    assert abs(row.slow_flow.verdict.relative) < 0.01
    line, *_ = theory_lines(result)
    _, _, slow, _, sgd = line.cells
    # 0.06 up to t = 10 and 0.01 from there on, in a window from t = 1.5 to 100
    assert sgd[0].value.startswith("not constant: 0.0") and "±" not in sgd[0].value
    assert sgd[0].value.endswith("0.01 → 0.01")
    assert slow[0].value == written(row.slow_flow.number.value)
    parts = [float(part) for part in slow[0].said[0].split(" → ")]
    assert parts[0] > 0.013 and parts[1:] == pytest.approx([0.01, 0.01], rel=0.02)


def test_table_and_page_say_it_in_words(make_study: MakeStudy):
    result = study(make_study, LADDER, RATES, LAWS)
    lines = theory_lines(result)
    assert [line.regularizer for line in lines] == ["label noise"] * 3
    assert lines[1].below == ("Label noise, sgd_1", "h\u00a0=\u00a00.2, h\u00a0λ\u00a0=\u00a00.6")
    leading, finite, slow, sde, sgd = lines[1].cells
    assert (leading[0].value, leading[0].verdict) == ("0.02", "differ")
    assert leading[0].said == ("SGD +20\u00a0%, +160\u00a0s.e.",)
    assert (finite[0].value, finite[0].verdict) == ("0.025", "agree")
    assert finite[0].said == ("SGD \u22124.0\u00a0%, \u221240\u00a0s.e.",)
    assert (slow, sde) == ((), ())
    assert sgd[0].value == "0.024000 ± 0.000025"

    page = write_page(result, ()).read_text(encoding="utf-8")
    for words in ("Rates: theory and SGD", "≠ differ", "✓ agree", "two one-sided tests"):
        assert words in page
    assert page.index("Rates: theory and SGD") < page.index("Phases and rates")


def test_studies_without_rates_have_no_such_table(make_study: MakeStudy):
    result = make_study()
    runs = {name: replace(run, rate=None, prediction=None) for name, run in result.runs.items()}
    result = replace(result, runs=runs)
    assert theory_rows(list(result.runs.values())) == []
    assert "Rates: theory and SGD" not in write_page(result, ()).read_text(encoding="utf-8")


# --- rates against theory -------------------------------------------------------------------------


def drawn(draw: Callable[[StudyResult], Drawing | None], result: StudyResult) -> Drawing:
    with drawing_style():
        drawing = draw(result)
    assert drawing is not None
    return drawing


def words(drawing: Drawing) -> str:
    return "\n".join(text.get_text() for text in drawing.figure.findobj(Text))


def markers(drawing: Drawing) -> dict[str, np.ndarray]:
    (axes,) = drawing.figure.axes
    lines = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    return {str(line.get_marker()): np.asarray(line.get_xydata()) for line in lines}


def test_ratios_of_three_step_sizes(make_study: MakeStudy):
    drawing = drawn(ratios, study(make_study, LADDER, RATES, LAWS))
    points = markers(drawing)
    np.testing.assert_allclose(points["o"], [[0.3, 1.0], [0.6, 0.96], [1.2, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(points["D"], [[0.3, 1.1], [0.6, 1.2], [1.2, 1.5]], rtol=1e-6)
    (axes,) = drawing.figure.axes
    bars = [c for c in axes.collections if len(c.get_paths()) == 3]  # one of each theory
    heights = sorted(
        np.ptp(np.asarray(path.vertices)[:, 1]) for bar in bars for path in bar.get_paths()
    )
    laws = [0.01, 0.02, 0.04, 0.011, 0.025, 0.06]
    np.testing.assert_allclose(heights, sorted(2 * SPREAD / 4 / np.array(laws)), rtol=1e-6)
    found = words(drawing)
    for text in ("label noise", "h λ", "finite step", "leading order, h → 0", "imbalance rate"):
        assert text in found
    assert any(np.allclose(line.get_ydata(), 1.0) for line in axes.lines)


def test_slow_flows_take_the_place_of_predictions(make_study: MakeStudy):
    slow = [table("SlowFlow", f"slow_{i}", h) for i, h in enumerate((0.1, 0.2, 0.4))]
    rates = RATES | {"slow_0": 0.01, "slow_1": 0.02, "slow_2": 0.05}
    drawing = drawn(ratios, study(make_study, LADDER + slow, rates, LAWS))
    np.testing.assert_allclose(markers(drawing)["o"][:, 1], [1.1, 1.2, 1.2], rtol=1e-6)
    assert "prediction of finite step is a slow flow over the same times" in drawing.caption


def test_two_step_sizes_show_no_trend(make_study: MakeStudy):
    assert ratios(study(make_study, LADDER[:2], RATES, LAWS_OF_TWO)) is None


# --- sharpness ------------------------------------------------------------------------------------


def test_sharpness_is_drawn_with_that_of_the_flattest_minimum(make_study: MakeStudy):
    runs = [LADDER[0], table("SlowFlow", "slow_0", 0.1)]
    result = study(make_study, runs, {"sgd_0": 0.01, "slow_0": 0.01})
    drawing = drawn(sharpness, result)
    (axes,) = drawing.figure.axes
    # w1 w2 = 1 with unit inputs: the Hessian has the eigenvalue w1^2 + w2^2 >= 2
    heights = [np.asarray(line.get_ydata()) for line in axes.lines]
    (at,) = [i for i, y in enumerate(heights) if y.size == 2 and y[0] == y[1]]
    assert heights[at][0] == pytest.approx(2.0, rel=1e-12)
    assert axes.lines[at].get_linestyle() == "--"
    assert axes.get_ylim()[0] < 2.0
    assert "flattest minimum" in words(drawing)
    assert "No minimum lies below" in drawing.caption


@pytest.mark.slow
def test_automatic_figures_are_written_after_those_of_the_spec(make_study: MakeStudy):
    rates = {"kind": "rates", "title": "Rates"}
    files = draw_figures(study(make_study, LADDER, RATES, LAWS, rates))
    assert [file.name for file in files] == ["rates", "theory_ratios", "sharpness"]
    assert [file.title for file in files[1:]] == [
        "Rates against theory",
        "Sharpness and its lower bound",
    ]
    asked = {"kind": "time_series", "observables": ["sharpness"]}
    result = study(make_study, LADDER, RATES, LAWS, asked)
    assert sharpness(result) is None
    shown = drawn(lambda r: draw_time_series(run_views(r, ()), ["sharpness"]), result)
    assert "flattest minimum" in words(shown)


def test_many_runs_leave_the_slow_flows(make_study: MakeStudy):
    runs = [table("GradientDescent", f"sgd_{i}", 0.1) for i in range(7)]
    runs += [table("SlowFlow", "slow_0", 0.1), table("SlowFlow", "slow_1", 0.1, finite_step=False)]
    result = study(make_study, runs, {run["name"]: 0.01 for run in runs})
    found = words(drawn(sharpness, result))
    assert "slow_0" in found
    assert "slow_1" not in found
    assert "sgd" not in found


# --- slow flows among time series -----------------------------------------------------------------


def test_slow_flows_are_thin_dark_lines_without_an_excess_loss(make_study: MakeStudy):
    runs = [
        LADDER[0],
        table("SlowFlow", "slow_0", 0.1),
        table("SlowFlow", "slow_1", 0.1, finite_step=False),
    ]
    result = study(make_study, runs, {run["name"]: 0.01 for run in runs})
    sgd, slow, classical = run_views(result, ())
    assert slow.style.width < sgd.style.width
    assert slow.style.order > sgd.style.order
    assert slow.style.shade < sgd.style.shade
    assert slow.style.dashes != classical.style.dashes

    watched = ["excess_loss", "imbalance"]
    drawing = drawn(lambda r: draw_time_series(run_views(r, ()), watched), result)
    above, below = drawing.figure.axes
    strokes = [{line.get_color() for line in axes.lines} for axes in (above, below)]
    assert slow.stroke not in strokes[0]
    assert slow.stroke in strokes[1]
    assert "Slow flows start at the minimum" in drawing.caption
