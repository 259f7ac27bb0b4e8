"""Single defences: what they say, what they leave alone, and what they come before."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
import yaml
from scipy import sparse

from amici_eval.common import files
from amici_eval.common.errors import DataError, ModelFormatError, UnsafePickleError
from amici_eval.common.files import check_names, parse_json
from amici_eval.data.files import open_anndata
from amici_eval.data.matrices import open_rows, spans
from tests.conftest import run_python

pytestmark = pytest.mark.amici
VARIABLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
LEGAL = (
    "β cell",
    "a b",
    "T/NK",
    "<script>alert(1)</script>",
    "=1+1",
    "../../x",
    "naïve",
    "細胞",
    "e\u0301",
    "a\u200db",
    "'",
    '"',
    "",
)


def load(model):
    import amici_eval

    return amici_eval.load_model(str(model))


# --- MLFLOW_ALLOW_PICKLE_DESERIALIZATION ------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("value", ["false", "0", "False", "FALSE", "no", ""])
def test_where_pickles_are_forbidden_none_is_opened(base, tmp_path, monkeypatch, trust, value):
    from amici_eval.model.checkpoint import read_amici_directory

    monkeypatch.setenv(VARIABLE, value)
    # whoever opens a pipe waits
    os.mkfifo(tmp_path / "model.pt")
    with pytest.raises(UnsafePickleError) as caught:
        read_amici_directory(tmp_path, adata=None, trust=trust)
    assert caught.value.value.startswith(f"{tmp_path / 'model.pt'} is a pickle, and {VARIABLE}=")
    if value.lower() in ("false", "0"):
        assert caught.value.fix == (
            "log the live model with amici_eval.log_model where it is trained, or register where it is allowed"
        )


@pytest.mark.parametrize("value", ["true", "1", "TRUE", None])
def test_where_pickles_are_allowed_one_is_read(base, monkeypatch, value):
    from amici_eval.model.checkpoint import read_amici_directory

    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert read_amici_directory(base.folder / "saved", adata=None, trust=False).card.n_heads == 2


@pytest.mark.parametrize("value", ["true", "True", "1", "false", "FALSE", "0", "no", "", " true", None])
def test_the_variable_means_what_it_means_to_mlflow(base, monkeypatch, value):
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION

    from amici_eval.model.unpickling import read_saved_amici

    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    try:
        allowed = MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get()
    except ValueError:
        allowed = False
    try:
        ours = bool(read_saved_amici(base.folder / "saved" / "model.pt", trust=False).weights)
    except UnsafePickleError:
        ours = False
    assert ours == allowed


def test_stored_models_need_no_pickle(base, monkeypatch):
    import mlflow

    monkeypatch.setenv(VARIABLE, "false")
    assert load(base.folder / "model").card.n_heads == 2
    assert mlflow.pyfunc.load_model(str(base.folder / "model")).get_raw_model().card.n_heads == 2


# --- sums in MLmodel --------------------------------------------------------------------------------------------------


def test_mlmodel_records_the_sum_of_every_file(base):
    folder = base.folder / "model" / "data" / "amici"
    sums = yaml.safe_load((base.folder / "model" / "MLmodel").read_text())["flavors"]["amici"]["sha256"]
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert {"adata.h5ad", "manifest.json", "model.json"} <= set(sums)


@pytest.mark.parametrize("name", ["adata.h5ad", "cells.json", "manifest.json", "model.json", "weights.safetensors"])
def test_a_corrupted_file_is_told_before_anything_is_parsed(base, tmp_path, monkeypatch, name):
    from amici_eval.model import checkpoint, manifest

    model = base.copy("model", tmp_path)
    path = model / "data" / "amici" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    def parsed(*_, **__):
        raise AssertionError

    for module in (checkpoint, manifest):
        monkeypatch.setattr(module, "load_json", parsed)
    with pytest.raises(ModelFormatError, match=rf"{name} is corrupted: .*SHA-256 tells damage; it is no signature"):
        load(model)


def test_a_model_of_before_the_sums_loads_as_ever(base, tmp_path):
    model = base.copy("model", tmp_path)
    settings = yaml.safe_load((model / "MLmodel").read_text())
    del settings["flavors"]["amici"]["sha256"]
    (model / "MLmodel").write_text(yaml.safe_dump(settings))
    assert load(model).card == load(base.folder / "model").card


def test_metadata_that_name_a_list_twice_come_back(base, trained, tmp_path):
    import amici_eval

    shared = ["a", "b"]
    amici_eval.save_model(trained, tmp_path / "m", metadata={"one": shared, "two": {"three": shared}})
    assert load(tmp_path / "m").card == trained.card
    assert yaml.safe_load((tmp_path / "m" / "MLmodel").read_text())["metadata"]["two"] == {"three": shared}


# --- weights and set-up -----------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_by_name(trained, tmp_path):
    from amici_eval.model.checkpoint import TrainedAMICI

    odd = {**trained.weights, "linear_head.weight": torch.full_like(trained.weights["linear_head.weight"], torch.nan)}
    replace(trained, weights=odd).save(tmp_path / "m")
    with pytest.raises(ModelFormatError, match=r"linear_head.weight holds values that are not finite"):
        TrainedAMICI.load(tmp_path / "m")


def test_a_curve_may_have_gaps(trained, tmp_path):
    from amici_eval.model.checkpoint import TrainedAMICI

    replace(trained, history={"validation_loss": (1.0, float("nan"))}).save(tmp_path / "m")
    back = TrainedAMICI.load(tmp_path / "m").history["validation_loss"]
    assert back[0] == 1.0
    assert np.isnan(back[1])


# --- names ------------------------------------------------------------------------------------------------------------


def test_odd_names_that_are_legal_stay_legal(tmp_path):
    check_names(LEGAL, "names")
    tissue = ad.AnnData(np.ones((len(LEGAL), len(LEGAL)), dtype=np.float32))
    tissue.var_names, tissue.obs_names = list(LEGAL), list(LEGAL)
    for suffix in ("h5ad", "zarr"):
        getattr(tissue, f"write_{suffix}")(tmp_path / f"a.{suffix}")
        assert tuple(open_anndata(tmp_path / f"a.{suffix}").var_names) == LEGAL


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_sparse_counts_that_pack_well_stay_legal(tmp_path, compression):
    counts = sparse.random(3000, 200, density=0.02, format="csr", dtype=np.float32, random_state=0)
    counts.data[:] = 1.0
    tissue = ad.AnnData(counts, layers={"zeros": np.zeros((3000, 200), dtype=np.float32)})
    tissue.write_h5ad(tmp_path / "a.h5ad", compression=compression)
    for backed in (False, True):
        assert open_anndata(tmp_path / "a.h5ad", backed=backed).shape == (3000, 200)


def test_expression_larger_than_memory_stays_legal_on_disk(tmp_path, monkeypatch):
    from amici_eval.data import files

    ad.AnnData(np.zeros((500, 100), dtype=np.float32)).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    monkeypatch.setattr(files, "_SMALL_BYTES", 0)
    monkeypatch.setattr(files, "_READ_ANYWAY", 0)
    monkeypatch.setattr(files, "available_memory", lambda: 150_000)
    assert open_anndata(tmp_path / "a.h5ad").n_obs == 500
    with pytest.raises(DataError, match=r"would take 0\.\d+ GB, of which X 0\.0002: 0\.00015 GB of memory are free"):
        open_anndata(tmp_path / "a.h5ad", backed=False)


@pytest.mark.parametrize("change", ["column", "negative", "offsets"])
def test_a_sparse_matrix_on_disk_that_points_outside_is_refused(tmp_path, change):
    ad.AnnData(sparse.random(50, 20, density=0.2, format="csr", random_state=0)).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        if change == "offsets":
            file["X/indptr"][25] = 10**6
        else:
            file["X/indices"][7] = 10**6 if change == "column" else -3
    with pytest.raises(DataError, match="a sparse matrix on disk is damaged"):
        list(spans(open_rows(open_anndata(tmp_path / "a.h5ad", backed=True).X)))


def npy(array, version=(1, 0)):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version, allow_pickle=True)
    return file.getvalue()


SOUND = npy(np.arange(4.0))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.npy", npy(np.zeros(50_000)))], r"it unpacks from \d+ to 400128 bytes"),
        ([("a.npy", SOUND), ("a.npy", SOUND)], "it holds 'a' twice"),
        ([("a.npy", SOUND), ("a", SOUND)], "it holds 'a' twice"),
        ([("a.npy", npy(np.arange(4.0), (3, 0)))], r"a is written in version \(3, 0\)"),
        ([("a.npy", npy(np.array([{}, 1], dtype=object)))], "a holds object, not numbers"),
        ([("a.npy", npy(np.array(["x"])))], "a holds <U1, not numbers"),
        ([("a.npy", SOUND.replace(b"(4,)", b"(9,)"))], "a has another size than it says"),
        ([("a.npy", SOUND.replace(b"(4,), ", b"(99,),"))], r"a says that it is of shape \(99,\), which its \d+ bytes"),
        ([("a.npy", SOUND.replace(b"(4,)", b"(3,)"))], "a has another size than it says"),
        ([("a.npy", SOUND.replace(b"(4,), ", b"(-4,),"))], r"a says that it is of shape \(-4,\)"),
    ],
)
def test_an_archive_of_arrays_holds_what_it_says(tmp_path, monkeypatch, members, message):
    monkeypatch.setattr(files, "_SMALL_BYTES", 2**17)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sound.npy", SOUND)
    assert files.load_npz(tmp_path / "a.npz")["sound"].tolist() == [0.0, 1.0, 2.0, 3.0]
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=message):
        files.load_npz(tmp_path / "a.npz")


def test_a_limit_of_the_process_limits_the_memory():
    told = run_python(
        "-c",
        "import resource, os\n"
        "from amici_eval.data.files import available_memory\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGE_SIZE')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 10**8, size + 10**8))\n"
        "print(available_memory())",
    )
    assert 0 < int(told.stdout) <= 10**8, told.stderr


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_brackets_in_texts_are_no_nesting():
    text = json.dumps({"[" * 1000: ["{" * 1000, '"' * 50, "\\" * 51]})
    assert parse_json(text, max_values=20) == json.loads(text)
    assert parse_json("[" * 64 + "]" * 64, max_values=1000)
    with pytest.raises(ValueError, match="more than 64 deep"):
        parse_json("[" * 65 + "]" * 65, max_values=1000)


def test_json_holds_no_more_values_than_its_reader_takes():
    # a list or an object counts as three, and each comma as one
    assert parse_json("[[1, 2], {}]", max_values=11) == [[1, 2], {}]
    for text in ("[[1, 2], {}]", "[" + "1," * 10 + "1]", '{"a": {"b": {"c": {}}}}'):
        with pytest.raises(ValueError, match="more than the 10 values"):
            parse_json(text, max_values=10)


def test_what_json_reads_in_two_ways_is_refused():
    for text, message in {
        '{"a": 1, "a": 2}': "'a' occurs twice",
        "[NaN]": "NaN",
        "[1" + "0" * 50 + "]": "51 digits",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_json(text, max_values=100)


def test_the_copy_of_a_case_is_sound(base, tmp_path):
    """What the corpus spoils is read before it is spoilt, also from another folder."""
    assert load(base.copy("model", tmp_path)).card.n_heads == 2
    shutil.rmtree(tmp_path / "model")
    assert open_anndata(base.copy("tissue.zarr", tmp_path)).n_obs == 500
