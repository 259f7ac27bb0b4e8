"""Pairs of near cells by finer distances than pixels tell, from some of the pixels where cells are many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float64, Int64

    from amici_eval.stats.spatial.lag import LagGrid

__all__ = ["NearPairs"]

_EDGES = np.array([0.03, 0.06, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0])
"""Of the rings, in pixels: the last holds all that a pixel and the eight around it hold."""
_MOST_CELLS, _MOST_BYTES, _MOST_CANDIDATES = 2**14, 2**26, 2**20
_PAIRS_PER_RING = 10_000
"""More tell little more: noise of a mean product is then a hundredth of the variance."""
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NearPairs:
    """Pairs of cells in the same or in touching pixels, in rings of distance.

    Where correlation reaches less far than a pixel, the product of two covariances averaged over a pixel is too small.
    Where cells are few, these are all such pairs; where they are many, those around pixels that are drawn by a fixed
    rule, so that they depend on the cells and on nothing else.

    Parameters
    ----------
    cells
        The cells that occur in them, ascending.
    first, second
        Places among ``cells``, shape (pairs,).
    starts
        Where each ring's pairs begin, shape (rings + 1,): pairs are sorted by ring.
    pairs
        Ordered pairs of the whole tissue in each ring, shape (rings,), as estimated from the drawn ones.
    distances
        Middle of each ring, in coordinate units, shape (rings,).
    """

    cells: Int64[np.ndarray, " sampled"]
    first: Int64[np.ndarray, " pairs"]
    second: Int64[np.ndarray, " pairs"]
    starts: Int64[np.ndarray, " edges"]
    pairs: Float64[np.ndarray, " rings"]
    distances: Float64[np.ndarray, " rings"]

    @classmethod
    def of(cls, grid: LagGrid, coordinates: Float64[np.ndarray, "cells dimensions"], *, n_genes: int) -> NearPairs:
        """Choose pairs.

        Parameters
        ----------
        grid, coordinates
            Pixels and positions of the cells.
        n_genes
            Decides how many cells' expression may be kept.
        """
        order = np.argsort(grid.pixel, kind="stable")
        starts = np.concatenate([[0], np.cumsum(grid.counts)])
        _, rows, columns = grid.shape
        occupied = np.flatnonzero(grid.counts)
        # a fixed shuffle (Knuth's multiplicative hash): pixels that follow each other lie side by side
        occupied = occupied[np.argsort((occupied * 2654435761) % 2**32, kind="stable")]
        row, column = occupied // columns % rows, occupied % columns
        around = np.full((9, len(occupied)), -1)
        for number, (down, right) in enumerate((d, r) for d in (-1, 0, 1) for r in (-1, 0, 1)):
            inside = (row + down >= 0) & (row + down < rows) & (column + right >= 0) & (column + right < columns)
            around[number, inside] = (occupied + down * columns + right)[inside]
        sizes = np.where(around >= 0, grid.counts[around], 0)
        in_block = sizes.sum(axis=0)
        # many cells at one place: some of them serve
        n_own = np.minimum(grid.counts[occupied], np.maximum(1, _MOST_CANDIDATES // in_block))
        kept = np.cumsum(n_own * in_block) <= _MOST_CANDIDATES
        most_cells = int(np.clip(_MOST_BYTES // (4 * max(1, n_genes)), 1024, _MOST_CELLS))
        if len(order) > most_cells:
            kept &= np.cumsum(in_block) <= most_cells
        kept[0] = True
        first, second = [], []
        own, n_own = starts[occupied[kept]], n_own[kept]
        for number in range(9):
            n_other = sizes[number, kept]
            other = starts[np.maximum(around[number, kept], 0)]
            total = n_own * n_other
            which = np.repeat(np.arange(len(total)), total)
            place = np.arange(total.sum()) - np.repeat(np.cumsum(total) - total, total)
            first.append(order[own[which] + place // np.maximum(n_other[which], 1)])
            second.append(order[other[which] + place % np.maximum(n_other[which], 1)])
        left, right = np.concatenate(first), np.concatenate(second)
        different = left != right
        left, right = left[different], right[different]
        distance = np.linalg.norm(coordinates[left, :2] - coordinates[right, :2], axis=1)
        ring = np.minimum(np.searchsorted(_EDGES * grid.side, distance, side="left"), len(_EDGES) - 1)
        counted = np.bincount(ring, minlength=len(_EDGES)).astype(np.float64)
        chosen, ends = [], [0]
        for number in range(len(_EDGES)):
            members = np.flatnonzero(ring == number)
            step = max(1, -(-len(members) // _PAIRS_PER_RING))
            chosen.append(members[::step])
            ends.append(ends[-1] + len(chosen[-1]))
        pick = np.concatenate(chosen)
        cells, places = np.unique(np.concatenate([left[pick], right[pick]]), return_inverse=True)
        middles = (np.concatenate([[0.0], _EDGES[:-1]]) + _EDGES) / 2
        return cls(
            cells=cells,
            first=places[: len(pick)],
            second=places[len(pick) :],
            starts=np.array(ends),
            pairs=counted * (grid.n_near / max(counted.sum(), 1.0)),
            distances=middles * grid.side,
        )

    def products(self, values: torch.Tensor) -> torch.Tensor:
        """Return mean outer products: (fields, cells, columns) becomes (rings, fields, columns, columns)."""
        n_fields, _, n_columns = values.shape
        own = values[:, torch.from_numpy(self.cells).to(values.device)]
        sums = values.new_zeros((len(self.pairs), n_fields, n_columns, n_columns))
        for ring, left, right in self._chunks(values.device):
            sums[ring].baddbmm_(own[:, left].transpose(1, 2), own[:, right])
        sums += sums.transpose(2, 3).clone()
        return sums / (2.0 * self._counted(values))[:, None, None, None]

    def squares(self, values: torch.Tensor) -> torch.Tensor:
        """Return mean products in each ring of fields over ``cells``; (sampled, fields) becomes (rings, fields)."""
        sums = values.new_zeros((len(self.pairs), values.shape[1]))
        for ring, left, right in self._chunks(values.device):
            sums[ring] += (values[left] * values[right]).sum(dim=0)
        return sums / self._counted(values)[:, None]

    def _chunks(self, device: torch.device) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for ring, (start, stop) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            for begin in range(start, stop, _CHUNK):
                part = slice(begin, min(begin + _CHUNK, stop))
                yield (
                    ring,
                    torch.from_numpy(self.first[part]).to(device),
                    torch.from_numpy(self.second[part]).to(device),
                )

    def _counted(self, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.maximum(np.diff(self.starts), 1).astype(np.float64)).to(like.device)
