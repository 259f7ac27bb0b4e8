"""Fixtures of several packages: a small tissue, a small AMICI trained on it, a tracking store of its own."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import warnings
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.sparse import csr_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    # MLflow keeps the experiment that a test sets as the current one, in whatever store
    if mlflow := sys.modules.get("mlflow.tracking.fluent"):
        mlflow._active_experiment_id = None


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Forget what fixtures of several tests, a test, or a command called in it, leave in the environment."""
    _forget()
    yield
    _forget()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests: else one of two processes is left with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def run_python(
    *arguments: str, package: Path = ROOT, cwd: Path | None = None, timeout: float = 600.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run another Python with the package in a folder; an empty variable is one that is not set."""
    variables = {**os.environ, "PYTHONPATH": str(package), **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={name: value for name, value in variables.items() if value},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real tissue and models, where they lie beside the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no real tissue beside the repository")
    return SHARED


def small_tissue() -> AnnData:
    """Simulate 500 cells x 40 genes; the models of the tests are fitted on its region "rest"."""
    from amici_eval.data.simulate import DEMO_TISSUE, simulate_tissue

    return simulate_tissue(replace(DEMO_TISSUE, n_cells=500, n_genes=40, window_um=(250.0, 250.0))).adata


@pytest.fixture(scope="session")
def _tissue() -> AnnData:
    tissue = small_tissue()
    # as most tissues are stored
    tissue.X = csr_matrix(tissue.X)
    return tissue


@pytest.fixture
def adata(_tissue: AnnData) -> AnnData:
    """A simulated tissue of 500 cells x 40 genes, expression in CSR form, a fresh copy for each test."""
    return _tissue.copy()


def small_sizes(width: int) -> dict[str, float]:
    """Return the settings of an AMICI of 2 heads whose layers are ``width`` wide."""
    layers = ("query_dim", "kv_dim", "nn_embed", "nn_embed_hidden", "query_embed_hidden", "pos_coef_mlp_hidden")
    widths = {f"n_{layer}": width for layer in layers}
    return {"n_heads": 2, "n_head_size": 4, "distance_kernel_unit_scale": 10.0, **widths}


def train_plainly(adata: AnnData, rows: np.ndarray, *, epochs: int = 4):
    """Train an AMICI with AMICI's own means on some rows of a tissue, as its users do."""
    import amici
    import scvi

    from amici_eval.model.training import data_loader_restored

    own = adata.copy()
    own.obs["cell_type"] = own.obs["cell_type"].astype(str).astype("category")
    with data_loader_restored(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed = scvi.settings.seed
        scvi.settings.seed = 0
        amici.AMICI.setup_anndata(own, labels_key="cell_type", coord_obsm_key="spatial", n_neighbors=8)
        model = amici.AMICI(own, **small_sizes(16))
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

    from amici_eval.model.training import data_loader_restored

    with data_loader_restored():
        return amici.AMICI.load(str(amici_dir), adata=adata.copy())


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that makes an empty SQLite store of MLflow and returns its URI.

    It copies one: MLflow takes seconds to make the tables. Artifacts lie beside the file, or where it is said.
    """
    import mlflow

    empty = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{empty}").search_registered_models()

    def make(path: Path, *, artifacts: str | None = None) -> str:
        shutil.copy(empty, path)
        with closing(sqlite3.connect(path)) as store, store:
            store.execute("update experiments set artifact_location = ?", [artifacts or str(path.parent / "mlruns/0")])
        return f"sqlite:///{path}"

    return make


@dataclass(frozen=True)
class Registry:
    """A tracking store with models in it, shared by all tests of a session: they add to it and never take away."""

    uri: str
    folder: Path
    data: Path
    model_id: str
    run_id: str


@pytest.fixture(scope="session")
def _registry(
    _tissue: AnnData, amici_dir: Path, new_store: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    import mlflow

    from amici_eval.settings.evaluation import TrackingSpec
    from amici_eval.tracking.jobs.evaluating import register_job

    folder = tmp_path_factory.mktemp("store")
    data = folder / "tissue.h5ad"
    _tissue.write_h5ad(data)
    uri = new_store(folder / "mlflow.db")
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
    mlflow.set_experiment("Default")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    try:
        yield _registry
    finally:
        while mlflow.active_run() is not None:
            mlflow.end_run("FAILED")
        mlflow.set_tracking_uri(before)
