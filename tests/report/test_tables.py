"""Tables as files, and significance.json."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from amici_eval.common.errors import OutputError
from amici_eval.common.text import slugify
from amici_eval.report.evaluation_sentences import VALIDITY, summary_lines
from amici_eval.report.tables import write_significance, write_tables
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


@pytest.fixture(scope="module")
def evaluation():
    held_out = [True, False, None, True, False, None, True]
    senders = ("CD8+_T_Cells", "other", "β cell")
    return make_evaluation(inferred="lag", n_widths=3, modes=MODES, senders=senders, held_out=held_out)


@pytest.fixture(scope="module")
def tables(evaluation, tmp_path_factory):
    return write_tables(evaluation, tmp_path_factory.mktemp("full"))[0].parent


@pytest.fixture(scope="module")
def empty_tables(tmp_path_factory):
    """Tables of an evaluation where nothing was computed that can be left out."""
    return write_tables(make_evaluation(), tmp_path_factory.mktemp("empty"))[0].parent


@pytest.mark.parametrize(
    ("name", "frame", "n_rows"),
    [
        ("explained_variance", "to_frame", 3 * 7 * 5),
        ("heads", "heads", 3 * 7),
        ("baselines", "baselines", 6 * 7),
        ("held_out", "held_out_frame", (3 + 1) * 7),
        # the last type is undefined, the first has one width of three
        ("scales", "scales_frame", 3 * (5 * 3 + 1)),
        ("ablations", "ablations_frame", 3 * 7 * 7),
        ("head_interactions", "interactions_frame", 3 * 7),
        ("senders", "senders_frame", 3 * 7 * 3),
    ],
)
def test_tables_read_back_equal_and_are_empty_where_not_computed(tables, empty_tables, evaluation, name, frame, n_rows):
    expected = getattr(evaluation, frame)()
    found = read(tables / f"{name}.csv", keep_default_na=False, na_values=[""])
    assert list(found) == list(expected)
    assert len(found) == len(expected) == n_rows
    for column in expected:
        left, right = (one[column].astype(object).where(one[column].notna(), "") for one in (found, expected))
        assert left.tolist() == right.tolist() or left.astype(str).tolist() == right.astype(str).tolist(), column
    assert read(empty_tables / f"{name}.csv").empty == (name not in ("explained_variance", "heads", "baselines"))


@pytest.mark.parametrize(
    ("name", "frame"), [("explained_variance", "to_frame"), ("sender_genes", "sender_genes_frame")]
)
def test_parquet_reads_back_equal(tables, empty_tables, evaluation, name, frame):
    expected = getattr(evaluation, frame)()
    assert_frame_equal(pd.read_parquet(tables / f"{name}.parquet"), expected, check_exact=True)
    empty = pd.read_parquet(empty_tables / f"{name}.parquet")
    assert empty.empty == (name == "sender_genes")
    assert empty.dtypes.to_dict() == expected.dtypes.to_dict()


def test_booleans_and_missing_values_in_csv(tmp_path):
    evaluation = make_evaluation(2, ["A", "B"], held_out=[True, None])
    write_tables(evaluation, tmp_path)
    rows = read(tmp_path / "tables" / "heads.csv", dtype=str, keep_default_na=False).set_index(["head", "ct_name"])
    assert set(rows["held_out"]) == {"True", ""}
    assert rows.loc[("0", "B"), ["expl_var_head", "best_gene", "p_value_head", "significant"]].tolist() == [""] * 4
    assert rows.loc[("0", "B"), "undefined_reason"] == "1 cell; at least 3 needed"
    assert rows.loc[("0", "A"), "significant"] in ("True", "False")


def test_genes_of_senders_are_those_of_the_evaluation(evaluation):
    frame, genes = evaluation.senders_frame(), evaluation.sender_genes_frame()
    # none from a type to itself, none into the type of one cell
    assert len(genes) == 3 * (7 * 3 - 1 - 3) * 5
    one = genes[(genes["head"] == 1) & (genes["ct_name"] == "_hidden") & (genes["sender"] == "other")]
    at = 1, evaluation.type_index("_hidden"), 1
    np.testing.assert_array_equal(one["expl_var_lost"], evaluation.senders.effect_gene[at])
    row = frame[(frame["head"] == 1) & (frame["ct_name"] == "_hidden") & (frame["sender"] == "other")].iloc[0]
    assert row["expl_var_lost"] == evaluation.senders.effect[at]
    assert row["best_gene"] == one["gene"].iloc[int(one["expl_var_lost"].argmax())]
    assert row["undefined_reason"] == ""


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


def test_an_evaluation_without_any_value_has_a_summary(tmp_path):
    evaluation = make_evaluation(2, ["only"])
    lines = summary_lines(evaluation)
    assert "0 of 0 tested head x type pairs are significant at adjusted p <= 0.05" in "\n".join(lines)
    assert "Undefined: only, all heads: 1 cell; at least 3 needed." in lines
    assert len(write_tables(evaluation, tmp_path)) == 11


@pytest.mark.parametrize(
    ("write", "name"), [(write_tables, "tables/heads.csv"), (write_significance, "significance.json")]
)
def test_a_file_that_cannot_be_written_is_named(tmp_path, write, name):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(OutputError, match=rf"{name} cannot be written .*: .* must take new files; free space or"):
        write(make_evaluation(), tmp_path)


NO_SAMPLING = dict.fromkeys(("independent", "cyclic", "sequential", "gpd", "moments", "none"), 0)


def record_of(evaluation, folder):
    return json.loads(write_significance(evaluation, folder).read_text(encoding="utf-8"))


def test_significance_says_engine_parity_and_sampling(tmp_path):
    sampling = ("cyclic", "cyclic", "independent", "independent", "independent", "cyclic", "")
    evaluation = make_evaluation(engine="factored", parity=2e-7, parity_cells=128, sampling=sampling)
    record = record_of(evaluation, tmp_path)
    assert record["engine"] == "factored"
    assert record["parity"] == {"max_abs_difference": 2e-7, "n_cells": 128}
    assert record["sampling"] == {**NO_SAMPLING, "independent": 3, "cyclic": 3, "none": 1}
    expected = [*(evaluation.n_cells[:2] - 1), 999, 999, 999, evaluation.n_cells[5] - 1, 0]
    assert record["test"]["n_permutations_by_type"] == dict(zip(evaluation.cell_types, expected, strict=True))
    bad = make_evaluation(parity=float("nan"), parity_cells=3)
    record = record_of(bad, tmp_path)
    assert record["parity"] == {"max_abs_difference": None, "n_cells": 3}


def test_significance_says_test_families_and_reasons(tmp_path):
    evaluation = make_evaluation(alpha=0.1)
    path = write_significance(evaluation, tmp_path / "run")
    assert path == tmp_path / "run" / "significance.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    validity = record.pop("validity")
    assert record == {
        "schema_version": 3,
        "engine": "hooked",
        "decided_by": "free",
        "test": {
            "null": "free",
            "method": "monte_carlo",
            "tail": "none",
            "stop_at": 20,
            "convention": "add_one",
            "n_permutations": 999,
            "n_permutations_by_type": {**dict.fromkeys(sorted(AWKWARD_TYPES), 999), "β cell": 0},
            "alpha": 0.1,
            "seed": 0,
            "adjustment": "bh",
            "spatial": None,
        },
        "sampling": {**NO_SAMPLING, "independent": 6, "none": 1},
        "families": {
            "heads_x_types": {
                "n_heads": 3,
                "n_types": 7,
                "n_pairs": 21,
                "n_tests": 17,
                "n_significant": int((evaluation.p_value_adj <= 0.1).sum()),
                "n_undefined": 4,
                "undefined_reasons": {"1 cell; at least 3 needed": 3, "predictions are constant": 1},
            },
            "heads_x_types_spatial": None,
            "genes": None,
        },
        "undefined_genes": {"expression is constant": 1},
        "parity": None,
        "intervals": None,
        "baselines": None,
    }
    assert validity == {"free": VALIDITY["free"]}
    assert "anticonservative" in validity["free"]
    assert "spatially autocorrelated" in validity["free"]


def test_nothing_undefined_leaves_the_keys(tmp_path):
    record = record_of(make_evaluation(with_undefined=False), tmp_path)
    family = record["families"]["heads_x_types"]
    assert (family["n_undefined"], family["undefined_reasons"], record["undefined_genes"]) == (0, {}, {})


def test_significance_says_what_the_spatial_test_was_and_found(tmp_path):
    evaluation = make_evaluation(inferred="tile", n_widths=3, alpha=0.1)
    record = record_of(evaluation, tmp_path)
    types, found = evaluation.cell_types, evaluation.spatial
    assert record["decided_by"] == "tile"
    assert record["test"]["null"] == "free"
    spatial = record["test"]["spatial"]
    assert (spatial["null"], spatial["alpha"]) == ("tile", 0.1)
    assert spatial["methods"] == {**dict.fromkeys(types, "monte_carlo"), "β cell": ""}
    for name in ("reach", "correlation_length"):
        values = dict(zip(types, getattr(found, name), strict=True))
        assert spatial[name] == {**values, "β cell": None}
    assert [len(spatial["widths"][name]) for name in types] == [1, 3, 3, 3, 3, 3, 0]
    assert spatial["widths"][types[1]] == [25.0, 50.0, 75.0]
    free, pairs = record["families"]["heads_x_types"], record["families"]["heads_x_types_spatial"]
    assert free["n_significant"] == evaluation.n_significant_free != evaluation.n_significant
    assert (free["n_tests"], free["n_undefined"]) == (17, 4)
    assert "effective sample size" not in "".join(free["undefined_reasons"])
    (lacking,) = [reason for _, _, reason in found.reasons]
    assert pairs == {
        "null": "tile",
        "adjustment": "bh",
        "n_heads": 3,
        "n_types": 7,
        "n_pairs": 21,
        "n_tests": evaluation.n_decided,
        "n_significant": evaluation.n_significant,
        "n_undefined": 5,
        "undefined_reasons": {"1 cell; at least 3 needed": 3, "predictions are constant": 1, lacking: 1},
    }
    assert record["families"]["genes"] == {
        "null": "lag",
        "adjustment": "bh",
        "n_tests": int(np.isfinite(found.p_value_gene).sum()),
        "n_significant": int((found.p_value_adj_gene <= 0.1).sum()),
        "n_undefined": int(np.isnan(found.p_value_gene).sum()),
    }
    assert record["intervals"] == {
        "confidence": 0.95,
        "n_resamples": 1000,
        "tile_width": 75.0,
        "n_tiles": {**dict.fromkeys(types, 12), types[0]: 2},
    }
    assert record["baselines"] == {
        "names": ["neighbour_types", "neighbour_expression", "position"],
        "fitted_on": "training cells",
    }
    # genes are tested by the lag null, whatever the null of the heads
    assert record["validity"] == {null: VALIDITY[null] for null in ("tile", "lag", "free")}


def test_significance_names_what_each_family_is_adjusted_by(tmp_path):
    evaluation = make_evaluation(inferred="lag")
    test = dataclasses.replace(evaluation.spec.permutation, adjustment="maxt")
    changed = dataclasses.replace(evaluation, spec=dataclasses.replace(evaluation.spec, permutation=test))
    record = record_of(changed, tmp_path)
    assert record["test"]["adjustment"] == "maxt"
    assert {record["families"][name]["adjustment"] for name in ("heads_x_types_spatial", "genes")} == {"holm"}


def test_a_type_whose_p_came_without_permutations_has_a_test(tmp_path):
    evaluation = make_evaluation(2, ["A", "B"], with_undefined=False)
    without = dataclasses.replace(
        evaluation,
        exceedances=np.full((2, 2), -1),
        n_permutations_by_type=np.array([0, 0]),
        sampling=("moments", "moments"),
    )
    record = record_of(without, tmp_path)
    assert record["sampling"] == {**NO_SAMPLING, "moments": 2}
    assert record["test"]["n_permutations_by_type"] == {"A": 0, "B": 0}
    assert record["families"]["heads_x_types"]["n_tests"] == 4
