"""Fixtures that more than one room needs: a small tissue, a small AMICI trained on it, a tracking store of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real tissue and models, where they lie beside the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no real tissue beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def _tissue() -> AnnData:
    from amici_eval.simulate import DEMO_TISSUE, simulate_tissue

    return simulate_tissue(replace(DEMO_TISSUE, n_cells=500, n_genes=40, window_um=(250.0, 250.0))).adata


@pytest.fixture
def adata(_tissue: AnnData) -> AnnData:
    """A simulated tissue of 500 cells x 40 genes, a fresh copy for each test."""
    return _tissue.copy()


@pytest.fixture(scope="session")
def amici_dir(_tissue: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``AMICI.save`` writes of a small model (2 heads x 4, 8 neighbours) trained on the tissue's region "rest"."""
    from amici_eval.model.training import train_amici

    rows = np.flatnonzero((_tissue.obs["region"] == "rest").to_numpy())
    model = train_amici(
        _tissue,
        labels_key="cell_type",
        coord_obsm_key="spatial",
        n_neighbors=8,
        seed=0,
        max_epochs=4,
        batch_size=128,
        train_indices=rows,
        model_params={
            "n_heads": 2,
            "n_head_size": 4,
            "n_query_dim": 16,
            "n_kv_dim": 16,
            "n_nn_embed": 16,
            "n_nn_embed_hidden": 16,
            "n_query_embed_hidden": 16,
            "n_pos_coef_mlp_hidden": 16,
            "distance_kernel_unit_scale": 10.0,
        },
    )
    folder = tmp_path_factory.mktemp("amici") / "model"
    model.save(str(folder))
    return folder


@pytest.fixture
def trained(amici_dir: Path, adata: AnnData):
    """The small model as amici_eval reads it."""
    from amici_eval.model.checkpoint import read_amici_directory

    return read_amici_directory(amici_dir, adata=adata, trust=False)


@pytest.fixture
def native(amici_dir: Path, adata: AnnData):
    """The small model as AMICI itself loads it, on a copy of the tissue."""
    import amici

    from amici_eval.model.checkpoint import own_data_loader

    with own_data_loader():
        return amici.AMICI.load(str(amici_dir), adata=adata.copy())


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A SQLite tracking store in the test's folder, which is the current folder; nothing of it outlives the test."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("MLFLOW_RUN", "MLFLOW_EXPERIMENT", "MLFLOW_TRACKING", "AMICI_EVAL")):
            monkeypatch.delenv(name)
    before = mlflow.get_tracking_uri()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    try:
        yield uri
    finally:
        while mlflow.active_run() is not None:
            mlflow.end_run("FAILED")
        mlflow.set_tracking_uri(before)
