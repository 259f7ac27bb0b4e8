"""Against a real `mlflow server` on loopback, with a SQLite store and proxied artifacts."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import mlflow
import numpy as np
import pytest

import amici_eval
from amici_eval.common.errors import TrackingError
from amici_eval.settings.evaluation import EvaluationSpec, PermutationSpec, ReportSpec, TrackingSpec
from amici_eval.tracking.jobs import JobOptions
from amici_eval.tracking.jobs.evaluating import evaluate_job, register_job, upload
from tests.serving import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.amici, pytest.mark.server, pytest.mark.slow]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_store: Callable[..., str]) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    before = mlflow.get_tracking_uri()
    (tmp_path / "server").mkdir()
    new_store(tmp_path / "server" / "m.db", artifacts="mlflow-artifacts:/0")
    server = Server(tmp_path / "server")
    server.start()
    try:
        yield server
    finally:
        server.stop()
        mlflow.set_tracking_uri(before)


def test_register_run_evaluate_and_a_lost_server(server, amici_dir, adata, tmp_path, monkeypatch):
    adata.write_h5ad(tmp_path / "tissue.h5ad")
    tracking = TrackingSpec(uri=server.uri, experiment="over http", retry_s=3.0)
    spec = EvaluationSpec(permutation=PermutationSpec(n_permutations=19))
    version = register_job(
        str(amici_dir),
        name="remote",
        data_uri=str(tmp_path / "tissue.h5ad"),
        adata="bundle",
        trust=False,
        alias="champion",
        tracking=tracking,
    )

    def evaluate_champion():
        options = JobOptions(spec=spec, report=ReportSpec(formats=("png",)), tracking=tracking, config_yaml="")
        return evaluate_job("models:/remote@champion", data_uri=None, options=options)

    # 1. the job
    result = evaluate_champion()
    client = mlflow.MlflowClient(server.uri)
    logged = client.get_run(result.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.info.artifact_uri.startswith("mlflow-artifacts:")
    assert {entry.path for entry in client.list_artifacts(result.run_id)} >= {"tables", "figures", "report.html"}
    assert logged.inputs.model_inputs[0].model_id == version.model_id
    assert client.get_model_version("remote", "1").tags["amici_eval.evaluation_run_id"] == result.run_id

    # 2. MLflow's own evaluate; data from the model's artifacts
    data = amici_eval.from_anndata("models:/remote/1/data/amici/adata.h5ad")
    with mlflow.start_run() as run:
        outcome = mlflow.models.evaluate(
            "models:/remote@champion",
            data=data,
            model_type="amici",
            evaluators="amici",
            evaluator_config={"n_permutations": 19, "report.figures": False},
        )
    tumor = result.evaluation.type_index("Tumor")
    assert outcome.metrics["ev/Tumor/head_0"] == result.evaluation.expl_var[0, tumor]
    assert mlflow.get_run(run.info.run_id).info.status == "FINISHED"

    # 3. the server dies while the heads are evaluated, comes back, and the run is finished from the local folder
    from amici_eval.evaluation import pipeline

    real = pipeline.evaluate_access

    def evaluate_then_lose_the_server(*arguments, **options):
        outcome = real(*arguments, **options)
        server.stop()
        return outcome

    monkeypatch.setattr(pipeline, "evaluate_access", evaluate_then_lose_the_server)
    with pytest.raises(TrackingError, match="all results are safe in") as caught:
        evaluate_champion()
    folder = Path(caught.value.fix.rpartition(" ")[2])
    server.start()
    assert upload(folder) == folder.name
    finished = client.get_run(folder.name)
    assert finished.info.status == "FINISHED"
    assert finished.data.metrics == logged.data.metrics
    assert {entry.path for entry in client.list_artifacts(folder.name)} >= {"tables", "figures", "report.html"}


def test_training_goes_on_while_the_server_is_away_and_nothing_is_lost(server, native, adata, caplog):
    validation = np.flatnonzero((adata.obs["region"] != "rest").to_numpy())
    split = SimpleNamespace(train_idx=np.setdiff1d(np.arange(adata.n_obs), validation), val_idx=validation)
    trainer = SimpleNamespace(current_epoch=0, is_global_zero=True, datamodule=split)
    mlflow.set_tracking_uri(server.uri)
    # of this store, whatever another one had before
    mlflow.set_experiment("training")
    callback = amici_eval.HeadEvaluationCallback(native, every_n_epochs=1, n_cells=50, max_share=math.inf)
    with mlflow.start_run() as run:
        callback.on_train_start(trainer, native.module)
        for epoch in range(3):
            trainer.current_epoch = epoch
            if epoch == 1:
                server.stop()
            if epoch == 2:
                server.start()
            callback.on_train_epoch_end(trainer, native.module)
        callback.on_train_end(trainer, native.module)
    client = mlflow.MlflowClient(server.uri)
    for name in ("train_heads/ev/Tumor/head_1", "train_heads/summary/n_significant"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == [0, 1, 2]
    assert "epoch 1: no metrics of heads: " in caplog.text
