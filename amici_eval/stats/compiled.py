"""Whether compiled kernels are there: numba is optional, and loading it takes a moment."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["kernels"]


def kernels() -> ModuleType | None:
    """Return the module of compiled kernels, or ``None`` without numba or with its compiler switched off.

    Nothing is compiled before a kernel is called; what is compiled is kept on disk for later processes where numba
    finds a folder to write to (``NUMBA_CACHE_DIR`` names another).
    """
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:
        return None
    return importlib.import_module("amici_eval.stats.kernels")
