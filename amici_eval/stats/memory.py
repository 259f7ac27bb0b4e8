"""How much of the permutation test is held at a time, and what is done where a device's memory ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["STORED_INDICES", "TORCH_ENTRIES", "OutOfMemory", "unless_memory_ends"]

Result = TypeVar("Result")

STORED_INDICES = 2**26
"""Places of cells in permutations."""
TORCH_ENTRIES = 2**23
"""Numbers of a tensor."""
# older versions of torch have it under cuda only
OutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def unless_memory_ends(compute: Callable[[], Result]) -> Result | None:
    """Return ``None`` where the device has too little memory; the failed tensors are freed by then."""
    try:
        return compute()
    except OutOfMemory:
        return None
