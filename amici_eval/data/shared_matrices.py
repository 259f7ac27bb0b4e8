"""Expression matrices on their way to another process: in memory as plain arrays, on disk as the place to open."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from amici_eval.common.errors import LaunchError
from amici_eval.data.matrices import lies_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import h5py

__all__ = ["SentMatrix", "open_hdf5", "sent"]


def open_hdf5(path: str | Path) -> h5py.File:
    """Open an HDF5 file for reading, with the filters of the package hdf5plugin if it is installed."""
    import h5py

    with suppress(ImportError):
        import hdf5plugin  # noqa: F401, RUF100 - its import brings the filters
    return h5py.File(path, mode="r")


@dataclass(frozen=True)
class SentMatrix:
    """A matrix on disk: unpickled, it is that matrix, opened for reading.

    Parameters
    ----------
    path
        Of the file or folder, absolute.
    name
        Of the dataset or group in it.
    in_zarr, is_sparse
        What has to be opened.
    """

    path: str
    name: str
    in_zarr: bool
    is_sparse: bool

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return (_opened, (self.path, self.name, self.in_zarr, self.is_sparse))


def sent(matrix: Any) -> Any:
    """Return what can be pickled in place of a matrix, and becomes it when it is unpickled."""
    if sparse.issparse(matrix):
        rows = matrix.tocsr()
        # plain classes: what an AnnData hands out may refer to the whole of it
        parts = tuple(np.asarray(part) for part in (rows.data, rows.indices, rows.indptr))
        return sparse.csr_matrix(parts, shape=rows.shape, copy=False)
    if not lies_on_disk(matrix):
        return np.asarray(matrix)
    import h5py

    is_sparse = hasattr(matrix, "group")
    node = matrix.group if is_sparse else matrix
    if isinstance(node, (h5py.Group, h5py.Dataset)):
        return SentMatrix(node.file.filename, node.name, in_zarr=False, is_sparse=is_sparse)
    folder = getattr(node.store, "path", None)
    if folder is None:
        raise LaunchError(
            value=f"expression in a zarr store of kind {type(node.store).__name__}",
            rule="workers open expression that stays on disk by its path",
            fix="set data.backed=false, or store it in a folder",
        )
    return SentMatrix(str(folder), node.path, in_zarr=True, is_sparse=is_sparse)


def _opened(path: str, name: str, in_zarr: bool, is_sparse: bool) -> Any:  # noqa: FBT001 - called by unpickling
    from pathlib import Path

    if not Path(path).exists():
        raise LaunchError(
            value=f"{path} is not there in a worker",
            rule="expression that stays on disk is read by each worker from the same path",
            fix="put it where all machines of the cluster see it, or set data.backed=false",
        )
    if in_zarr:
        import zarr

        node = zarr.open(path, mode="r")[name] if name else zarr.open(path, mode="r")
    else:
        node = open_hdf5(path)[name]
    if not is_sparse:
        return node
    from anndata.io import sparse_dataset

    return sparse_dataset(node)
