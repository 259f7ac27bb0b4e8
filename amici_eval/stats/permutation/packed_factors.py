"""Factors laid out for the permutation kernels: centred, float32, a cell a row, heads innermost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.common import threads as compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from jaxtyping import Bool, Float, Float32, Float64, Int64

__all__ = ["LANES", "TIE_TOLERANCE", "PackedPair", "pack"]

LANES = 16
"""Rows are padded with zeros to a multiple of this many numbers (64 bytes, a cache line)."""
TIE_TOLERANCE = 1e-10
"""Relative to ||F_h|| ||Z_h||: sums of one permutation differ by less than this between devices and orders."""

_BLOCK_ENTRIES = 2**16
_INLINE_ENTRIES = 2**18
"""Below this, handing work to threads costs more than it saves."""
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
    order: Int64[np.ndarray, " cells"] | None = None,
) -> PackedPair:
    """Centre factors and their images over cells in float64, round them to float32 and lay them out.

    Row k is cell ``order[k]``, if there is an order. Heads that are ``dead``, not finite, or whose factors do not vary
    at all are left out.
    """
    moments = [_moments(values) for values in (factors, images)]
    with np.errstate(invalid="ignore"):
        dead = dead | ~np.isfinite(moments[0][1] + moments[1][1])
    heads = np.flatnonzero(~dead)
    f, f_norms = _packed(factors, heads, *moments[0], order)
    alive = f_norms > 0.0
    if not alive.all():
        heads = heads[alive]
        f, f_norms = _packed(factors, heads, *moments[0], order)
    z, z_norms = _packed(images, heads, *moments[1], order)
    lanes = _lanes(heads.size)
    return PackedPair(f=f, z=z, heads=heads, n_columns=factors.shape[1], lanes=lanes, sizes=f_norms * z_norms)


def _lanes(n_heads: int) -> int:
    return min(LANES, 1 << max(0, n_heads - 1).bit_length())


def _steps(n_cells: int, row: int) -> tuple[int, int]:
    """Return how many cells a block has, whatever the number of threads, and how many blocks there are."""
    step = max(1, _BLOCK_ENTRIES // max(1, row))
    return step, -(-n_cells // step)


def _blocks(n_cells: int, row: int) -> Iterator[slice]:
    step, _ = _steps(n_cells, row)
    return (slice(first, min(first + step, n_cells)) for first in range(0, n_cells, step))


def _kernels(values: Float[np.ndarray, "cells columns heads"]) -> ModuleType | None:
    """Return the compiled kernels where they are there and know such an array."""
    known = values.flags.c_contiguous and values.dtype in (np.float32, np.float64) and values.size > 0
    return compiled.kernels() if known else None


def _flat(values: Float[np.ndarray, "cells columns heads"]) -> Float[np.ndarray, "cells numbers"]:
    # a kernel is compiled anew for arrays that can be written to
    flat = values.reshape(len(values), -1).view()
    flat.flags.writeable = False
    return flat


def _by_block(
    n_blocks: int,
    n_entries: int,
    kernel: Callable[..., None],
    *arrays: Float64[np.ndarray, ...] | Float32[np.ndarray, ...],
) -> None:
    """Run ``kernel(first, last, *arrays)`` on ranges of blocks, in as many threads as torch uses."""
    n_threads = torch.get_num_threads() if n_entries > _INLINE_ENTRIES else 1
    cuts = compiled.cuts(n_blocks, 4 * n_threads if n_threads > 1 else 1)
    compiled.in_threads([partial(kernel, *cut, *arrays) for cut in cuts], n_threads, lambda _: None)


def _moments(
    values: Float[np.ndarray, "cells columns heads"],
) -> tuple[Float64[np.ndarray, "columns heads"], Float64[np.ndarray, " heads"]]:
    """Return the mean over cells, and the norm of each head before centring."""
    n_cells, n_columns, n_heads = values.shape
    if (kernels := _kernels(values)) is not None:
        step, n_blocks = _steps(n_cells, n_columns * n_heads)
        by_block = np.empty((2, n_blocks, n_columns * n_heads))
        _by_block(n_blocks, values.size, partial(kernels.block_moments, _flat(values), step), *by_block)
        with np.errstate(invalid="ignore", over="ignore"):
            summed = by_block.sum(axis=1).reshape(2, n_columns, n_heads)
            return summed[0] / n_cells, np.sqrt(summed[1].sum(axis=0))
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
    order: Int64[np.ndarray, " cells"] | None,
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
    if heads.size and (kernels := _kernels(values)) is not None:
        step, n_blocks = _steps(n_cells, n_columns * n_heads)
        sums = np.empty((n_blocks, n_columns * n_heads))
        source = (np.arange(n_columns)[:, None] * n_heads + heads).ravel()
        groups, own_lanes = np.divmod(np.arange(heads.size), lanes)
        column = np.arange(n_columns)[:, None] * lanes + own_lanes
        place = np.stack([np.broadcast_to(groups, column.shape).ravel(), column.ravel()], axis=1)
        cells = np.empty(0, dtype=np.int64) if order is None else order
        scales = np.broadcast_to(scale, mean.shape).ravel()
        kernel = partial(kernels.block_rows, _flat(values), cells, mean.ravel(), scales, source, place, step)
        _by_block(n_blocks, values.size, kernel, packed, sums)
        with np.errstate(invalid="ignore", over="ignore"):
            squares = sums.sum(axis=0).reshape(n_columns, n_heads).sum(axis=0)
    else:
        packed.fill(0.0)
        for rows in _blocks(n_cells, n_columns * n_heads):
            block = values[rows if order is None else order[rows]][:, :, chosen].astype(np.float64)
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
    """Return room that begins at a cache line; NumPy's own large arrays lie on huge pages, which random rows need."""
    n = int(np.prod(shape))
    raw = np.empty(n + LANES, dtype=np.float32)
    first = (-raw.ctypes.data % 64) // 4
    return raw[first : first + n].reshape(shape)
