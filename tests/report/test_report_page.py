"""The page: one file, complete, escaped, asking nothing of the network."""

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

import gradflow as gf
from gradflow.plot.reading import on_common_clock
from gradflow.report import FigureError, draw_figures, inline, write_page
from gradflow.report.inline import inline_svg
from gradflow.report.tables import Cell, claim_rows, phase_rows, provenance, summary, tone
from gradflow.study.figures.views import run_views
from gradflow.study.results import StudyResult

MakeStudy = Callable[..., StudyResult]

FIGURES: tuple[dict[str, Any], ...] = (
    {"kind": "time_series", "title": "Series", "observables": ["imbalance"]},
    {"kind": "rates", "title": "Rates"},
)
VOID = {"meta", "br", "img", "link", "input", "hr"}
LINKS = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}


class Page(HTMLParser):
    """Tags, text and links of a page; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in LINKS]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def page_of(result: StudyResult, *, draw: bool = True) -> tuple[str, Page]:
    path = write_page(result, draw_figures(result) if draw else ())
    assert path == result.out / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_page_says_everything_and_asks_nothing_of_the_network(make_study: MakeStudy):
    html, page = page_of(make_study(*FIGURES, diverged={"sgd": 3}))
    for words in (
        "Two phases",
        "A scalar network of depth 2.",
        "3 of 5 claims hold, 1 fails, 1 is undecided; of 3 rates compared with theory 3 agree.",
        "Label noise removes the imbalance",
        "0.01253 ± 0.00012",
        "within 3 standard errors",
        "1.500 ± 0.030",
        "predicted 1.6",
        "0.01263 ± 0.00010",
        "95\u00a0% [0.01243, 0.01283]",
        "3 of 16",
        "no regularization phase: the loss floor is 0",
        "whitened(target=[[1.0]])",
        "depth 2, widths 1 → 1 → 1",
        "LabelNoise(std=0.5)",
        "GradientDescent(step_size=0.05)",
        "float64",
        "12.3 s",
        "gradflow study spec.toml",
    ):
        assert words in page.text
    order = [page.text.index(h) for h in ("Claims", "Figures", "Phases and rates", "Problem")]
    assert order == sorted(order)
    assert page.tags.count("svg") == 2

    assert "http:" not in html
    assert "https:" not in html
    assert "script" not in page.tags
    assert "@import" not in html
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "url(#figure-" in html  # references stay inside the page ...
    assert len(page.ids) == len(set(page.ids))  # ... and no two figures share a name


def test_texts_of_the_spec_are_escaped(make_study: MakeStudy):
    evil = '</svg><script>alert("x")</script> & $5'
    result = make_study(FIGURES[1] | {"title": evil}, title=evil, description=evil)
    claim = replace(result.claims[0], sentence=evil, rule=evil, detail=evil)
    run = replace(result.runs["sgd"], label=evil, notes=(evil,))
    result = replace(result, claims=(claim,), runs={**result.runs, "sgd": run})
    html, page = page_of(result)
    assert "<script" not in html
    assert "script" not in page.tags
    assert page.text.count(evil) >= 5


def test_a_very_large_svg_becomes_a_png(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inline, "LARGEST_SVG", 10)
    html, page = page_of(make_study(FIGURES[1]))
    assert "svg" not in page.tags
    assert "img" in page.tags
    assert 'src="data:image/png;base64,' in html


def test_inlining_keeps_text_that_looks_like_markup():
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="9pt" viewBox="0 0 9 9"><metadata>m'
        '</metadata><defs><style>*{fill: red}</style><path id="a"/></defs><use href="#a"/>'
        '<g clip-path="url(#a)"><text>id="a" &lt;b&gt; url(#a)</text></g></svg>'
    )
    found = str(inline_svg(svg, "one", 'say "this"'))
    assert "http" not in found
    assert "metadata" not in found
    assert "width" not in found
    assert 'id="figure-one-a"' in found
    assert 'href="#figure-one-a"' in found
    assert 'clip-path="url(#figure-one-a)"' in found
    assert "#figure-one *{fill: red}" in found
    assert '>id="a" &lt;b&gt; url(#a)<' in found
    assert "say &#34;this&#34;" in found


def test_page_without_claims_and_figures(make_study: MakeStudy):
    _, page = page_of(make_study(claims=()), draw=False)
    assert "The study makes no claims; of 3 rates" in page.text
    assert "Figures" not in page.text
    assert "svg" not in page.tags


@pytest.mark.parametrize(
    ("verdicts", "words", "colour"),
    [
        ([], "The study makes no claims", "plain"),
        (["holds"], "The one claim holds", "holds"),
        (["holds", "holds"], "All 2 claims hold", "holds"),
        (["holds", "fails"], "1 of 2 claims holds, 1 fails", "fails"),
        (["holds", "undecided"], "1 of 2 claims holds, 1 is undecided", "undecided"),
        (["fails", "fails", "undecided"], "0 of 3 claims hold, 2 fail, 1 is undecided", "fails"),
    ],
)
def test_summary(make_study: MakeStudy, verdicts: list[Any], words: str, colour: str):
    result = make_study()
    claims = tuple(replace(result.claims[0], verdict=verdict) for verdict in verdicts)
    rates = "; of 3 rates compared with theory 3 agree."
    assert summary(replace(result, claims=claims)) == words + rates
    assert tone(replace(result, claims=claims)) == colour
    bare = {name: replace(run, prediction=None) for name, run in result.runs.items()}
    assert summary(replace(result, claims=claims, runs=bare)) == f"{words}."


def with_rates(result: StudyResult, **changes: dict[str, Any]) -> StudyResult:
    """The study, with one claim, and with fields of the rates of its runs changed."""
    runs = dict(result.runs)
    for name, fields in changes.items():
        run = runs[name]
        assert run.rate is not None
        assert run.phases is not None
        rate = replace(run.rate, **fields)
        phases = replace(run.phases, regularization_rate=rate)
        runs[name] = replace(run, rate=rate, phases=phases)
    return replace(result, runs=runs, claims=result.claims[:1])


BENT: dict[str, Any] = {"constant": False, "local": (0.02, 0.012, 0.008)}


@pytest.mark.parametrize(
    ("changes", "words", "colour"),
    [
        # sgd: predicted 0.0125, measured with an error of 1e-4 over 16 replicas
        ({"sgd": {"value": 0.014}}, "2 agree, 1 misses", "undecided"),
        ({"sgd": {"value": 0.0131}}, "2 agree, 1 is undecided", "holds"),
        ({"sgd": BENT}, "2 agree, 1 is not constant", "holds"),
        # within the tolerance all along the run
        ({"sgd": {"constant": False, "local": (0.0128, 0.0126, 0.012)}}, "3 agree", "holds"),
        (
            {"sgd": BENT, "sde": BENT, "decay": {"value": 0.03}},
            "0 agree, 1 misses, 2 are not constant",
            "undecided",
        ),
        ({"sgd": {"value": 0.02}, "decay": {"value": 0.03}}, "1 agrees, 2 miss", "undecided"),
    ],
)
def test_the_banner_counts_the_rates_that_theory_misses(
    make_study: MakeStudy, changes: dict[str, Any], words: str, colour: str
):
    result = with_rates(make_study(), **changes)
    assert summary(result) == f"The one claim holds; of 3 rates compared with theory {words}."
    assert tone(result) == colour
    assert words in page_of(result, draw=False)[1].text


@pytest.mark.parametrize(
    ("followed", "words"), [(0.0125, "3 agree"), (0.0045, "2 agree, 1 misses")]
)
def test_a_rate_that_is_not_constant_is_counted_beside_the_slow_flow(
    make_study: MakeStudy, followed: float, words: str
):
    """The measured mean along the run is 0.0126; without a slow flow it is not compared at all."""
    result = with_rates(make_study(), sgd=BENT)
    sgd = result.runs["sgd"]
    assert sgd.rate is not None
    sgd = replace(sgd, along=replace(sgd.rate, value=followed))
    text = summary(replace(result, runs={**result.runs, "sgd": sgd}))
    assert text.endswith(f"of 3 rates compared with theory {words}.")


def test_a_rate_that_is_not_constant_is_not_printed_with_an_error(make_study: MakeStudy):
    result = with_rates(make_study(FIGURES[1]), sgd=BENT)
    sgd = result.runs["sgd"]
    assert sgd.rate is not None
    sgd = replace(sgd, along=replace(sgd.rate, value=0.0123))
    result = replace(result, runs={**result.runs, "sgd": sgd})
    row = next(row for row in phase_rows(result) if row.run == "Label noise, SGD")
    decay, separation = row.cells[2], row.cells[3]
    assert decay.value == "not constant: 0.02 → 0.012 → 0.008"
    assert decay.below == (
        "mean 0.01263",
        "slow flow along the run 0.0123",
        "predicted 0.0125 at its start",
    )
    changing = replace(result.claims[0], measured=0.0123, parts=(0.02, 0.012, 0.008))
    (claimed,) = claim_rows(replace(result, claims=(changing,)))
    assert claimed.measured == "0.02 → 0.012 → 0.008"
    assert separation.value == "about 360"
    assert separation.below[0] == "of a rate that is not constant"
    _, page = page_of(result, draw=False)
    assert "not constant: 0.02 → 0.012 → 0.008" in page.text
    assert page.text.count("0.01263 ± 0.00010") == 1  # that of the SDE
    (figure,) = (file for file in draw_figures(result) if file.name == "rates")
    assert "The rate is not constant along Label noise, SGD" in figure.caption


def test_an_optimization_rate_that_is_not_constant_is_printed_as_its_parts(make_study: MakeStudy):
    result = make_study()
    sgd = result.runs["sgd"]
    assert sgd.phases is not None
    parts = {"optimization_rate_constant": False, "optimization_rate_local": (6.0, 5.0, 4.25)}
    sgd = replace(sgd, phases=replace(sgd.phases, **parts, separation=2288.0))
    result = replace(result, runs={**result.runs, "sgd": sgd})
    row = next(row for row in phase_rows(result) if row.run == "Label noise, SGD")
    assert row.cells[1].value == "not constant: 6 → 5 → 4.25"
    assert row.cells[1].below == ("mean 4.5", "predicted 4.47")
    assert row.cells[3].value == "about 2300"
    assert row.cells[3].below[0] == "of a rate that is not constant"


@pytest.mark.parametrize(
    ("low", "high", "below"),
    [
        (0.010000094, 0.010000125, ()),  # the same to the digits shown
        (0.01, 0.01, ()),
        (0.0098, 0.0102, ("[0.00980, 0.01020] over thirds of the window",)),
    ],
)
def test_one_path_has_no_interval(
    make_study: MakeStudy, low: float, high: float, below: tuple[str, ...]
):
    result = with_rates(make_study(), decay={"value": 0.01, "low": low, "high": high})
    row = next(row for row in phase_rows(result) if row.run == "Weight decay, flow")
    assert row.cells[2] == Cell("0.01", (*below, "predicted 0.02"))
    sgd = next(row for row in phase_rows(result) if row.run == "Label noise, SGD")
    assert sgd.cells[2].below[0] == "95\u00a0% [0.01243, 0.01283]"  # over replicas


def test_runs_with_different_momenta_stand_in_effective_time(make_study: MakeStudy):
    result = make_study(FIGURES[0])
    sgd = result.runs["sgd"]
    ball, kept = gf.GradientDescent(0.05, momentum=0.9), sgd.trajectory
    trajectory = gf.Trajectory(kept.to_xarray(), kept.problem, ball, kept.start)
    result = replace(result, runs={**result.runs, "sgd": replace(sgd, trajectory=trajectory)})
    rows = {row.run: row.cells for row in phase_rows(result)}
    # It ends at t = 1.5; the rates are 4.5 and 0.012625 per unit of flow time.
    said = [cell.below[-1] for cell in rows["Label noise, SGD"][:3]]
    assert said[:2] == ["in effective time 15", "in effective time 0.45"]
    assert float(said[2].removeprefix("in effective time ")) == pytest.approx(0.0012625, rel=1e-3)
    below = [line for cell in rows["Label noise, SDE"] for line in cell.below]
    assert not any("effective" in line for line in below)
    views = {view.name: view for view in on_common_clock(run_views(result, ()))}
    assert views["sgd"].optimization_end == pytest.approx(15.0)
    assert views["sde"].optimization_end == pytest.approx(1.5)
    assert views["sgd"].dataset["time"].values[-1] == pytest.approx(1000.0)
    assert views["sde"].dataset["time"].values[-1] == pytest.approx(100.0)
    figure = draw_figures(result)[0]
    assert "against effective time. Momenta differ, so the times" in figure.caption
    assert "effective" not in draw_figures(make_study(FIGURES[0]))[0].caption


def test_an_interrupted_study_never_looks_like_a_success(make_study: MakeStudy):
    result = make_study()
    result = replace(result, claims=result.claims[:1], status="interrupted")
    html, page = page_of(result, draw=False)
    assert "The study was interrupted; 1 of 1 claims holds." in page.text
    assert 'class="summary fails"' in html


def test_a_study_of_which_nothing_finished_still_has_a_page(make_study: MakeStudy):
    result = replace(make_study(*FIGURES), runs={}, claims=(), status="failed")
    with pytest.raises(FigureError, match="none of them finished") as error:
        draw_figures(result)
    assert error.value.figures == ()
    _, page = page_of(result, draw=False)
    assert "The study was broken off by an error; no claim was judged." in page.text


def test_runs_without_phases_have_no_line(make_study: MakeStudy):
    result = make_study()
    bare = replace(result.runs["flow"], phases=None, rate=None, prediction=None)
    assert len(phase_rows(result)) == 4
    assert len(phase_rows(replace(result, runs={**result.runs, "flow": bare}))) == 3
    lost = make_study(diverged={"flow": 1})
    bare = replace(lost.runs["flow"], phases=None, rate=None, prediction=None)
    rows = phase_rows(replace(lost, runs={**lost.runs, "flow": bare}))
    assert rows[0].cells[-1].value == "1 of 1"


def test_provenance_lists_versions_once(make_study: MakeStudy):
    rows = dict(provenance(make_study()))
    assert rows["jax"] == "0.10"
    assert rows["device"] == "cpu"
    assert rows["seed of the study"] == "7"
