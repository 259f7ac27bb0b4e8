"""Results of one part of the work as a file without pickle: arrays as safetensors, the rest as JSON beside them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["DamagedPackError", "read_pack", "write_pack"]


class DamagedPackError(ValueError):
    """A file is cut off, altered, or holds something else than was asked for."""


def write_pack(path: Path, value: Any, *, label: Mapping[str, str]) -> None:
    """Write dataclasses of arrays and plain values."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    tree = json.dumps(_packed(value, arrays), ensure_ascii=False)
    said = json.dumps(dict(label), sort_keys=True, ensure_ascii=False)
    content = save(arrays, metadata={"tree": tree, "label": said, "sha256": _digest(tree, said, arrays)})
    # not by the library: a full disk would be an error of its own class
    path.write_bytes(content)


def read_pack(path: Path, *, label: Mapping[str, str], classes: Sequence[type[Any]]) -> Any:
    """Read what :func:`write_pack` wrote, bit for bit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            told = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, RUF100 - no mapping
        said = json.dumps(dict(label), sort_keys=True, ensure_ascii=False)
        if told["sha256"] != _digest(told["tree"], told["label"], arrays):
            message = "its SHA-256 differs"
            raise DamagedPackError(message)
        if told["label"] != said:
            message = f"it is of {told['label']}"
            raise DamagedPackError(message)
        return _unpacked(json.loads(told["tree"]), arrays, {one.__name__: one for one in classes})
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, DamagedPackError):
            raise
        message = f"{type(error).__name__}: {error}"
        raise DamagedPackError(message) from error


def _digest(tree: str, label: str, arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256(f"{len(tree)} {len(label)} {tree}{label}".encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _packed(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.ndim:
        name = str(len(arrays))
        arrays[name] = np.ascontiguousarray(value)
        return {"array": name}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, arrays) for item in value]}
    if isinstance(value, list):
        return {"list": [_packed(item, arrays) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, arrays), _packed(item, arrays)] for key, item in value.items()]}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {entry.name: _packed(getattr(value, entry.name), arrays) for entry in fields(value)}
        return {"class": type(value).__name__, "fields": parts}
    message = f"a {type(value).__name__} cannot be kept"
    raise TypeError(message)


def _unpacked(tree: Any, arrays: Mapping[str, np.ndarray], classes: Mapping[str, type[Any]]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return arrays[tree["array"]]
    if "tuple" in tree:
        return tuple(_unpacked(item, arrays, classes) for item in tree["tuple"])
    if "list" in tree:
        return [_unpacked(item, arrays, classes) for item in tree["list"]]
    if "dict" in tree:
        return {_unpacked(key, arrays, classes): _unpacked(item, arrays, classes) for key, item in tree["dict"]}
    parts = {name: _unpacked(item, arrays, classes) for name, item in tree["fields"].items()}
    return classes[tree["class"]](**parts)
