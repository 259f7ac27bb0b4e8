"""Rows of an expression matrix, in memory or on disk, dense or CSR, with one block dense at a time."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy import sparse

from amici_eval.common.errors import DataError, LaunchError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import h5py
    from jaxtyping import Bool, Float32, Int64

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 4096
# a separate read call takes as long as reading this many consecutive values
_GAP_VALUES = 2**15
_READ_VALUES = 2**22
_WINDOW_VALUES = 2**26


@dataclass(frozen=True, eq=False)
class ExpressionBlock:
    """Dense expression of some of the requested rows; ``positions`` are their places in the request."""

    positions: Int64[np.ndarray, " block"]
    values: Float32[np.ndarray, "block genes"]


class RowReader(Protocol):
    """Rows of a matrix; safe to call from several threads, because it has no mutable state."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    unit: int
    """Rows that are stored together: reading one of them costs as much as reading all."""

    def take(self, rows: Int64[np.ndarray, " rows"]) -> Any:
        """Return rows in any order, repeated or not, as a dense array or CSR matrix of all columns."""

    def span(self, start: int, stop: int) -> Any:
        """Return consecutive rows, dense or CSR; may be a view."""


def open_rows(matrix: Any, *, name: str = "a matrix of the AnnData") -> RowReader:
    """Return row access to a matrix."""
    if _is_sparse_dataset(matrix):
        check_rows_can_be_read(matrix, name)
        return _CSROnDisk(matrix.group, tuple(matrix.shape), np.dtype(matrix.dtype))
    if lies_on_disk(matrix):
        return _DenseOnDisk(matrix, name)
    return _InMemory(matrix.tocsr() if sparse.issparse(matrix) else matrix, name)


def in_memory(matrix: Any, name: str) -> Any:
    """Return a matrix, or rows of one, as a NumPy array or CSR matrix in memory; no copy where possible."""
    kind = f"{type(matrix).__module__.partition('.')[0]} {type(matrix).__name__}"
    try:
        if hasattr(matrix, "compute"):
            # a dask array, such as anndata's lazy reading gives
            matrix = matrix.compute()
        if _is_sparse_dataset(matrix):
            matrix = matrix.to_memory()
        if sparse.issparse(matrix):
            return matrix.tocsr()
        values = np.asarray(matrix.filled(np.nan) if isinstance(matrix, np.ma.MaskedArray) else matrix)
        _check_numbers(values.dtype, name)
        if values.ndim == 2:
            return values
        said = f"of {values.ndim} dimensions"
    except (DataError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001, RUF100 - each library has its own
        said = first_line(error)
    raise DataError(
        value=f"{name} is a {kind} ({said})",
        rule="it must be a NumPy array, a SciPy sparse matrix, a dask array of either, or lie in an open file",
        fix="bring it into memory: adata = adata.to_memory(), or of a GPU rapids_singlecell.get.anndata_to_CPU(adata)",
    )


def _check_numbers(dtype: np.dtype[Any], name: str) -> None:
    if dtype.kind not in "biuf":
        raise DataError(
            value=f"{name} holds {dtype}",
            rule="expression must be real numbers",
            fix="convert it, say by adata.X = adata.X.astype('float32')",
        )


def lies_on_disk(matrix: Any) -> bool:
    """Return whether a matrix is an HDF5 dataset, a zarr array, or a sparse dataset of an AnnData."""
    import h5py
    import zarr

    return _is_sparse_dataset(matrix) or isinstance(matrix, (h5py.Dataset, zarr.Array))


def lies_on_disk_by_columns(matrix: Any) -> bool:
    """Return whether a matrix is a CSC dataset on disk, of which no row can be read without reading all."""
    return _is_sparse_dataset(matrix) and matrix.format == "csc"


def check_rows_can_be_read(matrix: Any, name: str) -> None:
    """Refuse a matrix that lies on disk by columns."""
    if lies_on_disk_by_columns(matrix):
        raise DataError(
            value=f"{name} is stored by genes (CSC)",
            rule="expression that stays on disk must be stored by cells",
            fix="write it with adata.X = adata.X.tocsr() (or the layer), or open it with backed=False",
        )


def _is_sparse_dataset(matrix: Any) -> bool:
    from anndata.abc import CSCDataset, CSRDataset

    return isinstance(matrix, (CSRDataset, CSCDataset))


def as_dense(block: Any) -> np.ndarray:
    """Return a block of rows as a dense array of its own type."""
    if not sparse.issparse(block):
        return np.asarray(block)
    # np.empty gets large pages, which are faster to map than those of zeroed arrays
    return np.asarray(block.toarray(out=np.empty(block.shape, dtype=block.dtype)))


def stored_values(block: Any) -> np.ndarray:
    """Return the stored values of a block of rows: of a sparse block its data, of a dense one all."""
    return block.data if sparse.issparse(block) else np.asarray(block)


def spans(reader: RowReader) -> Iterator[tuple[int, Any]]:
    """Yield all rows in stored order, as the first row's number and the rows."""
    unit = reader.unit
    step = max(unit, _BLOCK_ROWS // unit * unit)
    for first in range(0, reader.shape[0], step):
        # a stored unit may hold many rows: read it once and yield it in parts
        whole = reader.span(first, min(first + step, reader.shape[0]))
        for start in range(0, whole.shape[0], _BLOCK_ROWS):
            yield first + start, whole[start : start + _BLOCK_ROWS]


def take_expression(
    reader: RowReader, rows: Int64[np.ndarray, " rows"], columns: Int64[np.ndarray, " genes"] | None
) -> Float32[np.ndarray, "rows genes"]:
    """Return chosen columns (``None``: all) of some rows, dense, in the requested order; always a copy."""
    block = reader.take(np.asarray(rows, dtype=np.int64))
    if sparse.issparse(block) and columns is not None:
        block = _pick_columns(block, columns)
    else:
        block = as_dense(block)
        if columns is not None:
            block = block[:, columns]
    return np.ascontiguousarray(block, dtype=np.float32)


def expression_blocks(
    reader: RowReader,
    rows: Int64[np.ndarray, " rows"],
    columns: Int64[np.ndarray, " genes"] | None,
    *,
    max_rows: int,
) -> Iterator[ExpressionBlock]:
    """Yield dense expression of rows, each read once in stored order; see ``Tissue.expression_blocks``.

    If memory runs out, fewer rows are read at a time.
    """
    rows = np.asarray(rows, dtype=np.int64)
    order = np.argsort(rows, kind="stable").astype(np.int64)
    ordered, unit, first = rows[order], reader.unit, 0
    while first < len(ordered):
        last = min(first + max_rows, len(ordered))
        if unit > 1 and last < len(ordered):
            # end between stored units, or rows of one unit are read and unpacked twice
            begin = ordered[last] // unit * unit
            last = int(np.searchsorted(ordered, begin))
            if last <= first:
                last = int(np.searchsorted(ordered, begin + unit))
        try:
            values = take_expression(reader, ordered[first:last], columns)
        except MemoryError:
            if last - first == 1:
                raise
            values = None
        if values is None:
            # outside the except clause, where the exception would keep the memory of the read alive
            max_rows = max(1, min(max_rows, last - first) // 2)
            logger.warning("out of memory: going on with %d cells of expression at a time", max_rows)
            continue
        for start in range(first, last, max_rows):
            stop = min(start + max_rows, last)
            yield ExpressionBlock(positions=order[start:stop], values=values[start - first : stop - first])
        first = last


def _pick_columns(block: Any, columns: np.ndarray) -> np.ndarray:
    """Return columns of a CSR matrix, dense, without making the others dense."""
    # all other columns are mapped to one at the end, which is dropped
    place = np.full(block.shape[1], len(columns), dtype=block.indices.dtype)
    place[columns] = np.arange(len(columns))
    shape = (block.shape[0], len(columns) + 1)
    return as_dense(sparse.csr_matrix((block.data, place[block.indices], block.indptr), shape=shape))[:, :-1]


class _InMemory:
    unit = 1

    def __init__(self, matrix: Any, name: str) -> None:
        self._matrix, self._name = matrix, name
        self.shape = tuple(matrix.shape)
        self.dtype = np.dtype(matrix.dtype)
        _check_numbers(self.dtype, name)

    def take(self, rows: np.ndarray) -> Any:
        return in_memory(self._matrix[rows], self._name)

    def span(self, start: int, stop: int) -> Any:
        return in_memory(self._matrix[start:stop], self._name)


class _DenseOnDisk:
    """An HDF5 dataset or zarr array."""

    def __init__(self, array: Any, name: str = "a matrix on disk") -> None:
        self._array = array
        self.shape = tuple(array.shape)
        self.dtype = np.dtype(array.dtype)
        _check_numbers(self.dtype, name)
        together = array.chunks[0] if array.chunks else 1
        # chunks of nearly all rows would make the whole matrix dense
        self.unit = together if together * self.shape[1] <= _WINDOW_VALUES else 1

    def take(self, rows: np.ndarray) -> np.ndarray:
        wanted, where = np.unique(rows, return_inverse=True)
        block = np.empty((len(wanted), self.shape[1]), dtype=self.dtype)
        width = max(1, self.shape[1])
        runs = _runs(wanted * width, (wanted + 1) * width, unit=self.unit * width)
        for first, last in runs:
            start = wanted[first]
            read = self._array[start : wanted[last - 1] + 1]
            block[first:last] = read[wanted[first:last] - start]
        return block if _is_ordered(where) else block[where]

    def span(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._array[start:stop])


class _CSROnDisk:
    """A group with ``data``, ``indices`` and ``indptr``; only ``indptr`` is kept in memory."""

    unit = 1

    def __init__(self, group: Any, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._data, self._indices = group["data"], group["indices"]
        self._indptr = np.asarray(group["indptr"][:], dtype=np.int64)
        self._chunk = max((array.chunks or (1,))[0] for array in (self._data, self._indices))
        self.shape = shape
        self.dtype = dtype
        if (
            len(self._indptr) != shape[0] + 1
            or self._indptr[0] != 0
            or np.any(np.diff(self._indptr) < 0)
            or self._indptr[-1] > min(len(self._data), len(self._indices))
        ):
            msg = "its offsets of rows do not fit its values"
            raise _damaged(msg)

    def take(self, rows: np.ndarray) -> sparse.csr_matrix:
        wanted, where = np.unique(rows, return_inverse=True)
        begin, end = self._indptr[wanted], self._indptr[wanted + 1]
        indptr = np.concatenate([[0], np.cumsum(end - begin)])
        data = np.empty(indptr[-1], dtype=self._data.dtype)
        indices = np.empty(indptr[-1], dtype=self._indices.dtype)
        for first, last in _runs(begin, end, unit=self._chunk):
            start, stop = begin[first], end[last - 1]
            into = slice(indptr[first], indptr[last])
            if stop - start == into.stop - into.start:
                data[into], indices[into] = self._data[start:stop], self._indices[start:stop]
                continue
            lengths = end[first:last] - begin[first:last]
            picked = np.repeat(begin[first:last] - start - (indptr[first:last] - into.start), lengths)
            picked += np.arange(len(picked))
            data[into], indices[into] = self._data[start:stop][picked], self._indices[start:stop][picked]
        found = self._matrix(data, indices, indptr)
        return found if _is_ordered(where) else found[where]

    def span(self, start: int, stop: int) -> sparse.csr_matrix:
        begin, end = self._indptr[start], self._indptr[stop]
        return self._matrix(self._data[begin:end], self._indices[begin:end], self._indptr[start : stop + 1] - begin)

    def _matrix(self, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> sparse.csr_matrix:
        # scipy does not check indices and would write out of bounds
        if indices.size and not 0 <= indices.min() <= indices.max() < self.shape[1]:
            msg = f"it names column {indices.max()} (or {indices.min()}) of {self.shape[1]}"
            raise _damaged(msg)
        return sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, self.shape[1]))


def _damaged(what: str) -> DataError:
    return DataError(
        value=f"a sparse matrix on disk is damaged: {what}",
        rule="rows and columns must lie within the matrix",
        fix="write the AnnData again, or copy it again",
    )


def _is_ordered(where: np.ndarray) -> bool:
    return bool(np.array_equal(where, np.arange(len(where))))


def _runs(begin: np.ndarray, end: np.ndarray, *, unit: int) -> Iterator[tuple[int, int]]:
    """Yield groups of sorted stretches of storage to read at once: near each other, and of bounded length."""
    if not len(begin):
        return
    length = -(-_READ_VALUES // unit) * unit
    cut: Bool[np.ndarray, " stretches"] = begin[1:] - end[:-1] > max(_GAP_VALUES, unit)
    cut |= begin[1:] // length != begin[:-1] // length
    edges = [0, *(np.flatnonzero(cut) + 1).tolist(), len(begin)]
    yield from pairwise(edges)


def open_hdf5(path: str | Path) -> h5py.File:
    """Open an HDF5 file for reading, with the filters of the package hdf5plugin if it is installed."""
    import h5py

    with suppress(ImportError):
        import hdf5plugin  # noqa: F401 - its import brings the filters
    return h5py.File(path, mode="r")


@dataclass(frozen=True)
class SentMatrix:
    """A matrix on disk that pickles as its absolute path and is opened for reading when unpickled."""

    path: str
    name: str
    in_zarr: bool
    is_sparse: bool

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return (_opened, (self.path, self.name, self.in_zarr, self.is_sparse))


def sent(matrix: Any) -> Any:
    """Return a picklable stand-in for a matrix, which becomes the matrix when it is unpickled."""
    if sparse.issparse(matrix):
        rows = matrix.tocsr()
        # plain classes, because views of an AnnData may refer to the whole of it
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
