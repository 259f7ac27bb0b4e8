"""What is read of a file, what is left out, and what is said when something that is needed cannot be read."""

from __future__ import annotations

import fcntl
import logging
import shutil
from importlib.metadata import version
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from omegaconf import OmegaConf
from scipy import sparse

from amici_eval.cli.config import SCHEMAS, data_uri
from amici_eval.common.errors import AmiciEvalError, DataError
from amici_eval.data import files
from amici_eval.data.checks import coordinates_of, expression_matrix
from amici_eval.data.files import _numeric_obsm, content_digest, open_anndata, write_plain
from amici_eval.data.tissue import prepare
from amici_eval.settings.evaluation import DataSpec
from amici_eval.tracking.dataset import AnnDataSource, from_anndata
from tests.data.test_data import CARD, make_adata

FORMATS = ("h5ad", "zarr")


def write(adata, path):
    """Write an AnnData by the suffix of a path, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    getattr(adata.copy(), f"write_{path.suffix[1:]}")(path)
    return path


def edit(path, change):
    """Change the store behind a file."""
    store = h5py.File(path, "r+") if path.suffix == ".h5ad" else zarr.open_group(str(path), mode="r+")
    change(store)
    if path.suffix == ".h5ad":
        store.close()


@pytest.fixture(params=FORMATS)
def path(request, tmp_path):
    adata = make_adata(60)
    adata.obs["batch"] = pd.Categorical(["a", "b", None] * 20)
    return write(adata, tmp_path / f"tissue.{request.param}")


# --- what is left out -------------------------------------------------------------------------------------------------


def unknown(name):
    """Return a change that makes an element one of a kind that only a later anndata knows."""

    def change(store):
        if name.startswith("raw") and "raw" in store:
            # as zarr stores that there is none
            del store["raw"]
        if name not in store:
            store.create_dataset(name, data=np.zeros((60, 2)))
        store[name].attrs["encoding-type"], store[name].attrs["encoding-version"] = "of-the-future", "9.9.9"

    return change


def a_column_of_another_shape(store):
    made = store.create_dataset("obs/fancy", data=np.zeros((60, 2)))
    made.attrs["encoding-type"], made.attrs["encoding-version"] = "array", "0.2.0"


def of_another_shape(store):
    made = store.create_dataset("obsm/odd", data=np.zeros(3))
    made.attrs["encoding-type"], made.attrs["encoding-version"] = "array", "0.2.0"


UNNEEDED = {
    "uns": unknown("uns/note"),
    "raw": unknown("raw/X"),
    "obsp": unknown("obsp/near"),
    "varm": unknown("varm/loadings"),
    "obsm": unknown("obsm/ragged"),
    "a layer": unknown("layers/other"),
    "a column": unknown("obs/fancy"),
    "a column of another shape": a_column_of_another_shape,
    "another shape": of_another_shape,
}


@pytest.mark.parametrize("what", UNNEEDED)
@pytest.mark.parametrize("backed", [False, True])
def test_what_nobody_needs_may_be_unreadable(path, what, backed):
    digest = content_digest(open_anndata(path))
    edit(path, UNNEEDED[what])
    if what.startswith("a column"):
        edit(
            path,
            lambda store: store["obs"].attrs.__setitem__(
                "column-order", [*store["obs"].attrs["column-order"], "fancy"]
            ),
        )
    adata = open_anndata(path, backed=backed)
    assert content_digest(adata) == digest
    assert prepare(adata, CARD, DataSpec(layer="counts")).n_cells == 60


@pytest.mark.parametrize(
    ("name", "shown", "spec"),
    [
        ("obsm/spatial", "adata.obsm['spatial']", DataSpec()),
        ("layers/counts", "adata.layers['counts']", DataSpec(layer="counts")),
        ("X", "adata.X", DataSpec()),
        ("obs/batch", "adata.obs['batch']", DataSpec(sample_key="batch")),
    ],
)
def test_what_is_needed_and_unreadable_is_said_to_be_there(path, name, shown, spec):
    edit(path, unknown(name))
    adata = open_anndata(path)
    with pytest.raises(DataError) as caught:
        prepare(adata, CARD, spec)
    assert caught.value.value.startswith(f"{shown} cannot be read from {path} (IORegistryError")
    assert caught.value.rule == f"a newer anndata than {version('anndata')} wrote it"
    assert "install a newer anndata" in caught.value.fix


def test_texts_of_a_newer_anndata_are_read(path):
    adata = make_adata(60)
    adata.obs_names, adata.var_names = adata.obs_names.astype("string"), adata.var_names.astype("string")
    adata.obs["text"] = pd.array(["a", None, "b"] * 20, dtype="string")
    adata.obs["kind"] = pd.Categorical(adata.obs["text"])
    with ad.settings.override(allow_write_nullable_strings=True):
        write(adata, path.with_stem("other"))
    opened = open_anndata(path.with_stem("other"))
    assert content_digest(opened) == content_digest(adata)
    assert opened.obs["text"].isna().sum() == opened.obs["kind"].isna().sum() == 20


# --- a data file is the user's own ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["X/.DS_Store", "obs/_index/._0", "X/.nfs0001", "X/.0.0.aB3dEf", "X/0.0~", "tables", "X/0"]
)
def test_only_names_of_chunks_are_chunks(tmp_path, name, caplog):
    path = write(make_adata(60), tmp_path / "a.zarr")
    digest = content_digest(open_anndata(path))
    (path / name).write_bytes(b"\0\0\0\1Bud1" * 100)
    with caplog.at_level(logging.WARNING):
        assert content_digest(open_anndata(path)) == digest
    assert caplog.records == []


def test_a_chunk_that_an_interrupted_copy_lacks_is_said(tmp_path, caplog):
    path = write(make_adata(60), tmp_path / "a.zarr")
    (path / "X/0.0").rename(path / "X/.0.0.aB3dEf")
    open_anndata(path)
    assert "1 of 1 chunks of X are not stored and read as 0" in caplog.text


def test_links_within_a_file_and_matrices_that_pack_well_are_read(tmp_path):
    adata = make_adata(60)
    adata.layers["zeros"] = np.zeros(adata.shape, dtype=np.float32)
    adata.copy().write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file.move("layers/zeros", "elsewhere")
        file["layers/zeros"] = h5py.SoftLink("/elsewhere")
        file["obsm/again"] = file["obsm/spatial"]
    adata.obsm["again"] = adata.obsm["spatial"]
    assert content_digest(open_anndata(tmp_path / "a.h5ad")) == content_digest(adata)


def test_a_store_that_needs_a_pickle_is_refused_and_runs_nothing(tmp_path):
    path = write(make_adata(60), tmp_path / "a.zarr")
    metadata = path / "obs/_index/.zarray"
    metadata.write_text(metadata.read_text().replace("vlen-utf8", "pickle"))
    with pytest.raises(DataError, match="stores a pickle"):
        open_anndata(path)


# --- causes -----------------------------------------------------------------------------------------------------------


def unpackable(path):
    with h5py.File(path, "r+") as file:
        del file["X"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((60, 6))
        plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        h5py.h5d.create(file.id, b"X", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((60, 6)), plist)


def a_folder(path):
    path.unlink()
    path.mkdir()


def of_another_kind(path):
    with h5py.File(path, "w") as file:
        file.create_group("matrix")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (a_folder, "is a folder, not a plain file"),
        (of_another_kind, "it holds matrix.* it is no AnnData, which has obs and var"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_each_cause_has_its_sentence(tmp_path, change, said):
    path = write(make_adata(60), tmp_path / "a.h5ad")
    change(path)
    with pytest.raises(DataError, match=said):
        open_anndata(path)


def test_a_filter_that_is_not_installed_is_named(tmp_path):
    path = write(make_adata(60), tmp_path / "a.h5ad")
    unpackable(path)
    adata = open_anndata(path)
    with pytest.raises(DataError, match=r"/X is packed by the filter 32015.*install the package hdf5plugin"):
        expression_matrix(adata, None)


def test_a_file_that_another_program_writes_is_said_to_be_locked(tmp_path):
    path = write(make_adata(60), tmp_path / "a.h5ad")
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another program has it open.*HDF5_USE_FILE_LOCKING=FALSE"):
            open_anndata(path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied"), "you may not read it"),
        (OSError("[Errno 13] Unable to synchronously open file (error message = 'Permission denied')"), "you may not"),
        (OSError(116, "Stale file handle"), "the disk or the file server did not deliver it"),
        (OSError(37, "No locks available"), "cannot lock files"),
        (ValueError("codec not available: 'x'"), "nothing installed can unpack"),
        (ModuleNotFoundError("No module named 'awkward'"), "install that package"),
        (MemoryError(), "does not fit into the free memory; leave its expression on disk"),
        (RuntimeError("of another kind"), "must be an AnnData written as .h5ad or .zarr"),
    ],
)
def test_what_other_libraries_say_becomes_a_sentence(tmp_path, monkeypatch, error, said):
    path = write(make_adata(60), tmp_path / "a.h5ad")

    def fail(_):
        # as anndata does
        raise RuntimeError("while reading key 'X'") from error

    monkeypatch.setattr(files, "open_hdf5", fail)
    with pytest.raises(DataError, match=said) as caught:
        open_anndata(path)
    assert caught.value.value.startswith(f"{path} cannot be read (")


@pytest.mark.parametrize("where", ["a.zarr", "a.zarr/tables/t"])
def test_zarr_of_format_3_is_told(tmp_path, where):
    (tmp_path / where).mkdir(parents=True)
    (tmp_path / "a.zarr/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(DataError, match=r"written in zarr format 3: zarr 2.*zarr_write_format = 2"):
        open_anndata(tmp_path / where)


# --- tables of a SpatialData store ------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    for name, n_cells in (("cells", 60), ("nuclei", 50)):
        write(make_adata(n_cells), tmp_path / "s.zarr/tables" / f"{name}.zarr").rename(
            tmp_path / f"s.zarr/tables/{name}"
        )
    zarr.open_group(str(tmp_path / "s.zarr"), mode="a").create_group("images")
    (tmp_path / "s.zarr/tables/.DS_Store").write_bytes(b"x")
    return tmp_path / "s.zarr"


def test_a_table_is_named_by_setting_or_path(store):
    digest = content_digest(make_adata(50))
    assert content_digest(open_anndata(store / "tables/nuclei")) == digest
    assert content_digest(open_anndata(store, table="nuclei")) == digest
    dataset = from_anndata(store, table="nuclei")
    assert dataset.digest == from_anndata(f"{store}/tables/nuclei").digest == digest
    # a run that logged the table finds it again
    assert dataset.source.to_dict() == {"uri": f"{store}/tables/nuclei"}
    assert AnnDataSource._can_resolve(f"{store}/tables/nuclei")
    assert not AnnDataSource._can_resolve(f"{store}/images/nuclei")


def test_the_root_of_a_store_says_which_tables_there_are(store):
    with pytest.raises(
        DataError, match=r"with the tables cells, nuclei: .* set data.table=cells, or give .*tables/cells"
    ):
        open_anndata(store)
    with pytest.raises(DataError, match=r"has no tables/other.*: its tables are cells, nuclei"):
        open_anndata(store, table="other")
    with pytest.raises(DataError, match="it is no AnnData"):
        open_anndata(store / "images")
    shutil.rmtree(store / "tables/cells")
    assert open_anndata(store).n_obs == 50


def test_the_only_table_of_an_old_store_is_found(store):
    shutil.rmtree(store / "tables/cells")
    (store / "tables").rename(store / "table")
    for path, table in ((store, None), (store, "nuclei"), (store / "table/nuclei", None)):
        assert open_anndata(path, table=table).n_obs == 50


@pytest.mark.parametrize("table", ["a/b", "..", ""])
def test_a_table_is_one_name_in_a_zarr(store, path, table):
    for place in (store, path):
        with pytest.raises(DataError):
            open_anndata(place, table=table)
    with pytest.raises(DataError):
        open_anndata(path, table="cells")


def test_a_remote_table_is_fetched_alone(store):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(store), "/bucket/s.zarr", recursive=True)
    dataset = from_anndata("memory://bucket/s.zarr", table="cells")
    assert dataset.digest == content_digest(make_adata(60))
    assert dataset.source.uri == "memory://bucket/s.zarr/tables/cells"
    memory.store.clear()


def test_settings_name_a_table():
    config = OmegaConf.structured(SCHEMAS["evaluate"](model_uri="m"))
    assert data_uri(config) is None
    config.data.table = "cells"
    with pytest.raises(AmiciEvalError, match=r"data\.table=cells"):
        data_uri(config)
    config.data.uri = "s.zarr/"
    assert data_uri(config) == "s.zarr/tables/cells"


# --- forms of expression ----------------------------------------------------------------------------------------------


def unsorted_with_duplicates(dense):
    """Return a CSR matrix with columns in reverse order, each entry in two halves."""
    rows, columns = np.nonzero(dense)
    order = np.lexsort((-columns, rows))
    rows, columns = np.repeat(rows[order], 2), np.repeat(columns[order], 2)
    indptr = np.searchsorted(rows, np.arange(len(dense) + 1))
    return sparse.csr_matrix((dense[rows, columns] / 2, columns, indptr), shape=dense.shape)


FORMS = {
    "int32": lambda x: x.astype(np.int32),
    "uint16": lambda x: x.astype(np.uint16),
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "big endian": lambda x: x.astype(">f4"),
    "by columns": np.asfortranarray,
    "csr of int64": lambda x: sparse.csr_matrix(x.astype(np.int64)),
    "csc": sparse.csc_matrix,
    "csc of float64": lambda x: sparse.csc_matrix(x.astype(np.float64)),
    "unsorted with duplicates": unsorted_with_duplicates,
    "csr array": sparse.csr_array,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_form_of_expression_gives_the_same_numbers(tmp_path, form, suffix):
    adata = make_adata(60)
    adata.X = np.random.default_rng(0).poisson(1.0, adata.shape).astype(np.float32)
    digest, numbers = content_digest(adata), adata.X
    adata.X = FORMS[form](adata.X)
    path = write(adata, tmp_path / f"a.{suffix}")
    variants = [adata, open_anndata(path)] + ([] if form.startswith("csc") else [open_anndata(path, backed=True)])
    for variant in variants:
        rows = np.array([3, 50, 3, 0])
        np.testing.assert_array_equal(prepare(variant, CARD, DataSpec()).expression(rows), numbers[rows])
        assert content_digest(variant) == digest


class Elsewhere:
    """A matrix that lies elsewhere: ``bring`` makes rows of it an array of this machine, or fails."""

    ndim = 2

    def __init__(self, matrix, bring=None):
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype
        if bring is not None:
            self.compute = lambda: bring(self.matrix)
        self.bring = bring

    def __getitem__(self, index):
        return Elsewhere(self.matrix[index], self.bring)

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_what_can_be_computed_is(form):
    adata = make_adata(60)
    digest, numbers = content_digest(adata), adata.X
    adata._X = Elsewhere(form(adata.X), bring=lambda block: block)
    assert content_digest(adata) == digest
    np.testing.assert_array_equal(prepare(adata, CARD, DataSpec()).expression(np.arange(60)), numbers)


@pytest.mark.parametrize("bring", [None, Elsewhere])
@pytest.mark.parametrize(
    "use", [content_digest, lambda adata: prepare(adata, CARD, DataSpec()), lambda adata: write_plain(adata, "x.h5ad")]
)
def test_what_cannot_be_brought_here_says_which_call_helps(bring, use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adata = make_adata(60)
    adata._X = Elsewhere(adata.X, bring=bring)
    with pytest.raises(DataError, match=r"adata.X is a tests Elsewhere .*\.to_memory\(\).*anndata_to_CPU"):
        use(adata)


def test_coordinates_on_a_gpu_say_which_call_helps():
    # anndata takes the classes of cupy itself only
    adata = SimpleNamespace(obsm={"spatial": Elsewhere(make_adata(60).obsm["spatial"])})
    with pytest.raises(DataError, match=r"obsm\['spatial'\] is a tests Elsewhere .*anndata_to_CPU"):
        coordinates_of(adata, "spatial")


def test_tables_that_are_opened_lazily_say_which_call_helps():
    adata = make_adata(60)
    adata._obs = SimpleNamespace(index=adata.obs_names)
    for use in (content_digest, lambda adata: prepare(adata, CARD, DataSpec())):
        with pytest.raises(
            DataError, match=r"adata.obs is a SimpleNamespace: the AnnData was opened lazily.*to_memory\(\)"
        ):
            use(adata)


@pytest.mark.parametrize("form", [lambda x: x.astype(object), lambda x: x.astype(str), lambda x: x.astype(complex)])
def test_expression_that_is_no_real_number_is_refused(form):
    adata = make_adata(60)
    adata._X = form(adata.X)
    for use in (content_digest, lambda adata: prepare(adata, CARD, DataSpec())):
        with pytest.raises(DataError, match="expression must be real numbers"):
            use(adata)


def test_a_masked_value_is_a_missing_one():
    adata = make_adata(60)
    adata._X = np.ma.masked_array(adata.X, mask=np.eye(60, 6, dtype=bool))
    with pytest.raises(DataError, match=f"expression of g0 in cell {adata.obs_names[0]} is nan"):
        prepare(adata, CARD, DataSpec())


# --- what a bundle holds ----------------------------------------------------------------------------------------------


def test_of_coordinates_only_arrays_of_numbers_count():
    class Ragged:
        def __array__(self, *_, **__):
            raise ValueError("cannot convert to RegularArray")

    held = {"ragged": Ragged(), "text": np.full((3, 2), "a"), "sparse": sparse.eye(3), "places": np.eye(3)}
    held |= {"gpu": Elsewhere(np.eye(3)), "table": pd.DataFrame(np.eye(3))}
    assert list(_numeric_obsm(SimpleNamespace(obsm=held))) == ["places", "table"]


def test_what_can_be_read_can_be_bundled_and_read_by_old_versions(tmp_path):
    adata = make_adata(60)
    adata.obs_names, adata.var_names = adata.obs_names.astype("string"), adata.var_names.astype("string")
    adata.obs_names.name = adata.var_names.name = "cell_type"
    adata.obs["text"] = pd.array(["a", None, "b"] * 20, dtype="string")
    adata.obs["when"] = pd.date_range("2020-01-01", periods=60)
    adata.obs["bins"] = pd.cut(np.arange(60.0), 3)
    adata.obs["mixed"] = np.array([1, "1", 2.5] * 20, dtype=object)
    adata.obs["whole"] = pd.array([1, None, 2] * 20, dtype="Int64")
    adata.obs["real"] = pd.array([0.5, None, 2] * 20, dtype="Float64")
    adata.obs["truth"] = pd.array([True, None, False] * 20, dtype="boolean")
    adata.obs["ordered"] = pd.Categorical(["x", "y", "z"] * 20, categories=["z", "y", "x"], ordered=True)
    adata.uns["anything"] = object()
    adata._X = Elsewhere(sparse.csc_matrix(adata.X), bring=lambda block: block)
    digest, before = content_digest(adata), adata.obs.copy()
    write_plain(adata, tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(adata.obs, before)
    opened = ad.read_h5ad(tmp_path / "a.h5ad")
    assert content_digest(opened) == content_digest(open_anndata(tmp_path / "a.h5ad")) == digest
    assert list(opened.obs["ordered"].cat.categories) == ["z", "y", "x"]
    kinds = set()
    with h5py.File(tmp_path / "a.h5ad") as file:
        file.visititems(lambda _, node: kinds.add(node.attrs.get("encoding-type", "array")))
    assert kinds == {"dataframe", "dict", "array", "string-array", "categorical", "csr_matrix"}
