from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from amici_eval.stats import pvalues
from amici_eval.stats.pvalues import tail_p_values

NULLS = {
    "exponential": stats.expon(),
    "normal": stats.norm(),
    "skewed": stats.gamma(2),
    "bounded": stats.beta(5, 5),
    "bounded and skewed": stats.beta(3, 5),
}


def fits_of(null, p, *, n_permutations, n_data_sets, seed=1):
    rng = np.random.default_rng(seed)
    observed = float(null.isf(p))
    return [tail_p_values(observed, null.rvs(n_permutations, random_state=rng)) for _ in range(n_data_sets)]


@pytest.mark.parametrize("name", NULLS)
def test_a_small_p_is_found_within_a_factor_of_two(name):
    found = fits_of(NULLS[name], 1e-4, n_permutations=2000, n_data_sets=100)
    assert np.mean([fit.fits for fit in found]) > 0.95
    assert 0.5e-4 < np.median([fit.p for fit in found]) < 2e-4


def test_counting_could_not_have_found_it():
    null = NULLS["normal"]
    rng = np.random.default_rng(1)
    observed = null.isf(1e-4)
    counted = [(np.count_nonzero(rng.standard_normal(2000) >= observed) + 1) / 2001 for _ in range(100)]
    assert np.median(counted) > 4e-4


def test_a_distribution_that_ends_abruptly_gets_no_smaller_p_than_it_should():
    found = fits_of(stats.uniform(), 1e-4, n_permutations=2000, n_data_sets=15)
    assert np.min([fit.p for fit in found]) > 1e-4


def test_the_fit_is_scipys_where_nothing_constrains_it(monkeypatch):
    monkeypatch.setattr(pvalues, "_SHAPE_SD", 1e6)
    for shape in (-0.2, 0.0, 0.3):
        values = stats.genpareto(shape, scale=3.0).rvs(3000, random_state=5)
        found = tail_p_values(float(np.sort(values)[-9]) + 1e-6, values)
        excesses = np.sort(values)[-found.n_excesses :] - found.threshold
        expected, _, scale = stats.genpareto.fit(excesses, floc=0.0)
        assert found.shape == pytest.approx(expected, abs=2e-3)
        assert found.scale == pytest.approx(scale, rel=2e-3)
        beyond = stats.genpareto.sf(np.sort(values)[-9] + 1e-6 - found.threshold, found.shape, scale=found.scale)
        assert found.p == pytest.approx(found.n_excesses / 3000 * beyond, rel=1e-9)


def test_anderson_darling_is_its_integral():
    excesses = np.sort(stats.genpareto(0.2).rvs(60, random_state=0))[::-1]
    u = np.linspace(0.0, 1.0, 2_000_001)[1:-1]
    below = np.searchsorted(np.sort(stats.genpareto.cdf(excesses, 0.1, scale=2.0)), u, side="right") / 60
    integral = 60 * np.mean((below - u) ** 2 / (u * (1.0 - u)))
    assert pvalues._anderson_darling(excesses, 0.05, 0.1) == pytest.approx(integral, rel=1e-3)


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.3])
def test_a_pareto_tail_is_rarely_rejected(shape):
    rng = np.random.default_rng(2)
    null = stats.genpareto(shape)
    found = [tail_p_values(float(null.isf(1e-4)), null.rvs(1200, random_state=rng)) for _ in range(100)]
    assert np.mean([fit.n_excesses == 100 for fit in found]) > 0.8


def test_excesses_that_are_no_tail_are_left_out():
    rng = np.random.default_rng(3)
    # some 60 statistics far above the others: the largest 160 have two humps
    values = np.concatenate([rng.normal(size=1940), rng.exponential(size=60) + 8.0])
    found = tail_p_values(14.5, values)
    assert found.fits
    assert found.n_excesses <= 66
    assert found.threshold > 7.0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), distance=st.floats(0.0, 1e6), kind=st.sampled_from(["normal", "uniform", "ties"]))
def test_p_is_a_probability_above_zero_however_far_the_observation(seed, distance, kind):
    rng = np.random.default_rng(seed)
    values = {"normal": rng.normal(size=600), "uniform": rng.random(600), "ties": rng.integers(0, 9, 600) / 1.0}[kind]
    found = tail_p_values(float(values.max()) + distance, values)
    assert 0.0 < found.p <= 1.0
    assert found.fits == (found.reason == "")
    assert np.isfinite([found.shape, found.scale, found.threshold]).all() == found.fits
    if found.fits and found.shape < 0.0:
        assert found.threshold - found.scale / found.shape > values.max() + distance


def test_a_larger_observation_has_a_smaller_p():
    values = np.random.default_rng(0).normal(size=2000)
    p = [tail_p_values(observed, values).p for observed in np.linspace(np.sort(values)[-9], 8.0, 12)]
    assert np.all(np.diff(p) < 0.0)
    assert p[-1] < 1e-6


def test_order_unit_and_offset_change_nothing():
    rng = np.random.default_rng(4)
    values = rng.normal(size=1000)
    before = values.copy()
    one = tail_p_values(4.0, values)
    np.testing.assert_array_equal(values, before)
    assert tail_p_values(4.0, rng.permutation(values)) == one
    other = tail_p_values(4.0 * 1e8 + 3e8, values * 1e8 + 3e8)
    assert other.p == pytest.approx(one.p, rel=1e-4)
    assert other.scale == pytest.approx(one.scale * 1e8, rel=1e-4)


def test_enough_exceedances_are_counted():
    values = np.arange(1000.0)
    found = tail_p_values(990.0, values)
    assert found.p == 11 / 1001
    assert (found.fits, found.reason, found.n_excesses) == (False, "10 exceedances: counting is as good", 0)
    assert tail_p_values(990.5, values).reason != found.reason


def test_few_permutations_are_counted():
    found = tail_p_values(5.0, np.random.default_rng(0).normal(size=499))
    assert found.p == 1 / 500
    assert found.reason == "499 permutations; at least 500 are needed to fit a tail"
    assert np.isnan([found.shape, found.scale, found.threshold]).all()


def test_a_tail_that_nothing_describes_is_counted():
    found = tail_p_values(3.0, np.random.default_rng(0).integers(0, 3, size=1000) / 1.0)
    assert found.p == 1 / 1001
    assert found.reason == "no generalised Pareto tail fits the largest of 1000 statistics"
