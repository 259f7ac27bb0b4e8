from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amici_eval.common.errors import AmiciEvalError, InvalidSpecError
from amici_eval.settings.evaluation import (
    AblationSpec,
    DataSpec,
    EvaluationSpec,
    PermutationSpec,
    ReportSpec,
    SubsetSpec,
    default_n_permutations,
    spec_from_mapping,
)

seeded = settings(max_examples=100, deadline=None, derandomize=True)


def refusal(call, *args, **kwargs):
    with pytest.raises(InvalidSpecError) as caught:
        call(*args, **kwargs)
    error = caught.value
    assert isinstance(error, AmiciEvalError)
    assert isinstance(error, ValueError)
    assert str(error) == f"{error.value}: {error.rule}; {error.fix}"
    return error.value, error.rule, error.fix


WHOLE_ROWS = (
    "row numbers must be distinct whole numbers, not negative, and at least one",
    "give each row once, counted from 0",
)


@pytest.mark.parametrize(
    ("indices", "shown"),
    [
        ((), "[]... (0 rows)"),
        ((3, -1), "[3, -1]... (2 rows)"),
        ((1, 2, 3, 4, 5, 6, 1), "[1, 2, 3, 4, 5]... (7 rows)"),
        ((0, 1.5), "[0, 1.5]... (2 rows)"),
        ((0, True), "[0, True]... (2 rows)"),
        ((0, "2"), "[0, '2']... (2 rows)"),
        ("12", "['1', '2']... (2 rows)"),
    ],
)
def test_row_numbers_that_name_no_rows_are_refused(indices, shown):
    assert refusal(SubsetSpec, indices=indices) == (f"data.subset.indices={shown}", *WHOLE_ROWS)


def test_row_numbers_may_come_from_numpy():
    rows = SubsetSpec(indices=np.array([4, 0, 2], dtype=np.int32)).indices
    assert rows == (4, 0, 2)
    assert [type(row) for row in rows] == [int, int, int]
    json.dumps(rows)
    assert SubsetSpec(indices=np.array([4, 0])) == SubsetSpec(indices=[4, 0])


@pytest.mark.parametrize(
    ("given_parts", "value", "missing"),
    [
        ({"key": "region"}, "data.subset.key='region', data.subset.value=None", "value"),
        ({"value": "left"}, "data.subset.key=None, data.subset.value='left'", "key"),
    ],
)
def test_half_a_subset_by_column_is_refused(given_parts, value, missing):
    expected = (value, "a subset by column needs both", f"give data.subset.{missing} too")
    assert refusal(SubsetSpec, **given_parts) == expected


def test_a_subset_by_column_and_by_index_is_refused():
    assert refusal(SubsetSpec, key="region", value="left", indices=(1, 2)) == (
        "data.subset.key='region' and data.subset.indices with 2 rows",
        "cells are chosen by column or by index, not by both",
        "drop one of the two",
    )


@pytest.mark.parametrize("bad", ["true", 1, 0.0, ()])
def test_what_is_held_out_is_a_truth_value(bad):
    assert refusal(SubsetSpec, held_out=bad) == (
        f"data.subset.held_out={bad!r}",
        "it must be true, false or null",
        "set data.subset.held_out=true for the cells that the model was not fitted on",
    )
    assert refusal(SubsetSpec, buffer=bad) == (
        f"data.subset.buffer={bad!r}",
        "it must be true or false",
        "set data.subset.buffer=true to drop cells with a training cell among their neighbours",
    )
    assert refusal(SubsetSpec, buffer=None)[0] == "data.subset.buffer=None"


def test_held_out_cells_are_chosen_besides_column_and_index():
    for chosen in ({}, {"indices": (1, 2)}, {"key": "region", "value": "left"}):
        spec = EvaluationSpec(data=DataSpec(subset=SubsetSpec(**chosen, held_out=True, buffer=True)))
        assert spec_from_mapping(json.loads(json.dumps(spec.to_dict()))) == spec


def test_settings_from_before_there_was_a_buffer_mean_what_they_meant():
    older = {"data": {"subset": {"key": "region", "value": "left", "indices": None}}}
    subset = spec_from_mapping(older).data.subset
    assert (subset.held_out, subset.buffer) == (None, False)


@pytest.mark.parametrize(
    ("spec", "name", "bad", "allowed"),
    [
        (AblationSpec, "ablation.engine", "fast", ("factored", "hooked")),
        (PermutationSpec, "permutation.null", "torus", ("free",)),
        (PermutationSpec, "permutation.method", "exact", ("monte_carlo", "sequential", "moments")),
        (PermutationSpec, "permutation.spatial_null", "block", ("lag", "tile", "sample", "torus", "none")),
        (PermutationSpec, "permutation.tail", "weibull", ("none", "gpd")),
        (PermutationSpec, "permutation.sampling", "bootstrap", ("independent", "cyclic")),
        (PermutationSpec, "permutation.convention", "plus_one", ("add_one", "reference")),
        (PermutationSpec, "permutation.convention", None, ("add_one", "reference")),
        (PermutationSpec, "permutation.adjustment", "bonferroni", ("bh", "by", "maxt")),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(spec, name, bad, allowed):
    assert refusal(spec, **{name.split(".")[1]: bad}) == (
        f"{name}={bad!r}",
        f"it must be one of {', '.join(allowed)}",
        f"set {name}={allowed[0]}",
    )


@pytest.mark.parametrize("bad", [0, -3, 1.0, "1", True, math.nan])
@pytest.mark.parametrize(
    ("spec", "name", "minimum"),
    [
        (AblationSpec, "ablation.batch_size", 1),
        (PermutationSpec, "permutation.n_permutations", 1),
        (ReportSpec, "report.n_top_genes", 1),
    ],
)
def test_numbers_that_count_are_whole_and_positive(spec, name, minimum, bad):
    assert refusal(spec, **{name.split(".")[1]: bad}) == (
        f"{name}={bad!r}",
        f"it must be a whole number of at least {minimum}",
        f"set {name}={minimum}",
    )
    assert getattr(spec(**{name.split(".")[1]: minimum}), name.split(".")[1]) == minimum


@pytest.mark.parametrize("bad", [-1, 0.5, None, False])
def test_a_seed_is_a_whole_number_from_zero(bad):
    assert refusal(PermutationSpec, seed=bad) == (
        f"permutation.seed={bad!r}",
        "it must be a whole number of at least 0",
        "set permutation.seed=0",
    )


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.05, 5.0, 1, "0.05", math.nan, math.inf, None])
def test_a_level_lies_between_zero_and_one(bad):
    assert refusal(PermutationSpec, alpha=bad) == (
        f"permutation.alpha={bad!r}",
        "a significance level lies strictly between 0 and 1",
        "set permutation.alpha=0.05",
    )


@pytest.mark.parametrize("bad", ["gpu", "cuda:", "cuda:x", "CPU", "cpu ", "cuda:0 or cpu", "", None, 0])
def test_an_unknown_device_is_refused(bad):
    assert refusal(AblationSpec, device=bad) == (
        f"ablation.device={bad!r}",
        "it must be auto, cpu, cuda, cuda:N or mps",
        "set ablation.device=auto",
    )


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_a_known_device_is_taken(device):
    assert AblationSpec(device=device).device == device


def test_tile_widths_are_distinct_and_ascend():
    assert PermutationSpec(tile_widths=[120, 30.0, 30]).tile_widths == (30.0, 120.0)


def test_a_tile_width_that_nothing_would_use_is_refused():
    assert refusal(PermutationSpec, tile_width=30.0) == (
        "permutation.tile_width=30 with permutation.spatial_null=lag",
        "it is the side of the squares within which the tile null shuffles cells",
        "set permutation.spatial_null=tile, or permutation.tile_widths for p against scale",
    )
    assert PermutationSpec(tile_width=30.0, spatial_null="tile").tile_width == 30.0


def test_p_against_scale_needs_a_spatial_null():
    assert refusal(PermutationSpec, tile_widths=(30.0,), spatial_null="none") == (
        "permutation.tile_widths with permutation.spatial_null=none",
        "p against scale stands beside a spatial test",
        "set permutation.spatial_null=lag, or leave permutation.tile_widths out",
    )


def test_an_unknown_figure_format_is_refused():
    assert refusal(ReportSpec, formats=("png", "jpeg")) == (
        "report.formats='jpeg'",
        "it must be one of png, svg",
        "set report.formats=png",
    )


@pytest.mark.parametrize(
    ("values", "unknown", "known"),
    [
        ({"seed": 1}, "seed", "data, ablation, permutation"),
        ({"permutation": {"sead": 1}}, "permutation.sead", "permutation.n_permutations, permutation.alpha"),
        ({"data": {"subset": {"kye": "a"}}}, "data.subset.kye", "data.subset.key, data.subset.value"),
        ({"ablation": {"batch": 1, "devise": 2}}, "ablation.batch", "ablation.engine, ablation.device"),
    ],
)
def test_an_unknown_setting_is_refused_with_its_place(values, unknown, known):
    value, rule, fix = refusal(spec_from_mapping, values)
    assert value == f"unknown setting {unknown}"
    assert rule.startswith(f"known here are {known}")
    assert fix == "correct the name or drop it"


@pytest.mark.parametrize(
    ("values", "shown"), [({"data": "a.h5ad"}, "data='a.h5ad'"), ({"data": {"subset": None}}, "data.subset=None")]
)
def test_a_value_in_the_place_of_a_group_is_refused(values, shown):
    assert refusal(spec_from_mapping, values) == (shown, "it must be a group of settings", "give a mapping")


def test_a_bad_value_in_a_mapping_is_refused_as_anywhere():
    assert refusal(spec_from_mapping, {"permutation": {"alpha": 2}})[0] == "permutation.alpha=2.0"
    assert refusal(spec_from_mapping, {"permutation": {"alpha": True}})[0] == "permutation.alpha=True"
    assert refusal(spec_from_mapping, {"data": {"subset": {"indices": [1, "a"]}}})[1:] == WHOLE_ROWS
    assert refusal(spec_from_mapping, {"data": {"subset": {"indices": 3.5}}})[1:] == WHOLE_ROWS


def test_no_settings_are_the_defaults():
    assert spec_from_mapping({}) == EvaluationSpec()
    assert spec_from_mapping({"data": {"subset": {}}, "permutation": {}}) == EvaluationSpec()


def test_settings_survive_plain_values_and_json():
    spec = EvaluationSpec(
        data=DataSpec(labels_key="t", layer="X", sample_key="s", subset=SubsetSpec(indices=(5, 2))),
        ablation=AblationSpec(device="cuda:1", batch_size=3),
        permutation=PermutationSpec(n_permutations=7, alpha=0.01, seed=3, convention="reference"),
    )
    assert spec_from_mapping(spec.to_dict()) == spec
    assert spec_from_mapping(json.loads(json.dumps(spec.to_dict()))) == spec
    by_column = EvaluationSpec(data=DataSpec(subset=SubsetSpec(key="region", value="β")))
    assert spec_from_mapping(json.loads(json.dumps(by_column.to_dict()))) == by_column


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PermutationSpec().seed = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        SubsetSpec().key = "a"


@seeded
@given(n_heads=st.integers(1, 64), n_types=st.integers(1, 60), alpha=st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.2]))
def test_default_number_of_permutations_is_the_formula(n_heads, n_types, alpha):
    n_permutations = default_n_permutations(n_heads, n_types, alpha)
    assert n_permutations == int(np.ceil(n_heads * n_types / alpha))
    # one lone test of the family is significant after the adjustment if no permutation exceeds it
    assert n_heads * n_types / (n_permutations + 1) <= alpha


@pytest.mark.parametrize(("arguments", "expected"), [((8, 6, 0.05), 960), ((3, 3, 0.1), 90), ((2, 5, 0.3), 34)])
def test_default_number_of_permutations_by_hand(arguments, expected):
    assert default_n_permutations(*arguments) == expected


def test_texts_given_as_numbers_become_text():
    assert SubsetSpec(key="section", value=101).value == "101"
    assert spec_from_mapping({"data": {"subset": {"key": "kept", "value": True}}}).data.subset.value == "True"
    assert ReportSpec(cell_types=(0, 1.5)).cell_types == ("0", "1.5")
