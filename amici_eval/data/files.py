"""AnnData files of each format: what an evaluation reads, the digest of their content, and a plain copy to store."""

from __future__ import annotations

import hashlib
import logging
import re
from contextlib import ExitStack, suppress
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from amici_eval.common.errors import DataError, first_line
from amici_eval.common.files import check_is_plain_file, check_names
from amici_eval.common.memory import available_memory
from amici_eval.data.matrices import (
    as_dense,
    in_memory,
    lies_on_disk,
    lies_on_disk_by_columns,
    open_hdf5,
    open_rows,
    spans,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from anndata import AnnData

logger = logging.getLogger(__name__)

UNREAD = "amici_eval_unread"
"""Key of ``uns`` with the elements that could not be read, each with value, rule and fix of its error."""
_SHARE_OF_MEMORY = 4
_SMALL_BYTES = _READ_ANYWAY = 2**28
_TEXT_BYTES = 64
_ON_DISK = "leave its expression on disk with data.backed=true"
_LESS = "write it without what is not needed, or take a machine with more memory"

_CAUSES = (
    (
        "lock file|already open|No locks available",
        "another program has it open for writing, or its file system cannot lock files",
        "close that program (after a crash: h5clear -s FILE), or set HDF5_USE_FILE_LOCKING=FALSE if nothing writes",
    ),
    (
        "PermissionError|Permission denied",
        "you may not read it",
        "ask its owner for the permission (chmod a+r; for a folder chmod -R a+rX), or run as another user",
    ),
    (
        "truncated file|unexpected end|end of file|incomplete",
        "it ends before its content does",
        "copy or download it again",
    ),
    (
        "Input/output error|Stale file handle|Transport endpoint|Connection|timed out",
        "the disk or the file server did not deliver it",
        "check the disk or the mount, or copy the file to a local disk",
    ),
    (
        "IORegistryError|No read method|No such read function",
        "a newer anndata than {anndata} wrote it",
        "install a newer anndata (it may need a newer Python), or write it again with this version",
    ),
    (
        "codec not available|required filter|filter plugin|can't open directory",
        "it is compressed in a way that nothing installed can unpack",
        "install the package that brings the codec (for HDF5 hdf5plugin), or write it again without",
    ),
    ("No module named|requires? .*package", "a package that reads it is not installed", "install that package"),
    ("signature not found", "it is not an HDF5 file", "write it with adata.write_h5ad(...)"),
    (
        "MemoryError",
        "it does not fit into the free memory",
        "leave its expression on disk with data.backed=true, end other programs, or take a machine with more",
    ),
)
"""Pattern of another library's error, its cause in a sentence, and a fix."""


def open_anndata(path: str | Path, *, backed: bool | None = None, table: str | None = None) -> AnnData:
    """Read what an evaluation needs of an AnnData in a local ``.h5ad`` file or ``.zarr`` folder.

    Parameters
    ----------
    path
        Local file or folder; of a SpatialData store its root, or a table in it (``store.zarr/tables/NAME``).
    backed
        Whether ``X`` and layers stay on disk. ``None``: if what is read would take more than a quarter of the memory
        that is available (and more than 256 MiB), and none of them is stored by genes (CSC).
    table
        Which table of a SpatialData store; not needed if it has only one.

    Returns
    -------
    AnnData
        With ``X``, ``layers``, ``obs``, ``var`` and ``obsm``, as far as they can be read here: what cannot is left out,
        and whoever asks for it is told why. ``uns``, ``raw``, ``varm``, ``obsp`` and ``varp`` are not read. If backed,
        ``X`` and ``layers`` are HDF5, zarr or sparse datasets, and the file stays open for reading until the last of
        them is gone; until then nothing may write to it.

    Raises
    ------
    DataError
        If it is missing, of another format, damaged, empty or larger than the free memory, if its names cannot be read,
        hold control characters or are stored as pickles.
    """
    location = Path(with_table(path, table))
    try:
        with ExitStack() as stack:
            store, location = _open_store(location, stack)
            adata = _read(store, location, backed=backed)
            for axis, names in (("var", adata.var_names), ("obs", adata.obs_names)):
                _check_names(axis, names.tolist(), location)
            if is_on_disk(adata):
                stack.pop_all()
    except Exception as error:
        if isinstance(error, DataError) and str(location) in error.value:
            raise
        said, rule, fix = _explained(error)
        raise DataError(value=f"{location} cannot be read ({said})", rule=rule, fix=fix) from error
    check_is_filled(adata, f"the AnnData in {location}")
    return adata


def with_table(uri: str | Path, table: str | None) -> str:
    """Return the path or URI of a table of a SpatialData store, by the store's and the table's name."""
    base, mark, query = str(uri).partition("?")
    if table is None:
        return str(uri)
    if not base.rstrip("/").lower().endswith(".zarr") or not table or "/" in table or table in (".", ".."):
        raise DataError(
            value=f"table {table!r} of {uri}",
            rule="a table is named in a SpatialData store, a folder that ends in .zarr",
            fix="correct data.uri and data.table, or leave data.table out",
        )
    return f"{base.rstrip('/')}/tables/{table}{mark}{query}"


def missing(adata: AnnData, where: str, key: str | None, *, rule: str, fix: str) -> DataError:
    """Return the error that says that an AnnData lacks something, or that its file holds it in an unreadable form."""
    name, shown = (where, f"adata.{where}") if key is None else (f"{where}/{key}", f"adata.{where}[{key!r}]")
    for unread, value, its_rule, its_fix in adata.uns.get(UNREAD, ()):
        if name == unread:
            return DataError(value=f"{shown} cannot be read from {value}", rule=its_rule, fix=its_fix)
    value = f"{shown} is empty" if key is None else f"adata.{where} has no {'column ' * (where == 'obs')}{key!r}"
    return DataError(value=value, rule=rule, fix=fix)


def is_on_disk(adata: AnnData) -> bool:
    """Return whether ``X`` or a layer of an AnnData is read from disk when it is used."""
    return any(lies_on_disk(matrix) for matrix in (adata.X, *adata.layers.values()))


def check_is_filled(adata: AnnData, what: str = "the AnnData") -> None:
    """Refuse an AnnData without cells or genes, and one whose tables are not in memory."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise DataError(
            value=f"{what} is empty ({adata.n_obs} cells x {adata.n_vars} genes)",
            rule="at least one cell and one gene are needed",
            fix="check how it was filtered",
        )
    if not isinstance(adata.obs, pd.DataFrame):
        raise DataError(
            value=f"adata.obs is a {type(adata.obs).__name__}",
            rule="the AnnData was opened lazily, and its columns must be in memory",
            fix="call adata = adata.to_memory(), or give the path to amici_eval.open_anndata",
        )


def _open_store(location: Path, stack: ExitStack) -> tuple[Any, Path]:
    """Open the group of a file or folder that holds an AnnData; return it with its path."""
    suffix = location.suffix.lower()
    root = next((path for path in (location, *location.parents) if path.suffix.lower() == ".zarr"), location)
    if not root.exists():
        raise DataError(
            value=f"{root} does not exist",
            rule="data must be a readable AnnData",
            fix="correct the path",
        )
    if suffix == ".h5ad":
        check_is_plain_file(location, links=True)
        store = stack.enter_context(open_hdf5(location))
    elif root.suffix.lower() == ".zarr":
        store, location = _open_zarr(root, location)
    else:
        raise DataError(
            value=f"{location} ends in {suffix or 'no suffix'}",
            rule="data must be an AnnData written as .h5ad or .zarr",
            fix="write it with adata.write_h5ad(...)",
        )
    if "obs" not in store or "var" not in store:
        raise DataError(
            value=f"{location} cannot be read (it holds {', '.join(map(str, store)) or 'nothing'})",
            rule="it is no AnnData, which has obs and var",
            fix="write one with adata.write_h5ad(...)",
        )
    return store, location


def _open_zarr(root: Path, location: Path) -> tuple[Any, Path]:
    """Open an AnnData in a .zarr folder: the folder itself, or a table of a SpatialData store."""
    import zarr

    if not root.is_dir():
        msg = "it is a file, and a .zarr is a folder"
        raise NotADirectoryError(msg)
    if any((folder / "zarr.json").exists() for folder in (root, location)):
        raise DataError(
            value=f"{location} is written in zarr format 3",
            rule=f"zarr {zarr.__version__} reads format 2, and AMICI needs this version",
            fix="where it was written, write it again after anndata.settings.zarr_write_format = 2, or with "
            "adata.write_h5ad(...)",
        )
    # old SpatialData stores keep their only table in table/table
    folders = [folder for name in ("tables", "table") if (folder := root / name).is_dir()]
    tables = {path.name: path for folder in folders for path in sorted(folder.iterdir()) if (path / "obs").is_dir()}
    if location == root and tables and not (root / "obs").is_dir():
        if len(tables) > 1:
            raise DataError(
                value=f"{root} is a SpatialData store with the tables {', '.join(tables)}",
                rule="one of them must be named",
                fix=f"set data.table={min(tables)}, or give {tables[min(tables)]}",
            )
        location = next(iter(tables.values()))
        logger.info("%s is a SpatialData store: its only table %r is read", root, location.name)
    if not location.is_dir():
        location = tables.get(location.name, location)
    if not location.is_dir():
        raise DataError(
            value=f"{root} has no {location.relative_to(root)}",
            rule=f"its tables are {', '.join(tables)}" if tables else "it is no SpatialData store: it has no tables",
            fix="set data.table to one of them" if tables else "leave data.table out, or correct data.uri",
        )
    return zarr.open_group(str(location), mode="r"), location


def _check_room(sizes: Mapping[str, int], memory: int, location: Path, fix: str) -> None:
    """Refuse to read more than the free memory, by the declared sizes in bytes."""
    total = sum(sizes.values())
    if total > max(_READ_ANYWAY, memory):
        largest = max(sizes, key=lambda name: sizes[name])
        raise DataError(
            value=f"{location} would take {total / 1e9:.3g} GB, of which {largest} {sizes[largest] / 1e9:.3g}",
            rule=f"{memory / 1e9:.3g} GB of memory are free",
            fix=fix,
        )


def _read(store: Any, location: Path, *, backed: bool | None) -> AnnData:
    """Read an AnnData by element, leaving out optional elements that cannot be read."""
    import h5py
    from anndata import AnnData, read_h5ad

    memory = available_memory()
    if isinstance(store["obs"], h5py.Dataset):
        # written by anndata before 0.7
        _check_room({"all of it": sum(map(_unpacked, _arrays(store)))}, memory, location, _LESS)
        return read_h5ad(location)
    unread: list[list[str]] = []

    def attempt(name: str, read: Any) -> Any:
        try:
            return read(store[name])
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001, RUF100 - the reason is told to whoever asks for it
            said, rule, fix = _explained(error)
            logger.debug("%s of %s cannot be read: %s", name, location, said)
            unread.append([name, f"{location} ({said})", rule, fix])
            return None

    names = [f"{group}/{key}" for group in ("obs", "var", "layers", "obsm") for key in store.get(group, ())]
    nodes = {name: attempt(name, _checked) for name in (*(["X"] if "X" in store else []), *names)}
    nodes = {name: node for name, node in nodes.items() if node is not None}
    expression = [name for name in nodes if name.split("/")[0] in ("X", "layers")]
    sizes = {name: sum(map(_unpacked, _arrays(node))) for name, node in nodes.items()}
    by_genes = [name for name in expression if nodes[name].attrs.get("encoding-type") == "csc_matrix"]
    if backed is None:
        size = sum(sizes.values())
        backed = size > max(_SMALL_BYTES, memory // _SHARE_OF_MEMORY)
        if backed and by_genes:
            backed = False
            logger.info(
                "%s is read into memory (%.1f GB): %s stored by genes (CSC)", location, size / 1e9, ", ".join(by_genes)
            )
        elif backed:
            logger.info("%s would take %.1f GB: its expression stays on disk", location, size / 1e9)
    on_disk = {name for name in expression if backed and _stays_on_disk(nodes[name])}
    # elements that stay on disk are unpacked one chunk at a time
    sizes |= {name: max(map(_chunk, _arrays(nodes[name])), default=0) for name in on_disk}
    way = "store its expression by cells (adata.X = adata.X.tocsr())" if by_genes else _ON_DISK
    _check_room(sizes, memory, location, f"{way}, {_LESS}")

    def frame(where: str) -> pd.DataFrame:
        if store[where].attrs.get("encoding-version") != "0.2.0":
            return _element(store[where])
        key, order = store[where].attrs["_index"], map(str, store[where].attrs["column-order"])
        index = pd.Index(_element(_checked(store[where][key])), name=None if key == "_index" else key)
        known = {entry[0] for entry in unread}
        columns = {
            name: attempt(f"{where}/{name}", lambda node: pd.Series(_element(node), index=index))
            for name in order
            if f"{where}/{name}" not in known
        }
        return pd.DataFrame({name: values for name, values in columns.items() if values is not None}, index=index)

    def matrix(name: str) -> Any:
        return attempt(name, _on_disk if name in on_disk else _element)

    for node in (node for name, node in nodes.items() if name.split("/")[0] in ("X", "layers", "obsm")):
        for array in _arrays(node):
            if not isinstance(array, h5py.Dataset):
                _warn_of_missing_chunks(array, location)
    adata = AnnData(X=matrix("X") if "X" in nodes else None, obs=frame("obs"), var=frame("var"))
    for name in nodes:
        group, _, key = name.partition("/")
        if group in ("layers", "obsm") and (found := matrix(name)) is not None:
            # an element whose shape does not fit the cells is left out too
            attempt(name, lambda _, *, into=group, key=key, found=found: getattr(adata, into).update({key: found}))
    if unread:
        adata.uns[UNREAD] = unread
    return adata


def _element(node: Any) -> Any:
    """Read an element, including two kinds of text that older versions of anndata do not know."""
    from anndata.io import read_elem

    kind = node.attrs.get("encoding-type")
    if kind == "null":
        return None
    if kind == "nullable-string-array":
        texts = read_elem(node["values"]).astype(object)
        texts[node["mask"][...]] = None
        return texts
    if kind == "categorical":
        categories, ordered = _element(node["categories"]), bool(node.attrs["ordered"])
        return pd.Categorical.from_codes(read_elem(node["codes"]), categories, ordered=ordered)
    found = read_elem(node)
    if sparse.issparse(found):
        # scipy does not check indices and would access memory out of bounds
        found.check_format(full_check=True)
    return found


def _stays_on_disk(node: Any) -> bool:
    kind = node.attrs.get("encoding-type")
    return kind in ("csr_matrix", "csc_matrix") or (hasattr(node, "shape") and kind != "null")


def _on_disk(node: Any) -> Any:
    from anndata.io import sparse_dataset

    return node if hasattr(node, "shape") else sparse_dataset(node)


def _arrays(node: Any) -> Iterator[Any]:
    """Yield all arrays at and below a node of a file."""
    if hasattr(node, "shape"):
        yield node
    else:
        for key in node:
            yield from _arrays(node[key])


def _checked(node: Any) -> Any:
    """Return a node of a file if its arrays can be unpacked, without running code."""
    import h5py

    for array in _arrays(node):
        if isinstance(array, h5py.Dataset):
            plist = array.id.get_create_plist()
            for code, _, _, name in map(plist.get_filter, range(plist.get_nfilters())):
                if not h5py.h5z.filter_avail(code):
                    raise DataError(
                        value=f"{array.name} is packed by the filter {code} ({name.decode(errors='replace')})",
                        rule="HDF5 does not bring this filter",
                        fix="install the package hdf5plugin, which is found by itself, or write the file again with "
                        "compression='gzip'",
                    )
        elif any(codec.codec_id == "pickle" for codec in (*(array.filters or ()), array.compressor) if codec):
            raise DataError(
                value=f"{array.name} stores a pickle",
                rule="a pickle can run code when it is read",
                fix="write the AnnData again with adata.write_zarr(...)",
            )
    return node


def _warn_of_missing_chunks(array: Any, location: Path) -> None:
    """Warn of zarr chunks that are missing, as in an interrupted copy, because zarr reads them as 0."""
    folder = Path(array.store.path, array.path)
    # count only names of chunks: Finder, rsync, NFS and editors leave other files there
    key = re.compile(rf"\d+([./]\d+){{{max(array.ndim - 1, 0)}}}")
    lacking = array.nchunks - sum(bool(key.fullmatch(str(path.relative_to(folder)))) for path in folder.rglob("*"))
    if lacking > 0:
        logger.warning(
            "%s: %d of %d chunks of %s are not stored and read as 0; if it was copied, check that the copy is whole",
            location,
            lacking,
            array.nchunks,
            array.path or array.name,
        )


def _unpacked(array: Any) -> int:
    """Return the bytes that an array takes in memory, by its declared shape and dtype."""
    return prod(array.shape or ()) * (_TEXT_BYTES if array.dtype.hasobject else array.dtype.itemsize)


def _chunk(array: Any) -> int:
    return prod(array.chunks or (0,)) * array.dtype.itemsize


def _explained(error: BaseException) -> tuple[str, str, str]:
    """Return the message of another library's error, a sentence on its cause, and a fix."""
    if isinstance(error, DataError):
        return error.value, error.rule, error.fix
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    texts = [f"{type(one).__name__}: {one}" for one in chain]
    for pattern, rule, fix in _CAUSES:
        for one, text in zip(chain, texts, strict=True):
            if re.search(pattern, text, re.IGNORECASE):
                return first_line(one), rule.format(anndata=version("anndata")), fix
    return (
        first_line(error),
        "data must be an AnnData written as .h5ad or .zarr",
        "write it again with adata.write_h5ad(...) or adata.write_zarr(...), or copy it again if it was cut off",
    )


def _check_names(axis: str, names: list[Any], location: Path) -> None:
    """Refuse names with control characters; duplicates are refused with a count where names are used."""
    try:
        check_names(names, f"names of {'genes' if axis == 'var' else 'cells'}", distinct=False)
    except ValueError as error:
        raise DataError(
            value=f"{location}: {error}",
            rule="names are shown in tables, pages and terminals",
            fix=f"rename them, say by adata.{axis}_names.str.replace(r'[\\x00-\\x1f]', '_', regex=True), and write it "
            "again",
        ) from error


def content_digest(adata: AnnData) -> str:
    """Return a fingerprint of the content of an AnnData, 32 hexadecimal digits.

    It covers cell and gene names, ``X`` and layers (as float32), columns of ``obs`` and numeric entries of ``obsm``
    (not ragged ones); not names that begin with ``_``, which model set-up writes, nor ``uns``, ``varm``, ``obsp`` and
    ``raw``. It does not depend on sparse or dense storage, file format or block size. A layer on disk by genes (CSC) is
    read into memory, one at a time.
    """
    check_is_filled(adata)
    digest = hashlib.blake2b(digest_size=16)
    _hash_texts(digest, "obs_names", adata.obs_names)
    _hash_texts(digest, "var_names", adata.var_names)
    for name in sorted((key for key in adata.obs if not str(key).startswith("_")), key=str):
        column = adata.obs[name]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            digest.update(f"obs/{name}".encode() + column.to_numpy(dtype="<f8", na_value=np.nan).tobytes())
        elif isinstance(column.dtype, pd.CategoricalDtype):
            # convert each category once; missing values have the code -1, which indexes the last entry
            texts = np.array([*map(str, column.cat.categories.astype(object)), "\0NA"], dtype=object)
            _hash_texts(digest, f"obs/{name}", texts[column.cat.codes.to_numpy()])
        else:
            _hash_texts(digest, f"obs/{name}", column.astype(object).where(column.notna(), "\0NA"))
    for name, values in _numeric_obsm(adata).items():
        if not name.startswith("_"):
            digest.update(f"obsm/{name}".encode() + np.ascontiguousarray(values, dtype="<f8").tobytes())
    matrices = {"X": adata.X, **{f"layers/{name}": adata.layers[name] for name in sorted(adata.layers)}}
    for name, matrix in matrices.items():
        digest.update(name.encode())
        if matrix is not None:
            if name != "X" and lies_on_disk_by_columns(matrix):
                # a layer that the settings may not use must not cause an error
                matrix = matrix.to_memory().tocsr()
            for _, block in spans(open_rows(matrix, name=f"adata.{name}")):
                # + 0 turns -0.0, which sparse storage drops, into 0.0
                values = np.add(as_dense(block), np.float32(0), dtype="<f4", casting="unsafe", order="C")
                digest.update(values.data)
    return digest.hexdigest()


def _hash_texts(digest: Any, name: str, values: Any) -> None:
    encoded = [str(value).encode("utf-8", "surrogatepass") for value in values]
    digest.update(name.encode() + np.array([len(text) for text in encoded], dtype="<u4").tobytes() + b"".join(encoded))


def _numeric_obsm(adata: AnnData) -> dict[str, np.ndarray]:
    """Return the numeric arrays of ``obsm`` by name, without ragged ones and those on a GPU."""
    found = {}
    for name in sorted(map(str, adata.obsm)):
        # ragged arrays (awkward) have no shape
        if hasattr(adata.obsm[name], "shape"):
            with suppress(TypeError, ValueError, RuntimeError):
                values = np.asarray(adata.obsm[name])
                if np.issubdtype(values.dtype, np.number):
                    found[name] = values
    return found


def write_plain(adata: AnnData, path: Path) -> None:
    """Write what an evaluation reads of an AnnData to a .h5ad for old versions of anndata; the digest is kept."""
    from anndata import AnnData

    def plain(matrix: Any, name: str) -> Any:
        return matrix if matrix is None or lies_on_disk(matrix) else in_memory(matrix, name)

    check_is_filled(adata)
    cells, genes = (pd.Index(names.astype(str).to_numpy(dtype=object)) for names in (adata.obs_names, adata.var_names))
    columns = {str(name): _plain_column(adata.obs[name]) for name in adata.obs if name != "_index"}
    AnnData(
        X=plain(adata.X, "adata.X"),
        obs=pd.DataFrame(columns, index=cells),
        var=pd.DataFrame(index=genes),
        layers={name: plain(matrix, f"adata.layers[{name!r}]") for name, matrix in adata.layers.items()},
        obsm=_numeric_obsm(adata),
    ).write_h5ad(path, convert_strings_to_categoricals=False)


def _plain_column(column: pd.Series) -> Any:
    """Return numbers as they are (nullable ones as float64), anything else as categories of text."""
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
        return column.to_numpy()
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    values = column.astype("category").cat
    codes, texts = pd.factorize(np.array([*map(str, values.categories)], dtype=object))
    codes = np.append(codes, -1)[values.codes.to_numpy()]
    return pd.Categorical.from_codes(codes, pd.Index(texts), ordered=bool(values.ordered))
