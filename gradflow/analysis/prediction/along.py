"""What theory says of a rate that changes: that of the slow flow over the same flow times."""

from dataclasses import replace

import numpy as np
from scipy.interpolate import PchipInterpolator

from gradflow.analysis.local_rates import local_rates
from gradflow.analysis.prediction.prediction import Prediction
from gradflow.analysis.rates import Rate
from gradflow.analysis.statistics import trapezoid_weights, weighted_line

POINTS = 13
"""Times at which the slow flow is followed; between them its logarithm is interpolated."""


def rate_along(prediction: Prediction, measured: Rate, time: np.ndarray) -> Rate:
    r"""The decay rate of the imbalance along the slow flow, fitted as the measured one was.

    A prediction of `imbalance_rate` holds at the start of the regularization phase. Where the rate
    changes, the fit to a window is to be compared with the same fit to the slow flow.

    **Arguments:**

    - `prediction`: of the run.
    - `measured`: its rate, whose window is taken.
    - `time`: the saved times of the run, `(time,)`.

    **Returns:** a `Rate` without an error.

    **Raises:** `ValueError` where theory has no slow flow for the run, or it does not get there.
    """
    start, stop = measured.window
    inside = time[(time >= start) & (time <= stop)]
    knots = np.linspace(start, stop, POINTS)
    if prediction.slow is None:
        raise ValueError(prediction.reason or prediction.end_reason)
    sizes = prediction.slow.imbalances(knots)
    if not np.all(sizes > 0.0):
        raise ValueError(f"the slow flow has no imbalance left at t = {knots[sizes <= 0.0][0]:.6g}")
    logs = PchipInterpolator(knots, np.log(sizes))(inside)[None]
    value = -float(weighted_line(inside, logs, trapezoid_weights(inside))[1][0])
    local = local_rates(inside, -logs, 1.0, None)
    return replace(
        measured,
        value=value,
        standard_error=float("nan"),
        low=min(*local.values, value),
        high=max(*local.values, value),
        replicas=1,
        diverged=0,
        independent=1,
        per_replica=np.array([value]),
        note="" if local.constant else f"the rate is not constant: {local}",
        constant=local.constant,
        local=local.values,
    )
