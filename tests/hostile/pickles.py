"""Malformed model.pt and moments.npz; what an allow-list refuses by name is in tests/model/test_allow_list.py."""

from __future__ import annotations

import os
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.hostile.cases import Base, Case, spoilt
from tests.hostile.stored_models import ODD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Base, Path], Path]:
    """Return a builder that changes what model.pt holds."""

    def rewrite(folder: Path) -> None:
        content = torch.load(folder / "model.pt", weights_only=False)
        change(content)
        torch.save(content, folder / "model.pt")

    return spoilt("saved", rewrite)


def cut(place: float) -> Callable[[Base, Path], Path]:
    def shorten(folder: Path) -> None:
        content = (folder / "model.pt").read_bytes()
        (folder / "model.pt").write_bytes(content[: int(place * len(content))])

    return spoilt("saved", shorten)


def put(make: Callable[[Path], Any]) -> Callable[[Base, Path], Path]:
    def build(base: Base, into: Path) -> Path:  # noqa: ARG001, RUF100 - a builder
        (into / "saved").mkdir()
        make(into / "saved" / "model.pt")
        return into / "saved"

    return build


def rewritten(change: Callable[[str, bytes], bytes]) -> Callable[[Base, Path], Path]:
    """Return a builder that changes records of the archive model.pt."""
    return spoilt("saved", lambda folder: rewrite_archive(folder / "model.pt", change))


def rewrite_archive(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as source:
        records = {name: change(name, source.read(name)) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in records.items():
            target.writestr(name, content)


def calling(function: str, arguments: bytes) -> bytes:
    return b"\x80\x02cbuiltins\n" + function.encode() + b"\n" + arguments + b"R."


def of_pickle(content: bytes) -> Callable[[Base, Path], Path]:
    return rewritten(lambda name, old: content if name.endswith("data.pkl") else old)


def packed_zeros(path: Path, name: str = "model/data.pkl") -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        for _ in range(2048):
            file.write(bytes(2**20))


def laughs(depth: int = 12) -> list[Any]:
    value: list[Any] = ["ha"]
    for _ in range(depth):
        value = [value] * 10
    return value


def in_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def spread(content: dict[str, Any]) -> None:
    content["model_state_dict"]["ct_profiles"] = torch.zeros(1).expand(2**20, 2**20)


def names_of(content: dict[str, Any], where: str) -> Any:
    fields = content["attr_dict"]["registry_"]["field_registries"]
    if where == "genes":
        return fields["X"]["state_registry"]["column_names"]
    return fields["labels"]["state_registry"]["categorical_mapping"]


def moments(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Base, Path], Path]:
    def rewrite(path: Path) -> None:
        with np.load(path) as stored:
            arrays = dict(stored)
        change(arrays)
        np.savez_compressed(path, **arrays)

    return spoilt("moments.npz", rewrite)


def member(name: str, change: Callable[[bytes], bytes]) -> Callable[[Base, Path], Path]:
    """Return a builder that changes the bytes of one array of moments."""

    def rewrite(path: Path) -> None:
        rewrite_archive(path, lambda one, content: change(content) if one == f"{name}.npy" else content)

    return spoilt("moments.npz", rewrite)


def header_of(shape: str) -> Callable[[bytes], bytes]:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}"
    text += " " * (118 - 1 - len(text)) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(64)
    return lambda _: content


def _saved() -> dict[str, Callable[[Base, Path], Path]]:
    made: dict[str, Callable[[Base, Path], Path]] = {f"cut at {place}": cut(place) for place in (0.0, 0.2, 0.5, 0.99)}
    for name in ("genes", "types"):
        for what, odd in ODD.items():
            made[f"{name} with {what}"] = changed(lambda c, name=name, odd=odd: names_of(c, name).__setitem__(0, odd))
        made[f"{name} twice"] = changed(lambda c, name=name: names_of(c, name).__setitem__(0, names_of(c, name)[1]))
    for value in (float("nan"), float("inf")):
        made[f"weights with {value}"] = changed(
            lambda c, value=value: c["model_state_dict"]["linear_head.weight"].view(-1)[:1].fill_(value)
        )
    ten = changed(lambda c: c["attr_dict"]["init_params_"]["kwargs"].update(more={"n_kv_dim": 10**12}))
    return {
        **made,
        "a pipe": put(os.mkfifo),
        "a folder": put(lambda path: path.mkdir()),
        "a device": put(lambda path: path.symlink_to("/dev/zero")),
        "a plain pickle": put(lambda path: path.write_bytes(pickle.dumps({"a": 1}))),
        "packed zeros": put(packed_zeros),
        "record shorter than it says": rewritten(lambda name, old: old[:8] if "/data/" in name else old),
        "record empty": rewritten(lambda name, old: b"" if "/data/" in name else old),
        "pickle empty": of_pickle(b""),
        "list of a long range": of_pickle(calling("list", b"cbuiltins\nrange\n(K\0\x8a\x06\0\0\0\0\0\x01tR\x85")),
        "bytes of 2**40": of_pickle(calling("bytearray", b"\x8a\x06\0\0\0\0\0\x01\x85")),
        "array of 2**40": of_pickle(b"\x80\x02cnumpy\nndarray\n\x8a\x06\0\0\0\0\0\x01\x85\x85R."),
        "text that claims 2**31 bytes": of_pickle(b"\x80\x02X\xff\xff\xff\x7fabc."),
        "frame that claims 2**60 bytes": of_pickle(b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N."),
        "memo of 2**31": of_pickle(b"\x80\x02Nr\xff\xff\xff\x7fh\x05."),
        "nested 100,000 deep": of_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        "a number": of_pickle(b"\x80\x02K\x05."),
        "billion laughs": changed(lambda c: c["attr_dict"]["registry_"].update(more=laughs())),
        "a list in itself": changed(lambda c: c["attr_dict"]["registry_"].update(more=in_itself())),
        "weights spread out": changed(spread),
        "weights a list": changed(lambda c: c.update(model_state_dict=[1])),
        "weights missing": changed(lambda c: c["model_state_dict"].pop("attention_layer.W_O")),
        "weights of another shape": changed(lambda c: c["model_state_dict"].update(ct_profiles=torch.zeros(3))),
        "registry a list": changed(lambda c: c["attr_dict"].update(registry_=[])),
        "attributes a list": changed(lambda c: c.update(attr_dict=[])),
        "sizes of 10**12": ten,
        "history of texts": changed(lambda c: c["attr_dict"].update(history_={"loss": ["a"]})),
        "neighbours of 10**12": changed(lambda c: c["attr_dict"]["registry_"]["setup_args"].update(n_neighbors=10**12)),
    }


def _moments() -> dict[str, Callable[[Base, Path], Path]]:
    return {
        "packed zeros": spoilt("moments.npz", lambda path: packed_zeros(path, "header.npy")),
        "objects": moments(lambda arrays: arrays.update(target_mean=np.array([{}], dtype=object))),
        "texts": moments(lambda arrays: arrays.update(target_mean=np.array(["a"]))),
        "another shape": moments(lambda arrays: arrays.update(target_mean=np.zeros(3, dtype="f4"))),
        "an array missing": moments(lambda arrays: arrays.pop("row_type")),
        "an array more": moments(lambda arrays: arrays.update(colour=np.zeros(3))),
        "tile beyond the end": moments(lambda arrays: arrays["row_tile"].__setitem__(0, 2**40)),
        "header nested": moments(lambda a: a.update(header=np.frombuffer(b"[" * 100_000, dtype=np.uint8))),
        "header not UTF-8": moments(lambda a: a.update(header=np.frombuffer(b'{"a": "\xff"}', dtype=np.uint8))),
        "array that says 2**50": member("target_mean", header_of("(1125899906842624,)")),
        "array that says 10**30": member("target_mean", header_of("(1" + "0" * 30 + ",)")),
        "array of negative size": member("target_mean", header_of("(-1,)")),
        "array header of nonsense": member("target_mean", header_of("__import__('os')")),
        "array cut": member("target_mean", lambda content: content[:-5]),
        "array empty": member("target_mean", lambda _: b""),
    }


CASES = [
    *(Case(f"model.pt {name}", "saved", build) for name, build in _saved().items()),
    *(Case(f"moments {name}", "moments", build) for name, build in _moments().items()),
]
