from __future__ import annotations

import gc
import http.server
import json
import tempfile
import threading
from functools import partial
from pathlib import Path

import mlflow
import mlflow.data
import numpy as np
import pytest
import zarr
from scipy import sparse

import amici_eval
from amici_eval.common.errors import DataError
from amici_eval.data import files
from amici_eval.data.files import content_digest, is_on_disk
from amici_eval.tracking.dataset import AnnDataSource


@pytest.fixture
def file(adata, tmp_path) -> Path:
    adata.write_h5ad(tmp_path / "my tissue.h5ad")
    return tmp_path / "my tissue.h5ad"


def write_zarr(adata, path: Path) -> None:
    """Write a store that a web server can offer; old versions of anndata do not consolidate its metadata."""
    adata.write_zarr(path)
    zarr.consolidate_metadata(str(path))


def test_mlflow_offers_the_constructor(adata):
    dataset = mlflow.data.from_anndata(adata, name="t")
    assert isinstance(dataset, amici_eval.AnnDataDataset)
    assert dataset.digest == content_digest(adata)
    assert len(dataset.digest) <= 36
    assert dataset.profile == {"n_cells": 500, "n_genes": 40}


def test_a_path_is_read_and_remembered(file, adata, monkeypatch):
    monkeypatch.chdir(file.parent)
    dataset = amici_eval.from_anndata(file.name)
    assert (dataset.name, dataset.digest) == ("my tissue", content_digest(adata))
    assert dataset.source.to_dict() == {"uri": str(file)}


def test_logged_dataset_comes_back(file, registry):
    with mlflow.start_run() as run:
        mlflow.log_input(amici_eval.from_anndata(file), context="training")
    entry = mlflow.get_run(run.info.run_id).inputs.dataset_inputs[0].dataset
    assert entry.source_type == "anndata"
    source = mlflow.data.get_source(entry)
    assert Path(source.load()) == file


def test_an_anndata_without_source_is_logged_too(adata, registry):
    with mlflow.start_run() as run:
        mlflow.log_input(amici_eval.from_anndata(adata))
    assert mlflow.get_run(run.info.run_id).inputs.dataset_inputs[0].dataset.digest == content_digest(adata)


def test_only_anndata_files_are_claimed(registry):
    assert AnnDataSource._can_resolve("s3://bucket/a.h5ad")
    assert AnnDataSource._can_resolve("/data/a.zarr/")
    assert not AnnDataSource._can_resolve("s3://bucket/a.csv")
    assert not AnnDataSource._can_resolve(np.zeros(3))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web(file):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(file.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_kind_of_uri_gives_the_same_anndata(adata, file, web, registry):
    import fsspec

    with mlflow.start_run() as run:
        mlflow.log_artifact(str(file), "data")
    memory = fsspec.filesystem("memory")
    memory.put(str(file), "/bucket/tissue.h5ad")
    write_zarr(adata, file.with_suffix(".zarr"))
    memory.put(str(file.with_suffix(".zarr")), "/bucket/tissue.zarr", recursive=True)
    uris = [
        str(file),
        file.as_uri(),
        f"runs:/{run.info.run_id}/data/{file.name}",
        "models:/tiny/2/data/amici/adata.h5ad",
        f"{web}/my%20tissue.h5ad",
        f"{web}/my%20tissue.zarr",
        "memory://bucket/tissue.h5ad",
        "memory://bucket/tissue.zarr",
        str(file.with_suffix(".zarr")),
    ]
    assert {uri: amici_eval.from_anndata(uri).digest for uri in uris} == dict.fromkeys(uris, content_digest(adata))


def test_fetched_copies_are_removed(web):
    with AnnDataSource(f"{web}/my%20tissue.h5ad").local_copy() as path:
        assert path.is_file()
    assert not path.exists()


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_fetched_copy_lasts_as_long_as_it_is_read(adata, file, web, suffix, tmp_path, monkeypatch):
    if suffix == ".zarr":
        write_zarr(adata, file.with_suffix(".zarr"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "fetched"))
    (tmp_path / "fetched").mkdir()
    digest = content_digest(adata)
    dataset = amici_eval.from_anndata(f"{web}/my%20tissue{suffix}", backed=True)
    assert is_on_disk(dataset.adata)
    assert len(list((tmp_path / "fetched").iterdir())) == 1
    assert dataset.digest == digest
    del dataset
    gc.collect()
    assert list((tmp_path / "fetched").iterdir()) == []
    assert not is_on_disk(amici_eval.from_anndata(f"{web}/my%20tissue{suffix}", backed=False).adata)
    assert list((tmp_path / "fetched").iterdir()) == []


@pytest.mark.parametrize("where", ["X", "layer"])
def test_a_large_file_by_genes_is_taken(adata, tmp_path, where, monkeypatch):
    adata.layers["other"] = sparse.csr_matrix(adata.X)
    if where == "X":
        adata.X = sparse.csc_matrix(adata.X)
    else:
        adata.layers["other"] = adata.layers["other"].tocsc()
    adata.write_h5ad(tmp_path / "a.h5ad")
    monkeypatch.setattr(files, "_SMALL_BYTES", 0)
    monkeypatch.setattr(files, "available_memory", lambda: 4)
    dataset = amici_eval.from_anndata(tmp_path / "a.h5ad")
    assert not is_on_disk(dataset.adata)
    assert dataset.digest == content_digest(adata)


def test_a_local_file_is_never_removed(file):
    dataset = amici_eval.from_anndata(file, backed=True)
    assert is_on_disk(dataset.adata)
    del dataset
    gc.collect()
    assert file.is_file()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("{web}/absent.h5ad", "404"),
        ("http://127.0.0.1:9/a.h5ad", "cannot be fetched"),
        ("nosuch://bucket/a.h5ad", "fsspec package of its scheme"),
        ("s3://bucket/a.csv", "must be an AnnData written as .h5ad or .zarr"),
        ("memory://bucket/absent.h5ad", "cannot be fetched"),
    ],
)
def test_what_cannot_be_fetched_says_so(uri, message, web):
    with pytest.raises(DataError, match=message):
        amici_eval.from_anndata(uri.format(web=web))


@pytest.mark.parametrize(
    "uri",
    [
        "reference::http://127.0.0.1:9/refs.zarr",
        "simplecache::http://127.0.0.1:9/a.zarr",
        "reference://a.zarr",
        "zip://a.zarr::memory://b.zip",
    ],
)
def test_indirect_uris_are_refused(uri):
    with pytest.raises(DataError, match="data must be named directly"):
        amici_eval.from_anndata(uri)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shape": [2**40, 2], "chunks": [1, 2]},
            r"have 1099511627\d+ chunks: each would be asked for, .* 1000000",
        ),
        ({"shape": [-3, 2]}, "has sizes that are no whole numbers"),
        ({"shape": [3]}, r"of shape \[3\] has chunks of shape"),
        ({"dimension_separator": "/../../"}, "keys must lie inside"),
        (None, "has more than 67108864 bytes"),
    ],
)
def test_what_a_web_server_says_of_a_zarr_is_checked_before_it_is_asked_for(adata, file, web, change, message):
    root = file.with_suffix(".zarr")
    write_zarr(adata, root)
    said = json.loads((root / ".zmetadata").read_text())
    if change is None:
        said["metadata"][".zattrs"] = {"long": "x" * 2**26}
    else:
        said["metadata"]["obsm/spatial/.zarray"] |= change
    (root / ".zmetadata").write_text(json.dumps(said))
    with pytest.raises(DataError, match=message):
        amici_eval.from_anndata(f"{web}/my%20tissue.zarr")


def test_keys_that_lead_out_of_the_folder_are_refused(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store["/evil/a.zarr/../../escaped"] = memory.store.get("/x") or type(memory.open("/x", "wb"))(
        memory, "/evil"
    )
    with pytest.raises(DataError, match="keys must lie inside"):
        amici_eval.from_anndata("memory://evil/a.zarr")
    memory.store.clear()


def test_a_zarr_that_stores_a_pickle_is_refused(adata, tmp_path):
    adata.write_zarr(tmp_path / "a.zarr")
    array = tmp_path / "a.zarr" / "obs" / "_index" / ".zarray"
    content = array.read_text()
    assert "vlen-utf8" in content
    array.write_text(content.replace("vlen-utf8", "pickle"))
    with pytest.raises(DataError, match="stores a pickle"):
        amici_eval.open_anndata(tmp_path / "a.zarr")


def test_secrets_in_a_uri_are_neither_logged_nor_shown():
    source = AnnDataSource("https://user:SECRET@127.0.0.1:9/a.h5ad?sig=SECRET")
    assert source.to_dict() == {"uri": "https://***@127.0.0.1:9/a.h5ad?***"}
    with pytest.raises(DataError) as caught, source.local_copy():
        pass
    assert "SECRET" not in str(caught.value)
