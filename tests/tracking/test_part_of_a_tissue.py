"""The way that tutorials go: train on a part of a tissue, then work with all of it."""

from __future__ import annotations

import shlex

import numpy as np
import pytest

from tests.cli.test_cli import call
from tests.conftest import train_plainly

pytestmark = pytest.mark.amici

QUICK = ("permutation.n_permutations=60", "permutation.n_bootstrap=100", "report.figures=false")


@pytest.fixture(scope="module")
def road(_tissue, tmp_path_factory):
    """A tissue with a region held out, and two models trained on a copy of the rest."""
    folder = tmp_path_factory.mktemp("road")
    adata = _tissue.copy()
    adata.obs["in_test"] = (adata.obs.pop("region") != "rest").to_numpy()
    adata.write_h5ad(folder / "full.h5ad")
    part = adata[~adata.obs["in_test"]].copy()
    rows = np.arange(part.n_obs) % 10 != 0
    models = {}
    for name, epochs in (("first", 2), ("second", 3)):
        models[name] = train_plainly(part, np.flatnonzero(rows), epochs=epochs)
        models[name].save(str(folder / name), prefix="run1_")
    return folder, adata, set(part.obs_names[rows]), models["first"]


@pytest.fixture
def store(tmp_path, monkeypatch, new_store):
    import mlflow

    monkeypatch.chdir(tmp_path)
    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield tmp_path
    mlflow.set_tracking_uri(before)


def test_from_save_to_a_verdict_on_the_command_line(road, store, capsys):
    import mlflow

    folder, adata, fitted, _ = road
    data = f"data.uri={folder / 'full.h5ad'}"
    assert call("register", f"model_dir={folder / 'first'}", "name=road", data) == 2
    refused = capsys.readouterr().err
    assert f"the data has {adata.n_obs} cells: the model was trained on" in refused
    # the way out stands in the message, as it can be typed
    wanted = [word.rstrip(";") for word in shlex.split(refused.partition("say which: ")[2].partition(" (or")[0])]
    assert wanted == ["register.trained_on.key=in_test", "register.trained_on.value=False"]
    # as `mlflow run . -e register -P ...` passes it
    shim = ("--model_dir", str(folder / "first"), "--name", "road", "--data", str(folder / "full.h5ad"))
    said = ("--register.trained_on.key", "in_test", "--register.trained_on.value", "false", "--overrides", "")
    assert call("project", "register", *shim, *said) == 0
    assert call("register", f"model_dir={folder / 'second' / 'run1_model.pt'}", "name=road", data, *wanted) == 0
    assert call("evaluate", "model_uri=models:/road/1", "data.subset.held_out=true", *QUICK) == 0
    assert f"{adata.n_obs - len(fitted)} of {adata.n_obs} cells evaluated" in capsys.readouterr().out
    assert (
        call("compare", "model=road", "versions=[1,2]", "compare.n_permutations=99", "compare.cells=held_out", *QUICK)
        == 0
    )
    (compared,) = mlflow.search_runs(filter_string="params.`cfg/compare.cells` LIKE '%'", output_format="list")
    said = compared.data.params["cfg/compare.cells"]
    assert said == f"{adata.n_obs - len(fitted)} cells that no compared version was fitted on"
    assert call("gate", "model_uri=models:/road/2", "baseline=1", *QUICK) in (0, 3, 4)


def test_the_same_in_python(road, store):
    import amici

    import amici_eval
    from amici_eval.model.training import data_loader_restored

    folder, adata, fitted, first = road
    with data_loader_restored():
        whole = amici.AMICI.load(str(folder / "first"), adata=adata.copy(), prefix="run1_")
    said = amici_eval.TrainedOnSpec(key="in_test", value="false")
    logged = {
        "the model of the part": amici_eval.log_model(first, registered_model_name="part"),
        "bound to all of it": amici_eval.log_model(whole, registered_model_name="all", trained_on=said),
    }
    spec = amici_eval.EvaluationSpec(
        data=amici_eval.DataSpec(subset=amici_eval.SubsetSpec(held_out=True)),
        permutation=amici_eval.PermutationSpec(n_permutations=60, n_bootstrap=0),
    )
    found = []
    for name, info in logged.items():
        model = amici_eval.load_model(info.model_uri)
        assert model.card.training_cells == fitted, name
        found.append(amici_eval.evaluate(model, adata, spec))
        assert found[-1].n_cells.sum() == adata.n_obs - len(fitted)
        assert all(found[-1].held_out)
    np.testing.assert_array_equal(found[0].expl_var, found[1].expl_var)
