"""What a figure of kind "scaling" measures on the runs of a study."""

from collections.abc import Sequence

from gradflow.plot.reading import RunView
from gradflow.plot.scaling import Point
from gradflow.study.claims.measures import MEASURES
from gradflow.study.results import StudyResult
from gradflow.study.spec.check import parameters
from gradflow.study.spec.spec import ClaimSpec, Scaling


def scaling_points(
    result: StudyResult, views: Sequence[RunView], spec: Scaling
) -> tuple[list[Point], list[str]]:
    """Returns what was measured on every run, as in claims, and why others have no point.

    **Raises:** ``ValueError`` when a run lacks the parameter.
    """
    points, notes = [], []
    for view in views:
        run = result.runs[view.name]
        known = parameters(run.spec)
        if spec.parameter not in known:
            raise ValueError(
                f"parameter: run {view.name!r} has no {spec.parameter!r}; it has {sorted(known)}"
            )
        claim = ClaimSpec(
            sentence=spec.title or spec.kind,
            quantity=spec.quantity,
            run=view.name,
            observable=spec.observable,
            component=spec.component,
            window=spec.window,
        )
        try:
            measured = MEASURES[spec.quantity](claim, [run])
        except ValueError as error:
            notes.append(f"{view.label} has no point: {error}.")
            continue
        error = 0.0 if measured.error is None else measured.error
        points.append(Point(view, known[spec.parameter], measured.value, error))
    return points, notes
