"""Comparisons through a real store: which cells, what is reused, what a run holds, what fails and what goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from amici_eval.common.errors import DataError, InvalidSpecError, ModelNotFoundError
from amici_eval.results.comparison import HeadComparison
from amici_eval.settings.comparison import ComparisonSpec
from amici_eval.settings.evaluation import (
    AblationSpec,
    DataSpec,
    EvaluationSpec,
    PermutationSpec,
    ReportSpec,
    SubsetSpec,
)
from amici_eval.tracking.flavor import log_model
from amici_eval.tracking.jobs import comparing
from amici_eval.tracking.jobs.comparing import compare_job, model_uris
from tests.builders import job_options
from tests.model.test_comparison import relabelled

pytestmark = pytest.mark.amici

SPEC = EvaluationSpec(
    ablation=AblationSpec(device="cpu", modes=("keep_one",), baselines=False),
    permutation=PermutationSpec(n_permutations=19, n_bootstrap=50),
)
QUICK = ComparisonSpec(n_permutations=49, n_flips=49, n_bootstrap=50, floor=False)
NO_FIGURES = ReportSpec(figures=False)


@pytest.fixture
def pair(registry, trained, adata, monkeypatch):
    """Two more versions in the store: models:/pair/1, and models:/pair/2 with its heads in another order."""
    # the tissue is small
    monkeypatch.setattr(comparing, "MIN_HELD_OUT", 10)
    client = mlflow.MlflowClient()
    if not client.search_model_versions("name='pair'"):
        for model in (trained, relabelled(trained, [1, 0])):
            with mlflow.start_run():
                log_model(model, "pair", registered_model_name="pair", training_adata=adata)
    return registry


def job(registry, *, models=("pair",), versions=("1", "2"), spec=SPEC, comparison=QUICK, report=NO_FIGURES, **more):
    options = job_options(spec, report=report, **more.pop("tracking", {}))
    return compare_job(
        models=models,
        versions=versions,
        data_uri=more.pop("data_uri", str(registry.data)),
        comparison=comparison,
        options=options,
        **more,
    )


def test_versions_are_compared_on_cells_that_none_was_fitted_on_and_found_again(pair, adata, tmp_path):
    first = job(pair, tracking={"experiment": "comparing"})
    found = first.comparison
    assert found.labels == ("pair 1", "pair 2")
    held_out = int((adata.obs["region"] != "rest").sum())
    assert found.cells == f"{held_out} cells that no compared version was fitted on"
    assert found.in_sample is False
    assert [int(version.n_cells.sum()) for version in found.versions] == [held_out, held_out]
    assert found.matches[0].partner.tolist() == [1, 0]
    assert found.matches[0].reseeded, "the set-up is the same"
    np.testing.assert_allclose(found.reseeded, 1.0, atol=1e-6)
    assert [version.reused for version in found.versions] == [False, False]
    client = mlflow.MlflowClient()
    parent = client.get_run(first.run_id)
    assert parent.info.status == "FINISHED"
    children = [client.get_run(version.run_id) for version in found.versions]
    assert [child.data.tags["mlflow.parentRunId"] for child in children] == [first.run_id] * 2
    assert {child.info.experiment_id for child in children} == {parent.info.experiment_id}
    assert {child.info.status for child in children} == {"FINISHED"}
    again = job(pair)
    assert [version.reused for version in again.comparison.versions] == [True, True]
    assert [version.run_id for version in again.comparison.versions] == [child.info.run_id for child in children]
    assert again.comparison.differences_frame().equals(found.differences_frame())
    fresh = job(pair, tracking={"reuse": False})
    assert [version.reused for version in fresh.comparison.versions] == [False, False]
    by_run = compare_job(
        runs=[version.run_id for version in found.versions],
        data_uri=None,
        comparison=QUICK,
        options=job_options(SPEC),
    )
    assert by_run.comparison.matches[0].partner.tolist() == [1, 0]
    assert not list(tmp_path.rglob("evaluations-*"))


def test_a_run_holds_page_tables_figures_and_metrics_by_version(pair, tmp_path):
    result = job(pair, report=ReportSpec(formats=("svg",)), comparison=replace(QUICK, floor=True))
    client = mlflow.MlflowClient()
    folder = Path(mlflow.artifacts.download_artifacts(run_id=result.run_id, dst_path=str(tmp_path / "got")))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "comparison.json",
        "report.html",
        "config/resolved.yaml",
        *(f"tables/{name}.csv" for name in ("head_matches", "head_differences", "sender_differences", "versions")),
        "tables/gene_differences.parquet",
        *(f"figures/{name}.svg" for name in ("lineage", "versions", "similarity_1", "differences_1")),
    }
    back = HeadComparison.load(folder)
    assert back.differences_frame().equals(result.comparison.differences_frame())
    assert back.floor is not None
    assert np.isfinite(back.floor).all()
    assert pd.read_csv(folder / "tables/head_matches.csv")["head_after"].tolist() == [1, 0]
    page = (folder / "report.html").read_text(encoding="utf-8")
    for said in ("pair 2 explains as much as pair 1 (same)", "2 of 2 heads of pair 1 are heads of pair 2", "<svg"):
        assert said in page
    history = client.get_metric_history(result.run_id, "summary/n_significant")
    assert [entry.step for entry in history] == [1, 2]
    names = set(client.get_run(result.run_id).data.metrics)
    assert {"overall/difference", "ev_full_model/neuron_b"} & names
    for version in ("1", "2"):
        tags = client.get_model_version("pair", version).tags
        assert tags["amici_eval.comparison_run_id"] == result.run_id
    assert client.get_run(result.run_id).data.params["cfg/compare.margin"] == "0.01"


def test_where_no_cell_is_new_to_all_everything_is_in_sample(pair, monkeypatch):
    monkeypatch.setattr(comparing, "MIN_HELD_OUT", 10**6)
    found = job(pair).comparison
    assert found.cells == "all evaluated cells, in-sample"
    assert found.in_sample
    assert any("all cells are compared, in-sample" in note for note in found.notes)
    chosen = replace(SPEC, data=DataSpec(subset=SubsetSpec(key="region", value="rest")))
    with pytest.raises(DataError, match=r"^compare.cells=held_out: each cell was used to fit some compared version"):
        job(pair, spec=chosen, comparison=replace(QUICK, cells="held_out"))
    whole = job(pair, comparison=replace(QUICK, cells="all")).comparison
    assert whole.cells == "all evaluated cells"


def test_where_training_cells_are_unknown_that_is_said(pair):
    found = job(pair, models=("models:/pair/1", "models:/tiny/3"), versions=()).comparison
    assert found.labels == ("pair 1", "tiny 3")
    assert "it is not known which of them" in found.cells
    assert found.in_sample
    with pytest.raises(DataError, match=r"^compare.cells=held_out: for some version it is not known"):
        job(pair, models=("models:/pair/1", "models:/tiny/3"), versions=(), comparison=replace(QUICK, cells="held_out"))


def test_a_version_that_fails_is_named_and_the_others_go_on(pair, monkeypatch):
    literal = comparing.evaluate_opened

    def broken(opened, options, **more):
        if opened.model.uri.endswith("pair/1"):
            raise DataError(value="version 1", rule="it breaks", fix="mend it")
        return literal(opened, options, **more)

    monkeypatch.setattr(comparing, "evaluate_opened", broken)
    models = ("models:/pair/1", "models:/pair/2", "models:/tiny/1")
    found = job(pair, models=models, versions=(), tracking={"reuse": False}).comparison
    assert found.labels == ("pair 2", "tiny 1")
    assert [one.label for one in found.failed] == ["pair 1"]
    assert found.failed[0].reason == "version 1: it breaks; mend it"
    with pytest.raises(DataError, match=r"^1 of 2 evaluations are there \(pair 1: version 1: it breaks; mend it\)"):
        job(pair, tracking={"reuse": False})
    client = mlflow.MlflowClient()
    newest = client.search_runs(["0"], "tags.`amici_eval.kind` = 'comparison'", max_results=1)[0]
    assert newest.info.status == "FAILED"


@pytest.mark.parametrize("subset", [{"key": "nothing", "value": "1"}, {"indices": (10**6,)}])
def test_cells_that_are_not_there_are_refused_before_any_run(pair, subset):
    def all_runs():
        client = mlflow.MlflowClient()
        return client.search_runs([one.experiment_id for one in client.search_experiments()])

    before = len(all_runs())
    spec = replace(SPEC, data=replace(SPEC.data, subset=SubsetSpec(**subset)))
    with pytest.raises(DataError, match=r"nothing|1000000"):
        job(pair, spec=spec, comparison=replace(QUICK, cells="all"))
    assert len(all_runs()) == before


def test_a_version_without_moments_is_left_out(pair):
    models = ("models:/pair/1", "models:/pair/2", "models:/tiny/1")
    hooked = replace(SPEC, ablation=replace(SPEC.ablation, engine="hooked"))
    with pytest.raises(DataError, match=r"^0 of 3 evaluations are there \(pair 1: run \w+ holds no moments.npz: h"):
        job(pair, models=models, versions=(), spec=hooked)


def test_one_version_on_two_data_sets(pair, adata, tmp_path):
    places = []
    for name, rows in (("left", slice(0, 250)), ("right", slice(250, 500))):
        places.append(str(tmp_path / f"{name}.h5ad"))
        adata[rows].copy().write_h5ad(places[-1])
    found = job(pair, versions=("1",), datasets=places, data_uri=None).comparison
    assert (found.kind, found.labels) == ("datasets", ("left", "right"))
    with pytest.raises(InvalidSpecError, match=r"^datasets with 2 versions: several data sets are compared for one"):
        job(pair, datasets=places)


def test_versions_are_named_in_many_ways(pair):
    mlflow.MlflowClient().set_registered_model_alias("pair", "champion", "2")
    assert model_uris(["pair"], ["all"]) == ["models:/pair/1", "models:/pair/2"]
    assert model_uris(["pair"], ["latest:1"]) == model_uris(["pair"], ["latest"]) == ["models:/pair/2"]
    assert model_uris(["pair"], ["1", "@champion"]) == ["models:/pair/1", "models:/pair@champion"]
    assert model_uris(["pair", "models:/tiny/1"], ["1"]) == ["models:/pair/1", "models:/tiny/1"]
    with pytest.raises(InvalidSpecError, match=r"^versions names 'newest': a version is a number, @alias, latest:N or"):
        model_uris(["pair"], ["newest"])
    with pytest.raises(ModelNotFoundError, match=r"there is no registered model 'none'"):
        model_uris(["none"], ["all"])
    # two names of one version are one version
    with pytest.raises(InvalidSpecError, match=r"^1 version to compare: a comparison needs at least two"):
        job(pair, versions=("2", "@champion"))


def test_the_command_compares(pair, capsys):
    from amici_eval.cli.commands import main

    mlflow.MlflowClient().set_registered_model_alias("pair", "champion", "2")
    settings = ["permutation.n_permutations=19", "permutation.n_bootstrap=50", "ablation.modes=keep_one"]
    settings += ["compare.floor=false", "report.figures=false", "compare.n_flips=49", "ablation.baselines=false"]
    with pytest.raises(SystemExit) as ended:
        main(
            ["project", "compare", "--model", "pair", "--versions", "1,@champion", "--data", str(pair.data), *settings]
        )
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "pair 2 explains as much as pair 1 (same)" in told
    run_id = told.split("run ")[-1].split(" ")[0]
    record = json.loads(
        Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="comparison.json")).read_text()
    )
    assert record["schema_version"] == 2
    with pytest.raises(SystemExit) as ended:
        main(["compare", "model=pair", "versions=1", f"data.uri={pair.data}"])
    assert ended.value.code == 2
    assert "1 version to compare: a comparison needs at least two" in capsys.readouterr().err
