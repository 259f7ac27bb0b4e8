"""Malformed stored models: MLmodel, JSON files, manifest, weights, bundled data."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.hostile.cases import Base, Case, spoilt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILES = ("weights.safetensors", "model.json", "cells.json", "manifest.json")
ODD = {
    "escape": "\x1b[2Jx",
    "newline": "a\nb",
    "nul": "a\0b",
    "c1": "a\x9bb",
    "bidi": "a\u202eb",
    "isolate": "a\u2066b",
    "separator": "a\u2028b",
}


def sign(model: Path) -> None:
    """Make manifest and MLmodel fit the files again, as somebody would who means harm."""
    from amici_eval.model.manifest import write_manifest

    folder = model / "data" / "amici"
    write_manifest(folder)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
    settings = yaml.safe_load((model / "MLmodel").read_text())
    settings["flavors"]["amici"]["sha256"] = sums
    (model / "MLmodel").write_text(yaml.safe_dump(settings))


def spoiled(change: Callable[[Path], None], *, signed: bool) -> Callable[[Base, Path], Path]:
    """Return a builder that changes files of the data folder, and signs them anew if asked."""

    def spoil(model: Path) -> None:
        change(model / "data" / "amici")
        if signed:
            sign(model)

    return spoilt("model", spoil)


def bytes_changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def flipped(place: float) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :]

    return change


def setup_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        setup = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        change(setup)
        (folder / "model.json").write_text(json.dumps(setup), encoding="utf-8")

    return rewrite


def weights_changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "weights.safetensors")
        change(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")

    return rewrite


def filled(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights[name].view(-1)[3:4].fill_(value)


def header_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def rewrite(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return rewrite


def settings_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Base, Path], Path]:
    def rewrite(model: Path) -> None:
        settings = yaml.safe_load((model / "MLmodel").read_text())
        change(settings)
        (model / "MLmodel").write_text(yaml.safe_dump(settings))

    return spoilt("model", rewrite)


def flavor_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Base, Path], Path]:
    return settings_changed(lambda settings: change(settings["flavors"]["amici"]))


def mlmodel(content: str | bytes) -> Callable[[Base, Path], Path]:
    content = content if isinstance(content, bytes) else content.encode()
    return spoilt("model", lambda model: (model / "MLmodel").write_bytes(content))


def replaced(name: str, put: Callable[[Path], Any]) -> Callable[[Base, Path], Path]:
    """Return a builder that puts something else in place of a file of the model."""

    def replace(model: Path) -> None:
        (model / name).unlink()
        put(model / name)

    return spoilt("model", replace)


def set_in(*keys: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


def laughs(depth: int = 12) -> str:
    lines = ["a0: &a0 [ha, ha]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    return "\n".join([*lines, f"flavors: {{amici: *a{depth - 1}}}"])


def _cases() -> list[Case]:
    made: list[Case] = []

    def add(name: str, build: Callable[[Base, Path], Path]) -> None:
        made.append(Case(name, "model", build))

    for name in FILES:
        for place in (0.0, 0.3, 0.99):
            cut = bytes_changed(name, lambda content, place=place: content[: int(place * len(content))])
            add(f"{name} cut at {place}", spoiled(cut, signed=False))
            if name != "manifest.json":
                add(f"{name} cut at {place}, signed", spoiled(cut, signed=True))
        add(f"{name} flipped", spoiled(bytes_changed(name, flipped(0.5)), signed=False))
        add(f"{name} a folder", replaced(f"data/amici/{name}", lambda path: path.mkdir()))
        add(f"{name} a pipe", replaced(f"data/amici/{name}", os.mkfifo))
        add(f"{name} a link to a device", replaced(f"data/amici/{name}", lambda path: path.symlink_to("/dev/zero")))
        add(f"{name} a link out", replaced(f"data/amici/{name}", lambda path: path.symlink_to("/etc/passwd")))
        add(f"{name} missing", replaced(f"data/amici/{name}", lambda path: None))
    for name in ("model.json", "cells.json"):
        for what, content in {
            "nested": b"[" * 100_000,
            "nested and closed": b"[" * 100_000 + b"]" * 100_000,
            "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
            "not UTF-8": b'{"train": ["\xff\xfe"]}',
            "NaN": b'{"train": NaN}',
            "huge number": b'{"train": 1' + b"0" * 100_000 + b"}",
            "duplicated key": b'{"train": ["a"], "train": ["b"]}',
            "many values": b'{"a": [' + b"[]," * 800_000 + b"[]]}",
            "a string without end": b'{"a": "' + b'\\"' * 1_000_000,
            "a list": b"[]",
            "null": b"null",
        }.items():
            add(f"{name} {what}", spoiled(bytes_changed(name, lambda _, content=content: content), signed=True))
    add("cells of another kind", spoiled(bytes_changed("cells.json", lambda _: b'{"train": [1, 2]}'), signed=True))
    add("cells twice", spoiled(bytes_changed("cells.json", lambda _: b'{"train": ["a", "a"]}'), signed=True))
    for key in ("n_heads", "n_neighbors"):
        for value in (10**12, -1, 0, 2.5, True, "2", None):
            add(f"card {key}={value}", spoiled(setup_changed(set_in("card", key, value=value)), signed=True))
    for key in ("n_heads", "n_head_size", "n_nn_embed_hidden", "n_kv_dim", "n_label_embed", "n_query_dim"):
        change = setup_changed(set_in("init_params", key, value=10**12))
        add(f"init_params {key} of 10**12", spoiled(change, signed=True))
    add(
        "infinite scale",
        spoiled(setup_changed(set_in("init_params", "distance_kernel_unit_scale", value=float("inf"))), signed=True),
    )
    for name, odd in ODD.items():
        for what in ("genes", "cell_types"):
            change = setup_changed(lambda setup, what=what, odd=odd: setup["card"][what].__setitem__(0, odd))
            add(f"{what} with {name}", spoiled(change, signed=True))
    for what in ("genes", "cell_types"):
        change = setup_changed(lambda setup, what=what: setup["card"][what].__setitem__(0, setup["card"][what][1]))
        add(f"{what} twice", spoiled(change, signed=True))
        change = setup_changed(lambda setup, what=what: setup["card"].update({what: [1, 2]}))
        add(f"{what} numbers", spoiled(change, signed=True))
        change = setup_changed(lambda setup, what=what: setup["card"].update({what: []}))
        add(f"{what} none", spoiled(change, signed=True))
    change = setup_changed(lambda setup: setup["registry"].update(more={"array": [1], "dtype": "V999999999999"}))
    add("registry with a huge type", spoiled(change, signed=True))
    add("registry a list", spoiled(setup_changed(set_in("registry", value=[])), signed=True))
    add("history of texts", spoiled(setup_changed(set_in("history", value={"loss": ["a"]})), signed=True))
    add("key with escape", spoiled(setup_changed(set_in("card", "labels_key", value="\x1b]0;x\x07")), signed=True))
    for value in (float("nan"), float("inf"), float("-inf")):
        add(f"weights with {value}", spoiled(weights_changed(filled("linear_head.weight", value)), signed=True))
    for what, change_weights in {
        "of whole numbers": lambda weights: weights.update(ct_profiles=weights["ct_profiles"].to(torch.int8)),
        "transposed": lambda weights: weights.update(ct_profiles=weights["ct_profiles"].T),
        "too small": lambda weights: weights.update({"linear_head.weight": weights["linear_head.weight"][:5]}),
        "of another bias": lambda weights: weights.update({"nn_embed.nn.0.bias": torch.zeros(3)}),
        "flat": lambda weights: weights.update({"attention_layer.W_O": weights["attention_layer.W_O"].flatten()}),
        "missing": lambda weights: weights.pop("attention_layer.W_Q"),
        "with an odd name": lambda weights: weights.update({"\x1b[31mred": torch.zeros(1)}),
    }.items():
        add(f"weights {what}", spoiled(weights_changed(change_weights), signed=True))
    for what, change_bytes in {
        "header of 2**60 bytes": lambda content: (2**60).to_bytes(8, "little") + content[8:],
        "header of all bytes": lambda content: (len(content) - 8).to_bytes(8, "little") + content[8:],
        "8 bytes": lambda content: content[:8],
        "absurd shape": header_changed(lambda header: header["ct_profiles"].update(shape=[2**50, 2**10])),
        "absurd offsets": header_changed(lambda header: header["ct_profiles"].update(data_offsets=[0, 2**60])),
        "offsets that overlap": header_changed(lambda h: h["ct_profiles"].update(h["linear_head.weight"])),
        "unknown type": header_changed(lambda header: header["ct_profiles"].update(dtype="PICKLE")),
        "a pickle": lambda _: b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    }.items():
        add(f"weights {what}", spoiled(bytes_changed("weights.safetensors", change_bytes), signed=True))
    for name, path in {"up": "../x", "absolute": "/etc/passwd", "folder": "a/b", "parent": ".."}.items():
        text = json.dumps({"sha256": {**dict.fromkeys(FILES[:3], ""), path: ""}})
        change = bytes_changed("manifest.json", lambda _, text=text: text.encode())
        add(f"manifest names {name}", spoiled(change, signed=False))
        sums = flavor_changed(lambda f, path=path: f.update(sha256={path: "0" * 64, **f["sha256"]}))
        add(f"MLmodel sums name {name}", sums)
        add(f"data {name}", flavor_changed(lambda f, path=path: f.update(data=path)))
    add("data of another kind", flavor_changed(lambda f: f.update(data=["data/amici"])))
    add("data missing", flavor_changed(lambda f: f.pop("data")))
    add("data the model itself", flavor_changed(lambda f: f.update(data="")))
    add("sums of another kind", flavor_changed(lambda f: f.update(sha256=[1])))
    add("sums that lack a file", flavor_changed(lambda f: f["sha256"].pop("model.json")))
    add("flavors a list", settings_changed(lambda s: s.update(flavors=["amici"])))
    add("flavor a text", settings_changed(lambda s: s["flavors"].update(amici="x")))
    add("uri with escape", flavor_changed(lambda f: f.update(adata_uri="s3://\x1b[2J/a.h5ad")))
    for what, content in {
        "empty": "",
        "nested": "a: " + "[" * 100_000,
        "nested blocks": "\n".join(" " * n + "a:" for n in range(1000)),
        "billion laughs": laughs(),
        "a link to itself": "flavors: &a [*a]",
        "a constructor": "flavors: !!python/object/apply:os.system [true]",
        "not UTF-8": b"flavors: \xff\xfe",
        "huge number": "flavors: 1" + "0" * 100_000,
        "huge": "a: b\n" * 300_000,
        "control characters": "flavors: \x01",
    }.items():
        add(f"MLmodel {what}", mlmodel(content))
    add("MLmodel a pipe", replaced("MLmodel", os.mkfifo))
    add("MLmodel a folder", replaced("MLmodel", lambda path: path.mkdir()))
    add("MLmodel a device", replaced("MLmodel", lambda path: path.symlink_to("/dev/zero")))
    add("bundle cut", spoiled(bytes_changed("adata.h5ad", lambda content: content[:-1000]), signed=False))
    add("bundle cut, signed", spoiled(bytes_changed("adata.h5ad", lambda content: content[:-1000]), signed=True))
    add("bundle a pickle", spoiled(bytes_changed("adata.h5ad", lambda _: b"\x80\x04]\x94."), signed=True))
    add("bundle a link out", replaced("data/amici/adata.h5ad", lambda path: path.symlink_to("/etc/passwd")))
    return made


CASES = _cases()
