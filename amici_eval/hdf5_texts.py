"""How long the texts of an HDF5 array are, without reading them: many may share one large object of the file."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["filters_of", "layout_of", "stored_chunks", "text_bytes"]

_LARGEST_CHUNK = 2**28
_BLOCK = 2**16
_MOST_PLACES = 1024


def layout_of(item: Any) -> tuple[int, list[tuple[int, int]]]:
    """Return how an array's entries stand in the file.

    Parameters
    ----------
    item
        An ``h5py.Dataset``.

    Returns
    -------
    tuple of int and list
        Bytes of an entry; and for each part of it that is of varying length, where its length stands and how many bytes
        one of it takes.

    Raises
    ------
    ValueError
        If parts of varying length hold such parts, or there are more than 1024.
    """
    return _layout(item.id.get_type(), item.id)


def filters_of(item: Any) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return code, flags and settings of each filter of an array, in the order in which they were applied."""
    plist = item.id.get_create_plist()
    return [plist.get_filter(index)[:3] for index in range(plist.get_nfilters())]


def stored_chunks(item: Any) -> Iterator[tuple[tuple[int, ...], int, bytes]]:
    """Give each stored chunk of an array: where it is, which filters it went without (a bit each), its bytes."""
    places: list[tuple[int, ...]] = []
    item.id.chunk_iter(lambda info: places.append(info.chunk_offset))
    for place in places:
        yield (place, *item.id.read_direct_chunk(place))


def text_bytes(path: Path, item: Any, *, enough: int) -> int:
    """Return how many bytes the texts, and other entries of varying length, of an array take once they are read.

    Parameters
    ----------
    path
        The file.
    item
        An ``h5py.Dataset`` of it.
    enough
        It need not go on beyond so many.

    Returns
    -------
    int
        0 if all entries are of one length.

    Raises
    ------
    ValueError
        If entries of varying length hold such entries, or chunks take more than 256 MiB.
    OSError
        If a chunk is damaged.

    Notes
    -----
    Where such an entry stands, the file has its length (4 bytes), and the place of its content in a heap (format
    specification of HDF5, "Global heap"). The library gives the content only, so that these are read raw: contiguous
    ones from the file, chunks through a file in memory with the same filters and plain bytes as type. An array within
    the head of its object has a few thousand entries at most, which are read one by one.
    """
    from h5py import h5d

    width, places = layout_of(item)
    if not places or item.shape is None or not prod(item.shape):
        return 0
    layout = item.id.get_create_plist().get_layout()
    total = 0
    if layout not in (h5d.CHUNKED, h5d.CONTIGUOUS):
        for index in np.ndindex(item.shape):
            total += _length_of(item[index])
            if total > enough:
                break
        return total
    for rows in _chunks(item, width) if layout == h5d.CHUNKED else _block(path, item, width):
        for offset, unit in places:
            lengths = np.ascontiguousarray(rows[:, offset : offset + 4]).view("<u4")
            total += unit * int(lengths.sum(dtype=np.uint64))
        if total > enough:
            break
    return total


def _length_of(value: Any) -> int:
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, np.void):
        return sum(_length_of(part) for part in value.item())
    return int(value.nbytes) if isinstance(value, np.ndarray) else 0


def _layout(kind: Any, within: Any) -> tuple[int, list[tuple[int, int]]]:
    """Return how wide an entry is in the file, and where lengths stand in it, each with what one counts for."""
    from h5py import h5i, h5t

    if isinstance(kind, h5t.TypeVlenID) or (isinstance(kind, h5t.TypeStringID) and kind.is_variable_str()):
        unit = 1
        if isinstance(kind, h5t.TypeVlenID):
            base = kind.get_super()
            if _layout(base, within)[1]:
                msg = "entries of varying length hold entries of varying length"
                raise ValueError(msg)
            unit = base.get_size()
        return 8 + h5i.get_file_id(within).get_create_plist().get_sizes()[0], [(0, unit)]
    if isinstance(kind, h5t.TypeCompoundID):
        members = sorted((kind.get_member_offset(i), kind.get_member_type(i)) for i in range(kind.get_nmembers()))
        # offsets are those in memory, where such an entry is a pointer
        wider, places = 0, []
        for offset, member in members:
            width, inner = _layout(member, within)
            places += [(offset + wider + place, unit) for place, unit in inner]
            wider += width - member.get_size()
        return kind.get_size() + wider, places
    if isinstance(kind, h5t.TypeArrayID):
        width, inner = _layout(kind.get_super(), within)
        count = prod(kind.get_array_dims())
        if inner and count * len(inner) > _MOST_PLACES:
            msg = f"an entry holds more than {_MOST_PLACES} texts"
            raise ValueError(msg)
        return width * count, [(i * width + place, unit) for i in range(count if inner else 0) for place, unit in inner]
    return kind.get_size(), []


def _block(path: Path, item: Any, width: int) -> Iterator[np.ndarray]:
    """Give the entries of a contiguous array, as bytes, entries x width."""
    start, left = item.id.get_offset(), prod(item.shape)
    # behind a user block also what is stored nowhere has an offset
    if start is None or item.id.get_storage_size() == 0:
        return
    with path.open("rb") as file:
        file.seek(start)
        while left > 0 and len(content := file.read(width * min(left, _BLOCK))) >= width:
            rows = np.frombuffer(content, dtype=np.uint8, count=len(content) // width * width).reshape(-1, width)
            left -= len(rows)
            yield rows


def _chunks(item: Any, width: int) -> Iterator[np.ndarray]:
    """Give the entries of each stored chunk, as bytes, entries x width."""
    import h5py
    from h5py import h5d, h5p, h5s, h5t, h5z

    filters, held = filters_of(item), prod(item.chunks) * width
    if held > _LARGEST_CHUNK:
        msg = f"its texts are stored in chunks of {held} bytes"
        raise ValueError(msg)
    with h5py.File(uuid4().hex, "w", driver="core", backing_store=False) as file:
        for number, (place, skipped, content) in enumerate(stored_chunks(item)):
            like, unit = h5p.create(h5p.DATASET_CREATE), width
            for index, (code, flags, values) in enumerate(filters):
                if skipped >> index & 1:
                    continue
                like.set_filter(code, flags, values)
                if code == h5z.FILTER_SHUFFLE and values:
                    # it took the entries for as wide as they are in memory
                    unit = values[0]
            if unit < 1 or held % unit:
                msg = f"its entries of {width} bytes are shuffled by {unit}"
                raise ValueError(msg)
            like.set_chunk((held // unit,))
            bytes_only = h5t.create(h5t.OPAQUE, unit)
            bytes_only.set_tag(b"")
            name = str(number).encode()
            copy = h5d.create(file.id, name, bytes_only, h5s.create_simple((held // unit,)), like)
            copy.write_direct_chunk((0,), content)
            stored = np.empty(held // unit, dtype=f"V{unit}")
            copy.read(h5s.ALL, h5s.ALL, stored)
            file.id.unlink(name)
            # a chunk at the end reaches beyond it
            inside = tuple(slice(max(size - at, 0)) for size, at in zip(item.shape, place, strict=True))
            entries = stored.view(np.uint8).reshape(*item.chunks, width)[inside]
            yield np.ascontiguousarray(entries).reshape(-1, width)
