"""The page of an evaluation: what it says, and that nothing foreign becomes markup."""

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
from amici_eval.report.evaluation_sentences import VALIDITY, WHY_THIS_ORDER, significance_sentence
from amici_eval.report.figures.evaluation_figures import save_figures
from amici_eval.report.numbers import effect, interval, p_text
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


def rows_below(inferred_page, *first):
    """Return the rows of the table whose header begins with these, by type (and head)."""
    start = next(i for i, row in enumerate(inferred_page.rows) if tuple(row[: len(first)]) == first)
    width, rows = len(inferred_page.rows[start]), []
    for row in inferred_page.rows[start + 1 :]:
        if len(row) != width or row[0] == "Receiver type":
            break
        rows.append(row)
    return inferred_page.rows[start], rows


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


def test_nothing_from_model_or_data_becomes_markup(source, page, inferred_source, inferred_page):
    for text, found in ((source, page), (inferred_source, inferred_page)):
        assert text.count("<script") == 1, "the page's own"
        assert "<img" not in text
        assert "<b>" not in text
        assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
        assert EVIL[:23] in found.text
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
    refused = "localStorage sessionStorage cookie indexedDB fetch( XMLHttpRequest eval( import(".split()
    assert not [word for word in refused if word in page.script]


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
    assert all(word in text for word in ("keep-one ablation", "anticonservative", "In-sample", "note"))


def test_matrix_holds_every_effect_and_mark(page, evaluation):
    _, shown = rows_below(page, "Receiver type", "Cells", "Head 0")
    assert [row[0] for row in shown] == list(evaluation.cell_types)
    for index, row in enumerate(shown):
        for head, cell in enumerate(row[2:]):
            value = evaluation.expl_var[head, index]
            mark = "*" if evaluation.p_value_adj[head, index] <= 0.05 else ""
            assert cell == ("–" if np.isnan(value) else effect(value) + mark)
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
    figures = {f.stem: f for f in save_figures(large, tmp_path, formats=["svg"])}
    one, two = (write_html(large, tmp_path, figures=figures, written=WRITTEN).read_bytes() for _ in range(2))
    assert one == two
    assert len(one) < 5_000_000


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
    _, rows = rows_below(shown, "Receiver type", "EV, all heads", "Most missed head")
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


@pytest.fixture(scope="module")
def inferred():
    return make_evaluation(genes=(EVIL, "HLA-DRA", "$g$", "<b>", "IL7R"), inferred="lag", n_widths=3)


@pytest.fixture(scope="module")
def inferred_source(inferred, tmp_path_factory):
    return write_html(inferred, tmp_path_factory.mktemp("inferred_page")).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def inferred_page(inferred_source):
    return Page(inferred_source)


def test_the_page_says_why_effects_come_first_and_then_tests_in_order(inferred_page):
    text = inferred_page.text
    words = ("Largest effect", "(medians over 15 pairs)", WHY_THIS_ORDER, VALIDITY["lag"], VALIDITY["free"])
    places = [text.index(one) for one in words]
    assert places == sorted(places)
    sections = ["Heads and cell types", "Best head of each type", "Held out", "Without heads", "Genes"]
    sections += ["Scale and power", "p against tile width", "Undefined, and why", "How to read this", "All heads"]
    identifiers = [a["id"] for tag, a in inferred_page.elements if tag == "section"]
    expected = ["matrix", "best", "held-out", "baselines", "genes", "scale", "widths", "undefined", "read"]
    expected += ["each-head", "head-0", "head-1", "head-2", "heads"]
    assert identifiers == [*expected, "identity"]
    assert all(heading in text for heading in sections)


def test_the_matrix_is_marked_by_the_null_that_decides(inferred_page, inferred):
    _, rows = rows_below(inferred_page, "Receiver type", "Cells", "Head 0")
    for index, row in enumerate(rows):
        for head, cell in enumerate(row[2:]):
            assert cell.split("\n")[0].endswith("*") == bool(inferred.spatial.p_value_adj[head, index] <= 0.05)
    assert np.any((inferred.spatial.p_value_adj > 0.05) & (inferred.p_value_adj <= 0.05)), "else it says less"
    assert "* adjusted p ≤ 0.05 (lag null, in-sample)." in inferred_page.text
    low, high = (effect(bound[1, 2]) for bound in (inferred.intervals.low, inferred.intervals.high))
    assert rows[2][3].endswith(f"\n{low} to {high}")
    assert "\n" not in rows[0][2], "the first type has too few tiles"


def test_held_out_is_beside_in_sample(inferred_page, inferred):
    header, rows = rows_below(inferred_page, "Receiver type", "Cells", "All heads")
    found = inferred.parts
    assert header == ["Receiver type", "Cells", "All heads", "Head 0", "Head 1", "Head 2"]
    assert [row[0] for row in rows] == list(inferred.cell_types)
    assert rows[1][1] == f"{found.n_cells[0, 1]} / {found.n_cells[1, 1]}"
    assert rows[1][2] == f"{effect(found.full[0, 1])} / {effect(found.full[1, 1])}"
    assert rows[1][4] == f"{effect(found.expl_var[0, 1, 1])} / {effect(found.expl_var[1, 1, 1])}"
    assert rows[0][3] == f"{effect(found.expl_var[0, 0, 0])} / –"
    assert rows[-1][2:] == ["– / –"] * 4


def test_without_heads_says_baselines_gain_and_what_they_are(inferred_page, inferred):
    header, rows = rows_below(inferred_page, "Receiver type", "All heads (whole model)")
    found = inferred.trivial
    assert header[3:] == [
        *("Types of neighbours", "Expression of neighbours", "Position", "Gain, all heads"),
        *("Gain, head 0", "Gain, head 1", "Gain, head 2"),
    ]
    values = [inferred.expl_var_full, inferred.expl_var_none, *found.expl_var, found.full_gain, *found.gain]
    for index, row in enumerate(rows):
        assert row == [inferred.cell_types[index], *(effect(float(one[index])) for one in values)]
    for words in (
        "ridge regression on how many of a cell's neighbours",
        "their mean expression",
        "a smooth function of where",
        "They were fitted on training cells.",
    ):
        assert words in inferred_page.text


def test_nearest_neighbour_masked_is_beside_the_effect(inferred_page, inferred):
    header, rows = rows_below(inferred_page, "Receiver type", "All heads", "Head 0")
    assert len(header) == 5
    without = inferred.trivial.without_nearest
    assert rows[2][3] == f"{effect(inferred.expl_var[1, 2])} / {effect(without[1, 2])}"
    assert "may read segmentation bleed" in inferred_page.text
    nothing = dataclasses.replace(inferred.trivial, without_nearest=np.full((3, 7), np.nan))
    assert "Nearest" not in section(dataclasses.replace(inferred, trivial=nothing), "baselines")


def test_genes_are_those_with_the_smallest_adjusted_p(inferred_page, inferred):
    _, rows = rows_below(inferred_page, "Receiver type", "Head", "Genes *")
    significant = [(inferred.cell_types[c], str(h)) for c, h in np.argwhere(inferred.adjusted.T <= 0.05)]
    assert [tuple(row[:2]) for row in rows] == significant
    for name, head, count, *shown in rows:
        at = int(head), inferred.cell_types.index(name)
        explained = inferred.expl_var_gene[at] > 0
        p = np.where(explained, inferred.spatial.p_value_adj_gene[at], np.nan)
        assert count == str((p <= 0.05).sum())
        shown = [one for one in shown if one]
        assert len(shown) == np.isfinite(p).sum()
        assert [float(one.rstrip(" *").rsplit(" p ")[-1]) for one in shown] == pytest.approx(
            sorted(p[np.isfinite(p)]), rel=0.05, abs=6e-4
        )
        best = int(np.nanargmin(p))
        assert f"{effect(inferred.expl_var_gene[at][best])}, p {p_text(p[best])}" in " ".join(shown)
    related = (inferred.spatial.p_value_adj_gene <= 0.05) & ~(inferred.expl_var_gene > 0)
    unexplained = related[inferred.adjusted <= 0.05].sum()
    assert unexplained
    assert f"Left out, {unexplained:,} more with such a p, but without explained variance above 0" in inferred_page.text
    n_tests = np.isfinite(inferred.spatial.p_value_gene).sum()
    assert f"one family of {n_tests} tests, all heads x types x genes (BH)" in inferred_page.text


def test_at_most_five_genes_of_a_head_are_shown_the_largest_of_ties_first():
    inferred = make_evaluation(1, ["A"], 30, inferred="lag", with_undefined=False)
    effects = inferred.expl_var_gene.copy()
    effects[0, 0] = np.linspace(0.0, 0.29, 30)
    tests = dataclasses.replace(
        inferred.spatial, p_value_adj=np.array([[0.01]]), p_value_adj_gene=np.full((1, 1, 30), 1e-300)
    )
    text = section(dataclasses.replace(inferred, expl_var_gene=effects, spatial=tests), "genes")
    (row,) = [row for row in Page(text).rows if row[0] == "A"]
    assert row[3:] == [f"GENE{number}: 0.{number}0, p 1.0e-300 *" for number in (29, 28, 27, 26, 25)]


def test_where_no_head_is_significant_no_gene_is_shown():
    inferred = make_evaluation(inferred="lag", alpha=1e-9)
    assert "No head is significant in any type." in section(inferred, "genes")


def test_scale_and_power_are_in_units_of_the_data(inferred_page, inferred):
    header, rows = rows_below(inferred_page, "Receiver type", "Cells", "Correlation length")
    assert header[2:] == ["Correlation length", "Reach", "Effective sample size", "Detectable EV", "Tiles"]
    assert rows[1][2:4] == [f"{inferred.spatial.correlation_length[1]:.3g}", "401"]
    low, high = inferred.spatial.detectable[:, 1].min(), inferred.spatial.detectable[:, 1].max()
    assert rows[1][5:] == [f"{effect(low)} to {effect(high)}", "12"]
    assert rows[-1][2:6] == ["–"] * 4
    assert "Tiles: of width 75, resampled 1,000 times for the 95 % intervals." in inferred_page.text
    none = dataclasses.replace(inferred.spatial, correlation_length=np.full(7, np.nan))
    found = Page(section(dataclasses.replace(inferred, spatial=none), "scale"))
    assert [row[2] for row in found.rows[1:]] == ["none found"] * 6 + ["–"], "the last type has no test"
    tile = section(make_evaluation(inferred="tile"), "scale")
    assert "Tile width: side of the squares" in tile
    for null, but in (("tile", " but the tile width"), ("torus", ""), ("sample", "")):
        shown = section(make_evaluation(inferred=null), "scale")
        assert ("Tile width" if null == "tile" else "Reach (lag null)") in Page(shown).rows[0]
        for name in ("Effective sample size (lag null)", "Detectable EV (lag null)"):
            assert name in Page(shown).rows[0]
        assert (
            f"All of these{but}, and the p of genes, come from the lag null, not from the {null} null."
            in Page(shown).text
        )


def test_p_against_tile_width_is_there_only_where_there_are_widths(inferred_page, inferred):
    header, rows = rows_below(inferred_page, "Receiver type", "Head", "Width 1")
    assert len(header) == 5
    assert len(rows) == 3 * 6, "the last type has none"
    p = inferred.spatial.p_by_width
    assert rows[3] == [
        inferred.cell_types[1],
        "0",
        *(f"{w}: {p_text(p[i, 0, 1])}" for i, w in enumerate((25, 50, 75))),
    ]
    assert rows[0][3:] == ["", ""]
    assert section(make_evaluation(inferred="lag"), "widths") == ""


def test_all_heads_have_the_spatial_p_before_the_free_one(inferred_page, inferred):
    header, rows = rows_below(inferred_page, "Receiver type", "Head", "Cells", "EV, all genes")
    names = ["Interval", "Gain", "Effective cells (lag)", "p (lag)", "Adjusted p (lag)", "p (free, anticonservative)"]
    places = [header.index(name) for name in names]
    assert places == sorted(places)
    frame = inferred.heads()
    assert len(rows) == len(frame)
    for row, entry in zip(rows, frame.to_dict("records"), strict=True):
        found = dict(zip(header, row, strict=True))
        assert found["Adjusted p (lag)"] == p_text(entry["p_value_adj_spatial"])
        assert found["Adjusted p (free, anticonservative)"] == p_text(entry["p_value_adj_head"])
        expected = "" if np.isnan(entry["p_value_adj_spatial"]) else "yes" if entry["significant"] else "no"
        assert found["Significant (lag)"] == expected


def test_what_was_not_computed_has_no_section(tmp_path):
    text = write_html(make_evaluation(), tmp_path).read_text(encoding="utf-8")
    for identifier in ("held-out", "genes", "scale", "widths"):
        assert f'id="{identifier}"' not in text
    assert "Without heads" in text


@pytest.mark.parametrize("missing", ["spatial", "intervals", "parts", "trivial"])
def test_a_page_lacks_only_what_is_missing(inferred, tmp_path, missing):
    inferred_page = Page(
        write_html(dataclasses.replace(inferred, **{missing: None}), tmp_path).read_text(encoding="utf-8")
    )
    identifiers = {a["id"] for tag, a in inferred_page.elements if tag == "section"}
    gone = {"spatial": {"genes", "widths"}, "parts": {"held-out"}}.get(missing, set())
    assert {"held-out", "baselines", "genes", "scale", "widths"} - identifiers == gone
    # every row of a table is as wide as its header
    for first, n_rows in (
        (("Receiver type", "Head", "Cells", "EV, all genes"), 21),
        (("Receiver type", "Best head"), 6),
    ):
        assert len(rows_below(inferred_page, *first)[1]) == n_rows


@pytest.fixture(scope="module")
def parts(inferred):
    return {head: Page(section(inferred, f"head-{head}")) for head in range(3)}


def test_the_matrix_leads_to_a_section_of_each_head(inferred, tmp_path):
    source = write_html(inferred, tmp_path).read_text(encoding="utf-8")
    matrix = source[source.index('<section id="matrix">') : source.index('<section id="best">')]
    assert re.findall(r'<th scope="col"><a href="#(head-\d)">', matrix) == ["head-0", "head-1", "head-2"]
    assert {f"head-{head}" for head in range(3)} <= set(Page(source).attributes("id"))


def test_a_head_has_all_types_with_their_tests_the_largest_effect_first(parts, inferred):
    for head, page in parts.items():
        header, *rows = page.rows[: len(inferred.cell_types) + 1]
        found = [dict(zip(header, row, strict=True)) for row in rows]
        effects = inferred.expl_var[head]
        order = np.argsort(-np.nan_to_num(effects, nan=-np.inf), kind="stable")
        assert [one["Receiver type"] for one in found] == [inferred.cell_types[index] for index in order]
        for index, one in zip(order, found, strict=True):
            at = (head, index)
            assert one["EV, all genes"] == effect(effects[index])
            assert one["Interval"] == interval(inferred.intervals.low[at], inferred.intervals.high[at])
            assert one["Adjusted p (lag)"] == p_text(inferred.spatial.p_value_adj[at])
            assert one["EV, held out"] == effect(inferred.parts.expl_var[1, head, index])
            tested = not np.isnan(inferred.spatial.p_value_adj[at])
            assert (one["Significant"] != "") == tested
            significant = (inferred.spatial.p_value_adj_gene[at] <= 0.05) & (inferred.expl_var_gene[at] > 0)
            assert one["Genes *"] == str(significant.sum())
        (single,) = [one for one in found if one["Receiver type"] == "β cell"]
        assert single["Undefined because"] == "1 cell; at least 3 needed"


def test_a_head_says_where_it_is_significant_by_which_null(parts, inferred):
    significant = inferred.adjusted <= 0.05
    assert significant.any(axis=1).all(), "else it says less"
    for head, page in parts.items():
        tested = (~np.isnan(inferred.adjusted[head])).sum()
        n_types, by = significant[head].sum(), "adjusted p ≤ 0.05, lag null, in-sample"
        said = f"Significant in {n_types} of {tested} tested types ({by})"
        (sentence,) = re.findall(re.escape(said) + r": (.*?)\. Kept alone", page.text)
        names = {inferred.cell_types[index] for index in np.flatnonzero(significant[head])}
        assert set(sentence.split(", ")) == names
    none = make_evaluation(inferred="lag", alpha=1e-9)
    assert "Significant in none of 6 tested types" in Page(section(none, "head-0")).text


def test_genes_of_a_head_are_the_ten_largest_of_each_type():
    inferred = make_evaluation(1, ["A", "B", "C"], 40, inferred="lag", seed=3)
    rows = [row for row in Page(section(inferred, "head-0")).rows if len(row) == 4][1:]
    expected = []
    for index in range(3):
        values = inferred.expl_var_gene[0, index]
        largest = sorted((g for g in range(40) if values[g] > 0), key=lambda g: -values[g])[:10]
        expected += [(-values[g], inferred.genes[g], inferred.cell_types[index]) for g in largest]
    assert len(rows) == len(expected) == 20, "the last type is undefined"
    assert [(row[0], row[1], row[2]) for row in rows] == [(g, t, effect(-v)) for v, g, t in sorted(expected)]


def test_five_thousand_genes_make_no_larger_page(tmp_path):
    types = [f"type {number}" for number in range(20)]
    sizes = [
        write_html(make_evaluation(8, types, n_genes, inferred="lag"), tmp_path / str(n_genes)).stat().st_size
        for n_genes in (300, 5000)
    ]
    assert sizes[1] < 1.1 * sizes[0]


def test_the_verdict_counts_heads_pairs_and_what_needs_no_head(inferred):
    significant = inferred.adjusted <= 0.05
    heads, pairs = significant.any(axis=1).sum(), significant.sum()
    more = (significant & (inferred.trivial.gain > 0)).sum()
    assert 1 < more < pairs, "else it says less"
    assert significance_sentence(inferred) == (
        f"Verdict: {heads} of 3 heads are significant in at least one cell type ({pairs} of {inferred.n_decided} "
        f"tested head x type pairs at adjusted p ≤ 0.05, lag null, in-sample). Of these pairs, {more} also explain "
        "more than the best predictor without heads."
    )


def test_a_verdict_without_findings_or_tests_says_so(inferred):
    strict = make_evaluation(inferred="lag", alpha=1e-9)
    assert significance_sentence(strict).startswith("Verdict: no head is significant in any cell type (0 of 16 tested")
    tests = dataclasses.replace(inferred.spatial, p_value_adj=np.full((3, 7), np.nan))
    untested = dataclasses.replace(inferred, spatial=tests)
    assert significance_sentence(untested) == "No head could be tested (lag null); why is said below."


def test_provenance_names_model_data_versions_device_time_and_parity():
    inferred = make_evaluation(engine="factored", parity=2e-7, parity_cells=1234)
    page = Page(section(inferred, "identity", run={"device used": "cuda:0"}, written=WRITTEN))
    facts = {row[0]: row[1] for row in page.rows}
    assert facts["digest"] == "def456"
    assert facts["permutation.alpha"] == "0.05"
    assert facts["device asked for"] == "auto"
    assert facts["device used"] == "cuda:0"
    assert facts["page written"] == "2026-03-04 05:06:07 UTC"
    assert facts["parity of engines"] == "largest difference 2e-07 on 1,234 cells"
    assert re.fullmatch(r"1\.\d+\.\d+", facts["numpy"])
    assert {"Python", "amici-eval", "torch"} <= set(facts)


@pytest.mark.parametrize(("n_rows", "expected"), [(30, "scroll"), (31, "scroll tall")])
def test_a_long_table_scrolls_within_itself(n_rows, expected):
    types = [f"type {number}" for number in range(n_rows)]
    page = Page(section(make_evaluation(1, types), "matrix"))
    (box,) = [a for tag, a in page.elements if tag == "div"]
    assert box["class"] == expected
    assert box["aria-label"] == "Explained variance over all genes, one head kept alone."
