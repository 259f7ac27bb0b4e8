"""Predictors that know no head, on tissues where what they look at is planted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.spatial import cKDTree

from amici_eval.data.tissue import ExpressionBlock
from amici_eval.evaluation import baselines
from amici_eval.evaluation.baselines import DESIGNS, evaluate_baselines
from amici_eval.stats.explained_variance import explained_variance
from amici_eval.stats.ridge import RidgeSums, choose_penalty, fit_ridge
from tests.fakes import make_card

if TYPE_CHECKING:
    from amici_eval.common.model_card import ModelCard

TYPES = ("A", "B+/x", "C")
N_GENES, N_NEIGHBOURS = 6, 8


@dataclass
class FakeTissue:
    """Offers what baselines need (``TissueAccess``) from plain arrays, one row per cell."""

    card: ModelCard
    names: np.ndarray
    label_codes: np.ndarray
    xy: np.ndarray
    neighbour_rows: np.ndarray
    values: np.ndarray
    sections: np.ndarray | None = None
    block: int = 50
    read: list[int] = field(default_factory=list)

    def cell_names(self, rows):
        return self.names[rows].tolist()

    def coordinates(self, rows):
        return self.xy[rows]

    def samples(self, rows):
        return None if self.sections is None else self.sections[rows]

    def expression_blocks(self, rows):
        self.read.append(len(rows))
        order = np.argsort(rows, kind="stable")
        for start in range(0, len(rows), self.block):
            positions = order[start : start + self.block]
            yield ExpressionBlock(positions=positions, values=self.values[rows[positions]])

    def receivers(self):
        return {name: np.flatnonzero(self.label_codes == code) for code, name in enumerate(self.card.cell_types)}

    def reordered(self, order):
        """Return the same tissue with its cells stored in another order."""
        place = np.argsort(order)
        sections = None if self.sections is None else self.sections[order]
        return replace(
            self,
            names=self.names[order],
            label_codes=self.label_codes[order],
            xy=self.xy[order],
            neighbour_rows=place[self.neighbour_rows[order]],
            values=self.values[order],
            sections=sections,
        )


def make_tissue(n_cells=900, *, planted="noise", seed=0, sections=None):
    """Return a tissue in which half of each gene's variation comes from what is planted."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0.0, 100.0, (n_cells, 2))
    # patches, or every cell would see the same composition
    codes = (np.sin(xy[:, 0] / 9.0) + np.cos(xy[:, 1] / 7.0) + rng.normal(size=n_cells) > 0.3).astype(np.int64)
    codes[rng.random(n_cells) < 0.3] = 2
    neighbours = np.empty((n_cells, N_NEIGHBOURS), dtype=np.int64)
    for code in range(3):
        others = np.flatnonzero(codes != code)
        neighbours[codes == code] = others[cKDTree(xy[others]).query(xy[codes == code], k=N_NEIGHBOURS)[1]]
    values = rng.normal(size=(n_cells, N_GENES))
    signal = {
        "noise": None,
        "types": codes[neighbours].mean(axis=1)[:, None],
        "position": np.sin(xy[:, [0]] / 12.0) + xy[:, [1]] / 50.0,
    }[planted]
    for code in range(3 if signal is not None else 0):
        own = codes == code
        values[own] += (signal[own] - signal[own].mean(axis=0)) / signal[own].std(axis=0)
    return FakeTissue(
        card=make_card(n_neighbors=N_NEIGHBOURS, genes=tuple(f"g{i}" for i in range(N_GENES)), cell_types=TYPES),
        names=np.array([f"cell{i:05d}" for i in range(n_cells)], dtype=object),
        label_codes=codes,
        xy=xy,
        neighbour_rows=neighbours,
        values=(values + 3.0).astype(np.float32),
        sections=sections,
    )


def evaluated(tissue, receivers=None, *, fitted=None, **more):
    receivers = tissue.receivers() if receivers is None else receivers
    heads = np.full((2, len(receivers)), 0.2)
    return evaluate_baselines(tissue, receivers, expl_var=heads, expl_var_full=heads[0] + 0.1, fitted=fitted, **more)


def sums_of(design, targets):
    sums = RidgeSums(design.shape[1], N_GENES)
    sums.add(design, targets)
    return sums.moments()


def refitted(moments):
    return fit_ridge(moments, penalty=choose_penalty(moments).penalty)


def test_what_is_planted_in_composition_or_position_is_found_there():
    composition = evaluated(make_tissue(planted="types")).expl_var
    assert (composition[0, :2] > 0.4).all()
    position = evaluated(make_tissue(planted="position")).expl_var
    assert (position[2] > 0.35).all()
    assert (position[2] > position[0] + 0.1).all()


def test_what_neighbours_express_is_found():
    rng = np.random.default_rng(0)
    tissue = make_tissue()
    sent = tissue.values[tissue.neighbour_rows].mean(axis=1) @ rng.normal(size=(N_GENES, N_GENES))
    receiving = tissue.label_codes == 0
    tissue.values[receiving] = 0.2 * tissue.values[receiving] + 2.0 * sent[receiving]
    found = evaluated(tissue).expl_var[:, 0]
    assert found[1] > 0.6
    assert found[1] > found[0] + 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_explains_nothing_in_cells_held_out(seed):
    tissue = make_tissue(seed=seed)
    held_out = tissue.xy[:, 0] > 60.0
    receivers = {name: rows[held_out[rows]] for name, rows in tissue.receivers().items()}
    found = evaluated(tissue, receivers, fitted=~held_out)
    assert found.fitted_on == "training cells"
    assert (found.expl_var < 0.03).all()
    assert (found.gain <= 0.2).all()
    assert (found.gain > 0.15).all()


def test_training_cells_that_are_not_evaluated_are_fitted_and_others_are_not():
    tissue = make_tissue(planted="types")
    rng = np.random.default_rng(0)
    training, scored = rng.random(len(tissue.names)) < 0.5, rng.random(len(tissue.names)) < 0.6
    receivers = {name: rows[scored[rows]] for name, rows in tissue.receivers().items()}
    found = evaluated(tissue, receivers, fitted=training, n_folds=1)
    for index, rows in enumerate(receivers.values()):
        counts = np.stack(
            [(tissue.label_codes[tissue.neighbour_rows] == code).sum(axis=1) for code in range(3)], axis=1
        )
        own = np.flatnonzero(training & (tissue.label_codes == index))
        fit = refitted(sums_of(counts[own], tissue.values[own]))
        by_hand = explained_variance(counts[rows] @ fit.weights + fit.intercept, tissue.values[rows]).aggregated
        assert found.expl_var[0, index] == pytest.approx(by_hand, abs=1e-8)
        around = tissue.values[tissue.neighbour_rows].mean(axis=1)
        fit = refitted(sums_of(around[own], tissue.values[own]))
        by_hand = explained_variance(around[rows] @ fit.weights + fit.intercept, tissue.values[rows]).aggregated
        assert found.expl_var[1, index] == pytest.approx(by_hand, abs=1e-5)


def test_cells_that_are_fitted_are_predicted_by_the_other_folds():
    tissue = make_tissue(planted="types").reordered(np.random.default_rng(2).permutation(900))
    training = np.random.default_rng(0).random(900) < 0.7
    scored = tissue.xy[:, 0] > 30.0
    receivers = {name: rows[scored[rows]] for name, rows in tissue.receivers().items()}
    found = evaluated(tissue, receivers, fitted=training, n_folds=3)
    counts = np.stack([(tissue.label_codes[tissue.neighbour_rows] == code).sum(axis=1) for code in range(3)], axis=1)
    for index, rows in enumerate(receivers.values()):
        own = np.flatnonzero(training & (tissue.label_codes == index))
        both = np.array(sorted(set(own.tolist()) & set(rows.tolist()), key=lambda row: tissue.names[row]))
        penalty = choose_penalty(sums_of(counts[own], tissue.values[own])).penalty
        predictions = np.empty((900, N_GENES))
        for unseen in (*(both[fold::3] for fold in range(3)), np.setdiff1d(rows, own)):
            seen = np.setdiff1d(own, unseen)
            fit = fit_ridge(sums_of(counts[seen], tissue.values[seen]), penalty=penalty)
            # the level is that of all fitted cells
            predictions[unseen] = (counts[unseen] - counts[own].mean(axis=0)) @ fit.weights
        by_hand = explained_variance(predictions[rows], tissue.values[rows]).aggregated
        assert found.expl_var[0, index] == pytest.approx(by_hand, abs=1e-8)


def test_folds_keep_noise_from_explaining_the_cells_that_were_fitted():
    values = {1: [], 5: []}
    for seed in range(5):
        tissue = make_tissue(seed=seed)
        receivers = {name: rows[:40] for name, rows in tissue.receivers().items()}
        for n_folds, found in values.items():
            found.append(evaluated(tissue, receivers, n_folds=n_folds).expl_var)
    assert np.mean(values[1]) > 0.015
    assert np.mean(values[5]) < 0.005


@pytest.mark.parametrize("change", ["order", "blocks", "chunks", "rooms"])
def test_order_of_cells_blocks_and_chunks_change_nothing(monkeypatch, change):
    sections = np.where(np.arange(900) % 3 == 0, "left", "right").astype(object)
    tissue = make_tissue(planted="position", sections=sections)
    whole = evaluated(tissue)
    if change == "order":
        tissue = tissue.reordered(np.random.default_rng(5).permutation(900))
    elif change == "blocks":
        tissue = replace(tissue, block=7)
    elif change == "chunks":
        monkeypatch.setattr(baselines, "_CHUNK_ROWS", 256)
        monkeypatch.setattr(baselines, "_CHUNK_VALUES", 1)
    else:
        monkeypatch.setattr(baselines, "_MOMENT_BYTES", 1)
    tissue.read.clear()
    other = evaluated(tissue)
    np.testing.assert_allclose(other.expl_var, whole.expl_var, atol=1e-6)
    assert len(tissue.read) == {"chunks": 4, "rooms": 3}.get(change, 1)


def test_sections_with_levels_of_their_own_are_told_apart_by_position_alone():
    sections = np.where(np.arange(900) % 2 == 0, "one", "two").astype(object)
    tissue = make_tissue(sections=sections)
    tissue.values[sections == "one"] += 3.0
    assert (evaluated(tissue).expl_var[2] > 0.5).all()
    assert (evaluated(replace(tissue, sections=None)).expl_var[2] < 0.1).all()


def test_gain_is_over_the_best_baseline_or_over_nothing():
    tissue = make_tissue(planted="position")
    found = evaluated(tissue)
    assert found.names == DESIGNS
    assert found.fitted_on == "all evaluated cells"
    best = found.expl_var.max(axis=0)
    np.testing.assert_allclose(found.gain, 0.2 - np.stack([best, best]))
    np.testing.assert_allclose(found.full_gain, 0.3 - best)
    found.check({"heads": 2, "types": 3})
    assert np.isnan(found.without_nearest).all()
    masked = np.arange(9.0).reshape(3, 3)
    carried = evaluated(tissue, without_nearest=masked)
    np.testing.assert_array_equal([*carried.without_nearest, carried.full_without_nearest], masked)


def test_in_a_new_tissue_baselines_are_fitted_to_the_evaluated_cells():
    tissue = make_tissue(planted="types")
    new, unknown = (evaluated(tissue, fitted=fitted) for fitted in (np.zeros(len(tissue.names), dtype=bool), None))
    assert new.fitted_on == unknown.fitted_on == "all evaluated cells"
    np.testing.assert_array_equal(new.expl_var, unknown.expl_var)
    assert np.isfinite(new.expl_var).all()


def test_too_few_cells_to_fit_or_score_leave_a_type_undefined():
    tissue = make_tissue()
    receivers = tissue.receivers()
    receivers["A"], receivers["C"] = receivers["A"][:9], receivers["C"][:1]
    done = []
    found = evaluated(tissue, receivers, progress=done.append)
    assert sum(done) == sum(len(rows) for rows in receivers.values())
    assert np.isnan(found.expl_var[:, [0, 2]]).all()
    assert np.isnan(found.gain[:, [0, 2]]).all()
    assert np.isfinite(found.expl_var[:, 1]).all()
    of_one_type = evaluated(tissue, fitted=tissue.label_codes == 1)
    assert np.isnan(of_one_type.expl_var[:, [0, 2]]).all()
    assert np.isnan(of_one_type.full_gain[[0, 2]]).all()
    assert of_one_type.fitted_on == "training cells"
    with pytest.raises(ValueError, match=r"expl_var has shape \(2, 2\), expl_var_full \(3,\); \(heads, 3\)"):
        evaluate_baselines(
            tissue, tissue.receivers(), expl_var=np.zeros((2, 2)), expl_var_full=np.zeros(3), fitted=None
        )
    with pytest.raises(ValueError, match="n_folds=11: 1 to 10 are possible"):
        evaluated(tissue, n_folds=11)


def test_above_some_genes_neighbours_are_seen_through_fixed_projections(monkeypatch):
    tissue = make_tissue(planted="types")
    plain = evaluated(tissue).expl_var
    monkeypatch.setattr(baselines, "_MOST_GENES", N_GENES)
    np.testing.assert_array_equal(evaluated(tissue).expl_var, plain)
    monkeypatch.setattr(baselines, "_MOST_GENES", N_GENES - 1)
    monkeypatch.setattr(baselines, "_PROJECTED", 4)
    found = evaluated(tissue, n_folds=1).expl_var
    np.testing.assert_array_equal(found, evaluated(tissue, n_folds=1).expl_var)
    rng = np.random.Generator(np.random.Philox(key=0))
    weights = rng.standard_normal((N_GENES, 4), dtype=np.float32) / 2.0
    for index, rows in enumerate(tissue.receivers().values()):
        design = tissue.values[tissue.neighbour_rows[rows]].mean(axis=1) @ weights
        fit = refitted(sums_of(design, tissue.values[rows]))
        by_hand = explained_variance(design @ fit.weights + fit.intercept, tissue.values[rows]).aggregated
        assert found[1, index] == pytest.approx(by_hand, abs=1e-5)


def test_nothing_handed_in_changes():
    tissue = make_tissue()
    before = SimpleNamespace(values=tissue.values.copy(), rows=tissue.neighbour_rows.copy(), xy=tissue.xy.copy())
    evaluated(tissue)
    np.testing.assert_array_equal(tissue.values, before.values)
    np.testing.assert_array_equal(tissue.neighbour_rows, before.rows)
    np.testing.assert_array_equal(tissue.xy, before.xy)
