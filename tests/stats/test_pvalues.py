from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, false_discovery_control

from amici_eval.stats.pvalues import adjust_p_values, p_values
from tests.oracles import reference

seeded = settings(max_examples=100, deadline=None, derandomize=True)


def test_add_one_counts_the_truth_among_the_permutations():
    found = p_values(np.array([[0, 1], [48, 99]]), n_permutations=99)
    np.testing.assert_array_equal(found.p, [[0.01, 0.02], [0.49, 1.0]])


def test_reference_convention_is_the_plain_share():
    found = p_values(np.array([0, 1, 49, 98]), n_permutations=98, convention="reference")
    np.testing.assert_array_equal(found.p, [0.0, 1 / 98, 0.5, 1.0])


def test_interval_does_not_depend_on_the_convention():
    counts = np.array([0, 3, 50, 98, 99])
    one, other = (p_values(counts, n_permutations=99, convention=c) for c in ("add_one", "reference"))
    np.testing.assert_array_equal(one.ci_low, other.ci_low)
    np.testing.assert_array_equal(one.ci_high, other.ci_high)


@pytest.mark.parametrize("n_permutations", [1, 2, 99, 960])
def test_interval_is_clopper_pearson(n_permutations):
    counts = np.unique(np.linspace(0, n_permutations, 12).astype(np.int64))
    found = p_values(counts, n_permutations=n_permutations)
    for count, low, high in zip(counts.tolist(), found.ci_low, found.ci_high, strict=True):
        exact = binomtest(count, n_permutations).proportion_ci(confidence_level=0.95, method="exact")
        assert low == pytest.approx(exact.low, abs=1e-12)
        assert high == pytest.approx(exact.high, abs=1e-12)


def test_any_shape_comes_back():
    for shape in ((), (0,), (2, 0), (2, 3, 4)):
        found = p_values(np.zeros(shape, dtype=np.int64), n_permutations=9)
        assert found.p.shape == found.ci_low.shape == found.ci_high.shape == shape


@seeded
@given(m=st.integers(1, 10**6), data=st.data())
def test_p_lies_in_its_range_and_rises_with_the_count(m, data):
    low, high = sorted(data.draw(st.tuples(st.integers(0, m), st.integers(0, m))))
    assume(low < high)
    found = p_values(np.array([low, high]), n_permutations=m)
    assert 0.0 < found.p[0] < found.p[1] <= 1.0
    assert np.all((found.ci_low >= 0.0) & (found.ci_low < found.ci_high) & (found.ci_high <= 1.0))
    assert found.ci_low[0] <= found.ci_low[1]
    assert found.ci_high[0] <= found.ci_high[1]
    share = np.array([low, high]) / m
    assert np.all((found.ci_low <= share) & (share <= found.ci_high))


@pytest.mark.parametrize("counts", [[-1], [3, 11], [0, -5, 2]])
def test_counts_out_of_range_are_refused(counts):
    with pytest.raises(ValueError, match=r"^exceedances must lie in \[0, n_permutations=10\]$"):
        p_values(np.array(counts), n_permutations=10)


@seeded
@given(
    p=st.lists(st.sampled_from([0.0, 1e-5, 0.001, 0.01, 0.02, 0.05, 0.3, 0.30001, 0.9, 1.0]), min_size=1, max_size=12)
)
def test_adjustment_equals_the_definition_and_scipy(p):
    adjusted = adjust_p_values(np.array(p))
    np.testing.assert_allclose(adjusted, reference.benjamini_hochberg(p), rtol=1e-12)
    np.testing.assert_allclose(adjusted, false_discovery_control(p), rtol=1e-12)
    assert np.all(adjusted >= p)


def test_adjustment_by_hand():
    np.testing.assert_allclose(adjust_p_values(np.array([0.04, 0.01, 0.02, 0.5])), [0.16 / 3, 0.04, 0.04, 0.5])


def test_undefined_tests_are_no_members_of_the_family():
    p = np.array([[0.01, np.nan, 0.04], [np.nan, np.nan, 0.03]])
    before = p.copy()
    adjusted = adjust_p_values(p)
    np.testing.assert_array_equal(p, before)
    np.testing.assert_allclose(adjusted, [[0.03, np.nan, 0.04], [np.nan, np.nan, 0.04]])
    assert np.isnan(adjust_p_values(np.full((2, 2), np.nan))).all()
    assert adjust_p_values(np.empty((3, 0))).shape == (3, 0)
