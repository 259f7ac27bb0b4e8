"""The test keeps its level where there is nothing, and finds what is planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, kstest

from amici_eval.stats.nulls import permutation_exceedances
from amici_eval.stats.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values

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
