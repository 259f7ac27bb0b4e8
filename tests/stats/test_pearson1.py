from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, norm

from amici_eval.stats.pearson1 import pearson_tail
from amici_eval.stats.pearson3 import pearson3_tail


def moments_of(a, b):
    mean, variance, skewness, kurtosis = (float(value) for value in beta.stats(a, b, moments="mvsk"))
    return mean, np.sqrt(variance), skewness, kurtosis


@pytest.mark.parametrize(("a", "b"), [(2.0, 5.0), (5.0, 2.0), (30.0, 40.0), (3.0, 3.0), (400.0, 50.0)])
def test_a_beta_law_is_recovered_from_its_moments(a, b):
    mean, deviation, skewness, kurtosis = moments_of(a, b)
    x = beta.ppf([0.001, 0.2, 0.5, 0.9, 0.95], a, b)
    x = x[x < mean + 0.8 * (1 - mean)]
    found = pearson_tail((x - mean) / deviation, np.full(len(x), skewness), np.full(len(x), kurtosis))
    np.testing.assert_allclose(found, beta.sf(x, a, b), rtol=1e-6)


def test_near_the_end_of_the_support_p_goes_on_falling_and_is_never_below_the_law_or_zero():
    mean, deviation, skewness, kurtosis = moments_of(4.0, 6.0)
    x = np.linspace(mean, 1.5, 200)
    p = pearson_tail((x - mean) / deviation, np.full(200, skewness), np.full(200, kurtosis))
    assert (np.diff(p) < 0).all()
    assert (p > 0).all()
    assert (p >= beta.sf(x, 4.0, 6.0) * (1 - 1e-9)).all()


@pytest.mark.parametrize("kurtosis", [np.nan, 0.2, 5.0])
def test_heavier_or_unknown_tails_are_those_of_pearson_iii(kurtosis):
    t = np.array([-1.0, 0.0, 2.0, 6.0])
    skewness = np.full(4, 0.3)
    np.testing.assert_array_equal(pearson_tail(t, skewness, np.full(4, kurtosis)), pearson3_tail(t, skewness))


def test_with_the_moments_of_the_normal_law_it_is_the_normal_law():
    t = np.array([-2.0, 0.0, 3.0])
    found = pearson_tail(t, np.full(3, 1e-9), np.full(3, -1e-5))
    np.testing.assert_allclose(found, norm.sf(t), rtol=1e-3)


def test_what_is_not_finite_has_no_p():
    assert np.isnan(pearson_tail(np.array([np.nan, 1.0]), np.array([0.1, np.nan]), np.array([-0.1, -0.1]))).all()
