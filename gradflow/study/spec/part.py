"""The parts of a study that are carried out on their own."""

from __future__ import annotations

from typing import Literal, TypeAlias

from gradflow.study.spec.spec import StudySpec

Part: TypeAlias = Literal["study", "runs", "orders"]


def take_part(spec: StudySpec, part: Part) -> StudySpec:
    """The study without what the part leaves out.

    `"runs"` leaves out the [[orders]] tables, `"orders"` everything else.
    """
    if part == "runs":
        return spec.model_copy(update={"orders": []})
    if part == "orders":
        figures = [figure for figure in spec.figure if figure.about == "orders"]
        claims = [claim for claim in spec.claim if claim.about == "orders"]
        return spec.model_copy(update={"run": [], "figure": figures, "claim": claims})
    return spec
