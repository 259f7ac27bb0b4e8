"""Moments of the heads' predictions and of expression, from one pass over the cells of a type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Bool, Float32, Float64, Int64

    from amici_eval.stats.readout import Readout

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
    predicted_ss, predicted_size
        Per head, summed over genes and cells: squares of the prediction's deviation from its mean, and squares of the
        prediction, shape (heads,).
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
    predicted_ss: Float64[np.ndarray, " heads"]
    predicted_size: Float64[np.ndarray, " heads"]

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
    pixels: Int64[np.ndarray, " cells"] | None = None,
    n_pixels: int = 0,
    kept: Int64[np.ndarray, " kept"] | None = None,
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
    pixels, n_pixels
        Pixel of each cell, and how many there are, if sums over pixels are wanted.
    kept
        Cells whose expression is wanted as it is, ascending.
    device
        Torch device that has float64.

    Notes
    -----
    With one head kept a prediction has rank head_size + 1: its variance and its covariance with expression follow
    from moments of the factors ``F = [1, z] / scale``. Products of factors are summed in float64; no prediction of
    cells x genes is formed.
    """
    n_heads, size = readout.n_heads, readout.head_size
    n_cells, n_genes = len(outputs), len(readout.offset)
    rank = size + 1
    present, local = np.unique(tiles, return_inverse=True)
    n_tiles = len(present)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    grams = _per_head_grams(readout).to(device)

    counts = np.bincount(local, minlength=n_tiles).astype(np.int64)
    weights = torch.from_numpy(readout.weights).to(device)
    per_head = torch.from_numpy(np.stack([readout.columns([head]) for head in range(n_heads)])).to(device)
    own = weights[:, per_head].permute(1, 0, 2).contiguous()  # heads x genes x rank
    own_by_rank = own.transpose(1, 2).contiguous()
    f_sum, ff = zeros(n_tiles, n_heads, rank), zeros(n_tiles, n_heads, rank, rank)
    py, y_sum, yy = zeros(n_tiles, n_heads, n_genes), zeros(n_tiles, n_genes), zeros(n_tiles, n_genes)
    kept = np.zeros(0, dtype=np.int64) if kept is None else kept
    place = np.full(n_cells, -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))
    kept_values = np.empty((len(kept), n_genes), dtype=np.float32)
    pixel_sums = zeros(n_pixels, n_genes)
    fy = zeros(n_heads * rank, n_genes)
    n_columns = readout.n_columns
    gram_of_all = torch.from_numpy(readout.gram).to(device)
    x_sum, xx, xy = zeros(n_tiles, n_columns), zeros(n_tiles, n_columns, n_columns), zeros(n_tiles, n_genes)
    x_by_y = zeros(n_columns, n_genes)
    weights_by_column = weights.T.contiguous()
    lowest = np.full(n_genes, np.inf, dtype=np.float32)
    highest = np.full(n_genes, -np.inf, dtype=np.float32)
    projected = np.empty((n_cells, readout.n_columns), dtype=np.float32)
    scale = np.empty((n_cells, n_heads))
    room: torch.Tensor | None = None

    for block in blocks:
        order = np.argsort(local[block.positions], kind="stable")
        positions, values = block.positions[order], block.values[order]
        np.minimum(lowest, values.min(axis=0), out=lowest)
        np.maximum(highest, values.max(axis=0), out=highest)
        expression = torch.from_numpy(values).to(device)
        # written in place for every block: fresh memory of this size costs as much as the arithmetic
        if room is None or len(room) < len(values):
            room = _room(len(values), n_genes, device=device)
        wide = room[: len(values)].copy_(expression)
        # in float64, then rounded: cells with the same expression must not differ by where they stand in a block
        projected[positions] = (wide @ weights).float().cpu().numpy()
        z = torch.from_numpy(outputs[positions]).to(device)
        factors, deviation = _factors(z, grams, readout)
        everything = _whole(z, gram_of_all, readout)
        wanted = place[positions] >= 0
        kept_values[place[positions][wanted]] = values[wanted]
        if pixels is not None:
            pixel_sums.index_add_(0, torch.from_numpy(pixels[positions]).to(device), wide)
        scale[positions] = deviation.cpu().numpy()
        ends = np.flatnonzero(np.diff(local[positions], append=n_tiles)) + 1
        start = 0
        for end in ends.tolist():
            tile = int(local[positions[start]])
            f, y = factors[start:end], wide[start:end]
            by_head = f.transpose(0, 1)
            f_sum[tile] += f.sum(dim=0)
            ff[tile].baddbmm_(by_head.transpose(1, 2), by_head)
            torch.mm(f.reshape(end - start, -1).T, y, out=fy)
            py[tile] += fy.view(n_heads, rank, n_genes).mul_(own_by_rank).sum(dim=1)
            x = everything[start:end]
            x_sum[tile] += x.sum(dim=0)
            xx[tile].addmm_(x.T, x)
            torch.mm(x.T, y, out=x_by_y)
            xy[tile] += x_by_y.mul_(weights_by_column).sum(dim=0)
            y_sum[tile] += y.sum(dim=0)
            yy[tile] += y.square().sum(dim=0)
            start = end
    projected -= projected.mean(axis=0, dtype=np.float64).astype(np.float32)

    n = torch.from_numpy(counts.astype(np.float64)).to(device)[:, None]
    offset = torch.from_numpy(readout.offset).to(device)
    target_mean = y_sum / n
    target_m2 = (yy - n * target_mean**2).clamp_(min=0.0)
    residual_mean, residual_m2 = zeros(n_tiles, n_heads, n_genes), zeros(n_tiles, n_heads, n_genes)
    predicted_ss, predicted_size = zeros(n_heads, n_genes), np.empty(n_heads)
    for head in range(n_heads):
        p_mean = (f_sum[:, head] @ own_by_rank[head]) / n
        pp = (own[head] @ ff[:, head]).mul_(own[head]).sum(dim=2)
        residual_mean[:, head] = p_mean + offset - target_mean
        raw = torch.add(pp, py[:, head], alpha=-2.0).add_(yy)
        residual_m2[:, head] = raw.sub_(n * (p_mean - target_mean) ** 2).clamp_(min=0.0)
        overall = (n * p_mean).sum(dim=0) / n_cells
        predicted_ss[head] = (pp.sum(dim=0) - n_cells * overall**2).clamp_(min=0.0)
        predicted_size[head] = float((pp.sum(dim=0) + n_cells * (2.0 * overall * offset + offset**2)).sum())
    x_mean = (x_sum @ weights_by_column) / n
    all_all = torch.stack([((weights @ own) * weights).sum(dim=1) for own in xx])
    full_m2 = (all_all - 2.0 * xy + yy - n * (x_mean - target_mean) ** 2).clamp_(min=0.0)
    return TypeMoments(
        tiles=present,
        n_cells=counts,
        target_mean=target_mean.cpu().numpy(),
        target_m2=target_m2.cpu().numpy(),
        residual_mean=residual_mean.cpu().numpy(),
        residual_m2=residual_m2.cpu().numpy(),
        full_mean=(x_mean + offset - target_mean).cpu().numpy(),
        full_m2=full_m2.cpu().numpy(),
        predicted_ss_gene=predicted_ss.cpu().numpy(),
        pixel_sums=pixel_sums.cpu().numpy(),
        kept_values=kept_values,
        constant_genes=lowest == highest,
        projected=projected,
        scale=scale,
        predicted_ss=predicted_ss.sum(dim=1).cpu().numpy(),
        predicted_size=predicted_size,
    )


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


def _per_head_grams(readout: Readout) -> torch.Tensor:
    columns = [readout.columns([head]) for head in range(readout.n_heads)]
    return torch.from_numpy(np.stack([readout.gram[np.ix_(c, c)] for c in columns]))


def _factors(outputs: torch.Tensor, grams: torch.Tensor, readout: Readout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``[1, z] / scale``, shape (cells, heads, rank), and the scale, shape (cells, heads), in float64."""
    n_cells = outputs.shape[0]
    x = outputs.new_empty((n_cells, readout.n_heads, readout.head_size + 1), dtype=torch.float64)
    x[:, :, 0] = 1.0
    x[:, :, 1:] = outputs.view(n_cells, readout.n_heads, readout.head_size)
    turned = torch.bmm(x.transpose(0, 1), grams).transpose(0, 1)
    scale = turned.mul_(x).sum(dim=2).clamp_(min=0.0).add_(readout.epsilon).sqrt_()
    return x.div_(scale[:, :, None]), scale


def _whole(outputs: torch.Tensor, gram: torch.Tensor, readout: Readout) -> torch.Tensor:
    """Return ``[1, z_0, ..., z_{H-1}] / scale`` of the whole model, shape (cells, columns), in float64."""
    x = outputs.new_empty((len(outputs), readout.n_columns), dtype=torch.float64)
    x[:, 0] = 1.0
    x[:, 1:] = outputs
    scale = (x @ gram).mul_(x).sum(dim=1).clamp_(min=0.0).add_(readout.epsilon).sqrt_()
    return x.div_(scale[:, None])


def _room(*shape: int, device: str) -> torch.Tensor:
    """Return room for float64 numbers; on the CPU from NumPy, which asks for large pages: far fewer to be mapped."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.empty(shape))
    return torch.empty(shape, dtype=torch.float64, device=device)
