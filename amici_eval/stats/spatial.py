"""Where cells lie: tiles of a tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

__all__ = ["square_tiles"]


def square_tiles(
    coordinates: Float64[np.ndarray, "cells dimensions"], *, n_tiles: int, samples: np.ndarray | None = None
) -> Int64[np.ndarray, " cells"]:
    """Return the number of the square tile in which each cell lies, counted from 0 without gaps.

    Parameters
    ----------
    coordinates
        Positions; the first two columns count.
    n_tiles
        About how many tiles the window of a section is cut into.
    samples
        Section of each cell; a tile never holds cells of two.
    """
    tile = np.zeros(len(coordinates), dtype=np.int64)
    groups = np.zeros(len(coordinates), dtype=np.int64)
    if samples is not None:
        groups = np.unique(samples, return_inverse=True)[1]
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        xy = coordinates[rows, :2] - coordinates[rows, :2].min(axis=0)
        extent = xy.max(axis=0)
        side = max(float(np.sqrt(extent[0] * extent[1] / n_tiles)), float(extent.max()) / n_tiles)
        steps = np.zeros(xy.shape, dtype=np.int64) if side == 0.0 else (xy / side).astype(np.int64)
        tile[rows] = tile.max(initial=0) + 1 + steps[:, 0] * (steps[:, 1].max() + 1) + steps[:, 1]
    return np.unique(tile, return_inverse=True)[1].astype(np.int64)
