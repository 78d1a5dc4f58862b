"""The least sharpness that any minimum has: a lower bound beside measured sharpness."""

import json
from collections.abc import Sequence

import numpy as np

from gradflow.geometry.flattest import flattest_minimum
from gradflow.plot.reading import RunView

BOUNDED = ("sharpness", "minima_sharpness")
"""Observables with a lower bound at the minima."""


def sharpness_bounds(views: Sequence[RunView], observable: str) -> dict[str, float]:
    """Returns the sharpness of the flattest minimum, by run name.

    Runs without one are left out: hidden layers narrower than the rank of the target, and, for
    `sharpness` (the Hessian of the data), noise on the inputs, which moves the minima.
    """
    if observable not in BOUNDED:
        return {}
    found: dict[str, float] = {}
    for view in views:
        problem = view.run.trajectory.problem
        data = problem.data
        if observable == "sharpness":
            if not np.array_equal(np.asarray(problem.input_moment), np.asarray(data.sxx)):
                continue
        else:
            data = problem
        widths = json.loads(view.dataset.attrs["widths"])
        try:
            found[view.name] = flattest_minimum(data, widths, by="sharpness").value
        except ValueError:
            continue
    return found
