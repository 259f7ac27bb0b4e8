"""Files written whole or not at all, folders with one owner, and small files of others read with care.

What reads raises ``ValueError`` or ``OSError``; the caller adds which file it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import stat
import zipfile
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import IO

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


# control characters (C0, C1), line and paragraph separators, bidirectional embeddings, overrides and isolates, lone
# surrogates: what makes a name read as another one, or breaks a terminal or an encoding
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# also matches a string without an end, so that no text takes quadratic time
_STRING = re.compile(r'"(?:[^"\\]+|\\.|\\\Z)*(?:"|\Z)', re.DOTALL)
_DEEPEST = 64
_LONGEST_NUMBER = 40
_SMALL_BYTES = 2**28
_LARGEST_RATIO = 100


def odd_character(text: str) -> str | None:
    """Return the first character that a name must not have (control, line break, bidi override), if any."""
    found = _ODD.search(text)
    return None if found is None else found[0]


def check_names(names: Any, what: str, *, distinct: bool = True, printable: bool = True) -> None:
    """Refuse names that are no text, hold control characters, or occur twice."""
    if isinstance(names, (str, bytes)) or not isinstance(names, (Sequence, np.ndarray)):
        msg = f"{what} are no list of names"
        raise ValueError(msg)
    if not all(isinstance(name, str) for name in names):
        wrong = next(name for name in names if not isinstance(name, str))
        msg = f"{what} hold a {type(wrong).__name__}, which is no name"
        raise ValueError(msg)
    if printable and odd_character("".join(names)) is not None:
        wrong = next(name for name in names if odd_character(name) is not None)
        msg = f"{what} hold {wrong[:80]!a}: a name has no control characters, line breaks or changes of direction"
        raise ValueError(msg)
    if distinct and len(set(names)) < len(names):
        wrong = _first_twice(list(names))
        msg = f"{what} hold {wrong[:80]!a} twice"
        raise ValueError(msg)


def _first_twice(names: Sequence[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""


def check_is_plain_file(path: Path, *, links: bool = False) -> int:
    """Return the size of a plain file; refuse links (unless they are allowed), folders, pipes and devices."""
    status = path.stat() if links else path.lstat()
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFLNK: "link", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        msg = f"{path.name} is a {kinds.get(stat.S_IFMT(status.st_mode), 'device')}, not a plain file"
        raise ValueError(msg)
    return status.st_size


def read_plain_file(path: Path, *, limit: int, links: bool = False) -> bytes:
    """Return the bytes of a plain file of at most ``limit`` bytes; never waits for a pipe."""
    size = check_is_plain_file(path, links=links)
    if size > limit:
        msg = f"{path.name} has {size} bytes, more than the {limit} that such a file may have"
        raise ValueError(msg)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        return file.read(limit + 1)[:limit]


def load_json(path: Path, *, limit: int, max_values: int, allow_nan: bool = False, links: bool = False) -> Any:
    """Return the value of a JSON file; see :func:`parse_json`."""
    content = read_plain_file(path, limit=limit, links=links)
    return parse_json(content, max_values=max_values, allow_nan=allow_nan)


def parse_json(text: str | bytes, *, max_values: int, allow_nan: bool = False) -> Any:
    """Return the value of a JSON text; refuse repeated keys, too many values and deep nesting."""
    decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    if not isinstance(decoded, str):
        msg = f"JSON is text, not a {type(text).__name__}"
        raise ValueError(msg)  # noqa: TRY004, RUF100 - readers catch one kind
    bare = np.frombuffer(_STRING.sub("", decoded).encode("utf-8", "replace"), dtype=np.uint8)
    # in ASCII, | 0x20 maps [ to {, and ] to }
    brackets = bare[np.isin(bare, np.frombuffer(b"[]{}", dtype=np.uint8))] | 0x20
    opens = brackets == ord("{")
    if 3 * int(opens.sum()) + int((bare == ord(",")).sum()) > max_values:
        msg = f"it holds more than the {max_values} values that such a file may hold"
        raise ValueError(msg)
    if opens.size and int(np.cumsum(np.where(opens, 1, -1), dtype=np.int64).max()) > _DEEPEST:
        msg = f"lists and objects are nested more than {_DEEPEST} deep"
        raise ValueError(msg)
    return json.loads(
        decoded,
        object_pairs_hook=_each_key_once,
        parse_constant=None if allow_nan else _no_number,
        parse_int=_whole_number,
    )


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = _first_twice([key for key, _ in pairs])
        msg = f"the key {twice[:80]!a} occurs twice in one object"
        raise ValueError(msg)
    return made


def _no_number(text: str) -> NoReturn:
    msg = f"{text} is no JSON number"
    raise ValueError(msg)


def _whole_number(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        msg = f"a number has {len(text)} digits"
        raise ValueError(msg)
    return int(text)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the numeric arrays of an ``.npz`` file without pickles, after a check of declared types and sizes."""
    size = check_is_plain_file(path, links=True)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > max(_SMALL_BYTES, _LARGEST_RATIO * size):
            msg = f"it unpacks from {size} to {unpacked} bytes, which no file that was written here does"
            raise ValueError(msg)
        arrays: dict[str, np.ndarray] = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                msg = f"it holds {name[:80]!a} twice"
                raise ValueError(msg)
            with archive.open(member) as file:
                arrays[name] = _plain_array(file, member.file_size, name)
    return arrays


def _plain_array(file: IO[bytes], size: int, name: str) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        msg = f"{name} is written in version {version} of the .npy format"
        raise ValueError(msg)
    shape, by_columns, dtype = readers[version](file)
    if dtype.kind not in "biuf" or dtype.hasobject:
        msg = f"{name} holds {dtype}, not numbers"
        raise ValueError(msg)
    expected = prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not expected < size:
        msg = f"{name} says that it is of shape {shape}, which its {size} bytes do not hold"
        raise ValueError(msg)
    content = file.read(expected)
    if len(content) < expected or file.read(1):
        msg = f"{name} has another size than it says"
        raise ValueError(msg)
    values = np.frombuffer(bytearray(content), dtype=dtype)
    return values.reshape(shape, order="F" if by_columns else "C")
