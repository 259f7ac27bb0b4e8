from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from amici_eval.stats.ablation import values as module
from amici_eval.stats.ablation.ablations import (
    all_coalitions,
    antithetic_orders,
    interaction_index,
    order_coalitions,
    sampled_shapley_values,
    shapley_values,
)
from amici_eval.stats.ablation.values import AblatedCells, coalition_sums
from amici_eval.stats.readout import Readout
from tests.oracles import coalitions as oracle


@dataclass(frozen=True)
class Case:
    z: np.ndarray
    targets: np.ndarray
    readout: Readout

    @property
    def centred(self):
        return self.targets - self.targets.mean(axis=0)

    @property
    def cells(self):
        return AblatedCells(
            z=self.z,
            projected=self.centred @ self.readout.weights,
            target_ss=float((self.centred**2).sum()),
            readout=self.readout,
        )


def values_of(cells, coalitions):
    return coalition_sums(cells, np.asarray(coalitions, dtype=bool)).values(cells.target_ss)


def draw(seed, *, n_cells=17, n_heads=3, head_size=2, n_genes=4, noise=0.5):
    """A layer norm over an embedding, heads of unlike size, expression that follows the prediction."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(5 * n_heads, 1 + n_heads * head_size))
    embedding -= embedding.mean(axis=0)
    readout = Readout(
        weights=rng.normal(size=(n_genes, len(embedding))) @ embedding / 5,
        gram=embedding.T @ embedding / len(embedding),
        offset=rng.normal(size=n_genes),
        epsilon=1e-5,
        n_heads=n_heads,
        head_size=head_size,
    )
    scale = np.repeat(rng.uniform(0.3, 2, size=n_heads), head_size)
    z = (rng.normal(size=(n_cells, n_heads * head_size)) * scale + 0.3).astype(np.float32)
    targets = readout.predict(z) + noise * rng.normal(size=(n_cells, n_genes))
    return Case(z=z, targets=targets, readout=readout)


def members(row):
    return np.flatnonzero(row).tolist()


@pytest.mark.parametrize("n_cells", [2, 3, 17])
@pytest.mark.parametrize(("n_heads", "head_size"), [(1, 3), (3, 2), (4, 1)])
def test_values_equal_the_definition_for_every_set_of_heads(n_cells, n_heads, head_size):
    case = draw(n_cells, n_cells=n_cells, n_heads=n_heads, head_size=head_size)
    kept = all_coalitions(n_heads)
    expected = [oracle.value(case.readout, case.z, case.targets, members(row)) for row in kept]
    values = values_of(case.cells, kept)
    np.testing.assert_allclose(values, expected, rtol=1e-11, atol=1e-11)
    assert values.dtype == np.float64
    assert len(np.unique(np.round(values, 6))) == 2**n_heads


def test_values_equal_those_of_predictions_at_a_real_size():
    case = draw(1, n_cells=700, n_heads=5, head_size=16, n_genes=30)
    kept = all_coalitions(5)[[0, 1, 6, 21, 31]]
    total = case.targets.var(axis=0).sum()
    expected = [
        1 - (case.readout.predict(case.z, members(row)) - case.targets).var(axis=0).sum() / total for row in kept
    ]
    np.testing.assert_allclose(values_of(case.cells, kept), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("block", [1, 3, 512])
@pytest.mark.parametrize("chunk_cells", [1, 4, 17, 1000])
def test_chunks_and_blocks_change_nothing_but_rounding(chunk_cells, block, monkeypatch):
    case = draw(2)
    kept = all_coalitions(3)
    expected = values_of(case.cells, kept)
    monkeypatch.setattr(module, "_COALITION_BLOCK", block)
    monkeypatch.setattr(module, "CHUNK_CELLS", chunk_cells)
    np.testing.assert_allclose(values_of(case.cells, kept), expected, rtol=0, atol=1e-12)


def test_without_heads_nothing_is_explained():
    case = draw(6, n_cells=500)
    values = values_of(case.cells, [[0, 0, 0], [1, 0, 0]])
    assert values[0] == 0.0
    assert values[1] != 0.0


def test_the_order_of_cells_does_not_matter(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_CELLS", 7)
    cells = draw(3, n_cells=50).cells
    order = np.random.default_rng(0).permutation(50)
    reordered = replace(cells, z=cells.z[order], projected=cells.projected[order])
    found, expected = (values_of(own, all_coalitions(3)) for own in (reordered, cells))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_inputs_are_left_alone_and_float32_targets_are_close():
    cells = draw(4).cells
    before = cells.z.copy(), cells.projected.copy()
    values = values_of(cells, all_coalitions(3))
    np.testing.assert_array_equal(cells.z, before[0])
    np.testing.assert_array_equal(cells.projected, before[1])
    single = values_of(replace(cells, projected=cells.projected.astype(np.float32)), all_coalitions(3))
    np.testing.assert_allclose(single, values, atol=1e-5)


def test_covariances_of_blocks_equal_those_of_predictions():
    case = draw(5)
    z, readout = case.z, case.readout
    sums = coalition_sums(case.cells, np.array([[1, 0, 1], [1, 1, 1]], dtype=bool))
    x = np.concatenate([np.ones((len(z), 1)), z], axis=1)
    for row, heads in enumerate([(0, 2), (0, 1, 2)]):
        sigma = readout.scale(z, heads)[:, None]
        parts = []
        for columns in ([0], [1, 2], [3, 4], [5, 6]):
            part = x[:, columns] @ readout.weights[:, columns].T / sigma
            parts.append(part - part.mean(axis=0))
        expected = [[(a * b).sum() for b in parts] for a in parts]
        np.testing.assert_allclose(sums.block_covariances(row), expected, rtol=1e-11, atol=1e-12)


def game(seed, n_heads):
    """Random values of all coalitions, and the same as a function of a set."""
    values = np.random.default_rng(seed).normal(size=2**n_heads)
    return values, lambda heads: values[sum(1 << head for head in heads)]


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4])
def test_shapley_values_equal_the_mean_over_all_orders(n_heads):
    values, worth = game(n_heads, n_heads)
    shapley = shapley_values(values)
    np.testing.assert_allclose(shapley.values, oracle.shapley_by_orders(worth, n_heads), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(shapley.values.sum(), values[-1] - values[0], rtol=1e-12)
    assert (shapley.standard_error == 0).all()


@pytest.mark.parametrize("n_heads", [2, 3, 5])
def test_interactions_equal_the_definition_over_sets(n_heads):
    values, worth = game(n_heads, n_heads)
    index = interaction_index(values)
    assert np.isnan(np.diag(index)).all()
    for first, second in itertools.permutations(range(n_heads), 2):
        expected = oracle.interaction_by_sets(worth, n_heads, first, second)
        np.testing.assert_allclose(index[first, second], expected, rtol=1e-12, atol=1e-12)


def test_axioms_of_shapley_values_and_interactions():
    # players 0 and 1 are interchangeable, player 2 adds nothing, player 3 adds 0.25 to any set
    values = np.array([0.25 * row[3] + [0, 0.1, 0.7][int(row[0]) + int(row[1])] for row in all_coalitions(4)])
    np.testing.assert_allclose(shapley_values(values).values, [0.35, 0.35, 0, 0.25], atol=1e-15)
    index = interaction_index(values)
    np.testing.assert_allclose(index[0, 1], 0.7 - 0.1 - 0.1, atol=1e-15)
    index[0, 1] = index[1, 0] = 0.0
    np.testing.assert_allclose(index[~np.eye(4, dtype=bool)], 0, atol=1e-15)


def test_all_coalitions_in_the_order_of_their_bits():
    np.testing.assert_array_equal(all_coalitions(2), [[0, 0], [1, 0], [0, 1], [1, 1]])


def test_sampled_orders_are_pairs_of_reverses_and_depend_on_their_number_alone():
    orders = antithetic_orders(6, n_orders=40, seed=3, cell_type="T")
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(6), (40, 1)))
    np.testing.assert_array_equal(orders[1::2], orders[::2, ::-1])
    np.testing.assert_array_equal(antithetic_orders(6, n_orders=12, seed=3, cell_type="T"), orders[:12])
    assert len(np.unique(orders, axis=0)) > 20
    for other in ({"seed": 4, "cell_type": "T"}, {"seed": 3, "cell_type": "U"}):
        assert (antithetic_orders(6, n_orders=40, **other) != orders).any()


def test_coalitions_of_an_order_grow_by_one_head_at_a_time():
    kept = order_coalitions(np.array([[2, 0, 1]]))
    np.testing.assert_array_equal(kept[0], [[0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]])


@functools.cache
def sampled_against_exact():
    """z-scores of sampled against exact values: 6 players x 40 seeds."""
    values, _ = game(9, 6)
    exact = shapley_values(values).values
    scores = []
    for seed in range(40):
        orders = antithetic_orders(6, n_orders=200, seed=seed, cell_type="T")
        sampled = sampled_shapley_values(values[order_coalitions(orders) @ (1 << np.arange(6))], orders)
        np.testing.assert_allclose(sampled.values.sum(), values[-1] - values[0], rtol=1e-12)
        scores.append((sampled.values - exact) / sampled.standard_error)
    return np.array(scores)


def test_sampled_values_lie_about_the_exact_ones_as_their_standard_error_says():
    scores = sampled_against_exact()
    assert np.abs(scores).max() < 4.5
    # 240 scores, correlated within a seed: their spread is known to about a tenth
    assert 0.8 < scores.std() < 1.2
    assert abs(scores.mean()) < 0.1


def test_an_order_and_its_reverse_count_as_one_draw():
    # if only pairs of players interact, an order and its reverse together are exact: their mean has no error
    rng = np.random.default_rng(0)
    alone, together = rng.normal(size=5), np.triu(rng.normal(size=(5, 5)), 1)
    kept = all_coalitions(5).astype(float)
    values = kept @ alone + np.einsum("ch,hk,ck->c", kept, together, kept)
    orders = antithetic_orders(5, n_orders=6, seed=0, cell_type="T")
    sampled = sampled_shapley_values(values[order_coalitions(orders) @ (1 << np.arange(5))], orders)
    np.testing.assert_allclose(sampled.values, alone + (together + together.T).sum(axis=0) / 2, rtol=1e-12)
    np.testing.assert_allclose(sampled.standard_error, 0, atol=1e-14)
    assert len(np.unique(orders[::2], axis=0)) == 3
