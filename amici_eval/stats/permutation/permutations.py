"""Permutations that depend on their number alone: the same on any device, in any batch, on any worker."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common import threads as compiled

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64, UInt64

_STORED_WORDS = 2**22


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
        """Return ``batch`` as int32, drawn by several threads if numba is installed."""
        kernels = compiled.kernels()
        if kernels is None:
            return self._batch_of_numpy(start, stop)
        orders, key = np.empty((stop - start, self.n_cells), dtype=np.uint32), self.key()
        compiled.in_threads(
            [
                partial(kernels.shuffle_rows, key, start + first, orders[first:last])
                for first, last in compiled.cuts(stop - start, 4 * n_threads if n_threads > 1 else 1)
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

    def _batch_of_numpy(self, start: int, stop: int) -> Int32[np.ndarray, "permutations cells"]:
        orders = np.empty((stop - start, self.n_cells), dtype=np.int32)
        step = max(1, _STORED_WORDS // self.n_cells)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            orders[first - start : last - start] = _shuffled(self.key(), first, last, self.n_cells).T
        return orders


def _shuffled(
    key: UInt64[np.ndarray, " 2"], start: int, stop: int, n_cells: int
) -> Int32[np.ndarray, "cells permutations"]:
    """Return permutations as columns, so that a swap works on whole rows."""
    words = np.empty((n_cells - 1, stop - start), dtype=np.uint64)
    for column, index in enumerate(range(start, stop)):
        words[:, column] = np.random.Philox(key=key, counter=[0, index, 0, 0]).random_raw(n_cells - 1)
    others = _high_product(words, np.arange(n_cells, 1, -1, dtype=np.uint64)[:, None]).astype(np.int64)
    columns = np.arange(stop - start)
    orders = np.repeat(np.arange(n_cells, dtype=np.int32)[:, None], stop - start, axis=1)
    for other, i in zip(others, range(n_cells - 1, 0, -1), strict=True):
        moved = orders[i].copy()
        orders[i] = orders[other, columns]
        orders[other, columns] = moved
    return orders


def _high_product(
    words: UInt64[np.ndarray, "swaps permutations"], factors: UInt64[np.ndarray, "swaps 1"]
) -> UInt64[np.ndarray, "swaps permutations"]:
    """Return ``words * factors // 2**64``, exactly, for factors below 2**32: no partial sum reaches 2**64."""
    half = np.uint64(32)
    low = words & np.uint64(2**32 - 1)
    product: UInt64[np.ndarray, "swaps permutations"] = (words >> half) * factors + ((low * factors) >> half)
    return product >> half
