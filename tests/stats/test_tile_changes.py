"""Changes of which only tiles' shares are known: the same p as from all moments, and nearly the same interval."""

from __future__ import annotations

import numpy as np
import pytest

from amici_eval.stats.tiles.paired import PairedRows, paired_differences, share_changes, squares_about


def make_rows(n_tiles=12, n_pairs=3, n_genes=4, seed=0, apart=0.0):
    rng = np.random.default_rng(seed)
    n_cells = rng.integers(5, 40, n_tiles)

    def moments(*shape):
        mean = rng.normal(0, 0.3, (n_tiles, *shape, n_genes))
        m2 = rng.gamma(3.0, 1.0, mean.shape) * n_cells.reshape(-1, *(1,) * (mean.ndim - 1))
        return mean, m2

    (target_mean, target_m2), (before_mean, before_m2), (after_mean, after_m2) = (
        moments(),
        moments(n_pairs),
        moments(n_pairs),
    )
    return PairedRows(
        tiles=np.arange(n_tiles),
        n_cells=n_cells,
        target_mean=target_mean,
        target_m2=target_m2 * 2,
        before_mean=before_mean,
        before_m2=before_m2 * (1 + apart),
        after_mean=after_mean,
        after_m2=after_m2,
        varies=np.ones(n_genes, dtype=bool),
    )


def shares_of(rows):
    cells = rows.n_cells.astype(float)
    before, after = (
        squares_about(cells, mean, m2).sum(axis=2).T
        for mean, m2 in ((rows.before_mean, rows.before_m2), (rows.after_mean, rows.after_m2))
    )
    return before - after, squares_about(cells, rows.target_mean, rows.target_m2).sum(axis=1), cells


@pytest.mark.parametrize(("seed", "apart"), [(0, 0.0), (1, 0.3), (2, 1.0)])
def test_shares_give_the_p_of_all_moments_and_nearly_their_interval(seed, apart):
    rows = make_rows(seed=seed, apart=apart)
    full = paired_differences(rows, n_resamples=2000, label="type")
    told = share_changes(*shares_of(rows), n_resamples=2000, label="type")
    np.testing.assert_allclose(told.change, full.difference, atol=1e-12)
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
        told = share_changes(change[None], target, np.full(n_tiles, 20.0), n_resamples=199, n_flips=19, seed=run)
        held += bool(told.low[0] <= truth <= told.high[0])
    # three standard errors of a proportion
    assert abs(held / n_runs - 0.95) < 3 * np.sqrt(0.95 * 0.05 / n_runs) + 0.01


def test_what_cannot_be_told_has_a_reason():
    change, target, cells = shares_of(make_rows(n_tiles=4))
    few = share_changes(change, target, cells)
    assert few.reason == "cells in 4 tiles; at least 5 are needed to tell differences"
    np.testing.assert_allclose(few.change, change.sum(axis=1) / target.sum())
    assert np.isnan(np.stack([few.low, few.high, few.p_value, few.p_equivalence])).all()
    flat = share_changes(change, np.zeros(4), cells)
    assert flat.reason == "expression does not vary; there is nothing to explain"
    assert np.isnan(flat.change).all()
    change, target, cells = shares_of(make_rows())
    change[1, 3] = np.nan
    some = share_changes(change, target, cells)
    assert np.isnan([some.change[1], some.low[1], some.p_value[1], some.p_equivalence[1]]).all()
    assert np.isfinite([some.change[0], some.low[0], some.p_value[0], some.p_equivalence[0]]).all()
    with pytest.raises(ValueError, match=r"target \(11,\) and n_cells \(12,\) must have the 12 tiles of change"):
        share_changes(change, target[1:], cells)
