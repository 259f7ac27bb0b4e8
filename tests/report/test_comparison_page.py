"""The page, tables and figures of a comparison."""

from __future__ import annotations

import dataclasses
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection, QuadMesh

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.report.comparison_sentences import comparison_sentences
from amici_eval.report.figures.comparison_figures import (
    plot_differences,
    plot_lineage,
    plot_sender_differences,
    plot_similarity,
    plot_versions,
    save_comparison_figures,
)
from amici_eval.report.page.comparison_page import write_comparison_html
from amici_eval.report.tables import write_comparison_tables
from amici_eval.results.comparison import HeadComparison
from amici_eval.results.comparison_frames import SENDER_DIFFERENCE_COLUMNS
from amici_eval.settings.comparison import ComparisonSpec
from tests.builders import make_comparison
from tests.report.test_evaluation_page import Page


@pytest.fixture(scope="module")
def comparison():
    return make_comparison()


@pytest.fixture(scope="module")
def figures(comparison, tmp_path_factory):
    paths = save_comparison_figures(comparison, tmp_path_factory.mktemp("figures"), formats=("svg",))
    return {path.stem: path for path in paths}


@pytest.fixture(scope="module")
def source(comparison, figures, tmp_path_factory):
    path = write_comparison_html(comparison, tmp_path_factory.mktemp("page"), figures=figures)
    return path.read_text(encoding="utf-8")


def assert_largest_first(ax, differences):
    """Check that the rows of a forest plot show all differences that are defined, from the top."""
    dots = np.concatenate([one.get_offsets() for one in ax.collections if isinstance(one, PathCollection)])
    sizes = np.abs(differences[~np.isnan(differences)])
    np.testing.assert_allclose(np.abs(dots[np.argsort(dots[:, 1]), 0]), np.sort(sizes)[::-1])


def test_what_was_found_stands_first(comparison, source):
    page = Page(source)
    assert page.title == "Attention heads across versions: m<i> 1, m<i> 2, m<i> 3"
    for said in (
        "m<i> 2 explains more than m<i> 1 (better): explained variance of all cells differs by 0.012 (0.004 to 0.020)",
        "2 of 3 heads of m<i> 2 are heads of m<i> 3",
        "1 gone, 1 new.",
        "Two untrained models of the architecture have heads of similarity 0.10 to 0.15 if matched.",
        "Versions trained by one set-up have heads of similarity 0.40 to 0.70 if matched",
        "Some version was fitted on some of these cells",
        "m<i> 9 is left out: it <broke>: mend it.",
    ):
        assert said in page.text
    assert "<i>" not in source
    assert "<broke>" not in source
    assert "1 genes of <a> left out" in page.text


def test_each_match_and_difference_has_its_row(comparison, source):
    rows = Page(source).rows
    start = next(i for i, row in enumerate(rows) if row[:3] == ["From", "Head", "To"])
    matches = rows[start + 1 : start + 1 + 2 * 4]
    assert [row[3] for row in matches] == ["gone", "1", "2", "0 (new)"] * 2
    match = comparison.matches[0]
    assert matches[1][4:] == [f"{match.similarity[1, 1]:.2f}", "", *matches[1][6:]]
    assert "No p (tissue): cells in 3 blocks of tissue" in source
    start = next(i for i, row in enumerate(rows) if row[:3] == ["Type", "Head", "Head there"])
    differences = rows[start + 1 : start + 1 + 2 * 3 * 4]
    assert [row[-1] for row in differences] == [one for found in comparison.differences for one in found.verdict]
    assert differences[8][1:3] == ["full", "full"]


def test_all_figures_are_there_with_words(comparison, figures, source):
    assert set(figures) == {
        "versions",
        "lineage",
        *(f"{kind}_{number}" for kind in ("similarity", "differences", "senders") for number in (1, 2)),
    }
    page = Page(source)
    labels = [attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg"]
    assert len(labels) == len(figures)
    assert all(labels)
    assert any("m<i> 2 (rows) and m<i> 3 (columns)" in label for label in labels)


def test_drawings_hold_what_they_show(comparison):
    axes = [plot(comparison) for plot in (plot_similarity, plot_lineage, plot_differences, plot_versions)]
    similarity, lineage, differences, versions = axes
    (mesh,) = (one for one in similarity.collections if isinstance(one, QuadMesh))
    np.testing.assert_array_equal(mesh.get_array(), comparison.matches[0].similarity)
    assert sum(patch.get_gid() == "match" for patch in similarity.patches) == 2
    there = sum(head is not None for one in comparison.lineages for head in one.heads)
    assert sum(len(dots.get_offsets()) for dots in lineage.collections if "lineage" in (dots.get_gid() or "")) == there
    assert_largest_first(differences, comparison.differences[0].difference)
    assert len([line for line in versions.lines if (line.get_gid() or "").startswith("type-")]) == 4
    plt.close("all")


def test_sure_changes_of_senders_stand_in_a_table_and_all_in_a_figure(comparison, source, tmp_path):
    rows = Page(source).rows
    start = next(i for i, row in enumerate(rows) if row[:2] == ["Receiver type", "Sender type"])
    frame = comparison.senders_frame()
    sure = frame[frame["verdict"].isin(["more", "less"])]
    shown = rows[start + 1 : start + 1 + min(30, len(sure))]
    assert {row[13] for row in shown} <= {"more", "less"}
    expected = sure["difference"].abs().sort_values(ascending=False)[: len(shown)]
    np.testing.assert_allclose([abs(float(row[10].replace("−", "-"))) for row in shown], expected, rtol=0.06, atol=6e-4)
    ax = plot_sender_differences(comparison, 1)
    assert_largest_first(ax, comparison.senders[1].difference)
    plt.close("all")
    quiet = dataclasses.replace(
        comparison,
        senders=tuple(
            dataclasses.replace(one, verdict=("undecided",) * one.difference.size) for one in comparison.senders
        ),
    )
    told = Page(write_comparison_html(quiet, tmp_path).read_text(encoding="utf-8")).text
    assert "No head is sure to take more or less from a type of sender than before: 36 undecided, 12 without" in told
    assert "Cells lie in at most 9 tiles of tissue, so that no p is below 0.004, and over 18 tests" in told
    none = write_comparison_html(dataclasses.replace(comparison, senders=()), tmp_path)
    assert "Who talks to whom" not in none.read_text(encoding="utf-8")


def test_tables_are_the_frames(comparison, tmp_path):
    paths = write_comparison_tables(comparison, tmp_path)
    assert [path.name for path in paths] == [
        "head_matches.csv",
        "head_differences.csv",
        "sender_differences.csv",
        "versions.csv",
        "gene_differences.parquet",
    ]
    assert len(pd.read_csv(paths[0])) == len(comparison.matches_frame()) == 2 * 4
    assert pd.read_csv(paths[1])["undefined_reason"].notna().sum() == 2 * 3
    talk = pd.read_csv(paths[2])
    assert list(talk.columns) == list(SENDER_DIFFERENCE_COLUMNS)
    assert len(talk) == 2 * 2 * 4 * 3
    assert (talk["undefined_reason"].notna() == talk["difference"].isna()).all()
    versions = pd.read_csv(paths[3], dtype={"head": str})
    assert versions.groupby("version", sort=False)["lineage"].count().tolist() == [12, 12, 12]
    genes = pd.read_parquet(paths[4])
    assert len(genes) == 2 * 3 * 4 * 3


def test_data_sets_have_no_matches(tmp_path):
    comparison = make_comparison(2, kind="datasets", with_genes=False)
    figures = save_comparison_figures(comparison, tmp_path, formats=("png",))
    assert [path.stem for path in figures] == ["versions", "differences_1", "senders_1"]
    page = Page(write_comparison_html(comparison, tmp_path).read_text(encoding="utf-8"))
    assert page.title.startswith("Attention heads across data sets: data $x$ 1")
    assert "Which head is which" not in page.text
    assert comparison_sentences(comparison)[0].startswith("One model on 2 data sets: data $x$ 1, data $x$ 2.")


def test_json_gives_everything_back_but_genes(comparison):
    back = HeadComparison.from_json(comparison.to_json())
    for name in ("matches_frame", "differences_frame", "senders_frame", "versions_frame"):
        assert getattr(back, name)().equals(getattr(comparison, name)())
    # as version 1 wrote it: without senders
    record = {**json.loads(comparison.to_json()), "schema_version": 1}
    del record["senders"]
    older = HeadComparison.from_json(json.dumps(record))
    assert older.senders == ()
    assert older.differences_frame().equals(comparison.differences_frame())
    assert back.similarity.keys() == comparison.similarity.keys()
    assert len(back.gene_differences_frame()) == 0
    record = json.loads(comparison.to_json())
    for name in ("versions", "matches", "differences", "lineages", "overall", "similarity", "kind"):
        damaged = {key: value for key, value in record.items() if key != name}
        with pytest.raises(DataError, match=r"damaged comparison"):
            HeadComparison.from_json(json.dumps({**damaged, **({name: [{}]} if name != "kind" else {name: "x"})}))


def test_a_comparison_whose_parts_do_not_fit_is_refused(comparison):
    with pytest.raises(ValueError, match=r"^pair \(1, 2\) does not fit 2 versions$"):
        dataclasses.replace(comparison, versions=comparison.versions[:2])
    with pytest.raises(ValueError, match=r"^ComparedVersion.full has shape \(2,\), not \(4,\)$"):
        dataclasses.replace(
            comparison,
            versions=(dataclasses.replace(comparison.versions[0], full=np.zeros(2)), *comparison.versions[1:]),
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"cells": "some"}, "compare.cells='some': it must be one of auto, held_out, all; choose one of these"),
        ({"adjustment": "maxt"}, "compare.adjustment='maxt': it must be one of bh, by, holm"),
        ({"unmatched": 1.0}, "compare.unmatched=1.0: it must lie between 0 and 1; leave compare.unmatched out for the"),
        (
            {"margin": 0.0},
            "compare.margin=0.0: it must lie between 0 and 1; leave compare.margin out for the default, 0.01",
        ),
        ({"n_flips": 3}, "compare.n_flips=3: it must be a whole number of at least 19"),
        ({"seed": True}, "compare.seed=True: it must be a whole number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(InvalidSpecError) as caught:
        ComparisonSpec(**setting)
    assert str(caught.value).startswith(message)
