from __future__ import annotations

import pickle

import anndata
import numpy as np
import pytest
import zarr
from scipy import sparse

from amici_eval.common.errors import LaunchError
from amici_eval.data.files import open_anndata
from amici_eval.data.matrices import SentMatrix, lies_on_disk, open_rows, sent, take_expression

COUNTS = np.random.default_rng(0).poisson(0.7, size=(30, 7)).astype(np.float32)
ROWS = np.array([3, 28, 3, 0])


def arrived(matrix):
    return pickle.loads(pickle.dumps(sent(matrix), protocol=5))


def rows_of(matrix):
    return take_expression(open_rows(matrix), ROWS, None)


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
def test_a_matrix_in_memory_arrives_with_its_rows(make):
    np.testing.assert_array_equal(rows_of(arrived(make(COUNTS))), COUNTS[ROWS])


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix])
def test_nothing_is_copied_and_nothing_but_the_matrix_is_sent(make):
    adata = anndata.AnnData(make(COUNTS))
    adata.obsm["large"] = np.zeros((30, 100_000))
    matrix = sent(adata[:, :].X if make is np.asarray else adata.X)
    assert type(matrix) in (np.ndarray, sparse.csr_matrix)
    assert len(pickle.dumps(matrix)) < 10_000
    stored, original = (getattr(one, "data", one) if sparse.issparse(one) else one for one in (matrix, adata.X))
    assert np.shares_memory(stored, original)


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("layer", [None, "counts"])
def test_a_matrix_on_disk_is_opened_again_where_it_lies(make, suffix, layer, tmp_path):
    path = tmp_path / f"tissue.{suffix}"
    adata = anndata.AnnData(make(COUNTS), layers={"counts": make(COUNTS * 2)})
    getattr(adata, "write_h5ad" if suffix == "h5ad" else "write_zarr")(path)
    backed = open_anndata(path, backed=True)
    matrix = backed.X if layer is None else backed.layers[layer]
    assert lies_on_disk(matrix)
    assert isinstance(sent(matrix), SentMatrix)
    there = arrived(matrix)
    assert lies_on_disk(there)
    np.testing.assert_array_equal(rows_of(there), COUNTS[ROWS] * (1 if layer is None else 2))


def test_a_file_that_a_worker_does_not_see_is_named(tmp_path):
    gone = SentMatrix(str(tmp_path / "gone.h5ad"), "X", in_zarr=False, is_sparse=False)
    with pytest.raises(LaunchError, match=r"gone\.h5ad is not there in a worker: .*data\.backed=false"):
        pickle.loads(pickle.dumps(gone))


def test_a_store_that_has_no_path_is_refused():
    array = zarr.array(COUNTS)
    assert lies_on_disk(array)
    with pytest.raises(LaunchError, match=r"set data\.backed=false, or store it in a folder"):
        sent(array)
