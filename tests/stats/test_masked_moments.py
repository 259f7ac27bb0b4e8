"""Sums under masks are those that each set of outputs has by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amici_eval.stats.readout import Readout
from amici_eval.stats.type_sums import gather_sums, masked_sums


@dataclass(frozen=True)
class Block:
    positions: np.ndarray
    values: np.ndarray


def made(seed=0, n_cells=60, n_genes=7):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(n_genes, 1 + 2 * 3))
    root = rng.normal(size=(7, 7))
    readout = Readout(
        weights=weights, gram=root @ root.T, offset=rng.normal(size=n_genes), epsilon=1e-5, n_heads=2, head_size=3
    )
    expression = rng.normal(size=(n_cells, n_genes)).astype(np.float32)
    expression[:, 2] = 1.5
    outputs = [rng.normal(size=(n_cells, 6)).astype(np.float32) for _ in range(3)]
    return readout, expression, outputs, rng.integers(0, 4, n_cells) * 10


def blocks(expression, *parts):
    return [Block(part, expression[part]) for part in parts]


def test_each_mask_has_the_moments_of_its_own_predictions_tile_by_tile():
    readout, expression, outputs, tiles = made()
    found = masked_sums(outputs, readout, blocks(expression, np.arange(60)), tiles=tiles)
    for sums, brought in zip(found, outputs, strict=True):
        np.testing.assert_array_equal(sums.tiles, np.unique(tiles))
        for head in range(2):
            residual = readout.predict(brought, [head]) - expression
            for place, tile in enumerate(sums.tiles):
                own = residual[tiles == tile]
                np.testing.assert_allclose(sums.residual_mean[place, head], own.mean(axis=0), atol=1e-9)
                squares = ((own - own.mean(axis=0)) ** 2).sum(axis=0)
                np.testing.assert_allclose(sums.residual_m2[place, head], squares, atol=1e-8)
    assert found[0].varies.tolist() == [True, True, False, True, True, True, True]


def test_they_are_the_moments_of_the_evaluation_whatever_the_blocks():
    readout, expression, outputs, tiles = made(1)
    order = np.random.default_rng(0).permutation(60)
    found = masked_sums(outputs, readout, blocks(expression, *np.split(order, [7, 31])), tiles=tiles)
    whole = gather_sums(outputs[0], readout, blocks(expression, np.arange(60)), tiles=tiles)
    whole = whole.by_tile.of_models([0, 1])
    np.testing.assert_allclose(found[0].residual_mean, whole.residual_mean, atol=1e-12)
    np.testing.assert_allclose(found[0].residual_m2, whole.residual_m2, atol=1e-9)
    np.testing.assert_allclose(found[0].target_m2, whole.target_m2, atol=1e-9)
    overall = found[2].residual_squares.sum(axis=0)
    residual = readout.predict(outputs[2], [1]) - expression
    np.testing.assert_allclose(overall[1], ((residual - residual.mean(axis=0)) ** 2).sum(axis=0), atol=1e-8)
