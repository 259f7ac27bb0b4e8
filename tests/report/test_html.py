from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from amici_eval.common.errors import DataError, OutputError
from amici_eval.report.figures.evaluation_figures import save_figures
from amici_eval.report.numbers import effect
from amici_eval.report.page.evaluation_page import write_html
from amici_eval.settings.evaluation import MODES
from tests.builders import AWKWARD_TYPES, make_evaluation

EVIL = "<img src=x onerror=alert(2)>\"'&"
WRITTEN = datetime(2026, 3, 4, 5, 6, 7, tzinfo=timezone.utc)
VOID = {"meta", "img", "link", "br", "input"}


class Page(HTMLParser):
    """Elements, attributes and text as a browser takes them; complains about what is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words, self.rows, self.title = [], [], [], [], ""
        self.script = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br":
            self.rows[-1][-1] += "\n"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        if "script" in self.open:
            self.script += data
            return
        self.words.append(data)
        if "title" in self.open:
            self.title += data
        if self.open and self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def attributes(self, name):
        return [a[name] for _, a in self.elements if name in a]


def section(evaluation, identifier, **options):
    """Return a section of an evaluation's page as markup, or nothing."""
    with TemporaryDirectory() as folder:
        source = write_html(evaluation, folder, **options).read_text(encoding="utf-8")
    found = re.search(rf'<section id="{identifier}".*?</section>', source, re.DOTALL)
    return found[0] if found else ""


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation(
        model={"name": EVIL, "version": "3", "nested": {"key": EVIL}},
        data={"path": f"/data/{EVIL}.h5ad"},
        notes=[f"note {EVIL}"],
    )


@pytest.fixture(scope="module")
def drawn(evaluation, tmp_path_factory):
    files = save_figures(evaluation, tmp_path_factory.mktemp("figures"))
    return {kind: {f.stem: f for f in files if f.suffix == f".{kind}"} for kind in ("png", "svg")}


@pytest.fixture(scope="module")
def source(evaluation, drawn, tmp_path_factory):
    path = write_html(evaluation, tmp_path_factory.mktemp("page") / "run", figures=drawn["svg"])
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_nothing_from_model_or_data_becomes_markup(source, page):
    assert source.count("<script") == 1, "the page's own"
    assert "<img" not in source
    assert "<b>" not in source
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.title == f"Attention heads of {EVIL}, version 3"
    assert page.text.count(EVIL) >= 4, "name, path and note are shown as they are"
    assert "<script>alert(1)</script>" in page.text


def test_it_is_self_contained(source, page):
    assert "http" not in source.replace("http-equiv", "")
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not page.attributes("src")
    assert all(value.startswith(("#", "data:image/png;")) for value in page.attributes("href"))


def test_only_the_script_of_the_page_may_run_and_it_keeps_nothing(page):
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert len(page.script) > 1000
    # what throws in a frame without an origin, or asks a server
    for word in (
        "localStorage",
        "sessionStorage",
        "cookie",
        "indexedDB",
        "fetch(",
        "XMLHttpRequest",
        "eval(",
        "import(",
    ):
        assert word not in page.script


def test_ids_are_unique_and_every_reference_is_met(source, page):
    ids = page.attributes("id")
    assert len(ids) == len(set(ids)) > 40
    references = [value[1:] for value in page.attributes("href") if value.startswith("#")] + re.findall(
        r"url\(#([^)]+)\)", source
    )
    assert len(references) > 20
    assert set(references) <= set(ids)


def test_effects_come_first(page, evaluation):
    text = page.text
    assert text.index("Largest effect") < text.index("significant") < text.index("Heads and cell types")
    assert f"{evaluation.n_significant} of {evaluation.n_tests} tested" in text
    for word in (
        "keep-one ablation",
        "anticonservative",
        "In-sample",
        "coordinates" if not evaluation.notes else "note",
    ):
        assert word in text


def test_matrix_holds_every_effect_and_mark(page, evaluation):
    start = next(i for i, row in enumerate(page.rows) if row[:3] == ["Receiver type", "Cells", "Head 0"])
    shown = page.rows[start + 1 : start + 1 + len(evaluation.cell_types)]
    for index, row in enumerate(shown):
        assert row[0] == evaluation.cell_types[index]
        for head, cell in enumerate(row[2:]):
            value = evaluation.expl_var[head, index]
            if value != value:
                assert cell == "–"
                continue
            assert cell.split("\n")[0].endswith("*") == bool(evaluation.p_value_adj[head, index] <= 0.05)
            if abs(value) >= 5e-4:
                assert float(cell.rstrip("*")) == pytest.approx(value, abs=5.1e-4)
    assert shown[-1][2:] == ["–"] * 3


def test_heads_baselines_and_reasons_are_there(page, evaluation):
    heads = [row for row in page.rows if len(row) == 12]
    assert [row[:2] for row in heads[1:]] == [[t, str(h)] for h in range(3) for t in evaluation.cell_types]
    assert sum(row[-1] == "1 cell; at least 3 needed" for row in heads) == 3
    baselines = [row for row in page.rows if len(row) == 3 and row[0] == "CD8+_T_Cells"]
    index = evaluation.cell_types.index("CD8+_T_Cells")
    assert baselines == [["CD8+_T_Cells", f"{evaluation.expl_var_full[index]:.3f}", "0.010"]]
    assert "β cell, all heads: 1 cell; at least 3 needed" in page.text
    assert "<script>alert(1)</script>, head 2: predictions are constant" in page.text


def test_figures_have_alternative_text_and_captions(page):
    drawings = [a for tag, a in page.elements if tag == "svg"]
    assert len(drawings) == 2 + len(AWKWARD_TYPES)
    labels = [a["aria-label"] for a in drawings]
    assert labels.pop(0).startswith("Explained variance of each head kept alone, with its interval")
    assert labels[0] == "Explained variance of the best gene per head and receiver type"
    assert {f"Explained variance of genes per head in {name}" for name in AWKWARD_TYPES} == set(labels[1:])
    assert all(a["role"] == "img" for a in drawings)
    assert sum(tag == "figcaption" for tag, _ in page.elements) == len(drawings)


def test_png_figures_become_data(evaluation, drawn, tmp_path):
    text = write_html(evaluation, tmp_path, figures={'my "own"': next(iter(drawn["png"].values()))}).read_text("utf-8")
    images = [a for tag, a in Page(text).elements if tag == "img"]
    assert [a["alt"] for a in images] == ['my "own"']
    assert images[0]["src"].startswith("data:image/png;base64,iVBOR")


def test_scripts_in_a_drawing_are_dropped(evaluation, tmp_path):
    (tmp_path / "x.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9"'
        ' onload="alert(3)"><script>alert(3)</script><g onclick="alert(3)"><path id="p" d="M0 0"/></g>'
        '<use xlink:href="#p"/><use xlink:href="http://evil.example/x.svg#p"/><foreignObject/></svg>'
    )
    text = write_html(evaluation, tmp_path, figures={"x": tmp_path / "x.svg"}).read_text("utf-8")
    page = Page(text)
    assert "alert(3)" not in text
    assert "evil" not in text
    assert "f0-p" in page.attributes("id")
    assert [href for href in page.attributes("href") if href.startswith(("#f0", "http"))] == ["#f0-p"]


@pytest.mark.parametrize("content", [None, "no drawing", "<html/>"])
def test_a_missing_or_damaged_figure_is_named(evaluation, tmp_path, content):
    if content is not None:
        (tmp_path / "x.svg").write_text(content)
    with pytest.raises(DataError, match=r"figure .*x\.svg cannot be used .*: .* PNG or SVG files; draw it again"):
        write_html(evaluation, tmp_path, figures={"x": tmp_path / "x.svg"})


def test_without_figures_names_or_values_there_is_still_a_page(tmp_path):
    empty = make_evaluation(2, ["only"], model={}, data={}, notes=[])
    page = Page(write_html(empty, tmp_path).read_text("utf-8"))
    assert page.title == "Attention heads of AMICI model"
    assert "only, all heads: 1 cell; at least 3 needed" in page.text
    assert "figure" not in {tag for tag, _ in page.elements}


def test_it_is_the_same_each_time_and_small(tmp_path):
    large = make_evaluation(8, [f"type_{i}" for i in range(19)], 313, inferred="lag", n_widths=3)
    pages = []
    for name in "ab":
        figures = save_figures(large, tmp_path / name, formats=["svg"])
        page = write_html(large, tmp_path / name, figures={f.stem: f for f in figures}, written=WRITTEN)
        pages.append(page.read_bytes())
    assert pages[0] == pages[1]
    assert len(pages[0]) < 5_000_000


def test_a_page_that_cannot_be_written_is_named(evaluation, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html cannot be written"):
        write_html(evaluation, tmp_path)


@pytest.fixture(scope="module")
def ablated():
    return make_evaluation(4, modes=MODES, engine="factored", parity=2e-7, parity_cells=99)


def test_engine_and_parity_are_said(page, ablated, tmp_path):
    assert "Predictions by the hooked engine." in page.text
    text = Page(write_html(ablated, tmp_path).read_text("utf-8")).text
    assert "Predictions by the factored engine; on 99 cells" in text
    assert "differ by at most 2e-07" in text


def test_heads_that_matter_most_are_there(page, ablated, tmp_path):
    assert "Heads taken away" not in page.text
    shown = Page(write_html(ablated, tmp_path).read_text("utf-8"))
    start = next(
        i for i, row in enumerate(shown.rows) if row[:3] == ["Receiver type", "EV, all heads", "Most missed head"]
    )
    rows = shown.rows[start + 1 : start + len(AWKWARD_TYPES)]
    assert [row[0] for row in rows] == sorted(AWKWARD_TYPES)[:-1]
    pairs = ablated.interactions_frame()
    for index, row in enumerate(rows):
        lost = ablated.expl_var_full[index] - ablated.ablations.of("leave_one_out")[:, index]
        share = ablated.ablations.of("shapley")[:, index]
        assert row[2:4] == [str(lost.argmax()), f"{lost.max():.3f}"]
        assert row[4:6] == [str(share.argmax()), f"{share.max():.3f}"]
        own = pairs[pairs["ct_name"] == row[0]].set_index(["head_a", "head_b"])["interaction"]
        assert row[6:8] == ["{} + {}".format(*own.idxmin()), effect(own.min())]
        expected = ["{} + {}".format(*own.idxmax()), effect(own.max())] if own.max() > 0 else ["–", ""]
        assert row[8:10] == expected
    assert {"–"} < {row[8] for row in rows}, "else the test says less"


@pytest.mark.parametrize("modes", [(), ("keep_one", "frozen_norm"), ("frozen_shapley",)])
def test_without_what_it_tells_there_is_no_section_of_ablations(tmp_path, modes):
    assert 'id="ablations"' not in write_html(make_evaluation(modes=modes), tmp_path).read_text("utf-8")


def test_no_pair_is_called_alike_that_is_not(tmp_path):
    evaluation = make_evaluation(2, ["A"], modes=("shapley",), with_undefined=False)
    pairs = np.full((1, 2, 2), 0.2)
    found = dataclasses.replace(evaluation.ablations, interaction=pairs)
    text = write_html(dataclasses.replace(evaluation, ablations=found), tmp_path).read_text("utf-8")
    (row,) = [row for row in Page(text).rows if row[0] == "A" and len(row) == 8 and "+" in row[6]]
    assert row[4:] == ["–", "", "0 + 1", "0.200"]


def test_figures_of_ablations_have_captions(ablated, tmp_path):
    files = save_figures(ablated, tmp_path, formats=["svg"])[-2:]
    page = Page(write_html(ablated, tmp_path, figures={f.stem: f for f in files}).read_text("utf-8"))
    labels = [a["aria-label"] for tag, a in page.elements if tag == "svg"]
    assert labels[0].startswith("What each head explains alone, what is lost without it")
    assert labels[1].startswith("Interaction of heads per receiver type")
    assert set(AWKWARD_TYPES) <= {word.strip() for word in page.words}
