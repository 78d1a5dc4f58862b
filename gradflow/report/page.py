"""The page of a study: one HTML file that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gradflow.analysis.comparison.against_theory import RULE
from gradflow.backend.whole_file import write_whole
from gradflow.plot.formatting import duration
from gradflow.report.draw import FigureFile
from gradflow.report.inline import inline_figure
from gradflow.report.tables import (
    PHASE_COLUMNS,
    claim_rows,
    order_lines,
    order_remarks,
    phase_rows,
    problems,
    provenance,
    remarks,
    setup_rows,
    summary,
    tone,
)
from gradflow.report.theory_table import THEORY_COLUMNS, theory_lines
from gradflow.study.results import StudyResult

_TEMPLATES = Path(__file__).parent


def write_page(result: StudyResult, figures: Sequence[FigureFile]) -> Path:
    """Writes ``result.out / "report.html"``: claims, figures, rates, phases, set-up, provenance.

    Everything is inside the file: styles, figures, text. It asks nothing of the network and runs
    no script; texts of the spec are escaped.

    **Returns:** the path of the page.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html.j2").render(
        name=result.spec.name,
        title=result.spec.title or result.spec.name,
        description=_paragraphs(result.spec.description),
        summary=summary(result),
        tone=tone(result),
        claims=claim_rows(result),
        figures=[
            (figure, inline_figure(figure.svg, figure.png, figure.name, _alt(figure)))
            for figure in figures
        ],
        theory_columns=THEORY_COLUMNS,
        theory=theory_lines(result),
        theory_rule=RULE,
        phase_columns=PHASE_COLUMNS,
        phases=phase_rows(result),
        remarks=remarks(result),
        orders=order_lines(result),
        order_remarks=order_remarks(result),
        problems=problems(result),
        setup=setup_rows(result),
        provenance=provenance(result),
        wall_time=duration(result.wall_time_s),
    )
    path = result.out / "report.html"
    write_whole(path, text)
    return path


def _alt(figure: FigureFile) -> str:
    return f"{figure.title or figure.name}. {figure.caption}"


def _paragraphs(text: str) -> str:
    """The text with the line breaks of its file gone; blank lines still part paragraphs."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))
