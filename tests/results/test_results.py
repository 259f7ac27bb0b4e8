from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amici_eval.common.errors import DataError
from amici_eval.results.analyses import Baselines, HeadAblations, HeldOutParts, Intervals, Senders, SpatialTests
from amici_eval.results.evaluation import (
    ABLATION_COLUMNS,
    GENE_COLUMNS,
    HEAD_COLUMNS,
    HELD_OUT_COLUMNS,
    INTERACTION_COLUMNS,
    SCALE_COLUMNS,
    SCHEMA_VERSION,
    HeadEvaluation,
    Undefined,
)
from amici_eval.results.moments import Moments
from amici_eval.results.verdict import RuleResult, Verdict
from amici_eval.settings.evaluation import MODES
from tests.builders import AWKWARD_TYPES, make_comparison, make_evaluation, make_moments

seeded = settings(max_examples=40, deadline=None, derandomize=True)


ARCHIVES = Path(__file__).parents[1] / "archives"


def assert_equal(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    for field in dataclasses.fields(left):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(one, (HeadAblations, SpatialTests, Intervals, HeldOutParts, Baselines, Senders)):
            assert_equal(one, other)
        elif isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, field.name
            assert one.shape == other.shape, field.name
            np.testing.assert_array_equal(one, other, err_msg=field.name)
        else:
            assert one == other, field.name
            assert type(one) is type(other), field.name


@pytest.fixture
def small():
    """Two heads, three types (one gene constant in A, one cell of C, head 1 without test in B), two genes."""
    nan = math.nan
    return dataclasses.replace(
        make_evaluation(2, ("A", "B", "C"), genes=("g0", "g1"), n_permutations=99, held_out=(True, False, None)),
        n_cells=np.array([30, 20, 1]),
        expl_var_gene=np.array([[[0.1, nan], [0.3, 0.2], [nan, nan]], [[0.4, nan], [-0.2, -0.1], [nan, nan]]]),
        expl_var=np.array([[0.1, 0.25, nan], [0.4, -0.15, nan]]),
        expl_var_full=np.array([0.5, 0.3, nan]),
        expl_var_none=np.array([0.01, 0.02, nan]),
        exceedances=np.array([[4, 0, -1], [0, -1, -1]]),
        p_value=np.array([[0.05, 0.01, nan], [0.01, nan, nan]]),
        p_value_adj=np.array([[0.06, 0.015, nan], [0.015, nan, nan]]),
        p_ci_low=np.array([[0.01, 0.0, nan], [0.0, nan, nan]]),
        p_ci_high=np.array([[0.1, 0.04, nan], [0.04, nan, nan]]),
        undefined=(
            Undefined(cell_type="A", gene="g1", reason="the gene is constant"),
            Undefined(cell_type="B", head=1, reason="dead head"),
            Undefined(cell_type="C", reason="1 cell"),
        ),
    )


@seeded
@given(
    n_heads=st.integers(1, 5),
    types=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), max_size=5, unique=True),
    n_genes=st.integers(1, 7),
    seed=st.integers(0, 1000),
    with_undefined=st.booleans(),
    notes=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=3),
    modes=st.none() | st.sets(st.sampled_from(MODES)).map(lambda chosen: tuple(m for m in MODES if m in chosen)),
    parity=st.none() | st.floats(0, 1),
    with_sampling=st.booleans(),
    inferred=st.sampled_from([None, "lag", "tile", "sample", "torus"]),
    n_widths=st.integers(0, 3),
)
def test_json_gives_everything_back(
    n_heads, types, n_genes, seed, with_undefined, notes, modes, parity, with_sampling, inferred, n_widths
):
    held_out = [(True, False, None)[(seed + i) % 3] for i in range(len(types))]
    sampling = [("independent", "cyclic", "")[(seed + i) % 3] for i in range(len(types))] if with_sampling else ()
    evaluation = make_evaluation(
        n_heads,
        types,
        n_genes,
        seed,
        with_undefined=with_undefined,
        held_out=held_out,
        notes=notes,
        modes=modes,
        engine=("factored", "hooked")[seed % 2],
        parity=parity,
        parity_cells=0 if parity is None else 7,
        sampling=sampling,
        inferred=inferred,
        n_widths=n_widths,
    )
    assert_equal(HeadEvaluation.from_json(evaluation.to_json()), evaluation)


def test_json_is_plain_and_readable():
    evaluation = make_evaluation()
    text = evaluation.to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert "β cell" in text
    record = json.loads(text)
    assert record["schema_version"] == SCHEMA_VERSION == 4
    assert record["expl_var"][0][-1] is None
    assert record["exceedances"][0][-1] == -1
    assert evaluation.to_json() == text


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[]", "null", '"text"', "{}", '{"a": 1}', make_evaluation().to_json()[:-20], b"\xff\xfe{", b""],
)
def test_what_is_no_evaluation_is_refused(text):
    with pytest.raises(DataError) as caught:
        HeadEvaluation.from_json(text)
    assert caught.value.value.startswith("not an evaluation (")
    assert caught.value.rule == "it must be the evaluation.json of a run"
    assert caught.value.fix == "download it again"


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, "1", None, True, 1.0])
def test_another_schema_version_is_refused(version):
    record = json.loads(make_evaluation().to_json())
    record["schema_version"] = version
    with pytest.raises(DataError) as caught:
        HeadEvaluation.from_json(json.dumps(record))
    assert caught.value.value == f"evaluation of schema version {version!r}"
    assert caught.value.rule == "this version of amici_eval reads schema versions 1 to 4"
    assert caught.value.fix == "install the version of amici_eval that wrote it"


@pytest.mark.parametrize("name", sorted(set(json.loads(make_evaluation().to_json())) - {"schema_version"}))
def test_a_missing_field_is_refused(name):
    record = json.loads(make_evaluation().to_json())
    del record[name]
    with pytest.raises(DataError) as caught:
        HeadEvaluation.from_json(json.dumps(record))
    assert caught.value.value == f"damaged evaluation (KeyError: {name!r})"
    assert caught.value.rule == "all fields of its schema version must be there, with matching sizes"
    assert caught.value.fix == "download it again or evaluate again"


FILLED = json.loads(make_evaluation(modes=MODES, sampling=("cyclic",) * 7, inferred="lag", n_widths=2).to_json())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expl_var", [[0.1]]),
        ("n_cells", [1, 2]),
        ("n_cells", [10**30] * 7),
        ("exceedances", None),
        ("n_heads", 4),
        ("genes", ["only one"]),
        ("cell_types", 7),
        ("held_out", [True]),
        ("undefined", [{"cell_type": "A"}]),
        ("undefined", ["A"]),
        ("spec", {"permutation": {"alpha": 3.0}}),
        ("spec", "free"),
        ("p_value", "text"),
        ("engine", "guessed"),
        ("sampling", ["cyclic"]),
        ("sampling", ["random"] * 7),
        ("n_permutations_by_type", [99]),
        ("ablations", {}),
        ("ablations", {**FILLED["ablations"], "modes": ["shapley", "keep_one", *MODES[1:5], "frozen_shapley"]}),
        ("ablations", {**FILLED["ablations"], "modes": ["keep_one"]}),
        ("ablations", {**FILLED["ablations"], "interaction": [[0.0]]}),
        ("spatial", {}),
        ("spatial", {**FILLED["spatial"], "ess": [[1.0]]}),
        ("spatial", {**FILLED["spatial"], "unknown": 1}),
        ("spatial", {**FILLED["spatial"], "reasons": [[0, "A"]]}),
        ("spatial", {**FILLED["spatial"], "widths": [[1.0] * 7]}),
        ("intervals", {**FILLED["intervals"], "n_tiles": [1]}),
        ("intervals", {**FILLED["intervals"], "low": None}),
        ("parts", {**FILLED["parts"], "full": [[0.0] * 7]}),
        ("trivial", {**FILLED["trivial"], "names": ["position"]}),
    ],
)
def test_a_field_of_another_size_or_kind_is_refused(name, value):
    record = dict(FILLED)
    record[name] = value
    with pytest.raises(DataError, match=r"^damaged evaluation"):
        HeadEvaluation.from_json(json.dumps(record))


def test_an_evaluation_of_schema_version_1_is_read():
    evaluation = HeadEvaluation.from_json((ARCHIVES / "evaluation_v1.json").read_bytes())
    assert (evaluation.engine, evaluation.parity, evaluation.parity_cells) == ("hooked", None, 0)
    assert (evaluation.n_permutations_by_type, evaluation.sampling, evaluation.ablations) == (None, (), None)
    assert (evaluation.spec.ablation.engine, evaluation.spec.ablation.modes) == ("hooked", ("keep_one",))
    assert evaluation.spec.permutation.sampling == "independent"
    assert evaluation.cell_types == ("A", "B+/T", "β cell")
    assert evaluation.held_out == (True, False, None)
    assert evaluation.expl_var_gene[1, 1, 0] == 0.03884404022465704
    assert math.isnan(evaluation.expl_var_gene[0, 0, 1])
    assert evaluation.exceedances.tolist() == [[44, 0, -1], [383, -1, -1]]
    assert set(evaluation.heads()["method"]) == {"monte_carlo"}
    # what is written now is a record of now
    assert evaluation.schema_version == json.loads(evaluation.to_json())["schema_version"] == SCHEMA_VERSION
    assert_equal(HeadEvaluation.from_json(evaluation.to_json()), evaluation)


def test_an_evaluation_of_schema_version_2_is_read():
    evaluation = HeadEvaluation.from_json((ARCHIVES / "evaluation_v2.json").read_bytes())
    assert (evaluation.engine, evaluation.parity, evaluation.parity_cells) == ("factored", 2e-7, 7)
    assert evaluation.sampling == ("cyclic", "independent", "")
    assert evaluation.n_permutations_by_type.tolist() == [814, 399, 0]
    assert evaluation.cell_types == ("A", "B+/T", "β cell")
    assert evaluation.expl_var_gene[1, 1, 0] == 0.0018135069030807336
    assert evaluation.exceedances.tolist() == [[17, 270, -1], [25, -1, -1]]
    assert evaluation.ablations.modes == MODES
    assert evaluation.ablations.of("shapley")[0, 1] == pytest.approx(0.10221214, abs=1e-8)
    assert evaluation.schema_version == json.loads(evaluation.to_json())["schema_version"] == SCHEMA_VERSION
    assert_equal(HeadEvaluation.from_json(evaluation.to_json()), evaluation)


@pytest.mark.parametrize("version", [1, 2])
def test_an_evaluation_from_before_spatial_tests_claims_none(version):
    evaluation = HeadEvaluation.from_json((ARCHIVES / f"evaluation_v{version}.json").read_bytes())
    assert evaluation.spatial is evaluation.intervals is evaluation.parts is evaluation.trivial is None
    settings = evaluation.spec
    assert (settings.permutation.spatial_null, settings.permutation.n_bootstrap) == ("none", 0)
    assert (settings.ablation.baselines, settings.ablation.without_nearest) == (False, False)
    assert evaluation.decided_by == "free"
    assert evaluation.n_significant == evaluation.n_significant_free
    assert evaluation.held_out_frame().empty
    assert evaluation.scales_frame().empty


def test_an_evaluation_of_schema_version_3_is_read_and_knows_no_senders():
    evaluation = HeadEvaluation.from_json((ARCHIVES / "evaluation_v3.json").read_bytes())
    assert evaluation.cell_types == ("A", "B+/T", "β cell")
    assert evaluation.expl_var_gene[1, 1, 0] == 0.009212886258411582
    assert evaluation.spatial.p_value[0, 1] == 0.6
    assert evaluation.spatial.widths.shape == (2, 3)
    assert evaluation.ablations.modes == MODES
    assert evaluation.senders is None
    assert evaluation.spec.ablation.senders is False
    assert evaluation.senders_frame().empty
    assert evaluation.sender_genes_frame().empty
    assert evaluation.schema_version == json.loads(evaluation.to_json())["schema_version"] == SCHEMA_VERSION
    assert_equal(HeadEvaluation.from_json(evaluation.to_json()), evaluation)


@seeded
@given(n_heads=st.integers(1, 4), n_types=st.integers(0, 4), n_senders=st.integers(0, 4), seed=st.integers(0, 99))
def test_senders_come_back_from_json_but_for_single_genes(n_heads, n_types, n_senders, seed):
    types = [f"t{i}" for i in range(n_types)]
    evaluation = make_evaluation(n_heads, types, seed=seed, senders=[f"t{i}" for i in range(n_senders)])
    again = HeadEvaluation.from_json(evaluation.to_json())
    nothing = dict.fromkeys(Senders.apart)
    assert_equal(again.senders, dataclasses.replace(evaluation.senders, **nothing))
    assert again.sender_genes_frame().empty
    pd.testing.assert_frame_equal(again.senders_frame(), evaluation.senders_frame())


def test_senders_of_other_sizes_or_genes_are_refused():
    evaluation = make_evaluation(senders=("A", "B"))
    found = evaluation.senders
    for changed, message in (
        ({"effect": found.effect[:, :, :1]}, r"Senders.effect has shape \(3, 7, 1\), not \(3, 7, 2\)"),
        ({"effect_gene": found.effect_gene[..., :2]}, r"Senders.effect_gene has shape \(3, 7, 2, 2\), not"),
        ({"best_gene": found.best_gene + 9}, "Senders.best_gene holds .* for 5 genes"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(evaluation, senders=dataclasses.replace(found, **changed))


def test_a_difference_of_engines_that_is_no_number_is_kept_apart_from_none():
    for value, expected in ((math.nan, math.nan), (math.inf, math.nan), (None, None), (0.0, 0.0)):
        evaluation = make_evaluation(parity=value, parity_cells=0 if value is None else 5)
        again = HeadEvaluation.from_json(evaluation.to_json()).parity
        assert again is None if expected is None else again == pytest.approx(expected, nan_ok=True)


def test_a_folder_keeps_an_evaluation(tmp_path):
    evaluation = make_evaluation()
    path = evaluation.save(tmp_path / "not" / "there yet")
    assert path == tmp_path / "not" / "there yet" / "evaluation.json"
    assert_equal(HeadEvaluation.load(path.parent), evaluation)
    assert_equal(HeadEvaluation.load(str(path.parent)), evaluation)


def with_moments(n_heads=2, n_types=3, n_genes=4):
    """Return an evaluation with moments that fit it."""
    moments = make_moments(n_heads, n_types, n_genes)
    return dataclasses.replace(make_evaluation(n_heads, moments.cell_types, genes=moments.genes), moments=moments)


def test_moments_stay_with_their_evaluation(tmp_path):
    evaluation = with_moments()
    evaluation.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "moments.npz"]
    loaded = HeadEvaluation.load(tmp_path)
    assert loaded.moments is not None
    assert_equal(loaded.moments, evaluation.moments)
    assert loaded.to_json() == evaluation.to_json()
    # moments of an earlier evaluation do not stay
    make_evaluation().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert HeadEvaluation.load(tmp_path).moments is None


def test_moments_of_an_earlier_evaluation_go_before_numbers_are_written(tmp_path, monkeypatch):
    with_moments().save(tmp_path)

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Moments, "save", full)
    with pytest.raises(OSError, match="No space left"):
        with_moments(n_genes=3).save(tmp_path)
    loaded = HeadEvaluation.load(tmp_path)
    assert (len(loaded.genes), loaded.moments) == (3, None)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (make_moments(3), "3 heads, not 2"),
        (make_moments(2, 2), "2 cell types, the evaluation has 3; first difference: None, not 'type 2'"),
        (make_moments(2, 3, 5), "5 genes, the evaluation has 4; first difference: 'g4', not None"),
        (
            dataclasses.replace(make_moments(), genes=("g0", "g2", "g1", "g3")),
            "4 genes, the evaluation has 4; first difference: 'g2', not 'g1'",
        ),
    ],
    ids=["heads", "types", "genes", "order of genes"],
)
def test_moments_of_another_evaluation_are_refused(tmp_path, other, difference):
    evaluation = with_moments()
    evaluation.save(tmp_path)
    other.save(tmp_path / "moments.npz")
    with pytest.raises(DataError) as caught:
        HeadEvaluation.load(tmp_path)
    assert (caught.value.value, caught.value.rule, caught.value.fix) == (
        f"{tmp_path / 'moments.npz'} does not fit evaluation.json ({difference})",
        "both must be of one evaluation",
        "download both files of the run again, or remove moments.npz",
    )
    with pytest.raises(ValueError, match=f"^{re.escape(f'moments: {difference}')}$"):
        dataclasses.replace(evaluation, moments=other)


@pytest.mark.parametrize("give_the_file", [False, True])
def test_a_folder_without_evaluation_is_refused(tmp_path, give_the_file):
    place = make_evaluation().save(tmp_path / "full") if give_the_file else tmp_path
    with pytest.raises(DataError) as caught:
        HeadEvaluation.load(place)
    assert caught.value.value == f"{place} holds no evaluation.json"
    assert caught.value.rule == "load() takes a folder that save() or a run wrote"
    assert caught.value.fix == "give the folder itself"


def test_bytes_damaged_on_the_way_are_refused(tmp_path):
    path = make_evaluation().save(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace("β".encode(), b"\xff\xfe", 1))
    with pytest.raises(DataError, match=r"evaluation.json: not an evaluation \(.*decode"):
        HeadEvaluation.load(tmp_path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"evaluation.json: not an evaluation"):
        HeadEvaluation.load(tmp_path)


def test_columns_are_the_contract():
    # named as AMICI names them; others read these files
    assert GENE_COLUMNS == (
        *("head", "ct_name", "gene", "expl_var_head_gene", "expl_var_head", "p_value_head", "p_value_adj_head"),
        *("p_value_gene", "p_value_adj_gene", "undefined_reason"),
    )
    assert HEAD_COLUMNS == (
        *("head", "ct_name", "n_cells", "expl_var_head", "ci_low", "ci_high", "best_gene", "expl_var_best_gene"),
        *("p_value_head", "p_value_adj_head", "p_ci_low", "p_ci_high", "p_value_spatial", "p_value_adj_spatial", "ess"),
        *("null", "method", "significant_free", "significant", "significant_by", "held_out", "undefined_reason"),
        *("statistic_spatial", "detectable_expl_var", "correlation_length", "reach", "gain"),
        *("expl_var_without_nearest", "n_tiles"),
    )
    assert HELD_OUT_COLUMNS == (
        *("head", "ct_name", "n_cells_in_sample", "expl_var_in_sample", "ci_low_in_sample", "ci_high_in_sample"),
        *("n_cells_held_out", "expl_var_held_out", "ci_low_held_out", "ci_high_held_out", "undefined_reason"),
    )
    assert SCALE_COLUMNS == ("head", "ct_name", "tile_width", "p_value")
    evaluation = make_evaluation()
    assert tuple(evaluation.to_frame().columns) == GENE_COLUMNS
    assert tuple(evaluation.heads().columns) == HEAD_COLUMNS
    assert tuple(evaluation.baselines().columns) == ("ct_name", "baseline", "expl_var")
    assert ABLATION_COLUMNS == ("head", "ct_name", "mode", "expl_var", "delta_full")
    assert INTERACTION_COLUMNS == ("head_a", "head_b", "ct_name", "interaction", "interaction_frozen_norm")
    for some in (evaluation, make_evaluation(modes=MODES)):
        assert tuple(some.ablations_frame().columns) == ABLATION_COLUMNS
        assert tuple(some.interactions_frame().columns) == INTERACTION_COLUMNS


def test_frame_has_a_row_per_head_type_and_gene(small):
    frame = small.to_frame()
    assert frame[["head", "ct_name", "gene"]].to_numpy().tolist() == [
        [head, cell_type, gene] for head in (0, 1) for cell_type in "ABC" for gene in ("g0", "g1")
    ]
    np.testing.assert_array_equal(frame["expl_var_head_gene"], small.expl_var_gene.ravel())
    for row in frame.itertuples():
        place = row.head, "ABC".index(row.ct_name)
        np.testing.assert_equal(row.expl_var_head, small.expl_var[place])
        np.testing.assert_equal(row.p_value_head, small.p_value[place])
        np.testing.assert_equal(row.p_value_adj_head, small.p_value_adj[place])
    assert frame["undefined_reason"].tolist() == [
        *("", "the gene is constant", "", "", "1 cell", "1 cell"),
        *("", "the gene is constant", "dead head", "dead head", "1 cell", "1 cell"),
    ]
    assert frame[["p_value_gene", "p_value_adj_gene"]].isna().all(axis=None)


def test_heads_has_a_row_per_head_and_type(small):
    heads = small.heads()
    nan = math.nan
    expected = pd.DataFrame(
        {
            "head": [0, 0, 0, 1, 1, 1],
            "ct_name": list("ABCABC"),
            "n_cells": [30, 20, 1, 30, 20, 1],
            "expl_var_head": [0.1, 0.25, nan, 0.4, -0.15, nan],
            "best_gene": ["g0", "g0", None, "g0", "g1", None],
            "expl_var_best_gene": [0.1, 0.3, nan, 0.4, -0.1, nan],
            "p_value_head": [0.05, 0.01, nan, 0.01, nan, nan],
            "p_value_adj_head": [0.06, 0.015, nan, 0.015, nan, nan],
            "p_ci_low": [0.01, 0.0, nan, 0.0, nan, nan],
            "p_ci_high": [0.1, 0.04, nan, 0.04, nan, nan],
            "null": ["free"] * 6,
            "method": ["monte_carlo"] * 6,
            "significant_free": pd.array([False, True, None, True, None, None], dtype="boolean"),
            "significant": pd.array([False, True, None, True, None, None], dtype="boolean"),
            "significant_by": ["free", "free", None, "free", None, None],
            "held_out": pd.array([True, False, None] * 2, dtype="boolean"),
            "undefined_reason": ["", "", "1 cell", "", "dead head", "1 cell"],
        }
    )
    pd.testing.assert_frame_equal(heads[expected.columns], expected)
    assert heads[["ci_low", "ci_high", "p_value_spatial", "p_value_adj_spatial", "ess"]].isna().all(axis=None)


def test_heads_says_how_permutations_were_drawn(small):
    cyclic = dataclasses.replace(small, sampling=("cyclic", "independent", ""))
    heads = cyclic.heads()
    assert heads["method"].tolist() == ["cyclic", "monte_carlo", None] * 2
    pd.testing.assert_frame_equal(heads.drop(columns="method"), small.heads().drop(columns="method"))


def test_ablations_has_a_row_per_head_type_and_mode(small):
    nan = math.nan
    ablations = HeadAblations(
        modes=("leave_one_out", "shapley"),
        expl_var=np.array([[[0.4, 0.1, nan], [0.2, 0.3, nan]], [[0.15, 0.28, nan], [0.34, 0.0, nan]]]),
        standard_error=np.zeros((2, 3)),
        interaction=np.arange(12.0).reshape(3, 2, 2),
        frozen_interaction=np.full((3, 2, 2), nan),
    )
    frame = dataclasses.replace(small, ablations=ablations).ablations_frame()
    assert frame[["head", "ct_name", "mode"]].to_numpy().tolist() == [
        [head, name, mode] for head in (0, 1) for name in "ABC" for mode in ("leave_one_out", "shapley")
    ]
    np.testing.assert_array_equal(frame["expl_var"], [0.4, 0.15, 0.1, 0.28, nan, nan, 0.2, 0.34, 0.3, 0.0, nan, nan])
    # the whole model explains 0.5 of A and 0.3 of B; a Shapley value is no ablated model
    expected = [0.1, nan, 0.2, nan, nan, nan, 0.3, nan, 0.0, nan, nan, nan]
    np.testing.assert_allclose(frame["delta_full"], expected, atol=1e-15)
    interactions = dataclasses.replace(small, ablations=ablations).interactions_frame()
    assert interactions[["head_a", "head_b", "ct_name"]].to_numpy().tolist() == [[0, 1, name] for name in "ABC"]
    assert interactions["interaction"].tolist() == [1.0, 5.0, 9.0]
    assert interactions["interaction_frozen_norm"].isna().all()


def test_interactions_has_each_pair_once():
    evaluation = make_evaluation(4, modes=MODES)
    frame = evaluation.interactions_frame()
    assert len(frame) == 6 * 7
    assert (frame["head_a"] < frame["head_b"]).all()
    for row in frame.itertuples():
        index = evaluation.type_index(row.ct_name)
        for name in ("interaction", "frozen_interaction"):
            value = row.interaction if name == "interaction" else row.interaction_frozen_norm
            np.testing.assert_equal(value, getattr(evaluation.ablations, name)[index, row.head_a, row.head_b])


@pytest.mark.parametrize(
    "changes",
    [
        {"modes": ("shapley", "keep_one")},
        {"modes": ("keep_one", "keep_one")},
        {"modes": ("keep_one", "guess")},
        {"modes": ("keep_one",)},
        {"expl_var": np.zeros((2, 3))},
        {"standard_error": np.zeros((7, 3))},
        {"interaction": np.zeros((3, 7, 7))},
        {"frozen_interaction": np.zeros((7, 3, 2))},
    ],
)
def test_ablations_that_do_not_fit_together_are_refused(changes):
    ablations = make_evaluation(modes=("keep_one", "shapley")).ablations
    np.testing.assert_array_equal(ablations.of("shapley"), ablations.expl_var[1])
    with pytest.raises(ValueError, match=r"must be|has shape"):
        dataclasses.replace(ablations, **changes)


def test_a_mode_that_was_not_computed_is_named():
    with pytest.raises(ValueError, match="mode 'mean_z' was not computed; there are keep_one, shapley"):
        make_evaluation(modes=("keep_one", "shapley")).ablations.of("mean_z")


def test_ablations_of_another_evaluation_are_refused(small):
    with pytest.raises(ValueError, match=r"HeadAblations.expl_var has shape \(7, 3, 7\), not \(7, 2, 3\)"):
        dataclasses.replace(small, ablations=make_evaluation(modes=MODES).ablations)


def test_heads_gives_every_reason(small):
    more = dataclasses.replace(
        small, undefined=(*small.undefined, Undefined(cell_type="B", reason="2 cells; a test needs at least 3"))
    )
    reasons = more.heads().set_index(["head", "ct_name"])["undefined_reason"]
    assert reasons[0, "B"] == "2 cells; a test needs at least 3"
    assert reasons[1, "B"] == "dead head; 2 cells; a test needs at least 3"


def test_counts_of_tests(small):
    assert (small.n_tests, small.n_undefined, small.n_significant) == (3, 3, 2)


@pytest.mark.parametrize(("adjusted", "expected"), [(0.05, 3), (np.nextafter(0.05, 1.0), 0)])
def test_an_adjusted_p_of_alpha_is_significant(small, adjusted, expected):
    changed = dataclasses.replace(small, p_value_adj=np.where(np.isnan(small.p_value), np.nan, adjusted))
    assert changed.n_significant == expected
    assert changed.heads()["significant"].sum() == changed.heads()["significant_free"].sum() == expected


def test_baselines_has_two_rows_per_type(small):
    expected = pd.DataFrame(
        {
            "ct_name": list("AABBCC"),
            "baseline": ["full_model", "no_head"] * 3,
            "expl_var": [0.5, 0.01, 0.3, 0.02, math.nan, math.nan],
        }
    )
    pd.testing.assert_frame_equal(small.baselines(), expected)


def test_best_head_explains_one_gene_best(small):
    assert small.best_head("A") == 1
    assert small.best_head("B") == 0
    # one gene decides, not the mean over genes
    peaked = small.expl_var_gene.copy()
    peaked[1, 1] = [-5.0, 0.9]
    assert dataclasses.replace(small, expl_var_gene=peaked).best_head("B") == 1


def test_best_head_is_found_among_negative_values(small):
    negative = small.expl_var_gene.copy()
    negative[:, 1] = [[-3.0, -2.0], [-1.0, np.nan]]
    assert dataclasses.replace(small, expl_var_gene=negative).best_head("B") == 1
    negative[1, 1] = np.nan
    assert dataclasses.replace(small, expl_var_gene=negative).best_head("B") == 0


def test_a_type_without_values_has_no_best_head(small):
    with pytest.raises(DataError) as caught:
        small.best_head("C")
    assert caught.value.value == "cell type 'C' has no defined explained variance"
    assert caught.value.rule == "a best head needs at least one defined gene"
    assert caught.value.fix == "choose a type with more cells; heads() gives the reason"


def test_an_unknown_type_is_refused_with_the_known_ones(small):
    for call in (small.best_head, small.type_index):
        with pytest.raises(DataError) as caught:
            call("D")
        assert caught.value.value == "cell type 'D'"
        assert caught.value.rule == "the evaluation holds A, B, C"
        assert caught.value.fix == "choose one of these"
    assert [small.type_index(name) for name in "ABC"] == [0, 1, 2]


def test_awkward_names_come_through_every_table():
    evaluation = make_evaluation()
    assert set(evaluation.to_frame()["ct_name"]) == set(evaluation.heads()["ct_name"]) == set(AWKWARD_TYPES)
    assert set(evaluation.baselines()["ct_name"]) == set(AWKWARD_TYPES)


def test_tables_of_no_type_are_empty():
    evaluation = make_evaluation(2, ())
    assert len(evaluation.to_frame()) == len(evaluation.heads()) == len(evaluation.baselines()) == 0
    assert tuple(evaluation.to_frame().columns) == GENE_COLUMNS
    assert tuple(evaluation.heads().columns) == HEAD_COLUMNS


@pytest.mark.parametrize(
    "evaluation",
    [make_evaluation(), make_evaluation(modes=()), make_evaluation(2, (), modes=MODES)],
    ids=["not computed", "no mode", "no type"],
)
def test_tables_without_ablations_are_empty(evaluation):
    frame = evaluation.ablations_frame()
    assert frame.empty
    assert tuple(frame.columns) == ABLATION_COLUMNS
    assert frame.dtypes.astype(str).tolist() == ["int64", "object", "object", "float64", "float64"]
    if evaluation.ablations is None:
        assert evaluation.interactions_frame().empty
    assert tuple(evaluation.interactions_frame().columns) == INTERACTION_COLUMNS


@pytest.fixture(scope="module")
def inferred():
    return make_evaluation(inferred="lag", n_widths=3)


def test_the_spatial_null_decides_where_it_was_tested(inferred):
    assert inferred.decided_by == "lag"
    np.testing.assert_array_equal(inferred.adjusted, inferred.spatial.p_value_adj)
    assert (inferred.n_decided, inferred.n_tests) == (16, 17)
    assert inferred.n_significant == (inferred.spatial.p_value_adj <= 0.05).sum()
    assert inferred.n_significant_free == (inferred.p_value_adj <= 0.05).sum() != inferred.n_significant
    heads = inferred.heads()
    assert heads["significant"].sum() == inferred.n_significant
    assert heads["significant_free"].sum() == inferred.n_significant_free
    assert set(heads["significant_by"].dropna()) == set(heads["null"]) == {"lag"}
    assert "7 of 16 tests significant" in repr(inferred)
    without = heads.set_index(["head", "ct_name"]).loc[(2, "CD8+_T_Cells")]
    assert without["undefined_reason"].startswith("lag null: effective sample size 3.1 of ")
    assert pd.isna(without["significant"])


def test_heads_and_genes_have_what_is_inferred(inferred):
    heads = inferred.heads()
    for column, values in {
        "p_value_spatial": inferred.spatial.p_value,
        "p_value_adj_spatial": inferred.spatial.p_value_adj,
        "ess": inferred.spatial.ess,
        "statistic_spatial": inferred.spatial.statistic,
        "detectable_expl_var": inferred.spatial.detectable,
        "ci_low": inferred.intervals.low,
        "ci_high": inferred.intervals.high,
        "gain": inferred.trivial.gain,
        "expl_var_without_nearest": inferred.trivial.without_nearest,
        "correlation_length": np.tile(inferred.spatial.correlation_length, (3, 1)),
        "reach": np.tile(inferred.spatial.reach, (3, 1)),
    }.items():
        np.testing.assert_array_equal(heads[column], values.ravel(), err_msg=column)
    genes = inferred.to_frame()
    np.testing.assert_array_equal(genes["p_value_gene"], inferred.spatial.p_value_gene.ravel())
    np.testing.assert_array_equal(genes["p_value_adj_gene"], inferred.spatial.p_value_adj_gene.ravel())


def test_baselines_have_a_row_per_type_and_predictor(inferred):
    names = ["full_model", "no_head", *inferred.trivial.names, "full_model_without_nearest"]
    frame = inferred.baselines()
    assert frame["baseline"].tolist() == names * 7
    np.testing.assert_array_equal(frame.loc[frame["baseline"] == "position", "expl_var"], inferred.trivial.expl_var[2])


def test_held_out_has_a_row_per_head_and_type_and_the_whole_model(inferred):
    frame = inferred.held_out_frame()
    assert frame["head"].tolist() == [head for head in (0, 1, 2, "full") for _ in range(7)]
    for part, name in enumerate(("in_sample", "held_out")):
        expected = np.concatenate([inferred.parts.expl_var[part].ravel(), inferred.parts.full[part]])
        np.testing.assert_array_equal(frame[f"expl_var_{name}"], expected)
        np.testing.assert_array_equal(frame[f"n_cells_{name}"], np.tile(inferred.parts.n_cells[part], 4))
    assert frame["undefined_reason"][0] == "no gene varies held-out"
    assert frame["undefined_reason"][6] == "1 cells in-sample; 0 cells held-out"
    assert frame["undefined_reason"][1] == ""


def test_a_part_with_cells_and_no_value_says_why(inferred):
    of_parts, of_all = inferred.parts.expl_var.copy(), inferred.expl_var.copy()
    of_parts[0, 1, 1:3] = of_all[1, 2] = np.nan
    n_cells = np.maximum(inferred.parts.n_cells, 2)
    parts = dataclasses.replace(inferred.parts, expl_var=of_parts, n_cells=n_cells)
    frame = dataclasses.replace(inferred, parts=parts, expl_var=of_all).held_out_frame()
    of_head = frame[frame["head"] == 1]["undefined_reason"].tolist()
    assert of_head[1:3] == ["no gene varies in-sample", "predictions are not finite in-sample"]


def test_a_gene_without_a_test_says_why(inferred):
    p = np.full_like(inferred.spatial.p_value_gene, 0.5)
    p[0, 2, 3] = p[2, 1, 0] = np.nan
    spatial = dataclasses.replace(inferred.spatial, p_value_gene=p)
    frame = dataclasses.replace(inferred, spatial=spatial).to_frame()
    reasons = frame["undefined_reason"].to_numpy().reshape(p.shape)
    assert reasons[0, 2, 3].startswith("no p of the gene: effective sample size below 5 under the lag null")
    assert reasons[0, 2, 2] == ""
    # a head that predicts the same for all cells has said so
    assert reasons[2, 1, 0] == "predictions are constant"


def test_scales_have_a_row_per_width_that_a_type_has(inferred):
    frame = inferred.scales_frame()
    assert frame.groupby("ct_name").size().to_dict() == {
        name: 3 * n for name, n in zip(inferred.cell_types, (1, 3, 3, 3, 3, 3), strict=False)
    }
    one = frame[(frame["head"] == 1) & (frame["ct_name"] == "CD8+_T_Cells")]
    np.testing.assert_array_equal(one["tile_width"], inferred.spatial.widths[:, 2])
    np.testing.assert_array_equal(one["p_value"], inferred.spatial.p_by_width[:, 1, 2])


@pytest.mark.parametrize("name", ["spatial", "intervals", "parts", "trivial"])
def test_parts_of_another_evaluation_are_refused(small, inferred, name):
    with pytest.raises(ValueError, match=r"has shape .*, not "):
        dataclasses.replace(small, **{name: getattr(inferred, name)})


def without_each_field(record):
    """Yield a record without each of the fields of the records within it."""
    for name, value in record.items():
        for number, one in enumerate(value if isinstance(value, list) else []):
            for inner in one if isinstance(one, dict) else ():
                rest = {key: one[key] for key in one if key != inner}
                yield {**record, name: [*value[:number], rest, *value[number + 1 :]]}


@pytest.mark.parametrize("kind", ["comparison", "verdict"])
def test_a_record_that_lacks_a_field_is_damaged(kind):
    result = make_comparison() if kind == "comparison" else verdict()
    damaged = [json.dumps(record) for record in without_each_field(json.loads(result.to_json()))]
    assert len(damaged) > 10
    for text in damaged:
        with pytest.raises(DataError, match=f"damaged {kind}"):
            type(result).from_json(text)


def verdict():
    numbers = {"value": 1.0, "low": 0.5, "high": 2.0}
    rule = RuleResult(rule="r", kind="metric", outcome="pass", threshold="at least 0", reason="", **numbers)
    return Verdict(outcome="pass", results=(rule, rule))
