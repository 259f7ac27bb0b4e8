from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from amici_eval.common.errors import OutputError
from amici_eval.common.text import slugify
from amici_eval.report.evaluation_sentences import best_heads, summary_lines
from amici_eval.report.tables import write_tables
from amici_eval.results.evaluation import GENE_COLUMNS, HEAD_COLUMNS
from amici_eval.settings.evaluation import MODES
from tests.builders import AWKWARD_TYPES, make_evaluation


def read(path, **options):
    return pd.read_csv(path, float_precision="round_trip", **options)


def test_files_have_the_names_of_the_contract(tmp_path):
    files = write_tables(make_evaluation(), tmp_path / "run")
    names = [
        *("explained_variance.csv", "explained_variance.parquet", "heads.csv", "baselines.csv", "held_out.csv"),
        *("scales.csv", "ablations.csv", "head_interactions.csv", "senders.csv", "sender_genes.parquet", "labels.csv"),
    ]
    assert files == tuple(tmp_path / "run" / "tables" / name for name in names)
    assert sorted((tmp_path / "run" / "tables").iterdir()) == sorted(files)


def test_columns_are_those_of_the_contract(tmp_path):
    write_tables(make_evaluation(), tmp_path)
    first_lines = {
        name: (tmp_path / "tables" / f"{name}.csv").read_text(encoding="utf-8").splitlines()[0]
        for name in (
            *("explained_variance", "heads", "baselines", "held_out", "scales", "ablations", "head_interactions"),
            *("senders", "labels"),
        )
    }
    assert first_lines == {
        "explained_variance": "head,ct_name,gene,expl_var_head_gene,expl_var_head,p_value_head,p_value_adj_head,"
        "p_value_gene,p_value_adj_gene,undefined_reason",
        "heads": "head,ct_name,n_cells,expl_var_head,ci_low,ci_high,best_gene,expl_var_best_gene,p_value_head,"
        "p_value_adj_head,p_ci_low,p_ci_high,p_value_spatial,p_value_adj_spatial,ess,null,method,significant_free,"
        "significant,significant_by,held_out,undefined_reason,statistic_spatial,detectable_expl_var,"
        "correlation_length,reach,gain,expl_var_without_nearest,n_tiles",
        "baselines": "ct_name,baseline,expl_var",
        "held_out": "head,ct_name,n_cells_in_sample,expl_var_in_sample,ci_low_in_sample,ci_high_in_sample,"
        "n_cells_held_out,expl_var_held_out,ci_low_held_out,ci_high_held_out,undefined_reason",
        "scales": "head,ct_name,tile_width,p_value",
        "ablations": "head,ct_name,mode,expl_var,delta_full",
        "head_interactions": "head_a,head_b,ct_name,interaction,interaction_frozen_norm",
        "senders": "head,ct_name,sender,attention,expl_var_lost,ci_low,ci_high,p_value,p_value_adj,best_gene,"
        "expl_var_lost_best_gene,distance_tenth,n_receivers,undefined_reason",
        "labels": "kind,slug,label",
    }
    assert (len(GENE_COLUMNS), len(HEAD_COLUMNS)) == (10, 29)


def test_genes_read_back_equal_from_csv_and_parquet(tmp_path):
    evaluation = make_evaluation()
    write_tables(evaluation, tmp_path)
    frame = evaluation.to_frame()
    assert frame["expl_var_head_gene"].isna().any()
    assert_frame_equal(pd.read_parquet(tmp_path / "tables" / "explained_variance.parquet"), frame, check_exact=True)
    from_csv = read(tmp_path / "tables" / "explained_variance.csv")
    from_csv["undefined_reason"] = from_csv["undefined_reason"].fillna("").astype(object)
    assert_frame_equal(from_csv, frame, check_exact=True)


def test_heads_and_baselines_read_back_equal(tmp_path):
    evaluation = make_evaluation(held_out=[True, False, None, True, False, None, True])
    write_tables(evaluation, tmp_path)
    booleans = dict.fromkeys(["significant_free", "significant", "held_out"], "boolean")
    heads = read(tmp_path / "tables" / "heads.csv", dtype=booleans)
    expected = evaluation.heads()
    for name in expected:
        left, right = heads[name], expected[name]
        if name in ("undefined_reason", "best_gene", "significant_by"):
            left, right = left.fillna(""), right.fillna("")
        assert (
            left.tolist() == right.tolist()
            or (left.astype(object).fillna("?") == right.astype(object).fillna("?")).all()
        )
    assert heads["held_out"].isna().sum() == 2 * 3
    assert_frame_equal(read(tmp_path / "tables" / "baselines.csv"), evaluation.baselines(), check_exact=True)


def test_booleans_and_missing_values_in_csv(tmp_path):
    evaluation = make_evaluation(2, ["A", "B"], held_out=[True, None])
    write_tables(evaluation, tmp_path)
    rows = read(tmp_path / "tables" / "heads.csv", dtype=str, keep_default_na=False).set_index(["head", "ct_name"])
    assert set(rows["held_out"]) == {"True", ""}
    assert rows.loc[("0", "B"), ["expl_var_head", "best_gene", "p_value_head", "significant"]].tolist() == [""] * 4
    assert rows.loc[("0", "B"), "undefined_reason"] == "1 cell; at least 3 needed"
    assert rows.loc[("0", "A"), "significant"] in ("True", "False")


def test_held_out_cells_and_scales_read_back_equal_and_are_empty_where_not_computed(tmp_path):
    evaluation = make_evaluation(inferred="lag", n_widths=3)
    write_tables(evaluation, tmp_path / "full")
    held_out = read(tmp_path / "full" / "tables" / "held_out.csv", keep_default_na=False, na_values=[""])
    expected = evaluation.held_out_frame()
    assert len(held_out) == (3 + 1) * 7
    assert held_out["head"].tolist() == expected["head"].astype(str).tolist()
    numbers = [name for name in expected if name not in ("head", "ct_name", "undefined_reason")]
    for name in numbers:
        np.testing.assert_array_equal(held_out[name], expected[name], err_msg=name)
    scales = read(tmp_path / "full" / "tables" / "scales.csv")
    # the last type is undefined, the first has one width of three
    assert len(scales) == 3 * (5 * 3 + 1)
    assert_frame_equal(scales, evaluation.scales_frame(), check_exact=True)
    write_tables(make_evaluation(), tmp_path / "empty")
    for name in ("held_out", "scales"):
        assert read(tmp_path / "empty" / "tables" / f"{name}.csv").empty


def test_ablations_read_back_equal_and_are_empty_where_not_computed(tmp_path):
    evaluation = make_evaluation(modes=MODES)
    write_tables(evaluation, tmp_path / "full")
    for name, frame in (
        ("ablations", evaluation.ablations_frame()),
        ("head_interactions", evaluation.interactions_frame()),
    ):
        assert len(frame) == {"ablations": 3 * 7 * 7, "head_interactions": 3 * 7}[name]
        assert_frame_equal(read(tmp_path / "full" / "tables" / f"{name}.csv"), frame, check_exact=True)
    write_tables(make_evaluation(), tmp_path / "empty")
    for name in ("ablations", "head_interactions"):
        assert read(tmp_path / "empty" / "tables" / f"{name}.csv").empty


def test_senders_read_back_equal_and_are_empty_where_not_computed(tmp_path):
    evaluation = make_evaluation(senders=("CD8+_T_Cells", "other", "β cell"))
    write_tables(evaluation, tmp_path / "full")
    frame, genes = evaluation.senders_frame(), evaluation.sender_genes_frame()
    assert len(frame) == 3 * 7 * 3
    read_back = read(tmp_path / "full" / "tables" / "senders.csv", keep_default_na=False, na_values=[""])
    for name in frame:
        left, right = (one[name].astype(object).where(one[name].notna(), "").tolist() for one in (read_back, frame))
        assert left == right, name
    # none from a type to itself, none into the type of one cell
    assert len(genes) == 3 * (7 * 3 - 1 - 3) * 5
    assert_frame_equal(pd.read_parquet(tmp_path / "full" / "tables" / "sender_genes.parquet"), genes, check_exact=True)
    one = genes[(genes["head"] == 1) & (genes["ct_name"] == "_hidden") & (genes["sender"] == "other")]
    at = 1, evaluation.type_index("_hidden"), 1
    np.testing.assert_array_equal(one["expl_var_lost"], evaluation.senders.effect_gene[at])
    row = frame[(frame["head"] == 1) & (frame["ct_name"] == "_hidden") & (frame["sender"] == "other")].iloc[0]
    assert row["expl_var_lost"] == evaluation.senders.effect[at]
    assert row["best_gene"] == one["gene"].iloc[int(one["expl_var_lost"].argmax())]
    assert row["undefined_reason"] == ""
    write_tables(make_evaluation(), tmp_path / "empty")
    assert read(tmp_path / "empty" / "tables" / "senders.csv").empty
    empty = pd.read_parquet(tmp_path / "empty" / "tables" / "sender_genes.parquet")
    assert empty.empty
    assert empty.dtypes.to_dict() == genes.dtypes.to_dict()


def test_links_without_a_value_say_why():
    frame = make_evaluation(senders=("CD8+_T_Cells", "other")).senders_frame().set_index(["head", "ct_name", "sender"])
    assert frame.loc[(0, "CD8+_T_Cells", "CD8+_T_Cells"), "undefined_reason"] == (
        "no evaluated cell of the type has such a neighbour"
    )
    assert frame.loc[(0, "$x$_1", "other"), "undefined_reason"] == (
        "cells in 3 tiles; at least 5 are needed to tell differences"
    )
    missing = frame[["expl_var_lost", "ci_low", "ci_high", "p_value"]].isna().any(axis=1)
    assert (frame["undefined_reason"] != "").eq(missing).all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "Predictions by the hooked engine."),
        (
            {"engine": "factored", "parity": 2.04e-7, "parity_cells": 1280},
            "Predictions by the factored engine; on 1,280 cells the factored and the hooked engine differ by at most "
            "2e-07 in any predicted value.",
        ),
        (
            {"parity": float("inf"), "parity_cells": 1},
            "Predictions by the hooked engine; on 1 cell the factored and the hooked engine differ by no finite "
            "number.",
        ),
    ],
)
def test_summary_says_the_engine(arguments, expected):
    assert expected in summary_lines(make_evaluation(**arguments))


def test_summary_says_how_permutations_were_drawn():
    evaluation = make_evaluation(2, ["A", "B", "C"], with_undefined=False, sampling=("cyclic", "cyclic", "independent"))
    low, high = sorted(evaluation.n_cells[:2] - 1)
    text = "\n".join(summary_lines(evaluation))
    assert (
        f"(free null, 999 permutations in 1 type and {low:,} to {high:,} permutations as cyclic shifts of one random "
        "order in 2 types, BH over all tests)" in text
    )
    assert "(free null, 999 permutations, BH over all tests)" in "\n".join(summary_lines(make_evaluation()))


def test_summary_counts_cyclic_permutations_before_it_says_too_few():
    one = make_evaluation(1, ["A"], n_permutations=9, with_undefined=False, sampling=("cyclic",))
    assert one.n_cells[0] > 20
    assert "nothing can be significant" not in "\n".join(summary_lines(one))


def test_labels_map_every_slug_to_its_label(tmp_path):
    write_tables(make_evaluation(), tmp_path)
    labels = read(tmp_path / "tables" / "labels.csv", keep_default_na=False)
    assert labels["label"].tolist() == sorted(AWKWARD_TYPES)
    assert labels["slug"].tolist() == [slugify(label) for label in sorted(AWKWARD_TYPES)]
    assert set(labels["kind"]) == {"cell_type"}


def test_labels_with_commas_quotes_and_breaks_survive(tmp_path):
    names = ['a,"b"', "c\nd", "NA"]
    write_tables(make_evaluation(2, names), tmp_path)
    heads = read(tmp_path / "tables" / "heads.csv", keep_default_na=False)
    assert sorted(set(heads["ct_name"])) == sorted(names)


def test_best_heads_are_those_of_the_evaluation():
    evaluation = make_evaluation()
    best = best_heads(evaluation)
    assert best["ct_name"].tolist() == sorted(AWKWARD_TYPES)[:-1]
    by_type = {name: evaluation.expl_var[:, evaluation.type_index(name)] for name in best["ct_name"]}
    assert best["head"].tolist() == [int(np.nanargmax(values)) for values in by_type.values()]


def test_summary_warns_of_p_values_that_mean_little():
    few = "\n".join(summary_lines(make_evaluation(n_permutations=9)))
    assert "With 9 permutations no p-value can be below 0.1: nothing can be significant; draw more." in few
    assert "nothing can be significant" not in "\n".join(summary_lines(make_evaluation(n_permutations=19)))


def test_summary_says_effects_before_tests_and_everything_once():
    evaluation = make_evaluation()
    lines = summary_lines(evaluation)
    text = "\n".join(lines)
    assert lines[0] == f"3 attention heads x 7 cell types evaluated on {evaluation.n_cells.sum():,} cells and 5 genes."
    assert f"{evaluation.n_significant} of 17 tested head x type pairs are significant at adjusted p <= 0.05" in text
    assert "4 of 21 pairs have no test" in text
    assert text.index("Largest effect") < text.index("significant")
    head, index = np.unravel_index(np.nanargmax(evaluation.expl_var), evaluation.expl_var.shape)
    value, name = evaluation.expl_var[head, index], evaluation.cell_types[index]
    assert f"head {head}, kept alone, explains {value:.3f} of the expression variance of {name};" in text
    assert "Undefined: β cell, all heads: 1 cell; at least 3 needed." in lines
    assert "Undefined: <script>alert(1)</script>, head 2: predictions are constant." in lines
    assert "Undefined: $x$_1, 1 gene (HLA-DRA): expression is constant." in lines
    assert "Note: coordinates look like pixels: median distance 812." in lines
    assert "anticonservative" in text
    table = lines[lines.index(next(line for line in lines if line.startswith("cell type"))) + 1 :]
    table = [row for row in table if not row.startswith("Undefined: ")]
    assert [row.split()[0] for row in table] == sorted(AWKWARD_TYPES)[:-1]


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        ((True, True), "Held out: the model was fitted on none of the evaluated cells."),
        ((False, False), "In-sample: the model was fitted on some or all"),
        ((None, None), "It is not known which cells the model was fitted on"),
        ((True, False), "Of 2 types: 1 held out, 1 in-sample. Effects and p-values of those that are not held out are"),
        ((True, None), "Of 2 types: 1 held out, 1 unknown. Effects and p-values of those that are not held out are"),
    ],
)
def test_summary_says_what_is_held_out(held_out, expected):
    lines = summary_lines(make_evaluation(2, ["A", "B"], held_out=held_out))
    assert any(line.startswith(expected) for line in lines)


def test_summary_stays_narrow_and_on_its_lines():
    evaluation = make_evaluation(2, ["x" * 200, "a\x1b[31m\nb", "z"], notes=["one\ntwo"])
    lines = summary_lines(evaluation)
    table = lines[lines.index(next(line for line in lines if line.startswith("cell type"))) :]
    assert max(len(row) for row in table if not row.startswith("Undefined: ")) <= 100
    assert not any(character in line for line in lines for character in "\n\x1b")


def test_an_evaluation_without_any_value_has_a_summary(tmp_path):
    evaluation = make_evaluation(2, ["only"])
    lines = summary_lines(evaluation)
    assert "0 of 0 tested head x type pairs are significant at adjusted p <= 0.05" in "\n".join(lines)
    assert "Undefined: only, all heads: 1 cell; at least 3 needed." in lines
    assert len(write_tables(evaluation, tmp_path)) == 11


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "tables" / "heads.csv").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"heads\.csv cannot be written .*: .* must take new files; free space or"):
        write_tables(make_evaluation(), tmp_path)
