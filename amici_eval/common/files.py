"""Files that are whole or not there, whatever happens to the process or the machine, and folders with one owner."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["PARTIAL_SUFFIX", "FolderLock", "is_disk_full", "write_durably", "write_text_durably"]

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
"""What a file is called until it is whole."""
_LOCK_FILE = "lock"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file of another name, and give it its own name once it is on disk.

    Notes
    -----
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

    Notes
    -----
    An advisory lock (``flock``) on a file in the folder. Where the system has none (Windows), or the file system cannot
    lock, nothing is locked and nothing that another process left is taken up.
    """

    def __init__(self, folder: Path, handle: int) -> None:
        self._folder, self._handle = folder, handle

    @classmethod
    def take(cls, folder: Path) -> FolderLock | None:
        """Return the hold on a folder that is there; ``None`` if another has it or there is no telling."""
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
            # the folder may have been removed, and made anew, between the two steps
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
