"""Moments of the heads' predictions and of expression, from one pass over the cells of a type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from amici_eval.stats.permutation.head_sums import HeadSums

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from jaxtyping import Bool, Float32, Float64, Int64

    from amici_eval.stats.readout import Readout
    from amici_eval.stats.spatial.positions import CellPositions

__all__ = ["Block", "TypeMoments", "factors_of", "gather_moments", "merge_tiles"]


class Block(Protocol):
    """Expression of some of the cells."""

    @property
    def positions(self) -> Int64[np.ndarray, " rows"]:
        """Which of the cells."""
        ...

    @property
    def values(self) -> Float32[np.ndarray, "rows genes"]:
        """Their expression."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TypeMoments:
    """Moments of one receiver type: per tile, per head and per gene.

    Parameters
    ----------
    tiles
        Numbers of the tiles that hold cells of the type, shape (tiles,).
    n_cells
        Cells in each, shape (tiles,).
    target_mean, target_m2
        Mean and centred sum of squares of expression in each tile, shape (tiles, genes).
    residual_mean, residual_m2
        The same of prediction minus expression, each head kept alone, shape (tiles, heads, genes).
    full_mean, full_m2
        The same of the whole model, shape (tiles, genes).
    predicted_ss_gene
        Per head and gene, over all cells: squares of the prediction's deviation from its mean, shape (heads, genes).
    pixel_sums
        Expression summed over the cells of each pixel, shape (pixels, genes); no pixels if none were asked for.
    kept_values
        Expression of the cells that were to be kept, shape (kept, genes), float32.
    constant_genes
        Genes with one value in all cells of the type, shape (genes,).
    projected
        Expression as the readout sees it, ``(Y - mean) @ weights``, shape (cells, 1 + heads * head_size), float32.
    scale
        What the layer norm divides by in each cell with one head kept, shape (cells, heads).
    predicted_size
        Per head, summed over genes and cells: squares of the prediction, shape (heads,).
    masked_m2
        Without the nearest neighbours, over the cells and genes: centred squares of prediction minus expression of
        each head kept alone, then of the whole model, shape (heads + 1,); ``None`` if that was not asked for.
    """

    tiles: Int64[np.ndarray, " tiles"]
    n_cells: Int64[np.ndarray, " tiles"]
    target_mean: Float64[np.ndarray, "tiles genes"]
    target_m2: Float64[np.ndarray, "tiles genes"]
    residual_mean: Float64[np.ndarray, "tiles heads genes"]
    residual_m2: Float64[np.ndarray, "tiles heads genes"]
    full_mean: Float64[np.ndarray, "tiles genes"]
    full_m2: Float64[np.ndarray, "tiles genes"]
    predicted_ss_gene: Float64[np.ndarray, "heads genes"]
    pixel_sums: Float64[np.ndarray, "pixels genes"]
    kept_values: Float32[np.ndarray, "kept genes"]
    constant_genes: Bool[np.ndarray, " genes"]
    projected: Float32[np.ndarray, "cells columns"]
    scale: Float64[np.ndarray, "cells heads"]
    predicted_size: Float64[np.ndarray, " heads"]
    masked_m2: Float64[np.ndarray, " models"] | None = None

    def without_cells(self) -> TypeMoments:
        """Return the same without what is kept per cell."""
        return replace(
            self,
            projected=self.projected[:0],
            scale=self.scale[:0],
            pixel_sums=self.pixel_sums[:0],
            kept_values=self.kept_values[:0],
        )

    @property
    def target_ss(self) -> float:
        """Squares of expression's deviation from its mean over the type, summed over cells and genes that vary."""
        return float(self.target_ss_gene[~self.constant_genes].sum())

    @property
    def target_ss_gene(self) -> Float64[np.ndarray, " genes"]:
        """Squares of expression's deviation from its mean over the type, summed over cells."""
        return merge_tiles(self.n_cells, self.target_mean, self.target_m2)

    @property
    def predicted_ss(self) -> Float64[np.ndarray, " heads"]:
        """Squares of each head's prediction's deviation from its mean, summed over cells and genes."""
        predicted_ss: Float64[np.ndarray, " heads"] = self.predicted_ss_gene.sum(axis=1)
        return predicted_ss

    @property
    def common(self) -> Float64[np.ndarray, "heads genes"]:
        """Sums over cells of prediction times expression, both as deviations from their means."""
        residual = merge_tiles(self.n_cells, self.residual_mean, self.residual_m2)
        common: Float64[np.ndarray, "heads genes"] = (self.predicted_ss_gene + self.target_ss_gene - residual) / 2.0
        return common

    def explained_variance(self) -> tuple[Float64[np.ndarray, "heads genes"], Float64[np.ndarray, " heads"]]:
        """Return explained variance per head and gene (NaN for constant genes), and per head over all genes."""
        target = merge_tiles(self.n_cells, self.target_mean, self.target_m2)
        residual = merge_tiles(self.n_cells, self.residual_mean, self.residual_m2)
        per_gene = np.full(residual.shape, np.nan)
        varies = ~self.constant_genes
        per_gene[:, varies] = 1.0 - residual[:, varies] / target[varies]
        total = float(target[varies].sum())
        overall = 1.0 - residual.sum(axis=1) / total if total > 0.0 else np.full(len(residual), np.nan)
        return per_gene, overall

    @property
    def explained_by_all(self) -> float:
        """Explained variance of the whole model over all genes; NaN if no gene varies."""
        total = self.target_ss
        residual = float(merge_tiles(self.n_cells, self.full_mean, self.full_m2).sum())
        return 1.0 - residual / total if total > 0.0 else float("nan")

    @property
    def explained_without_nearest(self) -> Float64[np.ndarray, " models"]:
        """Explained variance over all genes with the nearest neighbours masked out: of each head, then of all."""
        if self.masked_m2 is None:
            return np.full(self.residual_m2.shape[1] + 1, np.nan)
        total = self.target_ss
        explained: Float64[np.ndarray, " models"] = 1.0 - self.masked_m2 / (total if total > 0.0 else np.nan)
        return explained


def merge_tiles(
    n_cells: Int64[np.ndarray, " tiles"], mean: Float64[np.ndarray, "tiles ..."], m2: Float64[np.ndarray, "tiles ..."]
) -> Float64[np.ndarray, ...]:
    """Return the centred sum of squares over all tiles together (Chan, Golub & LeVeque 1983).

    Parameters
    ----------
    n_cells, mean, m2
        Cells, mean and centred sum of squares of each tile.
    """
    weight = n_cells.astype(np.float64).reshape(-1, *(1,) * (mean.ndim - 1))
    overall = (weight * mean).sum(axis=0) / weight.sum()
    merged: Float64[np.ndarray, ...] = (m2 + weight * (mean - overall) ** 2).sum(axis=0)
    return merged


def gather_moments(
    outputs: Float32[np.ndarray, "cells outputs"],
    readout: Readout,
    blocks: Iterable[Block],
    *,
    tiles: Int64[np.ndarray, " cells"],
    place: CellPositions | None = None,
    without_nearest: Float32[np.ndarray, "cells outputs"] | None = None,
    device: str = "cpu",
) -> TypeMoments:
    """Run once over the cells of a type and return the moments from which everything else follows.

    Parameters
    ----------
    outputs
        What attention brings to each cell.
    readout
        How that becomes predicted expression.
    blocks
        Expression of all cells, in any order, each cell once.
    tiles
        Tile of each cell.
    place
        Where the cells lie, if what tests in tissue need is wanted: sums over pixels, and expression of near pairs.
    without_nearest
        What attention brings to each cell without its nearest neighbour, if what that explains is wanted.
    device
        Torch device that has float64.

    Notes
    -----
    With one head kept a prediction has rank head_size + 1: its variance and its covariance with expression follow
    from moments of the factors ``F = [1, z] / scale``. Products of factors are summed in float64; no prediction of
    cells x genes is formed.
    """
    n_cells, n_genes, n_heads = len(outputs), len(readout.offset), readout.n_heads
    present, local = np.unique(tiles, return_inverse=True)
    n_tiles = len(present)
    counts = np.bincount(local, minlength=n_tiles).astype(np.int64)
    keeps: list[list[Collection[int]]] = [[[head] for head in range(n_heads)], [range(n_heads)]]
    heads, whole = (HeadSums(readout, keep, n_tiles=n_tiles, device=device) for keep in keeps)
    masked = [] if without_nearest is None else [HeadSums(readout, keep, n_tiles=1, device=device) for keep in keeps]
    weights = torch.from_numpy(readout.weights).to(device)
    y_sum, yy = (torch.zeros(n_tiles, n_genes, dtype=torch.float64, device=device) for _ in range(2))
    in_place = _InPlace(place, n_cells, n_genes, device=device)
    lowest, highest = (np.full(n_genes, end, dtype=np.float32) for end in (np.inf, -np.inf))
    projected = np.empty((n_cells, readout.n_columns), dtype=np.float32)
    scale = np.empty((n_cells, n_heads))
    room: torch.Tensor | None = None

    for block in blocks:
        order = np.argsort(local[block.positions], kind="stable")
        positions, values = block.positions[order], block.values[order]
        np.minimum(lowest, values.min(axis=0), out=lowest)
        np.maximum(highest, values.max(axis=0), out=highest)
        # written in place for every block: fresh memory of this size costs as much as the arithmetic
        if room is None or len(room) < len(values):
            room = _room(len(values), n_genes, device=device)
        wide = room[: len(values)].copy_(torch.from_numpy(values))
        # in float64, then rounded: cells with the same expression must not differ by where they stand in a block
        projected[positions] = (wide @ weights).float().cpu().numpy()
        z = torch.from_numpy(outputs[positions]).to(device)
        alone, deviation = heads.factors(z)
        together, _ = whole.factors(z)
        scale[positions] = deviation.cpu().numpy()
        in_place.add(positions, values, wide)
        if without_nearest is not None:
            z = torch.from_numpy(without_nearest[positions]).to(device)
            for sums in masked:
                sums.add(0, sums.factors(z)[0], wide)
        ends = np.flatnonzero(np.diff(local[positions], append=n_tiles)) + 1
        start = 0
        for end in ends.tolist():
            tile, y = int(local[positions[start]]), wide[start:end]
            heads.add(tile, alone[start:end], y)
            whole.add(tile, together[start:end], y)
            y_sum[tile] += y.sum(dim=0)
            yy[tile] += y.square().sum(dim=0)
            start = end
    projected -= projected.mean(axis=0, dtype=np.float64).astype(np.float32)

    n = torch.from_numpy(counts.astype(np.float64)).to(device)[:, None]
    target_mean = y_sum / n
    of_heads, of_whole = (sums.residuals(n, target_mean, yy) for sums in (heads, whole))
    overall, squares = y_sum.sum(dim=0, keepdim=True) / n_cells, yy.sum(dim=0, keepdim=True)
    of_masked = [sums.residuals(n.sum(dim=0, keepdim=True), overall, squares).m2[0].sum(dim=1) for sums in masked]
    return TypeMoments(
        tiles=present,
        n_cells=counts,
        target_mean=target_mean.cpu().numpy(),
        target_m2=(yy - n * target_mean**2).clamp_(min=0.0).cpu().numpy(),
        residual_mean=of_heads.mean.cpu().numpy(),
        residual_m2=of_heads.m2.cpu().numpy(),
        full_mean=of_whole.mean[:, 0].cpu().numpy(),
        full_m2=of_whole.m2[:, 0].cpu().numpy(),
        predicted_ss_gene=of_heads.predicted_ss.cpu().numpy(),
        pixel_sums=in_place.pixel_sums.cpu().numpy(),
        kept_values=in_place.kept_values,
        constant_genes=lowest == highest,
        projected=projected,
        scale=scale,
        predicted_size=of_heads.predicted_size.cpu().numpy(),
        masked_m2=torch.cat(of_masked).cpu().numpy() if of_masked else None,
    )


class _InPlace:
    """What tests in tissue need of expression: sums over pixels, and the values of the cells of near pairs."""

    def __init__(self, place: CellPositions | None, n_cells: int, n_genes: int, *, device: str) -> None:
        self._pixel = None if place is None else place.grid.pixel
        kept = np.zeros(0, dtype=np.int64) if place is None else place.near.cells
        self._slot = np.full(n_cells, -1, dtype=np.int64)
        self._slot[kept] = np.arange(len(kept))
        n_pixels = 0 if place is None else place.grid.n_pixels
        self.pixel_sums = torch.zeros((n_pixels, n_genes), dtype=torch.float64, device=device)
        self.kept_values = np.empty((len(kept), n_genes), dtype=np.float32)

    def add(self, positions: Int64[np.ndarray, " rows"], values: np.ndarray, wide: torch.Tensor) -> None:
        """Count some cells in: as they were read, and in float64 on the device."""
        if self._pixel is None:
            return
        slots = self._slot[positions]
        self.kept_values[slots[slots >= 0]] = values[slots >= 0]
        self.pixel_sums.index_add_(0, torch.from_numpy(self._pixel[positions]).to(wide.device), wide)


def factors_of(
    outputs: Float32[np.ndarray, "cells outputs"], moments: TypeMoments, readout: Readout
) -> tuple[Float64[np.ndarray, "cells rank heads"], Float32[np.ndarray, "cells rank heads"]]:
    """Return each head's factors ``F = [1, z] / scale`` and images ``Z``: ``<P_i, Y_j> = <F_i, Z_j>`` plus a constant.

    Parameters
    ----------
    outputs
        What attention brings to each cell.
    moments, readout
        Of the type.
    """
    n_heads, size = readout.n_heads, readout.head_size
    factors = np.empty((len(outputs), size + 1, n_heads))
    images = np.empty((len(outputs), size + 1, n_heads), dtype=np.float32)
    factors[:, 0] = 1.0 / moments.scale
    by_head = outputs.reshape(-1, n_heads, size).transpose(0, 2, 1)
    np.divide(by_head, moments.scale[:, None, :], out=factors[:, 1:])
    images[:, 0] = moments.projected[:, :1]
    images[:, 1:] = moments.projected[:, 1:].reshape(-1, n_heads, size).transpose(0, 2, 1)
    return factors, images


def _room(*shape: int, device: str) -> torch.Tensor:
    """Return room for float64 numbers; on the CPU from NumPy, which asks for large pages: far fewer to be mapped."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.empty(shape))
    return torch.empty(shape, dtype=torch.float64, device=device)
