from __future__ import annotations

import threading
import tracemalloc

import anndata as ad
import h5py
import numpy as np
import pytest
import zarr
from anndata.io import sparse_dataset
from scipy import sparse

from amici_eval.common.errors import DataError
from amici_eval.data import matrices as module
from amici_eval.data.matrices import (
    as_dense,
    expression_blocks,
    lies_on_disk,
    lies_on_disk_by_columns,
    open_rows,
    spans,
    stored_values,
    take_expression,
)

N_CELLS, N_GENES = 300, 12
ON_DISK = ("h5 dense", "h5 csr", "h5 gzip dense", "h5 gzip csr", "zarr dense", "zarr csr")
STORAGES = ("dense", "F order", "float64", "counts", "csr", "csc", "csr_array", *ON_DISK)

_rng = np.random.default_rng(5)
VALUES = np.where(_rng.random((N_CELLS, N_GENES)) < 0.3, _rng.integers(1, 9, size=(N_CELLS, N_GENES)), 0).astype("f4")
# runs of cells without any count
VALUES[40:60] = VALUES[299] = VALUES[0] = 0


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same values in every storage."""
    folder = tmp_path_factory.mktemp("matrices")
    adata = ad.AnnData(X=sparse.csr_matrix(VALUES), layers={"dense": VALUES.copy()})
    found = {
        "dense": VALUES,
        "F order": np.asfortranarray(VALUES),
        "float64": VALUES.astype("f8"),
        "counts": VALUES.astype("u1"),
        "csr": sparse.csr_matrix(VALUES),
        "csc": sparse.csc_matrix(VALUES),
        "csr_array": sparse.csr_array(VALUES),
    }
    files = []
    for name, compression in (("h5", None), ("h5 gzip", "gzip")):
        adata.write_h5ad(folder / f"{name}.h5ad", compression=compression)
        files.append(h5py.File(folder / f"{name}.h5ad"))
        found[f"{name} dense"] = files[-1]["layers/dense"]
        found[f"{name} csr"] = sparse_dataset(files[-1]["X"])
    adata.write_zarr(folder / "a.zarr", chunks=(37, 5))
    group = zarr.open_group(str(folder / "a.zarr"), mode="r")
    found["zarr dense"], found["zarr csr"] = group["layers/dense"], sparse_dataset(group["X"])
    yield found
    for file in files:
        file.close()


ROWS = {
    "none": [],
    "one": [17],
    "last": [299],
    "all": np.arange(N_CELLS),
    "backwards": np.arange(N_CELLS)[::-1],
    "empty cells": np.arange(40, 60),
    "scattered": [290, 3, 150, 4],
    "repeated": [7, 7, 299, 0, 7, 150, 0],
    "any order": np.random.default_rng(0).permutation(N_CELLS)[:120],
    "32 bit": np.arange(10, 90, 3, dtype=np.int32),
}
COLUMNS = {"all": None, "some, in another order": np.array([11, 0, 5, 4])}


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_gives_the_same_rows(stored, storage, rows, columns, tight, monkeypatch):
    if tight:
        # many short reads instead of one
        monkeypatch.setattr(module, "_GAP_VALUES", 1)
        monkeypatch.setattr(module, "_READ_VALUES", 40)
    rows = np.asarray(rows, dtype=np.int64) if len(rows) == 0 else rows
    expected = VALUES[np.asarray(rows)] if columns is None else VALUES[np.asarray(rows)][:, columns]
    reader = open_rows(stored[storage])
    found = take_expression(reader, rows, columns)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    found[:] = -1.0
    for max_rows in (1, 50, 4096):
        blocks = list(expression_blocks(reader, rows, columns, max_rows=max_rows))
        assert all(0 < len(block.positions) == len(block.values) <= max_rows for block in blocks)
        positions = np.concatenate([np.empty(0, dtype=int), *(block.positions for block in blocks)])
        assert sorted(positions) == list(range(len(rows)))
        assert (np.diff(np.asarray(rows)[positions]) >= 0).all()
        for block in blocks:
            np.testing.assert_array_equal(block.values, expected[block.positions])
            assert block.values.dtype == np.float32


@pytest.mark.parametrize("storage", STORAGES)
def test_all_rows_are_walked_once(stored, storage, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", 29)
    start, parts = 0, []
    for first, block in spans(open_rows(stored[storage])):
        assert first == start
        assert 0 < block.shape[0] <= 29
        np.testing.assert_array_equal(np.sum(stored_values(block)), np.sum(as_dense(block)))
        parts.append(as_dense(block))
        start += block.shape[0]
    np.testing.assert_array_equal(np.concatenate(parts), VALUES)


def test_what_lies_on_disk_is_known(stored):
    assert {name for name, matrix in stored.items() if lies_on_disk(matrix)} == set(ON_DISK)


def test_values_that_a_sparse_matrix_stores_in_parts_are_added():
    matrix = sparse.csr_matrix((np.array([1.0, 2.0, 4.0]), np.array([2, 2, 0]), np.array([0, 2, 3])), shape=(2, 3))
    assert take_expression(open_rows(matrix), np.arange(2), None).tolist() == [[0, 0, 3], [4, 0, 0]]
    assert take_expression(open_rows(matrix), np.arange(2), np.array([2, 0])).tolist() == [[3, 0], [0, 4]]


def test_a_matrix_that_lies_on_disk_by_genes_is_refused(tmp_path):
    ad.AnnData(X=sparse.csc_matrix(VALUES)).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad") as file, pytest.raises(DataError) as caught:
        open_rows(sparse_dataset(file["X"]))
    assert (caught.value.value, caught.value.rule, caught.value.fix) == (
        "a matrix of the AnnData is stored by genes (CSC)",
        "expression that stays on disk must be stored by cells",
        "write it with adata.X = adata.X.tocsr() (or the layer), or open it with backed=False",
    )


def test_a_matrix_that_is_refused_is_named(tmp_path):
    adata = ad.AnnData(X=sparse.csc_matrix(VALUES), layers={"rows": sparse.csr_matrix(VALUES)})
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad") as file:
        columns, rows = sparse_dataset(file["X"]), sparse_dataset(file["layers/rows"])
        assert [lies_on_disk_by_columns(m) for m in (columns, rows, adata.X, VALUES)] == [True, False, False, False]
        with pytest.raises(DataError, match=r"^adata\.X is stored by genes \(CSC\)"):
            open_rows(columns, name="adata.X")
        assert open_rows(rows, name="adata.layers['rows']").shape == VALUES.shape


class Counting:
    """An array on disk that remembers which rows were read."""

    def __init__(self, values: np.ndarray, chunks: tuple[int, ...] | None) -> None:
        self.values, self.chunks, self.shape, self.dtype = values, chunks, values.shape, values.dtype
        self.reads: list[tuple[int, int]] = []

    def __getitem__(self, where: slice) -> np.ndarray:
        self.reads.append((int(where.start), int(where.stop)))
        return self.values[where]


def test_rows_that_are_stored_together_are_read_once():
    array = Counting(VALUES, (70, 3))
    reader = module._DenseOnDisk(array)
    list(expression_blocks(reader, np.random.default_rng(0).permutation(N_CELLS), None, max_rows=100))
    # blocks end where chunks end, though 100 rows would fit
    assert array.reads == [(0, 70), (70, 140), (140, 210), (210, 300)]
    array.reads.clear()
    sizes = [len(block.positions) for block in expression_blocks(reader, np.arange(N_CELLS), None, max_rows=40)]
    assert array.reads == [(0, 70), (70, 140), (140, 210), (210, 280), (280, 300)]
    assert sizes == [40, 30, 40, 30, 40, 30, 40, 30, 20]
    array.reads.clear()
    assert sum(block.shape[0] for _, block in spans(reader)) == N_CELLS
    assert array.reads == [(0, 300)]


def test_rows_far_apart_are_read_alone(monkeypatch):
    monkeypatch.setattr(module, "_GAP_VALUES", 10 * N_GENES)
    array = Counting(VALUES, None)
    take_expression(module._DenseOnDisk(array), np.array([200, 5, 12, 201, 90]), None)
    assert array.reads == [(5, 13), (90, 91), (200, 202)]


def test_reads_are_of_bounded_length(monkeypatch):
    monkeypatch.setattr(module, "_READ_VALUES", 50 * N_GENES)
    array = Counting(VALUES, None)
    take_expression(module._DenseOnDisk(array), np.arange(10, N_CELLS), None)
    assert array.reads == [(10, 50), (50, 100), (100, 150), (150, 200), (200, 250), (250, 300)]


def test_chunks_as_long_as_the_matrix_are_not_read_whole(monkeypatch):
    monkeypatch.setattr(module, "_WINDOW_VALUES", N_CELLS * N_GENES - 1)
    array = Counting(VALUES, (N_CELLS, 1))
    list(expression_blocks(module._DenseOnDisk(array), np.arange(N_CELLS), None, max_rows=100))
    assert array.reads == [(0, 100), (100, 200), (200, 300)]


@pytest.mark.parametrize("storage", ["dense", "csr"])
def test_streaming_takes_the_memory_of_a_block(tmp_path, storage):
    n_cells, n_genes = 40_000, 100
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((n_cells, n_genes), dtype=np.float32) < 0.2, np.float32(1.5), np.float32(0))
    whole = dense.nbytes
    ad.AnnData(X=dense if storage == "dense" else sparse.csr_matrix(dense)).write_h5ad(tmp_path / "a.h5ad")
    total = dense.sum(axis=0, dtype=np.float64)
    del dense
    rows = rng.permutation(n_cells)
    with h5py.File(tmp_path / "a.h5ad") as file:
        matrix = file["X"] if storage == "dense" else sparse_dataset(file["X"])
        tracemalloc.start()
        try:
            reader = open_rows(matrix)
            found = np.zeros(n_genes)
            for block in expression_blocks(reader, rows, None, max_rows=1000):
                found += block.values.sum(axis=0, dtype=np.float64)
            for _, stored_block in spans(reader):
                stored_values(stored_block)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    np.testing.assert_array_equal(found, total)
    # a block is a tenth of the matrix (4,096 rows) at most, and its parts are copied once or twice
    assert peak < whole / 3


@pytest.mark.parametrize("storage", ["dense", "csr", "h5 gzip dense", "h5 gzip csr", "zarr dense", "zarr csr"])
def test_several_threads_may_read(stored, storage):
    reader = open_rows(stored[storage])
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(10):
            rows = rng.integers(0, N_CELLS, size=60)
            if not np.array_equal(take_expression(reader, rows, None), VALUES[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
