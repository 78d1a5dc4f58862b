"""What a prediction holds, and its table: the rate laws at leading order and at finite step."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradflow.analysis.prediction.end_point import EndPoint
from gradflow.analysis.prediction.rate_law import RateLaw, SlowPoint, Theory, shown_imbalance
from gradflow.geometry.imbalance import squared_norms
from gradflow.network import DeepLinear
from gradflow.simulation.progress import announced

_MISSING = "\u2013"


@dataclass(frozen=True)
class Prediction:
    r"""What theory predicts for a dynamics on a problem from a network.

    - `optimization_rate`: rate at which the residual $|M|$ dies at the minimum reached, the
        smallest eigenvalue of the end-to-end kernel (for gradient descent per unit of flow time,
        $-\log|1 - h\lambda|/h$); per flow time.
    - `optimization_end`: end of the optimization phase, flow time: the noise-free residual has come
        within `eps` of the floor.
    - `loss_floor`: excess loss in the regularization phase.
    - `imbalance_rate`: $-d \log D / dt$ at the start of the regularization phase, per flow time;
        negative if imbalance grows. `imbalance_drift`: $dD/dt$ there.
    - `separation`: `optimization_rate / imbalance_rate`, the ratio of the two time scales.
    - `limit`: the minimum reached, at which the regularization phase starts. Numbers "at the
        minimum reached" belong to it, not to the network given.
    - `reason`: why a field is NaN, empty if none is.
    - `optimization_steps`: `optimization_end` in steps; NaN for a flow.
    - `leading_rate`, `leading_drift`: `imbalance_rate` and `imbalance_drift` of the classical
        theory $h \to 0$, at the same minimum.
    - `relative_error`: $E|\delta W|^2/|W|^2$ of the fast fluctuation at `limit`, or its root where
        the noise is skewed, and of penalties the rate at which they act over `optimization_rate`:
        the size of what the theory neglects relative to what it keeps, up to a factor of order one.
    - `sharpness`: $h \lambda_\mathrm{max}$ at the minimum reached; `stability`: its share of the
        edge of stability $2 (1 + \beta)$, where the theory ends. NaN for a flow, which has no step
        size.
    - `largest_step_size`: the step size at `limit` below which the dynamics is stable in mean
        square. Noise on inputs and batches make it smaller than the edge of stability; other noise
        does not at leading order. Infinite for an SDE without such noise, NaN for a flow.
    - `overlap`: by how much noise is expected to change $D$ during the optimization phase beyond
        what the slow flow counts, which starts at `limit`; see `overlap.py`. A
        prediction is off by up to about that, and by more if the residual decays as slowly as $D$.
    - `start_note`: says that the network given is itself beyond the edge of stability, or that the
        phases overlap; else empty.
    - `leading_order`, `finite_step`: the rate laws of small steps, and of the step size itself,
        both at `limit`. For an SDE, which is a limit of small steps, and for a flow the second is
        None.
    - `slow`: the one that the run follows; None for SVAG and the SDE of order 2.

    `half_life`, `leading_half_life` and `end` with what belongs to it integrate the slow flow, in
    seconds and when they are first asked for; `print` asks for them.
    """

    optimization_rate: float
    optimization_end: float
    loss_floor: float
    imbalance_rate: float
    imbalance_drift: float
    separation: float
    eps: float
    limit: DeepLinear
    reason: str = ""
    optimization_steps: float = math.nan
    leading_rate: float = math.nan
    leading_drift: float = math.nan
    relative_error: float = math.nan
    sharpness: float = math.nan
    stability: float = math.nan
    largest_step_size: float = math.nan
    leading_order: RateLaw | None = None
    finite_step: RateLaw | None = None
    slow: RateLaw | None = None
    start_note: str = ""
    overlap: float = 0.0

    @property
    def half_life(self) -> float:
        """Flow time until the imbalance has halved along the slow flow; NaN if it never does."""
        return _finite_half_life(self.slow)

    @property
    def leading_half_life(self) -> float:
        r"""`half_life` of the classical theory $h \to 0$."""
        return _finite_half_life(self.leading_order)

    @property
    def end(self) -> DeepLinear | None:
        """The stationary point of the slow flow; None where there is none."""
        return None if self._end is None else self._end.net

    @property
    def end_imbalance(self) -> float | None:
        """The imbalance at the end."""
        return None if self._end is None else self._end.imbalance

    @property
    def end_block_traces(self) -> np.ndarray | None:
        """Traces of the Hessian's diagonal blocks at the end, `(N,)`; label noise equalises them.

        Exactly so for small steps; steps near the edge of stability prefer a lower sharpness.
        """
        return None if self._end is None else np.asarray(self._end.block_traces)

    @property
    def end_reason(self) -> str:
        """Why there is no half-life or no end, empty if there are both."""
        if self.slow is None:
            if self.leading_order is None:
                return ""
            return (
                "half-life and end point are those of a slow flow, which SVAG and the SDE of order "
                "2 do not have of their own; for those of small steps predict the SDE of order 1"
            )
        never = "the imbalance never halves on its way" if self.slow.half_life == math.inf else ""
        return "; ".join(text for text in (self.slow.end_reason, never) if text)

    @property
    def _end(self) -> EndPoint | None:
        return None if self.slow is None else self.slow.end

    @property
    def laws(self) -> dict[Theory, RateLaw]:
        """The rate laws that there are, by the name of the theory."""
        named: dict[Theory, RateLaw | None] = {
            "leading_order": self.leading_order,
            "finite_step": self.finite_step,
        }
        return {theory: law for theory, law in named.items() if law is not None}

    def at(self, time: float | None = None, *, steps: float | None = None) -> SlowPoint:
        """Imbalance and network after a flow time or steps of training; see `RateLaw.at`."""
        if self.slow is None:
            raise ValueError(f"at: {self.reason or self.end_reason}.")
        return self.slow.at(time, steps=steps)

    def __str__(self) -> str:
        with announced("following the slow flow to its end (compiled at the first call)"):
            table = prediction_rows(self)
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table]
        notes = [f"note: {text}" for text in prediction_notes(self)]
        return "\n".join([*(line.rstrip() for line in lines), *notes])


def _finite_half_life(law: RateLaw | None) -> float:
    return math.nan if law is None or math.isinf(law.half_life) else law.half_life


def prediction_rows(prediction: Prediction) -> list[tuple[str, str, str]]:
    """The table of a prediction: quantity, leading order, finite step; the first row is its head.

    Integrates the slow flows for half-lives and end points.
    """
    laws = prediction.leading_order, prediction.finite_step
    rows = [("", "leading order", "finite step")]
    for title, read in _ROWS:
        cells = [_MISSING if law is None else _written(read(law)) for law in laws]
        rows.append((title, cells[0], cells[1]))
    return rows


def prediction_notes(prediction: Prediction) -> list[str]:
    """Why something in the table of a prediction is missing."""
    texts = [prediction.start_note, prediction.reason]
    for law in prediction.laws.values():
        texts += [law.reason, law.end_reason, law.turn_note]
    return [text for text in dict.fromkeys(texts) if text]


def _at_end(name: str) -> Any:
    return lambda law: math.nan if law.end is None else getattr(law.end, name)


def _imbalance(law: RateLaw) -> float:
    return shown_imbalance(law.imbalance, tuple(np.asarray(squared_norms(law.limit)).tolist()))


def _end_imbalance(law: RateLaw) -> float:
    if law.end is None:
        return math.nan
    return shown_imbalance(law.end.imbalance, law.end.squared_norms)


def _sharpness(law: RateLaw) -> float:
    return law.step_size * law.sharpness if law.step_size > 0.0 else math.nan


_ROWS: tuple[tuple[str, Any], ...] = (
    ("h lambda_max at the minimum reached", _sharpness),
    ("largest step size, mean square", lambda law: law.largest_step_size),
    ("optimization phase ends at t", lambda law: law.optimization_end),
    ("  in steps", lambda law: law.optimization_steps),
    ("optimization rate", lambda law: law.optimization_rate),
    ("loss floor", lambda law: law.loss_floor),
    ("imbalance D at the minimum reached", _imbalance),
    ("drift dD/dt", lambda law: law.imbalance_drift),
    ("rate -d log D/dt", lambda law: law.imbalance_rate),
    ("separation of the phases", lambda law: law.separation),
    ("half-life of the imbalance, t", lambda law: law.half_life),
    ("  in steps", lambda law: law.half_life_steps),
    ("relative error, about", lambda law: law.relative_error),
    ("scatter between runs, dVar(D)/dt", lambda law: law.imbalance_variance_rate),
    ("end point: imbalance D", _end_imbalance),
    ("  |W_i+1|^2/|W_i|^2", _at_end("norm_ratios")),
    ("  Hessian block traces", _at_end("block_traces")),
    ("  sharpness", _at_end("sharpness")),
)


def _written(value: float | tuple[float, ...]) -> str:
    """A number of the table with four digits, or several; a dash for one that does not exist."""
    if isinstance(value, tuple):
        return ", ".join(_written(one) for one in value) or _MISSING
    if math.isnan(value):
        return _MISSING
    return f"{value:#.4g}".removesuffix(".") if value and math.isfinite(value) else f"{value:g}"
