"""What a run holds of an evaluation: metrics and files, and the way back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from amici_eval.common.errors import DataError
from amici_eval.common.text import slugify
from amici_eval.results.evaluation import HeadEvaluation
from amici_eval.results.moments import Moments
from amici_eval.settings.evaluation import MODES, ReportSpec
from amici_eval.tracking.jobs.evaluating import load_evaluation
from amici_eval.tracking.runs.delivery import deliver, evaluation_metrics, write_artifacts
from amici_eval.tracking.runs.local_results import RunRecord
from tests.builders import make_evaluation, make_moments

NO_FIGURES = ReportSpec(figures=False)


def test_shapley_values_and_parity_are_metrics():
    evaluation = make_evaluation(modes=MODES, engine="factored", parity=3e-7, parity_cells=64)
    metrics = evaluation_metrics(evaluation)
    shares = {name: value for name, value in metrics.items() if name.startswith("shapley/")}
    assert len(shares) == 3 * 6, "the last type is undefined"
    for index, name in enumerate(evaluation.cell_types[:-1]):
        for head in range(3):
            assert shares[f"shapley/{slugify(name)}/head_{head}"] == evaluation.ablations.of("shapley")[head, index]
    assert metrics["parity/max_abs_difference"] == 3e-7
    assert metrics["summary/n_significant"] == metrics["summary/n_significant_free"] == evaluation.n_significant
    plain = evaluation_metrics(make_evaluation())
    assert plain == {n: v for n, v in metrics.items() if not n.startswith(("shapley/", "parity/"))}


def test_what_is_inferred_is_a_metric_where_it_is_defined():
    evaluation = make_evaluation(inferred="lag")
    metrics = evaluation_metrics(evaluation)
    by_head = {
        "p_adj_spatial": evaluation.spatial.p_value_adj,
        "ess": evaluation.spatial.ess,
        "ev_ci_low": evaluation.intervals.low,
        "ev_ci_high": evaluation.intervals.high,
        "ev_held_out": evaluation.parts.expl_var[1],
        "gain": evaluation.trivial.gain,
    }
    expected = {
        f"{name}/{slugify(cell_type)}/head_{head}": values[head, index]
        for name, values in by_head.items()
        for index, cell_type in enumerate(evaluation.cell_types)
        for head in range(3)
        if math.isfinite(values[head, index])
    }
    expected |= {
        f"ev_full_model_held_out/{slugify(name)}": value
        for name, value in zip(evaluation.cell_types, evaluation.parts.full[1], strict=True)
        if math.isfinite(value)
    }
    assert len(expected) == 16 + 18 + 15 + 15 + 15 + 18 + 5
    plain = evaluation_metrics(make_evaluation())
    assert metrics["summary/n_significant"] == evaluation.n_significant != plain["summary/n_significant"]
    counted = {
        "summary/n_significant": evaluation.n_significant,
        "summary/n_tests": evaluation.n_decided,
        "summary/n_undefined": evaluation.p_value.size - evaluation.n_decided,
    }
    assert metrics == {**plain, **expected, **counted}
    assert metrics["summary/n_tests_free"] == evaluation.n_tests != evaluation.n_decided


@pytest.mark.parametrize("parity", [None, math.nan, math.inf])
def test_what_was_not_compared_is_no_metric(parity):
    metrics = evaluation_metrics(make_evaluation(modes=("keep_one",), parity=parity, parity_cells=1))
    assert not [name for name in metrics if name.startswith(("parity/", "shapley/"))]


def with_moments():
    moments = make_moments()
    evaluation = make_evaluation(moments.n_heads, moments.cell_types, genes=moments.genes, modes=MODES)
    return replace(evaluation, moments=moments)


@pytest.fixture
def stored_run(tmp_path, monkeypatch, new_store):
    """A store and a run in it."""
    monkeypatch.chdir(tmp_path)
    uri = new_store(tmp_path / "mlflow.db")
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "store").as_uri())
    return uri, client.create_run(experiment).info.run_id


@pytest.fixture
def saved_after(tmp_path, monkeypatch):
    """The files in the test's folder at each time that moments are written."""
    there, save = [], Moments.save

    def noted(self, path):
        there.append(sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.json") if p.is_file()))
        return save(self, path)

    monkeypatch.setattr(Moments, "save", noted)
    return there


@pytest.mark.parametrize("has_moments", [True, False])
def test_a_run_gives_the_evaluation_back_with_moments_written_once(tmp_path, stored_run, saved_after, has_moments):
    uri, run_id = stored_run
    with pytest.raises(DataError) as caught:
        load_evaluation(run_id, tracking_uri=uri)
    assert caught.value.value == f"run {run_id} holds no evaluation.json"
    evaluation = with_moments() if has_moments else make_evaluation()
    record = RunRecord(tracking_uri=uri, run_id=run_id, metrics=evaluation_metrics(evaluation))
    deliver(evaluation, tmp_path / "out", record, report=NO_FIGURES, config_yaml="")
    # once, and after all that upload needs
    before = [str(Path("out", "artifacts", "evaluation.json")), str(Path("out", "upload.json"))]
    assert saved_after == ([before] if has_moments else [])
    loaded = load_evaluation(run_id, tracking_uri=uri)
    assert loaded.to_json() == evaluation.to_json()
    if has_moments:
        np.testing.assert_array_equal(loaded.moments.residual_m2, evaluation.moments.residual_m2)
    else:
        assert loaded.moments is None


def test_moments_are_written_after_the_numbers_and_come_back(tmp_path, saved_after):
    evaluation = with_moments()
    write_artifacts(evaluation, tmp_path, report=NO_FIGURES, config_yaml="a: 1\n")
    assert saved_after == [["evaluation.json"]]
    loaded = HeadEvaluation.load(tmp_path)
    assert loaded.ablations.modes == MODES
    np.testing.assert_array_equal(loaded.moments.residual_m2, evaluation.moments.residual_m2)
    assert (tmp_path / "tables" / "ablations.csv").is_file()


def test_without_moments_there_is_no_such_file(tmp_path):
    write_artifacts(make_evaluation(), tmp_path, report=NO_FIGURES, config_yaml="")
    assert not (tmp_path / "moments.npz").exists()
    assert not (tmp_path / "figures").exists()


def test_figures_of_ablations_are_in_folder_and_page(tmp_path):
    evaluation = make_evaluation(2, ["A", "B"], modes=MODES)
    write_artifacts(evaluation, tmp_path, report=ReportSpec(formats=("svg",)), config_yaml="")
    assert (tmp_path / "figures" / "ablations.svg").is_file()
    assert (tmp_path / "figures" / "head_interactions.svg").is_file()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Interaction of heads per receiver type" in page
