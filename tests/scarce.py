"""A machine of which the memory ends: operations of torch and allocations of NumPy that fail when a test says so."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ERRORS: dict[str, Callable[[], BaseException]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "allocator": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    "python": MemoryError,
}


class Scarce(TorchDispatchMode):
    """Counts the operations of torch in this thread; the ones that ``fails`` names raise.

    Parameters
    ----------
    fails
        Asked with the number of the operation and the bytes of the largest tensor that it gives.
    error
        Makes what is raised.
    """

    def __init__(self, fails: Callable[[int, int], bool], error: Callable[[], BaseException]) -> None:
        super().__init__()
        self.count = self.failures = 0
        self._fails, self._error = fails, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.count += 1
        tensors = found if isinstance(found, (tuple, list)) else (found,)
        size = max((t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)), default=0)
        if self._fails(self.count, size):
            self.failures += 1
            raise self._error()
        return found


@contextmanager
def scarce(fails: Callable[[int, int], bool], error: Callable[[], BaseException] = ERRORS["torch"]) -> Iterator[Scarce]:
    """Run a body in which operations of torch fail."""
    with Scarce(fails, error) as mode:
        yield mode
