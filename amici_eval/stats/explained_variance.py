"""Explained variance, per gene and over all genes: of a prediction, and from sums over tiles of tissue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Bool, Float, Float64, Int64

MIN_CELLS_EXPLAINED_VARIANCE = 2
"""A variance over cells needs two of them."""

_ROW_BLOCK = 4096


@dataclass(frozen=True)
class ExplainedVariance:
    """Explained variance of one prediction of one group of cells.

    ``per_gene`` is NaN for constant genes; ``aggregated`` is over all genes, NaN if none varies.
    """

    per_gene: Float64[np.ndarray, " genes"]
    aggregated: float
    constant_genes: Bool[np.ndarray, " genes"]


def explained_variance(
    predictions: Float[np.ndarray, "cells genes"], targets: Float[np.ndarray, "cells genes"]
) -> ExplainedVariance:
    """Return which share of the variance of expression a prediction explains, per gene and over all genes.

    ``1 - var(P_g - Y_g) / var(Y_g)`` per gene, ``1 - sum_g var(P_g - Y_g) / sum_g var(Y_g)`` over all. Where a gene
    does not vary this is NaN; amici-st's explained-variance module says 0. Sums are in float64, in two passes.
    """
    n_cells = len(targets)
    # test for equality: the centred squares of equal values may not sum to exactly 0
    constant = np.asarray(np.all(targets == targets[:1], axis=0))
    residual_var = _sum_of_squares(predictions, targets) / (n_cells - 1)
    target_var = _sum_of_squares(targets, None) / (n_cells - 1)
    per_gene = np.full(targets.shape[1], np.nan)
    np.divide(residual_var, target_var, out=per_gene, where=~constant)
    total = float(target_var[~constant].sum())
    aggregated = 1.0 - float(residual_var.sum()) / total if total > 0.0 else float("nan")
    return ExplainedVariance(per_gene=1.0 - per_gene, aggregated=aggregated, constant_genes=constant)


def _sum_of_squares(
    left: Float[np.ndarray, "cells genes"], right: Float[np.ndarray, "cells genes"] | None
) -> Float64[np.ndarray, " genes"]:
    """Return the centred sum of squares of ``left - right`` per gene, in blocks of cells so that memory stays small."""

    def blocks() -> Iterator[Float64[np.ndarray, "rows genes"]]:
        for start in range(0, len(left), _ROW_BLOCK):
            rows = slice(start, start + _ROW_BLOCK)
            wide = left[rows].astype(np.float64)
            yield wide if right is None else wide - right[rows]

    mean, total = np.zeros(left.shape[1]), np.zeros(left.shape[1])
    for block in blocks():
        mean += block.sum(axis=0)
    mean /= len(left)
    for block in blocks():
        centred = block - mean
        total += np.einsum("ij,ij->j", centred, centred)
    return total


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TileSums:
    """Sums of one cell type by tile: of expression, and of the residuals of some models.

    Residuals are prediction minus expression; ``m2`` are centred sums of squares. ``varies``: genes whose expression
    varies over all cells of the type.
    """

    tiles: Int64[np.ndarray, " tiles"]
    n_cells: Int64[np.ndarray, " tiles"]
    target_mean: Float64[np.ndarray, "tiles genes"]
    target_m2: Float64[np.ndarray, "tiles genes"]
    residual_mean: Float64[np.ndarray, "tiles models genes"]
    residual_m2: Float64[np.ndarray, "tiles models genes"]
    varies: Bool[np.ndarray, " genes"]

    @property
    def target_squares(self) -> Float64[np.ndarray, "tiles genes"]:
        """Squares of expression about the means over all tiles."""
        return squares_about(self.n_cells, self.target_mean, self.target_m2)

    @property
    def residual_squares(self) -> Float64[np.ndarray, "tiles models genes"]:
        """Squares of residuals about the means over all tiles."""
        return squares_about(self.n_cells, self.residual_mean, self.residual_m2)

    @property
    def target_ss(self) -> float:
        """Centred sum of squares of expression over the cells and the genes that vary."""
        return float(self.target_squares.sum(axis=0)[self.varies].sum())

    @property
    def explained_variance(self) -> Float64[np.ndarray, " models"]:
        """Explained variance over all genes; NaN with too few cells or without variance.

        Residuals count over all genes: a prediction that varies where expression does not is an error, too.
        """
        total = self.target_ss if self.n_cells.sum() >= MIN_CELLS_EXPLAINED_VARIANCE else 0.0
        residual = self.residual_squares.sum(axis=0).sum(axis=1)
        return 1.0 - residual / total if total > 0.0 else np.full(len(residual), np.nan)

    @property
    def explained_variance_gene(self) -> Float64[np.ndarray, "models genes"]:
        """Explained variance per gene, NaN for genes that do not vary."""
        target, residual = self.target_squares.sum(axis=0), self.residual_squares.sum(axis=0)
        per_gene = np.full(residual.shape, np.nan)
        per_gene[:, self.varies] = 1.0 - residual[:, self.varies] / target[self.varies]
        return per_gene

    def of_models(self, models: Sequence[int] | Int64[np.ndarray, " chosen"]) -> TileSums:
        """Return the sums of some of the models."""
        return replace(self, residual_mean=self.residual_mean[:, models], residual_m2=self.residual_m2[:, models])

    def merged(self, tiles: Int64[np.ndarray, " tiles"], chosen: Bool[np.ndarray, " tiles"]) -> TileSums:
        """Merge the chosen rows that lie in one tile, given the tile of each row (Chan, Golub & LeVeque 1983)."""
        present, place = np.unique(tiles[chosen], return_inverse=True)
        n_cells = self.n_cells[chosen]
        in_tile = np.bincount(place, weights=n_cells, minlength=len(present)).astype(np.int64)

        def joined(mean: np.ndarray, m2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            weight = _along(n_cells, mean)
            total = np.zeros((len(present), *mean.shape[1:]))
            np.add.at(total, place, weight * mean)
            total /= _along(in_tile, mean)
            spread = np.zeros_like(total)
            np.add.at(spread, place, m2 + weight * (mean - total[place]) ** 2)
            return total, spread

        target = joined(self.target_mean[chosen], self.target_m2[chosen])
        residual = joined(self.residual_mean[chosen], self.residual_m2[chosen])
        return TileSums(
            tiles=present,
            n_cells=in_tile,
            target_mean=target[0],
            target_m2=target[1],
            residual_mean=residual[0],
            residual_m2=residual[1],
            varies=self.varies,
        )


def squares_about(
    n_cells: Int64[np.ndarray, " tiles"] | Float64[np.ndarray, " tiles"],
    mean: Float64[np.ndarray, "tiles ..."],
    m2: Float64[np.ndarray, "tiles ..."],
) -> Float64[np.ndarray, "tiles ..."]:
    """Return each tile's sum of squares about the mean over all tiles; their sum is that of all tiles together."""
    weight = _along(n_cells, mean)
    about: Float64[np.ndarray, "tiles ..."] = m2 + weight * (mean - (weight * mean).sum(axis=0) / weight.sum()) ** 2
    return about


def _along(n_cells: np.ndarray, values: np.ndarray) -> Float64[np.ndarray, "tiles ..."]:
    """Return numbers of cells in the shape that multiplies an array of tiles."""
    weight: Float64[np.ndarray, "tiles ..."] = n_cells.astype(np.float64).reshape(-1, *(1,) * (values.ndim - 1))
    return weight
