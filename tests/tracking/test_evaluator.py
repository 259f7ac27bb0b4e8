from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.async_logging.run_operations import RunOperations

import amici_eval
from amici_eval.common.errors import DataError, InvalidSpecError, ModelFormatError, TrackingError
from amici_eval.results.evaluation import GENE_COLUMNS, HEAD_COLUMNS
from amici_eval.tracking.evaluator import AMICIEvaluator, settings_from_config
from amici_eval.tracking.jobs.evaluating import upload

pytestmark = pytest.mark.amici

CONFIG = {"n_permutations": 19, "device": "cpu", "report.figures": False}


def test_mlflow_knows_the_evaluator():
    assert "amici" in mlflow.models.list_evaluators()


def test_it_claims_amici_only():
    for model_type in ("classifier", "regressor", "question-answering", "text", None, "AMICI"):
        assert not AMICIEvaluator.can_evaluate(model_type=model_type, evaluator_config={})
    assert AMICIEvaluator.can_evaluate(model_type="amici", evaluator_config={})


@pytest.mark.parametrize("uri", ["models:/tiny/1", "models:/tiny@champion", "models:/{model_id}"])
@pytest.mark.parametrize("as_list", [False, True])
def test_evaluate_gives_metrics_and_artifacts_linked_once(registry, adata, uri, as_list, tmp_path):
    uri = uri.format(model_id=registry.model_id)
    options = {"evaluators": ["amici"], "evaluator_config": {"amici": CONFIG}}
    if not as_list:
        options = {"evaluators": "amici", "evaluator_config": CONFIG}
    with mlflow.start_run() as run:
        result = mlflow.models.evaluate(uri, data=amici_eval.from_anndata(adata), model_type="amici", **options)
    expected = amici_eval.evaluate(
        amici_eval.load_model(uri),
        adata,
        amici_eval.EvaluationSpec(permutation=amici_eval.PermutationSpec(n_permutations=19)),
    )
    tumor = expected.type_index("Tumor")
    assert result.metrics["ev/Tumor/head_1"] == expected.expl_var[1, tumor]
    assert result.metrics["p_adj/Tumor/head_1"] == expected.p_value_adj[1, tumor]
    assert all(np.isfinite(value) for value in result.metrics.values())
    client = mlflow.MlflowClient()
    for name, value in result.metrics.items():
        points = client.get_metric_history(run.info.run_id, name)
        assert [point.value for point in points] == [value], name
    linked = [entry for entry in client.get_logged_model(registry.model_id).metrics if entry.run_id == run.info.run_id]
    assert {entry.key: entry.value for entry in linked} == result.metrics
    assert len(linked) == len(result.metrics)
    logged = client.get_run(run.info.run_id)
    assert logged.data.params["cfg/permutation.n_permutations"] == "19"
    assert logged.data.tags["amici_eval.model_id"] == registry.model_id
    assert logged.data.tags["amici_eval.model_name"] == "tiny"
    assert logged.data.tags["amici_eval.model_version"] == "1"
    assert client.get_model_version("tiny", "1").tags["amici_eval.evaluation_run_id"] == run.info.run_id
    assert logged.inputs.dataset_inputs[0].dataset.source_type == "code"
    assert client.get_logged_model(registry.model_id).tags["amici_eval.evaluation_run_id"] == run.info.run_id
    files = {entry.path for entry in client.list_artifacts(run.info.run_id, "tables")}
    assert {"tables/heads.csv", "tables/explained_variance.parquet"} <= files
    assert tuple(result.artifacts["heads"].content.columns) == HEAD_COLUMNS
    assert tuple(result.artifacts["explained_variance"].content.columns) == GENE_COLUMNS
    assert result.artifacts["significance"].content["schema_version"] == 3
    result.save(str(tmp_path / "out"))
    saved = pd.read_csv(tmp_path / "out" / "artifacts" / "heads.csv")
    assert len(saved) == expected.n_heads * len(expected.cell_types)


def test_no_other_evaluator_runs_beside_it(registry, adata):
    with mlflow.start_run() as run:
        mlflow.models.evaluate(
            "models:/tiny/1",
            data=amici_eval.from_anndata(adata),
            model_type="amici",
            evaluator_config={"amici": CONFIG},
        )
    assert "ev/Tumor/head_0" in mlflow.get_run(run.info.run_id).data.metrics


def test_settings_nested_dotted_and_short():
    for config in (
        {"permutation": {"seed": 3, "alpha": 0.1}, "data": {"subset": {"key": "region", "value": "rest"}}},
        {"seed": 3, "alpha": 0.1, "data.subset.key": "region", "data.subset.value": "rest"},
    ):
        spec, _ = settings_from_config(config)
        assert (spec.permutation.seed, spec.permutation.alpha) == (3, 0.1)
        assert (spec.data.subset.key, spec.data.subset.value) == ("region", "rest")
    assert settings_from_config(None)[0] == amici_eval.EvaluationSpec()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"n_perm": 3},
            "unknown setting n_perm: known here are the groups data, ablation, permutation and report, and alpha",
        ),
        (
            {"permutation": {"n_perm": 3}},
            r"unknown setting permutation\.n_perm: known here are permutation\.n_permutations",
        ),
        ({"report.dpi": 3}, r"unknown setting report\.dpi"),
        ({"permutation": 3, "permutation.seed": 1}, r"permutation=3: it must be a group of settings"),
        ({"report": 3}, r"report=3: it must be a group of settings"),
        ({"device": "gpu"}, r"ablation\.device='gpu': it must be auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_unknown_and_wrong_settings_are_refused(config, message):
    with pytest.raises(InvalidSpecError, match=message):
        settings_from_config(config)


def test_data_of_another_kind(registry):
    with mlflow.start_run(), pytest.raises(DataError, match=r"pass data=amici_eval\.from_anndata"):
        mlflow.models.evaluate("models:/tiny/1", data=pd.DataFrame({"a": [1]}), model_type="amici", evaluators="amici")


def test_a_served_model_has_no_native_model(adata):
    served = SimpleNamespace(metadata=None)
    dataset = amici_eval.from_anndata(adata).to_evaluation_dataset()
    with pytest.raises(ModelFormatError, match=r"must be loaded in this process.*env_manager='local'"):
        AMICIEvaluator().evaluate(model_type="amici", dataset=dataset, run_id="0", evaluator_config=None, model=served)


def test_the_callers_config_is_left_alone():
    config = {"data": {"subset": {"key": "region"}}, "data.subset.value": "rest"}
    settings_from_config(config)
    assert config == {"data": {"subset": {"key": "region"}}, "data.subset.value": "rest"}


def evaluate_tiny(adata, uri="models:/tiny/1", **config):
    return mlflow.models.evaluate(
        uri,
        data=amici_eval.from_anndata(adata),
        model_type="amici",
        evaluators="amici",
        evaluator_config={**CONFIG, **config},
    )


def test_what_is_refused_is_refused_through_mlflow_too(registry, adata):
    with mlflow.start_run(), pytest.raises(InvalidSpecError, match="unknown setting n_perm"):
        evaluate_tiny(adata, n_perm=3)


def test_one_run_holds_one_evaluation(registry, adata):
    with mlflow.start_run() as run:
        evaluate_tiny(adata)
        with pytest.raises(InvalidSpecError, match=f"run {run.info.run_id} holds an evaluation already"):
            evaluate_tiny(adata)


def test_metrics_that_mlflow_loses_in_the_background_are_there(registry, adata, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    monkeypatch.setattr(SqlAlchemyStore, "log_batch_async", lambda *_, **__: RunOperations([]))
    # a URI of the logged model: MLflow knows its id and logs the metrics once more
    with mlflow.start_run() as run:
        result = evaluate_tiny(adata, f"models:/{registry.model_id}")
    held = mlflow.get_run(run.info.run_id).data
    assert held.metrics == result.metrics
    assert held.tags["amici_eval.kind"] == "evaluation"


def test_what_a_failing_store_did_not_take_is_where_the_error_says(registry, adata, monkeypatch):
    def gone(*arguments, **options):
        message = "connection lost"
        raise ConnectionError(message)

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", gone)
    # a URI of the logged model: MLflow knows its id and takes over the metrics
    with mlflow.start_run(), pytest.raises(TrackingError, match="all results are safe in") as caught:
        evaluate_tiny(adata, f"models:/{registry.model_id}")
    folder = Path(caught.value.fix.rpartition(" ")[2])
    assert (folder / "artifacts" / "tables" / "heads.csv").is_file()
    monkeypatch.undo()
    mlflow.set_tracking_uri(registry.uri)
    # metrics that MLflow would have logged behind the evaluator come with the upload
    run_id = upload(folder)
    assert "ev/Tumor/head_0" in mlflow.get_run(run_id).data.metrics
    shutil.rmtree(folder)


def test_results_outlive_a_figure_that_cannot_be_drawn(registry, adata, monkeypatch, caplog):
    def broken(*arguments, **options):
        message = "no space left"
        raise OSError(message)

    monkeypatch.setattr("amici_eval.report.page.evaluation_page.write_html", broken)
    with mlflow.start_run(), pytest.raises(OSError, match="no space left"):
        evaluate_tiny(adata)
    folder = Path(caplog.text.rpartition("amici-eval upload ")[2].split()[0])
    assert (folder / "artifacts" / "evaluation.json").is_file()
    shutil.rmtree(folder)
