"""A look at an HDF5 file before anything in it is read: nothing leads out of it or claims to be what it is not."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from amici_eval.hdf5_texts import text_bytes

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["StoredSize", "check_hdf5", "check_sizes"]

_DEEPEST = 64
_TEXT_BYTES = 64
_SMALL_BYTES = 2**28
_LARGEST_RATIO = 200
_WIDEST = 2**20
_ATTRIBUTE_BYTES = 2**24
_SHARE_OF_MEMORY = 4
_LARGE_CHUNK_BYTES = 2**18
_SLACK_BYTES = 2**20
_SLACK_TEXTS = 2**26


@dataclass(frozen=True, kw_only=True)
class StoredSize:
    """What an array takes.

    Parameters
    ----------
    name
        Its path in the file.
    unpacked, stored
        Bytes in memory, and in the file.
    chunk
        Bytes of what must be unpacked at a time; 0: any part can be read.
    rows_on_disk
        Whether it may be an expression matrix of which rows are read from disk.
    texts
        Bytes of what its entries point to, beside ``unpacked``.
    """

    name: str
    unpacked: int
    stored: int
    chunk: int
    rows_on_disk: bool
    texts: int = 0


def check_hdf5(path: Path) -> list[StoredSize]:
    """Return what each array of an HDF5 file takes.

    Raises
    ------
    ValueError
        If it holds a link to another place or file, a virtual array, one that is stored in another file, references, a
        group inside itself, groups nested more than 64 deep, or texts that together are far longer than the file.
    """
    import h5py

    sizes: list[StoredSize] = []
    texts, held = 0, path.stat().st_size
    # an array that is named twice is read twice
    most = 2 * held + _SLACK_TEXTS
    with h5py.File(path, "r") as file:
        waiting: list[tuple[str, Any, tuple[Any, ...]]] = [("", file, (_place(file),))]
        while waiting:
            where, group, above = waiting.pop()
            if len(above) > _DEEPEST:
                msg = f"groups are nested more than {_DEEPEST} deep"
                raise ValueError(msg)
            _check_attributes(where, group)
            for key in group:
                name = f"{where}/{key}" if where else str(key)
                if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                    msg = f"{name[:200]!a} is a link to another place or file"
                    raise ValueError(msg)
                item = group[key]
                if isinstance(item, h5py.Group):
                    if _place(item) in above:
                        msg = f"the group {name[:200]!a} lies inside itself"
                        raise ValueError(msg)
                    waiting.append((name, item, (*above, _place(item))))
                elif isinstance(item, h5py.Dataset):
                    sizes.append(_size_of(path, name, item))
                    texts += sizes[-1].texts
                    if texts > most:
                        msg = (
                            f"its texts take more than {most} bytes, and the file has {held}: they share what they hold"
                        )
                        raise ValueError(msg)
    return sizes


def _place(group: Any) -> Any:
    import h5py

    found = h5py.h5o.get_info(group.id)
    return found.fileno, found.addr


def _check_attributes(where: str, item: Any) -> None:
    import h5py

    for index in range(h5py.h5a.get_num_attrs(item.id)):
        attribute = h5py.h5a.open(item.id, index=index)
        if prod(attribute.shape) * attribute.dtype.itemsize > _ATTRIBUTE_BYTES:
            msg = f"an attribute of {where[:200]!a} takes more than {_ATTRIBUTE_BYTES} bytes"
            raise ValueError(msg)


def _check_inflates(item: Any, shown: str) -> None:
    """Refuse a chunk that is larger, once it is inflated, than chunks of its data set are."""
    if item.compression != "gzip" or not item.chunks or not hasattr(item.id, "chunk_iter"):
        return
    most = prod(item.chunks) * item.dtype.itemsize + _SLACK_BYTES
    large: list[tuple[int, ...]] = []
    # what is smaller cannot fill much memory
    item.id.chunk_iter(lambda info: large.append(info.chunk_offset) if info.size > _LARGE_CHUNK_BYTES else None)
    for offset in large:
        fed = item.id.read_direct_chunk(offset)[1]
        inflate, found = zlib.decompressobj(), 0
        try:
            while fed and found <= most and not inflate.eof:
                found += len(inflate.decompress(fed, _LARGE_CHUNK_BYTES))
                fed = inflate.unconsumed_tail
        except zlib.error:
            # left out of the filter, or damaged: the library tells
            continue
        if found > most:
            msg = f"a chunk of {shown} inflates to at least {found} bytes, and holds {most - _SLACK_BYTES}"
            raise ValueError(msg)


def _size_of(path: Path, name: str, item: Any) -> StoredSize:
    import h5py

    shown = ascii(name[:200])
    if item.is_virtual:
        msg = f"{shown} is put together from other files"
        raise ValueError(msg)
    if item.external:
        msg = f"{shown} is stored in another file"
        raise ValueError(msg)
    if not 0 <= item.dtype.itemsize <= _WIDEST:
        msg = f"{shown} has items of {item.dtype.itemsize} bytes"
        raise ValueError(msg)
    if _has_references(item.dtype):
        msg = f"{shown} holds references"
        raise ValueError(msg)
    _check_attributes(name, item)
    _check_inflates(item, shown)
    text = h5py.check_string_dtype(item.dtype)
    each = _TEXT_BYTES if text is not None and text.length is None else max(item.dtype.itemsize, 1)
    unpacked = prod(item.shape) * each if item.shape is not None else 0
    stored = int(item.id.get_storage_size())
    texts = 0
    # what is larger is refused by what it says of itself
    if not _is_blown_up(unpacked, stored):
        try:
            texts = text_bytes(path, item)
        except (ValueError, OSError) as error:
            msg = f"{shown}: {error}"
            raise ValueError(msg) from error
    return StoredSize(
        name=name,
        unpacked=unpacked,
        stored=stored,
        texts=texts,
        chunk=prod(item.chunks) * item.dtype.itemsize if item.chunks else 0,
        rows_on_disk=is_expression(name) and each == item.dtype.itemsize,
    )


def _is_blown_up(unpacked: int, stored: int) -> bool:
    return unpacked > max(_SMALL_BYTES, _LARGEST_RATIO * stored)


def _has_references(dtype: Any) -> bool:
    import h5py

    if dtype.fields:
        return any(_has_references(entry[0]) for entry in dtype.fields.values())
    if dtype.subdtype is not None:
        return _has_references(dtype.subdtype[0])
    vlen = h5py.check_vlen_dtype(dtype)
    if vlen is not None and not isinstance(vlen, type):
        return _has_references(vlen)
    return h5py.check_ref_dtype(dtype) is not None


def is_expression(name: str) -> bool:
    """Return whether an array of this path is an expression matrix, or the entries of a sparse one."""
    parts = name.split("/")
    depth = {"X": 1, "layers": 2}.get(parts[0], 0)
    return bool(depth) and (parts[depth:] in ([], ["data"], ["indices"]))


def check_sizes(sizes: list[StoredSize], *, on_disk: bool, memory: int) -> None:
    """Refuse a file that unpacks to more than there is room for, or to far more than what is stored.

    Parameters
    ----------
    sizes
        Of its arrays.
    on_disk
        Whether expression stays on disk.
    memory
        Bytes that are free.

    Raises
    ------
    ValueError
        With the array.

    Notes
    -----
    Real tables shrink ten to fifty times at best where they are large; an array of more than 256 MiB of which less than
    a two-hundredth is stored holds one value all over, or was made to fill the memory of whoever reads it. An
    expression matrix of which rows are read from disk may be as large as it likes.
    """
    total = 0
    for size in sizes:
        shown = ascii(size.name[:200])
        if on_disk and size.rows_on_disk:
            if size.chunk > max(_SMALL_BYTES, memory // _SHARE_OF_MEMORY):
                msg = f"{shown} is stored in chunks of {size.chunk} bytes, and {memory} are free"
                raise ValueError(msg)
            continue
        if _is_blown_up(size.unpacked, size.stored):
            msg = f"{shown} would take {size.unpacked} bytes, of which {size.stored} are stored"
            raise ValueError(msg)
        total += size.unpacked + size.texts
    if total > max(_SMALL_BYTES, memory):
        msg = f"its arrays would take {total} bytes, and {memory} are free"
        raise ValueError(msg)
