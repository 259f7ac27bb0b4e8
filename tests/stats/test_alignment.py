"""Which head is which: similarity, assignment, and how alike chance makes heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, kstest, ortho_group

from amici_eval.stats import matching
from amici_eval.stats.matching import (
    HeadContributions,
    assign_heads,
    attention_divergence,
    head_products,
    linear_cka,
    match_heads,
    profile_cosine,
)
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.spatial.tiles import balanced_blocks


def contributions(rng, *, n_types=3, n_cells=40, n_heads=4, size=3, n_genes=11, z=None, xy=None):
    n = n_types * n_cells
    z = rng.normal(size=(n, n_heads, size)) if z is None else z
    xy = rng.uniform(size=(n, 2)) if xy is None else xy
    scale = rng.uniform(0.5, 2.0, (n, n_heads, 1))
    return HeadContributions(
        types=np.arange(n) % n_types,
        blocks=(xy[:, 0] * 4).astype(np.int64) * 2 + (xy[:, 1] * 2).astype(np.int64),
        weights=np.array([1.0, 2.5, 4.0])[np.arange(n) % n_types],
        factors=np.concatenate([np.ones((n, n_heads, 1)), z], axis=2) / scale,
        query_weights=rng.normal(size=(n_types, n_genes)),
        head_weights=rng.normal(size=(n_heads, n_genes, size)),
    )


def predictions(of):
    """Return contributions literally, shape (heads, cells, genes), centred within types."""
    made = np.empty((of.factors.shape[1], len(of.types), of.query_weights.shape[1]))
    for head in range(len(made)):
        for cell, code in enumerate(of.types):
            weights = np.column_stack([of.query_weights[code], of.head_weights[head]])
            made[head, cell] = weights @ of.factors[cell, head]
        for code in np.unique(of.types):
            made[head, of.types == code] -= made[head, of.types == code].mean(axis=0)
    return made


def literal_similarity(one, other, rows=slice(None)):
    ours, theirs = predictions(one)[:, rows], predictions(other)[:, rows]
    weights = one.weights[rows, None]
    return np.array(
        [
            [(weights * a * b).sum() / np.sqrt((weights * a * a).sum() * (weights * b * b).sum()) for b in theirs]
            for a in ours
        ]
    )


def relabelled(of, order, rng):
    """Return the same model with its heads in another order and their outputs rotated: the same function."""
    turns = np.stack([ortho_group.rvs(of.head_weights.shape[2], random_state=rng) for _ in order])
    factors = of.factors[:, order].copy()
    factors[:, :, 1:] = np.einsum("nhs,hst->nht", factors[:, :, 1:], turns)
    return replace(of, factors=factors, head_weights=np.einsum("hgs,hst->hgt", of.head_weights[order], turns))


def test_similarity_is_the_correlation_of_contributions():
    rng = np.random.default_rng(0)
    one, other = contributions(rng), contributions(rng, n_heads=2, size=5)
    found = head_products(one, other)
    np.testing.assert_allclose(found.similarity, literal_similarity(one, other), atol=1e-12)
    for code in range(3):
        expected = literal_similarity(one, other, one.types == code)
        np.testing.assert_allclose(found.similarity_by_type[code], expected, atol=1e-12)


def test_permutations_are_shifts_of_the_other_models_cells(monkeypatch):
    rng = np.random.default_rng(1)
    one, other = contributions(rng), contributions(rng)
    found = matching._shifted(one, other, 6, 3) / head_products(one, other).scale
    for index in range(6):
        moved = np.arange(len(one.types))
        for code in range(3):
            rows = np.flatnonzero(one.types == code)
            stream = PermutationStream(seed=3, cell_type=str(code), stratum=matching._ORDER, n_cells=40)
            order = rows[stream.batch(0, 1)[0]]
            shift = int(matching._words(6, 3, str(code), matching._SHIFTS)[index] % np.uint64(40))
            moved[order] = np.roll(order, -shift)
        permuted = replace(other, factors=other.factors[moved])
        np.testing.assert_allclose(found[index], literal_similarity(one, permuted), atol=1e-10)


def test_a_model_with_its_heads_permuted_and_rotated_is_matched_perfectly():
    rng = np.random.default_rng(2)
    one = contributions(rng, n_heads=6)
    order = rng.permutation(6)
    found = match_heads(one, relabelled(one, order, rng), n_permutations=199)
    np.testing.assert_array_equal(order[found.partner], np.arange(6))
    np.testing.assert_allclose(found.similarity[np.arange(6), found.partner], 1.0, atol=1e-10)
    assert (found.p_value == 1 / 200).all()
    assert (found.p_value_spatial <= 0.05).all(), "of 256 patterns of signs one leaves all as they are"


def test_a_head_that_was_replaced_stays_alone_and_the_others_do_not():
    rng = np.random.default_rng(3)
    one = contributions(rng, n_heads=5)
    other = relabelled(one, np.array([4, 0, 3, 1, 2]), rng)
    foreign = contributions(rng, n_heads=5)
    factors, weights = other.factors.copy(), other.head_weights.copy()
    factors[:, 2], weights[2] = foreign.factors[:, 2], foreign.head_weights[2]
    found = match_heads(one, replace(other, factors=factors, head_weights=weights), n_permutations=199)
    np.testing.assert_array_equal(found.partner, [1, 3, 4, -1, 0])
    assert found.p_value[3] > 0.05


@pytest.mark.parametrize("n_others", [2, 6])
def test_numbers_of_heads_may_differ(n_others):
    rng = np.random.default_rng(4)
    one, wide = contributions(rng), contributions(rng, n_heads=6)
    other = replace(wide, factors=wide.factors[:, :n_others].copy(), head_weights=wide.head_weights[:n_others].copy())
    other.factors[:, 1], other.head_weights[1] = one.factors[:, 2], one.head_weights[2]
    found = match_heads(one, replace(other, query_weights=one.query_weights), n_permutations=99)
    assert found.partner[2] == 1
    assert np.isfinite(found.p_value).all()
    assert found.similarity.shape == (4, n_others)


def test_a_dead_head_is_like_none():
    rng = np.random.default_rng(5)
    one, other = contributions(rng), contributions(rng)
    one.factors[:, 1] = 1.0
    found = match_heads(one, other, unmatched=0.0, n_permutations=49)
    assert np.isnan(found.similarity[1]).all()
    assert found.partner[1] == -1
    assert np.isnan([found.p_value[1], found.p_value_spatial[1]]).all()
    assert np.isfinite(np.delete(found.p_value, 1)).all()


def test_the_order_of_cells_and_heads_changes_nothing_but_theirs():
    rng = np.random.default_rng(6)
    one, other = contributions(rng), contributions(rng)
    truth = match_heads(one, other, unmatched=0.0, n_permutations=99)
    order = np.array([2, 0, 3, 1])
    found = match_heads(relabelled(one, order, rng), other, unmatched=0.0, n_permutations=99)
    np.testing.assert_array_equal(found.partner, truth.partner[order])
    np.testing.assert_allclose(found.similarity, truth.similarity[order], atol=1e-12)
    np.testing.assert_array_equal(found.p_value, truth.p_value[order])
    np.testing.assert_array_equal(found.p_value_spatial, truth.p_value_spatial[order])


def test_without_places_or_with_few_blocks_there_is_no_spatial_p():
    rng = np.random.default_rng(7)
    one, other = contributions(rng), contributions(rng)
    nowhere = match_heads(replace(one, blocks=np.full(120, -1)), other, n_permutations=9)
    assert nowhere.reason == "it is not known where the cells lie"
    few = match_heads(replace(one, blocks=np.arange(120) % 3), other, n_permutations=9)
    assert few.reason == "cells in 3 blocks of tissue; at least 6 are needed to flip their signs"
    assert np.isnan([nowhere.p_value_spatial, few.p_value_spatial]).all()


def smooth(rng, xy, n_columns, width):
    waves = rng.normal(size=(2, 400)) / width
    return np.cos(xy @ waves + rng.uniform(0, 2 * np.pi, 400)) @ rng.normal(size=(400, n_columns)) / np.sqrt(200)


def p_of_unrelated(n_pairs, width):
    p, p_spatial = [], []
    for pair in range(n_pairs):
        rng = np.random.default_rng(100 + pair)
        xy = rng.uniform(size=(240, 2))

        def one(rng=rng, xy=xy):
            z = rng.normal(size=(240, 3, 2))
            if width:
                z = 0.1 * z + smooth(rng, xy, 6, width).reshape(240, 3, 2)
            return contributions(rng, n_cells=80, n_heads=3, size=2, n_genes=8, z=z, xy=xy)

        found = match_heads(one(), one(), n_permutations=99, seed=pair)
        p.append(found.p_value)
        p_spatial.append(found.p_value_spatial)
    return np.array(p), np.array(p_spatial)


def test_of_exchangeable_cells_p_is_uniform():
    p, p_spatial = p_of_unrelated(200, None)
    for values in (p, p_spatial):
        # p takes multiples of 1/100: a uniform number below it makes it continuous
        spread = values - np.random.default_rng(0).uniform(size=values.shape) / 100
        assert all(kstest(head, "uniform").pvalue > 0.001 for head in spread.T)


def test_of_smooth_contributions_only_the_spatial_p_holds_its_level():
    p, p_spatial = p_of_unrelated(200, 0.06)
    most = binom.ppf(0.999, 200, 0.05) / 200
    assert (p_spatial <= 0.05).mean() <= most
    assert (p <= 0.05).mean() > 1.5 * most


def test_blocks_are_halves_of_halves():
    rng = np.random.default_rng(8)
    centers, weights = rng.uniform(size=(36, 2)) * [2, 1], rng.integers(10, 30, 36).astype(float)
    block = balanced_blocks(centers, weights, depth=3)
    assert sorted(set(block.tolist())) == list(range(8))
    in_block = np.bincount(block, weights=weights)
    assert in_block.max() < 1.6 * in_block.mean()
    left, right = (np.isin(block, half) for half in ([0, 1, 2, 3], [4, 5, 6, 7]))
    assert centers[left, 0].max() < centers[right, 0].min(), "the longer side is cut first"
    order = rng.permutation(36)
    np.testing.assert_array_equal(balanced_blocks(centers[order], weights[order], depth=3), block[order])
    assert balanced_blocks(centers[:1], weights[:1], depth=3).tolist() == [0]


def test_the_assignment_has_the_largest_sum_above_the_threshold():
    similarity = np.array([[0.9, 0.8, np.nan], [0.85, 0.1, 0.15], [np.nan, np.nan, np.nan]])
    assert assign_heads(similarity).tolist() == [1, 0, -1]
    assert assign_heads(similarity, unmatched=0.86).tolist() == [0, -1, -1]


def test_kernel_alignment_is_1_of_rotated_copies_and_is_its_definition():
    rng = np.random.default_rng(9)
    z, types, weights = rng.normal(size=(60, 2, 4)), np.arange(60) % 3, np.ones(60)
    turned = z @ ortho_group.rvs(4, random_state=1) * 3.0 + np.array([1.0, -2.0, 0.5])[types][:, None, None]
    np.testing.assert_allclose(np.diag(linear_cka(z, turned, types, weights)), 1.0)
    a, b = (v - np.stack([v[types == t].mean(axis=0) for t in range(3)])[types] for v in (z[:, 0], z[:, 1]))
    k, m = a @ a.T, b @ b.T
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    np.testing.assert_allclose(linear_cka(z, z, types, weights)[0, 1], expected)


def test_attention_diverges_from_0_to_1_bit():
    one = np.array([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    other = np.array([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
    middle = 0.5 * (0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25)) + 0.5 * np.log2(1.0 / 0.75)
    np.testing.assert_allclose(attention_divergence(one, other), [[0.0, 1.0], [middle, 1.0]])


def test_profiles_are_compared_where_both_are_known():
    one = np.array([[1.0, 0.0, np.nan], [0.0, 0.0, 0.0]])
    other = np.array([[2.0, 0.0, 5.0], [1.0, 1.0, np.nan]])
    np.testing.assert_allclose(profile_cosine(one, other), [[1.0, np.sqrt(0.5)], [np.nan, np.nan]])
