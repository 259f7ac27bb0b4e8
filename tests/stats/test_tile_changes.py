"""Changes of which only tiles' shares are known: the same p as from all moments, and nearly the same interval."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from amici_eval.stats.explained_variance import TileSums
from amici_eval.stats.tile_tests import ChangeTest, share_changes
from tests.stats.test_paired import compare


def make_pair(n_tiles=12, n_pairs=3, n_genes=4, seed=0, apart=0.0):
    rng = np.random.default_rng(seed)
    n_cells = rng.integers(5, 40, n_tiles)

    def moments(*shape):
        mean = rng.normal(0, 0.3, (n_tiles, *shape, n_genes))
        m2 = rng.gamma(3.0, 1.0, mean.shape) * n_cells.reshape(-1, *(1,) * (mean.ndim - 1))
        return mean, m2

    (target_mean, target_m2), before, after = moments(), moments(n_pairs), moments(n_pairs)
    sums = TileSums(
        tiles=np.arange(n_tiles),
        n_cells=n_cells,
        target_mean=target_mean,
        target_m2=target_m2 * 2,
        residual_mean=before[0],
        residual_m2=before[1] * (1 + apart),
        varies=np.ones(n_genes, dtype=bool),
    )
    return sums, replace(sums, residual_mean=after[0], residual_m2=after[1])


def shares_of(before, after):
    change = (before.residual_squares - after.residual_squares).sum(axis=2).T
    return change, before.target_squares.sum(axis=1), before.n_cells.astype(float)


def shared(*shares, **test):
    return share_changes(*shares, ChangeTest(**test))


@pytest.mark.parametrize(("seed", "apart"), [(0, 0.0), (1, 0.3), (2, 1.0)])
def test_shares_give_the_p_of_all_moments_and_nearly_their_interval(seed, apart):
    rows = make_pair(seed=seed, apart=apart)
    full = compare(rows, n_resamples=2000, label="type")
    told = shared(*shares_of(*rows), n_resamples=2000, label="type")
    np.testing.assert_allclose(told.difference, full.difference, atol=1e-12)
    np.testing.assert_array_equal(told.p_value, full.p_value)
    width = full.high - full.low
    np.testing.assert_allclose(told.high - told.low, width, rtol=0.1)
    np.testing.assert_allclose(told.low, full.low, atol=0.05 * width.max())
    np.testing.assert_allclose(told.p_equivalence, full.p_equivalence, atol=0.05)
    assert told.n_tiles == 12
    assert told.reason is None


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    n_tiles, truth, held, n_runs = 30, 0.2, 0, 300
    for run in range(n_runs):
        target = rng.gamma(5.0, 1.0, n_tiles)
        change = truth * target + rng.normal(0, 0.6, n_tiles)
        told = shared(change[None], target, np.full(n_tiles, 20.0), n_resamples=199, n_flips=19, seed=run)
        held += bool(told.low[0] <= truth <= told.high[0])
    # three standard errors of a proportion
    assert abs(held / n_runs - 0.95) < 3 * np.sqrt(0.95 * 0.05 / n_runs) + 0.01


def test_what_cannot_be_told_has_a_reason():
    change, target, cells = shares_of(*make_pair(n_tiles=4))
    few = shared(change, target, cells)
    assert few.reason == "cells in 4 tiles; at least 5 are needed to tell differences"
    np.testing.assert_allclose(few.difference, change.sum(axis=1) / target.sum())
    assert np.isnan(np.stack([few.low, few.high, few.p_value, few.p_equivalence])).all()
    flat = shared(change, np.zeros(4), cells)
    assert flat.reason == "expression does not vary; there is nothing to explain"
    assert np.isnan(flat.difference).all()
    change, target, cells = shares_of(*make_pair())
    change[1, 3] = np.nan
    some = shared(change, target, cells)
    assert np.isnan([some.difference[1], some.low[1], some.p_value[1], some.p_equivalence[1]]).all()
    assert np.isfinite([some.difference[0], some.low[0], some.p_value[0], some.p_equivalence[0]]).all()
