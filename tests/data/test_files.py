from __future__ import annotations

import gc
import logging
from contextlib import nullcontext

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from amici_eval.common.errors import DataError
from amici_eval.data import files as module
from amici_eval.data.files import content_digest, is_on_disk, open_anndata
from amici_eval.data.membership import describe_training_data
from amici_eval.data.tissue import prepare
from amici_eval.settings.evaluation import DataSpec, SubsetSpec
from tests.data.test_data import CARD, make_adata
from tests.fakes import make_card

FORMATS = ("h5ad", "zarr")
KINDS = ("dense", "csr")


def written(folder, kind, suffix, *, genes=CARD.genes):
    """Write a tissue and return it with its path."""
    adata = make_adata(200, genes=genes)
    adata.obs["gap"] = pd.Categorical(["a", None] * 100)
    adata.obsp["near"] = sparse.eye(200, format="csr")
    if kind != "dense":
        adata.X, adata.layers["counts"] = (sparse.csr_matrix(m) for m in (adata.X, adata.layers["counts"]))
    path = folder / f"{kind}.{suffix}"
    getattr(adata.copy(), "write_h5ad" if suffix == "h5ad" else "write_zarr")(path)
    return adata, path


@pytest.fixture(params=[(kind, suffix) for kind in KINDS for suffix in FORMATS], ids=lambda p: f"{p[0]}-{p[1]}")
def both(request, tmp_path):
    kind, suffix = request.param
    return written(tmp_path, kind, suffix)


def by_genes(folder, suffix, where):
    """Write a tissue with ``X`` or a layer by genes (CSC) and return it with its path."""
    adata = make_adata(200)
    if where == "X":
        adata.X = sparse.csc_matrix(adata.X)
    else:
        adata.layers[where] = sparse.csc_matrix(adata.layers[where])
    path = folder / f"by genes.{suffix}"
    getattr(adata.copy(), "write_h5ad" if suffix == "h5ad" else "write_zarr")(path)
    return adata, path


def test_expression_stays_on_disk(both):
    adata, path = both
    backed = open_anndata(path, backed=True)
    for matrix in (backed.X, backed.layers["counts"]):
        array = matrix.group["data"] if hasattr(matrix, "group") else matrix
        assert isinstance(array, (h5py.Dataset, zarr.Array))
    assert is_on_disk(backed)
    assert not is_on_disk(open_anndata(path, backed=False))
    pd.testing.assert_frame_equal(backed.obs, adata.obs)
    pd.testing.assert_frame_equal(backed.var, adata.var)
    np.testing.assert_array_equal(backed.obsm["spatial"], adata.obsm["spatial"])
    # nobody needs them
    assert not any((backed.uns, backed.obsp, backed.varm))


def test_a_tissue_on_disk_is_the_tissue_in_memory(both):
    adata, path = both
    backed = open_anndata(path, backed=True)
    digest = content_digest(adata)
    assert content_digest(backed) == digest
    for layer in (None, "counts"):
        facts = describe_training_data(adata, coord_obsm_key="spatial", layer=layer)
        assert describe_training_data(backed, coord_obsm_key="spatial", layer=layer) == facts
        card = make_card(training_data=facts)
        spec = DataSpec(layer=layer, subset=SubsetSpec(key="kept", value="True"))
        here, there = prepare(adata, card, spec), prepare(backed, card, spec)
        assert here.notes == there.notes
        receivers = here.receivers()
        for label, rows in there.receivers().items():
            np.testing.assert_array_equal(rows, receivers[label])
            np.testing.assert_array_equal(there.expression(rows), here.expression(rows))
            streamed = np.full((len(rows), 6), np.nan, dtype=np.float32)
            for block in there.expression_blocks(rows, max_rows=7):
                streamed[block.positions] = block.values
            np.testing.assert_array_equal(streamed, here.expression(rows))
    assert content_digest(backed) == digest


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_genes_of_a_tissue_on_disk_are_aligned(tmp_path, kind, suffix):
    adata, path = written(tmp_path, kind, suffix, genes=("g3", "extra", *(g for g in CARD.genes if g != "g3")))
    tissue = prepare(open_anndata(path, backed=True), CARD, DataSpec())
    rows = np.array([150, 3, 3, 199])
    expected = adata[:, list(CARD.genes)].X[rows]
    expected = expected.toarray() if sparse.issparse(expected) else expected
    np.testing.assert_array_equal(tissue.expression(rows), expected)
    for block in tissue.expression_blocks(rows):
        np.testing.assert_array_equal(block.values, expected[block.positions])


@pytest.mark.parametrize("kind", KINDS)
def test_values_on_disk_that_are_not_finite_name_gene_and_cell(tmp_path, kind):
    adata = make_adata(200)
    adata.X[123, 4] = np.nan
    if kind == "csr":
        adata.X = sparse.csr_matrix(adata.X)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DataError) as caught:
        prepare(open_anndata(tmp_path / "a.h5ad", backed=True), CARD, DataSpec())
    assert caught.value.value == f"expression of g4 in cell {adata.obs_names[123]} is nan"


@pytest.mark.parametrize("kind", KINDS)
def test_what_anndata_itself_opened_backed_is_taken(tmp_path, kind):
    adata, path = written(tmp_path, kind, "h5ad")
    backed = ad.read_h5ad(path, backed="r")
    try:
        tissue = prepare(backed, CARD, DataSpec())
        np.testing.assert_array_equal(tissue.expression(np.arange(200)), np.asarray(adata.to_df()))
        assert content_digest(backed) == content_digest(adata)
    finally:
        backed.file.close()


@pytest.mark.parametrize("suffix", FORMATS)
def test_expression_by_genes_must_be_read_into_memory(tmp_path, suffix):
    adata = make_adata(200)
    adata.X = sparse.csc_matrix(adata.X)
    path = tmp_path / f"a.{suffix}"
    getattr(adata, "write_h5ad" if suffix == "h5ad" else "write_zarr")(path)
    backed = open_anndata(path, backed=True)
    for call in (lambda: prepare(backed, CARD, DataSpec()), lambda: content_digest(backed)):
        with pytest.raises(DataError, match=r"^adata\.X is stored by genes \(CSC\).*open it with backed=False"):
            call()
    # a matrix that is not asked for does no harm
    assert prepare(backed, CARD, DataSpec(layer="counts")).n_cells == 200
    assert prepare(open_anndata(path, backed=False), CARD, DataSpec()).n_cells == 200


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_layer_by_genes_that_nobody_asks_for_does_no_harm(tmp_path, suffix):
    adata, path = by_genes(tmp_path, suffix, "counts")
    backed = open_anndata(path, backed=True)
    assert content_digest(backed) == content_digest(adata)
    facts = describe_training_data(backed, coord_obsm_key="spatial", layer=None)
    assert facts == describe_training_data(adata, coord_obsm_key="spatial", layer=None)
    assert prepare(backed, CARD, DataSpec()).n_cells == 200
    with pytest.raises(DataError, match=r"^adata\.layers\['counts'\] is stored by genes \(CSC\)"):
        prepare(backed, CARD, DataSpec(layer="counts"))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("where", ["X", "counts"])
def test_a_large_file_by_genes_is_read_into_memory(tmp_path, suffix, where, monkeypatch, caplog):
    adata, path = by_genes(tmp_path, suffix, where)
    monkeypatch.setattr(module, "_SMALL_BYTES", 0)
    monkeypatch.setattr(module, "available_memory", lambda: 4)
    with caplog.at_level(logging.INFO, logger="amici_eval"):
        opened = open_anndata(path)
    name = "X" if where == "X" else "layers/counts"
    assert [record.getMessage().split("): ")[1] for record in caplog.records] == [f"{name} stored by genes (CSC)"]
    assert not is_on_disk(opened)
    assert content_digest(opened) == content_digest(adata)
    for layer in (None, "counts"):
        assert prepare(opened, CARD, DataSpec(layer=layer)).n_cells == 200
    # nothing keeps the file open
    if suffix == "h5ad":
        h5py.File(path, "r+").close()


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_anndata_without_x_is_opened(tmp_path, suffix):
    adata = make_adata(200)
    adata.X = None
    path = tmp_path / f"a.{suffix}"
    getattr(adata, "write_h5ad" if suffix == "h5ad" else "write_zarr")(path)
    backed = open_anndata(path, backed=True)
    assert backed.X is None
    assert prepare(backed, CARD, DataSpec(layer="counts")).n_cells == 200
    assert content_digest(backed) == content_digest(adata)


def test_a_backed_anndata_can_be_written(both, tmp_path):
    adata, path = both
    open_anndata(path, backed=True).write_h5ad(tmp_path / "again.h5ad")
    assert content_digest(open_anndata(tmp_path / "again.h5ad")) == content_digest(adata)


# --- when it stays on disk


def size_of(path):
    """Return how many bytes what is read of a file takes, by what it says of itself."""
    with h5py.File(path) if path.suffix == ".h5ad" else nullcontext(zarr.open_group(str(path), mode="r")) as store:
        read = [store[name] for name in ("X", "layers", "obs", "var", "obsm") if name in store]
        return sum(module._unpacked(array) for node in read for array in module._arrays(node))


def test_large_files_stay_on_disk(both, monkeypatch, caplog):
    _, path = both
    monkeypatch.setattr(module, "_SMALL_BYTES", 0)
    size = size_of(path)
    monkeypatch.setattr(module, "available_memory", lambda: 4 * size)
    assert not is_on_disk(open_anndata(path))
    monkeypatch.setattr(module, "available_memory", lambda: 4 * size - 4)
    with caplog.at_level(logging.INFO, logger="amici_eval"):
        assert is_on_disk(open_anndata(path))
    assert "its expression stays on disk" in caplog.text
    assert not is_on_disk(open_anndata(path, backed=False))
    monkeypatch.setattr(module, "_SMALL_BYTES", size)
    assert not is_on_disk(open_anndata(path))


def test_the_size_is_that_of_the_unpacked_arrays(tmp_path):
    adata = ad.AnnData(X=np.zeros((5000, 100), dtype=np.float32), layers={"s": sparse.eye(5000, 100, format="csr")})
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    adata.write_zarr(tmp_path / "a.zarr")
    for name in ("a.h5ad", "a.zarr"):
        expression = 5000 * 100 * 4 + 100 * (8 + 4)
        assert expression < size_of(tmp_path / name) < expression + 5000 * 100


# --- what a file that stays open must bear


def test_the_file_is_closed_with_the_last_matrix(tmp_path):
    _, path = written(tmp_path, "csr", "h5ad")
    tissue = prepare(open_anndata(path, backed=True), CARD, DataSpec())
    gc.collect()
    assert tissue.expression(np.arange(3)).shape == (3, 6)
    with pytest.raises(OSError, match="already open for read-only"):
        h5py.File(path, "r+")
    del tissue
    gc.collect()
    h5py.File(path, "r+").close()
