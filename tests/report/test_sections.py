from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from amici_eval.report.evaluation_sentences import VALIDITY, WHY_THIS_ORDER
from amici_eval.report.numbers import effect, p_text
from amici_eval.report.page.evaluation_page import write_html
from tests.builders import make_evaluation
from tests.report.test_html import EVIL, Page, section


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation(genes=(EVIL, "HLA-DRA", "$g$", "<b>", "IL7R"), inferred="lag", n_widths=3)


@pytest.fixture(scope="module")
def source(evaluation, tmp_path_factory):
    return write_html(evaluation, tmp_path_factory.mktemp("page")).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def rows_below(page, *first):
    """Return the rows of the table whose header begins with these, by type (and head)."""
    start = next(i for i, row in enumerate(page.rows) if tuple(row[: len(first)]) == first)
    width, rows = len(page.rows[start]), []
    for row in page.rows[start + 1 :]:
        if len(row) != width or row[0] == "Receiver type":
            break
        rows.append(row)
    return page.rows[start], rows


def test_nothing_of_the_new_sections_becomes_markup(source, page):
    assert source.count("<script") == 1, "the page's own"
    assert "<img" not in source
    assert "<b>" not in source
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert EVIL[:23] in page.text


def test_the_page_says_why_effects_come_first_and_then_tests_in_order(page):
    text = page.text
    words = ("Largest effect", "(medians over 15 pairs)", WHY_THIS_ORDER, VALIDITY["lag"], VALIDITY["free"])
    places = [text.index(one) for one in words]
    assert places == sorted(places)
    sections = ["Heads and cell types", "Best head of each type", "Held out", "Without heads", "Genes"]
    sections += ["Scale and power", "p against tile width", "Undefined, and why", "How to read this", "All heads"]
    identifiers = [a["id"] for tag, a in page.elements if tag == "section"]
    expected = ["matrix", "best", "held-out", "baselines", "genes", "scale", "widths", "undefined", "read"]
    expected += ["each-head", "head-0", "head-1", "head-2", "heads"]
    assert identifiers == [*expected, "identity"]
    assert all(heading in text for heading in sections)


def test_the_matrix_is_marked_by_the_null_that_decides(page, evaluation):
    _, rows = rows_below(page, "Receiver type", "Cells", "Head 0")
    for index, row in enumerate(rows):
        for head, cell in enumerate(row[2:]):
            assert cell.split("\n")[0].endswith("*") == bool(evaluation.spatial.p_value_adj[head, index] <= 0.05)
    assert np.any((evaluation.spatial.p_value_adj > 0.05) & (evaluation.p_value_adj <= 0.05)), "else it says less"
    assert "* adjusted p ≤ 0.05 (lag null, in-sample)." in page.text
    low, high = (effect(bound[1, 2]) for bound in (evaluation.intervals.low, evaluation.intervals.high))
    assert rows[2][3].endswith(f"\n{low} to {high}")
    assert "\n" not in rows[0][2], "the first type has too few tiles"


def test_held_out_is_beside_in_sample(page, evaluation):
    header, rows = rows_below(page, "Receiver type", "Cells", "All heads")
    found = evaluation.parts
    assert header == ["Receiver type", "Cells", "All heads", "Head 0", "Head 1", "Head 2"]
    assert [row[0] for row in rows] == list(evaluation.cell_types)
    assert rows[1][1] == f"{found.n_cells[0, 1]} / {found.n_cells[1, 1]}"
    assert rows[1][2] == f"{effect(found.full[0, 1])} / {effect(found.full[1, 1])}"
    assert rows[1][4] == f"{effect(found.expl_var[0, 1, 1])} / {effect(found.expl_var[1, 1, 1])}"
    assert rows[0][3] == f"{effect(found.expl_var[0, 0, 0])} / –"
    assert rows[-1][2:] == ["– / –"] * 4


def test_without_heads_says_baselines_gain_and_what_they_are(page, evaluation):
    header, rows = rows_below(page, "Receiver type", "All heads (whole model)")
    found = evaluation.trivial
    assert header[3:] == [
        *("Types of neighbours", "Expression of neighbours", "Position", "Gain, all heads"),
        *("Gain, head 0", "Gain, head 1", "Gain, head 2"),
    ]
    values = [evaluation.expl_var_full, evaluation.expl_var_none, *found.expl_var, found.full_gain, *found.gain]
    for index, row in enumerate(rows):
        assert row == [evaluation.cell_types[index], *(effect(float(one[index])) for one in values)]
    for words in (
        "ridge regression on how many of a cell's neighbours",
        "their mean expression",
        "a smooth function of where",
        "They were fitted on training cells.",
    ):
        assert words in page.text


def test_nearest_neighbour_masked_is_beside_the_effect(page, evaluation):
    header, rows = rows_below(page, "Receiver type", "All heads", "Head 0")
    assert len(header) == 5
    without = evaluation.trivial.without_nearest
    assert rows[2][3] == f"{effect(evaluation.expl_var[1, 2])} / {effect(without[1, 2])}"
    assert "may read segmentation bleed" in page.text
    nothing = dataclasses.replace(evaluation.trivial, without_nearest=np.full((3, 7), np.nan))
    assert "Nearest" not in section(dataclasses.replace(evaluation, trivial=nothing), "baselines")


def test_genes_are_those_with_the_smallest_adjusted_p(page, evaluation):
    _, rows = rows_below(page, "Receiver type", "Head", "Genes *")
    significant = [(evaluation.cell_types[c], str(h)) for c, h in np.argwhere(evaluation.adjusted.T <= 0.05)]
    assert [tuple(row[:2]) for row in rows] == significant
    for name, head, count, *shown in rows:
        at = int(head), evaluation.cell_types.index(name)
        explained = evaluation.expl_var_gene[at] > 0
        p = np.where(explained, evaluation.spatial.p_value_adj_gene[at], np.nan)
        assert count == str((p <= 0.05).sum())
        shown = [one for one in shown if one]
        assert len(shown) == np.isfinite(p).sum()
        assert [float(one.rstrip(" *").rsplit(" p ")[-1]) for one in shown] == pytest.approx(
            sorted(p[np.isfinite(p)]), rel=0.05, abs=6e-4
        )
        best = int(np.nanargmin(p))
        assert f"{effect(evaluation.expl_var_gene[at][best])}, p {p_text(p[best])}" in " ".join(shown)
    related = (evaluation.spatial.p_value_adj_gene <= 0.05) & ~(evaluation.expl_var_gene > 0)
    unexplained = related[evaluation.adjusted <= 0.05].sum()
    assert unexplained
    assert f"Left out, {unexplained:,} more with such a p, but without explained variance above 0" in page.text
    n_tests = np.isfinite(evaluation.spatial.p_value_gene).sum()
    assert f"one family of {n_tests} tests, all heads x types x genes (BH)" in page.text


def test_at_most_five_genes_of_a_head_are_shown_the_largest_of_ties_first():
    evaluation = make_evaluation(1, ["A"], 30, inferred="lag", with_undefined=False)
    effects = evaluation.expl_var_gene.copy()
    effects[0, 0] = np.linspace(0.0, 0.29, 30)
    tests = dataclasses.replace(
        evaluation.spatial, p_value_adj=np.array([[0.01]]), p_value_adj_gene=np.full((1, 1, 30), 1e-300)
    )
    text = section(dataclasses.replace(evaluation, expl_var_gene=effects, spatial=tests), "genes")
    (row,) = [row for row in Page(text).rows if row[0] == "A"]
    assert row[3:] == [f"GENE{number}: 0.{number}0, p 1.0e-300 *" for number in (29, 28, 27, 26, 25)]


def test_where_no_head_is_significant_no_gene_is_shown():
    evaluation = make_evaluation(inferred="lag", alpha=1e-9)
    assert "No head is significant in any type." in section(evaluation, "genes")


def test_scale_and_power_are_in_units_of_the_data(page, evaluation):
    header, rows = rows_below(page, "Receiver type", "Cells", "Correlation length")
    assert header[2:] == ["Correlation length", "Reach", "Effective sample size", "Detectable EV", "Tiles"]
    assert rows[1][2:4] == [f"{evaluation.spatial.correlation_length[1]:.3g}", "401"]
    low, high = evaluation.spatial.detectable[:, 1].min(), evaluation.spatial.detectable[:, 1].max()
    assert rows[1][5:] == [f"{effect(low)} to {effect(high)}", "12"]
    assert rows[-1][2:6] == ["–"] * 4
    assert "Tiles: of width 75, resampled 1,000 times for the 95 % intervals." in page.text
    none = dataclasses.replace(evaluation.spatial, correlation_length=np.full(7, np.nan))
    found = Page(section(dataclasses.replace(evaluation, spatial=none), "scale"))
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


def test_p_against_tile_width_is_there_only_where_there_are_widths(page, evaluation):
    header, rows = rows_below(page, "Receiver type", "Head", "Width 1")
    assert len(header) == 5
    assert len(rows) == 3 * 6, "the last type has none"
    p = evaluation.spatial.p_by_width
    assert rows[3] == [
        evaluation.cell_types[1],
        "0",
        *(f"{w}: {p_text(p[i, 0, 1])}" for i, w in enumerate((25, 50, 75))),
    ]
    assert rows[0][3:] == ["", ""]
    assert section(make_evaluation(inferred="lag"), "widths") == ""


def test_all_heads_have_the_spatial_p_before_the_free_one(page, evaluation):
    header, rows = rows_below(page, "Receiver type", "Head", "Cells", "EV, all genes")
    names = ["Interval", "Gain", "Effective cells (lag)", "p (lag)", "Adjusted p (lag)", "p (free, anticonservative)"]
    places = [header.index(name) for name in names]
    assert places == sorted(places)
    frame = evaluation.heads()
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
def test_a_page_lacks_only_what_is_missing(evaluation, tmp_path, missing):
    page = Page(write_html(dataclasses.replace(evaluation, **{missing: None}), tmp_path).read_text(encoding="utf-8"))
    identifiers = {a["id"] for tag, a in page.elements if tag == "section"}
    gone = {"spatial": {"genes", "widths"}, "parts": {"held-out"}}.get(missing, set())
    assert {"held-out", "baselines", "genes", "scale", "widths"} - identifiers == gone
    # every row of a table is as wide as its header
    for first, n_rows in (
        (("Receiver type", "Head", "Cells", "EV, all genes"), 21),
        (("Receiver type", "Best head"), 6),
    ):
        assert len(rows_below(page, *first)[1]) == n_rows
