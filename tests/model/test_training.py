from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.data.simulate import PlantedEffect, TissueSpec, simulate_tissue
from tests.conftest import small_sizes

pytestmark = pytest.mark.amici

SETTINGS = {"n_neighbors": 5, "seed": 1, "max_epochs": 2, "batch_size": 100, "model_params": small_sizes(8)}


@pytest.fixture(scope="module")
def training():
    return pytest.importorskip("amici_eval.model.training")


@pytest.fixture
def adata():
    spec = TissueSpec(
        n_cells=250,
        n_genes=10,
        cell_types=("CD8+_T_Cells", "Tumor", "B/Plasma"),
        proportions=(0.4, 0.3, 0.3),
        effects=(PlantedEffect("CD8+_T_Cells", "Tumor", ("IDO1",), range_um=20.0, strength=1.0),),
        window_um=(150.0, 150.0),
        n_markers=2,
    )
    return simulate_tissue(spec).adata


def test_training_leaves_no_trace(training, adata, tmp_path, monkeypatch, capfd):
    import torch
    from scvi.dataloaders import DataSplitter

    monkeypatch.chdir(tmp_path)
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories("no_such_cell")
    before = adata.copy()
    loader_cls, environment = DataSplitter.data_loader_cls, dict(os.environ)
    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    capfd.readouterr()

    train_indices = np.flatnonzero(adata.obs["region"] == "rest")
    penalty = training.AttentionPenalty(start_epoch=0, end_epoch=1, start=1e-4, end=1e-3)
    model = training.train_amici(adata, train_indices=train_indices, attention_penalty=penalty, **SETTINGS)

    assert model.is_trained
    assert not model.module.training
    assert model.summary_stats.n_labels == 3
    assert model.module.attention_penalty_coef == 1e-3
    np.testing.assert_array_equal(model.train_indices, train_indices)
    held_out = np.flatnonzero(adata.obs["region"] == "left_strip")
    np.testing.assert_array_equal(model.validation_indices, held_out)

    assert list(adata.obs.columns) == list(before.obs.columns)
    assert list(adata.obsm) == list(before.obsm)
    assert list(adata.uns) == list(before.uns)
    assert list(adata.obs["cell_type"].cat.categories) == list(before.obs["cell_type"].cat.categories)
    np.testing.assert_array_equal(adata.X, before.X)
    np.testing.assert_array_equal(adata.obsm["spatial"], before.obsm["spatial"])
    assert random.getstate() == python
    np.testing.assert_array_equal(np.random.get_state()[1], numpy[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state)
    assert DataSplitter.data_loader_cls is loader_cls
    assert dict(os.environ) == environment
    assert list(Path.cwd().iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_seed_decides_weights_and_split_and_the_batch_size_is_honoured(training, adata):
    import torch

    steps = []
    for seed in (1, 1, 2):
        model = training.train_amici(adata, **{**SETTINGS, "seed": seed})
        steps.append((model.module.linear_head.weight.detach().clone(), model.train_indices))
    (first, split), (again, same_split), (other, other_split) = steps
    assert torch.equal(first, again)
    np.testing.assert_array_equal(split, same_split)
    assert len(split) == 225
    assert not torch.equal(first, other)
    assert not np.array_equal(split, other_split)

    one_batch = training.train_amici(adata, **{**SETTINGS, "batch_size": 1000})
    assert not torch.equal(first, one_batch.module.linear_head.weight)


def test_a_trained_model_can_be_saved_and_loaded(training, adata, tmp_path):
    from amici import AMICI

    model = training.train_amici(adata, **SETTINGS)
    model.save(str(tmp_path / "model"))
    loaded = AMICI.load(str(tmp_path / "model"), adata=adata.copy(), accelerator="cpu")
    expected = model.get_predictions(batch_size=250, prog_bar=False)
    np.testing.assert_allclose(loaded.get_predictions(batch_size=250, prog_bar=False), expected, atol=1e-6)


def test_sparse_expression_gives_the_same_model(training, adata):
    import torch
    from scipy.sparse import csr_matrix

    dense = training.train_amici(adata, **SETTINGS)
    adata.X = csr_matrix(adata.X)
    sparse = training.train_amici(adata, **SETTINGS)
    assert torch.equal(dense.module.linear_head.weight, sparse.module.linear_head.weight)


def test_loader_class_and_generators_are_restored_when_training_fails(training, adata):
    from scvi.dataloaders import DataSplitter

    loader_cls, numpy = DataSplitter.data_loader_cls, np.random.get_state()  # noqa: NPY002
    with pytest.raises(TypeError, match="no_such_parameter"):
        training.train_amici(adata, **{**SETTINGS, "model_params": {"no_such_parameter": 1}})
    assert DataSplitter.data_loader_cls is loader_cls
    np.testing.assert_array_equal(np.random.get_state()[1], numpy[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_neighbors": 250}, "n_neighbors=250: it must be between 1 and .*; use fewer neighbours"),
        ({"max_epochs": 0}, "max_epochs=0: it must be at least 1; use a positive number"),
        ({"batch_size": 0}, "batch_size=0: it must be at least 1; use a positive number"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: it must be positive; use a value such as 0.001"),
        ({"seed": -1}, "seed=-1: it must be between 0 and .*; use a seed such as 0"),
        ({"train_indices": []}, r"train_indices has shape \(0,\).*: it must be a list of row numbers, not empty; pass"),
        ({"train_indices": [True, False]}, "train_indices has shape .* dtype bool: it must be a list of row numbers"),
        ({"train_indices": [0, 0]}, "1 different numbers among 2, from 0 to 0: all must differ and lie between 0"),
        ({"train_indices": [0, 250]}, "from 0 to 250: all must differ and lie between 0 and 249; pass"),
    ],
)
def test_settings_that_cannot_work_are_refused(training, adata, changes, message):
    with pytest.raises(InvalidSpecError, match=message):
        training.train_amici(adata, **{**SETTINGS, **changes})


def test_data_that_cannot_be_trained_on_is_refused(training, adata):
    with pytest.raises(DataError, match="no obs column 'kind': training needs a cell type per cell; set labels_key"):
        training.train_amici(adata, labels_key="kind", **SETTINGS)
    with pytest.raises(DataError, match="no obsm entry 'xy': training needs positions; set coord_obsm_key"):
        training.train_amici(adata, coord_obsm_key="xy", **SETTINGS)
    adata.obs.iloc[0, 0] = None
    with pytest.raises(DataError, match="1 cells have no 'cell_type': every cell needs a cell type; label these"):
        training.train_amici(adata, **SETTINGS)
