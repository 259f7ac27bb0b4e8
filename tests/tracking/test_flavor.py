from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml

import amici_eval
from amici_eval.common.errors import DataError, InvalidSpecError, ModelFormatError, ModelNotFoundError
from amici_eval.tracking.flavor import open_stored_model

pytestmark = pytest.mark.amici


@pytest.fixture
def saved(trained, tmp_path: Path) -> Path:
    amici_eval.save_model(trained, tmp_path / "saved")
    return tmp_path / "saved"


def test_native_round_trip_is_bit_equal(native, trained, adata, saved):
    loaded = amici_eval.load_model(str(saved))
    assert loaded.card == trained.card
    bound = loaded.bind(adata)
    assert np.array_equal(bound.get_predictions(prog_bar=False), native.get_predictions(prog_bar=False))


def test_pyfunc_predicts_from_adata_path_and_frame(native, adata, saved, tmp_path):
    adata.write_h5ad(tmp_path / "tissue.h5ad")
    model = mlflow.pyfunc.load_model(str(saved))
    expected = native.get_predictions(prog_bar=False)
    assert isinstance(model.get_raw_model(), amici_eval.TrainedAMICI)
    np.testing.assert_allclose(model.predict(adata), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict(str(tmp_path / "tissue.h5ad")), expected, atol=1e-6)
    twice = model.predict(pd.DataFrame({"path": [str(tmp_path / "tissue.h5ad")] * 2}))
    np.testing.assert_allclose(twice, np.concatenate([expected, expected]), atol=1e-6)
    with pytest.raises(DataError, match="one column with the path of an AnnData"):
        model.predict(pd.DataFrame({"a": ["x"], "b": ["y"]}))


def test_what_a_model_says_of_itself(registry):
    info = mlflow.models.get_model_info("models:/tiny/1")
    entry = info.metadata["amici_eval"]
    assert (entry["n_heads"], entry["n_genes"], entry["n_neighbors"]) == (2, 40, 8)
    assert "CD8+_T_Cells" in entry["cell_types"]
    assert entry["versions"]["amici-st"] == "0.1.0"
    assert entry["versions"]["scvi-tools"] == "1.2.2"
    assert info.signature.inputs is None
    assert info.signature.outputs.inputs[0].shape == (-1, 40)
    with open_stored_model("models:/tiny/1") as stored:
        assert stored.model_id == registry.model_id
        assert len(stored.trained.card.training_cells) > 100
    requirements = Path(mlflow.artifacts.download_artifacts("models:/tiny/1/requirements.txt")).read_text()
    assert {"amici-st==0.1.0", "torch==2.13.0"} <= set(requirements.split())


def test_no_file_of_a_logged_model_is_a_pickle(registry):
    folder = Path(mlflow.artifacts.download_artifacts("models:/tiny/2"))
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "MLmodel",
        "adata.h5ad",
        "cells.json",
        "conda.yaml",
        "manifest.json",
        "model.json",
        "python_env.yaml",
        "registered_model_meta",  # YAML by MLflow
        "requirements.txt",
        "weights.safetensors",
    }
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    assert (folder / "data/amici/adata.h5ad").read_bytes()[1:4] == b"HDF"
    header = (folder / "data/amici/weights.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])


def test_our_reader_follows_neither_loader_module_nor_code_paths(saved, tmp_path, monkeypatch):
    (saved / "code").mkdir()
    canary = tmp_path / "ran"
    (saved / "code" / "evil.py").write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n")
    content = yaml.safe_load((saved / "MLmodel").read_text())
    content["flavors"]["python_function"] |= {"loader_module": "evil", "code": "code"}
    (saved / "MLmodel").write_text(yaml.safe_dump(content))
    assert amici_eval.load_model(str(saved)).card.n_heads == 2
    assert not canary.exists()
    # the same model through MLflow's loader does run it, so the check above could fail
    with pytest.raises(AttributeError):
        mlflow.pyfunc.load_model(str(saved))
    assert canary.exists()


def test_a_yaml_constructor_in_mlmodel_is_not_run(saved, tmp_path):
    canary = tmp_path / "ran"
    (saved / "MLmodel").write_text(f"flavors: !!python/object/apply:builtins.open [{str(canary)!r}, w]\n")
    with pytest.raises(ModelFormatError, match="no readable MLmodel"):
        amici_eval.load_model(str(saved))
    assert not canary.exists()


def test_data_must_lie_inside_the_model(saved):
    content = yaml.safe_load((saved / "MLmodel").read_text())
    content["flavors"]["amici"]["data"] = "../.."
    (saved / "MLmodel").write_text(yaml.safe_dump(content))
    with pytest.raises(ModelFormatError, match="must be a folder inside it"):
        amici_eval.load_model(str(saved))


def test_another_flavor_is_named(saved):
    content = yaml.safe_load((saved / "MLmodel").read_text())
    content["flavors"] = {"sklearn": {}, "python_function": {"loader_module": "mlflow.sklearn"}}
    (saved / "MLmodel").write_text(yaml.safe_dump(content))
    with pytest.raises(
        ModelFormatError, match=r"is a model of flavor python_function, sklearn: .*'amici'; register it"
    ):
        amici_eval.load_model(str(saved))


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json", "cells.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_file_is_told(saved, name, how):
    path = saved / "data" / "amici" / name
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=rf"damaged: .*{name}.*; download it again or register"):
        amici_eval.load_model(str(saved))


def test_nothing_there(registry):
    with pytest.raises(ModelNotFoundError, match="models:/absent/1 cannot be fetched"):
        amici_eval.load_model("models:/absent/1")


def test_log_model_from_a_live_amici_with_a_recorded_uri(native, registry):
    with mlflow.start_run():
        info = amici_eval.log_model(native, registered_model_name="live", adata="s3://bucket/tissue.h5ad")
    with open_stored_model(f"models:/live/{info.registered_model_version}") as stored:
        assert stored.adata_uri == "s3://bucket/tissue.h5ad"
        assert stored.bundled_adata is None
        assert len(stored.trained.cells["train"]) == len(native.train_indices_)


def test_a_uri_with_credentials_is_not_recorded_in_a_model(trained, tmp_path):
    uri = "https://bucket.s3.amazonaws.com/tissue.h5ad?X-Amz-Signature=5c1d9f3ab0c7e2d4f6a8"
    with pytest.raises(InvalidSpecError, match="holds credentials") as refused:
        amici_eval.save_model(trained, tmp_path / "m", adata=uri)
    assert "5c1d9f3ab0c7e2d4f6a8" not in str(refused.value)
    assert not (tmp_path / "m").exists()


def test_bundling_needs_data(trained, tmp_path):
    with pytest.raises(DataError, match="pass it as training_adata"):
        amici_eval.save_model(trained, tmp_path / "m", adata="bundle")


def test_bundling_leaves_the_anndata_alone(trained, adata, tmp_path):
    adata.obs["note"] = ["text"] * adata.n_obs
    kinds = adata.obs.dtypes.to_dict()
    amici_eval.save_model(trained, tmp_path / "m", adata=adata)
    assert adata.obs.dtypes.to_dict() == kinds


@pytest.mark.parametrize("how", ["link", "unlisted"])
def test_a_bundle_must_be_the_file_that_was_logged(trained, adata, tmp_path, how):
    amici_eval.save_model(trained, tmp_path / "m", adata=adata)
    folder = tmp_path / "m" / "data" / "amici"
    if how == "link":
        (folder / "adata.h5ad").rename(tmp_path / "elsewhere.h5ad")
        (folder / "adata.h5ad").symlink_to(tmp_path / "elsewhere.h5ad")
        message = "damaged: adata.h5ad is a link"
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["sha256"]["adata.h5ad"]
        # a model that was logged before MLmodel recorded sums
        content = yaml.safe_load((tmp_path / "m" / "MLmodel").read_text())
        del content["flavors"]["amici"]["sha256"]
        (tmp_path / "m" / "MLmodel").write_text(yaml.safe_dump(content))
        (folder / "manifest.json").write_text(json.dumps(manifest))
        message = "damaged: the manifest lacks adata.h5ad"
    with pytest.raises(ModelFormatError, match=message), open_stored_model(str(tmp_path / "m")):
        pass
