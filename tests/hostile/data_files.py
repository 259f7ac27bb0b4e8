"""Malformed AnnData files: .h5ad and .zarr.

A data file is the user's own: these are damaged, of absurd declared sizes, or hold pickles; none is a bomb.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from tests.hostile.cases import Base, Case, spoilt
from tests.hostile.stored_models import ODD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def h5(change: Callable[[h5py.File], Any]) -> Callable[[Base, Path], Path]:
    def rewrite(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return spoilt("tissue.h5ad", rewrite)


def h5_bytes(change: Callable[[bytes], bytes]) -> Callable[[Base, Path], Path]:
    return spoilt("tissue.h5ad", lambda path: path.write_bytes(change(path.read_bytes())))


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


def array_changed(name: str, **entries: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name / ".zarray"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

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
    for name, options in {
        "obsm/spatial": {"shape": (2**40, 2**10), "dtype": "f8", "chunks": (2**10, 2**10)},
        "obs/cell_type": {"shape": (2**36,), "dtype": h5py.string_dtype(), "chunks": (2**16,)},
        "obs/_index": {"shape": (2**36,), "dtype": h5py.string_dtype(), "chunks": (2**16,)},
        "var/_index": {"shape": (2**36,), "dtype": h5py.string_dtype(), "chunks": (2**16,)},
        "X": {"shape": (2**36, 2**20), "dtype": "f4", "chunks": (2**10, 2**10)},
    }.items():
        add(f"h5ad {name} of another size", h5(instead(name, **options)))

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
        "unknown type": array_changed("obsm/spatial", dtype="{'names': ["),
        "objects": array_changed("obsm/spatial", dtype="|O", filters=None),
        "pickle as filter": array_changed("obs/_index", filters=[{"id": "pickle", "protocol": 4}]),
        "pickle as compressor of coordinates": array_changed("obsm/spatial", compressor={"id": "Pickle"}),
        "unknown compressor": array_changed("obsm/spatial", compressor={"id": "mine"}),
        "metadata cut": replaced("obsm/spatial/.zarray", lambda path: path.write_text('{"shape": [')),
        "metadata a list": replaced("obsm/spatial/.zarray", lambda path: path.write_text("[]")),
        "chunk of noise": replaced("obsm/spatial/0.0", lambda path: path.write_bytes(b"\x01" * 100)),
        "chunk cut": replaced("obsm/spatial/0.0", lambda path: path.write_bytes(b"")),
        "obs missing": lambda root: shutil.rmtree(root / "obs"),
    }.items():
        add(f"zarr {name}", spoilt("tissue.zarr", change))
    return made


CASES = _cases()
