"""The evaluated cells cut into tiles of tissue, those the model was fitted on told apart from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.spatial.tiles import square_tiles, tile_side

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

    from amici_eval.evaluation.protocols import LocatedAccess

__all__ = ["HELD_OUT", "IN_SAMPLE", "Tiling", "part_of", "tile_of"]

IN_SAMPLE, HELD_OUT = 0, 1
_FEWEST_TILES, _MOST_TILES, _CELLS_PER_TILE = 9, 36, 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiling:
    """Tiles of some cells.

    Parameters
    ----------
    keys
        Of each cell, shape (cells,): its tile and its part in one number (:func:`tile_of`, :func:`part_of`).
    centers
        Mean position of each tile's cells, in coordinate units, shape (tiles, 2).
    width
        Side of a tile, in coordinate units.
    """

    keys: Int64[np.ndarray, " cells"]
    centers: Float64[np.ndarray, "tiles two"]
    width: float

    @classmethod
    def of(
        cls,
        access: LocatedAccess,
        rows: Int64[np.ndarray, " cells"],
        *,
        fitted: Bool[np.ndarray, " cells"] | None,
        n_types: int,
    ) -> Tiling:
        """Cut cells into squares."""
        samples, coordinates = access.samples(rows), access.coordinates(rows)
        n_sections = 1 if samples is None else len(set(samples.tolist()))
        in_all = int(np.clip(len(rows) // (n_types * _CELLS_PER_TILE), _FEWEST_TILES, _MOST_TILES))
        n_tiles = max(1, in_all // n_sections)
        tiles = square_tiles(coordinates, n_tiles=n_tiles, samples=samples)
        centers = np.stack([np.bincount(tiles, weights=column) for column in coordinates[:, :2].T], axis=1)
        return cls(
            keys=2 * tiles + (IN_SAMPLE if fitted is None else np.where(fitted, IN_SAMPLE, HELD_OUT)),
            centers=centers / np.bincount(tiles)[:, None],
            width=tile_side(coordinates, n_tiles=n_tiles, samples=samples),
        )


def tile_of(keys: Int64[np.ndarray, " keys"]) -> Int64[np.ndarray, " keys"]:
    """Return the tiles of keys."""
    return keys // 2


def part_of(keys: Int64[np.ndarray, " keys"]) -> Int64[np.ndarray, " keys"]:
    """Return the parts of keys: :data:`IN_SAMPLE` or :data:`HELD_OUT`."""
    return keys % 2
