from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
from mlflow.exceptions import MlflowException

import amici_eval
from amici_eval.common.errors import AmiciEvalError, DataError, InvalidSpecError, OutputError, TrackingError
from amici_eval.common.text import slugify
from amici_eval.data.files import content_digest
from amici_eval.data.tissue import prepare
from amici_eval.model.engines.hooked import neighbours
from amici_eval.results.evaluation import GENE_COLUMNS, HEAD_COLUMNS
from amici_eval.results.moments import Moments
from amici_eval.settings.evaluation import (
    DataSpec,
    EvaluationSpec,
    PermutationSpec,
    ReportSpec,
    SubsetSpec,
    TrackingSpec,
)
from amici_eval.tracking.jobs.evaluating import evaluate_job, load_evaluation, register_job, upload
from tests.builders import job_options

pytestmark = pytest.mark.amici

QUICK = EvaluationSpec(permutation=PermutationSpec(n_permutations=19))


def run(model_uri: str = "models:/tiny/1", *, data_uri=None, spec=QUICK, report=None, **tracking):
    options = job_options(spec, report=report, **{"retry_s": 0.0, **tracking})
    return evaluate_job(model_uri, data_uri=data_uri, options=options)


def statuses(registry) -> set[str]:
    client = mlflow.MlflowClient()
    experiments = [entry.experiment_id for entry in client.search_experiments()]
    return {entry.info.status for entry in client.search_runs(experiments)}


def test_a_run_holds_the_contract(registry, tmp_path):
    result = run(report=ReportSpec(), experiment="contract")
    client = mlflow.MlflowClient()
    logged = client.get_run(result.run_id)
    assert logged.info.status == "FINISHED"
    folder = Path(mlflow.artifacts.download_artifacts(run_id=result.run_id, dst_path=str(tmp_path / "got")))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    types = result.evaluation.cell_types
    figures = ["expl_variance_barplot_per_head", "ablations", "effects", "head_interactions"]
    figures += [f"expl_variance_heatmap_{slugify(name)}" for name in types]
    tables = ("heads", "baselines", "held_out", "scales", "labels", "ablations", "head_interactions", "senders")
    assert files == {
        "tables/explained_variance.csv",
        "tables/explained_variance.parquet",
        *(f"tables/{name}.csv" for name in tables),
        "tables/sender_genes.parquet",
        "moments.npz",
        "significance.json",
        "config/resolved.yaml",
        "report.html",
        "evaluation.json",
        *(f"figures/{name}.{suffix}" for name in figures for suffix in ("png", "svg")),
    }
    assert tuple(pd.read_csv(folder / "tables/explained_variance.csv").columns) == GENE_COLUMNS
    heads = pd.read_csv(folder / "tables/heads.csv")
    assert tuple(heads.columns) == HEAD_COLUMNS
    assert len(heads) == 2 * len(types)
    baselines = pd.read_csv(folder / "tables/baselines.csv")
    assert list(baselines.columns) == ["ct_name", "baseline", "expl_var"]
    names = {"neighbour_types", "neighbour_expression", "position", "full_model_without_nearest"}
    assert set(baselines["baseline"]) == {"full_model", "no_head", *names}
    assert list(pd.read_csv(folder / "tables/labels.csv").columns) == ["kind", "slug", "label"]
    assert json.loads((folder / "significance.json").read_text())["schema_version"] == 3
    assert result.evaluation.engine == "factored"
    assert logged.data.metrics["parity/max_abs_difference"] == result.evaluation.parity < 1e-4
    ablations = pd.read_csv(folder / "tables/ablations.csv")
    assert list(ablations.columns) == ["head", "ct_name", "mode", "expl_var", "delta_full"]
    assert len(ablations) == 2 * len(types) * 7
    assert len(pd.read_csv(folder / "tables/head_interactions.csv")) == len(types)
    np.testing.assert_allclose(
        Moments.load(folder / "moments.npz").explained_variance(), result.evaluation.expl_var, atol=1e-6
    )
    assert (folder / "config/resolved.yaml").read_text() == "a: 1\n"
    # metrics, params, dataset, and the links both ways
    for index, cell_type in enumerate(types):
        for head in range(2):
            name = f"{slugify(cell_type)}/head_{head}"
            assert logged.data.metrics[f"ev/{name}"] == result.evaluation.expl_var[head, index]
            assert logged.data.metrics[f"p_adj/{name}"] == result.evaluation.p_value_adj[head, index]
    assert logged.data.params["cfg/permutation.n_permutations"] == "19"
    entry = logged.inputs.dataset_inputs[0]
    assert (entry.dataset.name, entry.dataset.source_type) == ("tissue", "anndata")
    assert entry.dataset.digest == result.evaluation.data["digest"]
    assert [model.model_id for model in logged.inputs.model_inputs] == [registry.model_id]
    assert logged.data.tags["amici_eval.model_version"] == "1"
    assert "2 attention heads x 5 cell types" in logged.data.tags["mlflow.note.content"]
    of_version = client.get_model_version("tiny", "1").tags
    assert of_version["amici_eval.evaluation_run_id"] == result.run_id
    assert of_version["amici_eval.setup"] == result.evaluation.model["setup"]
    assert client.get_logged_model(registry.model_id).tags["amici_eval.evaluation_run_id"] == result.run_id
    assert not (tmp_path / "amici-eval-results").exists()
    assert load_evaluation(result.run_id).to_json() == result.evaluation.to_json()


def test_the_bundle_serves_as_data(registry):
    given, bundled = run("models:/tiny/1", data_uri=str(registry.data)), run("models:/tiny/2")
    assert bundled.evaluation.data["digest"] == given.evaluation.data["digest"]
    assert np.array_equal(bundled.evaluation.p_value, given.evaluation.p_value)
    # the run names where the bundle stays, not the copy that was fetched
    (entry,) = mlflow.get_run(bundled.run_id).inputs.dataset_inputs
    source = mlflow.data.get_source(entry.dataset)
    assert source.uri == "models:/tiny/2/data/amici/adata.h5ad"
    with source.local_copy() as path:
        assert content_digest(amici_eval.open_anndata(path)) == given.evaluation.data["digest"]


def test_a_failing_store_loses_nothing_and_upload_finishes(registry, tmp_path, monkeypatch):
    # the store fails after params, tags, inputs and one metric batch, before the files
    real = mlflow.MlflowClient.log_artifacts

    def gone(*arguments, **options):
        message = "connection lost"
        raise MlflowException(message) from requests.ConnectionError(message)

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", gone)
    with pytest.raises(
        TrackingError, match=r"connection lost.*all results are safe in .*, or: amici-eval upload"
    ) as caught:
        run(report=ReportSpec(formats=("png",)))
    folder = Path(caught.value.fix.rpartition(" ")[2])
    assert (folder / "artifacts" / "tables" / "heads.csv").is_file()
    run_id = folder.name
    assert mlflow.get_run(run_id).info.status == "FAILED"
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", real)
    assert upload(folder) == run_id
    client = mlflow.MlflowClient()
    logged = client.get_run(run_id)
    assert logged.info.status == "FINISHED"
    assert len(logged.inputs.dataset_inputs) == 1
    for name in logged.data.metrics:
        assert len(client.get_metric_history(run_id, name)) == 1
    assert {entry.path for entry in client.list_artifacts(run_id)} >= {"tables", "figures", "report.html"}


def test_results_outlive_a_figure_that_cannot_be_drawn(registry, tmp_path, monkeypatch, caplog):
    def broken(*arguments, **options):
        message = "no space left"
        raise OSError(message)

    monkeypatch.setattr("amici_eval.report.figures.evaluation_figures.save_figures", broken)
    with pytest.raises(OSError, match="no space left"):
        run(keep_local=True, report=ReportSpec(formats=("png",)))
    (folder,) = (tmp_path / "amici-eval-results").iterdir()
    assert f"amici-eval upload {folder}" in caplog.text
    upload(folder)
    sent = mlflow.get_run(folder.name)
    assert sent.info.status == "FAILED"
    assert sent.data.tags["amici_eval.partial"] == "not all artifacts could be written"
    assert load_evaluation(folder.name).n_permutations == 19


def test_a_model_from_another_store_is_evaluated_without_links(registry, tmp_path, caplog):
    folder = mlflow.artifacts.download_artifacts("models:/tiny/2", dst_path=str(tmp_path / "copy"))
    result = run(folder, uri=f"sqlite:///{tmp_path / 'other.db'}")
    assert "is not in this tracking store" in caplog.text
    logged = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert logged.info.status == "FINISHED"
    assert "amici_eval.model_id" not in logged.data.tags
    mlflow.set_tracking_uri(registry.uri)


def test_a_users_own_empty_folder_stays(registry, tmp_path):
    (tmp_path / "mine").mkdir()
    run(output_dir=str(tmp_path / "mine"))
    assert list((tmp_path / "mine").iterdir()) == []


def test_training_cells_under_other_names_are_not_called_held_out(registry, adata):
    assert run().evaluation.held_out == (False,) * 5
    adata.obs_names = [f"renamed_{number}" for number in range(adata.n_obs)]
    adata.write_h5ad("renamed.h5ad")
    adata.obsm["spatial"] = adata.obsm["spatial"] + 7.0
    adata.write_h5ad("moved.h5ad")
    for uri in ("renamed.h5ad", "moved.h5ad"):
        evaluation = run(data_uri=uri).evaluation
        assert evaluation.held_out == (False,) * 5
        assert any("cells of training have other names here" in note for note in evaluation.notes)
    adata.X = adata.X * 1.5
    adata.write_h5ad("other.h5ad")
    evaluation = run(data_uri="other.h5ad").evaluation
    assert evaluation.held_out == (True,) * 5


def test_a_part_of_the_training_tissue_is_noticed(registry, adata):
    adata[: adata.n_obs // 2].write_h5ad("half.h5ad")
    evaluation = run(data_uri="half.h5ad").evaluation
    assert any("its cells have lost neighbours" in note for note in evaluation.notes)


def test_upload_of_another_folder(tmp_path):
    with pytest.raises(OutputError, match=r"holds no readable upload\.json"):
        upload(tmp_path)


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (ZeroDivisionError, "FAILED")]
)
def test_an_interrupted_run_is_killed_and_a_crash_is_failed(registry, monkeypatch, raised, status):
    def stop(*arguments, **options):
        raise raised

    monkeypatch.setattr("amici_eval.evaluation.pipeline.evaluate_access", stop)
    with pytest.raises(raised):
        run(run_name=f"stopped by {raised.__name__}")
    (stopped,) = mlflow.search_runs(
        filter_string=f"attributes.run_name = 'stopped by {raised.__name__}'",
        search_all_experiments=True,
        output_format="list",
    )
    assert stopped.info.status == status
    assert "RUNNING" not in statuses(registry)


def n_runs() -> int:
    client = mlflow.MlflowClient()
    return len(client.search_runs([entry.experiment_id for entry in client.search_experiments()]))


def test_runs_are_counted_where_they_start(registry):
    before = n_runs()
    run(experiment="elsewhere")
    assert n_runs() == before + 1


def drop_gene(adata):
    adata._inplace_subset_var(adata.var_names[1:])


def drop_labels(adata):
    del adata.obs["cell_type"]


def nan_expression(adata):
    adata.X[0, 0] = np.nan


ENDOTHELIAL = EvaluationSpec(data=DataSpec(subset=SubsetSpec(key="cell_type", value="Endothelial")))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"change": drop_gene}, DataError, "the data lacks 1 of them"),
        ({"change": drop_labels}, DataError, "adata.obs has no column 'cell_type'"),
        ({"change": nan_expression}, DataError, "expression of .* is nan"),
        ({"report": ReportSpec(cell_types=("Tumour",))}, InvalidSpecError, r"report\.cell_types names 'Tumour'"),
        (
            {"report": ReportSpec(cell_types=("Tumor",)), "spec": ENDOTHELIAL},
            InvalidSpecError,
            r"report\.cell_types names 'Tumor': the evaluated cells are of type",
        ),
        ({"report": ReportSpec(palette="nonsense")}, InvalidSpecError, "palette='nonsense'"),
        ({"output_dir": "/proc/none"}, OutputError, r"/proc/none cannot be written .*tracking\.output_dir"),
        ({"data_uri": "absent.h5ad"}, DataError, r"absent\.h5ad does not exist"),
    ],
)
def test_bad_input_starts_no_run(registry, adata, options, kind, message):
    options = dict(options)
    if change := options.pop("change", None):
        change(adata)
        adata.write_h5ad("bad.h5ad")
        options["data_uri"] = "bad.h5ad"
    before = n_runs()
    with pytest.raises(kind, match=message):
        run(**options)
    assert n_runs() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b"}, r"name='a/b': MLflow refuses it"),
        ({"adata": "bundel"}, r"register\.adata='bundel': it must be bundle, or the path or URI"),
        ({"adata": "https://user:secret@example.org/a.h5ad"}, r"holds credentials: everybody who may read the model"),
        ({"alias": "v1"}, r"register\.alias='v1'"),
        ({"adata": "bundle", "data_uri": None}, "there must be an AnnData to bundle"),
    ],
)
def test_bad_registration_is_refused(registry, amici_dir, options, message):
    given = {"name": "x", "data_uri": str(registry.data), "adata": None, "trust": False, "alias": None, **options}
    before = n_runs()
    with pytest.raises(AmiciEvalError, match=message):
        register_job(str(amici_dir), tracking=TrackingSpec(), **given)
    assert n_runs() == before


def test_awkward_labels_go_all_the_way(registry, adata, trained, amici_dir, tmp_path):
    awkward = ("CD8+_T_Cells", "Stromal_&_T_Cell_Hybrid", "Microglia/PVM", "β cell", "$x$ <b>")
    names = dict(zip(trained.card.cell_types, awkward, strict=True))
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories(names)
    renamed = replace(trained, card=replace(trained.card, cell_types=awkward, training_data=None))
    with mlflow.start_run():
        amici_eval.log_model(renamed, registered_model_name="awkward")
    adata.write_h5ad(tmp_path / "awkward.h5ad")
    result = run("models:/awkward/1", data_uri=str(tmp_path / "awkward.h5ad"), report=ReportSpec())
    labels = pd.read_csv(mlflow.artifacts.download_artifacts(run_id=result.run_id, artifact_path="tables/labels.csv"))
    assert dict(zip(labels["label"], labels["slug"], strict=True)) == {name: slugify(name) for name in names.values()}
    metrics = mlflow.get_run(result.run_id).data.metrics
    assert all(f"ev/{slug}/head_0" in metrics for slug in labels["slug"])


def test_what_a_buffer_drops_is_known_before_the_run(registry, trained, adata):
    fresh = (adata.obs["region"] != "rest").to_numpy()
    index, _ = neighbours(prepare(adata, trained.card, DataSpec()), trained.card)
    inner = fresh & fresh[index].all(axis=1)
    tumor = (adata.obs["cell_type"] == "Tumor").to_numpy()
    # tumor cells at the rim only: the buffer drops the type
    rows = np.flatnonzero(np.where(tumor, fresh & ~inner, inner))
    assert tumor[rows].any()
    subset = SubsetSpec(indices=tuple(rows.tolist()), held_out=True, buffer=True)
    spec = EvaluationSpec(data=DataSpec(subset=subset), permutation=PermutationSpec(n_permutations=19))
    before = n_runs()
    with pytest.raises(InvalidSpecError, match=r"report\.cell_types names 'Tumor': the evaluated cells are of type"):
        run(spec=spec, report=ReportSpec(cell_types=("Tumor",)))
    assert n_runs() == before
    evaluation = run(spec=spec).evaluation
    assert evaluation.data["n_evaluated"] == evaluation.n_cells.sum() == (inner & ~tumor).sum()
