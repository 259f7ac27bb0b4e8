from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from amici_eval.stats.ablation.ablations import (
    all_coalitions,
    antithetic_orders,
    interaction_index,
    order_coalitions,
    sampled_shapley_values,
    shapley_values,
)
from amici_eval.stats.ablation.coalitions import coalition_moments, coalition_values
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
    def arguments(self):
        return self.z, self.centred @ self.readout.weights, float((self.centred**2).sum()), self.readout


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
    values = coalition_values(*case.arguments, coalitions=kept)
    np.testing.assert_allclose(values, expected, rtol=1e-11, atol=1e-11)
    assert values.dtype == np.float64
    assert len(np.unique(np.round(values, 6))) == 2**n_heads
    np.testing.assert_array_equal(coalition_values(*case.arguments, coalitions=kept.astype(np.int64)), values)


def test_values_equal_those_of_predictions_at_a_real_size():
    case = draw(1, n_cells=700, n_heads=5, head_size=16, n_genes=30)
    kept = all_coalitions(5)[[0, 1, 6, 21, 31]]
    total = case.targets.var(axis=0).sum()
    expected = [
        1 - (case.readout.predict(case.z, members(row)) - case.targets).var(axis=0).sum() / total for row in kept
    ]
    np.testing.assert_allclose(coalition_values(*case.arguments, coalitions=kept), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("block", [1, 3, 512])
@pytest.mark.parametrize("chunk_cells", [1, 4, 17, 1000])
def test_chunks_and_blocks_change_nothing_but_rounding(chunk_cells, block, monkeypatch):
    case = draw(2)
    kept = all_coalitions(3)
    expected = coalition_values(*case.arguments, coalitions=kept)
    monkeypatch.setattr("amici_eval.stats.ablation.coalitions._COALITION_BLOCK", block)
    chunked = coalition_values(*case.arguments, coalitions=kept, chunk_cells=chunk_cells)
    np.testing.assert_allclose(chunked, expected, rtol=0, atol=1e-12)


def test_without_heads_nothing_is_explained():
    case = draw(6, n_cells=500)
    values = coalition_values(*case.arguments, coalitions=[[0, 0, 0], [1, 0, 0]], device="cpu")
    assert values[0] == 0.0
    assert values[1] != 0.0


def test_the_order_of_cells_does_not_matter():
    case = draw(3, n_cells=50)
    order = np.random.default_rng(0).permutation(50)
    z, projected, total, readout = case.arguments
    kept = all_coalitions(3)
    np.testing.assert_allclose(
        coalition_values(z[order], projected[order], total, readout, coalitions=kept, chunk_cells=7),
        coalition_values(z, projected, total, readout, coalitions=kept, chunk_cells=7),
        rtol=0,
        atol=1e-12,
    )


def test_inputs_are_left_alone_and_float32_targets_are_close():
    case = draw(4)
    z, projected, total, readout = case.arguments
    before = z.copy(), projected.copy()
    values = coalition_values(z, projected, total, readout, coalitions=all_coalitions(3))
    np.testing.assert_array_equal(z, before[0])
    np.testing.assert_array_equal(projected, before[1])
    single = coalition_values(z, projected.astype(np.float32), total, readout, coalitions=all_coalitions(3))
    np.testing.assert_allclose(single, values, atol=1e-5)


def test_covariances_of_blocks_equal_those_of_predictions():
    case = draw(5)
    z, projected, _, readout = case.arguments
    moments = coalition_moments(z, projected, readout, coalitions=[[1, 0, 1], [1, 1, 1]])
    x = np.concatenate([np.ones((len(z), 1)), z], axis=1)
    for row, heads in enumerate([(0, 2), (0, 1, 2)]):
        sigma = readout.scale(z, heads)[:, None]
        parts = []
        for columns in ([0], [1, 2], [3, 4], [5, 6]):
            part = x[:, columns] @ readout.weights[:, columns].T / sigma
            parts.append(part - part.mean(axis=0))
        expected = [[(a * b).sum() for b in parts] for a in parts]
        np.testing.assert_allclose(moments.block_covariances(row), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"coalitions": np.ones((2, 4), dtype=bool)},
            r"coalitions have shape \(2, 4\); they must be \(coalitions, 3\)",
        ),
        ({"coalitions": np.array([[0, 2, 1]])}, "coalitions hold 2; 1 keeps a head, 0 removes it"),
        ({"target_ss": 0.0}, "target_ss is 0.0; explained variance is undefined"),
        ({"target_ss": np.nan}, "target_ss is nan"),
        ({"z": np.zeros((17, 5))}, r"z has shape \(17, 5\), projected \(17, 7\); a readout of 3 heads of 2"),
        ({"projected": np.zeros((16, 7))}, r"projected \(16, 7\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    names = ("z", "projected", "target_ss", "readout")
    arguments = {**dict(zip(names, draw(0).arguments, strict=True)), "coalitions": all_coalitions(3), **change}
    coalitions = arguments.pop("coalitions")
    with pytest.raises(ValueError, match=message):
        coalition_values(*arguments.values(), coalitions=coalitions)


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
    with pytest.raises(ValueError, match=r"values have shape \(6,\); one value for each of the 2\*\*heads"):
        shapley_values(np.zeros(6))


def test_sampled_orders_are_pairs_of_reverses_and_depend_on_their_number_alone():
    orders = antithetic_orders(6, n_orders=40, seed=3, cell_type="T")
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(6), (40, 1)))
    np.testing.assert_array_equal(orders[1::2], orders[::2, ::-1])
    np.testing.assert_array_equal(antithetic_orders(6, n_orders=12, seed=3, cell_type="T"), orders[:12])
    assert len(np.unique(orders, axis=0)) > 20
    for other in ({"seed": 4, "cell_type": "T"}, {"seed": 3, "cell_type": "U"}):
        assert (antithetic_orders(6, n_orders=40, **other) != orders).any()
    for n_orders in (0, 2, 7):
        with pytest.raises(ValueError, match=f"{n_orders} sampled orders of heads; an even number of at least 4"):
            antithetic_orders(6, n_orders=n_orders, seed=0, cell_type="T")


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
