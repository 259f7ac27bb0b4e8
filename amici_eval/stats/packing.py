"""Factors laid out for the permutation kernels: centred, float32, a cell a row, heads innermost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Bool, Float, Float32, Float64, Int64

__all__ = ["LANES", "PackedPair", "pack"]

LANES = 16
"""Rows are padded with zeros to a multiple of this many numbers (64 bytes, a cache line)."""

_BLOCK_ENTRIES = 2**16
_ROUNDING = 1e-12
"""Numbers that vary by less than this share of their size are constants that float64 rounded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedPair:
    """Two sets of factors, of the heads that have a test.

    Parameters
    ----------
    f, z
        Shape (groups, cells, width): in group g, number ``a * lanes + l`` of a row is column a of head ``g * lanes +
        l``; the rest is zero. A head's numbers are multiplied by a power of two, so that none over- or underflows.
    heads
        Which of all heads these are.
    n_columns, lanes
        Columns a head, heads (padded to a divisor of 16) side by side.
    sizes
        Shape (alive,): ``||F_h|| * ||Z_h||`` of what is stored.
    """

    f: Float32[np.ndarray, "groups cells width"]
    z: Float32[np.ndarray, "groups cells width"]
    heads: Int64[np.ndarray, " alive"]
    n_columns: int
    lanes: int
    sizes: Float64[np.ndarray, " alive"]

    def of_head(
        self, values: Float32[np.ndarray, "groups cells width"], number: int
    ) -> Float32[np.ndarray, "cells columns"]:
        """Return a view of ``f`` or ``z``: the factors of the ``number``-th of these heads."""
        group, lane = divmod(number, self.lanes)
        return values[group, :, lane : lane + self.n_columns * self.lanes : self.lanes]

    def per_head(self, sums: Float64[np.ndarray, "... groups lanes"]) -> Float64[np.ndarray, "... alive"]:
        """Return the sums per head of sums per lane (``LANES`` of them)."""
        split = sums.reshape(*sums.shape[:-1], LANES // self.lanes, self.lanes).sum(axis=-2)
        heads: Float64[np.ndarray, "... alive"] = split.reshape(*sums.shape[:-2], -1)[..., : self.heads.size]
        return heads


def pack(
    factors: Float[np.ndarray, "cells columns heads"],
    images: Float[np.ndarray, "cells columns heads"],
    *,
    dead: Bool[np.ndarray, " heads"],
) -> PackedPair:
    """Centre factors and their images over cells in float64, round them to float32 and lay them out.

    Heads that are ``dead``, not finite, or whose factors do not vary at all are left out.
    """
    moments = [_moments(values) for values in (factors, images)]
    with np.errstate(invalid="ignore"):
        dead = dead | ~np.isfinite(moments[0][1] + moments[1][1])
    heads = np.flatnonzero(~dead)
    f, f_norms = _packed(factors, heads, *moments[0])
    alive = f_norms > 0.0
    if not alive.all():
        heads = heads[alive]
        f, f_norms = _packed(factors, heads, *moments[0])
    z, z_norms = _packed(images, heads, *moments[1])
    lanes = _lanes(heads.size)
    return PackedPair(f=f, z=z, heads=heads, n_columns=factors.shape[1], lanes=lanes, sizes=f_norms * z_norms)


def _lanes(n_heads: int) -> int:
    return min(LANES, 1 << max(0, n_heads - 1).bit_length())


def _blocks(n_cells: int, row: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ENTRIES // max(1, row))
    return (slice(first, min(first + step, n_cells)) for first in range(0, n_cells, step))


def _moments(
    values: Float[np.ndarray, "cells columns heads"],
) -> tuple[Float64[np.ndarray, "columns heads"], Float64[np.ndarray, " heads"]]:
    """Return the mean over cells, and the norm of each head before centring."""
    n_cells, n_columns, n_heads = values.shape
    total, squares = np.zeros((n_columns, n_heads)), np.zeros(n_heads)
    # what is not finite makes its head a dead one
    with np.errstate(invalid="ignore", over="ignore"):
        for rows in _blocks(n_cells, n_columns * n_heads):
            block = values[rows].astype(np.float64)
            total += block.sum(axis=0)
            squares += np.einsum("iah,iah->h", block, block)
        return total / n_cells, np.sqrt(squares)


def _packed(
    values: Float[np.ndarray, "cells columns heads"],
    heads: Int64[np.ndarray, " alive"],
    mean: Float64[np.ndarray, "columns heads"],
    norms: Float64[np.ndarray, " heads"],
) -> tuple[Float32[np.ndarray, "groups cells width"], Float64[np.ndarray, " alive"]]:
    """Return the rows of some heads and the norm of each; a head that is constant up to rounding is 0."""
    n_cells, n_columns, n_heads = values.shape
    lanes = _lanes(heads.size)
    n_groups = max(1, -(-heads.size // lanes))
    packed = _aligned((n_groups, n_cells, -(-n_columns * lanes // LANES) * LANES))
    squares = np.zeros(n_heads)
    # only roughly of size 1: rounding to float32 does not see a power of two
    scale = np.exp2(-np.frexp(norms / np.sqrt(n_cells * n_columns))[1].astype(np.float64))
    chosen = slice(None) if heads.size == n_heads else heads
    for rows in _blocks(n_cells, n_columns * n_heads):
        block = values[rows][:, :, chosen].astype(np.float64)
        block -= mean[:, chosen]
        block *= scale[chosen]
        rounded = block.astype(np.float32)
        np.copyto(block, rounded)
        squares[chosen] += np.einsum("iah,iah->h", block, block)
        for group in range(n_groups):
            own = rounded[:, :, group * lanes : (group + 1) * lanes]
            target = packed[group, rows, : n_columns * lanes].reshape(-1, n_columns, lanes)
            target[:, :, : own.shape[2]] = own
    found = np.sqrt(squares[heads])
    constant = np.flatnonzero(~(found > _ROUNDING * norms[heads] * scale[heads]))
    for number in constant:
        group, lane = divmod(int(number), lanes)
        packed[group, :, lane : lane + n_columns * lanes : lanes] = 0.0
    found[constant] = 0.0
    return packed, found


def _aligned(shape: tuple[int, ...]) -> Float32[np.ndarray, "groups cells width"]:
    """Zeros that begin at a cache line; NumPy's own large arrays lie on huge pages, which random rows need."""
    n = int(np.prod(shape))
    raw = np.empty(n + LANES, dtype=np.float32)
    first = (-raw.ctypes.data % 64) // 4
    packed = raw[first : first + n].reshape(shape)
    packed.fill(0.0)
    return packed
