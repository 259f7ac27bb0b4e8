"""Differences between two models on the same cells."""

from __future__ import annotations

import numpy as np

from amici_eval.stats.tile_tests import ChangeTest, paired_differences, verdict_of
from tests.builders import make_tile_sums


def pair_of(tiles, expression, before, after):
    """Return the sums of two models over the same cells; residuals have shape (cells, pairs, genes)."""
    return make_tile_sums(tiles, expression, before), make_tile_sums(tiles, expression, after)


def compare(pair, *, by_gene=True, **test):
    return paired_differences(*pair, ChangeTest(**test), by_gene=by_gene)


def made(rng, *, n_cells=200, n_tiles=7, n_pairs=2, n_genes=4, better=0.0):
    tiles = rng.integers(0, n_tiles, n_cells) * 3
    expression = rng.normal(size=(n_cells, n_genes))
    before = rng.normal(size=(n_cells, n_pairs, n_genes)) + 0.4 * expression[:, None]
    after = rng.normal(size=(n_cells, n_pairs, n_genes)) * (1 - better) + 0.4 * expression[:, None]
    return tiles, expression, before, after


def explained(expression, residual):
    return 1 - np.var(residual, axis=0).sum(axis=-1) / np.var(expression, axis=0).sum()


def test_the_difference_is_that_of_explained_variance():
    cells = made(np.random.default_rng(0))
    found = compare(pair_of(*cells), n_resamples=50, n_flips=49)
    _, expression, before, after = cells
    np.testing.assert_allclose(found.difference, explained(expression, after) - explained(expression, before))
    per_gene = (np.var(before, axis=0) - np.var(after, axis=0)) / np.var(expression, axis=0)
    np.testing.assert_allclose(found.difference_gene, per_gene)
    assert (found.low < found.difference).all()
    assert (found.difference < found.high).all()


def test_drawn_flips_agree_with_all_of_them():
    rows = pair_of(*made(np.random.default_rng(2), n_tiles=13, better=0.02))
    every, drawn = (compare(rows, n_flips=n, n_resamples=50).p_value_gene for n in (4095, 4094))
    assert not np.array_equal(every, drawn)
    np.testing.assert_allclose(drawn, every, atol=0.035)


def test_the_other_way_round_everything_changes_sign():
    rows = pair_of(*made(np.random.default_rng(3), n_tiles=20, better=0.05))
    one, other = compare(rows), compare(rows[::-1])
    np.testing.assert_allclose(one.difference, -other.difference)
    np.testing.assert_allclose([one.low, one.high], [-other.high, -other.low])
    for name in ("p_value", "p_value_gene", "p_equivalence"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name))


def test_models_that_are_the_same_are_the_same():
    tiles, expression, before, _ = made(np.random.default_rng(4), n_tiles=9)
    found = compare(pair_of(tiles, expression, before, before))
    np.testing.assert_array_equal(found.difference, 0.0)
    np.testing.assert_array_equal(found.p_value, 1.0)
    assert (found.p_equivalence < 0.01).all()
    assert (found.p_not_worse < 0.01).all()


def test_in_few_tiles_only_the_difference_is_known():
    found = compare(pair_of(*made(np.random.default_rng(6), n_tiles=4)))
    assert found.reason == "cells in 4 tiles; at least 5 are needed to tell differences"
    assert np.isfinite(found.difference).all()
    for name in ("low", "high", "p_value", "p_equivalence", "p_not_worse", "p_value_gene"):
        assert np.isnan(getattr(found, name)).all()


def test_genes_that_do_not_vary_have_no_difference_and_nothing_can_be_said_without_variance():
    tiles, expression, before, after = made(np.random.default_rng(7))
    expression[:, 1] = 2.0
    found = compare(pair_of(tiles, expression, before, after))
    assert np.isnan(found.difference_gene[:, 1]).all()
    assert np.isnan(found.p_value_gene[:, 1]).all()
    assert np.isfinite(np.delete(found.p_value_gene, 1, axis=1)).all()
    nothing = compare(pair_of(tiles, np.full_like(expression, 2.0), before, after))
    assert np.isnan(nothing.difference).all()
    assert nothing.reason == "expression does not vary; there is nothing to explain"


def test_verdicts():
    nan = np.nan
    verdict = verdict_of(
        low=np.array([0.1, -0.3, 0.001, -0.1, -0.001, nan, -0.1]),
        high=np.array([0.3, -0.1, 0.003, 0.5, 0.001, nan, 0.5]),
        p_adjusted=np.array([0.01, 0.01, 0.01, 0.5, 0.5, nan, 0.01]),
        p_equivalence=np.array([0.9, 0.9, 0.01, 0.9, 0.01, nan, 0.9]),
        alpha=0.05,
    )
    assert verdict.tolist() == ["better", "worse", "same", "undecided", "same", "undecided", "undecided"]
