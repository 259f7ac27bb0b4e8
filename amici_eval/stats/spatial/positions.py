"""Where the cells of one type lie, as tests in tissue need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from amici_eval.stats.spatial.lag import LagGrid
from amici_eval.stats.spatial.near_pairs import NearPairs

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float64

__all__ = ["CellPositions"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CellPositions:
    """Where the cells of one type lie.

    Parameters
    ----------
    coordinates
        Shape (cells, dimensions), in the unit of the AnnData.
    samples
        Section of each cell, if known.
    grid, near
        Pixels over these cells, and pairs of those that are near each other.
    """

    coordinates: Float64[np.ndarray, "cells dimensions"]
    samples: np.ndarray | None
    grid: LagGrid
    near: NearPairs

    @classmethod
    def of(
        cls, coordinates: Float64[np.ndarray, "cells dimensions"], *, samples: np.ndarray | None = None, n_genes: int
    ) -> CellPositions:
        """Lay a grid over cells and find near pairs; ``n_genes`` bounds of how many cells expression is kept."""
        grid = LagGrid.of(coordinates, samples=samples)
        near = NearPairs.of(grid, coordinates, n_genes=n_genes)
        return cls(coordinates=coordinates, samples=samples, grid=grid, near=near)
