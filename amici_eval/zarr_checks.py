"""A look at a .zarr folder before anything in it is read: nothing leads out, runs code, or unpacks without end."""

from __future__ import annotations

import bz2
import lzma
import os
import re
import stat
import zlib
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.hdf5_checks import StoredSize, chunk_grid, is_blown_up, is_expression
from amici_eval.untrusted import load_json

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["METADATA_BYTES", "check_zarr", "load_metadata", "shape_and_chunks"]

_DEEPEST = 64
_TEXT_BYTES = 64
METADATA_BYTES = 2**26
_METADATA_VALUES = 2**21
# below this, not even what packs best can fill much memory
_SMALL_CHUNK = 2**16
_LARGEST_TEXTS = 2**28
_COUNT_BYTES = 4
_BLOCK = 2**16
_PACK_BEST = frozenset({"bz2", "lzma"})
"""A few kilobytes of these unpack to gigabytes; the others pack by a thousand at most."""
_TYPE = re.compile(r"[<>|=]?(?:[biufc]\d{1,2}|[SUV]\d{1,5}|O8?|[mM]8(?:\[\w{1,4}\])?)")
_COMPRESSORS = frozenset({"blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma"})
_FILTERS = frozenset(
    {"vlen-utf8", "vlen-bytes", "vlen-array", "delta", "shuffle", "fixedscaleoffset", "packbits", "astype", "quantize"}
)


def check_zarr(root: Path) -> list[StoredSize]:
    """Return what each array of a .zarr folder (format 2) takes.

    Raises
    ------
    ValueError, OSError
        If it holds a link that leads out of it or to a folder, something that is no file, a codec that is not known (a
        pickle is one), metadata that cannot be read, or a chunk that unpacks to more than the array says.
    """
    sizes = []
    for folder, names in _folders(root):
        for name in names:
            if name in (".zattrs", ".zgroup", ".zmetadata", "zarr.json"):
                metadata = load_metadata(folder / name)
                _check_codecs_anywhere(metadata, folder / name)
        if ".zarray" in names:
            sizes.append(_size_of(root, folder, names))
    return sizes


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Walk a folder; give each folder with the names of its files."""
    whole = root.resolve()
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        if depth > _DEEPEST:
            msg = f"folders are nested more than {_DEEPEST} deep"
            raise ValueError(msg)
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and (entry.is_dir() or not Path(entry.path).resolve().is_relative_to(whole)):
                    msg = f"{entry.name!a} is a link to a folder, or leads out of the .zarr"
                    raise ValueError(msg)
                if entry.is_dir(follow_symlinks=False):
                    if entry.name.startswith(".z") or entry.name == "zarr.json":
                        msg = f"{entry.name!a} is a folder, not a file"
                        raise ValueError(msg)
                    waiting.append((Path(entry.path), depth + 1))
                elif stat.S_ISREG(entry.stat().st_mode):
                    names.append(entry.name)
                else:
                    msg = f"{entry.name!a} is neither a file nor a folder"
                    raise ValueError(msg)
        yield folder, names


def _check_codecs_anywhere(metadata: Any, path: Path) -> None:
    """Refuse metadata in which a pickle is named, wherever the version of zarr that reads it may look."""
    waiting = [metadata]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            named = [value[key] for key in ("id", "name") if isinstance(value.get(key), str)]
            if any("pickle" in name.lower() for name in named):
                msg = f"{path.name} stores a pickle"
                raise ValueError(msg)
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _size_of(root: Path, folder: Path, names: list[str]) -> StoredSize:
    name = "" if folder == root else folder.relative_to(root).as_posix()
    shown = ascii(name[:200])
    record = load_metadata(folder / ".zarray")
    _check_codecs_anywhere(record, folder / ".zarray")
    shape, chunks = shape_and_chunks(record, shown)
    filters = [str(one.get("id")) for one in record.get("filters") or []]
    compressor = record.get("compressor")
    codec = None if compressor is None else str(compressor.get("id"))
    for one in record.get("filters") or []:
        for kind in (value for key, value in one.items() if "type" in key):
            # some filters make another type of it, which may be as long as a book
            if _dtype(kind, shown).kind in "SUV":
                msg = f"{shown} is filtered to {str(kind)[:80]!a}"
                raise ValueError(msg)
    for one, known in [(codec, _COMPRESSORS), *((one, _FILTERS) for one in filters)]:
        if one is not None and one not in known:
            msg = f"{shown} is packed by {one[:80]!a}, which is not among {', '.join(sorted(known))}"
            raise ValueError(msg)
    dtype = _dtype(record["dtype"], shown)
    if dtype.hasobject and not {"vlen-utf8", "vlen-bytes", "vlen-array"} & set(filters):
        msg = f"{shown} holds objects"
        raise ValueError(msg)
    each = _TEXT_BYTES if dtype.hasobject else max(dtype.itemsize, 1)
    chunk = prod(chunks) * each
    stored = texts = 0
    for file in _chunk_files(folder, names):
        stored += file.stat().st_size
        if not dtype.hasobject:
            _check_unpacks(file, codec, chunk, shown)
            continue
        _check_unpacks(file, codec, max(chunk, _LARGEST_TEXTS), shown)
        texts += _texts_of(file, compressor, prod(chunks), shown)
        if is_blown_up(texts, stored):
            msg = f"the texts of {shown} unpack from {stored} to at least {texts} bytes"
            raise ValueError(msg)
    return StoredSize(
        name=name,
        unpacked=prod(shape) * each,
        stored=stored,
        chunk=chunk,
        rows_on_disk=is_expression(name),
        texts=texts,
        n_chunks=prod(chunk_grid(shape, chunks)),
    )


def load_metadata(path: Path) -> Any:
    """Return what a file of metadata says, if it is of a size that such a file has."""
    return load_json(path, limit=METADATA_BYTES, max_values=_METADATA_VALUES, allow_nan=True, links=True)


def shape_and_chunks(record: Any, shown: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and chunks of an array by its metadata.

    Raises
    ------
    ValueError
        If they are no whole numbers, or do not fit each other.
    """
    shape, chunks = _whole(record["shape"], shown), _whole(record["chunks"], shown)
    if len(shape) != len(chunks) or (shape and min(chunks) < 1):
        msg = f"{shown} of shape {shape} has chunks of shape {chunks}"
        raise ValueError(msg)
    return shape, chunks


def _dtype(record: Any, shown: str) -> np.dtype[Any]:
    """Return a type whose name is short: NumPy lets the size of a huge text wrap around, and then writes anywhere."""
    plain = record if isinstance(record, list) else [["", record]]
    for one in plain:
        if not isinstance(one, list) or len(one) != 2 or not all(isinstance(part, str) for part in one):
            msg = f"{shown} has a type that no AnnData has"
            raise ValueError(msg)
        if not _TYPE.fullmatch(one[1]):
            msg = f"{shown} is of type {one[1][:80]!a}"
            raise ValueError(msg)
    return np.dtype([(name, kind) for name, kind in record] if isinstance(record, list) else record)


def _whole(values: Any, shown: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        msg = f"{shown} has sizes that are no whole numbers"
        raise ValueError(msg)
    return tuple(values)


def _chunk_files(folder: Path, names: list[str]) -> Iterator[Path]:
    """Give the files of an array; with nested keys they lie in folders below it."""
    yield from (folder / name for name in names if not name.startswith(".z"))
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        for inner, inner_names in _folders(below):
            yield from (inner / name for name in inner_names)


def _texts_of(file: Path, compressor: Any, most: int, shown: str) -> int:
    """Return how many bytes a chunk of texts takes; refuse one that says that it holds more than a chunk does."""
    from numcodecs import get_codec

    content = file.read_bytes()
    if compressor is not None:
        content = bytes(get_codec(compressor).decode(content))
    # the three filters that make objects begin with their number, which is believed
    held = int.from_bytes(content[:_COUNT_BYTES], "little")
    if held > most:
        msg = f"a chunk of {shown} says that it holds {held} texts, of at most {most}"
        raise ValueError(msg)
    return len(content)


def _check_unpacks(file: Path, codec: str | None, chunk: int, shown: str) -> None:
    """Refuse a chunk that says, or shows when it is unpacked piece by piece, that it is larger than a chunk is."""
    size = file.stat().st_size
    # a filter may pad a little
    most = 2 * chunk + _SMALL_CHUNK
    claimed = size if codec is None else 0
    with file.open("rb") as opened:
        if codec in ("blosc", "lz4", "zstd"):
            claimed = _claimed(codec, opened.read(18))
        elif codec is not None and (size > _SMALL_CHUNK or codec in _PACK_BEST):
            claimed = _unpacked_up_to(most, codec, opened)
    if claimed > most:
        msg = f"a chunk of {shown} unpacks to at least {claimed} bytes, and the array says {chunk}"
        raise ValueError(msg)


def _unpacked_up_to(most: int, codec: str, opened: Any) -> int:
    """Unpack a chunk piece by piece and count, until it is through or larger than ``most``."""
    make: Any = {
        "zlib": zlib.decompressobj,
        "gzip": lambda: zlib.decompressobj(wbits=31),
        "bz2": bz2.BZ2Decompressor,
        "lzma": lzma.LZMADecompressor,
    }[codec]
    decompress, found, fed = make(), 0, b""
    while found <= most:
        if decompress.eof:
            # another stream may follow, which the codecs read too
            fed = decompress.unused_data or opened.read(_BLOCK)
            if not fed or codec == "zlib":
                break
            decompress = make()
        else:
            fed = getattr(decompress, "unconsumed_tail", b"") or b""
            if not fed and getattr(decompress, "needs_input", True):
                fed = opened.read(_BLOCK)
                if not fed:
                    break
        try:
            found += len(decompress.decompress(fed, _BLOCK * 16))
        except (OSError, zlib.error, lzma.LZMAError):
            # what is no stream is an error of the codec's own
            break
    return found


def _claimed(codec: str, head: bytes) -> int:
    """Return how many bytes a compressed chunk says it unpacks to."""
    if codec == "blosc":
        return int.from_bytes(head[4:8], "little")
    if codec == "lz4":
        return int.from_bytes(head[:4], "little")
    # zstd: the size of the content stands behind the window and the dictionary, whose sizes the descriptor tells
    if len(head) < 5 or head[:4] != b"\x28\xb5\x2f\xfd":
        return 0
    descriptor = head[4]
    single, flag = bool(descriptor & 0x20), descriptor >> 6
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    width = (int(single), 2, 4, 8)[flag]
    return int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0)
