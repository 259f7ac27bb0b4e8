"""Malformed AnnData files: .h5ad and .zarr."""

from __future__ import annotations

import bz2
import json
import lzma
import os
import pickle
import shutil
import zlib
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from tests.hostile.cases import Base, Case
from tests.hostile.stored_models import ODD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def h5(change: Callable[[h5py.File], Any]) -> Callable[[Base, Path], Path]:
    def build(base: Base, into: Path) -> Path:
        path = base.data(into, "h5ad")
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    return build


def h5_bytes(change: Callable[[bytes], bytes]) -> Callable[[Base, Path], Path]:
    def build(base: Base, into: Path) -> Path:
        path = base.data(into, "h5ad")
        path.write_bytes(change(path.read_bytes()))
        return path

    return build


def zarr(change: Callable[[Path], Any]) -> Callable[[Base, Path], Path]:
    def build(base: Base, into: Path) -> Path:
        path = base.data(into, "zarr")
        change(path)
        return path

    return build


def placed(name: str, put: Callable[[Path], Any]) -> Callable[[Base, Path], Path]:
    def build(base: Base, into: Path) -> Path:  # noqa: ARG001, RUF100 - a builder
        put(into / name)
        return into / name

    return build


def instead(name: str, **options: Any) -> Callable[[h5py.File], None]:
    """Return a change that puts an array of another size or kind in place of one."""

    def change(file: h5py.File) -> None:
        attributes = dict(file[name].attrs) if name in file else {"encoding-type": "array", "encoding-version": "0.2.0"}
        if name in file:
            del file[name]
        made = file.create_dataset(name, **options)
        made.attrs.update(attributes)

    return change


def virtual(file: h5py.File) -> None:
    del file["obsm/spatial"]
    layout = h5py.VirtualLayout(shape=(500, 2), dtype="f8")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(500, 2))
    file["obsm"].create_virtual_dataset("spatial", layout)


def in_itself(file: h5py.File) -> None:
    file["uns/again"] = file["uns"]


def one_text(number: int, *, chunks: tuple[int, ...] | None = None) -> Callable[[h5py.File], None]:
    """Return a change that adds an array of texts, all of which are one text of 30 MB, stored once."""

    def change(file: h5py.File) -> None:
        made = file["uns"].create_dataset("texts", (number,), h5py.string_dtype(), chunks=chunks)
        made[0] = "x" * 30_000_000
        if chunks is None:
            start, path = made.id.get_offset(), file.filename
            file.close()
            with open(path, "r+b") as raw:  # noqa: PTH123, RUF100 - as bytes
                raw.seek(start)
                entry = raw.read(16)
                raw.write(entry * (number - 1))
            return
        entry = made.id.read_direct_chunk((0,))[1][:16]
        for at in range(0, number, chunks[0]):
            made.id.write_direct_chunk((at,), entry * chunks[0])

    return change


def with_reference(file: h5py.File) -> None:
    file["uns"].create_dataset("ref", data=file["obs"].ref, dtype=h5py.ref_dtype)


def sparse_x(indices: list[int], indptr: list[int]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [500, 40]})
        group["data"] = np.ones(len(indices), dtype="f4")
        group["indices"], group["indptr"] = np.array(indices, dtype="i4"), np.array(indptr, dtype="i4")

    return change


def renamed(where: str, odd: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        names = file[f"{where}/_index"][:]
        names[0] = odd.encode() if "\0" not in odd else b"a\x01b"
        file[f"{where}/_index"][:] = names

    return change


def deep_groups(file: h5py.File) -> None:
    group = file["uns"]
    for _ in range(300):
        group = group.create_group("a")
        group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})


def array_changed(name: str, **entries: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name / ".zarray"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return change


def zlib_bomb(root: Path) -> None:
    array_changed("obsm/spatial", compressor={"id": "zlib", "level": 9})(root)
    packer, zeros = zlib.compressobj(9), bytes(2**20)
    with (root / "obsm/spatial/0.0").open("wb") as file:
        for _ in range(512):
            file.write(packer.compress(zeros))
        file.write(packer.flush())


def stream_bomb(codec: str) -> Callable[[Path], None]:
    """Return what puts a few kilobytes, in many streams, in the place of a chunk; they unpack to gigabytes."""

    def change(root: Path) -> None:
        array_changed("obsm/spatial", compressor={"id": codec})(root)
        packed = {"bz2": bz2.compress, "lzma": lzma.compress}[codec](bytes(2**26))
        (root / "obsm/spatial/0.0").write_bytes(packed * 64)

    return change


def text_bomb(root: Path) -> None:
    """Name chunks of texts that a kilobyte each stores, and 64 MB take."""
    array_changed("obs/_index", shape=[50], chunks=[1], compressor={"id": "zlib", "level": 9})(root)
    one = (2**26 - 8).to_bytes(4, "little") + bytes(2**26 - 8)
    packed = zlib.compress((1).to_bytes(4, "little") + one, 9)
    for chunk in range(50):
        (root / f"obs/_index/{chunk}").write_bytes(packed)


ASTYPE = {"id": "astype", "encode_dtype": "|u1", "decode_dtype": "<U100000"}


def text_count(number: int, *, texts: bool = False) -> Callable[[Path], None]:
    """Return what puts a chunk in place that says that it holds so many texts, and may do so."""

    def change(root: Path) -> None:
        array_changed("obs/_index", compressor={"id": "zlib", "level": 9})(root)
        content = number.to_bytes(4, "little") + (b"\x02\0\0\0ab" * number if texts else b"")
        (root / "obs/_index/0").write_bytes(zlib.compress(content, 9))

    return change


def blosc_bomb(root: Path) -> None:
    path = root / "obsm/spatial/0.0"
    content = path.read_bytes()
    path.write_bytes(content[:4] + (2**31 - 1).to_bytes(4, "little") + content[8:])


def linked(name: str, to: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(to)

    return change


def replaced(name: str, put: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).unlink()
        put(root / name)

    return change


def npy(path: Path) -> None:
    np.save(path.with_suffix(".npy"), np.array([1, "a", None], dtype=object), allow_pickle=True)
    path.with_suffix(".npy").rename(path)


def _cases() -> list[Case]:
    made: list[Case] = []

    def add(name: str, build: Callable[[Base, Path], Path]) -> None:
        made.append(Case(name, "data", build))

    for place in (0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999):
        add(f"h5ad cut at {place}", h5_bytes(lambda content, place=place: content[: int(place * len(content))]))
    add("h5ad of zeros", h5_bytes(lambda content: bytes(len(content))))
    add("h5ad with its head gone", h5_bytes(lambda content: bytes(64) + content[64:]))
    for name in ("tissue.h5ad", "tissue.zarr"):
        add(f"{name} a pipe", placed(name, os.mkfifo))
        add(f"{name} a device", placed(name, lambda path: path.symlink_to("/dev/zero")))
        add(f"{name} a link to itself", placed(name, lambda path: path.symlink_to(path)))
        add(f"{name} empty file", placed(name, lambda path: path.touch()))
        add(f"{name} empty folder", placed(name, lambda path: path.mkdir()))
        add(f"{name} a pickle", placed(name, lambda path: path.write_bytes(pickle.dumps({"X": [1]}))))
        add(f"{name} an array of objects", placed(name, npy))
    gzip: dict[str, Any] = {"compression": "gzip", "chunks": (2**20, 1)}
    for name, options in {
        "obsm/huge": {"shape": (2**40, 2**10), "dtype": "f8", "chunks": (2**10, 2**10)},
        "obsm/spatial": {"shape": (2**27, 2), "dtype": "f8", **gzip},
        "uns/huge": {"shape": (2**50,), "dtype": "u1", "chunks": (2**20,)},
        "uns/texts": {"shape": (2**40,), "dtype": h5py.string_dtype(), "chunks": (2**16,)},
        "uns/wide": {"shape": (2**20,), "dtype": "S1000000", "chunks": (16,)},
        "obs/_index": {"shape": (2**36,), "dtype": h5py.string_dtype(), "chunks": (2**16,)},
        "var/_index": {"shape": (2**36,), "dtype": h5py.string_dtype(), "chunks": (2**16,)},
        "X": {"shape": (2**36, 2**20), "dtype": "f4", "chunks": (2**10, 2**10)},
        "obsm/text": {"shape": (3,), "dtype": "f8"},
        "obsm/none": {"data": h5py.Empty("f8")},
    }.items():
        add(f"h5ad {name} of another size", h5(instead(name, **options)))

    def bomb(file: h5py.File) -> None:
        made_of = file["uns"].create_dataset("bomb", (2**32,), "u1", chunks=(2**26,), compression="gzip")
        packed = zlib.compress(bytes(2**26), 9)
        for start in range(0, 2**32, 2**26):
            made_of.id.write_direct_chunk((start,), packed)

    def small_bomb(file: h5py.File) -> None:
        made_of = file["uns"].create_dataset("bomb", (50, 10), "f8", chunks=(50, 10), compression="gzip")
        packer, zeros = zlib.compressobj(9), bytes(2**24)
        packed = b"".join([*(packer.compress(zeros) for _ in range(64)), packer.flush()])
        made_of.id.write_direct_chunk((0, 0), packed)

    def short(name: str, dtype: Any, *, filters: dict[str, Any]) -> Callable[[h5py.File], None]:
        def change(file: h5py.File) -> None:
            # large enough that reading on behind a short one leaves the memory of the process
            made = file["uns"].create_dataset(name, (2**22,), dtype, chunks=(2**22,), **filters)
            made.id.write_direct_chunk((0,), zlib.compress(b"\x01" * 100))

        return change

    def packed_twice(file: h5py.File) -> None:
        like = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        like.set_chunk((2**26,))
        for _ in range(2):
            like.set_filter(h5py.h5z.FILTER_DEFLATE, 0, (9,))
        space = h5py.h5s.create_simple((2**32,))
        made = h5py.h5d.create(file["uns"].id, b"twice", h5py.h5t.STD_U8LE, space, like)
        packed = zlib.compress(zlib.compress(bytes(2**26), 9), 9)
        for start in range(0, 2**32, 2**26):
            made.write_direct_chunk((start,), packed)

    def many_paths(file: h5py.File) -> None:
        # two names for each of thirty groups in one another: a walk along all of them has no end
        group = file["uns"]
        for _ in range(30):
            group = group.create_group("a")
            group.parent["b"] = group

    def many_names(file: h5py.File) -> None:
        for number in range(3000):
            file[f"uns/name{number}"] = file["obs/_index"]
        instead("uns/name0", data=["x" * 50_000] * 100)(file)
        for number in range(1, 3000):
            del file[f"uns/name{number}"]
            file[f"uns/name{number}"] = file["uns/name0"]

    gz = {"compression": "gzip"}
    shuffled = {**gz, "shuffle": True}
    add("h5ad of zeros packed", h5(bomb))
    add("h5ad of zeros packed twice", h5(packed_twice))
    add("h5ad of a chunk that is shorter than it says", h5(short("short", "f8", filters=gz)))
    add(
        "h5ad of a shuffled chunk that is shorter than it says",
        h5(short("short", "f8", filters=shuffled)),
    )
    add("h5ad of texts in a chunk that is shorter than it says", h5(short("short", h5py.string_dtype(), filters=gz)))
    add("h5ad of a million chunks", h5(instead("uns/many", shape=(2**20,), dtype="u1", chunks=(1,))))
    add("h5ad of lists of nothing", h5(instead("uns/lists", shape=(2**25,), dtype=h5py.vlen_dtype("f4"))))
    add("h5ad of tables of texts", h5(instead("uns/t", shape=(2**22,), dtype=[("a", h5py.string_dtype(), (9,))])))
    add("h5ad of one group on many paths", h5(many_paths))
    add("h5ad of one array with many names", h5(many_names))
    add("h5ad of a chunk that is larger than it says", h5(small_bomb))
    add("h5ad texts that are one", h5(one_text(100)))
    add("h5ad texts that are one, in chunks", h5(one_text(400, chunks=(50,))))
    add("h5ad external link", h5(lambda f: f["uns"].__setitem__("out", h5py.ExternalLink("/etc/passwd", "/"))))
    add("h5ad soft link", h5(lambda f: f["uns"].__setitem__("soft", h5py.SoftLink("/obs"))))
    add("h5ad soft link cycle", h5(lambda f: f["uns"].__setitem__("soft", h5py.SoftLink("/uns/soft"))))
    add("h5ad group in itself", h5(in_itself))
    add("h5ad deep groups", h5(deep_groups))
    add("h5ad virtual array", h5(virtual))
    add(
        "h5ad external storage",
        h5(instead("obsm/spatial", shape=(500, 2), dtype="f8", external=[("/etc/passwd", 0, 8000)])),
    )
    add("h5ad references", h5(with_reference))
    add("h5ad without obs", h5(lambda f: f.__delitem__("obs")))
    add("h5ad obs a number", h5(instead("obs", data=3)))
    for what, indices, indptr in (
        ("columns beyond the end", [10**6] * 500, list(range(501))),
        ("negative columns", [-5] * 500, list(range(501))),
        ("rows backwards", [0] * 500, [0, 400, 3, *[500] * 498]),
        ("rows beyond the end", [0] * 500, [*range(500), 10**6]),
        ("rows missing", [0] * 5, [0, 5]),
    ):
        add(f"h5ad sparse, {what}", h5(sparse_x(indices, indptr)))
    for name, odd in ODD.items():
        add(f"h5ad gene with {name}", h5(renamed("var", odd)))
    add("h5ad cell with newline", h5(renamed("obs", "a\nb")))
    add("h5ad gene not UTF-8", h5(lambda f: instead("var/_index", data=[b"\xff\xfe"] * 40)(f)))
    far: dict[str, Any] = {"shape": [2**50, 2**10], "chunks": [2**10, 2**10]}
    for name, change in {
        "array of 2**60": array_changed("obsm/spatial", **far),
        "array of texts of 2**40": array_changed("obs/_index", shape=[2**40]),
        "negative size": array_changed("obsm/spatial", shape=[-1, 2]),
        "size a text": array_changed("obsm/spatial", shape="a"),
        "chunk of nothing": array_changed("obsm/spatial", chunks=[0, 2]),
        "chunk of 2**50": array_changed("obsm/spatial", chunks=[2**50, 2]),
        "huge items": array_changed("obsm/spatial", dtype="<U1000000000"),
        "items whose size wraps around": array_changed("obsm/spatial", dtype="<U1073741826"),
        "unknown type": array_changed("obsm/spatial", dtype="{'names': ["),
        "objects": array_changed("obsm/spatial", dtype="|O", filters=None),
        "pickle as filter": array_changed("obs/_index", filters=[{"id": "pickle", "protocol": 4}]),
        "json as filter": array_changed("obs/_index", filters=[{"id": "json2"}]),
        "pickle as compressor": array_changed("obsm/spatial", compressor={"id": "Pickle"}),
        "unknown compressor": array_changed("obsm/spatial", compressor={"id": "mine"}),
        "zlib bomb": zlib_bomb,
        "blosc bomb": blosc_bomb,
        "text bomb": text_bomb,
        "texts that are counted as more than there is room for": text_count(400_000_000),
        "more texts than there is room for": text_count(2**20, texts=True),
        "a filter of huge texts": array_changed("obsm/spatial", filters=[ASTYPE]),
        "a filter of texts whose size wraps around": array_changed(
            "obsm/spatial", filters=[{**ASTYPE, "encode_dtype": "<U1073741826"}]
        ),
        "a million chunks": array_changed("obsm/spatial", shape=[2**20, 2], chunks=[1, 2]),
        "bz2 bomb": stream_bomb("bz2"),
        "lzma bomb": stream_bomb("lzma"),
        "metadata cut": replaced("obsm/spatial/.zarray", lambda path: path.write_text('{"shape": [')),
        "metadata nested": replaced("obsm/.zattrs", lambda path: path.write_text("[" * 100_000)),
        "metadata not UTF-8": replaced("obsm/.zattrs", lambda path: path.write_bytes(b'{"a": "\xff"}')),
        "metadata twice": replaced("obsm/.zattrs", lambda path: path.write_text('{"a": 1, "a": 2}')),
        "metadata a list": replaced("obsm/spatial/.zarray", lambda path: path.write_text("[]")),
        "metadata a pipe": replaced("obsm/.zattrs", os.mkfifo),
        "metadata a folder": replaced("obsm/spatial/.zarray", lambda path: path.mkdir()),
        "chunk a pipe": replaced("obsm/spatial/0.0", os.mkfifo),
        "chunk a link out": linked("obsm/spatial/0.0", "/etc/passwd"),
        "chunk of noise": replaced("obsm/spatial/0.0", lambda path: path.write_bytes(b"\x01" * 100)),
        "chunk cut": replaced("obsm/spatial/0.0", lambda path: path.write_bytes(b"")),
        "folder linked to its parent": linked("uns", ".."),
        "folder linked to itself": linked("uns", "uns"),
        "folder linked out": linked("uns", "/etc"),
        "obs missing": lambda root: shutil.rmtree(root / "obs"),
    }.items():
        add(f"zarr {name}", zarr(change))
    return made


CASES = _cases()
