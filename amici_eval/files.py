"""Open an AnnData from a file, in memory or with its expression left on disk."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from amici_eval.errors import DataError, first_line
from amici_eval.matrices import lies_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

__all__ = ["available_memory", "check_is_filled", "is_on_disk", "open_anndata"]

logger = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 4
_SMALL_BYTES = 2**28
_TEXT_BYTES = 64
# what is taken to be free where the system does not tell
_UNKNOWN_BYTES = 2**31
_OWN_GROUPS = Path("/proc/self/cgroup")
# name of the controller, folder, limit, use, and the part of the use that the system gives back when asked; second
# line: older kernels
_CONTAINERS = (
    ("", Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    ("memory", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def open_anndata(path: str | Path, *, backed: bool | None = None) -> AnnData:
    """Read an AnnData from a local ``.h5ad`` file or ``.zarr`` folder.

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
        If it is missing, of another format, damaged or empty.
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
    if suffix == ".zarr":
        _refuse_pickled_arrays(location)
    try:
        if backed is None:
            size = _unpacked_bytes(location)
            backed = size > max(_SMALL_BYTES, available_memory() // _SHARE_OF_MEMORY)
            by_genes = _stored_by_genes(location) if backed else []
            if by_genes:
                backed = False
                names = ", ".join(by_genes)
                logger.info("%s is read into memory (%.1f GB): %s stored by genes (CSC)", location, size / 1e9, names)
            elif backed:
                logger.info("%s would take %.1f GB: its expression stays on disk", location, size / 1e9)
        if backed:
            adata = _read_backed(location)
        else:
            adata = anndata.read_zarr(location) if suffix == ".zarr" else anndata.read_h5ad(location)
    except Exception as error:
        raise DataError(
            value=f"{location} cannot be read ({first_line(error)})",
            rule="data must be an AnnData written as .h5ad or .zarr",
            fix="write it again with adata.write_h5ad(...), or copy it again if it was cut off",
        ) from error
    check_is_filled(adata)
    return adata


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


def available_memory() -> int:
    """Return how many bytes this process may still take, as far as the system tells.

    Notes
    -----
    The least of what the machine has left and of what each control group around the process has left. Half of the
    machine's memory where the system does not tell what is left, 2 GiB where it tells nothing.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    if not found:
        try:
            half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, OSError, ValueError):
            half = 0
        found.append(half if half > 0 else _UNKNOWN_BYTES)
    # a container may be allowed less than its machine has
    for controller, root, limit, used, cached in _CONTAINERS:
        for folder in _own_groups(controller, root):
            try:
                spent = int((folder / used).read_text())
                spent -= sum(
                    int(line.split()[1])
                    for line in (folder / "memory.stat").read_text().splitlines()
                    if line.startswith(f"{cached} ")
                )
                found.append(max(0, int((folder / limit).read_text()) - spent))
            except (OSError, ValueError, IndexError):
                continue
    return min(found)


def _own_groups(controller: str, root: Path) -> list[Path]:
    """Return the folders of the control groups that hold this process, from its own up to the root."""
    try:
        entries = [line.split(":", 2) for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return [root]
    for entry in entries:
        if len(entry) == 3 and controller in entry[1].split(","):
            own = PurePosixPath(entry[2].lstrip("/"))
            # a group outside of what a container sees
            if ".." not in own.parts:
                return [root / group for group in (own, *own.parents)] if own.parts else [root]
    return [root]


def _open_store(location: Path) -> Any:
    if location.suffix.lower() == ".zarr":
        import zarr

        return zarr.open_group(str(location), mode="r")
    import h5py

    return h5py.File(location, "r")


def _unpacked_bytes(location: Path) -> int:
    """Return how many bytes all arrays of a file take in memory."""
    sizes: list[int] = []

    def add(item: Any) -> None:
        if hasattr(item, "dtype"):
            sizes.append(int(item.size or 0) * (_TEXT_BYTES if item.dtype.kind == "O" else item.dtype.itemsize))

    store = _open_store(location)
    if location.suffix.lower() == ".zarr":
        store.visitvalues(add)
    else:
        with store:
            store.visititems(lambda _, item: add(item))
    return sum(sizes)


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


def _refuse_pickled_arrays(location: Path) -> None:
    """Refuse a .zarr whose arrays are pickles: reading them would run code, unless numcodecs happens to forbid it."""

    def codecs_of(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                if key in ("id", "name") and isinstance(item, str):
                    yield item
                yield from codecs_of(item)
        elif isinstance(value, list):
            for item in value:
                yield from codecs_of(item)

    for path in sorted([*location.rglob(".z*"), *location.rglob("zarr.json")]):
        if not path.is_file():
            continue
        try:
            names = list(codecs_of(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                value=f"{path} cannot be read ({first_line(error)})",
                rule="a .zarr must have readable metadata",
                fix="write it again with adata.write_zarr(...)",
            ) from error
        if any("pickle" in name.lower() for name in names):
            raise DataError(
                value=f"{path} stores a pickle",
                rule="data must not run code when it is read",
                fix="write it again with adata.write_zarr(...)",
            )
