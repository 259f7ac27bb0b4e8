"""Open an AnnData from a file, in memory or with its expression left on disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy import sparse

from amici_eval.errors import DataError, first_line
from amici_eval.free_memory import available_memory
from amici_eval.hdf5_checks import check_hdf5, check_sizes
from amici_eval.matrices import lies_on_disk
from amici_eval.untrusted import check_is_plain_file, check_names
from amici_eval.zarr_checks import check_zarr

if TYPE_CHECKING:
    from anndata import AnnData

    from amici_eval.hdf5_checks import StoredSize

__all__ = ["available_memory", "check_is_filled", "is_on_disk", "open_anndata"]

logger = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 4
_SMALL_BYTES = 2**28


def open_anndata(path: str | Path, *, backed: bool | None = None) -> AnnData:
    """Read an AnnData from a local ``.h5ad`` file or ``.zarr`` folder, whoever wrote it.

    Parameters
    ----------
    path
        Local file or folder.
    backed
        Whether ``X`` and layers stay on disk. ``None``: if the whole file, unpacked, would take more than a quarter of
        the memory that is available (and more than 256 MiB), and none of them is stored by genes (CSC).

    Returns
    -------
    AnnData
        If backed, its ``X`` and ``layers`` are HDF5, zarr or sparse datasets, ``obsp``, ``varp`` and ``raw`` are left
        out, and the file stays open for reading until the last of these matrices is gone; until then nothing may
        write to it.

    Raises
    ------
    DataError
        If it is missing, of another format, damaged or empty, or no AnnData that somebody wrote in good faith: it leads
        to other files, holds pickles, unpacks to far more than it stores or to more than there is memory for, or has
        names of genes or cells with control characters.
    """
    import anndata

    location = Path(path)
    if not location.exists():
        raise DataError(
            value=f"{location} does not exist",
            rule="data must be a readable AnnData",
            fix="correct the path, or pass data.uri=...",
        )
    suffix = location.suffix.lower()
    if suffix not in (".h5ad", ".zarr"):
        raise DataError(
            value=f"{location} ends in {suffix or 'no suffix'}",
            rule="data must be an AnnData written as .h5ad or .zarr",
            fix="write it with adata.write_h5ad(...)",
        )
    memory = available_memory()
    try:
        sizes = _checked_sizes(location)
        if backed is None:
            size = sum(one.unpacked for one in sizes)
            backed = size > max(_SMALL_BYTES, memory // _SHARE_OF_MEMORY)
            by_genes = _stored_by_genes(location) if backed else []
            if by_genes:
                backed = False
                names = ", ".join(by_genes)
                logger.info("%s is read into memory (%.1f GB): %s stored by genes (CSC)", location, size / 1e9, names)
            elif backed:
                logger.info("%s would take %.1f GB: its expression stays on disk", location, size / 1e9)
        check_sizes(sizes, on_disk=backed, memory=memory)
        if backed:
            adata = _read_backed(location)
        else:
            adata = anndata.read_zarr(location) if suffix == ".zarr" else anndata.read_h5ad(location)
        _check_content(adata)
    except MemoryError as error:
        raise DataError(
            value=f"{location} does not fit into memory",
            rule=f"{memory / 1e9:.3g} GB were free",
            fix="leave its expression on disk with data.backed=true, end other programs, or take a machine with more",
        ) from error
    except Exception as error:
        raise DataError(
            value=f"{location} cannot be read ({first_line(error)})",
            rule="data must be an AnnData written as .h5ad or .zarr",
            fix=f"write it again with adata.write_{suffix[1:]}(...), or copy it again if it was cut off",
        ) from error
    for axis, names in (("var", adata.var_names), ("obs", adata.obs_names)):
        try:
            # that names are distinct is said with the count where they are used
            check_names(names.tolist(), f"names of {'genes' if axis == 'var' else 'cells'}", distinct=False)
        except ValueError as error:
            raise DataError(
                value=f"{location}: {error}",
                rule="names are shown in tables, pages and terminals",
                fix=f"rename them, say by adata.{axis}_names.str.replace(r'[\\x00-\\x1f]', '_', regex=True), "
                "and write it again",
            ) from error
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise DataError(
            value=f"the AnnData in {location} is empty ({adata.n_obs} cells x {adata.n_vars} genes)",
            rule="at least one cell and one gene are needed",
            fix="check how it was filtered",
        )
    return adata


def _checked_sizes(location: Path) -> list[StoredSize]:
    """Look at a file without reading its arrays, and refuse what no AnnData holds."""
    import h5py

    if location.suffix.lower() == ".zarr":
        if not location.is_dir():
            msg = "it is no folder"
            raise ValueError(msg)
        return check_zarr(location)
    check_is_plain_file(location, links=True)
    if not h5py.is_hdf5(location):
        with location.open("rb") as file:
            head = file.read(4)
        known = {b"\x80": ", but a pickle", b"PK": ", but a zip archive", b"\x1f\x8b": ", but packed by gzip"}
        what = next((kind for start, kind in known.items() if head.startswith(start)), "" if head else ": it is empty")
        msg = f"it is no HDF5 file{what}"
        raise ValueError(msg)
    return check_hdf5(location)


def _check_content(adata: AnnData) -> None:
    """Refuse sparse matrices that point outside themselves, where reading them would, too."""
    matrices = {"X": adata.X, **{f"layers/{name}": matrix for name, matrix in adata.layers.items()}}
    for group in ("obsm", "varm", "obsp", "varp"):
        matrices |= {f"{group}/{name}": matrix for name, matrix in getattr(adata, group).items()}
    if adata.raw is not None:
        matrices["raw/X"] = adata.raw.X
    for name, matrix in matrices.items():
        if sparse.issparse(matrix):
            try:
                matrix.check_format(full_check=True)
            except ValueError as error:
                msg = f"the sparse matrix {name[:200]!a} is damaged: {error}"
                raise ValueError(msg) from error


def is_on_disk(adata: AnnData) -> bool:
    """Return whether ``X`` or a layer of an AnnData is read from disk when it is used."""
    return any(lies_on_disk(matrix) for matrix in (adata.X, *adata.layers.values()))


def check_is_filled(adata: AnnData) -> None:
    """Refuse an AnnData without cells or genes."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise DataError(
            value=f"the AnnData is empty ({adata.n_obs} cells x {adata.n_vars} genes)",
            rule="at least one cell and one gene are needed",
            fix="check how it was filtered",
        )


def _open_store(location: Path) -> Any:
    if location.suffix.lower() == ".zarr":
        import zarr

        return zarr.open_group(str(location), mode="r")
    import h5py

    return h5py.File(location, "r")


def _unpacked_bytes(location: Path) -> int:
    """Return how many bytes all arrays of a file take in memory."""
    return sum(size.unpacked for size in _checked_sizes(location))


def _stored_by_genes(location: Path) -> list[str]:
    """Return the names of the matrices (``X``, ``layers/...``) of which no rows can be read without reading all."""
    store = _open_store(location)
    try:
        matrices = {"X": store["X"]} if "X" in store else {}
        if "layers" in store:
            matrices |= {f"layers/{name}": store["layers"][name] for name in store["layers"]}
        return [name for name, item in matrices.items() if item.attrs.get("encoding-type") == "csc_matrix"]
    finally:
        if location.suffix.lower() != ".zarr":
            store.close()


def _read_backed(location: Path) -> AnnData:
    # anndata.read_h5ad(backed="r") leaves X on disk, but not the layers, and there is no such thing for zarr
    from anndata import AnnData
    from anndata.io import read_elem, sparse_dataset

    store = _open_store(location)

    def matrix(element: Any) -> Any:
        kind = element.attrs.get("encoding-type")
        if kind == "null":
            return None
        return sparse_dataset(element) if kind in ("csr_matrix", "csc_matrix") else element

    def read(name: str) -> Any:
        return read_elem(store[name]) if name in store else None

    return AnnData(
        X=matrix(store["X"]) if "X" in store else None,
        obs=read("obs"),
        var=read("var"),
        obsm=read("obsm"),
        varm=read("varm"),
        uns=read("uns"),
        layers={name: matrix(store["layers"][name]) for name in store["layers"]} if "layers" in store else None,
    )
