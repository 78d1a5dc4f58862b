"""Every figure kind, from a small study: files, labels, and what is said about missing data."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.patches import Polygon
from matplotlib.text import Text
from scipy.stats import norm

from gradflow.plot.drawing import Drawing
from gradflow.plot.reading import series
from gradflow.plot.scaling import fit_slope
from gradflow.plot.style import OKABE_ITO, UNREGULARIZED, drawing_style, group_colours
from gradflow.report import FigureError, draw_figures
from gradflow.study.figures.views import run_views
from gradflow.study.results import StudyResult

MakeStudy = Callable[..., StudyResult]

SERIES = {
    "kind": "time_series",
    "title": "Two phases",
    "observables": ["excess_loss", "imbalance"],
    "x_scale": "log",
    "y_scale": ["log", "linear"],
}
PORTRAIT = {"kind": "phase_portrait", "title": "The plane"}
RATES = {"kind": "rates", "title": "Rates"}
CONSERVATION = {"kind": "conservation", "observables": ["imbalance", "squared_norms"]}
SCALING = {
    "kind": "scaling",
    "quantity": "change",
    "observable": "imbalance",
    "parameter": "step_size",
    "runs": ["sgd", "sde"],
    "slope": 1.0,
}


def texts(svg: Path) -> str:
    """All text of a figure file, line by line; parsing also proves that the file is XML."""
    root = ET.parse(svg).getroot()
    found = root.iter("{http://www.w3.org/2000/svg}text")
    return "\n".join("".join(element.itertext()) for element in found)


def with_bent_rates(result: StudyResult, name: str, slow: Any = None, **phases: Any) -> StudyResult:
    """A study with a run of which one rate is not constant."""
    run = result.runs[name]
    assert run.phases is not None and run.rate is not None
    rate = replace(run.rate, constant=False, local=slow) if slow else run.rate
    found = replace(run.phases, regularization_rate=rate, **phases)
    return replace(result, runs={**result.runs, name: replace(run, rate=rate, phases=found)})


def bars(axes: Axes) -> list[tuple[float, float, bool]]:
    """The bars of a panel from the top: their ends, and whether they are drawn through."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_lw() > 2]
    lines.sort(key=lambda line: line.get_ydata()[0])
    return [(*map(float, line.get_xdata()), line.get_linestyle() == "-") for line in lines]


def legend(drawing: Drawing) -> list[str]:
    return [text.get_text() for text in drawing.figure.legends[0].get_texts()]


def test_the_bar_of_a_ratio_is_no_more_certain_than_its_parts(make_study: MakeStudy):
    # the optimization rate is 4.5 +- 1, the thirds of the other rate go from 0.02 to 0.008
    slow = (0.02, 0.012, 0.008)
    result = with_bent_rates(make_study(RATES), "sgd", slow, optimization_rate_error=1.0)
    drawing = draw(result)
    fast, decay, ratio = (bars(axes) for axes in drawing.figure.axes)
    half = norm.ppf(0.975)
    assert fast[0] == pytest.approx((4.5 - half, 4.5 + half, True), rel=1e-6)
    assert decay[0] == (0.008, 0.02, False)
    assert ratio[0] == pytest.approx(((4.5 - half) / 0.02, (4.5 + half) / 0.008, False), rel=1e-6)
    assert decay[1][2] and ratio[1][2]  # the SDE has intervals of 95 %
    assert legend(drawing) == [
        "measured, 95 % interval",
        "not constant, or one path: over thirds of the window; a ratio: with the 95 % of its parts",
        "predicted",
    ]


def test_an_optimization_rate_that_is_not_constant_is_drawn_as_such(make_study: MakeStudy):
    local = {"optimization_rate_constant": False, "optimization_rate_local": (6.0, 5.0, 4.4)}
    drawing = draw(with_bent_rates(make_study(RATES), "decay", **local))
    fast, _, ratio = (bars(axes) for axes in drawing.figure.axes)
    assert fast[-1] == (4.4, 6.0, False)
    assert ratio[-1] == pytest.approx((4.4 / 0.0202, 6.0 / 0.0202, False))
    assert "not constant, or one path: over thirds of the window" in legend(drawing)
    assert "The rate is not constant along Weight decay, flow" in drawing.caption
    assert legend(draw(make_study(RATES))) == ["measured, 95 % interval", "predicted"]


def draw(result: StudyResult, index: int = 0) -> Drawing:
    """One figure of a study, not written to disk."""
    spec = result.spec.figure[index]
    with drawing_style():
        return spec.draw(result)


def words(drawing: Drawing) -> str:
    """All text of a figure in memory: axes, legend, row labels."""
    return "\n".join(text.get_text() for text in drawing.figure.findobj(Text))


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    ("figure", "labels"),
    [
        (
            PORTRAIT,
            ["The plane", "first weight w₁  [weight]", "second weight w₂  [weight]", "start"],
        ),
        (
            SERIES,
            [
                "Two phases",
                "flow time t",
                "excess loss  [loss]",
                "imbalance D(W)  [weight²]",
                "optimization",
                "regularization",
                "predicted loss floor",
            ],
        ),
        (RATES, ["optimization rate  [1/flow time]", "predicted", "no regularization phase"]),
        (CONSERVATION, ["change of imbalance D(W)", "machine precision", "[weight²]"]),
        (SCALING, ["step size h  [flow time]", "change of imbalance D(W)  [weight²]", "slope 1"]),
    ],
)
def test_every_kind_is_written(make_study: MakeStudy, figure: dict[str, Any], labels: list[str]):
    result = make_study(figure)
    (file,) = draw_figures(result)

    assert file.name == figure["kind"]
    assert file.png.parent == result.out / "figures"
    assert sorted(p.name for p in file.png.parent.iterdir()) == [file.png.name, file.svg.name]
    height, width, _ = imread(file.png).shape
    assert width == 1300  # 6.5 inches at 200 dpi
    assert 300 < height < 3000
    found = texts(file.svg)
    for label in [*labels, "label noise" if figure is SCALING else "Label noise, SGD"]:
        assert label in found
    assert file.caption.endswith(".")
    sizes = re.findall(r"font-size: ([\d.]+)px", file.svg.read_text(encoding="utf-8"))
    assert min(map(float, sizes)) >= 9.0  # 72 units of an SVG are one inch, so these are points


def test_files_are_the_same_byte_for_byte_from_any_thread(make_study: MakeStudy):
    before = dict(matplotlib.rcParams)
    result = make_study(SCALING)
    (file,) = draw_figures(result)
    first = file.png.read_bytes(), file.svg.read_bytes()
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(draw_figures, result) for _ in range(3)]
        for future in futures:
            (again,) = future.result()
            assert (again.png.read_bytes(), again.svg.read_bytes()) == first
    assert dict(matplotlib.rcParams) == before


def test_names_are_unique_and_errors_keep_the_other_figures(make_study: MakeStudy):
    figures = (RATES, RATES | {"name": "rates_2"}, SCALING | {"runs": ["flow"]}, RATES)
    with pytest.raises(
        FigureError, match=r"figure\[2\] \(scaling, 'scaling'\): parameter:"
    ) as error:
        draw_figures(make_study(*figures))
    assert [file.name for file in error.value.figures] == ["rates", "rates_2", "rates_3"]
    assert all(file.png.is_file() for file in error.value.figures)


# --- diverged replicas, missing and impossible values -------------------------------------------


@pytest.mark.parametrize("figure", [PORTRAIT, SERIES, RATES, CONSERVATION])
def test_diverged_replicas_are_stated(make_study: MakeStudy, figure: dict[str, Any]):
    drawing = draw(make_study(figure, diverged={"sgd": 3}))
    assert "(3 of 16 diverged)" in words(drawing)
    assert "3 of 16 diverged and are left out" in drawing.caption


def test_diverged_replicas_do_not_enter_the_mean(make_study: MakeStudy):
    result = make_study(diverged={"sgd": 3})
    (view,) = run_views(result, ["sgd"])
    curve = series(view, "imbalance")
    raw = result.runs["sgd"].trajectory["imbalance"]
    assert curve.values.shape[0] == 13
    np.testing.assert_allclose(curve.mean, raw[3:].mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(curve.percentile(10.0), np.percentile(raw[3:], 10.0, axis=0))


@pytest.mark.parametrize("figure", [PORTRAIT, SERIES, CONSERVATION])
def test_a_run_that_diverged_altogether_is_drawn_up_to_there(
    make_study: MakeStudy, figure: dict[str, Any]
):
    drawing = draw(make_study(figure, diverged={"sgd": 16, "decay": 1}))
    assert "Label noise, SGD (16 of 16 diverged)" in words(drawing)
    assert "Weight decay, flow (diverged)" in words(drawing)
    assert "Label noise, SGD: all 16 replicas diverged." in drawing.caption
    assert "Weight decay, flow diverged at t = 10." in drawing.caption


def test_values_that_have_no_place_on_a_log_axis_are_counted(make_study: MakeStudy):
    def change(name: str, dataset: xr.Dataset) -> xr.Dataset:
        if name == "flow":
            dataset["excess_loss"].values[-6:] = [0.0, 0.0, -1e-18, 0.0, np.nan, 1e-30]
        return dataset

    caption = draw(make_study(SERIES | {"runs": ["flow", "sgd"]}, change=change)).caption
    zeros = int(np.sum(make_study().runs["flow"].trajectory["excess_loss"][:-6] <= 0.0))
    assert f"Gradient flow, excess loss: {4 + zeros} of 41 means are zero or" in caption
    assert "Gradient flow, excess loss: 1 of 41 means are not finite" in caption
    assert "Gradient flow, excess loss: values below" in caption
    assert "The start t = 0 is not on the log time axis." in caption


def test_a_conserved_quantity_without_any_change_is_named(make_study: MakeStudy):
    def change(name: str, dataset: xr.Dataset) -> xr.Dataset:
        dataset["imbalance"] = dataset["imbalance"] * 0 + 1.0
        return dataset

    drawing = draw(make_study({"kind": "conservation", "runs": ["flow", "sgd"]}, change=change))
    assert "Gradient flow does not move at all (exactly 0)" in drawing.caption


def test_a_run_that_did_not_finish_is_named(make_study: MakeStudy):
    result = make_study(RATES)
    del result.runs["sde"]
    (file,) = draw_figures(result)
    assert "did not finish: Label noise, SDE." in file.caption
    assert "Label noise, SDE" not in texts(file.svg)


def test_relative_values_and_single_entries(make_study: MakeStudy):
    relative = {"kind": "time_series", "observables": ["imbalance"], "relative": True}
    entry = {"kind": "time_series", "observables": ["squared_norms"], "component": [1]}
    result = make_study(relative, entry)
    found = words(draw(result, 0))
    assert "relative to\nthe start" in found
    assert "weight²" not in found
    assert "squared norms[1]" in words(draw(result, 1))


def test_a_dollar_sign_is_a_dollar_sign(make_study: MakeStudy):
    result = make_study(SCALING | {"title": "from $5 to $6_{7}"})
    (file,) = draw_figures(result)
    assert "from $5 to $6_{7}" in texts(file.svg)


# --- errors that say what to write --------------------------------------------------------------


def widened(name: str, dataset: xr.Dataset) -> xr.Dataset:
    """A hidden layer of two units."""
    first = np.concatenate([dataset["W1"].values] * 2, axis=-2)
    second = np.concatenate([dataset["W2"].values] * 2, axis=-1)
    dims = dataset["W1"].dims[:-2]
    dataset = dataset.drop_vars(["W1", "W2"])
    dataset["W1"] = ((*dims, "width_1", "width_0"), first)
    dataset["W2"] = ((*dims, "width_2", "width_1"), second)
    return dataset


LOG_SERIES = SERIES | {"y_scale": "log"}


@pytest.mark.parametrize(
    ("figure", "change", "message"),
    [
        (PORTRAIT, widened, 'has widths 1 -> 2 -> 1; use kind = "time_series"'),
        (PORTRAIT, lambda _, d: d.drop_vars(["W1", "W2"]), "set store_weights = true"),
        (LOG_SERIES | {"observables": ["sharpness"]}, None, "did not record 'sharpness'"),
        (LOG_SERIES | {"observables": ["squared_norms"]}, None, "component = [...]"),
        (
            LOG_SERIES | {"observables": ["squared_norms"], "component": [5]},
            None,
            "is no entry of 'squared_norms'",
        ),
        (SERIES | {"y_scale": ["log", "log", "log"]}, None, "3 scales for 2 observables"),
        (SERIES | {"runs": ["nobody"]}, None, "'nobody' is not a run of this study"),
        (SCALING | {"runs": ["flow"]}, None, "run 'flow' has no 'step_size'"),
    ],
)
def test_errors_say_what_to_write(
    make_study: MakeStudy, figure: dict[str, Any], change: Any, message: str
):
    result = make_study(figure, **({"change": change} if change else {}))
    with pytest.raises(ValueError) as error:
        draw(result)
    assert message in str(error.value)


# --- pieces -------------------------------------------------------------------------------------


def test_portrait_marks_the_flattest_minimum_and_its_band_holds_80_percent(make_study: MakeStudy):
    result = make_study(PORTRAIT | {"runs": ["sgd"]})
    (axes,) = draw(result).figure.axes
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(star.get_xydata(), [[1.0, 1.0]])
    assert axes.get_aspect() == 1.0

    (band,) = [patch for patch in axes.patches if isinstance(patch, Polygon)]
    trajectory = result.runs["sgd"].trajectory
    late = trajectory.time > 5.0  # where the imbalance moves, each time has its own place
    w1, w2 = (w[:, late, 0, 0].ravel() for w in trajectory.weights)
    inside = band.get_path().contains_points(np.stack([w1, w2], axis=1)).mean()
    assert 0.7 < inside < 0.9


def test_scaling_fits_one_line_through_a_group(make_study: MakeStudy):
    runs = make_study().spec.model_dump()["run"]
    runs[2]["dynamics"] = {"kind": "GradientDescent", "step_size": 0.2}
    one = words(draw(make_study(SCALING, run=runs)))
    assert one.count("label noise, slope") == 1
    two = words(draw(make_study(SCALING)))  # two dynamics, each at one step size: nothing to fit
    assert "label noise, GradientDescent" in two
    assert "label noise, StochasticFlow" in two


def test_fitted_slope_of_a_power_law():
    x = np.array([0.01, 0.02, 0.05, 0.1])
    slope, error, level = fit_slope(x, 3.0 * x**2, np.zeros(4))
    assert slope == pytest.approx(2.0, abs=1e-12)
    assert error < 1e-12
    assert np.exp(level) == pytest.approx(3.0)


def test_error_of_a_slope_against_numpy():
    rng = np.random.default_rng(1)
    x = np.geomspace(0.01, 1.0, 9)
    y = 2.0 * x**1.5 * np.exp(0.1 * rng.normal(size=9))
    (expected, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    slope, error, _ = fit_slope(x, y, np.zeros(9))
    assert slope == pytest.approx(expected, rel=1e-12)
    assert error == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-10)


def test_two_points_without_errors_have_no_error_of_the_slope():
    slope, error, _ = fit_slope(np.array([1.0, 2.0]), np.array([1.0, 2.0]), np.zeros(2))
    assert slope == pytest.approx(1.0)
    assert np.isnan(error)


def test_colours_belong_to_groups_and_repeat_never():
    colours = group_colours(["none", "label noise", "weight decay", "label noise"])
    assert colours == {
        "none": UNREGULARIZED,
        "label noise": OKABE_ITO[0],
        "weight decay": OKABE_ITO[1],
    }
    many = group_colours([f"group {i}" for i in range(12)])
    assert len(set(many.values())) == 12


def test_runs_of_one_group_and_dynamics_differ_in_shade(make_study: MakeStudy):
    views = run_views(make_study(), ())
    strokes = [view.stroke for view in views]
    assert len(set(strokes)) == len(strokes)
    assert views[1].colour == views[2].colour
