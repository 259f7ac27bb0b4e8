from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from amici_eval.stats.spatial.lag import CellPositions, LagGrid, NearPairs
from amici_eval.stats.spatial.lag_test import MIN_EFFECTIVE_CELLS, GeneSums, lag_test
from tests.oracles import lag as oracle


def smooth(rng, xy, length, n_columns, *, n_waves=200):
    """Return Gaussian fields of correlation exp(-d^2 / (2 length^2))."""
    waves = rng.normal(size=(2, n_waves)) / length
    phases = rng.uniform(0, 2 * np.pi, n_waves)
    return np.cos(xy @ waves + phases) @ rng.normal(size=(n_waves, n_columns)) * np.sqrt(2 / n_waves)


def weights_of(rng, n_heads, n_genes, rank):
    return rng.normal(size=(n_heads, n_genes, rank))


def ask(factors, targets, weights, xy, *, samples=None, **arguments):
    """Ask for the test of predictions ``factors @ weights.T`` of targets, both (cells, columns)."""
    place = CellPositions.of(xy, samples=samples, n_genes=targets.shape[1])
    predictions = np.einsum("nrh,hgr->hng", factors, weights)
    predictions = predictions - predictions.mean(axis=1, keepdims=True)
    centred = targets - targets.mean(axis=0)
    genes = GeneSums(
        weights=weights,
        pixel_sums=place.grid.sums(torch.from_numpy(targets)).numpy(),
        near=targets[place.near.cells],
        target_ss=(centred**2).sum(axis=0),
        predicted_ss=(predictions**2).sum(axis=1),
        common=(predictions * centred).sum(axis=1),
    )
    images = np.einsum("ng,hgr->nrh", targets, weights)
    return lag_test(factors, images, place=place, genes=genes, **arguments)


def draw(seed, *, n_cells=300, length=0.1, n_heads=2, n_genes=4, rank=3, effect=0.0):
    rng = np.random.default_rng(seed)
    xy = rng.uniform(size=(n_cells, 2))
    factors = smooth(rng, xy, length, rank * n_heads).reshape(n_cells, rank, n_heads)
    weights = weights_of(rng, n_heads, n_genes, rank)
    targets = smooth(rng, xy, length, n_genes) + rng.normal(size=(n_cells, n_genes))
    planted = factors[:, :, 0] @ weights[0].T
    return factors, targets + effect * planted / planted.std(), weights, xy


@pytest.mark.parametrize("with_samples", [False, True])
def test_products_by_distance_are_those_of_all_pairs_of_pixels(with_samples):
    rng = np.random.default_rng(0)
    xy = rng.uniform(size=(250, 2)) * [1.0, 0.6]
    samples = np.where(rng.uniform(size=250) < 0.4, "a", "b") if with_samples else None
    grid = LagGrid.of(xy, samples=samples)
    fields = torch.from_numpy(rng.normal(size=(2, 250, 3)))
    image = grid.sums(fields.transpose(0, 1).contiguous()).transpose(0, 1).contiguous()
    found = grid.products(image).numpy()
    rows, columns = grid.shape[1:]
    in_section = grid.pixel % (rows * columns)
    centres = np.stack([in_section // columns, in_section % columns], axis=1) * grid.side
    finest = np.count_nonzero(grid.edges <= 4.2 * grid.side * (1 + 1e-9)) - 1
    for field in range(2):
        pairs, products = oracle.mean_products(fields[field].numpy(), centres, grid.section, grid.edges)
        np.testing.assert_array_equal(grid.pairs, pairs[1:])
        assert grid.n_near == pairs[0]
        np.testing.assert_allclose(found[:finest, field], products[1 : finest + 1], atol=1e-12)
    # coarser levels see pairs of larger pixels: not the same pairs, but all within the window
    squares = grid.squares(image[:, :, 0].contiguous()).numpy()
    np.testing.assert_allclose(squares, found[:, :, 0, 0], atol=1e-12)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_effective_sample_size_is_that_of_all_pairs_of_cells(length):
    factors, targets, weights, xy = draw(1, n_cells=500, length=length, n_heads=1)
    found = ask(factors, targets, weights, xy)
    f = factors[:, :, 0] - factors[:, :, 0].mean(axis=0)
    z = (targets - targets.mean(axis=0)) @ weights[0]
    edges = np.concatenate([np.arange(0.01, 0.3, 0.01), np.arange(0.3, 1.5, 0.03)])
    variance = oracle.variance_of_fit(f, z, xy, np.zeros(500), edges)
    free = np.trace(f.T @ f @ z.T @ z) / 500
    assert found.ess[0] == pytest.approx(1 + 500 * free / variance, rel=0.12)
    assert found.statistic[0] == pytest.approx((f * z).sum() / np.sqrt(variance), rel=0.06)


def test_in_smooth_tissue_the_level_holds_where_the_free_test_rejects_too_often():
    rejected, free, n = 0, 0, 120
    for seed in range(n):
        factors, targets, weights, xy = draw([7, seed], n_heads=1)
        found = ask(factors, targets, weights, xy)
        rejected += int(found.p[0] <= 0.05)
        free += int(found.statistic[0] * np.sqrt(300 / found.ess[0]) > 1.645)
    assert rejected <= binom.ppf(0.999, n, 0.08)
    assert free > binom.ppf(0.999, n, 0.08)


@pytest.mark.slow
def test_cells_that_are_independent_are_all_effective():
    p, ess = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        xy, weights = rng.uniform(size=(200, 2)), weights_of(rng, 3, 4, 2)
        found = ask(rng.normal(size=(200, 2, 3)), rng.normal(size=(200, 4)), weights, xy)
        p += found.p.tolist()
        ess += found.ess.tolist()
    assert np.median(ess) > 150
    assert binom.ppf(0.0005, 180, 0.05) <= np.count_nonzero(np.array(p) <= 0.05) <= binom.ppf(0.9995, 180, 0.05)


def test_a_planted_head_and_its_genes_are_found_and_the_other_head_is_not():
    factors, targets, weights, xy = draw(3, n_cells=1200, length=0.05, effect=1.0)
    found = ask(factors, targets, weights, xy)
    assert found.p[0] < 1e-4
    assert found.p[1] > 0.01
    assert (found.p_gene[0] < 0.01).sum() >= 3
    assert found.detectable[0] < 0.1


def test_genes_are_tested_as_heads_of_one_gene():
    factors, targets, weights, xy = draw(4, n_genes=3)
    found = ask(factors, targets, weights, xy)
    for gene in range(3):
        alone = ask(factors, targets[:, [gene]], weights[:, [gene]], xy)
        np.testing.assert_allclose(alone.p[:], found.p_gene[:, gene], rtol=1e-8)
        np.testing.assert_allclose(alone.p_gene[:, 0], found.p_gene[:, gene], rtol=1e-8)


def test_the_order_of_cells_and_the_unit_of_length_change_nothing():
    factors, targets, weights, xy = draw(5)
    found = ask(factors, targets, weights, xy)
    order = np.random.default_rng(0).permutation(len(xy))
    other = ask(factors[order], targets[order], weights, 1000 * xy[order] + 77.0)
    np.testing.assert_allclose(other.p, found.p, rtol=1e-9)
    np.testing.assert_allclose(other.p_gene, found.p_gene, rtol=1e-9)
    assert other.correlation_length == pytest.approx(1000 * found.correlation_length)
    assert other.reach == pytest.approx(1000 * found.reach)


def test_sections_are_centred_apart_and_no_pair_crosses_between_them():
    factors, targets, weights, xy = draw(6)
    samples = np.where(np.arange(len(xy)) % 2, "a", "b")
    apart = xy + np.where(samples == "a", 5.0, 0.0)[:, None]
    found = ask(factors, targets, weights, apart, samples=samples)
    shifted = targets + np.where(samples == "a", 3.0, -1.0)[:, None]
    other = ask(factors + np.where(samples == "a", 2.0, 0.0)[:, None, None], shifted, weights, apart, samples=samples)
    np.testing.assert_allclose(other.p, found.p, rtol=1e-7)
    np.testing.assert_allclose(other.p_gene, found.p_gene, rtol=1e-7)
    assert abs(np.log(ask(factors, shifted, weights, apart).p / found.p)).max() > 0.1


def test_the_correlation_length_is_where_the_smooth_part_has_fallen_to_one_in_e():
    factors, targets, weights, xy = draw(8, n_cells=3000, length=0.06, n_genes=40)
    assert ask(factors, targets, weights, xy).correlation_length == pytest.approx(0.06 * np.sqrt(2), rel=0.2)
    rng = np.random.default_rng(0)
    assert np.isnan(ask(factors, rng.normal(size=targets.shape), weights, xy).correlation_length)


@pytest.mark.parametrize("with_samples", [False, True])
def test_near_pairs_are_all_pairs_in_touching_pixels_by_their_distance(with_samples):
    rng = np.random.default_rng(1)
    xy = rng.uniform(size=(400, 2))
    samples = np.where(rng.uniform(size=400) < 0.4, "a", "b") if with_samples else None
    grid = LagGrid.of(xy, samples=samples)
    near = NearPairs.of(grid, xy, n_genes=5)
    rows, columns = grid.shape[1:]
    place = np.stack([grid.pixel % (rows * columns) // columns, grid.pixel % columns], axis=1)
    touching = (np.abs(place[:, None] - place[None]) <= 1).all(axis=2) & (grid.section[:, None] == grid.section[None])
    np.fill_diagonal(touching, val=False)
    assert near.pairs.sum() == pytest.approx(touching.sum())
    assert len(near.first) == touching.sum()
    assert touching[near.cells[near.first], near.cells[near.second]].all()
    distance = np.linalg.norm(xy[near.cells[near.first]] - xy[near.cells[near.second]], axis=1)
    middle = np.repeat(near.distances, np.diff(near.starts))
    assert (np.abs(distance - middle) <= 0.5 * grid.side + 1e-12).all()
    fields = torch.from_numpy(rng.normal(size=(2, 400, 3)))
    found = near.products(fields).numpy()
    for ring in np.flatnonzero(np.diff(near.starts)):
        part = slice(near.starts[ring], near.starts[ring + 1])
        left, right = (fields[1].numpy()[near.cells[side[part]]] for side in (near.first, near.second))
        np.testing.assert_allclose(found[ring, 1], (left.T @ right + right.T @ left) / 2 / len(left), atol=1e-12)
    squares = near.squares(fields[:, torch.from_numpy(near.cells), 0].T.contiguous()).numpy()
    np.testing.assert_allclose(squares, found[:, :, 0, 0], atol=1e-12)


@pytest.mark.slow
def test_correlation_that_reaches_less_far_than_a_pixel_is_seen():
    statistics, ess = [], []
    for seed in range(25):
        rng = np.random.default_rng([3, seed])
        xy, weights = rng.uniform(size=(12_000, 2)), weights_of(rng, 3, 4, 2)
        factors = np.stack([smooth(rng, xy, 0.004, 2, n_waves=300) for _ in range(3)], axis=2)
        found = ask(factors, smooth(rng, xy, 0.004, 4, n_waves=300), weights, xy)
        statistics += found.statistic.tolist()
        ess += found.ess.tolist()
        assert found.correlation_length == pytest.approx(0.004 * np.sqrt(2), rel=0.3)
    assert np.median(ess) < 9000
    assert np.std(statistics) < 1.2


def test_cells_alone_in_their_section_have_no_say():
    factors, targets, weights, xy = draw(12, n_cells=140, length=0.02)
    samples = np.array(["together"] * 60 + [f"alone {i}" for i in range(80)])
    found = ask(factors, targets, weights, xy, samples=samples)
    alone = ask(factors[:60], targets[:60], weights, xy[:60])
    assert (found.ess <= 60).all()
    np.testing.assert_allclose(found.p, alone.p, rtol=0.1)


def test_a_gene_that_differs_between_sections_only_has_no_p():
    factors, targets, weights, xy = draw(13)
    samples = np.where(np.arange(len(xy)) % 2, "a", "b")
    targets[:, 1] = np.where(samples == "a", 0.1, 0.3)
    found = ask(factors, targets, weights, xy + (samples == "a")[:, None] * 5.0, samples=samples)
    assert np.isnan(found.p_gene[:, 1]).all()
    assert np.isfinite(found.p_gene[:, [0, 2, 3]]).all()


def test_many_sections_share_the_pixels():
    xy = np.random.default_rng(0).uniform(size=(4000, 2))
    samples = np.arange(4000) % 40
    assert LagGrid.of(xy).n_pixels == 64 * 64
    assert LagGrid.of(xy, samples=samples).n_pixels <= 2**14
    assert LagGrid.of(np.zeros((5, 2))).counts.sum() == 5


def test_too_few_effective_cells_give_no_p_and_a_dead_head_neither():
    factors, _, weights, xy = draw(9, n_cells=200)
    slope = xy.sum(axis=1, keepdims=True)
    factors = np.stack([slope * [1.0, 2.0, -1.0], np.zeros((200, 3))], axis=2)
    found = ask(factors, slope * [1.0, -2.0, 1.0, 0.5], weights, xy)
    assert found.ess[0] < MIN_EFFECTIVE_CELLS
    assert np.isnan(found.p).all()
    assert np.isnan(found.detectable).all()
    assert np.isnan(found.ess[1])


def test_p_is_never_zero():
    factors, _, weights, xy = draw(10, n_cells=2000, length=0.02)
    found = ask(factors, np.einsum("nr,gr->ng", factors[:, :, 0], weights[0]), weights, xy)
    assert 0.0 < found.p[0] < 1e-20
    assert (found.p_gene > 0.0).all()


def test_a_larger_reach_takes_more_pairs_into_account():
    factors, targets, weights, xy = draw(11)
    near, far = (ask(factors, targets, weights, xy, reach=reach) for reach in (0.02, 0.3))
    assert near.reach < 0.05 < far.reach <= 0.3
    assert near.ess[0] > far.ess[0]


@pytest.mark.slow
def test_the_level_holds_where_pairs_of_small_sections_are_left_out():
    n_sections, rejected, n_repeats = 50, 0, 250
    for seed in range(n_repeats):
        rng = np.random.default_rng(seed)
        xy = rng.uniform(0.0, 100.0, (4 * n_sections, 2))
        samples = np.repeat(np.arange(n_sections), 4).astype(str)
        factors, targets = rng.normal(size=(len(xy), 1, 1)), rng.normal(size=(len(xy), 2))
        found = ask(factors, targets, weights_of(rng, 1, 2, 1), xy, samples=samples, reach=3.0)
        rejected += found.p[0] <= 0.1
    assert rejected <= binom.ppf(0.98, n_repeats, 0.12)
