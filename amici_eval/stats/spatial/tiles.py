"""Tiles of a tissue, blocks of tiles, and the order of cells on a Z-order curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64


def square_tiles(
    coordinates: Float64[np.ndarray, "cells dimensions"], *, n_tiles: int, samples: np.ndarray | None = None
) -> Int64[np.ndarray, " cells"]:
    """Return the number of the tile, about a square, in which each cell lies, counted from 0 without gaps.

    The window of a section is cut into about ``n_tiles`` tiles; a tile never holds cells of two sections (``samples``).
    """
    tile = np.zeros(len(coordinates), dtype=np.int64)
    groups = np.zeros(len(coordinates), dtype=np.int64)
    if samples is not None:
        groups = np.unique(samples, return_inverse=True)[1]
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        xy = coordinates[rows, :2] - coordinates[rows, :2].min(axis=0)
        side = _side(xy, n_tiles)
        steps = np.zeros(xy.shape, dtype=np.int64)
        if side > 0.0:
            # a whole number of columns and rows: no slivers at the far edges
            extent = xy.max(axis=0)
            n_along = np.maximum(np.round(extent / side).astype(np.int64), 1)
            steps = np.minimum((xy * (n_along / np.where(extent > 0.0, extent, 1.0))).astype(np.int64), n_along - 1)
        tile[rows] = tile.max(initial=0) + 1 + steps[:, 0] * (steps[:, 1].max() + 1) + steps[:, 1]
    return np.unique(tile, return_inverse=True)[1].astype(np.int64)


def tile_side(
    coordinates: Float64[np.ndarray, "cells dimensions"], *, n_tiles: int, samples: np.ndarray | None = None
) -> float:
    """Return the side of the tiles of :func:`square_tiles`, in coordinate units; the median over sections."""
    groups = np.zeros(len(coordinates)) if samples is None else samples.astype(str)
    parts = [coordinates[groups == group, :2] for group in np.unique(groups)]
    return float(np.median([_side(xy - xy.min(axis=0), n_tiles) for xy in parts]))


def _side(xy: Float64[np.ndarray, "cells two"], n_tiles: int) -> float:
    extent = xy.max(axis=0)
    return max(float(np.sqrt(extent[0] * extent[1] / n_tiles)), float(extent.max()) / n_tiles)


def balanced_blocks(
    centers: Float64[np.ndarray, "tiles two"], weights: Float64[np.ndarray, " tiles"], *, depth: int
) -> Int64[np.ndarray, " tiles"]:
    """Return in which of up to ``2**depth`` blocks of about equal weight each tile lies, by repeated halving."""
    block = np.zeros(len(centers), dtype=np.int64)
    for _ in range(depth):
        halved = 2 * block
        for number in np.unique(block):
            own = np.flatnonzero(block == number)
            across = int(np.ptp(centers[own], axis=0).argmax())
            # ties by the other coordinate, so that the order of tiles does not matter
            order = own[np.lexsort((centers[own, 1 - across], centers[own, across]))]
            before = np.cumsum(weights[order]) - weights[order] / 2.0
            halved[order[before > weights[order].sum() / 2.0]] += 1
        block = halved
    return np.unique(block, return_inverse=True)[1].astype(np.int64)


def tiles_of_width(
    coordinates: Float[np.ndarray, "cells dimensions"], *, width: float, samples: np.ndarray | None = None
) -> Int64[np.ndarray, " cells"]:
    """Return in which square of side ``width`` each cell lies, numbered from 0 without gaps.

    The squares of a section start at its lower corner and never hold cells of two sections (``samples``). Numbers go by
    section label, then column, then row, so that the order of the cells does not matter; lengths are in coordinate
    units.
    """
    xy = np.asarray(coordinates[:, :2], dtype=np.float64)
    groups = np.zeros(len(xy), dtype=np.int64) if samples is None else np.unique(samples, return_inverse=True)[1]
    # floats, because a tiny width asks for more columns than an int64 holds
    places = np.column_stack([groups.astype(np.float64), np.zeros_like(xy)])
    for group in np.unique(groups):
        rows = groups == group
        own = xy[rows] - xy[rows].min(axis=0)
        # cells on the far edge are in the last square, not in one of their own
        last = np.maximum(np.ceil(own.max(axis=0) / width) - 1.0, 0.0)
        places[rows, 1:] = np.minimum(np.floor(own / width), last)
    numbers: Int64[np.ndarray, " cells"] = np.unique(places, axis=0, return_inverse=True)[1].reshape(-1)
    return numbers.astype(np.int64)


def default_widths(correlation_length: float, extent: float) -> Float64[np.ndarray, " widths"]:
    """Return tile widths of 1/2, 1, 2 and 4 correlation lengths, strictly increasing, in coordinate units.

    Those above ``extent / 2``, of which fewer than two fit into the window, become one width of ``extent / 2``;
    ``extent`` is the longer side of the window.
    """
    for name, length in (("correlation_length", correlation_length), ("extent", extent)):
        if not (np.isfinite(length) and length > 0.0):
            msg = f"{name} is {length}; it must be a positive number of coordinate units"
            raise ValueError(msg)
    asked = correlation_length * np.array([0.5, 1.0, 2.0, 4.0])
    widths: Float64[np.ndarray, " widths"] = np.unique(np.minimum(asked, extent / 2.0))
    return widths


def morton_codes(xy: Float64[np.ndarray, "cells two"]) -> Int64[np.ndarray, " cells"]:
    """Return the place of each cell on a Z-order curve through the tissue (Morton 1966)."""
    extent = float(np.ptp(xy, axis=0).max()) or 1.0
    steps = ((xy - xy.min(axis=0)) / extent * (2**16 - 1)).astype(np.int64)
    code = np.zeros(len(xy), dtype=np.int64)
    for bit in range(16):
        code |= ((steps[:, 0] >> bit) & 1) << (2 * bit) | ((steps[:, 1] >> bit) & 1) << (2 * bit + 1)
    return code
