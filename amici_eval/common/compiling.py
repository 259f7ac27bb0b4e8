"""Compiled kernels where numba is there: one way to ask for it, and to compile with a cache on disk or without."""

from __future__ import annotations

import importlib
import logging
import pickle
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["compiled", "numba_if_usable"]

logger = logging.getLogger(__name__)

_SPOILT = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
)
"""What reading a pickle raises that was cut off or overwritten."""


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
        dispatcher = numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        return numba.njit(nogil=True, **options)(function)
    _tolerate_cache_errors(getattr(dispatcher, "_cache", None))
    return dispatcher


def _tolerate_cache_errors(cache: Any) -> None:
    """Let files of compiled code that are spoilt be made anew, and do without where they cannot be written."""
    load, save = getattr(cache, "load_overload", None), getattr(cache, "save_overload", None)
    if load is None or save is None:
        return

    def load_if_whole(*arguments: Any) -> Any:
        try:
            return load(*arguments)
        except _SPOILT as error:
            logger.debug("compiled code in %s is spoilt (%s) and made anew", cache.cache_path, type(error).__name__)
        # an index without entries: what it named is compiled again
        with suppress(OSError):
            cache.flush()
        return None

    def save_if_possible(*arguments: Any) -> None:
        try:
            save(*arguments)
        except OSError as error:
            logger.debug("compiled code cannot be kept in %s: %s", cache.cache_path, error)

    cache.load_overload, cache.save_overload = load_if_whole, save_if_possible
