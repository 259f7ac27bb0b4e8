"""A look at an HDF5 file before anything in it is read: nothing leads out of it or claims to be what it is not."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from amici_eval.hdf5_texts import filters_of, layout_of, stored_chunks, text_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["StoredSize", "check_hdf5", "check_sizes", "chunk_grid", "is_blown_up", "is_expression"]

_DEEPEST = 64
_TEXT_BYTES = 64
_OBJECT_BYTES = 128
_SMALL_BYTES = 2**28
_LARGEST_RATIO = 200
_WIDEST = 2**20
_ATTRIBUTE_BYTES = 2**24
_SHARE_OF_MEMORY = 4
_PIECE_BYTES = 2**18
_SUM_BYTES = 4
_MOST_CHUNKS = 2**18
_FIRST_PLUGIN = 256
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
    n_chunks
        How many chunks its shape has, stored or not.
    """

    name: str
    unpacked: int
    stored: int
    chunk: int
    rows_on_disk: bool
    texts: int = 0
    n_chunks: int = 1


def chunk_grid(shape: Sequence[int], chunks: Sequence[int]) -> list[int]:
    """Return how many chunks an array has along each axis."""
    return [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]


def check_hdf5(path: Path) -> list[StoredSize]:
    """Return what each array of an HDF5 file takes.

    Raises
    ------
    ValueError
        If it holds a link to another place or file, a virtual array, one that is stored in another file, references, a
        group that lies in two places, groups nested more than 64 deep, texts that together are far longer than the
        file, an array that is packed more than once, or a chunk that is not as large as its array says.
    """
    import h5py

    sizes: list[StoredSize] = []
    texts, held = 0, path.stat().st_size
    # an array that is named twice is read twice
    most = 2 * held + _SLACK_TEXTS
    with h5py.File(path, "r") as file:
        seen, known = {_place(file)}, {}
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
                place = _place(item)
                if isinstance(item, h5py.Group):
                    if place in seen:
                        msg = f"the group {name[:200]!a} lies {'inside itself' if place in above else 'in two places'}"
                        raise ValueError(msg)
                    seen.add(place)
                    waiting.append((name, item, (*above, place)))
                elif isinstance(item, h5py.Dataset):
                    same = place, is_expression(name)
                    if same not in known:
                        known[same] = _size_of(path, name, item, enough=most)
                    sizes.append(replace(known[same], name=name))
                    texts += sizes[-1].texts
                    if texts > most:
                        msg = f"its texts take more than {most} bytes, and the file has {held}: they share some"
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


def _check_filters(item: Any, shown: str) -> list[int]:
    """Return the filters of an array; refuse those that no AnnData has, and two that pack."""
    from h5py import h5z

    codes = [code for code, *_ in filters_of(item)]
    # what a plugin brings fails where there is none
    known = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}
    if any(code not in known and code < _FIRST_PLUGIN for code in codes):
        msg = f"{shown} is packed by a filter that no AnnData has"
        raise ValueError(msg)
    packing = [code for code in codes if code not in (h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32)]
    if len(packing) > 1 or len(set(codes)) < len(codes):
        msg = f"{shown} is packed more than once"
        raise ValueError(msg)
    return codes


def _check_chunks(item: Any, codes: list[int], width: int, shown: str) -> None:
    """Refuse a chunk that holds more, or less, than its array says once it is unpacked.

    The library takes a chunk for as large as its array says, and reads on behind a shorter one in the process's memory.
    """
    from h5py import h5z

    # LZF, which h5py brings, is a plugin too
    if not codes or any(code >= _FIRST_PLUGIN for code in codes):
        return
    held = prod(item.chunks) * width
    for _, skipped, content in stored_chunks(item):
        size, packed = len(content), False
        for index, code in reversed(list(enumerate(codes))):
            if skipped >> index & 1 or code == h5z.FILTER_SHUFFLE:
                continue
            if code == h5z.FILTER_FLETCHER32:
                size -= _SUM_BYTES
            elif packed := code == h5z.FILTER_DEFLATE:
                size = _inflated(content, held + _SUM_BYTES, shown)
        if size != held:
            what = "at least " if packed and size > held else ""
            msg = f"a chunk of {shown} unpacks to {what}{size} bytes, and holds {held}"
            raise ValueError(msg)


def _inflated(content: bytes, most: int, shown: str) -> int:
    """Return how many bytes a chunk inflates to, or a number above ``most``."""
    inflate, found, fed = zlib.decompressobj(), 0, content
    while fed and found <= most and not inflate.eof:
        try:
            found += len(inflate.decompress(fed, _PIECE_BYTES))
        except zlib.error as error:
            msg = f"a chunk of {shown} is damaged: {error}"
            raise ValueError(msg) from error
        fed = inflate.unconsumed_tail
    return found


def _size_of(path: Path, name: str, item: Any, *, enough: int) -> StoredSize:
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
    width, places = layout_of(item)
    each = max(item.dtype.itemsize, 1)
    if places:
        each = _TEXT_BYTES if h5py.check_string_dtype(item.dtype) else each + _OBJECT_BYTES * len(places)
    unpacked = prod(item.shape) * each if item.shape is not None else 0
    stored = int(item.id.get_storage_size())
    n_chunks = prod(chunk_grid(item.shape, item.chunks)) if item.chunks else 1
    texts, codes = 0, _check_filters(item, shown)
    rows_on_disk = is_expression(name) and not places
    # what is larger is refused by what it says of itself
    if rows_on_disk or not (is_blown_up(unpacked, stored) or n_chunks > _MOST_CHUNKS):
        _check_chunks(item, codes, width, shown)
        try:
            texts = text_bytes(path, item, enough=enough)
        except (ValueError, OSError) as error:
            msg = f"{shown}: {error}"
            raise ValueError(msg) from error
    return StoredSize(
        name=name,
        unpacked=unpacked,
        stored=stored,
        texts=texts,
        chunk=prod(item.chunks) * item.dtype.itemsize if item.chunks else 0,
        rows_on_disk=rows_on_disk,
        n_chunks=n_chunks,
    )


def is_blown_up(unpacked: int, stored: int) -> bool:
    """Return whether something takes far more than is stored of it, and much."""
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
    expression matrix of which rows are read from disk may be as large as it likes. Each chunk of a shape costs
    the library kilobytes, whether it is stored or not.
    """
    total = n_chunks = 0
    for size in sizes:
        shown = ascii(size.name[:200])
        # the whole of a chunk is unpacked, however little of it an array covers
        if size.chunk > max(_SMALL_BYTES, memory // _SHARE_OF_MEMORY):
            msg = f"{shown} is stored in chunks of {size.chunk} bytes, and {memory} are free"
            raise ValueError(msg)
        if on_disk and size.rows_on_disk:
            continue
        if is_blown_up(size.unpacked, size.stored):
            msg = f"{shown} would take {size.unpacked} bytes, of which {size.stored} are stored"
            raise ValueError(msg)
        total += size.unpacked + size.texts
        n_chunks += size.n_chunks
    if n_chunks > _MOST_CHUNKS:
        msg = f"its arrays are stored in {n_chunks} chunks, more than the {_MOST_CHUNKS} that are read at once"
        raise ValueError(msg)
    if total > max(_SMALL_BYTES, memory):
        msg = f"its arrays would take {total} bytes, and {memory} are free"
        raise ValueError(msg)
