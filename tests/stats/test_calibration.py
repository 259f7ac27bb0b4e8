"""The test keeps its level where there is nothing, and finds what is planted."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy.stats import binom, binomtest, kstest

from amici_eval.stats.permutation.nulls import permutation_exceedances
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values
from tests.calibration import __main__ as suite
from tests.calibration.fields import Smooth, simulate, uniform_place
from tests.calibration.nulls import apply_nulls

N_DATA_SETS, N_CELLS, N_GENES, N_PERMUTATIONS = 1000, 40, 3, 99


def exceedances(signal, *, n_data_sets=N_DATA_SETS):
    """Counts of independent data sets: skewed expression with correlated genes, predictions that share ``signal``."""
    mixing = np.array([[1.0, 0.8, 0.2], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    counts = []
    for number in range(n_data_sets):
        rng = np.random.default_rng([1, number])
        shared = rng.normal(size=(N_CELLS, 1))
        targets = (rng.exponential(size=(N_CELLS, N_GENES)) @ mixing + signal * shared).astype(np.float32)
        predictions = (rng.exponential(size=(1, N_CELLS, N_GENES)) @ mixing + signal * shared).astype(np.float32)
        stream = PermutationStream(seed=number, cell_type="T", n_cells=N_CELLS)
        found = permutation_exceedances(predictions, targets, stream=stream, n_permutations=N_PERMUTATIONS)
        counts.append(int(found.exceedances[0]))
    return np.array(counts)


@pytest.fixture(scope="module")
def null_counts():
    return exceedances(0.0)


def test_p_is_uniform_where_prediction_and_expression_are_independent(null_counts):
    # b is uniform on 0..m under the null; spread over (b, b + 1) it is continuous and the KS test exact
    spread = np.random.default_rng(2).uniform(size=N_DATA_SETS)
    assert kstest((null_counts + spread) / (N_PERMUTATIONS + 1), "uniform").pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_type_one_error_is_alpha(null_counts, alpha):
    p = p_values(null_counts, n_permutations=N_PERMUTATIONS).p
    rejected = int(np.count_nonzero(p <= alpha))
    assert binomtest(rejected, N_DATA_SETS, alpha).pvalue > 0.01


def test_the_check_of_uniformity_can_fail():
    few = exceedances(0.35, n_data_sets=100)
    assert kstest((few + 0.5) / (N_PERMUTATIONS + 1), "uniform").pvalue < 0.01


def test_a_planted_effect_is_found():
    p = p_values(exceedances(1.5, n_data_sets=100), n_permutations=N_PERMUTATIONS).p
    assert np.mean(p <= 0.05) > 0.95


N_TISSUES = 200


@cache
def p_in_tissue(*, length, effect=0.0, n_tissues=N_TISSUES):
    """p of one head, by null, in each of several tissues of 200 cells; length of the fields in windows."""
    p = []
    for number in range(n_tissues):
        rng = np.random.default_rng([3, number])
        place = uniform_place(rng, 200)
        data = simulate(rng, place, Smooth(kernel="gaussian", length=length), n_heads=1, effect=effect)
        found = apply_nulls(data, place, length=length).p
        p.append([found["lag"][0], found["free"][0]])
    return dict(zip(("lag", "free"), np.array(p).T, strict=True))


def test_lag_holds_its_level_in_smooth_tissue():
    rejected = np.count_nonzero(p_in_tissue(length=0.1)["lag"] <= 0.05)
    assert rejected <= binom.ppf(0.999, N_TISSUES, 0.05)


def test_free_does_not_hold_its_level_in_smooth_tissue():
    rejected = np.count_nonzero(p_in_tissue(length=0.1)["free"] <= 0.05)
    # more than chance would give even at a level of .1
    assert rejected > binom.ppf(0.999, N_TISSUES, 0.1)


def test_lag_finds_a_planted_effect_in_smooth_tissue():
    rejected = np.count_nonzero(p_in_tissue(length=0.1, effect=0.3, n_tissues=50)["lag"] <= 0.05)
    assert rejected >= 45


@pytest.mark.parametrize("null", ["lag", "free"])
def test_p_is_uniform_where_cells_are_independent_of_their_neighbours(null):
    # a field so rough that no two cells have anything in common
    assert kstest(p_in_tissue(length=1e-6)[null], "uniform").pvalue > 0.01


def test_the_command_writes_every_table_and_a_page_without_gaps(tmp_path):
    parts, options = suite.parse(["--quick", "--workers", "1", "--data", "nowhere", "--results", str(tmp_path)])
    assert parts == [*suite.PARTS, "report"]
    suite.run([part for part in parts if part != "real_null"], options)
    page = (tmp_path / "validity.md").read_text()
    for text in page.split("\n## ")[1:]:
        assert ("Not measured" in text) == text.startswith("Models trained")
    for figure in ("type_one", "p_values", "few_cells", "power", "intervals"):
        assert f"(figures/{figure}.png)" in page
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 5_000
