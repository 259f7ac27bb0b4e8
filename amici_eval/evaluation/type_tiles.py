"""Moments of one cell type by tile, whichever way they were kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.evaluation.tiling import part_of, tile_of
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE
from amici_eval.stats.permutation.moments import merge_tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float64, Int64

    from amici_eval.results.tile_sums import Moments
    from amici_eval.stats.permutation.moments import TypeMoments

__all__ = ["Rows", "kept_rows", "rows_of"]

_ROUNDING = 1e-10
"""Share of a gene's squares below which its variance is what float32 leaves of a constant."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Rows:
    """Moments of one type by tile: of expression, and of the residuals of each head kept alone and the whole model.

    Parameters
    ----------
    tiles, n_cells
        Shape (tiles,).
    target_mean, target_m2
        Shape (tiles, genes).
    residual_mean, residual_m2
        Shape (tiles, heads + 1, genes), the whole model last.
    varies
        Genes that vary over all cells of the type, shape (genes,).
    """

    tiles: Int64[np.ndarray, " tiles"]
    n_cells: Int64[np.ndarray, " tiles"]
    target_mean: Float64[np.ndarray, "tiles genes"]
    target_m2: Float64[np.ndarray, "tiles genes"]
    residual_mean: Float64[np.ndarray, "tiles models genes"]
    residual_m2: Float64[np.ndarray, "tiles models genes"]
    varies: Bool[np.ndarray, " genes"]

    def explained_variance(self) -> Float64[np.ndarray, " models"]:
        """Return explained variance over all genes; NaN where too few cells or no variance are there.

        Residuals count over all genes, as in :meth:`TypeMoments.explained_variance`: a prediction that varies where
        expression does not is an error, too.
        """
        n_models = self.residual_mean.shape[1]
        if self.n_cells.sum() < MIN_CELLS_EXPLAINED_VARIANCE:
            return np.full(n_models, np.nan)
        target = merge_tiles(self.n_cells, self.target_mean, self.target_m2)[self.varies].sum()
        residual = merge_tiles(self.n_cells, self.residual_mean, self.residual_m2).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(target > 0.0, 1.0 - residual / target, np.nan)


def rows_of(moments: TypeMoments, part: int | None = None) -> Rows:
    """Return the moments of a type by tile, of both parts together or of one of them."""
    chosen = np.ones(len(moments.tiles), dtype=bool) if part is None else part_of(moments.tiles) == part
    return _joined(
        tile_of(moments.tiles[chosen]),
        moments.n_cells[chosen],
        moments.target_mean[chosen],
        moments.target_m2[chosen],
        np.concatenate([moments.residual_mean, moments.full_mean[:, None]], axis=1)[chosen],
        np.concatenate([moments.residual_m2, moments.full_m2[:, None]], axis=1)[chosen],
        ~moments.constant_genes,
    )


def kept_rows(moments: Moments, cell_type: str, genes: Sequence[str]) -> Rows:
    """Return what was kept of a type by tile, of some genes in the order given, held-out cells and others together.

    Notes
    -----
    Kept moments are float32: a gene varies if its variance over the type is more than rounding leaves of a constant.
    """
    chosen = np.flatnonzero(moments.row_type == moments.cell_types.index(cell_type))
    position = {name: number for number, name in enumerate(moments.genes)}
    columns = np.array([position[name] for name in genes], dtype=np.int64)

    def of(values: np.ndarray) -> np.ndarray:
        return values[chosen][..., columns].astype(np.float64)

    n_cells, mean, m2 = moments.n_cells[chosen], of(moments.target_mean), of(moments.target_m2)
    size = m2.sum(axis=0) + (n_cells[:, None] * mean**2).sum(axis=0)
    spread = merge_tiles(n_cells, mean, m2) if len(chosen) else np.zeros(len(columns))
    return _joined(
        moments.row_tile[chosen],
        n_cells,
        mean,
        m2,
        np.concatenate([of(moments.residual_mean), of(moments.full_mean)[:, None]], axis=1),
        np.concatenate([of(moments.residual_m2), of(moments.full_m2)[:, None]], axis=1),
        spread > _ROUNDING * size,
    )


def _joined(
    tile_of_row: Int64[np.ndarray, " rows"],
    n_cells: Int64[np.ndarray, " rows"],
    target_mean: Float64[np.ndarray, "rows genes"],
    target_m2: Float64[np.ndarray, "rows genes"],
    residual_mean: Float64[np.ndarray, "rows models genes"],
    residual_m2: Float64[np.ndarray, "rows models genes"],
    varies: Bool[np.ndarray, " genes"],
) -> Rows:
    """Put the rows of a tile together (Chan, Golub & LeVeque 1983)."""
    tiles, place = np.unique(tile_of_row, return_inverse=True)
    in_tile = np.bincount(place, weights=n_cells, minlength=len(tiles)).astype(np.int64)

    def joined(mean: np.ndarray, m2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = n_cells.astype(np.float64).reshape(-1, *(1,) * (mean.ndim - 1))
        total = np.zeros((len(tiles), *mean.shape[1:]))
        np.add.at(total, place, weight * mean)
        total /= in_tile.reshape(-1, *(1,) * (mean.ndim - 1))
        spread = np.zeros_like(total)
        np.add.at(spread, place, m2 + weight * (mean - total[place]) ** 2)
        return total, spread

    target, residual = joined(target_mean, target_m2), joined(residual_mean, residual_m2)
    return Rows(
        tiles=tiles,
        n_cells=in_tile,
        target_mean=target[0],
        target_m2=target[1],
        residual_mean=residual[0],
        residual_m2=residual[1],
        varies=varies,
    )
