"""Differences between two models hold their levels in smooth tissue and are those of a literal loop over cells."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.stats import binomtest

from amici_eval.stats.tile_tests import ChangeTest, pooled_difference
from tests.oracles import paired as oracle
from tests.oracles.tiles import drawn_tiles, seed_of_one_tile, words
from tests.stats.test_paired import compare, pair_of

N_TISSUES = 300
GRID = 40
POINTS = (np.arange(GRID) + 0.5) / GRID


def made(seed=0, *, n_cells=60, n_tiles=7, n_pairs=2, n_genes=3):
    """Cells whose expression and errors differ between tiles, which hold unlike numbers of cells."""
    rng = np.random.default_rng(seed)
    tiles = np.minimum(rng.geometric(0.25, n_cells) - 1, n_tiles - 1)
    tiles[:n_tiles] = np.arange(n_tiles)
    shared = rng.normal(size=(n_tiles, 1, n_genes))[tiles]
    expression = shared[:, 0] + rng.normal(size=(n_cells, n_genes))
    before, after = 0.5 * shared + rng.normal(size=(2, n_cells, n_pairs, n_genes))
    return 3 * tiles + 1, expression, before, 0.9 * after


def fields(rng, n, width, own):
    """Smooth Gaussian fields of kernel ``exp(-d^2 / (2 width^2))`` at some points of a grid, shape (points, n)."""
    values, vectors = np.linalg.eigh(np.exp(-np.square(POINTS[:, None] - POINTS) / (2 * width**2)))
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    return (root @ rng.normal(size=(n, GRID, GRID)) @ root.T).reshape(n, -1)[:, own].T


def tissue(seed, *, n_side, worse=0.0, width=0.02, error=0.49):
    """Two models with smooth errors; explained variance falls by ``worse``. Without sides, each cell is a tile."""
    rng = np.random.default_rng([17, seed])
    own = rng.choice(GRID * GRID, 400, replace=False)
    expression, shared, first, second = np.split(fields(rng, 12, width, own), 4, axis=1)
    column, row = own // GRID, own % GRID
    tiles = np.arange(400) if n_side is None else column * n_side // GRID * n_side + row * n_side // GRID
    before, after = shared + np.sqrt(error) * first, shared + np.sqrt(error + worse) * second
    return pair_of(tiles, expression, before[:, None], after[:, None])


@cache
def exchangeable(n_side):
    return [
        compare(tissue(i, n_side=n_side), n_resamples=199, n_flips=499, by_gene=False, seed=i) for i in range(N_TISSUES)
    ]


@cache
def at_the_margin(n_side):
    return [
        compare(
            tissue(i, n_side=n_side, worse=0.05, error=0.09),
            n_resamples=199,
            n_flips=19,
            margin=0.05,
            by_gene=False,
            seed=i,
        )
        for i in range(N_TISSUES)
    ]


@pytest.mark.parametrize("n_side", [3, 6])
@pytest.mark.parametrize("level", [0.05, 0.25, 0.5])
def test_p_of_exchangeable_models_is_as_often_small_as_it_says(n_side, level):
    hits = sum(one.p_value[0] <= level for one in exchangeable(n_side))
    assert binomtest(hits, N_TISSUES, level).pvalue > 0.001


@pytest.mark.parametrize("n_side", [3, 6])
def test_intervals_hold_no_difference_and_a_true_one_about_as_often_as_they_say(n_side):
    for found, truth in ((exchangeable(n_side), 0.0), (at_the_margin(n_side), -0.05)):
        hits = sum(one.low[0] <= truth <= one.high[0] for one in found)
        # 36 tiles of eleven cells: .94 of 1200 other tissues, somewhat less than they say
        assert binomtest(hits, N_TISSUES, 0.94, alternative="less").pvalue > 0.001
        assert binomtest(hits, N_TISSUES, 0.95, alternative="greater").pvalue > 0.001


@pytest.mark.parametrize("n_side", [3, 6])
def test_models_apart_by_the_margin_are_seldom_called_equivalent_or_not_worse(n_side):
    found = at_the_margin(n_side)
    for name in ("p_equivalence", "p_not_worse"):
        hits = sum(getattr(one, name)[0] <= 0.05 for one in found)
        assert binomtest(hits, N_TISSUES, 0.05, alternative="greater").pvalue > 0.001
    assert sum(one.p_not_worse[0] <= 0.05 for one in found) >= 5, "so close to the level that more is an error"


def test_what_is_worse_is_found_worse():
    found = [compare(tissue(i, n_side=5, worse=0.6), n_resamples=199, by_gene=False) for i in range(30)]
    assert sum(one.p_value[0] <= 0.05 and one.high[0] < 0 for one in found) >= 24


def test_cells_taken_for_replicates_find_differences_where_there_are_none():
    hits = sum(
        compare(tissue(i, n_side=None, width=0.06), n_resamples=1, n_flips=199, by_gene=False, seed=i).p_value[0]
        <= 0.05
        for i in range(60)
    )
    assert binomtest(hits, 60, 0.05, alternative="greater").pvalue < 1e-6


@pytest.mark.parametrize("margin", [0.02, 0.6])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_and_equivalence_equal_those_of_cells_put_together_anew(confidence, margin):
    cells = made()
    found = compare(pair_of(*cells), confidence=confidence, margin=margin, n_resamples=39, n_flips=9, seed=3, label="T")
    drawn = drawn_tiles(words("\0bootstrap", seed=3, label="T", n=39 * 7), 7)
    for pair in range(2):
        assert_same(found, pair, oracle.interval([of_pair(cells, pair)], drawn, confidence=confidence, margin=margin))


def test_types_in_different_tiles_are_put_together_tile_by_tile():
    types = [made(1, n_pairs=1), made(2, n_cells=25, n_tiles=4, n_pairs=1, n_genes=5)]
    # the second type lives in tile 2, where the first has no cell, and in three others
    types[1][0][types[1][0] == 1] = 2
    found = pooled_difference([pair_of(*cells) for cells in types], ChangeTest(margin=0.4, n_resamples=39, seed=5))
    one_pair = [of_pair(cells, 0) for cells in types]
    drawn = drawn_tiles(words("\0bootstrap", seed=5, label="", n=39 * 8), 8)
    assert_same(found, 0, oracle.interval(one_pair, drawn, confidence=0.95, margin=0.4))
    less, spread = oracle.changes(one_pair, np.unique(np.concatenate([cells[0] for cells in types])).tolist())
    assert found.difference[0] == pytest.approx(sum(less) / sum(spread))
    assert found.p_value[0] == oracle.flipped_p(less)
    assert found.n_tiles == 8


@pytest.mark.parametrize("n_flips", [63, 62])
def test_p_equals_a_literal_loop_over_all_sign_patterns_or_over_those_drawn(n_flips):
    cells = made(4)
    found = compare(pair_of(*cells), n_resamples=1, n_flips=n_flips, seed=7, label="T")
    signs = None
    if n_flips < 63:
        bits = [1 - 2 * (word >> 63) for word in words("\0paired flips", seed=7, label="T", n=n_flips * 7)]
        signs = [bits[start : start + 7] for start in range(0, len(bits), 7)]
    tiles = np.unique(cells[0]).tolist()
    for pair in range(2):
        own = of_pair(cells, pair)
        assert found.p_value[pair] == pytest.approx(oracle.flipped_p(oracle.changes([own], tiles)[0], signs))
        for gene in range(3):
            alone = {name: getattr(own, name)[:, [gene]] for name in ("expression", "before", "after")}
            less = oracle.changes([replace(own, **alone)], tiles)[0]
            assert found.p_value_gene[pair, gene] == pytest.approx(oracle.flipped_p(less, signs))


def test_pairs_beside_a_pair_do_not_matter():
    pair = pair_of(*made(5))
    plain = compare(pair, n_resamples=99, n_flips=49)
    found = compare([sums.of_models([1]) for sums in pair], n_resamples=99, n_flips=49)
    for name in ("difference", "low", "high", "p_value", "p_equivalence", "p_not_worse", "p_value_gene"):
        np.testing.assert_allclose(getattr(found, name)[0], getattr(plain, name)[1], rtol=1e-9, atol=1e-12)


def test_draws_depend_on_seed_and_label_and_on_no_global_state():
    rows = pair_of(*made(7, n_tiles=12))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    plain, again, seed, label = (
        compare(rows, n_resamples=99, n_flips=499, **change) for change in ({}, {}, {"seed": 1}, {"label": "U"})
    )
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    for name in ("low", "p_value_gene"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plain, name))
        assert not np.array_equal(getattr(seed, name), getattr(plain, name))
        assert not np.array_equal(getattr(label, name), getattr(plain, name))


def test_a_model_whose_numbers_are_not_finite_has_no_p_and_the_others_keep_theirs():
    before, after = pair_of(*made(8))
    plain = compare((before, after), n_resamples=49)
    broken = before.residual_mean.copy()
    broken[2, 0] = np.nan
    found = compare((replace(before, residual_mean=broken), after), n_resamples=49)
    for name in ("difference", "low", "high", "p_value", "p_equivalence", "p_not_worse", "p_value_gene"):
        assert np.isnan(getattr(found, name)[0]).all()
        np.testing.assert_array_equal(getattr(found, name)[1], getattr(plain, name)[1])


def test_resamples_of_one_cell_alone_give_a_reason():
    rows = pair_of(*made(9, n_cells=5, n_tiles=5))
    seed = seed_of_one_tile("")
    found = compare(rows, n_resamples=1, seed=seed)
    assert found.reason == "expression varies in none of 1 resamples of 5 tiles"
    assert np.isfinite([found.difference, *found.difference_gene.T]).all()
    assert np.isnan([found.low, found.high, found.p_value, found.p_equivalence, found.p_not_worse]).all()


def of_pair(cells, pair):
    tiles, expression, before, after = cells
    return oracle.Cells(tiles=tiles, expression=expression, before=before[:, pair], after=after[:, pair])


def assert_same(found, pair, expected):
    for name in ("low", "high", "p_equivalence", "p_not_worse"):
        assert getattr(found, name)[pair] == pytest.approx(getattr(expected, name), abs=1e-10)
