"""Permutations that depend on their number alone: the same on any device, in any batch, on any worker."""

from __future__ import annotations

import functools
import hashlib
import importlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.threads import cuts, in_threads

if TYPE_CHECKING:
    from types import ModuleType

    from jaxtyping import Int32, Int64, UInt64

LANES = 16
"""Numbers in a vector of the kernels: rows of factors are padded with zeros to a multiple (64 bytes, a cache line)."""


@functools.cache
def compiled_kernels() -> ModuleType:
    """Return the module of compiled kernels, imported when first needed because loading the compiler takes long."""
    return importlib.import_module("amici_eval.stats.permutation.kernels")


@dataclass(frozen=True, kw_only=True)
class PermutationStream:
    """The random permutations of the cells (in order of cell name) of one stratum of one cell type.

    A permutation is a function of (seed, cell type, stratum, its index, number of cells) alone: Fisher-Yates with words
    w_0, w_1, ... of Philox-4x64-10 (Salmon et al. 2011), keyed by a hash of seed and labels, counter ``2**64 * index``;
    for i = n - 1 down to 1, entries i and ``w_(n-1-i) * (i + 1) // 2**64`` are swapped. The algorithm specifies the
    words, while methods of ``numpy.random.Generator`` may change between NumPy versions. An entry's probability has a
    relative error below n / 2^64.
    """

    seed: int
    cell_type: str
    n_cells: int
    stratum: str = ""

    def batch(self, start: int, stop: int) -> Int64[np.ndarray, "permutations cells"]:
        """Return permutations ``start`` to ``stop - 1``; entry i of a row is the cell put in place of cell i."""
        return self.narrow_batch(start, stop).astype(np.int64)

    def narrow_batch(self, start: int, stop: int, *, n_threads: int = 1) -> Int32[np.ndarray, "permutations cells"]:
        """Return ``batch`` as int32, drawn by several threads."""
        orders, key = np.empty((stop - start, self.n_cells), dtype=np.uint32), self.key()
        in_threads(
            [
                partial(compiled_kernels().shuffle_rows, key, start + first, orders[first:last])
                for first, last in cuts(stop - start, 4 * n_threads if n_threads > 1 else 1)
            ],
            n_threads,
            lambda _: None,
        )
        return orders.view(np.int32)

    def key(self) -> UInt64[np.ndarray, " 2"]:
        """Return the key of the generator: a hash of seed and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (str(self.seed), self.cell_type, self.stratum):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)
