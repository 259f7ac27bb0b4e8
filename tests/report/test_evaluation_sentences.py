"""What an evaluation found, in sentences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from amici_eval.report.evaluation_sentences import VALIDITY, VALIDITY_SHORT, WHY_THIS_ORDER, best_heads, summary_lines
from amici_eval.report.numbers import effect, span
from amici_eval.settings.evaluation import NULLS, SPATIAL_NULLS, EvaluationSpec, PermutationSpec
from tests.builders import AWKWARD_TYPES, make_evaluation


def text_of(evaluation):
    return "\n".join(summary_lines(evaluation))


@pytest.fixture(scope="module")
def inferred():
    return make_evaluation(inferred="lag")


def test_every_null_has_its_sentence():
    nulls = {*NULLS, *SPATIAL_NULLS} - {"none"}
    assert set(VALIDITY) == set(VALIDITY_SHORT) == nulls
    assert all(text.startswith(f"The {null} null ") for null, text in VALIDITY.items())


def test_summary_says_effects_then_the_spatial_then_the_free_test(inferred):
    text = text_of(inferred)
    order = [
        "Largest effect",
        "Intervals: 95 %, from 1,000 resamples of tissue tiles of width 75",
        "Beside predictors that know no head",
        "With the nearest neighbour masked",
        "In-sample",
        "On cells that the model was fitted on",
        WHY_THIS_ORDER,
        "(lag null, BH over all tests)",
        "Effective sample size",
        "Smallest effect",
        "Correlation length",
        VALIDITY["lag"],
        "For comparison with amici-st, by the free null, which is anticonservative",
        "(free null, 999 permutations, BH over all tests)",
        VALIDITY["free"],
        "Best head per type",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_summary_counts_by_each_null(inferred):
    text = text_of(inferred)
    assert inferred.n_significant != inferred.n_significant_free
    outcome = f"{inferred.n_significant} of 16 tested head x type pairs are significant at adjusted p <= 0.05"
    assert f"{outcome}, in-sample (lag" in text
    for held_out, where in (
        ((True,) * 7, ""),
        ((None,) * 7, ""),
        ((True, False) * 3 + (True,), ", in part in-sample"),
        ((None, False) * 3 + (None,), ", in part in-sample"),
    ):
        assert f"{outcome}{where} (lag" in text_of(dataclasses.replace(inferred, held_out=held_out))
    free = text_of(dataclasses.replace(inferred, spatial=None))
    assert "significant at adjusted p <= 0.05, in-sample (free null" in free
    assert f"{inferred.n_significant_free} of 17 tested head x type pairs are significant" in text
    assert "5 of 21 pairs have no test." in text
    assert "4 of 21 pairs have no test." in text


def test_summary_says_interval_gain_and_what_remains(inferred):
    text = text_of(inferred)
    head, index = np.unravel_index(np.nanargmax(inferred.expl_var), inferred.expl_var.shape)
    low, high = inferred.intervals.low[head, index], inferred.intervals.high[head, index]
    assert f"explains {effect(inferred.expl_var[head, index])} ({effect(low)} to {effect(high)}) of the" in text
    gain = inferred.trivial.gain[~np.isnan(inferred.trivial.gain)]
    assert f"{(gain > 0).sum()} of {gain.size} heads kept alone explain more than the best of them" in text
    assert f"(median gain {effect(float(np.median(gain)))})" in text
    assert "(types of neighbours, expression of neighbours, position; fitted on training cells)" in text
    assert "Cells that the model was fitted on flatter the heads" in text
    assert "flatter the heads" in text_of(dataclasses.replace(inferred, held_out=(None,) * 7))
    assert "flatter the heads" not in text_of(dataclasses.replace(inferred, held_out=(True,) * 7))
    both = inferred.expl_var > 0
    lost = (inferred.trivial.without_nearest < inferred.expl_var / 2) & both
    assert f"and {lost.sum()} of them lose more than half" in text
    inside, outside = (float(np.nanmedian(part[:, 1:])) for part in inferred.parts.expl_var)
    assert f"heads kept alone explain {effect(inside)} of expression variance, on the others {effect(outside)}" in text
    assert "(medians over 15 pairs)" in text


def test_summary_says_scale_and_power_in_units_of_the_data(inferred):
    text, found = text_of(inferred), inferred.spatial
    assert f"Effective sample size: {span(found.ess)} (median " in text
    length = "Correlation length of expression, in the unit of the coordinates: "
    assert f"{length}{span(found.correlation_length)}; the null reaches 400 to 405." in text
    assert f"median {effect(float(np.nanmedian(found.detectable)))}." in text


def test_the_table_of_best_heads_is_marked_by_the_null_that_decides(inferred):
    # head 2 of the third type is the best by far, and has a p under the free null alone
    values = inferred.expl_var.copy()
    values[2, 2] = 0.9
    lines = summary_lines(dataclasses.replace(inferred, expl_var=values))
    start = next(number for number, line in enumerate(lines) if line.startswith("cell type"))
    assert lines[start - 1].endswith("* adjusted p <= 0.05, lag null, in-sample):")
    assert lines[start].split("  ")[0] == "cell type"
    for name in ("interval", "gain", "held out", "ESS"):
        assert name in lines[start]
    row = next(line for line in lines if line.startswith("CD8+_T_Cells"))
    assert row.endswith("undefined")
    assert np.isfinite(inferred.p_value_adj[2, 2])
    assert max(map(len, lines[start : start + 7])) <= 130


def test_without_what_was_not_computed_nothing_is_said_of_it():
    text = text_of(make_evaluation())
    for words in ("Intervals", "predictors that know", "nearest neighbour masked", "On cells that", "lag null", "ESS"):
        assert words not in text


@pytest.mark.parametrize("null", ["tile", "sample", "torus"])
def test_the_sentence_is_of_the_null_that_was_used(null):
    text = text_of(make_evaluation(inferred=null))
    assert VALIDITY[null] in text
    assert VALIDITY["lag"] not in text
    assert f"({null} null, BH over all tests)" in text


def test_it_is_said_where_no_correlation_length_was_found(inferred):
    lengths = inferred.spatial.correlation_length.copy()
    lengths[[0, 2]] = np.nan
    for values, words in (
        (lengths, f": {span(lengths)}; none found in 2 of 6 types; the null reaches"),
        (np.full(7, np.nan), ": none found; the null reaches"),
    ):
        found = dataclasses.replace(inferred.spatial, correlation_length=values)
        assert f"in the unit of the coordinates{words}" in text_of(dataclasses.replace(inferred, spatial=found))


@pytest.mark.parametrize(
    ("adjustment", "n_shifts", "said"),
    [
        ("bh", 99, None),
        ("bh", 9, "With 9 shifts (permutation.n_shifts) no torus p-value can be below 0.1: nothing can be significant"),
        ("maxt", 99, "no torus p-value can be below 0.01, nor below 0.16 once adjusted: nothing can be significant"),
        ("by", 59, "no torus p-value can be below 0.017, nor below 0.056 once adjusted"),
    ],
)
def test_where_too_little_was_drawn_for_any_test_to_be_significant_that_is_said(adjustment, n_shifts, said):
    evaluation = make_evaluation(inferred="torus")
    test = PermutationSpec(spatial_null="torus", n_shifts=n_shifts, adjustment=adjustment)
    found = dataclasses.replace(evaluation.spatial, method=("monte_carlo",) * 6 + ("",))
    text = text_of(dataclasses.replace(evaluation, spec=EvaluationSpec(permutation=test), spatial=found))
    assert (said in text) if said else ("no torus p-value can be below" not in text)


def test_under_other_nulls_it_is_said_what_comes_from_the_lag_null():
    text = text_of(make_evaluation(inferred="tile"))
    assert "Effective sample size (by the lag null): " in text
    assert "; tiles are 400 to 405 wide." in text
    assert "the null reaches" not in text_of(make_evaluation(inferred="torus"))


@pytest.mark.parametrize(
    ("sampling", "n_permutations", "words"),
    [
        (
            "sequential",
            [40, 900],
            "40 to 900 permutations at most, stopped once enough exceeded, in 2 types",
        ),
        ("gpd", [999, 999], "999 permutations with a fitted tail in 2 types"),
        ("moments", [0, 0], "exact moments of all permutations in 2 types"),
    ],
)
def test_summary_says_how_free_p_values_came_about(sampling, n_permutations, words):
    evaluation = dataclasses.replace(
        make_evaluation(2, ["A", "B"], with_undefined=False, n_permutations=9),
        sampling=(sampling,) * 2,
        n_permutations_by_type=np.array(n_permutations),
    )
    assert f"(free null, {words}, BH over all tests)" in text_of(evaluation)
    # a tail and moments reach below one in the number of permutations
    assert "nothing can be significant" not in text_of(evaluation)


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
    text = text_of(evaluation)
    assert (
        f"(free null, 999 permutations in 1 type and {low:,} to {high:,} permutations as cyclic shifts of one random "
        "order in 2 types, BH over all tests)" in text
    )
    assert "(free null, 999 permutations, BH over all tests)" in text_of(make_evaluation())


def test_summary_counts_cyclic_permutations_before_it_says_too_few():
    one = make_evaluation(1, ["A"], n_permutations=9, with_undefined=False, sampling=("cyclic",))
    assert one.n_cells[0] > 20
    assert "nothing can be significant" not in text_of(one)


def test_best_heads_are_those_of_the_evaluation():
    evaluation = make_evaluation()
    best = best_heads(evaluation)
    assert best["ct_name"].tolist() == sorted(AWKWARD_TYPES)[:-1]
    by_type = {name: evaluation.expl_var[:, evaluation.type_index(name)] for name in best["ct_name"]}
    assert best["head"].tolist() == [int(np.nanargmax(values)) for values in by_type.values()]


def test_summary_warns_of_p_values_that_mean_little():
    few = text_of(make_evaluation(n_permutations=9))
    assert "With 9 permutations no p-value can be below 0.1: nothing can be significant; draw more." in few
    assert "nothing can be significant" not in text_of(make_evaluation(n_permutations=19))
    spatial = text_of(make_evaluation(inferred="lag", n_permutations=9))
    assert "With 9 permutations no free p-value can be below 0.1: nothing can be significant; draw more." in spatial


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
    lines += summary_lines(make_evaluation(2, ["a\x1b[31m\nb", "z", "y"], inferred="lag"))
    assert not any(character in line for line in lines for character in "\n\x1b")
