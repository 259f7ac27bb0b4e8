from __future__ import annotations

import dataclasses
import random

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from amici_eval.common.errors import InvalidSpecError
from amici_eval.data.simulate import DEMO_TISSUE, PlantedEffect, TissueSpec, sender_exposure, simulate_tissue

NULL_TYPES = ("Macrophages/Monocytes", "Endothelial")


@pytest.fixture(scope="module")
def tissue():
    return simulate_tissue(DEMO_TISSUE)


def correlations(adata, *, sender, receiver, range_um):
    receivers = (adata.obs["cell_type"] == receiver).to_numpy()
    senders = (adata.obs["cell_type"] == sender).to_numpy()
    xy = adata.obsm["spatial"]
    exposure = sender_exposure(xy[receivers], xy[senders], range_um=range_um)
    expression = pd.DataFrame(adata.X[receivers], columns=adata.var_names)
    return expression.corrwith(pd.Series(exposure))


def small_spec(**changes):
    base = TissueSpec(
        n_cells=200,
        n_genes=12,
        cell_types=("A", "B"),
        proportions=(0.5, 0.5),
        effects=(PlantedEffect("A", "B", ("g1", "g2"), range_um=20.0, strength=1.0),),
        n_markers=2,
    )
    return dataclasses.replace(base, **changes)


def test_the_same_seed_gives_the_same_tissue_and_another_seed_another():
    first, second = simulate_tissue(small_spec(seed=3)), simulate_tissue(small_spec(seed=3))
    np.testing.assert_array_equal(first.adata.X, second.adata.X)
    np.testing.assert_array_equal(first.adata.obsm["spatial"], second.adata.obsm["spatial"])
    pd.testing.assert_frame_equal(first.adata.obs, second.adata.obs)
    other = simulate_tissue(small_spec(seed=4))
    assert not np.array_equal(first.adata.layers["counts"], other.adata.layers["counts"])


def test_global_generators_are_left_alone():
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    simulate_tissue(small_spec())
    assert random.getstate() == python
    np.testing.assert_array_equal(np.random.get_state()[1], numpy[1])  # noqa: NPY002


def test_layout_of_the_anndata(tissue):
    adata = tissue.adata
    assert adata.shape == (DEMO_TISSUE.n_cells, DEMO_TISSUE.n_genes)
    assert adata.X.dtype == np.float32
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    assert set(adata.obs["cell_type"].cat.categories) == set(DEMO_TISSUE.cell_types)
    assert adata.obs["cell_type"].value_counts().min() > 150
    assert set(adata.obs["region"].cat.categories) == {"left_strip", "rest"}
    xy = adata.obsm["spatial"]
    assert (xy >= 0).all()
    assert (xy <= DEMO_TISSUE.window_um).all()
    left = adata.obs["region"] == "left_strip"
    assert xy[left, 0].max() < xy[~left, 0].min()
    assert 0.15 < left.mean() < 0.25
    assert tissue.effects == DEMO_TISSUE.effects


def test_expression_is_normalised_to_the_median_total_and_logged(tissue):
    totals = tissue.adata.layers["counts"].sum(axis=1)
    np.testing.assert_allclose(np.expm1(tissue.adata.X).sum(axis=1), np.median(totals), rtol=1e-4)


def test_cells_do_not_overlap(tissue):
    xy = tissue.adata.obsm["spatial"]
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 1.0


@pytest.mark.parametrize("effect", DEMO_TISSUE.effects, ids=lambda e: f"{e.sender} to {e.receiver}")
def test_planted_genes_rise_with_exposure_and_no_gene_outside_the_receivers_effects_does(tissue, effect):
    r = correlations(tissue.adata, sender=effect.sender, receiver=effect.receiver, range_um=effect.range_um)
    of_receiver = {gene for e in DEMO_TISSUE.effects if e.receiver == effect.receiver for gene in e.genes}
    assert r[list(effect.genes)].min() > 0.7
    assert r.drop(list(of_receiver)).max() < 0.2


@pytest.mark.parametrize("receiver", NULL_TYPES)
def test_null_types_do_not_respond_to_any_sender(tissue, receiver):
    for sender in DEMO_TISSUE.cell_types:
        if sender != receiver:
            r = correlations(tissue.adata, sender=sender, receiver=receiver, range_um=15.0)
            assert r.abs().max() < 0.3
            assert r.abs().mean() < 0.1


def test_neighbourhoods_of_a_receiver_type_differ(tissue):
    adata = tissue.adata
    xy, types = adata.obsm["spatial"], adata.obs["cell_type"].to_numpy()
    for effect in DEMO_TISSUE.effects:
        exposure = sender_exposure(xy[types == effect.receiver], xy[types == effect.sender], range_um=effect.range_um)
        low, high = np.quantile(exposure, [0.1, 0.9])
        assert low < 0.15
        assert high > 0.6


def test_a_negative_strength_lowers_the_genes():
    effect = PlantedEffect("A", "B", ("g1", "g2"), range_um=25.0, strength=-2.0)
    adata = simulate_tissue(small_spec(n_cells=600, effects=(effect,), mean_counts=400.0, niche_contrast=2.0)).adata
    assert correlations(adata, sender="A", receiver="B", range_um=25.0)[["g1", "g2"]].max() < -0.3


def test_without_dispersion_counts_are_poisson():
    spec = small_spec(n_cells=4000, effects=(), dispersion=0.0, depth_sd=0.0)
    adata = simulate_tissue(spec).adata
    counts = adata.layers["counts"][(adata.obs["cell_type"] == "A").to_numpy()]
    np.testing.assert_allclose(counts.var(axis=0) / counts.mean(axis=0), 1.0, atol=0.15)


def test_exposure_matches_the_sum_over_all_pairs():
    rng = np.random.default_rng(0)
    receivers, senders = rng.uniform(0, 100, size=(40, 2)), rng.uniform(0, 100, size=(30, 2))
    distance = np.linalg.norm(receivers[:, None] - senders[None], axis=2)
    expected = 1 - np.exp(-np.exp(-((distance / 12.0) ** 2)).sum(axis=1))
    np.testing.assert_allclose(sender_exposure(receivers, senders, range_um=12.0), expected, atol=1e-3)
    np.testing.assert_array_equal(sender_exposure(receivers, senders[:0], range_um=12.0), np.zeros(40))


def test_h5ad_round_trip(tissue, tmp_path):
    path = tmp_path / "tissue.h5ad"
    before = tissue.adata.copy()
    tissue.adata.write_h5ad(path)
    back = ad.read_h5ad(path)
    np.testing.assert_array_equal(back.X, before.X)
    np.testing.assert_array_equal(back.layers["counts"], before.layers["counts"])
    np.testing.assert_array_equal(back.obsm["spatial"], before.obsm["spatial"])
    pd.testing.assert_frame_equal(back.obs, before.obs)
    planted = back.uns["planted_effects"]
    assert len(planted) == sum(len(e.genes) for e in DEMO_TISSUE.effects)
    first = DEMO_TISSUE.effects[0]
    row = planted.iloc[0]
    assert (row["sender"], row["receiver"], row["gene"]) == (first.sender, first.receiver, first.genes[0])
    assert (row["range_um"], row["strength"]) == (first.range_um, first.strength)


def test_a_tissue_without_effects_can_be_written_too(tmp_path):
    adata = simulate_tissue(small_spec(effects=())).adata
    adata.write_h5ad(tmp_path / "null.h5ad")
    assert len(ad.read_h5ad(tmp_path / "null.h5ad").uns["planted_effects"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sender": "B"}, "sender and receiver are both 'B': .*one cell type to another; name two different"),
        ({"genes": ()}, r"genes=\(\): .*at least one gene.*; name every responding gene exactly once"),
        ({"genes": ("g", "g")}, r"genes=\('g', 'g'\): .*each gene once; "),
        ({"range_um": 0.0}, "range_um=0.0: must be a positive number; use a value above 0"),
        ({"range_um": float("nan")}, "range_um=nan: must be a positive number; "),
        ({"strength": 0.0}, "strength=0.0: the log fold change must be finite and not 0; give a number"),
        ({"strength": float("inf")}, "strength=inf: the log fold change must be finite"),
    ],
)
def test_an_effect_refuses_what_cannot_be_planted(changes, message):
    effect = PlantedEffect("A", "B", ("g1",), range_um=20.0, strength=1.0)
    with pytest.raises(InvalidSpecError, match=message):
        dataclasses.replace(effect, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell_types": ("A", "A")}, r"cell_types=\('A', 'A'\): at least two cell types.*; name each cell type once"),
        ({"cell_types": ("A", "")}, r"cell_types=\('A', ''\): .*not empty; "),
        ({"proportions": (0.5, 0.4)}, r"proportions=\(0.5, 0.4\) for 2 cell types: .*summing to 1; .*their sum"),
        ({"proportions": (1.0,)}, r"proportions=\(1.0,\) for 2 cell types: one positive proportion per cell type"),
        ({"proportions": (1.5, -0.5)}, r"proportions=\(1.5, -0.5\) for 2 cell types: one positive proportion"),
        ({"n_cells": 19}, "n_cells=19 for 2 cell types: at least 10 cells per cell type; use n_cells=20 or more"),
        ({"cell_types": ("A", "C")}, "effects name B: senders and receivers are among the cell types A, C; add the"),
        ({"n_markers": -1}, "n_markers=-1: must not be negative; use 0 or more"),
        ({"n_genes": 5}, "n_genes=5: the effects and the markers alone need 6 genes; use n_genes=6 or more"),
        ({"window_um": (100.0, 0.0)}, r"window_um=\(100.0, 0.0\): a positive width and a positive height; give both"),
        ({"niche_um": -1.0}, "niche_um=-1.0: must be a positive number; use a value above 0"),
        ({"mean_counts": 0.0}, "mean_counts=0.0: must be a positive number; use a value above 0"),
        ({"niche_contrast": -1.0}, "niche_contrast=-1.0: must not be negative; use 0 or more"),
        ({"dispersion": -0.1}, "dispersion=-0.1: must not be negative; use 0 or more"),
        ({"depth_sd": -0.1}, "depth_sd=-0.1: must not be negative; use 0 or more"),
        ({"region_fraction": 1.0}, "region_fraction=1.0: must lie between 0 and 1, both excluded; use a share"),
        ({"seed": -1}, "seed=-1: must not be negative; use 0 or more"),
    ],
)
def test_a_tissue_refuses_what_cannot_be_simulated(changes, message):
    with pytest.raises(InvalidSpecError, match=message):
        small_spec(**changes)
