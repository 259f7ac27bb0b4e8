"""How much of the permutation test is held at a time."""

from __future__ import annotations

__all__ = ["STORED_INDICES", "TORCH_ENTRIES"]

STORED_INDICES = 2**26
"""Places of cells in permutations."""
TORCH_ENTRIES = 2**23
"""Numbers of a tensor."""
