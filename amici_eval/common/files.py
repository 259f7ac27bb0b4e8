"""Files that are whole or not there, whatever happens to the process or the machine, and folders with one owner."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
"""What a file is called until it is whole."""
_LOCK_FILE = "lock"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file of another name, and give it its own name once it is on disk.

    The file is flushed to disk before it is renamed, and the folder after: a crash of the machine leaves the old file
    or the new one.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    try:
        write(partial)
        _flush(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    # some file systems cannot flush a folder; the file itself is safe by then
    with contextlib.suppress(OSError):
        _flush(path.parent)


def write_text_durably(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all; see :func:`write_durably`."""
    write_durably(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or what it came from, says that a place takes no more: full, over quota, read-only."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_ROOM:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FolderLock:
    """One process's hold on a folder, which ends with the process, however that ends; `take` makes it.

    An advisory lock (``flock``) on a file in the folder. Where the system (Windows) or the file system cannot lock,
    nothing is locked, and nothing that another process left is taken up.
    """

    def __init__(self, folder: Path, handle: int) -> None:
        self._folder, self._handle = folder, handle

    @classmethod
    def take(cls, folder: Path) -> FolderLock | None:
        """Return the hold on an existing folder; ``None`` if another process has it or it cannot be locked."""
        fcntl = _fcntl()
        if fcntl is None:
            return None
        path = folder / _LOCK_FILE
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
        except OSError as error:
            logger.debug("%s cannot be locked: %s", folder, error)
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the folder may have been removed, and made anew, between opening and locking
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return cls(folder, handle)
        except OSError:
            pass
        os.close(handle)
        return None

    def release(self, *, remove: bool = False) -> None:
        """Let go; ``remove`` takes the lock's own file away first."""
        if remove:
            with contextlib.suppress(OSError):
                (self._folder / _LOCK_FILE).unlink()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _fcntl() -> Any:
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


class DamagedPackError(ValueError):
    """A file is cut off, altered, or holds something else than was asked for."""


def write_pack(path: Path, value: Any, *, label: Mapping[str, str]) -> None:
    """Write dataclasses of arrays and plain values."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    tree = json.dumps(_packed(value, arrays), ensure_ascii=False)
    said = json.dumps(dict(label), sort_keys=True, ensure_ascii=False)
    content = save(arrays, metadata={"tree": tree, "label": said, "sha256": _digest(tree, said, arrays)})
    # not written by the library, which raises an error of its own class when the disk is full
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
