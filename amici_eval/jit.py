"""Compiled kernels where numba is there: one way to ask for it, and to compile with a cache on disk or without."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["compiled", "numba_if_usable"]


def numba_if_usable() -> ModuleType | None:
    """Return numba, or ``None`` where it is not installed or its compiler is switched off (``NUMBA_DISABLE_JIT``)."""
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return None
    return None if numba.config.DISABLE_JIT else numba


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Return a function that is compiled when first called, without the interpreter's lock.

    What is compiled is kept on disk for later processes, where numba finds a folder to write to (``NUMBA_CACHE_DIR``
    names another); else it is compiled anew in each process.
    """
    numba = importlib.import_module("numba")
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        return numba.njit(nogil=True, **options)(function)
