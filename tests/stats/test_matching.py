"""Heads matched as by a slow oracle, and what neither units, order nor rounding may change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from amici_eval.stats import matching
from amici_eval.stats.matching import HeadContributions, head_products, match_heads
from amici_eval.stats.permutation.permutations import PermutationStream
from tests.oracles import alignment as oracle

N_TYPES, N_CELLS = 2, 24


def contributions(rng, *, n_heads=3, size=2, n_cells=N_CELLS):
    n = N_TYPES * n_cells
    z = rng.normal(size=(n, n_heads, size))
    scale = rng.uniform(0.5, 2.0, (n, n_heads, 1))
    return HeadContributions(
        types=np.arange(n) % N_TYPES,
        blocks=rng.integers(0, 8, n),
        weights=np.array([1.0, 2.5])[np.arange(n) % N_TYPES],
        factors=np.concatenate([np.ones((n, n_heads, 1)), z], axis=2) / scale,
        query_weights=rng.normal(size=(N_TYPES, 7)),
        head_weights=rng.normal(size=(n_heads, 7, size)),
    )


@pytest.mark.parametrize(("n_heads", "n_others"), [(3, 3), (4, 2), (2, 4)])
def test_both_p_are_those_of_a_slow_oracle(n_heads, n_others):
    rng = np.random.default_rng(20)
    one, other = contributions(rng, n_heads=n_heads), contributions(rng, n_heads=n_others, size=3)
    one.blocks[rng.uniform(size=len(one.blocks)) < 0.3] = -1
    ours, theirs = oracle.deviations(one), oracle.deviations(other)
    every, known = np.ones(len(one.types)), (one.blocks >= 0).astype(float)
    drawn, seed = 39, 5

    def stream(code, stratum):
        return PermutationStream(seed=seed, cell_type=str(code), stratum=stratum, n_cells=N_CELLS)

    orders = {code: stream(code, matching._ORDER).batch(0, 1)[0] for code in range(N_TYPES)}
    words = [matching._words(drawn, seed, str(code), matching._SHIFTS) for code in range(N_TYPES)]
    moved = [
        oracle.shifted_rows(one.types, orders, {code: int(words[code][index]) % N_CELLS for code in range(N_TYPES)})
        for index in range(drawn)
    ]
    signs = matching._signs(drawn, 8, seed)
    assert set(signs.ravel().tolist()) == {-1.0, 1.0}
    found = match_heads(one, other, n_permutations=drawn, seed=seed)
    expected = oracle.p_of(
        oracle.similarity(ours, theirs, one.weights, every),
        (oracle.similarity(ours, theirs[:, rows], one.weights, every) for rows in moved),
    )
    np.testing.assert_allclose(found.p_value, expected)
    expected = oracle.p_of(
        oracle.similarity(ours, theirs, one.weights, known),
        (oracle.similarity(ours, theirs, one.weights, known * flips[one.blocks]) for flips in signs),
    )
    np.testing.assert_allclose(found.p_value_spatial, expected)


def test_cells_whose_block_is_unknown_do_not_make_the_spatial_p_small():
    p = []
    for pair in range(200):
        rng = np.random.default_rng(300 + pair)
        one, other = contributions(rng), contributions(rng)
        one.blocks[rng.uniform(size=len(one.blocks)) < 0.5] = -1
        p.append(match_heads(one, other, n_permutations=59, seed=pair).p_value_spatial)
    assert (np.array(p) <= 0.05).mean() <= binom.ppf(0.999, 200, 0.05) / 200


def test_heads_that_are_constant_but_for_rounding_are_alike_to_none():
    rng = np.random.default_rng(21)
    one, other = contributions(rng), contributions(rng)
    for of, value in ((one, 0.1), (other, 0.3)):
        of.factors[:, 1] = value * (1.0 + rng.integers(-1, 2, (len(of.types), 3)) * 2.0**-52)
    assert (one.factors[:, 1] - one.factors[:, 1].mean(axis=0)).any(), "the mean of a constant is not exact"
    found = match_heads(one, other, unmatched=0.0, n_permutations=19)
    assert np.isnan(found.similarity[1]).all()
    assert np.isnan(found.similarity[:, 1]).all()
    assert found.partner[1] == -1
    assert np.isnan([found.p_value[1], found.p_value_spatial[1]]).all()


def test_a_head_with_noise_is_found_and_unrelated_heads_are_not():
    found = []
    for pair in range(40):
        rng = np.random.default_rng(500 + pair)
        one, other = contributions(rng, n_cells=80), contributions(rng, n_cells=80)
        factors, weights = other.factors.copy(), other.head_weights.copy()
        factors[:, 2] = one.factors[:, 0] + rng.normal(size=one.factors[:, 0].shape)
        weights[2] = one.head_weights[0]
        noisy = replace(other, factors=factors, head_weights=weights, query_weights=one.query_weights)
        found.append(match_heads(one, noisy, n_permutations=99, seed=pair))
    assert all(each.partner[0] == 2 for each in found)
    assert np.mean([each.p_value[0] <= 0.05 for each in found]) > 0.95
    assert np.mean([each.p_value[1:] <= 0.05 for each in found]) <= binom.ppf(0.999, 40, 0.05) / 40


def test_cells_in_another_order_are_as_similar():
    rng = np.random.default_rng(22)
    one, other = contributions(rng), contributions(rng)
    order = rng.permutation(len(one.types))
    moved = [
        replace(of, **{name: getattr(of, name)[order] for name in ("types", "blocks", "weights", "factors")})
        for of in (one, other)
    ]
    truth, found = head_products(one, other), head_products(*moved)
    np.testing.assert_allclose(found.similarity, truth.similarity, atol=1e-12)
    np.testing.assert_allclose(found.similarity_by_type, truth.similarity_by_type, atol=1e-12)
    np.testing.assert_allclose(found.products, truth.products[order], atol=1e-12)


def test_the_other_models_heads_in_another_order_are_other_numbers_of_the_same_partners():
    rng = np.random.default_rng(23)
    one, other = contributions(rng, n_heads=4), contributions(rng, n_heads=4)
    order = np.array([3, 1, 0, 2])
    turned = replace(other, factors=other.factors[:, order], head_weights=other.head_weights[order])
    truth, found = (match_heads(one, of, unmatched=-1.0, n_permutations=99) for of in (other, turned))
    np.testing.assert_array_equal(order[found.partner], truth.partner)
    np.testing.assert_array_equal(found.p_value, truth.p_value)
    np.testing.assert_array_equal(found.p_value_spatial, truth.p_value_spatial)


def test_units_of_expression_and_of_weights_change_nothing():
    rng = np.random.default_rng(24)
    one, other = contributions(rng), contributions(rng)
    scaled = replace(
        other,
        weights=3.0 * other.weights,
        query_weights=1e-5 * other.query_weights,
        head_weights=1e-5 * other.head_weights,
    )
    pairs = (one, other), (replace(one, weights=scaled.weights), scaled)
    truth, found = (match_heads(*pair, n_permutations=99) for pair in pairs)
    np.testing.assert_allclose(found.similarity, truth.similarity, atol=1e-12)
    np.testing.assert_array_equal(found.p_value, truth.p_value)
    np.testing.assert_array_equal(found.p_value_spatial, truth.p_value_spatial)
