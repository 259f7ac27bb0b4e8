from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, false_discovery_control

from amici_eval.stats import pvalues
from amici_eval.stats.pvalues import adjust_p_values, max_t_p_values
from tests.oracles import multiplicity as oracle

seeded = settings(max_examples=100, deadline=None, derandomize=True)
some_p = st.lists(st.sampled_from([0.0, 1e-5, 0.001, 0.01, 0.02, 0.05, 0.3, 0.9, 1.0]), min_size=1, max_size=12)


@seeded
@given(p=some_p)
def test_yekutieli_is_its_definition_and_scipys(p):
    adjusted = adjust_p_values(np.array(p), method="by")
    np.testing.assert_allclose(adjusted, oracle.benjamini_yekutieli(p), rtol=1e-12)
    np.testing.assert_allclose(adjusted, false_discovery_control(p, method="by"), rtol=1e-12)


@seeded
@given(p=some_p)
def test_holm_is_its_definition_and_lies_between_p_and_bonferroni(p):
    adjusted = adjust_p_values(np.array(p), method="holm")
    np.testing.assert_allclose(adjusted, oracle.holm(p), rtol=1e-12)
    assert np.all((np.array(p) <= adjusted) & (adjusted <= np.minimum(1.0, len(p) * np.array(p))))


def test_holm_by_hand():
    np.testing.assert_allclose(
        adjust_p_values(np.array([0.04, 0.01, 0.02, 0.5]), method="holm"), [0.08, 0.04, 0.06, 0.5]
    )


@pytest.mark.parametrize("method", ["by", "holm"])
def test_undefined_tests_are_no_members_of_any_family(method):
    p = np.array([[0.01, np.nan], [0.2, 0.03]])
    adjusted = adjust_p_values(p, method=method)
    np.testing.assert_allclose(adjusted[~np.isnan(p)], adjust_p_values(p[~np.isnan(p)], method=method))
    assert np.isnan(adjusted[0, 1])
    assert np.isnan(adjust_p_values(np.full(2, np.nan), method=method)).all()


def correlated(rng, shape):
    """Statistics of which those of one type are alike, as heads that share its permutations."""
    n_types = shape[-1]
    return 0.7 * rng.standard_normal((*shape[:-2], 1, n_types)) + 0.7 * rng.standard_normal(shape)


@pytest.mark.parametrize("chunk", [1, 50, 2**20])
@pytest.mark.parametrize("seed", range(5))
def test_max_t_is_the_loop(seed, chunk, monkeypatch):
    monkeypatch.setattr(pvalues, "_CHUNK_ENTRIES", chunk)
    rng = np.random.default_rng(seed)
    # one digit: many ties
    observed = np.round(2.0 * rng.standard_normal((4, 3)), 1)
    permuted = np.round(correlated(rng, (79, 4, 3)), 1)
    observed[1, 2] = np.nan
    permuted[:, 1, 2] = np.nan
    before = observed.copy(), permuted.copy()
    found = max_t_p_values(observed, permuted)
    expected = oracle.max_t(observed.ravel().tolist(), permuted.reshape(79, -1).tolist())
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-14)
    np.testing.assert_array_equal(observed, before[0])
    np.testing.assert_array_equal(permuted, before[1])


def test_max_t_of_a_single_test_is_its_p():
    permuted = np.arange(9.0).reshape(9, 1, 1)
    np.testing.assert_array_equal(max_t_p_values(np.array([[7.0]]), permuted), [[0.3]])


def test_max_t_counts_what_is_equal_up_to_rounding():
    permuted = np.array([1.0, 2.0 - 1e-9, 0.0]).reshape(3, 1, 1)
    np.testing.assert_array_equal(max_t_p_values(np.array([[2.0]]), permuted), [[0.5]])


def test_max_t_without_a_defined_test_is_undefined():
    assert np.isnan(max_t_p_values(np.full((2, 2), np.nan), np.zeros((5, 2, 2)))).all()


def test_max_t_keeps_the_family_wise_error():
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(1000):
        together = correlated(rng, (100, 5, 4))
        rejected += bool((max_t_p_values(together[0], together[1:]) <= 0.05).any())
    # exactly 5 %: the truth is one of 100 exchangeable draws
    assert binomtest(rejected, 1000, 0.05).pvalue > 0.01


def test_stepping_down_finds_more_than_a_single_step():
    rng = np.random.default_rng(1)
    stepped, single, wrong = 0, 0, 0
    for _ in range(200):
        together = correlated(rng, (200, 5, 4))
        observed = together[0].copy()
        observed[:, :3] += 3.0
        found = max_t_p_values(observed, together[1:])
        plain = np.array(oracle.max_t_single_step(observed.ravel().tolist(), together[1:].reshape(199, -1).tolist()))
        assert np.all(found.ravel() <= plain)
        stepped += np.count_nonzero(found[:, :3] <= 0.05)
        single += np.count_nonzero(plain.reshape(5, 4)[:, :3] <= 0.05)
        wrong += bool((found[:, 3] <= 0.05).any())
    assert stepped > 1.1 * single
    assert binomtest(wrong, 200, 0.05, alternative="greater").pvalue > 0.01
