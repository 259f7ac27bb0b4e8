"""What the page says on each head, its verdict on all, and where its numbers come from."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from amici_eval.report.evaluation_sentences import significance_sentence
from amici_eval.report.numbers import effect, interval, p_text
from amici_eval.report.page.evaluation_page import write_html
from tests.builders import make_evaluation
from tests.report.test_html import EVIL, WRITTEN, Page, section


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation(genes=(EVIL, "HLA-DRA", "$g$", "<b>", "IL7R"), inferred="lag")


@pytest.fixture(scope="module")
def parts(evaluation):
    return {head: Page(section(evaluation, f"head-{head}")) for head in range(3)}


def test_the_matrix_leads_to_a_section_of_each_head(evaluation, tmp_path):
    source = write_html(evaluation, tmp_path).read_text(encoding="utf-8")
    matrix = source[source.index('<section id="matrix">') : source.index('<section id="best">')]
    assert re.findall(r'<th scope="col"><a href="#(head-\d)">', matrix) == ["head-0", "head-1", "head-2"]
    assert {f"head-{head}" for head in range(3)} <= set(Page(source).attributes("id"))


def test_a_head_has_all_types_with_their_tests_the_largest_effect_first(parts, evaluation):
    for head, page in parts.items():
        header, *rows = page.rows[: len(evaluation.cell_types) + 1]
        found = [dict(zip(header, row, strict=True)) for row in rows]
        effects = evaluation.expl_var[head]
        order = np.argsort(-np.nan_to_num(effects, nan=-np.inf), kind="stable")
        assert [one["Receiver type"] for one in found] == [evaluation.cell_types[index] for index in order]
        for index, one in zip(order, found, strict=True):
            at = (head, index)
            assert one["EV, all genes"] == effect(effects[index])
            assert one["Interval"] == interval(evaluation.intervals.low[at], evaluation.intervals.high[at])
            assert one["Adjusted p (lag)"] == p_text(evaluation.spatial.p_value_adj[at])
            assert one["EV, held out"] == effect(evaluation.parts.expl_var[1, head, index])
            tested = not np.isnan(evaluation.spatial.p_value_adj[at])
            assert (one["Significant"] != "") == tested
            significant = (evaluation.spatial.p_value_adj_gene[at] <= 0.05) & (evaluation.expl_var_gene[at] > 0)
            assert one["Genes *"] == str(significant.sum())
        (single,) = [one for one in found if one["Receiver type"] == "β cell"]
        assert single["Undefined because"] == "1 cell; at least 3 needed"


def test_a_head_says_where_it_is_significant_by_which_null(parts, evaluation):
    significant = evaluation.adjusted <= 0.05
    assert significant.any(axis=1).all(), "else it says less"
    for head, page in parts.items():
        tested = (~np.isnan(evaluation.adjusted[head])).sum()
        n_types, by = significant[head].sum(), "adjusted p ≤ 0.05, lag null, in-sample"
        said = f"Significant in {n_types} of {tested} tested types ({by})"
        (sentence,) = re.findall(re.escape(said) + r": (.*?)\. Kept alone", page.text)
        names = {evaluation.cell_types[index] for index in np.flatnonzero(significant[head])}
        assert set(sentence.split(", ")) == names
    none = make_evaluation(inferred="lag", alpha=1e-9)
    assert "Significant in none of 6 tested types" in Page(section(none, "head-0")).text


def test_genes_of_a_head_are_the_ten_largest_of_each_type():
    evaluation = make_evaluation(1, ["A", "B", "C"], 40, inferred="lag", seed=3)
    rows = [row for row in Page(section(evaluation, "head-0")).rows if len(row) == 4][1:]
    expected = []
    for index in range(3):
        values = evaluation.expl_var_gene[0, index]
        largest = sorted((g for g in range(40) if values[g] > 0), key=lambda g: -values[g])[:10]
        expected += [(-values[g], evaluation.genes[g], evaluation.cell_types[index]) for g in largest]
    assert len(rows) == len(expected) == 20, "the last type is undefined"
    assert [(row[0], row[1], row[2]) for row in rows] == [(g, t, effect(-v)) for v, g, t in sorted(expected)]


def test_five_thousand_genes_make_no_larger_page(tmp_path):
    types = [f"type {number}" for number in range(20)]
    sizes = [
        write_html(make_evaluation(8, types, n_genes, inferred="lag"), tmp_path / str(n_genes)).stat().st_size
        for n_genes in (300, 5000)
    ]
    assert sizes[1] < 1.1 * sizes[0]


def test_the_verdict_counts_heads_pairs_and_what_needs_no_head(evaluation):
    significant = evaluation.adjusted <= 0.05
    heads, pairs = significant.any(axis=1).sum(), significant.sum()
    more = (significant & (evaluation.trivial.gain > 0)).sum()
    assert 1 < more < pairs, "else it says less"
    assert significance_sentence(evaluation) == (
        f"Verdict: {heads} of 3 heads are significant in at least one cell type ({pairs} of {evaluation.n_decided} "
        f"tested head x type pairs at adjusted p ≤ 0.05, lag null, in-sample). Of these pairs, {more} also explain "
        "more than the best predictor without heads."
    )


def test_a_verdict_without_findings_or_tests_says_so(evaluation):
    strict = make_evaluation(inferred="lag", alpha=1e-9)
    assert significance_sentence(strict).startswith("Verdict: no head is significant in any cell type (0 of 16 tested")
    tests = dataclasses.replace(evaluation.spatial, p_value_adj=np.full((3, 7), np.nan))
    untested = dataclasses.replace(evaluation, spatial=tests)
    assert significance_sentence(untested) == "No head could be tested (lag null); why is said below."


def test_provenance_names_model_data_versions_device_time_and_parity():
    evaluation = make_evaluation(engine="factored", parity=2e-7, parity_cells=1234)
    page = Page(section(evaluation, "identity", run={"device used": "cuda:0"}, written=WRITTEN))
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
