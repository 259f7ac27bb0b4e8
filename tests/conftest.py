"""Fixtures of several packages: a small tissue, a small AMICI trained on it, a tracking store of its own."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.sparse import csr_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

# a run, a store or an experiment that the caller works in is not for tests
for _name in [name for name in os.environ if name.startswith(("MLFLOW_RUN", "MLFLOW_EXPERIMENT", "MLFLOW_TRACKING"))]:
    del os.environ[_name]
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "AMICI_EVAL_"))}


def _forget() -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AMICI_EVAL_"))]:
        if name not in _ENVIRONMENT:
            del os.environ[name]
    os.environ.update(_ENVIRONMENT)
    if store := sys.modules.get("amici_eval.tracking.store"):
        store.set_patience(0.0)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Forget what fixtures of several tests, a test, or a command called in it, leave in the environment."""
    _forget()
    yield
    _forget()


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real tissue and models, where they lie beside the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no real tissue beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def _tissue() -> AnnData:
    from amici_eval.data.simulate import DEMO_TISSUE, simulate_tissue

    tissue = simulate_tissue(replace(DEMO_TISSUE, n_cells=500, n_genes=40, window_um=(250.0, 250.0))).adata
    # as most tissues are stored
    tissue.X = csr_matrix(tissue.X)
    return tissue


@pytest.fixture
def adata(_tissue: AnnData) -> AnnData:
    """A simulated tissue of 500 cells x 40 genes, expression in CSR form, a fresh copy for each test."""
    return _tissue.copy()


SMALL_MODEL = {
    "n_heads": 2,
    "n_head_size": 4,
    "n_query_dim": 16,
    "n_kv_dim": 16,
    "n_nn_embed": 16,
    "n_nn_embed_hidden": 16,
    "n_query_embed_hidden": 16,
    "n_pos_coef_mlp_hidden": 16,
    "distance_kernel_unit_scale": 10.0,
}


def train_plainly(adata: AnnData, rows: np.ndarray, *, epochs: int = 4):
    """Train an AMICI with AMICI's own means on some rows of a tissue, as its users do."""
    import amici
    import scvi

    from amici_eval.model.training import own_data_loader

    own = adata.copy()
    own.obs["cell_type"] = own.obs["cell_type"].astype(str).astype("category")
    with own_data_loader(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed = scvi.settings.seed
        scvi.settings.seed = 0
        amici.AMICI.setup_anndata(own, labels_key="cell_type", coord_obsm_key="spatial", n_neighbors=8)
        model = amici.AMICI(own, **SMALL_MODEL)
        model.train(
            max_epochs=epochs,
            accelerator="cpu",
            external_indexing=[rows, np.setdiff1d(np.arange(own.n_obs), rows), np.array([], dtype=int)],
            enable_progress_bar=False,
            enable_checkpointing=False,
            logger=None,
        )
        scvi.settings.seed = seed
    return model


@pytest.fixture(scope="session")
def amici_dir(_tissue: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``AMICI.save`` writes of a small model (2 heads x 4, 8 neighbours) trained on the tissue's region "rest"."""
    rows = np.flatnonzero((_tissue.obs["region"] == "rest").to_numpy())
    folder = tmp_path_factory.mktemp("amici") / "model"
    train_plainly(_tissue, rows).save(str(folder))
    return folder


@pytest.fixture(scope="session")
def dense_amici_dir(_tissue: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, trained on the dense expression."""
    dense = _tissue.copy()
    dense.X = dense.X.toarray()
    folder = tmp_path_factory.mktemp("amici") / "dense"
    train_plainly(dense, np.flatnonzero((dense.obs["region"] == "rest").to_numpy())).save(str(folder))
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

    from amici_eval.model.training import own_data_loader

    with own_data_loader():
        return amici.AMICI.load(str(amici_dir), adata=adata.copy())


@dataclass(frozen=True)
class Registry:
    """A tracking store with models in it, shared by all tests of a session: they add to it and never take away."""

    uri: str
    folder: Path
    data: Path
    model_id: str
    run_id: str


@pytest.fixture(scope="session")
def _registry(_tissue: AnnData, amici_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    import mlflow

    from amici_eval.settings.evaluation import TrackingSpec
    from amici_eval.tracking.jobs.evaluating import register_job

    folder = tmp_path_factory.mktemp("store")
    data = folder / "tissue.h5ad"
    _tissue.write_h5ad(data)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    before, here = mlflow.get_tracking_uri(), Path.cwd()
    os.chdir(folder)
    try:
        # version 1 brings its data by the run that logged it, version 2 in a bundle, version 3 not at all
        options = {"name": "tiny", "trust": False, "tracking": TrackingSpec(uri=uri)}
        first = register_job(str(amici_dir), data_uri=str(data), adata=None, alias="champion", **options)
        register_job(str(amici_dir), data_uri=str(data), adata="bundle", alias=None, **options)
        register_job(str(amici_dir), data_uri=None, adata=None, alias=None, **options)
    finally:
        os.chdir(here)
        mlflow.set_tracking_uri(before)
    return Registry(uri=uri, folder=folder, data=data, model_id=first.model_id, run_id=first.run_id)


@pytest.fixture
def registry(_registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The shared store as MLflow's tracking URI, from the test's own folder: models:/tiny/1 to 3, @champion -> 1."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _registry.uri)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(_registry.uri)
    # an experiment that an earlier test set would stay MLflow's current one
    mlflow.set_experiment("Default")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    try:
        yield _registry
    finally:
        while mlflow.active_run() is not None:
            mlflow.end_run("FAILED")
        mlflow.set_tracking_uri(before)
