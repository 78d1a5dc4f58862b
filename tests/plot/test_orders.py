"""The figure of an order measurement, from measurements of our own making."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from gradflow.analysis.convergence.fit import fit_order
from gradflow.analysis.convergence.results import OrderPoints, OrderRow, Orders
from gradflow.plot.orders import draw_orders
from gradflow.plot.style import save_figure

H = 0.1 * 0.5 ** np.arange(4)


def measured(*series, random=True, notes=()):
    """Orders of (name, differences, standard errors)."""
    rows, points = [], []
    for name, error, noise in series:
        fit = fit_order(H, np.asarray(error), np.asarray(noise), np.full(4, 1e-13))
        rows.append(
            OrderRow(
                name,
                fit.order,
                fit.low,
                fit.high,
                0.95,
                fit.status,
                fit.asymptotic_range,
                fit.reason,
                None,
            )
        )
        counts = np.full(4, 100), np.zeros(4, int)
        points.append(
            OrderPoints(
                name,
                name,
                "weight^2",
                H,
                np.asarray(error),
                np.asarray(noise),
                np.full(4, 1e-13),
                *counts,
                fit.seen,
                fit.used,
            )
        )
    return Orders(
        tuple(rows),
        tuple(points),
        rows[0] if rows[0].resolved else None,
        "GradientDescent",
        "StochasticFlow(order=1)",
        "weak",
        random,
        "common Brownian path, 8 substeps",
        (1.0,),
        0.95,
        tuple(notes),
        False,
    )


def words(drawing):
    return "\n".join(text.get_text() for text in drawing.figure.findobj(Text))


def test_points_lines_and_guides(tmp_path):
    noise = np.full(4, 2e-5)
    orders = measured(
        ("imbalance", -0.3 * H, 0.01 * H),
        ("loss", 0.05 * H**2, noise),
        notes=["step sizes that do not divide t1 = 1: 0.03 became 0.0303"],
    )
    assert orders.points[1].seen.tolist() == [True, True, False, False]
    drawing = draw_orders(orders, "SGD and its SDE")
    text = words(drawing)
    for part in (
        "SGD and its SDE",
        "imbalance: order 1.00 [",
        "loss: not resolved",
        "slope 1",
        "slope 2",
        "slope 3",
        "step size h  [flow time]",
        "weak difference",
        "[weight²]",
        "not seen, with upper limit",
    ):
        assert part in text
    assert "common Brownian path" in drawing.caption and "0.03 became" in drawing.caption
    (axes,) = drawing.figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = {tuple(np.round(line.get_xdata(), 6)): line for line in axes.get_lines()}
    # filled points of |difference|, hollow ones no lower than a tenth of their upper limit
    np.testing.assert_allclose(lines[tuple(np.round(H, 6))].get_ydata(), 0.3 * H)
    hollow = lines[tuple(np.round(H[2:], 6))]
    assert hollow.get_markerfacecolor() == "white"
    error = 0.05 * H[2:] ** 2
    np.testing.assert_allclose(hollow.get_ydata(), np.maximum(error, 0.1 * (error + 6e-5)))
    # reference lines have the slopes that they claim, and so has the fit
    straight = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    slopes = [
        np.diff(np.log(line.get_ydata()))[0] / np.diff(np.log(line.get_xdata()))[0]
        for line in straight
        if line.get_linestyle() != "None"
    ]
    assert sorted(round(s, 1) for s in slopes) == [1.0, 1.0, 2.0, 3.0]
    # the error bars of what is not seen end at |difference| + 3 standard errors
    tops = [s[1, 1] for c in axes.collections for s in c.get_segments() if len(s) == 2]
    assert any(np.isclose(top, error[1] + 6e-5) for top in tops)
    png, svg = save_figure(drawing.figure, tmp_path / "orders")
    assert png.stat().st_size > 10_000 and "slope 2" in svg.read_text()


def test_what_is_not_in_the_fit_looks_so():
    part = measured(("imbalance", H, 0.01 * H))
    used = np.array([False, True, True, True])
    points = (replace(part.points[0], used=used),)
    rows = (replace(part.rows[0], asymptotic_range=(H[3], H[1])),)
    drawing = draw_orders(replace(part, points=points, rows=rows))
    (axes,) = drawing.figure.axes
    lines = {tuple(np.round(line.get_xdata(), 6)): line for line in axes.get_lines()}
    colour = to_rgb(lines[tuple(np.round(H[1:], 6))].get_markerfacecolor())
    pale = to_rgb(lines[tuple(np.round(H[:1], 6))].get_markerfacecolor())
    assert min(pale) > max(min(colour), 0.5)
    assert tuple(np.round(H[[3, 1]], 6)) in lines  # the line spans the fit and no more
    assert "not in the fit" in words(drawing) and "range of the fit" in drawing.caption
    # nothing of what gave no order is in a fit
    rows = (replace(part.rows[0], status="not asymptotic", asymptotic_range=None),)
    drawing = draw_orders(replace(part, rows=rows))
    lines = {tuple(np.round(x.get_xdata(), 6)): x for x in drawing.figure.axes[0].get_lines()}
    assert to_rgb(lines[tuple(np.round(H, 6))].get_markerfacecolor()) == pale


def test_exact_differences_and_own_labels():
    orders = measured(("imbalance", H**2, 0.0 * H), random=False)
    drawing = draw_orders(orders, caption="Exact.", labels={"imbalance": "imbalance D(W)"})
    assert "imbalance D(W): order 2.00" in words(drawing)
    assert "not seen" not in words(drawing) and "weak" not in words(drawing)
    assert drawing.caption == "Exact."


def test_a_diverged_step_size_has_no_point():
    error = np.array([np.nan, *H[1:]])
    drawing = draw_orders(measured(("imbalance", error, np.array([np.nan, *0.01 * H[1:]]))))
    (axes,) = drawing.figure.axes
    assert all(np.isfinite(line.get_ydata()).all() for line in axes.get_lines())
    assert axes.get_xlim()[1] < 0.1


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no difference is finite"):
        draw_orders(measured(("imbalance", np.full(4, np.nan), np.full(4, np.nan))))
