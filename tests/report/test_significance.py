from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from amici_eval.common.errors import OutputError
from amici_eval.report.evaluation_sentences import VALIDITY
from amici_eval.report.tables import write_significance
from tests.builders import AWKWARD_TYPES, make_evaluation

NO_SAMPLING = dict.fromkeys(("independent", "cyclic", "sequential", "gpd", "moments", "none"), 0)


def test_significance_says_engine_parity_and_sampling(tmp_path):
    sampling = ("cyclic", "cyclic", "independent", "independent", "independent", "cyclic", "")
    evaluation = make_evaluation(engine="factored", parity=2e-7, parity_cells=128, sampling=sampling)
    record = json.loads(write_significance(evaluation, tmp_path).read_text(encoding="utf-8"))
    assert record["engine"] == "factored"
    assert record["parity"] == {"max_abs_difference": 2e-7, "n_cells": 128}
    assert record["sampling"] == {**NO_SAMPLING, "independent": 3, "cyclic": 3, "none": 1}
    expected = [*(evaluation.n_cells[:2] - 1), 999, 999, 999, evaluation.n_cells[5] - 1, 0]
    assert record["test"]["n_permutations_by_type"] == dict(zip(evaluation.cell_types, expected, strict=True))
    bad = make_evaluation(parity=float("nan"), parity_cells=3)
    record = json.loads(write_significance(bad, tmp_path).read_text(encoding="utf-8"))
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
    record = json.loads(write_significance(make_evaluation(with_undefined=False), tmp_path).read_text(encoding="utf-8"))
    family = record["families"]["heads_x_types"]
    assert (family["n_undefined"], family["undefined_reasons"], record["undefined_genes"]) == (0, {}, {})


def test_significance_says_what_the_spatial_test_was_and_found(tmp_path):
    evaluation = make_evaluation(inferred="tile", n_widths=3, alpha=0.1)
    record = json.loads(write_significance(evaluation, tmp_path).read_text(encoding="utf-8"))
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
    record = json.loads(write_significance(changed, tmp_path).read_text(encoding="utf-8"))
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
    record = json.loads(write_significance(without, tmp_path).read_text(encoding="utf-8"))
    assert record["sampling"] == {**NO_SAMPLING, "moments": 2}
    assert record["test"]["n_permutations_by_type"] == {"A": 0, "B": 0}
    assert record["families"]["heads_x_types"]["n_tests"] == 4


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "significance.json").mkdir()
    with pytest.raises(OutputError, match=r"significance\.json cannot be written"):
        write_significance(make_evaluation(), tmp_path)
