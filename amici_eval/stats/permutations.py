"""Permutations that depend on their number alone: the same on any device, in any batch, on any worker."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int64

__all__ = ["PermutationStream"]


@dataclass(frozen=True, kw_only=True)
class PermutationStream:
    """The random permutations of the cells of one stratum of one cell type.

    Permutation ``index`` is a function of (seed, cell type, stratum, index, number of cells) and of nothing else. No
    global random state is read or written.

    Parameters
    ----------
    seed
        The user's seed, at least 0.
    cell_type, stratum
        Labels of the cells that are permuted among themselves.
    n_cells
        How many there are; position i means the i-th cell in canonical order (by cell name).

    Notes
    -----
    Counter-based: a Philox-4x64 generator (Salmon et al. 2011), keyed by a hash of seed and labels, is set to
    ``2**64 * index`` and its raw 64-bit words are sorted. The words are specified by the algorithm, unlike the
    output of ``numpy.random.Generator`` methods, which may change between NumPy versions. Equal words have
    probability below n^2 / 2^65.
    """

    seed: int
    cell_type: str
    n_cells: int
    stratum: str = ""

    def batch(self, start: int, stop: int) -> Int64[np.ndarray, "permutations cells"]:
        """Return permutations ``start`` to ``stop - 1``, shape (stop - start, n_cells); row entry i names the cell that
        takes the place of cell i.
        """
        key = self._key()
        words = np.empty((stop - start, self.n_cells), dtype=np.uint64)
        for row, index in enumerate(range(start, stop)):
            words[row] = np.random.Philox(key=key, counter=[0, index, 0, 0]).random_raw(self.n_cells)
        return np.argsort(words, axis=1, kind="stable")

    def _key(self) -> Int64[np.ndarray, " 2"]:
        digest = hashlib.blake2b(digest_size=16)
        for part in (str(self.seed), self.cell_type, self.stratum):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)
