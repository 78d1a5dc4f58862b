"""The runs of a study as figures and tables see them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradflow.dynamics import SlowFlow
from gradflow.plot.reading import RunView
from gradflow.plot.style import LineStyle, group_colours, line_style
from gradflow.study.results import StudyResult
from gradflow.study.spec.run_tables import RunSpec


def run_views(result: StudyResult, names: Sequence[str]) -> tuple[RunView, ...]:
    """Returns the named runs (all when ``names`` is empty), with the study's colours.

    Colours are given over the whole spec, so a group has the same colour in every figure. Runs
    that did not finish are left out; :func:`missing_runs` names them.

    **Raises:** ``ValueError`` for a name that is not a run of the study.
    """
    known = {spec.name for spec in result.spec.run}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"runs: {unknown[0]!r} is not a run of this study; the runs are {sorted(known)}"
        )
    colours = group_colours([_group(spec) for spec in result.spec.run])
    shades = _shades(result)
    return tuple(
        RunView(
            run=run,
            dataset=run.trajectory.to_xarray(),
            colour=colours[_group(run.spec)],
            style=shades[name],
        )
        for name, run in result.runs.items()
        if not names or name in names
    )


def _group(spec: RunSpec) -> str:
    """Returns the group of a run; runs without one are grouped by their regularizers."""
    return spec.group or ", ".join(regularizer.kind for regularizer in spec.regularizers)


def _shades(result: StudyResult) -> dict[str, LineStyle]:
    """Gives every run its stroke: runs of one group and one dynamics go from dark to light."""
    families: dict[tuple[str, str], list[str]] = {}
    for spec in result.spec.run:
        families.setdefault((_group(spec), _stroke_of(spec)), []).append(spec.name)
    styles = {}
    for (_, kind), members in families.items():
        base = line_style(kind)
        spread = min(0.3, 0.15 * (len(members) - 1))
        shades = np.clip(base.shade + np.linspace(-spread, spread, len(members)), -0.6, 0.6)
        for name, shade in zip(members, shades, strict=True):
            styles[name] = replace(base, shade=float(shade))
    return styles


def _stroke_of(spec: RunSpec) -> str:
    """Returns the name by which the stroke of a run's dynamics is known."""
    dynamics = spec.dynamics.made
    is_classical = isinstance(dynamics, SlowFlow) and not dynamics.finite_step
    return "classical SlowFlow" if is_classical else spec.dynamics.kind


def missing_runs(result: StudyResult, names: Sequence[str]) -> list[str]:
    """Returns the labels of the named runs (all when empty) that did not finish."""
    return [
        spec.title
        for spec in result.spec.run
        if spec.name not in result.runs and (not names or spec.name in names)
    ]
