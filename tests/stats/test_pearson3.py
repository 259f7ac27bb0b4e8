from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, pearson3

from amici_eval.stats.permutation.exact_moments import pearson3_tail

SKEWNESS = [-3.0, -1.0, -0.3, -0.0201, -0.0199, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 0.0199, 0.0201, 0.3, 1.0, 3.0]
LEAST = np.finfo(np.float64).tiny

# integrals of the density in 60 digits (mpmath)
KNOWN = [
    (0.0, 1e-9, 0.49999999993350963),
    (0.0, -0.001, 0.5000664903801593),
    (1.5, 1e-5, 0.066807471095614),
    (1.5, -0.0199, 0.06626399506143613),
    (6.0, 1e-9, 9.865876804803488e-10),
    (6.0, -1e-5, 9.86233274203458e-10),
    (6.0, 0.001, 1.0225919683796878e-09),
    (6.0, -0.001, 9.516967803091505e-10),
    (6.0, 0.3, 6.581655329873285e-07),
    (6.0, -0.15, 2.523731338545869e-13),
    (12.0, 1e-9, 1.7764826236325408e-33),
    (12.0, 1e-5, 1.7816048015191342e-33),
    (12.0, -1e-5, 1.7713736928768526e-33),
    (12.0, 0.0199, 3.4254034549763556e-31),
    (12.0, -0.0199, 3.26840538540532e-36),
    (12.0, 0.0201, 3.5957754244232594e-31),
    (12.0, -0.0201, 3.0484120866885565e-36),
    (12.0, 0.3, 4.394267010972542e-17),
    (30.0, 2.0, 3.442477108469976e-14),
    (-3.0, -0.001, 0.9986441867462369),
]


@pytest.mark.parametrize(("standardised", "skewness", "expected"), KNOWN)
def test_the_tail_is_that_of_the_density(standardised, skewness, expected):
    assert pearson3_tail(standardised, skewness) == pytest.approx(expected, rel=1e-7, abs=0.0)


def test_the_tail_is_that_of_scipy_where_scipy_is_accurate():
    t, skew = np.meshgrid(np.linspace(-4.0, 4.0, 33), [-0.29, -0.1, -0.03, 0.03, 0.1, 0.3, 1.0, 3.0])
    np.testing.assert_allclose(pearson3_tail(t, skew), pearson3.sf(t, skew), rtol=1e-8)


def test_without_skewness_it_is_the_normal_tail():
    t = np.linspace(-38.0, 37.0, 76)
    np.testing.assert_allclose(pearson3_tail(t, 0.0), norm.sf(t), rtol=1e-12)


def test_p_falls_with_the_statistic_and_lies_above_0_and_at_most_at_1():
    t = np.concatenate([-np.geomspace(1e200, 1e-9, 400), [0.0], np.geomspace(1e-9, 1e200, 4000)])
    for skew in [*SKEWNESS, -1e-300, 1e-300, -1e3, 1e3]:
        p = pearson3_tail(t, skew)
        assert np.all((p >= LEAST) & (p <= 1.0))
        assert np.all(np.diff(p) <= 1e-14 * p[1:])


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_p_is_a_probability_whatever_the_moments(standardised, skewness):
    assert LEAST <= pearson3_tail(standardised, skewness) <= 1.0


def test_p_rises_with_skewness_in_the_far_tail_without_a_step():
    skew = np.concatenate([-np.geomspace(0.04, 1e-12, 500), np.geomspace(1e-12, 0.04, 500)])
    for t in (3.0, 6.0, 12.0):
        logarithm = np.log(pearson3_tail(t, skew))
        assert np.all(np.diff(logarithm) > -1e-7)
        # d log p / d g is about t^3 / 6
        assert np.all(np.abs(np.diff(logarithm)) < 1e-7 + t**3 / 3.0 * np.diff(skew))


@pytest.mark.parametrize("skewness", [-3.0, -1.0, -0.3])
def test_beyond_a_bounded_support_p_goes_on_without_a_step(skewness):
    end = -2.0 / skewness
    t = np.linspace(0.3 * end, 1.5 * end, 500)
    p = pearson3_tail(t, skewness)
    assert np.all(p[t > 0.6 * end] > pearson3.sf(t, skewness)[t > 0.6 * end])
    np.testing.assert_allclose(p[t < 0.6 * end], pearson3.sf(t, skewness)[t < 0.6 * end], rtol=1e-9)
    hazard = -np.diff(np.log(p))
    assert np.all(np.abs(np.diff(hazard)) < 0.05 * hazard[1:])
    np.testing.assert_allclose(hazard[t[1:] > 0.61 * end], hazard[-1], rtol=1e-8)


def test_what_is_not_finite_has_no_p():
    t, skew = [np.nan, np.inf, -np.inf, 1.0, 1.0], [0.1, 0.1, 0.1, np.nan, np.inf]
    assert np.isnan(pearson3_tail(np.array(t), np.array(skew))).all()
    assert pearson3_tail(np.zeros((2, 1)), np.zeros(3)).shape == (2, 3)
