"""What figures read off runs: their colours and strokes, series with their bands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from gradflow.analysis.comparison.evaluated import EvaluatedRun
from gradflow.dynamics.effective_time import differ_in_momentum, effective_time, momentum_of
from gradflow.plot.style import LineStyle, shaded


@dataclass(frozen=True)
class RunView:
    """One run as a figure sees it."""

    run: EvaluatedRun
    dataset: xr.Dataset
    colour: str
    """Colour of the regularizer group."""
    style: LineStyle
    """Stroke of the dynamics."""
    pace: float = 1.0
    """Flow time per unit of the times of the data set: 1, or 1 - momentum on a common clock."""

    @property
    def name(self) -> str:
        """Returns what the run is called among the others."""
        return self.run.name

    @property
    def label(self) -> str:
        """Returns the label for people."""
        return self.run.label or self.run.name

    @property
    def stroke(self) -> str:
        """Returns the line colour: the group's colour in the shade of the dynamics."""
        return shaded(self.colour, self.style.shade)

    @property
    def replicas(self) -> int:
        """Returns the number of replicas (1 for a single path)."""
        return int(self.dataset.sizes.get("replica", 1))

    @property
    def diverged(self) -> Bool[np.ndarray, " replica"]:
        """Returns which replicas diverged, shape ``(replicas,)``."""
        if "diverged_at" not in self.dataset:
            return np.zeros(self.replicas, dtype=bool)
        return np.isfinite(np.atleast_1d(self.dataset["diverged_at"].values))

    @property
    def incomplete(self) -> int:
        """Returns how many replicas were given up before the end of the run."""
        if "incomplete_at" not in self.dataset:
            return 0
        return int(np.isfinite(self.dataset["incomplete_at"].values).sum())

    @property
    def legend_label(self) -> str:
        """Returns the label, with the number of replicas that ended before the run, if any did."""
        count = int(self.diverged.sum())
        said = [diverged_text(count, self.replicas)] if count else []
        if self.incomplete:
            alone = self.replicas == 1
            said.append(
                "incomplete" if alone else f"{self.incomplete} of {self.replicas} incomplete"
            )
        return f"{self.label} ({', '.join(said)})" if said else self.label

    @property
    def is_slow(self) -> bool:
        """Returns whether the run lies on the minima from its start on."""
        return self.run.is_slow

    @property
    def optimization_end(self) -> float:
        """Returns the time at which the optimization phase ends; NaN when unknown."""
        phases = self.run.phases
        return float("nan") if phases is None else float(phases.optimization_end) / self.pace


@dataclass(frozen=True)
class Series:
    """One observable of one run, replicas that diverged set apart."""

    time: Float[np.ndarray, " time"]
    values: Float[np.ndarray, "replica time"]
    """Replicas that diverged are left out, unless every one did."""
    long_name: str
    units: str

    @property
    def mean(self) -> Float[np.ndarray, " time"]:
        """Returns the replica mean, shape ``(time,)``; NaN where any replica used is NaN."""
        return self.values.mean(axis=0)

    def percentile(self, q: float) -> Float[np.ndarray, " time"]:
        """Returns a percentile over replicas, shape ``(time,)``; NaN where any value is NaN."""
        bad = ~np.isfinite(self.values).all(axis=0)
        out = np.percentile(np.where(bad, 0.0, self.values), q, axis=0)
        return np.where(bad, np.nan, out)


def on_common_clock(views: Sequence[RunView]) -> tuple[RunView, ...]:
    r"""Returns runs whose times can be laid side by side.

    Where momenta differ these are effective times, $h k / (1 - \beta)$, in every run.
    """
    if not differ_in_momentum(view.run.trajectory.dynamics for view in views):
        return tuple(views)
    return tuple(map(_in_effective_time, views))


def _in_effective_time(view: RunView) -> RunView:
    attrs = {"units": "effective time", "long_name": "effective time h k / (1 \u2212 momentum)"}
    dynamics = view.run.trajectory.dynamics
    time = effective_time(dynamics, view.dataset["time"].values)
    dataset = view.dataset.assign_coords(time=("time", time, attrs))
    return replace(view, dataset=dataset, pace=1.0 - momentum_of(dynamics))


def series(
    view: RunView,
    observable: str,
    component: Sequence[int] | None = None,
    relative: bool = False,
) -> Series:
    """Returns one number at each time and replica: an observable of a run, or an entry of one.

    **Arguments:** ``component`` holds the indices of one entry of an observable that is not a
    number; ``relative`` divides by the value at the start.

    **Raises:** ``ValueError`` when the run did not record it, or it is not one number.
    """
    variable = recorded(view, observable)
    values = _replica_first(variable)
    name = long_name(variable)
    extra = [str(d) for d in variable.dims if d not in ("replica", "time")]
    if component is not None and extra:
        sizes = values.shape[2:]
        if len(component) != len(sizes) or any(
            not -n <= i < n for i, n in zip(component, sizes, strict=False)
        ):
            raise ValueError(
                f"component: {list(component)} is no entry of {observable!r} of run {view.name!r}, "
                f"which has the axes {dict(zip(extra, sizes, strict=True))}"
            )
        values = values[(..., *component)]
        name = f"{name}[{', '.join(str(i) for i in component)}]"
    elif extra:
        raise ValueError(
            f"observables: {observable!r} of run {view.name!r} has the extra axes {extra}; "
            "choose one entry with component = [...]"
        )
    units = str(variable.attrs.get("units", ""))
    if relative:
        _check_start(view)
        start = values[:, :1]
        if np.any(start == 0.0):
            raise ValueError(
                f"relative: {observable!r} of run {view.name!r} is 0 at the start; "
                "use relative = false"
            )
        values, name, units = values / start, f"{name}, relative to the start", "1"
    diverged = view.diverged
    return Series(
        time=np.asarray(view.dataset["time"].values, dtype=float),
        values=values if diverged.all() or not diverged.any() else values[~diverged],
        long_name=name,
        units=units,
    )


def recorded(view: RunView, observable: str) -> xr.DataArray:
    """Returns a recorded variable of a run, or says which ones there are."""
    if observable not in view.dataset:
        there = sorted(str(v) for v in view.dataset.data_vars if v != "diverged_at")
        raise ValueError(
            f"observables: run {view.name!r} did not record {observable!r}; it has {there}. "
            "Add it to the run's observables"
        )
    return view.dataset[observable]


def observable_label(view: RunView, observable: str) -> tuple[str, str]:
    """Returns the name for people and the units of a recorded observable."""
    variable = recorded(view, observable)
    return long_name(variable), str(variable.attrs.get("units", ""))


def long_name(variable: xr.DataArray) -> str:
    """Returns the name of a variable for people."""
    return str(variable.attrs.get("long_name", variable.name)).replace("_", " ")


def time_label(dataset: xr.Dataset) -> str:
    """Returns the label of the time axis, with its units unless the name already says them."""
    attrs = dataset["time"].attrs
    units = str(attrs.get("units", "flow time"))
    name = str(attrs.get("long_name", "flow time t"))
    return name if units in name or units == "1" else f"{name}  [{units}]"


def plane(
    view: RunView,
) -> tuple[Float[np.ndarray, "replica time"], Float[np.ndarray, "replica time"]]:
    """Returns ``(w_1, w_2)`` of a scalar depth-2 run, each of shape ``(replicas used, time)``.

    **Raises:** ``ValueError`` when the network is not scalar of depth 2 or no weights were stored.
    """
    dataset = view.dataset
    if "W1" not in dataset:
        raise ValueError(
            f"run {view.name!r} stored no weights; set store_weights = true for a phase portrait"
        )
    layers = sorted(str(v) for v in dataset.data_vars if str(v)[0] == "W" and str(v)[1:].isdigit())
    sizes = [
        [n for d, n in dataset[w].sizes.items() if d not in ("replica", "time")] for w in layers
    ]
    if len(layers) != 2 or any(size != [1, 1] for size in sizes):
        widths = " -> ".join(str(s) for s in [sizes[0][-1], *[size[0] for size in sizes]])
        raise ValueError(
            f"a phase portrait shows scalar networks of depth 2 (widths 1 -> 1 -> 1), and run "
            f'{view.name!r} has widths {widths}; use kind = "time_series" with observables such '
            'as "excess_loss" and "imbalance", or kind = "conservation"'
        )
    first, second = (_replica_first(dataset[w].squeeze(dataset[w].dims[-2:])) for w in layers)
    diverged = view.diverged
    if diverged.any() and not diverged.all():
        first, second = first[~diverged], second[~diverged]
    return first, second


def scalar_moments(view: RunView) -> tuple[float, float]:
    """Returns ``(sxx, T)`` of scalar data: the input's second moment and the target."""
    data: Any = view.run.trajectory.problem.data
    sxx = float(np.asarray(data.sxx).squeeze())
    return sxx, float(np.asarray(data.syx).squeeze()) / sxx


def diverged_text(count: int, replicas: int) -> str:
    """Writes "3 of 256 diverged", or "diverged" for a single path."""
    return "diverged" if replicas == 1 else f"{count} of {replicas} diverged"


def _replica_first(variable: xr.DataArray) -> Float[np.ndarray, "replica time *entry"]:
    if "replica" not in variable.dims:
        variable = variable.expand_dims("replica")
    rest = [d for d in variable.dims if d not in ("replica", "time")]
    return np.asarray(variable.transpose("replica", "time", *rest).values, dtype=float)


def drift(
    view: RunView, observable: str
) -> tuple[Float[np.ndarray, " time"], Float[np.ndarray, " time"], float]:
    r"""Returns how far an observable of any shape has moved from its start.

    **Returns:** the times, $\max |x(t) - x(0)|$ over entries and replicas at each time, both
    ``(time,)``, and the level of rounding $\epsilon \max |x(0)|$, where $\epsilon$ is the machine
    precision of the numbers the run computed with. Diverged replicas are left out.
    """
    _check_start(view)
    variable = recorded(view, observable)
    values = _replica_first(variable)
    diverged = view.diverged
    if diverged.any() and not diverged.all():
        values = values[~diverged]
    values = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    precision = np.finfo(np.float32 if variable.dtype == np.float32 else np.float64).eps
    scale = float(np.abs(values[0]).max())
    change = np.abs(values - values[0]).max(axis=1)
    time = np.asarray(view.dataset["time"].values, dtype=float)
    return time, change, float(precision) * (scale if scale > 0 else 1.0)


def _check_start(view: RunView) -> None:
    """Raises unless the first saved time is the start."""
    first = float(view.dataset["time"].values[0])
    if first > 0.0:
        raise ValueError(
            f"runs: {view.name!r} was not saved at its start but from t = {first:g} on; write 0.0 "
            "as the first of its save times"
        )
